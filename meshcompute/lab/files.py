"""The text of every file and script that makes a part of this machine a host of the lab (pure).

Covers accounts, keys, sshd and ssh, what process 1 of a host does, and the host's services. Does not cover writing or
running any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshcompute.lab.topology import ACCOUNT, Host, Lab

__all__ = [
    "READY_FILE",
    "UPLINK",
    "PlacedFile",
    "desired_files",
    "render_addresses",
    "render_engine_store",
    "render_init",
    "render_services",
]

UPLINK = "uplink"
KEY_NAME = "id_ed25519"
QUEUE_PACKETS = 2000  # bursts wait in the device, and are not lost uncounted, while the WAN moves others
LOG_FOLDER = "/var/log/lab"
READY_FILE = "/run/sshd.pid"  # sshd writes it once it listens


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedFile:
    """A file of a host. ``is_ours`` hides what the machine has in the same folder."""

    path: str
    text: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    is_ours: bool = False


_SSHD_CONFIG = """\
HostKey /etc/ssh/lab/host_key
PidFile {ready}
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
AllowStreamLocalForwarding yes
PrintMotd no
Subsystem sftp internal-sftp
SetEnv PATH={path}
"""

_SSH_CONFIG = """\
Host {sites}
    User {account}
    IdentityFile {key}
    IdentitiesOnly yes
    UserKnownHostsFile {known_hosts}
    StrictHostKeyChecking yes
