"""Weigh crossing against computing, so that a pool with few threads is not buried under its data.

Covers plans whose cost is the time of all crossings and the time that the busiest pool computes. Does not cover the
search for a plan when work has a price (:func:`meshcompute.placement.placing.place` hands it in), nor when tasks run.

How: the time of the busiest pool is at least any weighted mean of all pools' times, and for given weights that is a
price of work per pool, for which the search is what it is without work. Pools that turn out busy get more weight. So
every round gives a plan and a bound. As equal work changes sides all at once when the weights do, chains of tasks are
then moved between the best plan and its rivals one by one. Every round plans anew: as many times the cost.

References
----------
M. Held, R. M. Karp, "The traveling-salesman problem and minimum spanning trees: part II", Math. Programming 1, 1971
(bounds by prices that follow what is violated).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from meshcompute.placement.objective import FREE, Placement, Terms, rows_of

__all__ = ["balanced"]

_ROUNDS = 6
_STEP = 1.5  # how fast weights follow loads
_ENOUGH = 1e-3  # share of the cost that another round would have to save
_BROADCAST = 16  # readers of a value from which they are counted by pool


def balanced(
    terms: Terms, work: Sequence[float], threads: Sequence[float], search: Callable[[Terms], Placement]
) -> Placement:
    """Find a plan whose crossings and busiest pool take little time together.

    Parameters
    ----------
    terms
        The graph and its costs, in seconds.
    work
        Seconds that one thread works on each task, shape (n,).
    threads
        Threads of every pool, shape (n_pools,).
    search
        Finds a plan for terms.

    Returns
    -------
    Placement
        The plan; its cost is the time of crossings plus that of the busiest pool. Tasks that nothing ties to a pool do
        not count.
    """
    n_pools = terms.n_pools
    usable = [max(count, 1e-9) for count in threads]
    weights = [0.0] * n_pools
    logits = [0.0] * n_pools
    best: Placement | None = None
    rivals: list[list[int]] = []
    bound = 0.0
    for _ in range(_ROUNDS):
        rates = [weight / count for weight, count in zip(weights, usable, strict=True)]
        plan = search(replace(terms, work=work, rates=rates))
        loads = _loads(plan.pools, work, usable)
        busy = max(loads)
        crossing = plan.cost - sum(w * load for w, load in zip(weights, loads, strict=True))
        bound = max(bound, plan.bound)
        rivals.append(plan.pools)
        if best is None or crossing + busy < best.cost:
            best = replace(plan, cost=crossing + busy)
        if not busy or n_pools == 1 or best.cost <= bound * (1.0 + _ENOUGH):
            break
        logits = [logit + _STEP * (load / busy) for logit, load in zip(logits, loads, strict=True)]
        shares = [math.exp(logit - max(logits)) for logit in logits]
        weights = [share / sum(shares) for share in shares]
    assert best is not None
    mixture = _Mixture(terms, work, usable)
    for rival in rivals:
        best = mixture.mixed(best, rival)
    return replace(best, bound=min(bound, best.cost))


def _loads(pools: Sequence[int], work: Sequence[float], threads: Sequence[float]) -> list[float]:
    loads = [0.0] * len(threads)
    for pool, seconds in zip(pools, work, strict=True):
        if pool != FREE:
            loads[pool] += seconds
    return [load / count for load, count in zip(loads, threads, strict=True)]


class _Mixture:
    """Moves chains of tasks from one plan to where another has them."""

    def __init__(self, terms: Terms, work: Sequence[float], threads: Sequence[float]) -> None:
        self.terms = terms
        self.work = work
        self.threads = threads
        self.inputs = list(rows_of(terms.dependencies))
        self.readers: list[list[int]] = [[] for _ in self.inputs]
        for task, values in enumerate(self.inputs):
            for value in values:
                self.readers[value].append(task)
        self.grouped = {task for group in terms.together if len(group) > 1 for task in group}
        self.pools: list[int] = []
        self._rates: dict[tuple[int, int], tuple[float, float]] = {}
        # How many readers are in each pool, of values with so many that going through them would be felt.
        self._counts = {net: [0] * terms.n_pools for net, found in enumerate(self.readers) if len(found) > _BROADCAST}

    def mixed(self, plan: Placement, rival: Sequence[int]) -> Placement:
        """Move chains as long as the busiest pool gains more time than crossings lose."""
        pools = self.pools = list(plan.pools)
        for net, counts in self._counts.items():
            there = [pools[reader] for reader in self.readers[net]]
            counts[:] = [there.count(pool) for pool in range(len(counts))]
        offers = []
        for chain in self._chains(pools, rival):
            source, target = pools[chain[0]], rival[chain[0]]
            seconds = sum([self.work[task] for task in chain])
            if seconds:
                nets = self._nets(chain)
                rise = self._rise(chain, nets, target)
                offers.append((rise / seconds, chain[0], rise, seconds, chain, nets, source, target))
        loads = _loads(pools, self.work, self.threads)
        cost = plan.cost
        changed: set[int] = set()  # nets of which a member has moved
        for _, _, rise, seconds, chain, nets, source, target in sorted(offers):
            now = rise if changed.isdisjoint(nets) else self._rise(chain, nets, target)
            after = list(loads)
            after[source] -= seconds / self.threads[source]
            after[target] += seconds / self.threads[target]
            change = now + max(after) - max(loads)
            if change < -1e-12 * cost:
                self._move(chain, target)
                changed.update(nets)
                loads, cost = after, cost + change
        return replace(plan, pools=pools, cost=cost)

    def _chains(self, pools: Sequence[int], rival: Sequence[int]) -> list[list[int]]:
        """Split the tasks on which two plans differ into runs that only one of them feeds on."""
        differ = {
            task
            for task, (mine, other) in enumerate(zip(pools, rival, strict=True))
            if mine != other and FREE not in (mine, other) and task not in self.grouped
        }
        chain_of: dict[int, list[int]] = {}
        chains = []
        for first in sorted(differ):
            if first in chain_of:
                continue
            start = first
            while (before := self._only(self.inputs[start], differ, pools, rival, start)) is not None:
                start = before
            chain: list[int] = []
            stack = [start]
            while stack:
                task = stack.pop()
                if task in chain_of:
                    continue
                chain_of[task] = chain
                chain.append(task)
                stack.extend(
                    reader
                    for reader in self.readers[task]
                    if reader in differ and self._only(self.inputs[reader], differ, pools, rival, reader) == task
                )
            chains.append(chain)
        return chains

    @staticmethod
    def _only(
        values: Sequence[int], differ: set[int], pools: Sequence[int], rival: Sequence[int], task: int
    ) -> int | None:
        found = [value for value in values if value in differ]
        if len(found) != 1 or pools[found[0]] != pools[task] or rival[found[0]] != rival[task]:
            return None
        return found[0]

    def _nets(self, chain: Sequence[int]) -> list[int]:
        """List the values that a chain yields or reads, each once."""
        if len(chain) == 1:
            return [chain[0], *self.inputs[chain[0]]]
        return list(dict.fromkeys([*chain, *(value for task in chain for value in self.inputs[task])]))

    def _move(self, chain: Sequence[int], target: int) -> None:
        source = self.pools[chain[0]]
        for task in chain:
            self.pools[task] = target
            for value in self.inputs[task]:
                if value in self._counts:
                    self._counts[value][source] -= 1
                    self._counts[value][target] += 1

    def _rise(self, chain: Sequence[int], nets: Sequence[int], target: int) -> float:
        """Tell how much more crossings and prices cost when a chain moves."""
        source = self.pools[chain[0]]
        before = self._paid(nets)
        self._move(chain, target)
        after = self._paid(nets)
        self._move(chain, source)
        prices = self.terms.prices
        return after - before + sum([prices[task][target] - prices[task][source] for task in chain if task in prices])

    def _paid(self, nets: Sequence[int]) -> float:
        pools, readers, nbytes, rates = self.pools, self.readers, self.terms.nbytes, self._rates
        total = 0.0
        for net in nets:
            home = pools[net]
            there = 0
            if net in self._counts:
                for pool, count in enumerate(self._counts[net]):
                    if count and pool != home:
                        there |= 1 << pool
            else:
                for reader in readers[net]:
                    pool = pools[reader]
                    if pool not in (home, FREE):
                        there |= 1 << pool
            if there:
                found = rates.get((home, there))
                if found is None:
                    found = rates[home, there] = self._rate(home, there)
                total += nbytes[net] * found[0] + found[1]
        return total

    def _rate(self, home: int, there: int) -> tuple[float, float]:
        """Tell what a byte and a message cost from a pool to all of a bit mask."""
        tables = (self.terms.costs, self.terms.per_message)
        per_byte, per_message = (
            0.0 if table is None else sum(table[home][pool] for pool in range(self.terms.n_pools) if there >> pool & 1)
            for table in tables
        )
        return per_byte, per_message
