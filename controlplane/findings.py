"""What an operator should know of a host before it is put to use; pure.

Covers the judgement of facts, each with its cure. Does not cover finding the facts out (:mod:`controlplane.check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from controlplane.config import EVERYBODY, SiteConfig

__all__ = ["Finding", "HostFacts", "judge"]

_MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}
NETWORK_PROGRAMS = {"wg": "wireguard-tools", "nft": "nftables", "nsenter": "util-linux", "unshare": "util-linux"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; ``cure`` says how to mend it, if it needs mending."""

    level: Literal["ok", "note", "bad"]
    subject: str
    message: str
    cure: str = ""

    def __str__(self) -> str:
        lines = [f"{_MARKS[self.level]}  {self.subject}: {self.message}"]
        if self.cure:
            lines.append(f"      -> {self.cure}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What was found. Problems are sentences; an empty one, or None where the question does not arise, is none.

    ``sshd_options`` are those that hold for ``sshd_user``, one of the site's, as far as there is one by name.
    """

    is_root: bool
    programs: frozenset[str]
    has_kernel_wireguard: bool
    has_tun: bool
    has_ipv6: bool
    memory_nbytes: int
    engine_version: str | None = None
    engine_problem: str = ""
    missing_images: frozenset[str] = frozenset()
    problem_by_folder: Mapping[str, str] = field(default_factory=dict)
    state_folder_problem: str = ""
    n_taken_ports: int = 0
    unresolved_endpoints: tuple[str, ...] = ()
    problem_by_service: Mapping[str, str] = field(default_factory=dict)
    sshd_options: Mapping[str, str] | None = None
    sshd_problem: str = ""
    sshd_user: str = ""
    has_systemd: bool = False
    unit_state: str = ""
    unknown_users: tuple[str, ...] = ()
    unknown_groups: tuple[str, ...] = ()
    python_problem: str = ""
    is_command_on_path: bool = True


def judge(config: SiteConfig, facts: HostFacts) -> tuple[Finding, ...]:
    """Judge a host.

    Parameters
    ----------
    config
        What it should be used for.
    facts
        What it is.

    Returns
    -------
    tuple
        All findings: ``bad`` ones keep the site from working, ``note`` ones an operator should know.
    """
    parts = [_access(config, facts), _state(config, facts), _folders(config, facts), _memory(config, facts)]
    if config.network == "wireguard":
        parts += [_wireguard(config, facts), _ports(config, facts), _services(config, facts)]
    parts.append(_engine(config, facts) if config.runtime == "docker" else _process(facts))
    if config.role != "scheduler":
        parts.append(_ssh(config, facts))
    parts.append(_systemd(facts))
    return tuple(finding for part in parts for finding in part)


def _access(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    access = config.access
    for user in facts.unknown_users:
        yield Finding(
            level="bad",
            subject="access",
            message=f"{user!r} is no account of this host",
            cure="create it, or correct access.users and workers.user in site.toml",
        )
    for group in facts.unknown_groups:
        yield Finding(
            level="bad",
            subject="access",
            message=f"{group!r} is no group of this host",
            cure="create it (groupadd), or correct access.groups and access.operators_group in site.toml",
        )
    if not access.users and not access.groups:
        yield Finding(
            level="note",
            subject="access",
            message="nobody but root and operators may use this site",
            cure='name accounts in access.users or groups in access.groups of site.toml ("*" is everybody)',
        )
    elif EVERYBODY in access.users:
        yield Finding(level="note", subject="access", message="every account of this host may use this site")
    else:
        yield Finding(level="ok", subject="access", message=f"for {', '.join((*access.users, *access.groups))}")


def _state(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    if facts.state_folder_problem:
        yield Finding(
            level="bad",
            subject="state folder",
            message=f"{config.state_folder} {facts.state_folder_problem}",
            cure="run the daemon as the account that owns it, or name another state_folder in site.toml",
        )
    else:
        yield Finding(level="ok", subject="state folder", message=config.state_folder)


def _folders(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    for folder in config.workers.data_folders:
        problem = facts.problem_by_folder.get(folder, "")
        if problem:
            yield Finding(
                level="bad",
                subject="data folder",
                message=f"{folder} {problem}",
                cure="mount or create it, or correct workers.data_folders in site.toml",
            )
        else:
            yield Finding(level="ok", subject="data folder", message=f"{folder}, read-only for workers")
    if not config.workers.data_folders and config.role != "scheduler":
        yield Finding(
            level="note",
            subject="data folder",
            message="workers see no data of this site",
            cure="name folders in workers.data_folders of site.toml",
        )


def _memory(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    defaults = config.workers
    wanted = defaults.processes_per_container * defaults.memory_bytes_per_process
    if wanted > facts.memory_nbytes:
        yield Finding(
            level="bad",
            subject="memory",
            message=f"one container of default size takes {_gib(wanted)}, this host has {_gib(facts.memory_nbytes)}",
            cure="set workers.processes_per_container or workers.memory_per_process lower in site.toml",
        )
        return
    most = config.limits.workers * config.limits.memory_bytes_per_worker
    if most > facts.memory_nbytes:
        yield Finding(
            level="note",
            subject="memory",
            message=f"one cluster may ask for {_gib(most)}, this host has {_gib(facts.memory_nbytes)}",
            cure="set limits.workers or limits.memory_per_worker lower in site.toml",
        )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _wireguard(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    wanted = config.network_options.wireguard
    has_userspace = "wireguard-go" in facts.programs and facts.has_tun
    if not facts.is_root:
        yield Finding(
            level="bad",
            subject="account",
            message="this is not root, which a WireGuard network needs",
            cure='run check and serve as root, or set network = "loopback" and runtime = "process" in site.toml',
        )
    if not facts.has_ipv6:
        yield Finding(
            level="bad",
            subject="IPv6",
            message="is switched off in this kernel, and clusters use it inside their network",
            cure="boot without ipv6.disable=1 (no address or route of the host's own is needed)",
        )
    for program, package in sorted(NETWORK_PROGRAMS.items()):
        if program not in facts.programs:
            yield Finding(
                level="bad", subject=program, message="is not installed", cure=f"install the package {package}"
            )
    if wanted in {"auto", "kernel"} and facts.has_kernel_wireguard:
        yield Finding(level="ok", subject="WireGuard", message="of the kernel")
    elif wanted in {"auto", "userspace"} and has_userspace:
        yield Finding(
            level="ok" if wanted == "userspace" else "note",
            subject="WireGuard",
            message="in user space (wireguard-go), which is several times slower than the kernel's",
            cure="" if wanted == "userspace" else "load the kernel's module for more speed (modprobe wireguard)",
        )
    else:
        missing = {
            "kernel": "the kernel has no module wireguard",
            "userspace": "wireguard-go or /dev/net/tun is missing",
            "auto": "neither the kernel's module nor wireguard-go with /dev/net/tun is there",
        }[wanted]
        yield Finding(
            level="bad",
            subject="WireGuard",
            message=missing,
            cure="modprobe wireguard (Linux 5.6 and later have it), or install the package wireguard-go and "
            "modprobe tun",
        )


def _ports(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    first, last = config.network_options.udp_ports
    free = last - first + 1 - facts.n_taken_ports
    text = f"UDP {first}-{last}, {free} of {last - first + 1} free"
    if free < config.limits.clusters_total:
        yield Finding(
            level="bad" if free <= 0 else "note",
            subject="ports",
            message=f"{text}, for {config.limits.clusters_total} clusters at once",
            cure="set a wider network_options.udp_ports, or a smaller limits.clusters_total, in site.toml",
        )
    else:
        yield Finding(level="ok", subject="ports", message=text)
    endpoints = config.network_options.endpoints
    for endpoint in facts.unresolved_endpoints:
        yield Finding(
            level="bad",
            subject="endpoint",
            message=f"{endpoint!r} is no host that can be found from here",
            cure="correct network_options.endpoints in site.toml",
        )
    if not endpoints:
        yield Finding(
            level="note",
            subject="endpoint",
            message="no other site can call this one; it calls them",
            cure=f"if UDP {first}-{last} can be reached from outside, name the host's public name or address in "
            "network_options.endpoints",
        )
    elif not facts.unresolved_endpoints:
        yield Finding(
            level="ok",
            subject="endpoint",
            message=f"{', '.join(endpoints)}; firewalls on the way must let UDP {first}-{last} in",
        )


def _services(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    for service in config.network_options.services:
        problem = facts.problem_by_service.get(service.name, "")
        if problem:
            yield Finding(
                level="note",
                subject="service",
                message=f"{service.name}: {problem}",
                cure="start it, or correct network_options.services in site.toml",
            )
        else:
            text = f"workers reach {service.name}:{service.port} at {service.host}"
            yield Finding(level="ok", subject="service", message=text)


def _engine(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    if facts.engine_problem:
        yield Finding(
            level="bad",
            subject="engine",
            message=facts.engine_problem,
            cure="install and start Docker (systemctl start docker), or name its socket in docker.engine of site.toml",
        )
        return
    yield Finding(
        level="ok",
        subject="engine",
        message=f"Docker {facts.engine_version}; note that whoever may use its socket is as powerful as root",
    )
    for image in config.workers.allowed_images:
        if image in facts.missing_images:
            yield Finding(
                level="bad",
                subject="image",
                message=f"{image} is not here",
                cure=f"build it (scripts/build-image.sh --tag {image}), or load it (docker load --input FILE)",
            )
        else:
            yield Finding(level="ok", subject="image", message=image)


def _process(facts: HostFacts) -> Iterator[Finding]:
    if facts.python_problem:
        yield Finding(
            level="bad",
            subject="python",
            message=facts.python_problem,
            cure="install dask and distributed for it, or name another interpreter in process.python of site.toml",
        )
    else:
        yield Finding(level="ok", subject="python", message="workers can start")


def _ssh(config: SiteConfig, facts: HostFacts) -> Iterator[Finding]:
    if not facts.is_command_on_path:
        yield Finding(
            level="bad",
            subject="command",
            message="meshcompute-site is not on the PATH of logins without a terminal",
            cure="link it into /usr/local/bin, as scripts/install-site.sh does",
        )
    if facts.sshd_options is None:
        yield Finding(
            level="note",
            subject="sshd",
            message=facts.sshd_problem or "its settings cannot be read",
            cure="clients reach a site through SSH: install openssh-server, and run check as root to see its settings",
        )
        return
    options = facts.sshd_options
    is_off = options.get("disableforwarding") == "yes"
    allowed = options.get("allowstreamlocalforwarding", "yes")
    if is_off or allowed not in {"yes", "all", "local"}:
        key = "DisableForwarding yes" if is_off else f"AllowStreamLocalForwarding {allowed}"
        whom = f" for {facts.sshd_user}" if facts.sshd_user else ""
        yield Finding(
            level="note",
            subject="sshd",
            message=f"{key} forbids forwarding{whom}; clients talk through meshcompute-site connect, which is slower",
            cure="set DisableForwarding no and AllowStreamLocalForwarding local in sshd_config, at least for the users "
            "of this site (Match Group ...), and systemctl reload ssh",
        )
    else:
        yield Finding(level="ok", subject="sshd", message=f"forwards {config.socket} for its users")


def _systemd(facts: HostFacts) -> Iterator[Finding]:
    if not facts.has_systemd:
        yield Finding(
            level="note",
            subject="systemd",
            message="is not process 1 of this host, so something else must start the daemon",
            cure="start meshcompute-site serve from the supervisor that this host has",
        )
    elif facts.unit_state != "enabled":
        yield Finding(
            level="note",
            subject="systemd",
            message=f"meshcompute-site.service is {facts.unit_state or 'not installed'}",
            cure="scripts/install-site.sh installs, enables and starts it",
        )
    else:
        yield Finding(level="ok", subject="systemd", message="meshcompute-site.service is enabled")