"""


def desired_files(
    lab: Lab,
    host: Host,
    *,
    machine: Mapping[str, str],
    host_keys: Mapping[str, tuple[str, str]],
    user_key: tuple[str, str],
) -> tuple[PlacedFile, ...]:
    """List the files in which a host differs from the machine.

    Parameters
    ----------
    lab
        The lab.
    host
        The host.
    machine
        Text of the machine's ``passwd``, ``shadow`` and ``group``.
    host_keys
        Private and public key of each host, by name.
    user_key
        Private and public key of the client's user.

    Returns
    -------
    tuple of PlacedFile
        Files with their content.
    """
    account = lab.account
    home = f"/home/{ACCOUNT}"
    # "*" is a password that nothing matches; a locked account ("!") is refused by sshd where it does not use PAM.
    passwd = _with_line(machine["passwd"], f"{ACCOUNT}:x:{account.uid}:{account.gid}:meshcompute lab:{home}:/bin/sh")
    shadow = _with_line(machine["shadow"], f"{ACCOUNT}:*:19000:0:99999:7:::")
    if not any(line.startswith("sshd:") for line in passwd.splitlines()):
        passwd = _with_line(passwd, "sshd:x:109:65534::/run/sshd:/usr/sbin/nologin")
    group = _with_line(machine["group"], f"{ACCOUNT}:x:{account.gid}:")
    for name in account.groups:
        group = _with_member(group, name, ACCOUNT)
    names = "".join(f"{other.address}\t{other.name}\n" for other in lab.hosts)

    def ours(path: str, text: str, mode: int = 0o644, *, uid: int = 0, gid: int = 0) -> PlacedFile:
        return PlacedFile(path=path, text=text, mode=mode, uid=uid, gid=gid, is_ours=True)

    private, public = host_keys[host.name]
    files = [
        PlacedFile(path="/etc/passwd", text=passwd),
        PlacedFile(path="/etc/shadow", text=shadow, mode=0o640),
        PlacedFile(path="/etc/group", text=group),
        PlacedFile(path="/etc/hostname", text=host.name + "\n"),
        PlacedFile(path="/etc/hosts", text=f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{names}"),
        ours("/etc/ssh/lab/host_key", private, 0o600),
        ours("/etc/ssh/lab/host_key.pub", public),
        PlacedFile(path="/etc/ssh/lab/sshd_config", text=_SSHD_CONFIG.format(ready=READY_FILE, path=lab.path)),
        ours("/root/.ssh/README", "The lab hides the machine's own keys.\n"),
    ]

    owner = {"uid": account.uid, "gid": account.gid}
    files.append(ours(f"{home}/.profile", f"PATH={lab.path}\n", **owner))
    if host.is_site:
        files.append(ours(f"{home}/.ssh/authorized_keys", user_key[1], 0o600, **owner))
        return tuple(files)
    known = "".join(f"{other.name},{other.address} {host_keys[other.name][1]}" for other in lab.hosts)
    sites = " ".join(f"{other.name} {other.address}" for other in lab.hosts if other.is_site)
    for folder, ids in (("/root", {}), (home, owner)):
        place = f"{folder}/.ssh"
        config = _SSH_CONFIG.format(
            sites=sites, account=ACCOUNT, key=f"{place}/{KEY_NAME}", known_hosts=f"{place}/known_hosts"
        )
        files += [
            ours(f"{place}/{KEY_NAME}", user_key[0], 0o600, **ids),
            ours(f"{place}/{KEY_NAME}.pub", user_key[1], **ids),
            ours(f"{place}/known_hosts", known, **ids),
            ours(f"{place}/config", config, 0o600, **ids),
        ]
    return tuple(files)


def _with_line(text: str, line: str) -> str:
    name = line.split(":", 1)[0]
    kept = [other for other in text.splitlines() if other.split(":", 1)[0] != name]
    return "\n".join([*kept, line]) + "\n"


def _with_member(text: str, group: str, member: str) -> str:
    lines = text.splitlines()
    for i, line in enumerate(lines):
        name, password, gid, members = line.split(":")
        if name == group:
            lines[i] = ":".join([name, password, gid, ",".join(filter(None, [members, member]))])
    return "\n".join(lines) + "\n"


def render_init(lab: Lab, host: Host, *, folder: str, mounts: tuple[str, ...]) -> str:
    """Render what process 1 of a host does before it becomes tini.

    Parameters
    ----------
    lab
        The lab.
    host
        The host, whose files lie in ``<folder>/upper`` already.
    folder
        Folder of the host on the lab's tmpfs.
    mounts
        The machine's other mounts that the host shall see, read-only.

    Returns
    -------
    str
        A shell script. It writes a line when its namespaces exist, and waits for one before it goes on.
    """
    data = f"root/data/{host.name}"
    lines = [
        "set -eu",
        "echo created",
        "read -r _go",
        f"cd {folder}",
        "mkdir -p root work",
        f"mount -t overlay -o lowerdir=/,upperdir={folder}/upper,workdir={folder}/work lab-{host.name} root",
        *(f"mount --bind -o ro {mount} root{mount}" for mount in mounts),
        "mount -t proc proc root/proc",
        "mount -t sysfs sysfs root/sys",
        "if [ -d /sys/fs/cgroup ]; then mount --rbind /sys/fs/cgroup root/sys/fs/cgroup; fi",
        "mount --rbind /dev root/dev",
        "mount -t tmpfs -o mode=1777 shm root/dev/shm",
        "mount -t tmpfs -o mode=0755 run root/run",
        "mkdir -p root/run/lock root/run/sshd root/data root/var/lib/docker",
        "mount -t tmpfs -o mode=0755 data root/data",
        "mount -t tmpfs -o mode=0711 docker root/var/lib/docker",
    ]
    if lab.engine and lab.image_store is not None:
        lines += render_engine_store(lab.image_store, "root/var/lib/docker")
    if host.is_site:
        lines.append(f"mkdir {data}")
    if host.data is not None:
        lines.append(f"mount --bind -o ro {host.data} {data}")
    if lab.shared is not None and not host.is_site:
        lines += [f"mkdir -p root{lab.shared}", f"mount --rbind {lab.shared} root{lab.shared}"]
    lines += [
        "cd root",
        "pivot_root . mnt",
        "cd /",
        "umount -l /mnt",
        f"hostname {host.name}",
        f"mkdir -p {LOG_FOLDER}",
        "ip link set lo up",
        f"ip link set {UPLINK} txqueuelen {QUEUE_PACKETS} up",
        *render_addresses(host, has_nat=host.has_nat),
        "exec tini -- sh /etc/lab/services </dev/null >/var/log/lab/services.log 2>&1",
    ]
    return "\n".join(lines) + "\n"


def render_engine_store(store: str, target: str) -> tuple[str, ...]:
    """Render the commands that let an engine know the images of a store: its index copied, its layers shared."""
    return (
        f"mkdir {target}/overlay2",
        f"cp -a {store}/image {target}/image",
        f"cp -a {store}/overlay2/l {target}/overlay2/l",
        f"for layer in {store}/overlay2/*/diff; do",
        "    layer=${layer%/diff}",
        f"    to={target}/overlay2/${{layer##*/}}",
        "    mkdir $to $to/diff $to/work",
        "    for file in link lower committed; do if [ -e $layer/$file ]; then cp -a $layer/$file $to/; fi; done",
        "    mount --bind -o ro $layer/diff $to/diff",
        "done",
    )


def render_addresses(host: Host, *, has_nat: bool) -> tuple[str, ...]:
    """Render the commands that give a host its address on the WAN, or the one behind NAT."""
    address = host.inner_address if has_nat else host.address
    return (
        f"ip address flush dev {UPLINK} scope global",
        f"ip address add {address}/24 dev {UPLINK}",
        f"ip route replace default dev {UPLINK}",
    )


def render_services(lab: Lab, host: Host) -> str:
    """Render what runs at a host: the engine in the background, and sshd, whose end is the host's."""
    lines = ["umask 022", f"export PATH={lab.path} HOME=/root LANG=C.UTF-8"]
    if lab.engine:
        engine = "dockerd --bridge=none --iptables=false --ip6tables=false --storage-driver=overlay2"
        lines.append(f"{engine} --cgroup-parent={lab.cgroup}/{host.name} >{LOG_FOLDER}/dockerd.log 2>&1 &")
    lines.append(f"exec /usr/sbin/sshd -D -e -f /etc/ssh/lab/sshd_config >{LOG_FOLDER}/sshd.log 2>&1")
    return "\n".join(lines) + "\n"
