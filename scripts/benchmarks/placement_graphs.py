"""Graphs as the benchmark of placement judges them: what a plan costs, and what rivals would plan.

Covers the graph that Dask would run (fused, without relays or regrouping) as integers, the cost of a choice of sites,
and two rivals: everything without a place at the best single site, and the rule by layers of the published library,
in words of our own. Independent of :mod:`meshcompute.placement.placing`, which is judged here. Does not cover the exact
optimum (``placement_optimum.py``) or running anything.

References
----------
gjoseph92/dask-worker-pools, ``propagate.py``: a layer goes where most bytes of the layers that it reads are (of keys,
where a size is not known); low-level fusion is switched off.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
from dask._expr import FinalizeCompute
from dask._task_spec import Alias
from dask.base import collections_to_expr
from dask.core import flatten

from meshcompute import planning
from meshcompute.graphs import taskgraph
from meshcompute.graphs.pinnedtasks import extract_pins
from meshcompute.graphs.sizes import estimate_nbytes

FREE = -1  # a task that nothing with a place is connected to
CLIENT = "client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What a byte costs on its way.

    Attributes
    ----------
    name
        ``equal`` or ``skewed``.
    sites
        Names of the sites, in order.
    costs
        Cost of a byte from a site to another one, shape (sites, sites), zero on the diagonal.
    """

    name: str
    sites: tuple[str, ...]
    costs: tuple[tuple[float, ...], ...]

    @property
    def is_uniform(self) -> bool:
        """Whether all links cost the same."""
        return len({c for i, row in enumerate(self.costs) for j, c in enumerate(row) if i != j}) <= 1

    def weigh(self, nbytes_by_pair: Mapping[tuple[str, str], float]) -> float:
        """Sum up bytes by pair of sites, each with the cost of its link; what goes to the client is left out."""
        index = {name: i for i, name in enumerate(self.sites)}
        return sum(n * self.costs[index[a]][index[b]] for (a, b), n in nbytes_by_pair.items() if {a, b} <= index.keys())


def equal_links(sites: Sequence[str]) -> Links:
    """Make links that all cost one per byte."""
    n = range(len(sites))
    return Links(name="equal", sites=tuple(sites), costs=tuple(tuple(float(i != j) for j in n) for i in n))


