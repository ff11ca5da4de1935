#!/usr/bin/env bash
# Install, upgrade or remove the control daemon of a site. Needs root. Running it again changes only what differs.
#
#   scripts/install-site.sh --pool NAME [--role site|scheduler|both]   install
#   scripts/install-site.sh                                            upgrade to this tree's version
#   scripts/install-site.sh --remove [--purge]                         end all clusters and remove the software
#
# Options of an installation:
#   --pool NAME      name of the site and of its workers' pool; only for the first installation, which writes site.toml
#   --role ROLE      what this host is in a mesh: site (default), scheduler (a client's own host) or both
#   --group NAME     who may use the site: members of this group, which is made if it does not exist [meshcompute]
#   --wheel FILE     install this wheel instead of this tree
#   --python FILE    interpreter for the environment of the daemon [python3]
#   --no-start       do not enable or start the service
#   --purge          (with --remove) remove settings, state and the group that it made as well
#
# What it makes: /opt/meshcompute (environment), /usr/local/bin/meshcompute-site (link), /etc/meshcompute/site.toml
# (never overwritten), /etc/systemd/system/meshcompute-site.service, the group. Nothing else of the host is touched, and
# nothing at all before it is known that the new software can run here.
set -euo pipefail
umask 022 # users of the site run meshcompute-site, too

env_folder=/opt/meshcompute
link=/usr/local/bin/meshcompute-site
config_folder=/etc/meshcompute
config=$config_folder/site.toml
made_group=$config_folder/.made-group
state_folder=/var/lib/meshcompute
socket_folder=/run/meshcompute
unit=/etc/systemd/system/meshcompute-site.service
nobody=65534

say() { printf 'install-site: %s\n' "$*"; }
die() {
    printf 'install-site: %s\n' "$*" >&2
    exit 1
}
usage() { sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'; }

has_systemd() { [ -d /run/systemd/system ]; }
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }

pool="" role=site group=meshcompute wheel="" python=python3 start=1 remove=0 purge=0
while [ $# -gt 0 ]; do
    case "$1" in
        --pool | --role | --group | --wheel | --python)
            [ $# -ge 2 ] || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --no-start) start=0; shift ;;
        --remove) remove=1; shift ;;
        --purge) purge=1; shift ;;
        --help | -h) usage; exit 0 ;;
        *) die "unknown option $1; see --help" ;;
    esac
done
[ "$(id -u)" = 0 ] || die "this needs root: try sudo $0"
case "$role" in site | scheduler | both) ;; *) die "--role must be site, scheduler or both, not '$role'" ;; esac
[ "$purge" = 0 ] || [ "$remove" = 1 ] || die "--purge goes with --remove"

remove_site() {
    if has_systemd && [ -e "$unit" ]; then
        say "stopping the daemon"
        systemctl disable --now --quiet meshcompute-site.service || true
    fi
    if [ -x "$env_folder/bin/meshcompute-site" ] && [ -e "$config" ]; then
        say "ending all clusters of this site"
        "$env_folder/bin/meshcompute-site" drain --config "$config" ||
            die "something of a cluster is left (see above); nothing was removed, run this again"
    fi
    if [ -e "$unit" ]; then
        rm -f "$unit"
        ! has_systemd || systemctl daemon-reload
        ! has_systemd || systemctl reset-failed meshcompute-site.service 2>/dev/null || true
    fi
    [ "$(readlink "$link" 2>/dev/null)" != "$env_folder/bin/meshcompute-site" ] || rm -f "$link"
    rm -rf "$env_folder" "$socket_folder"
    if [ "$purge" = 1 ]; then
        [ ! -e "$made_group" ] || groupdel "$(cat "$made_group")" || say "the group $(cat "$made_group") stays"
        rm -rf "$config_folder" "$state_folder" "$unit.d"
        say "removed, with its settings and state"
    else
        say "removed; $config_folder and $state_folder are kept (--purge removes them)"
    fi
}

