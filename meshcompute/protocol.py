"""The wire contract between a client and the daemon of a site.

Covers the models of every request and answer, the paths, and the kinds of errors with their HTTP status. Does not
cover how the bytes travel (:mod:`meshcompute.mesh.control`) nor what a site does with them. All requests are HTTP/JSON
on a unix socket, below ``/v1``; who asks is known from the socket's peer credentials, never from the request.

=======  ===============================  =====================  =========================================
method   path                             body                   answer
=======  ===============================  =====================  =========================================
GET      /v1/site                                                :class:`SiteInfo`
PUT      /v1/clusters/{id}                :class:`ClusterSpec`   :class:`ClusterStatus`; idempotent
GET      /v1/clusters                                            list of :class:`ClusterStatus`
GET      /v1/clusters/{id}                                       :class:`ClusterStatus`
POST     /v1/clusters/{id}/lease          :class:`LeaseRequest`  :class:`ClusterStatus`
DELETE   /v1/clusters/{id}?epoch=N                               :class:`ClusterStatus`, removing or gone
GET      /v1/clusters/{id}/logs                                  text; ``?worker=NAME&lines=200``
GET      /v1/health                                              :class:`Health`
GET      /v1/metrics                                             text, Prometheus' exposition format
GET      /v1/openapi.json                                        the OpenAPI document
=======  ===============================  =====================  =========================================

An epoch counts a cluster's desired states upwards: every change of a spec takes a larger one. A PUT with a smaller
epoch than the last one, with the same epoch and other content, or with one that is not larger than the epoch of a
DELETE, is refused with 409, so that a late PUT never brings an old state or a deleted cluster back.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "API_VERSION",
    "DEFAULT_SOCKET",
    "STATUS_BY_ERROR_KIND",
    "ClusterSpec",
    "ClusterStatus",
    "Condition",
    "ErrorInfo",
    "ErrorResponse",
    "Health",
    "LeaseRequest",
    "Limits",
    "Peer",
    "PeerStatus",
    "SchedulerRequest",
    "SchedulerStatus",
    "SiteInfo",
    "WorkerRequest",
    "WorkerStatus",
]

API_VERSION = 1
DEFAULT_SOCKET = "/run/meshcompute/site.sock"

# What ErrorInfo.kind can be, and the HTTP status that goes with it.
STATUS_BY_ERROR_KIND: Mapping[str, int] = MappingProxyType(
    {
        "bad_request": 400,  # not JSON, or a query that cannot be read
        "forbidden": 403,  # the caller may not use this site
        "not_found": 404,  # no such path, cluster (for this caller) or worker
        "method_not_allowed": 405,
        "conflict": 409,  # an old epoch, a deleted cluster, a prefix or an id that is taken
        "too_large": 413,  # the body
        "invalid": 422,  # JSON that is not what the model says, or what the site does not offer
        "quota": 429,  # more than the operator allows
        "internal": 500,  # a defect of the daemon; its log has the traceback
        "engine_unknown": 503,  # the container engine does not answer: nothing is known, nothing was changed
    }
)

_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
MAX_PORT = 65535
MAX_EPOCH = 2**53 - 1  # whole numbers that every JSON library reads exactly


def _checked_prefix(value: str) -> str:
    """Canonical form."""
    return str(ipaddress.IPv6Network(value))


def _checked_endpoint(value: str) -> str:
    """``host:port`` or ``[v6]:port``."""
    host, colon, port = value.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or not 1 <= int(port[:6]) <= MAX_PORT:
        raise ValueError(f"{value!r} has no port from 1 to {MAX_PORT}; write it like '192.0.2.7:51820'")
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise ValueError(f"{host!r} in {value!r} is no IPv6 address") from None
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{host!r} in {value!r} is neither a host's name nor an address; IPv6 goes in brackets")
    return value


ClusterId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="32 hexadecimal digits, uuid4().hex")]
ClusterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", description="For people")]
Epoch = Annotated[int, Field(ge=1, le=MAX_EPOCH)]
SiteNumber = Annotated[int, Field(ge=0, le=0xFFFF, description="Fourth group of the addresses; 0 is the scheduler's")]
Prefix = Annotated[
    str,
    Field(pattern=r"^fd[0-9a-f]{2}(:[0-9a-f]{1,4}){0,2}::/48$", description="A /48 of fd00::/8 (RFC 4193)"),
    AfterValidator(_checked_prefix),
]
PublicKey = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$", description="Of WireGuard: base64 of 32 bytes")
]
Endpoint = Annotated[str, Field(max_length=300), AfterValidator(_checked_endpoint)]
Port = Annotated[int, Field(ge=1, le=MAX_PORT)]
ImageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]
DaskAddress = Annotated[str, Field(pattern=r"^(tcp|tls)://[A-Za-z0-9.:\[\]_-]{1,255}:[0-9]{1,5}$")]


class _Request(BaseModel):
    """Strict: ``"1"`` is no number, and a field that nobody knows is an error, not a wish that is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------------------------------------------------- requests


class Peer(_Request):
    """Another site's gateway, as this site must know it.

    ``endpoint`` is ``host:port`` or ``[v6]:port``, or None for a peer that cannot be reached and calls itself.
    ``initiates`` says whether *this* side starts the handshake. A peer whose key is not known yet is configured later.
    ``via`` is the site that relays between the two, where they cannot reach each other; None means directly.
    """

    site: SiteNumber
    name: ClusterName
    public_key: PublicKey | None = None
    endpoint: Endpoint | None = None
    initiates: bool = False
    via: SiteNumber | None = None


