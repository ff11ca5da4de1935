"""Numbers for the operator's monitoring, in Prometheus' text format; pure.

Covers rendering. No name of a user or a cluster is in them: every account of the host may read them.

References
----------
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from meshcompute.protocol import ClusterStatus

__all__ = ["render_metrics"]

_PHASES = ("pending", "ready", "failed", "removing")
_STATES = ("starting", "running", "exited", "unknown")


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    return lines + [
        f"{name}{labels} {value:g}" if value < 1e6 else f"{name}{labels} {value:.0f}" for labels, value in samples
    ]


def render_metrics(
    statuses: Iterable[ClusterStatus],
    *,
    version: str,
    pool: str,
    is_engine_known: bool,
    n_failures: int,
    requests: Mapping[tuple[str, str, int], int],
) -> str:
    """Render all numbers.

    Parameters
    ----------
    statuses
        All clusters of the site.
    version
        Of the daemon.
    pool
        The site's name.
    is_engine_known
        Whether the engine answers.
    n_failures
        Looks at clusters that ended with a problem, since the daemon started.
    requests
        How many requests were answered, by method, route and status.

    Returns
    -------
    str
        The text.
    """
    found = list(statuses)
    phases: Counter[str] = Counter(status.phase for status in found)
    states: Counter[str] = Counter(worker.state for status in found for worker in status.workers)
    received = sum(peer.received_nbytes for status in found for peer in status.peers)
    sent = sum(peer.sent_nbytes for status in found for peer in status.peers)
    name = "meshcompute_site"
    families = (
        _family(f"{name}_info", "gauge", "What runs here", [(f'{{version="{version}",pool="{pool}"}}', 1)]),
        _family(f"{name}_engine_up", "gauge", "Whether the engine answers", [("", int(is_engine_known))]),
        _family(
            f"{name}_clusters", "gauge", "Clusters", [(f'{{phase="{phase}"}}', phases[phase]) for phase in _PHASES]
        ),
        _family(
            f"{name}_workers",
            "gauge",
            "Worker processes",
            [(f'{{state="{state}"}}', states[state]) for state in _STATES],
        ),
        _family(
            f"{name}_wireguard_nbytes",
            "gauge",
            "Bytes of all links of the clusters that there are now, without outer headers",
            [('{direction="received"}', received), ('{direction="sent"}', sent)],
        ),
        _family(f"{name}_failures_total", "counter", "Looks that ended with a problem", [("", n_failures)]),
        _family(
            f"{name}_requests_total",
            "counter",
            "Requests answered",
            [
                (f'{{method="{method}",route="{route}",status="{status}"}}', count)
                for (method, route, status), count in sorted(requests.items())
            ],
        ),
    )
    return "".join(f"{line}\n" for family in families for line in family)