# What must be there, before anything is changed.
check_host() {
    local missing=()
    if [ ! -e "$config" ]; then
        [ -n "$pool" ] || die "the first installation needs --pool NAME"
        [[ "$pool" =~ ^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
            die "--pool '$pool': at most 40 lower-case letters, digits and inner hyphens"
    fi
    [ -e "$source" ] || die "there is no $source"
    has "$python" || die "there is no $python; name an interpreter with --python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than Python 3.11; name a newer one with --python"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    # By way of a shell, because setpriv itself still reaches every folder.
    setpriv --reuid=$nobody --regid=$nobody --clear-groups sh -c '"$0" -c ""' "$python" 2>/dev/null ||
        die "other accounts cannot run $("$python" -c 'import sys; print(sys.executable)'), but users of the site must; name another interpreter with --python"
    if ! grep -qs '^ *runtime *= *"process"' "$config"; then
        has wg || missing+=(wireguard-tools)
        has nft || missing+=(nftables)
        has nsenter || missing+=(util-linux)
        [ -d /sys/module/wireguard ] || modprobe --dry-run --quiet wireguard 2>/dev/null || has wireguard-go ||
            missing+=(wireguard-go)
        has dockerd || [ -S /var/run/docker.sock ] || missing+=(docker.io)
    fi
    [ "$role" = scheduler ] || grep -qs '^ *role *= *"scheduler"' "$config" || has sshd || missing+=(openssh-server)
    [ ${#missing[@]} = 0 ] ||
        die "this host lacks ${missing[*]}. Nothing was changed. Install them (apt-get install ${missing[*]}), then run this again"
}

# A new environment is made beside the old one and takes its place as a whole: what runs keeps its open files, and an
# installation that fails half-way changes nothing. An upgrade begins with a copy, so that only what differs is fetched.
install_software() {
    local new=$env_folder.new made_by
    # shellcheck disable=SC2064 # the folder's name is known now
    trap "rm -rf '$new'" EXIT
    rm -rf "$new"
    say "installing from $source"
    made_by=$("$python" -c 'import sys; print(sys.version, sys.base_prefix)')
    if [ "$(cat "$env_folder/.made-by" 2>/dev/null)" = "$made_by" ]; then
        cp -a "$env_folder" "$new"
    else
        "$python" -m venv "$new" || die "$python could not make an environment; nothing was changed"
        printf '%s' "$made_by" >"$new/.made-by"
    fi
    set -- "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location
    # Twice, because a version that is there already does not replace itself.
    { "$@" "${source}[site]" && "$@" --no-deps --force-reinstall "$source"; } ||
        die "pip could not install it (see above); nothing was changed"
    [ ! -e "$config" ] || "$new/bin/python" -c 'import sys; from controlplane.config import read_config; read_config(sys.argv[1])' "$config" 2>"$new/complaint" ||
        die "the new version does not understand $config; nothing was changed: $(tail -n 1 "$new/complaint")"
    # Scripts of an environment name its folder.
    grep -rlIF "$new" "$new/bin" "$new/pyvenv.cfg" | xargs -r sed -i "s#$new#$env_folder#g"
    rm -rf "$env_folder.old"
    [ ! -e "$env_folder" ] || mv "$env_folder" "$env_folder.old"
    mv "$new" "$env_folder"
    rm -rf "$env_folder.old"
    ln -sfn "$env_folder/bin/meshcompute-site" "$link"
}

write_config() {
    [ ! -e "$config" ] || { [ -z "$pool" ] || say "$config is kept as it is"; return 0; }
    install -d -m 0755 "$config_folder"
    if ! getent group "$group" >/dev/null; then
        groupadd --system "$group"
        printf '%s' "$group" >"$made_group"
        say "made the group $group; let people in with: usermod -aG $group NAME"
    fi
    cat >"$config.new" <<TOML
# Settings of this site; all keys are explained in README, "For site operators".
# After a change: meshcompute-site check, then systemctl restart meshcompute-site (clusters go on meanwhile).
pool = "$pool"
role = "$role"

[access]
groups = ["$group"]

[workers]
data_folders = []      # read-only in every worker, at the same path

[network_options]
endpoints = []         # public names or addresses of this host; UDP ports below must be open from outside
udp_ports = [51820, 51899]
TOML
    mv "$config.new" "$config"
    say "wrote $config"
}

install_unit() {
    local packaged
    packaged=$(echo "$env_folder"/lib/python3*/site-packages/controlplane/meshcompute-site.service)
    if ! cmp -s "$packaged" "$unit"; then
        install -d -m 0755 "$(dirname "$unit")"
        install -m 0644 "$packaged" "$unit"
        say "wrote $unit"
    fi
    if ! has_systemd; then
        say "systemd is not process 1 here: start '$link serve' from the supervisor that this host has"
        return
    fi
    systemctl daemon-reload
    [ "$start" = 1 ] || return 0
    systemctl enable --quiet meshcompute-site.service
    systemctl restart meshcompute-site.service || die "the daemon does not start: journalctl -u meshcompute-site"
    say "the daemon runs"
}

if [ "$remove" = 1 ]; then
    remove_site
    exit 0
fi
source=${wheel:-$(cd "$(dirname "$0")/.." && pwd)}
check_host
install_software
write_config
install_unit
"$link" check --config "$config" || say "mend what is BAD above, then: systemctl restart meshcompute-site"
