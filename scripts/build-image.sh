#!/usr/bin/env bash
# Build the image of schedulers and workers from this tree.
#   scripts/build-image.sh                      meshcompute-worker:latest, from the public base image and package index
#   --tag NAME                                  another name for it
#   --base IMAGE                                another base image
#   --base debootstrap                          make a base image from Debian's packages (root; no registry is needed)
#   --keep-base FILE                            (with it) take that base image from this archive, or keep it there
#   --like PYTHON                               the package versions that this interpreter has: no version can differ
#   --constraint FILE                           package versions, as pip takes them
#   --wheels DIR                                wheels that are there already; with --no-index, nothing else
#   --no-index                                  ask no package index, neither here nor in the image
#   --save FILE                                 write the image to an archive, too, for docker load
#   --own-engine                                start an engine for this build alone (root, dockerd); use it with --save
#   --requirements "A B"                        what is installed (default: meshcompute[dashboard,dataframe] flox lz4)
# Wheels are collected here, with this machine's pip and its settings, so that the build itself needs no network.
# DOCKER chooses the program, DOCKER_HOST the engine. What it downloads lies in a temporary folder that goes with it.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/_setup.sh
. "$top/scripts/_setup.sh"
docker=${DOCKER:-docker}
tag=meshcompute-worker:latest
base=python:3.11-slim-bookworm
made_base=meshcompute-base:bookworm
mirror=${DEBIAN_MIRROR:-} # debootstrap's own default if it is not set
requirements='meshcompute[dashboard,dataframe] flox lz4'
like='' wheels='' save='' kept_base='' own_engine=0 index=1 constraints=()

while [ $# -gt 0 ]; do
    case "$1" in
        --tag) tag=$2 && shift 2 ;;
        --base) base=$2 && shift 2 ;;
        --keep-base) kept_base=$(realpath -m "$2") && shift 2 ;;
        --like) like=$2 && shift 2 ;;
        --constraint) constraints+=(--constraint "$(realpath "$2")") && shift 2 ;;
        --wheels) wheels=$(realpath "$2") && shift 2 ;;
        --save) save=$(realpath "$2") && shift 2 ;;
        --own-engine) own_engine=1 && shift ;;
        --no-index) index=0 && shift ;;
        --requirements) requirements=$2 && shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;;
        *) die "unknown option $1: see scripts/build-image.sh --help" ;;
    esac
done

