"""What a host of the lab needs to have systemd as its process 1 (pure).

Covers which units it knows, its devices, and how process 1 becomes systemd. Does not cover what else the host is.

An operator's host runs systemd, so the unit of the site daemon and its installer must be seen there. Of the machine's
own units the host gets those listed here and no generator: otherwise it would start what the machine starts, and set
what belongs to the machine (kernel variables, device nodes).
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NEEDED_UNITS", "PROGRAM", "UNIT_FOLDER", "desired_units", "render_devices", "render_start"]

PROGRAM = "/usr/lib/systemd/systemd"
UNIT_FOLDER = "/usr/lib/systemd/system"
# Of the machine's own, in this folder.
NEEDED_UNITS = (
    *("basic.target", "multi-user.target", "network.target", "network-online.target", "paths.target"),
    *("shutdown.target", "slices.target", "sockets.target", "sysinit.target", "timers.target", "umount.target"),
    *("systemd-journald.service", "systemd-journald.socket"),
)
SERVICES = {"sshd": "ssh", "engine": "docker"}  # names of the lab's services in Debian
_DEFAULT = """\
[Unit]
Description=A host of the lab
Requires=multi-user.target
Wants={services}
"""
_SERVICE = """\
[Unit]
Description=The lab's {name}
[Service]
Type={kind}
ExecStart=/bin/sh /etc/lab/{name}
ExecStopPost=/bin/touch /run/lab.{name}.ended
# As Debian's unit of the engine has it: containers outlive it.
KillMode=process
Delegate=yes
"""
_JOURNAL = """\
[Journal]
Storage=volatile
# The kernel's messages are the machine's.
ReadKMsg=no
Audit=no
"""


def desired_units(machine: Mapping[str, str], services: tuple[str, ...]) -> dict[str, str]:
    """Render all that systemd reads.

    Parameters
    ----------
    machine
        Text of each of :data:`NEEDED_UNITS`.
    services
        Names of the lab's services on this host, each with a script ``/etc/lab/<name>``.

    Returns
    -------
    dict
        Text by path. The folder of each file shows nothing else.
    """
    units = [f"{SERVICES[name]}.service" for name in services]
    files = {f"{UNIT_FOLDER}/{name}": machine[name] for name in NEEDED_UNITS}
    for name, unit in zip(services, units, strict=True):
        kind = "notify" if name == "engine" else "exec"
        files[f"{UNIT_FOLDER}/{unit}"] = _SERVICE.format(name=name, kind=kind)
    files["/etc/systemd/system/default.target"] = _DEFAULT.format(services=" ".join(units))
    files[f"{UNIT_FOLDER}/sysinit.target.d/lab.conf"] = "[Unit]\nWants=systemd-journald.service\n"
    files["/etc/systemd/journald.conf"] = _JOURNAL
    files["/usr/lib/systemd/system-generators/README"] = "A host of the lab has no generators.\n"
    return files


def render_devices() -> tuple[str, ...]:
    """Render the commands that give a host devices of its own below ``root/dev``, for systemd adds to them."""
    return (
        "mount -t tmpfs -o mode=0755 dev root/dev",
        "mkdir root/dev/net root/dev/pts root/dev/shm",
        "for device in null zero full random urandom tty net/tun; do cp -a /dev/$device root/dev/$device; done",
        "mount -t devpts -o mode=0620,ptmxmode=0666,newinstance devpts root/dev/pts",
        "ln -s pts/ptmx root/dev/ptmx",
        "ln -s /proc/self/fd root/dev/fd",
        # What systemd would set there is the whole machine's.
        "for folder in fs kernel vm; do",
        "    mount --bind root/proc/sys/$folder root/proc/sys/$folder",
        "    mount -o remount,bind,ro root/proc/sys/$folder",
        "done",
    )


def render_start(cgroup: str) -> tuple[str, ...]:
    """Render the commands with which process 1 becomes systemd.

    Parameters
    ----------
    cgroup
        A cgroup of the host's own, as seen from the root of each hierarchy; systemd makes its own below it.
    """
    return (
        "for top in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do",
        f"    if [ -e $top/cgroup.procs ]; then mkdir -p $top{cgroup} && echo $$ >$top{cgroup}/cgroup.procs; fi",
        "done",
        # systemd asks by this variable whether the machine is somebody else's.
        f"exec env -i container=lab {PROGRAM} --log-target=journal </dev/null >/var/log/lab/systemd.log 2>&1",
    )
