"""Which links of a cluster carry anything while it boots, and what to do where one does not.

Covers finding the silent ones, relaying around them, who is to blame, and what is said of it; pure. Does not cover
which links there should be (:mod:`meshcompute.mesh.plan`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from meshcompute.mesh.plan import SCHEDULER_SITE, MeshPlan, Stage, links_up, relay_of, why_failed
from meshcompute.protocol import ClusterStatus

__all__ = ["bypass", "new_relays", "silent_pairs", "to_blame", "what_is_true", "why_not_over"]


def silent_pairs(plan: MeshPlan, statuses: Mapping[int, ClusterStatus]) -> set[frozenset[int]]:
    """Find the pairs of sites that have a link by the plan, and no handshake seen from either side.

    Parameters
    ----------
    plan
        The cluster.
    statuses
        The last answer of each site, by its number.

    Returns
    -------
    set
        Pairs of numbers of sites.
    """
    silent: set[frozenset[int]] = set()
    shaken: set[frozenset[int]] = set()
    for member in plan.members:
        if member.site in statuses:
            up, down = links_up(plan, member.site, statuses[member.site])
            shaken |= {frozenset((member.site, other)) for other in up}
            silent |= {frozenset((member.site, other)) for other in down}
    return silent - shaken


def bypass(plan: MeshPlan, silent: Collection[frozenset[int]]) -> MeshPlan:
    """Relay between sites that do not hear each other, where a third one hears both.

    Parameters
    ----------
    plan
        The cluster.
    silent
        Pairs of sites without a handshake.

    Returns
    -------
    MeshPlan
        With every such pair broken that can be relayed; the same one if there is none.
    """
    without = replace(plan, broken=plan.broken | frozenset(silent))
    found = {pair for pair in silent if relay_of(without, *(plan.member(site) for site in sorted(pair))) is not None}
    return replace(plan, broken=plan.broken | found) if found else plan


def new_relays(before: MeshPlan, after: MeshPlan) -> list[str]:
    """Say which pairs of sites are relayed from now on.

    Parameters
    ----------
    before, after
        The cluster.

    Returns
    -------
    list of str
        A line for people for each pair.
    """
    lines = []
    for pair in sorted(after.broken - before.broken, key=sorted):
        one, other = (after.member(site) for site in sorted(pair))
        relay = relay_of(after, one, other)
        through = "nobody" if relay is None else str(after.member(relay))
        lines.append(f"{one} and {other} do not hear each other: relayed through {through}")
    return lines


def to_blame(silent: Collection[frozenset[int]]) -> int:
    """Choose the site that most likely is why pairs have no handshake: that with most of them, a later one first.

    Parameters
    ----------
    silent
        The pairs; at least one.

    Returns
    -------
    int
        Number of the site; never the client's own host, without which there is no cluster.
    """
    counts = Counter(site for pair in silent for site in pair if site != SCHEDULER_SITE)
    return max(counts, key=lambda site: (counts[site], site))


def what_is_true(plan: MeshPlan, stage: Stage, statuses: Mapping[int, ClusterStatus]) -> str:
    """Say what the sites have done when a stage is over.

    Parameters
    ----------
    plan
        The cluster.
    stage
        What they were told.
    statuses
        The last answer of each site, by its number.

    Returns
    -------
    str
        A line for people.
    """
    if stage == "keys":
        return "gateways made, public keys exchanged"
    if stage == "listen":
        return "every gateway knows the others"
    sites = [member.site for member in plan.members if member.site in statuses]
    n_links = sum(len(links_up(plan, site, statuses[site])[0]) for site in sites) // 2
    if n_links == 0:
        return "the sites are ready"
    return "1 link has shaken hands" if n_links == 1 else f"{n_links} links have shaken hands"


def why_not_over(plan: MeshPlan, site: int, stage: Stage, status: ClusterStatus) -> str:
    """Say what a site still waits for.

    Parameters
    ----------
    plan
        The cluster.
    site
        Number of the site.
    stage
        What it was told.
    status
        Its last answer.

    Returns
    -------
    str
        A sentence with what to do.
    """
    _up, down = links_up(plan, site, status)
    if stage == "run" and down:
        others = " and ".join(str(plan.member(other)) for other in down)
        return (
            f"There was no handshake with {others}; check that the UDP ports of the sites are open to each other, "
            "and that their endpoints in site.toml are right."
        )
    return why_failed(status)
