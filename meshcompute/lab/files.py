"""The text of every file and script that makes a part of this machine a host of the lab (pure).

Covers accounts, keys, sshd and ssh, what process 1 of a host does, and the host's services. Does not cover writing or
running any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshcompute.lab.systemd import desired_units, render_devices, render_start
from meshcompute.lab.topology import Account, Host, Lab

__all__ = [
    "READY_FILE",
    "UPLINK",
    "PlacedFile",
    "desired_files",
    "desired_services",
    "render_addresses",
    "render_engine_store",
    "render_init",
    "render_site",
]

UPLINK = "uplink"
KEY_NAME = "id_ed25519"
QUEUE_PACKETS = 2000  # bursts wait in the device, and are not lost uncounted, while the WAN moves others
LOG_FOLDER = "/var/log/lab"
SITE_FILE = "/etc/meshcompute/site.toml"
OPERATORS_GROUP = "operator"  # one of Debian's own, and nobody of the lab is in it
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
ClientAliveInterval 10
ClientAliveCountMax 3
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

# As one group, all containers of all labs would get as much of the processors as one thread of the machine. The two
# kinds of cgroup have two scales; what cannot be had is no reason not to start.
_SHARES = """\
{
    if [ -d /sys/fs/cgroup/cpu ]; then folder=/sys/fs/cgroup/cpu/meshcompute-lab file=cpu.shares value=4096
    else folder=/sys/fs/cgroup/meshcompute-lab file=cpu.weight value=400; fi
    mkdir -p $folder && echo $value >$folder/$file
} 2>/dev/null"""


def desired_files(
    lab: Lab,
    host: Host,
    *,
    machine: Mapping[str, str],
    host_keys: Mapping[str, tuple[str, str]],
    user_keys: Mapping[str, tuple[str, str]],
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
    user_keys
        Private and public key of each account, by name.

    Returns
    -------
    tuple of PlacedFile
        Files with their content.
    """
    passwd, shadow, group = machine["passwd"], machine["shadow"], machine["group"]
    for account in lab.accounts:
        ids = f"{account.uid}:{account.gid}"
        passwd = _with_line(passwd, f"{account.name}:x:{ids}:meshcompute lab:{_home_of(account.name)}:/bin/sh")
        # "*" is a password that nothing matches; a locked account ("!") is refused by sshd where it does not use PAM.
        shadow = _with_line(shadow, f"{account.name}:*:19000:0:99999:7:::")
        group = _with_line(group, f"{account.name}:x:{account.gid}:")
    names = "".join(f"{other.address}\t{other.name}\n" for other in lab.hosts)
    private, public = host_keys[host.name]
    files = [
        PlacedFile(path="/etc/passwd", text=passwd),
        PlacedFile(path="/etc/shadow", text=shadow, mode=0o640),
        PlacedFile(path="/etc/group", text=group),
        PlacedFile(path="/etc/hostname", text=host.name + "\n"),
        PlacedFile(path="/etc/hosts", text=f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{names}"),
        PlacedFile(path="/etc/ssh/lab/host_key", text=private, mode=0o600, is_ours=True),
        PlacedFile(path="/etc/ssh/lab/host_key.pub", text=public, is_ours=True),
        PlacedFile(path="/etc/ssh/lab/sshd_config", text=_SSHD_CONFIG.format(ready=READY_FILE, path=lab.path_of(host))),
        # A home of the machine's root may hold keys of the machine's.
        PlacedFile(path="/root/.ssh/README", text="The lab hides the machine's own keys.\n", is_ours=True),
    ]
    known = "".join(f"{other.name},{other.address} {host_keys[other.name][1]}" for other in lab.hosts)
    for account in lab.accounts:
        files += _desired_home(lab, host, account, account, key=user_keys[account.name], known=known)
    if not host.is_site:
        root = Account(name="root", uid=0, gid=0)
        first = lab.accounts[0]
        files += _desired_home(lab, host, root, first, key=user_keys[first.name], known=known)
    return tuple(files)


def _desired_home(
    lab: Lab, host: Host, owner: Account, account: Account, *, key: tuple[str, str], known: str
) -> list[PlacedFile]:
    """List the files with which an owner logs in at sites as an account, or that let the account in at a site."""
    folder = _home_of(owner.name)

    def file(name: str, text: str, mode: int = 0o644) -> PlacedFile:
        path = f"{folder}/{name}"
        return PlacedFile(path=path, text=text, mode=mode, uid=owner.uid, gid=owner.gid, is_ours=True)

    files = [file(".profile", f"PATH={lab.path_of(host)}\n")] if owner.uid else []
    if host.is_site:
        return [*files, file(".ssh/authorized_keys", key[1], 0o600)]
    config = _SSH_CONFIG.format(
        sites=" ".join(f"{other.name} {other.address}" for other in lab.hosts if other.is_site),
        account=account.name,
        key=f"{folder}/.ssh/{KEY_NAME}",
        known_hosts=f"{folder}/.ssh/known_hosts",
    )
    return [
        *files,
        file(f".ssh/{KEY_NAME}", key[0], 0o600),
        file(f".ssh/{KEY_NAME}.pub", key[1]),
        file(".ssh/known_hosts", known),
        file(".ssh/config", config, 0o600),
    ]


def _home_of(account: str) -> str:
    return "/root" if account == "root" else f"/home/{account}"


def _with_line(text: str, line: str) -> str:
    name = line.split(":", 1)[0]
    kept = [other for other in text.splitlines() if other.split(":", 1)[0] != name]
    return "\n".join([*kept, line]) + "\n"


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
        *(render_devices() if host.has_systemd else ["mount --rbind /dev root/dev"]),
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
    if host.has_systemd:
        start = render_start(f"{lab.cgroup}/{host.name}.systemd")
    else:
        start = (
            # Logins without a terminal look in few folders only.
            "for program in meshcompute meshcompute-site; do",
            "    if found=$(command -v $program); then ln -sf $found /usr/local/bin/$program; fi",
            "done",
            "exec tini -- sh /etc/lab/services </dev/null >/var/log/lab/services.log 2>&1",
        )
    lines += [
        "cd root",
        "pivot_root . mnt",
        "cd /",
        "umount -l /mnt",
        f"hostname {host.name}",
        f"mkdir -p {LOG_FOLDER}",
        "ip link set lo up",
        f"ip link set {UPLINK} addrgenmode none",  # it would ask the WAN for IPv6 routers, and spoil the counters
        f"ip link set {UPLINK} txqueuelen {QUEUE_PACKETS} up",
        *render_addresses(host, has_nat=host.has_nat),
        *start,
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


def desired_services(lab: Lab, host: Host, units: Mapping[str, str]) -> tuple[PlacedFile, ...]:
    """List the scripts that run a host's services; each can be started again by ``sh /etc/lab/<service>``.

    Parameters
    ----------
    lab
        The lab.
    host
        The host.
    units
        Text of the machine's own units that a host with systemd needs.

    Returns
    -------
    tuple of PlacedFile
        The scripts, and what starts them.
    """
    head = f"umask 022\nexport PATH={lab.path_of(host)} HOME=/root LANG=C.UTF-8\n"
    scripts = {"sshd": "exec /usr/sbin/sshd -D -e -f /etc/ssh/lab/sshd_config"}
    files = []
    if lab.engine:
        engine = "exec dockerd --bridge=none --iptables=false --ip6tables=false --storage-driver=overlay2"
        scripts["engine"] = f"{_SHARES}\n{engine} --cgroup-parent={lab.cgroup}/{host.name}"
    if lab.daemon and not host.has_systemd:
        folders = "mkdir -p /run/meshcompute /var/lib/meshcompute"
        scripts["site"] = f'{folders}\nexec meshcompute-site serve --config {SITE_FILE} "$@"'
        files.append(PlacedFile(path=SITE_FILE, text=render_site(lab, host)))
    files += [
        PlacedFile(path=f"/etc/lab/{name}", text=f"{head}exec >>{LOG_FOLDER}/{name}.log 2>&1\n{script}\n")
        for name, script in scripts.items()
    ]
    if host.has_systemd:
        wanted = desired_units(units, tuple(scripts)).items()
        return (*files, *(PlacedFile(path=path, text=text, is_ours=True) for path, text in wanted))
    # sshd is the one whose end is the host's.
    starts = [f"(sh /etc/lab/{name}; touch /run/lab.{name}.ended) &" for name in scripts if name != "sshd"]
    files.append(PlacedFile(path="/etc/lab/services", text="\n".join([*starts, "exec sh /etc/lab/sshd"]) + "\n"))
    return tuple(files)


def render_site(lab: Lab, host: Host) -> str:
    """Render a host's ``site.toml``."""
    users = ", ".join(f'"{account.name}"' for account in lab.accounts)
    folders = f'"/data/{host.name}"' if host.is_site else ""
    endpoints = "" if host.has_nat else f'"{host.address}"'
    return (
        f'pool = "{host.name}"\n'
        f'role = "{"site" if host.is_site else "scheduler"}"\n'
        f'runtime = "{"docker" if lab.engine else "process"}"\n'
        f'network = "{"wireguard" if lab.engine else "loopback"}"\n\n[access]\nusers = [{users}, "root"]\n'
        f'operators_group = "{OPERATORS_GROUP}"\n'
        f"\n[workers]\ndata_folders = [{folders}]\n"
        f"\n[network_options]\nendpoints = [{endpoints}]\n"
    )
