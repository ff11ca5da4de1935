"""Plans and answers of sites as examples, for tests of what is decided about a cluster."""

from meshcompute.mesh.plan import Member, MeshPlan
from meshcompute.protocol import ClusterStatus, PeerStatus, SchedulerRequest, WorkerRequest

__all__ = ["KEYS", "SCHEDULER", "plan_of", "shaken", "status_of"]

KEYS = [letter * 42 + "A=" for letter in "ABCDEFGH"]
SCHEDULER = "tcp://[fda5:c0ff:eeee::1]:8786"


def plan_of(*reachable, network="wireguard"):
    """A cluster of the client's host and sites, each of which can be reached or not."""
    members = tuple(
        Member(
            site=number,
            address=f"mesh@10.8.0.{number}",
            pool=f"pool{number}",
            network=network,
            hosts=(f"192.0.2.{number}",) if can else (),
            public_key=None if network == "loopback" else KEYS[number],
            port=51820 + number,
        )
        for number, can in enumerate(reachable)
    )
    return MeshPlan(
        cluster_id="0" * 32,
        name="test",
        prefix="fda5:c0ff:eeee::/48",
        members=members,
        scheduler=SchedulerRequest(),
        workers={number: WorkerRequest() for number in range(1, len(reachable))},
    )


def status_of(site, **values):
    defaults = {
        "cluster_id": "0" * 32,
        "name": "test",
        "owner": "mesh",
        "epoch": 1,
        "phase": "ready",
        "lease_remaining_seconds": 120,
        "public_key": KEYS[site],
        "endpoint_port": 51820 + site,
        "address": None,
        "peers": (),
        "workers": (),
        "scheduler": None,
        "conditions": (),
    }
    return ClusterStatus.model_validate({**defaults, **values})


def shaken(**ages):
    return tuple(
        PeerStatus(site=int(name[1:]), latest_handshake_age_seconds=age, received_nbytes=0, sent_nbytes=0)
        for name, age in ages.items()
    )
