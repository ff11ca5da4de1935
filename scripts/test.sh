#!/usr/bin/env bash
# All checks and all tests, on the installed wheel, from a fresh clone on a fresh machine.
#   scripts/test.sh                    everything
#   scripts/test.sh ARGUMENTS...       checks, then pytest with these arguments (paths from the top of the repository)
#   scripts/test.sh --coverage         with branch coverage of this process
# Makes .venv-test (with the wheel) and .venv-stock (the same packages without meshcompute). As root it installs Debian
# packages that are missing; otherwise it names them. PYTHON chooses the interpreter.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/_setup.sh
. "$top/scripts/_setup.sh"
venv=$top/.venv-test
stock=$top/.venv-stock

# 1. Programs that do not come from a Python package.
declare -A package_of=([dot]=graphviz [unshare]=util-linux [setpriv]=util-linux [mount]=mount)
if [ "$(id -u)" = 0 ]; then # networks, containers and sites need root; without it those tests are skipped by name
    package_of+=([wg]=wireguard-tools [wireguard-go]=wireguard-go [ip]=iproute2 [nft]=nftables [ping]=iputils-ping
        [systemd-analyze]=systemd [ssh]=openssh-client [sshd]=openssh-server [dockerd]=docker.io [debootstrap]=debootstrap [tini]=tini
        [sshfs]=sshfs [rsync]=rsync)
    PATH=$PATH:/usr/sbin:/sbin
fi
missing=()
for program in "${!package_of[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >/dev/null ||
            die "apt-get could not install: ${missing[*]}"
    else
        die "The tests need these packages of your system: ${missing[*]}. Install them (apt-get install ${missing[*]}) and run again."
    fi
fi

# 2. Two environments: with the wheel, and the same packages without it.
python=$(find_python)
make_venv "$venv" "$python"
install_wheel "$venv" dev
make_venv "$stock" "$python"
"$venv/bin/python" -m pip freeze --quiet --disable-pip-version-check --exclude meshcompute --exclude controlplane >"$venv/versions.txt"
if ! cmp -s "$venv/versions.txt" "$stock/versions.txt"; then
    say "installing the same packages without meshcompute"
    pip_install "$stock" --constraint "$venv/versions.txt" 'dask[array,dataframe]' distributed xarray flox netCDF4 zarr fsspec s3fs lz4 scipy
    cp "$venv/versions.txt" "$stock/versions.txt"
fi

# 3. As root, the image for tests of containers; made again when anything in it changes. Debian's part of it is kept.
if [ "$(id -u)" = 0 ]; then
    image=$venv/worker-image.tar
    recipe=$(fingerprint "$top/docker" "$top/scripts/build-image.sh" "$top/meshcompute" "$top/pyproject.toml" "$venv/versions.txt")
    if [ ! -e "$image" ] || [ "$(cat "$image.made-from" 2>/dev/null)" != "$recipe" ]; then
        say "building the image of workers (some minutes)"
        "$top/scripts/build-image.sh" --own-engine --base debootstrap --keep-base "$venv/base-image.tar" --like "$venv/bin/python" --save "$image"
        printf '%s' "$recipe" >"$image.made-from"
    fi
    export MESHCOMPUTE_WORKER_IMAGE=$image
fi

# 4. A missing component fails from here on.
export CI=true MESHCOMPUTE_STOCK_PYTHON=$stock/bin/python
export MPLBACKEND=Agg # no window, wherever this runs
unset PYTHONPATH
status=0
PATH=$venv/bin:$PATH PYTHON=$venv/bin/python "$top/scripts/check" || status=1 # and the tests run all the same

arguments=()
for argument in "$@"; do
    case "$argument" in
        --coverage) arguments+=(--cov --cov-branch --cov-report=term-missing:skip-covered "--cov-config=$top/pyproject.toml") ;;
        *) if [ -e "$top/${argument%%::*}" ]; then arguments+=("$top/$argument"); else arguments+=("$argument"); fi ;;
    esac
done
has_path=0
for argument in ${arguments[@]+"${arguments[@]}"}; do
    case "$argument" in "$top"/*) has_path=1 ;; esac
done
[ "$has_path" = 1 ] || arguments+=("$top/tests")
# From an empty folder: neither the current folder nor the rootdir may stand in for the wheel.
mkdir -p "$venv/empty"
cd "$venv/empty"
PATH=$venv/bin:$PATH "$venv/bin/pytest" -c "$top/pyproject.toml" --rootdir "$top" -o cache_dir="$venv/pytest-cache" "${arguments[@]}" || status=1
exit "$status"