class WorkerRequest(_Request):
    """Workers that a site should run; None means the site's own default.

    ``scheduler_address`` is Dask's (``tcp://[fda5:c0ff:eeee::1]:8786``); None is port 8786 of site 0's gateway.
    """

    containers: Annotated[int, Field(ge=1, le=256)] = 1
    processes_per_container: Annotated[int, Field(ge=1, le=256)] | None = None
    threads_per_process: Annotated[int, Field(ge=1, le=1024)] | None = None
    memory_bytes_per_process: Annotated[int, Field(ge=1 << 20, le=1 << 50)] | None = None
    image: ImageName | None = None
    link: Literal["veth", "wireguard"] = "veth"
    scheduler_address: DaskAddress | None = None


class SchedulerRequest(_Request):
    """The scheduler of a cluster, at the ports of this host's loopback address; None for no dashboard."""

    client_port: Port = 8786
    dashboard_port: Port | None = 8787
    image: ImageName | None = None


class ClusterSpec(_Request):
    """What a site should have of one cluster: the desired state, whole, every time."""

    name: ClusterName
    epoch: Epoch
    role: Literal["site", "scheduler"]
    prefix: Prefix
    site: SiteNumber
    lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 120.0
    mtu: Annotated[int, Field(ge=1280, le=9000)] = 1280
    peers: Annotated[tuple[Peer, ...], Field(max_length=255)] = ()
    workers: WorkerRequest | None = None
    scheduler: SchedulerRequest | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sites = [peer.site for peer in self.peers]
        if len(set(sites)) < len(sites):
            raise ValueError(f"two peers have the same site number: {sorted(sites)}")
        if self.site in sites:
            raise ValueError(f"site {self.site} is this site itself and cannot be its own peer")
        direct = {peer.site for peer in self.peers if peer.via is None}
        for peer in self.peers:
            if peer.via is not None and peer.via not in direct:
                raise ValueError(f"site {peer.site} goes via site {peer.via}, which is no direct peer of this site")
        if self.scheduler is not None and self.role != "scheduler":
            raise ValueError("a scheduler can run only where role is 'scheduler'")
        return self


class LeaseRequest(_Request):
    """Renewal of a cluster's lease, for as long as its last desired state says."""

    epoch: Epoch


# ----------------------------------------------------------------------------------------------------------- answers


class Limits(_Answer):
    """How much one cluster can have at this site, and how many clusters a caller."""

    workers: int
    threads_per_worker: int
    memory_bytes_per_worker: int
    clusters: int


class SiteInfo(_Answer):
    """What a site is and offers to the caller. ``endpoints`` are hosts at which its gateways can be reached."""

    pool: str
    version: str
    api_version: int
    role: Literal["site", "scheduler", "both"]
    limits: Limits
    data_folders: tuple[str, ...]
    images: tuple[str, ...]
    wireguard_backend: str
    runtime: Literal["docker", "process"]
    network: Literal["wireguard", "loopback"]
    packages: dict[str, str]
    endpoints: tuple[str, ...]


class Condition(_Answer):
    """One thing that is true of a cluster at this site, or not yet.

    ``kind`` is ``gateway``, ``links`` (a handshake with every peer), ``workers``, ``scheduler``, ``engine``
    or ``ended`` (why the cluster is removed);
    ``reason`` one word for programs; ``message`` a sentence for people.
    """

    kind: str
    is_true: bool
    reason: str
    message: str


class PeerStatus(_Answer):
    """What this site's gateway knows of its link to another site; an age of None is "never"."""

    site: int
    latest_handshake_age_seconds: float | None
    received_nbytes: int
    sent_nbytes: int


class WorkerStatus(_Answer):
    """One worker process. ``container`` is the name to ask for its log."""

    name: str
    container: str
    state: Literal["starting", "running", "exited", "unknown"]
    address: str | None
    message: str


class SchedulerStatus(_Answer):
    """Where the scheduler is: on the data plane, and for clients and browsers of this host."""

    address: str | None
    client_address: str | None
    dashboard_address: str | None


class ClusterStatus(_Answer):
    """What a site has of a cluster.

    ``ready`` means that this site has done all that it was asked to: gateway configured, workers and scheduler
    running. Whether links carry anything depends on the other sites, too: see the condition ``links``.
    """

    cluster_id: str
    name: str
    owner: str
    epoch: int
    phase: Literal["pending", "ready", "failed", "removing", "gone"]
    lease_remaining_seconds: float
    public_key: str | None
    endpoint_port: int | None
    address: str | None
    peers: tuple[PeerStatus, ...]
    workers: tuple[WorkerStatus, ...]
    scheduler: SchedulerStatus | None
    conditions: tuple[Condition, ...]


class Health(_Answer):
    """Whether the daemon can do its work, and what hinders it."""

    is_healthy: bool
    conditions: tuple[Condition, ...]


class ErrorInfo(_Answer):
    """What went wrong: a kind of :data:`STATUS_BY_ERROR_KIND`, and one sentence with what to do next."""

    kind: str
    message: str


class ErrorResponse(_Answer):
    """The body of every answer that is an error."""

    error: ErrorInfo