context=$(mktemp -d)
engine=''
end() {
    if [ -n "$engine" ]; then
        { kill -KILL "$engine" && wait "$engine"; } 2>/dev/null || true # with it ends its whole namespace
        find /sys/fs/cgroup -depth -type d -path "*/meshcompute-build-$$*" -exec rmdir {} + 2>/dev/null || true
    fi
    rm -rf --one-file-system "$context"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$context/wheels" "$context/build"

# 0. The engine.
if [ "$own_engine" = 1 ]; then
    [ "$(id -u)" = 0 ] || die "--own-engine needs root."
    command -v dockerd >/dev/null || die "dockerd is missing: apt-get install docker.io"
    export DOCKER_HOST=unix://$context/docker.sock
    # In namespaces of its own, so that all of it, and nothing else, ends with this script. Its network is this one, to fetch images.
    setpriv --pdeathsig KILL unshare --mount --pid --uts --ipc --fork --kill-child --mount-proc sh -ec '
        mount -t tmpfs tmpfs /run
        exec dockerd --host "$1" --data-root "$2/engine" --exec-root "$2/exec" --pidfile "$2/pid" \
            --cgroup-parent="$3" --bridge=none --iptables=false --ip6tables=false' \
        sh "$DOCKER_HOST" "$context" "/meshcompute-build-$$" >"$context/engine.log" 2>&1 &
    engine=$!
    for _ in $(seq 300); do
        "$docker" version >/dev/null 2>&1 && break
        kill -0 "$engine" 2>/dev/null || die "dockerd ended: $(tail -n 5 "$context/engine.log")"
        sleep 0.1
    done
fi
"$docker" version >/dev/null 2>&1 ||
    die "The container engine does not answer ($docker version). Install and start one (apt-get install docker.io), set DOCKER_HOST, or use --own-engine."

# 1. The base image.
make_base() {
    command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
    [ "$(id -u)" = 0 ] || die "debootstrap needs root. Use --base IMAGE with an image that has Python."
    say "making $made_base from Debian's packages (a minute or two)"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$context/root" ${mirror:+"$mirror"} \
        >"$context/debootstrap.log" 2>&1 || die "debootstrap failed: $(tail -n 5 "$context/debootstrap.log")"
    rm -rf "$context/root"/{var/cache/apt,var/lib/apt/lists,usr/share/doc,usr/share/man,usr/share/locale}/*
    tar -C "$context/root" --one-file-system -c . | "$docker" import - "$made_base" >/dev/null
    rm -rf --one-file-system "$context/root" # not into the build
}
if [ "$base" = debootstrap ]; then
    if ! "$docker" image inspect "$made_base" >/dev/null 2>&1; then
        if [ -z "$kept_base" ] || ! "$docker" load --quiet --input "$kept_base" >/dev/null 2>&1; then
            make_base
            [ -z "$kept_base" ] || { "$docker" save --output "$kept_base.new" "$made_base" && mv "$kept_base.new" "$kept_base"; }
        fi
    fi
    base=$made_base
elif ! "$docker" image inspect "$base" >/dev/null 2>&1; then
    say "fetching $base"
    "$docker" pull --quiet "$base" >/dev/null ||
        die "The base image $base cannot be had. Load it, name another one (--base IMAGE), or make one (--base debootstrap)."
fi
version=$("$docker" run --rm --network none --entrypoint python3 "$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    die "The base image $base has no python3 that runs. Name one with Python 3.11 or newer."

# 2. The wheels of this tree and of what it needs, for the Python of the base image.
python=$(find_python)
tools=$context/tools
"$python" -m venv "$tools" || die "$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
if [ "$index" = 0 ]; then
    from=(--no-index) # and the build back end, hatchling, must be among the wheels, or our own wheel
else
    from=()
fi
[ -z "$wheels" ] || from+=(--find-links "$wheels")
if [ -n "$like" ]; then
    "$like" -m pip freeze --quiet --disable-pip-version-check --exclude-editable --exclude meshcompute |
        grep -E '^[A-Za-z0-9_.-]+==' >"$context/like.txt"
    constraints+=(--constraint "$context/like.txt")
fi
pip() { "$tools/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }
if [ -n "$wheels" ] && compgen -G "$wheels/meshcompute-*.whl" >/dev/null; then
    cp "$wheels"/meshcompute-*.whl "$context/wheels/"
else
    say "building the wheel of this tree"
    pip wheel "${from[@]}" --no-deps --wheel-dir "$context/wheels" "$top" || die "The wheel of this tree could not be built."
fi
say "collecting the wheels for Python $version"
target=(--only-binary ':all:')
if [ "$version" != "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ]; then
    machine=$(uname -m)
    target+=(--python-version "$version" --implementation cp)
    for glibc in 2_17 2_28 2_34; do target+=(--platform "manylinux_${glibc}_$machine"); done
fi
# shellcheck disable=SC2086 # requirements are a list of words
pip download "${from[@]}" --find-links "$context/wheels" "${target[@]}" ${constraints[@]+"${constraints[@]}"} \
    --dest "$context/wheels" $requirements || die "Not all packages can be had: see above. Offline, --wheels DIR must hold all of them."
rm -rf "$tools"

# 3. The image.
say "building $tag"
mv "$context/wheels" "$context/build/wheels"
cp "$top/docker/worker.Dockerfile" "$context/build/Dockerfile"
"$docker" build --network none --tag "$tag" --build-arg BASE_IMAGE="$base" --build-arg PIP_OPTIONS=--no-index \
    --build-arg REQUIREMENTS="$requirements" "$context/build" >"$context/build.log" 2>&1 ||
    die "The image could not be built: $(tail -n 15 "$context/build.log")"
if [ -n "$save" ]; then
    say "saving it to $save"
    "$docker" save --output "$save.new" "$tag" && mv "$save.new" "$save"
fi
say "$tag is ready: $("$docker" image inspect --format '{{.Size}}' "$tag" | awk '{printf "%.0f MB", $1 / 1e6}')"
