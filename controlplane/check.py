"""Examine a host before it is put to use: ``meshcompute-site check``.

Covers finding out facts without changing anything. Does not cover what they mean (:mod:`controlplane.findings`).
"""

from __future__ import annotations

import asyncio
import grp
import http.client
import json
import os
import pwd
import shutil
import socket
import sys
from pathlib import Path
from urllib.parse import quote

from controlplane.command import run
from controlplane.config import EVERYBODY, Service, SiteConfig
from controlplane.daemon import is_udp_port_taken
from controlplane.errors import SiteError
from controlplane.findings import NETWORK_PROGRAMS, Finding, HostFacts, judge
from controlplane.talk import NoAnswerError, UnixConnection

__all__ = ["examine", "observe_host"]

PATH_OF_LOGINS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of sshd, without a shell's own files
IMPORT_SECONDS = 30.0
SERVICE_SECONDS = 3.0
NOT_FOUND = 404


def examine(config: SiteConfig) -> tuple[Finding, ...]:
    """Examine this host.

    Parameters
    ----------
    config
        What it should be used for.

    Returns
    -------
    tuple
        All findings, each with its cure.
    """
    return judge(config, asyncio.run(observe_host(config)))


async def observe_host(config: SiteConfig) -> HostFacts:
    """Find out what this host is.

    Parameters
    ----------
    config
        What it should be used for: tells what to look at.

    Returns
    -------
    HostFacts
        The facts.
    """
    version, engine_problem, missing = None, "", frozenset[str]()
    if config.runtime == "docker":
        version, engine_problem, missing = _engine(config)
    sshd_user = _some_user(config)
    sshd_options, sshd_problem = await _sshd(sshd_user)
    users = {user for user in config.access.users if user != EVERYBODY} | ({config.workers.user} - {""})
    groups = set(config.access.groups) | ({config.access.operators_group} - {""})
    first, last = config.network_options.udp_ports
    is_on_mesh = config.network == "wireguard"
    return HostFacts(
        is_root=os.geteuid() == 0,
        programs=frozenset(
            program for program in (*NETWORK_PROGRAMS, "wireguard-go") if shutil.which(program, path=PATH_OF_LOGINS)
        ),
        has_kernel_wireguard=await _has_module("wireguard") if is_on_mesh else False,
        has_tun=os.access("/dev/net/tun", os.R_OK | os.W_OK),
        has_ipv6=os.access("/proc/net/if_inet6", os.R_OK),
        memory_nbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        engine_version=version,
        engine_problem=engine_problem,
        missing_images=missing,
        problem_by_folder={folder: _folder_problem(folder) for folder in config.workers.data_folders},
        state_folder_problem=_state_folder_problem(config.state_folder),
        n_taken_ports=sum(is_udp_port_taken(port) for port in range(first, last + 1)) if is_on_mesh else 0,
        unresolved_endpoints=tuple(host for host in config.network_options.endpoints if not _resolves(host)),
        problem_by_service={service.name: _service_problem(service) for service in config.network_options.services},
        sshd_options=sshd_options,
        sshd_problem=sshd_problem,
        sshd_user=sshd_user,
        has_systemd=_has_systemd(),
        unit_state=await _unit_state(),
        unknown_users=tuple(sorted(user for user in users if not _has_account(user))),
        unknown_groups=tuple(sorted(group for group in groups if not _has_group(group))),
        python_problem=await _python_problem(config) if config.runtime == "process" else "",
        is_command_on_path=shutil.which("meshcompute-site", path=PATH_OF_LOGINS) is not None,
    )


def _has_account(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _has_group(group: str) -> bool:
    try:
        grp.getgrnam(group)
    except KeyError:
        return False
    return True


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    return True


def _service_problem(service: Service) -> str:
    try:
        socket.create_connection((service.host, service.port), timeout=SERVICE_SECONDS).close()
    except OSError as exc:
        return f"{service.host} does not answer at port {service.port} ({exc})"
    return ""


def _folder_problem(folder: str) -> str:
    path = Path(folder)
    if not path.is_dir():
        return "is no folder" if path.exists() else "does not exist"
    return "" if os.access(path, os.R_OK | os.X_OK) else "cannot be read by this account"


def _state_folder_problem(folder: str) -> str:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        return f"cannot be made: {path} is no folder"
    return "" if os.access(path, os.W_OK | os.X_OK) else f"cannot be written by this account (at {path})"


async def _has_module(name: str) -> bool:
    if (Path("/sys/module") / name).is_dir():
        return True
    if not shutil.which("modprobe", path=PATH_OF_LOGINS):
        return False
    try:
        await run(["modprobe", "--dry-run", "--quiet", name])
    except SiteError:
        return False
    return True


def _engine(config: SiteConfig) -> tuple[str | None, str, frozenset[str]]:
    path = config.engine_url.removeprefix("unix://")
    try:
        version = _ask_engine(path, "/version").get("Version", "of an unknown version")
        missing = {image for image in config.workers.allowed_images if not _has_image(path, image)}
    except (NoAnswerError, OSError, http.client.HTTPException, ValueError) as exc:
        return None, f"does not answer at {path} ({_first_sentence(exc)})", frozenset()
    return str(version), "", frozenset(missing)


def _first_sentence(exc: Exception) -> str:
    return str(exc).partition(": ")[0] if isinstance(exc, NoAnswerError) else f"{type(exc).__name__}: {exc}"


def _ask_engine(path: str, url: str) -> dict[str, object]:
    connection = UnixConnection(path)
    try:
        connection.request("GET", url)
        response = connection.getresponse()
        content = response.read(1 << 22)
        if response.status == NOT_FOUND:
            return {}
        found = json.loads(content)
        if not isinstance(found, dict):
            raise NoAnswerError(f"What listens at {path} is no engine: its answer is no table.")
        return found
    finally:
        connection.close()


def _has_image(path: str, image: str) -> bool:
    return "Id" in _ask_engine(path, f"/images/{quote(image)}/json")


def _some_user(config: SiteConfig) -> str:
    """One of those who may use the site, for whom sshd may have settings of their own; none if nobody is named."""
    named = [user for user in config.access.users if user not in (EVERYBODY, "root") and _has_account(user)]
    members = [user for group in config.access.groups if _has_group(group) for user in grp.getgrnam(group).gr_mem]
    return next(iter([*named, *members]), "")


async def _sshd(user: str) -> tuple[dict[str, str] | None, str]:
    program = shutil.which("sshd", path=PATH_OF_LOGINS)
    if program is None:
        return None, "is not installed"
    as_user = ["-C", f"user={user},host=localhost,addr=127.0.0.1"] if user else []  # Match blocks count, too
    try:
        output = await run([program, "-T", *as_user])
    except SiteError:
        return None, "its settings can be read by root only, or are wrong (sshd -T)"
    pairs = (line.split(maxsplit=1) for line in output.stdout.splitlines() if " " in line)
    return {key.lower(): value.strip().lower() for key, value in pairs}, ""


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


async def _unit_state() -> str:
    if not _has_systemd() or not shutil.which("systemctl", path=PATH_OF_LOGINS):
        return ""
    try:
        return (await run(["systemctl", "is-enabled", "meshcompute-site.service"])).stdout.strip()
    except SiteError:
        return "not enabled"


async def _python_problem(config: SiteConfig) -> str:
    python = config.process.python or sys.executable
    try:
        await run([python, "-c", "import dask, distributed"], timeout_seconds=IMPORT_SECONDS)
    except SiteError as exc:
        return f"{python} cannot run Dask ({str(exc).splitlines()[-1][-200:]})"
    return ""
