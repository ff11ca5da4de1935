"""What the benchmark of placement makes of our own plans: what they cost with true sizes, and why a bar is missed.

Covers plans as the planner hands them out (relays and regrouped reductions included). Does not cover rivals
(``placement_graphs.py``) or running (``placement_runs.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from placement_figures import BAR_OPTIMUM, Row, mb, ratio
from placement_graphs import Given, Links, true_sizes
from placement_optimum import optimum
from placement_runs import Run

from meshcompute.graphs.taskgraph import name_of


class OurPlan:
    """A plan of ours, with sizes as they were seen.

    Parameters
    ----------
    assignment
        The planner's.
    seen
        Size of every value that was made, by key.
    """

    def __init__(self, assignment: Any, seen: Mapping[Any, float]) -> None:
        self.assignment = assignment
        estimated = dict(assignment.nbytes_by_key)
        self.estimated = estimated
        in_memory = {dep for task in assignment.tasks.values() for dep in task.dependencies} - assignment.tasks.keys()
        self.sizes = true_sizes(assignment.tasks, estimated, seen) | {
            key: float(seen.get(key, estimated.get(key, 0.0))) for key in in_memory
        }

    def crossings(self, pool_by_key: Mapping[Any, str]) -> Iterator[tuple[Any, str, str]]:
        """Give (key of a value, its site, another site that reads it), each once."""
        seen = set()
        for key, task in self.assignment.tasks.items():
            there = pool_by_key.get(key)
            for value in task.dependencies:
                here = pool_by_key.get(value)
                crossing = (value, here, there)
                if here is not None and there is not None and here != there and crossing not in seen:
                    seen.add(crossing)
                    yield value, here, there

    def _sum(self, sizes: Mapping[Any, float], links: Links, pool_by_key: Mapping[Any, str]) -> float:
        return sum(links.weigh({(a, b): sizes.get(key, 0.0)}) for key, a, b in self.crossings(pool_by_key))

    def cost(self, links: Links) -> float:
        """Sum up what it moves, by true sizes."""
        return self._sum(self.sizes, links, self.assignment.pool_by_key)

    def predicted_cost(self, links: Links) -> float:
        """Sum up what it moves, by the sizes that were estimated before."""
        return self._sum(self.estimated, links, self.assignment.pool_by_key)

    def cost_as_run(self, links: Links, site_by_key: Mapping[Any, str]) -> float:
        """Sum up what had to move, from where its tasks did run."""
        return self._sum(self.sizes, links, {**self.assignment.pool_by_key, **site_by_key})

    def worst_estimates(self) -> list[tuple[str, float, float]]:
        """List kinds of values whose bytes were guessed worst: name, bytes estimated, true bytes."""
        estimated: Counter[str] = Counter()
        true: Counter[str] = Counter()
        for key, size in self.sizes.items():
            estimated[name_of(key)] += int(self.estimated.get(key, 0.0))
            true[name_of(key)] += int(size)
        kinds = sorted(true, key=lambda kind: -abs(true[kind] - estimated[kind]))
        return [(kind, estimated[kind], true[kind]) for kind in kinds if abs(true[kind] - estimated[kind]) > 1024]


def explained(row: Row, *, given: Given, plans: Sequence[OurPlan], ours: Run, links: Links, time_limit: float) -> Row:
    """Say why a row misses a bar: the plan, the sizes, the graph or the run."""
    if row.wrong or not row.missed():
        return row
    why = []
    if row.planned > BAR_OPTIMUM * row.optimum:
        own = {key: nbytes for plan in plans for key, nbytes in plan.estimated.items()}  # learnt ones included
        _, estimated = given.problem(links.sites, own)
        best = optimum(estimated, links, time_limit)
        if row.predicted > BAR_OPTIMUM * best.cost:
            why.append(
                f"plan: by its own estimates it moves {mb(row.predicted)} MB, the best one {mb(best.cost)} "
                f"({ratio(row.predicted, best.cost):.2f} x)"
            )
        else:
            worst = [f"{kind} {mb(a)} for {mb(b)} MB" for plan in plans for kind, a, b in plan.worst_estimates()[:3]]
            why.append(f"sizes: the plan is best by estimates ({', '.join(worst)})")
    elif row.regroups and row.planned * 1.5 > row.optimum:
        why.append("graph: not regrouped")
    if row.measured > row.planned * 1.02 + 1024:
        pools = {key: pool for plan in plans for key, pool in plan.assignment.pool_by_key.items()}
        moved = Counter(
            f"{name_of(key)} {pools[key]}>{site}"
            for key, site in ours.site_by_key.items()
            if pools.get(key, site) != site
        )
        as_run = sum(plan.cost_as_run(links, ours.site_by_key) for plan in plans)
        if moved:
            kinds = ", ".join(f"{n} {kind}" for kind, n in moved.most_common(3))
            why.append(f"run: tasks elsewhere than planned ({kinds}), which makes {mb(as_run)} MB")
        if row.measured > as_run * 1.02 + 1024:
            why.append(f"run: {mb(row.measured - as_run)} MB more than where tasks ran makes necessary")
    return replace(row, why="; ".join(why))
