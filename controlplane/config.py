"""What the operator of a site decides: ``site.toml``, read into frozen records.

Covers reading and checking the file. Does not cover whether the machine can do what it says
(:mod:`controlplane.check`) nor whether a caller's wish fits (:mod:`controlplane.admission`). Every key with its
default::

    pool = "ecmwf"                      # the site's name, and that of its workers' pool; the only key that must be
    role = "site"                       # "site", "scheduler" (a client's own host) or "both"
    runtime = "docker"                  # or "process": no root, workers are plain processes
    network = "wireguard"               # or "loopback": no root, everything on 127.0.0.1
    socket = "/run/meshcompute/site.sock"
    state_folder = "/var/lib/meshcompute"

    [access]
    users = []                          # who may use the site; ["*"] is everybody with an account here
    groups = []                         # ... and the members of these groups
    operators_group = ""                # sees and ends everybody's clusters; root always does

    [limits]
    clusters = 4                        # at once, per user
    clusters_total = 16                 # at once, of all users
    workers = 16                        # worker processes per cluster
    threads_per_worker = 4
    memory_per_worker = "4 GiB"
    lease_seconds = 3600                # the longest lease that may be asked for

    [workers]
    image = "meshcompute-worker:latest" # the default, always allowed
    images = []                         # further images that may be asked for, exactly as written here
    data_folders = []                   # read-only in every worker, at the same path
    processes_per_container = 4
    threads_per_process = 1
    memory_per_process = "1 GiB"
    user = ""                           # run all workers as this account instead of the caller's

    [network_options]
    endpoints = []                      # hosts (name or address) at which other sites can reach this one
    udp_ports = [51820, 51899]          # first and last; one for each cluster at once
    wireguard = "auto"                  # "kernel", "userspace", or the first of them that works
    services = {}                       # what workers reach beside their cluster, an object store of the site's LAN:
                                        # "name for workers" = "host:port as this host reaches it"; the port is the same

    [docker]                            # of runtime = "docker" only
    engine = "unix:///var/run/docker.sock"

    [process]                           # of runtime = "process" only
    python = ""                         # interpreter of Dask's processes; the daemon's own
    views = {}                          # path at which workers see a folder = where it really is
    hidden_folders = []                 # what workers see as empty folders
    environment = {}                    # further variables of Dask's processes; nothing secret
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from controlplane.errors import ConfigError
from meshcompute.protocol import DEFAULT_SOCKET

__all__ = [
    "AccessConfig",
    "LimitsConfig",
    "NetworkOptions",
    "ProcessConfig",
    "Service",
    "SiteConfig",
    "WorkersConfig",
    "parse_config",
    "read_config",
]

DEFAULT_STATE_FOLDER = "/var/lib/meshcompute"
DEFAULT_ENGINE = "unix:///var/run/docker.sock"
EVERYBODY = "*"
_POOL = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")  # goes into the names of containers and of workers
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")
_ACCOUNT = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@-]{0,63}\$?")
_ENGINE = re.compile(r"unix:///[^\0]+")  # an engine over TCP would have other folders, and no namespaces for links
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}|[0-9A-Fa-f:]{2,45}")
_SERVICE_NAME = re.compile(r"(?!localhost$)(?![0-9.]+$)[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # goes into /etc/hosts
_SERVICE = re.compile(r"([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:]{2,45}\]):(\d{1,5})")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MIB = 2**20
_SOCKET_PATH_MAX = 100  # sockaddr_un has 108 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """Who may use the site, and who may see and end everybody's clusters."""

    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    operators_group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """How much a user, and a cluster, can have."""

    clusters: int = 4
    clusters_total: int = 16
    workers: int = 16
    threads_per_worker: int = 4
    memory_bytes_per_worker: int = 4 * 2**30
    lease_seconds: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    """What workers are made of unless a cluster asks for something else."""

    image: str = "meshcompute-worker:latest"
    images: tuple[str, ...] = ()
    data_folders: tuple[str, ...] = ()
    processes_per_container: int = 4
    threads_per_process: int = 1
    memory_bytes_per_process: int = 2**30
    user: str = ""

    @property
    def allowed_images(self) -> tuple[str, ...]:
        """The default first, then the others."""
        return (self.image, *(image for image in self.images if image != self.image))


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What workers may reach beside their cluster: by this name and port there, at host and port as their site does."""

    name: str
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """How other sites reach this one, with which WireGuard, and what workers reach beside their cluster."""

    endpoints: tuple[str, ...] = ()
    udp_ports: tuple[int, int] = (51820, 51899)
    wireguard: Literal["auto", "kernel", "userspace"] = "auto"
    services: tuple[Service, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessConfig:
    """How workers run that are plain processes of this host."""

    python: str = ""
    views: Mapping[str, str] = field(default_factory=dict)
    hidden_folders: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteConfig:
    """A whole ``site.toml``."""

    pool: str
    role: Literal["site", "scheduler", "both"] = "site"
    runtime: Literal["docker", "process"] = "docker"
    network: Literal["wireguard", "loopback"] = "wireguard"
    socket: str = DEFAULT_SOCKET
    state_folder: str = DEFAULT_STATE_FOLDER
    access: AccessConfig = field(default_factory=AccessConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    network_options: NetworkOptions = field(default_factory=NetworkOptions)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    engine_url: str = DEFAULT_ENGINE


class _Table:
    """One table of the file: hands out checked values, and finds keys that nobody asked for."""

    def __init__(self, source: str, name: str, values: Any) -> None:
        self._source = source
        self._name = name
        if not isinstance(values, dict):
            raise ConfigError(source, name, f"must be a table, written [{name}], not {values!r}")
        self._values: dict[str, Any] = values
        self._known: set[str] = set()

    def _take(self, key: str, default: Any) -> Any:
        self._known.add(key)
        return self._values.get(key, default)

    def error(self, key: str, reason: str) -> ConfigError:
        return ConfigError(self._source, f"{self._name}.{key}" if self._name else key, reason)

    def table(self, key: str) -> _Table:
        return _Table(self._source, key, self._take(key, {}))

    def text(self, key: str, default: str | None, pattern: re.Pattern[str], what: str, *, empty: bool = False) -> str:
        value = self._take(key, default)
        if value is None:
            raise self.error(key, f"is missing; it must be {what}")
        if not isinstance(value, str) or not (pattern.fullmatch(value) or (empty and not value)):
            raise self.error(key, f"{value!r} is not {what}")
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> Any:
        value = self._take(key, default)
        if value not in choices:
            raise self.error(key, f"{value!r} is not one of {', '.join(map(repr, choices))}")
        return value

    def texts(self, key: str, pattern: re.Pattern[str], what: str) -> tuple[str, ...]:
        values = self._take(key, [])
        if not isinstance(values, list):
            raise self.error(key, f"{values!r} is not a list; each entry must be {what}")
        for value in values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise self.error(key, f"{value!r} is not {what}")
        if len(set(values)) < len(values):
            raise self.error(key, f"{values!r} names something twice")
        return tuple(values)

    def number(self, key: str, default: int, low: int, high: int) -> int:
        value = self._take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"{value!r} is not a whole number from {low} to {high}")
        return value

    def nbytes(self, key: str, default: int) -> int:
        value = self._take(key, default)
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if isinstance(value, int) and not isinstance(value, bool):
            nbytes = value
        elif match:
            nbytes = int(float(match[1]) * _UNITS[match[2] or "B"])
        else:
            raise self.error(key, f'{value!r} is not a size; write it like "4 GiB" or as a number of bytes')
        if nbytes < 16 * MIB:
            raise self.error(key, f"{value!r} is less than 16 MiB, in which no worker can start")
        return nbytes

    def ports(self, key: str, default: tuple[int, int]) -> tuple[int, int]:
        value = self._take(key, list(default))
        is_pair = isinstance(value, list) and len(value) == 2 and all(type(port) is int for port in value)
        if not is_pair or not 1024 <= value[0] <= value[1] <= 65535:
            raise self.error(key, f"{value!r} is not the first and the last of a range of ports from 1024 to 65535")
        return (value[0], value[1])

    def path(self, key: str, default: str) -> str:
        value = self._take(key, default)
        if not _is_plain_path(value):
            raise self.error(key, f"{value!r} is not an absolute path without . and .. in it")
        return str(value)

    def paths(self, key: str) -> tuple[str, ...]:
        values = self._take(key, [])
        if not isinstance(values, list):
            raise self.error(key, f"{values!r} is not a list of folders")
        for value in values:
            if not _is_plain_path(value) or value == "/":
                raise self.error(key, f"{value!r} is not an absolute path of a folder without . and .. in it")
        return tuple(values)

    def mapping(self, key: str, is_right: Callable[[object], bool], what: str) -> Mapping[str, str]:
        values = self._take(key, {})
        if not isinstance(values, dict):
            raise self.error(key, f'{values!r} is no table like {{ key = "value" }}')
        for name, value in values.items():
            if not is_right(name) or not is_right(value):
                raise self.error(key, f"{name!r} = {value!r}: both must be {what}")
        return dict(values)

    def services(self, key: str) -> tuple[Service, ...]:
        values = self._take(key, {})
        if not isinstance(values, dict):
            raise self.error(key, f'{values!r} is no table like {{ "objects.example" = "10.1.0.5:9000" }}')
        services = []
        for name, target in values.items():
            match = _SERVICE.fullmatch(target) if isinstance(target, str) else None
            if match is None or not 1 <= int(match[2]) <= 65535:
                raise self.error(key, f"{target!r} is not a host and its port, like '10.1.0.5:9000'")
            if not _SERVICE_NAME.fullmatch(name):
                raise self.error(key, f"{name!r} is not the name of a host in lower case, which workers could look up")
            services.append(Service(name=name, host=match[1].strip("[]"), port=int(match[2])))
        return tuple(services)

    def finish(self) -> None:
        unknown = sorted(set(self._values) - self._known)
        if unknown:
            raise self.error(unknown[0], f"nobody knows this key; known here: {', '.join(sorted(self._known))}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_plain_path(value: object) -> bool:
    if not isinstance(value, str) or not value.startswith("/") or ":" in value or any(ord(c) < 32 for c in value):
        return False  # a colon separates the parts of an engine's mounts
    return str(Path(value)) == value and ".." not in Path(value).parts


def parse_config(values: Mapping[str, Any], source: str = "site.toml") -> SiteConfig:
    """Check the values of a ``site.toml`` and give them their types.

    Parameters
    ----------
    values
        The tables as TOML gives them.
    source
        The file's name, for messages.

    Returns
    -------
    SiteConfig
        The records.

    Raises
    ------
    ConfigError
        For the first value that is wrong, with the name of its key, or for a key that nobody knows.
    """
    top = _Table(source, "", dict(values))
    names = ("access", "limits", "workers", "network_options", "docker", "process")
    access, limits, workers, network, docker, process = (top.table(name) for name in names)
    account = "the name of an account or a group"
    image = "the name of an image, like 'meshcompute-worker:latest'"
    users = access.texts("users", re.compile(rf"\*|{_ACCOUNT.pattern}"), f"{account}, or '*' for everybody")
    config = SiteConfig(
        pool=top.text("pool", None, _POOL, "a name of at most 40 lower-case letters, digits and inner hyphens"),
        role=top.choice("role", "site", ("site", "scheduler", "both")),
        runtime=top.choice("runtime", "docker", ("docker", "process")),
        network=top.choice("network", "wireguard", ("wireguard", "loopback")),
        socket=top.path("socket", DEFAULT_SOCKET),
        state_folder=top.path("state_folder", DEFAULT_STATE_FOLDER),
        access=AccessConfig(
            users=users,
            groups=access.texts("groups", _ACCOUNT, account),
            operators_group=access.text("operators_group", "", _ACCOUNT, account, empty=True),
        ),
        limits=LimitsConfig(
            clusters=limits.number("clusters", 4, 0, 10_000),
            clusters_total=limits.number("clusters_total", 16, 0, 10_000),
            workers=limits.number("workers", 16, 0, 4096),
            threads_per_worker=limits.number("threads_per_worker", 4, 1, 1024),
            memory_bytes_per_worker=limits.nbytes("memory_per_worker", 4 * 2**30),
            lease_seconds=limits.number("lease_seconds", 3600, 1, 3600),
        ),
        workers=WorkersConfig(
            image=workers.text("image", "meshcompute-worker:latest", _IMAGE, image),
            images=workers.texts("images", _IMAGE, image),
            data_folders=workers.paths("data_folders"),
            processes_per_container=workers.number("processes_per_container", 4, 1, 256),
            threads_per_process=workers.number("threads_per_process", 1, 1, 1024),
            memory_bytes_per_process=workers.nbytes("memory_per_process", 2**30),
            user=workers.text("user", "", _ACCOUNT, account, empty=True),
        ),
        network_options=NetworkOptions(
            endpoints=network.texts("endpoints", _HOST, "a host's name or address, without a port"),
            udp_ports=network.ports("udp_ports", (51820, 51899)),
            wireguard=network.choice("wireguard", "auto", ("auto", "kernel", "userspace")),
            services=network.services("services"),
        ),
        engine_url=docker.text("engine", DEFAULT_ENGINE, _ENGINE, "a unix socket like 'unix:///var/run/docker.sock'"),
        process=ProcessConfig(
            python=process.text("python", "", re.compile(r"/[^\0]+"), "an absolute path of an interpreter", empty=True),
            views=process.mapping("views", _is_plain_path, "absolute paths without . and .. in them"),
            hidden_folders=process.paths("hidden_folders"),
            environment=process.mapping("environment", _is_text, "texts"),
        ),
    )
    for table in (top, access, limits, workers, network, docker, process):
        table.finish()
    _check_together(config, top, workers, network)
    return config


def _check_together(config: SiteConfig, top: _Table, workers: _Table, network: _Table) -> None:
    if len(config.socket.encode()) > _SOCKET_PATH_MAX:
        raise top.error("socket", f"{config.socket!r} is longer than {_SOCKET_PATH_MAX} bytes, which no socket can be")
    if config.runtime == "docker" and config.network == "loopback":
        raise top.error("network", "'loopback' needs runtime = \"process\": containers have a network of their own")
    if config.runtime == "process" and config.network == "wireguard":
        raise top.error("network", "'wireguard' needs runtime = \"docker\": processes have no network of their own")
    if config.network == "loopback" and config.network_options.services:
        raise network.error("services", 'needs network = "wireguard": plain processes reach what this host reaches')
    if config.workers.threads_per_process > config.limits.threads_per_worker:
        limit = config.limits.threads_per_worker
        raise workers.error("threads_per_process", f"the default is more than limits.threads_per_worker = {limit}")
    if config.workers.memory_bytes_per_process > config.limits.memory_bytes_per_worker:
        limit = config.limits.memory_bytes_per_worker
        raise workers.error("memory_per_process", f"the default is more than limits.memory_per_worker = {limit} bytes")


def read_config(path: str | Path) -> SiteConfig:
    """Read a ``site.toml``.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    SiteConfig
        Its values, checked.

    Raises
    ------
    ConfigError
        If it cannot be read, is no TOML, or has a wrong value.
    """
    try:
        with Path(path).open("rb") as file:
            values = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(str(path), "", f"cannot be read ({exc.strerror}); give another one with --config") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(str(path), "", f"is no TOML: {exc}") from exc
    return parse_config(values, str(path))