def skewed_links(sites: Sequence[str]) -> Links:
    """Make links of which some cost more: whatever leaves the last site costs five, and it is far from the first."""
    n = len(sites)

    def cost(i: int, j: int) -> float:
        if i == j:
            return 0.0
        if i == n - 1:
            return 5.0
        return 2.0 if (i, j) == (0, n - 1) and n > 2 else 1.0 + 0.5 * (i > j)

    costs = tuple(tuple(cost(i, j) for j in range(n)) for i in range(n))
    return Links(name="skewed", sites=tuple(sites), costs=costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A graph, as integers.

    Attributes
    ----------
    dependencies
        For every task, those whose values it reads, shape (n,).
    nbytes
        Size of every value, shape (n,).
    pins
        For every task, the sites that may run it, or None for any, shape (n,).
    together
        Groups of tasks that have to run at one site.
    """

    dependencies: Sequence[Sequence[int]]
    nbytes: Sequence[float]
    pins: Sequence[tuple[int, ...] | None]
    together: Sequence[Sequence[int]] = ()

    def groups(self) -> list[int]:
        """Name each task's group, of those that have to be together, by one task of it, shape (n,)."""
        parent = list(range(len(self.pins)))

        def find(task: int) -> int:
            while parent[task] != task:
                task = parent[task]
            return task

        for group in self.together:
            for task in group[1:]:
                parent[find(task)] = find(group[0])
        return [find(task) for task in range(len(parent))]

    def together_at(self, sites: Sequence[int]) -> list[int]:
        """Bring every group to where most of what it makes would be."""
        made: dict[int, Counter[int]] = defaultdict(Counter)
        groups = self.groups()
        for task, group in enumerate(groups):
            made[group][sites[task]] += self.nbytes[task]
        return [made[group].most_common(1)[0][0] for group in groups]

    def crossings(self, sites: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Give (value, its site, another site that reads it), each once."""
        seen = set()
        for task, values in enumerate(self.dependencies):
            for value in values:
                crossing = (value, sites[value], sites[task])
                if crossing[1] != crossing[2] and FREE not in crossing[1:] and crossing not in seen:
                    seen.add(crossing)
                    yield crossing

    def cost(self, sites: Sequence[int], links: Links) -> float:
        """Sum up what crosses, each value once for each site that reads it, by the cost of its link."""
        return sum(self.nbytes[value] * links.costs[a][b] for value, a, b in self.crossings(sites))


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The graph that Dask would run, and what is known of it.

    Attributes
    ----------
    tasks
        Task by key.
    pools_by_key
        Sites that may run a task, of those that are tied to some.
    nbytes_by_key
        Estimated size of every value.
    keys
        What is wanted.
    """

    tasks: Mapping[Any, Any]
    pools_by_key: Mapping[Any, tuple[str, ...]]
    nbytes_by_key: Mapping[Any, float]
    keys: tuple[Any, ...]

    def problem(self, sites: Sequence[str], true_nbytes: Mapping[Any, float]) -> tuple[list[Any], Problem]:
        """Make integers of it: the keys in order, and the problem, with sizes as they were found to be."""
        keys = sorted(self.tasks, key=str)
        index = {key: i for i, key in enumerate(keys)}
        number = {site: i for i, site in enumerate(sites)}
        pins: list[tuple[int, ...] | None] = [
            tuple(number[name] for name in self.pools_by_key[key]) if key in self.pools_by_key else None for key in keys
        ]
        sizes = true_sizes(self.tasks, self.nbytes_by_key, true_nbytes)
        nbytes = [sizes[key] for key in keys]
        dependencies = [sorted(index[d] for d in self.tasks[key].dependencies if d in index) for key in keys]
        together = [[index[key] for key in group] for group in taskgraph.shuffles_of(dict(self.tasks)).values()]
        return keys, Problem(dependencies=dependencies, nbytes=nbytes, pins=pins, together=together)


def true_sizes(tasks: Mapping[Any, Any], estimated: Mapping[Any, float], seen: Mapping[Any, float]) -> dict[Any, float]:
    """Give every value's size as it was seen, or else as estimated."""
    return {key: float(seen.get(key, estimated.get(key, 0.0))) for key in tasks}


def given_graph(collections: Sequence[Any], *, is_finalized: bool = True, is_fused: bool = True) -> Given:
    """Tell what Dask would run.

    Parameters
    ----------
    collections
        What is computed together.
    is_finalized
        Whether each result is put together to one value, as ``compute`` does and ``persist`` does not.
    is_fused
        Whether tasks are fused.
    """
    with dask.config.set({"optimization.fuse.active": None if is_fused else False}):
        expr = collections_to_expr(tuple(collections))
        expr = (FinalizeCompute(expr) if is_finalized else expr).optimize()
        keys = tuple(flatten(expr.__dask_keys__()))
        layers = taskgraph.layers_of(expr)
        tasks, annotations = taskgraph.materialize(expr, keys)
    tasks, pins = extract_pins(tasks)
    for key, task in tasks.items():
        if isinstance(task, Alias) and task.target in pins:
            pins.setdefault(key, pins[task.target])
    planning._add_annotated_pins(pins, annotations)
    return Given(
        tasks=tasks,
        pools_by_key={key: pin.pools for key, pin in pins.items() if pin.pools},
        nbytes_by_key=estimate_nbytes(tasks, layers),
        keys=keys,
    )


def with_graph(given: Given, other: Given) -> Given:
    """Add another graph: tasks that both have are one."""
    return replace(
        given,
        tasks={**given.tasks, **other.tasks},
        pools_by_key={**given.pools_by_key, **other.pools_by_key},
        nbytes_by_key={**given.nbytes_by_key, **other.nbytes_by_key},
        keys=(*given.keys, *other.keys),
    )


def single_site_cost(problem: Problem, links: Links) -> float:
    """Find what it costs to run everything at one site, the best one, apart from what has its place."""

    def cost(site: int) -> float:
        sites = [site if pin is None or site in pin else pin[0] for pin in problem.pins]
        return problem.cost(problem.together_at(sites), links)

    return min(cost(site) for site in range(len(links.sites)))


def layer_rule_cost(problem: Problem, keys: Sequence[Any], links: Links) -> float:
    """Find what the rule by layers costs: a whole layer goes where most bytes of the layers that it reads are.

    Parameters
    ----------
    problem
        The graph without low-level fusion.
    keys
        Key of every task, shape (n,): its first part names the layer.
    links
        What bytes cost; the rule does not look at it.
    """
    layer_of = [str(key[0] if isinstance(key, tuple) else key) for key in keys]
    members: dict[str, list[int]] = defaultdict(list)
    for task, layer in enumerate(layer_of):
        members[layer].append(task)
    nbytes = {layer: sum(problem.nbytes[task] for task in tasks) for layer, tasks in members.items()}
    reads: dict[str, dict[str, None]] = {layer: {} for layer in members}
    for task, values in enumerate(problem.dependencies):
        reads[layer_of[task]].update(dict.fromkeys(layer_of[v] for v in values if layer_of[v] != layer_of[task]))
    sites: dict[str, int] = {}
    for layer in inputs_first(reads):
        pins = Counter(pin[0] for task in members[layer] if (pin := problem.pins[task]) is not None)
        held: Counter[int] = Counter()
        for source in reads[layer]:
            if sites.get(source, FREE) != FREE:
                held[sites[source]] += nbytes[source]
        sites[layer] = next((site for site, _ in (pins or held).most_common(1)), FREE)
    chosen = [
        sites[layer] if pin is None or sites[layer] in pin else pin[0]
        for layer, pin in zip(layer_of, problem.pins, strict=True)
    ]
    return problem.cost(problem.together_at(chosen), links)


def inputs_first(reads: Mapping[str, Iterable[str]]) -> list[str]:
    """Order what reads each other so that inputs come first; cycles are cut where they are met."""
    order: dict[str, None] = {}
    entered: set[str] = set()
    for name in reads:
        stack = [name]
        while stack:
            current = stack[-1]
            if current not in entered:
                entered.add(current)
                stack.extend(source for source in reads[current] if source not in entered)
            else:
                order.setdefault(stack.pop(), None)
    return list(order)
