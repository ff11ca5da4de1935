# Sourced by the other scripts: finds a Python, makes a virtual environment and installs into it, only when needed.
# It changes nothing outside the environment's folder.

say() { printf '%s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# find_python: prints a Python that is new enough; $PYTHON decides where it is set.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed and was not found${PYTHON:+ (PYTHON=$PYTHON)}. Install it, or set PYTHON=/path/to/python."
}

# make_venv DIR PYTHON: makes an environment there; does nothing where a working one of the same Python is.
make_venv() {
    local dir=$1 python=$2 wanted
    wanted=$("$python" -c 'import sys; print(sys.version, sys.base_prefix)')
    if [ "$(cat "$dir/.made-by" 2>/dev/null)" = "$wanted" ] && "$dir/bin/python" -c '' 2>/dev/null; then
        return
    fi
    say "making a virtual environment in $dir"
    rm -rf "$dir"
    if ! "$python" -m venv "$dir"; then
        rm -rf "$dir"
        die "$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
    fi
    printf '%s' "$wanted" >"$dir/.made-by"
}

# fingerprint PATH...: one line that changes when any of these files does.
fingerprint() {
    find "$@" -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 cksum | cksum
}

# pip_install DIR ARGUMENTS...: quiet, but for errors.
pip_install() {
    local dir=$1
    shift
    "$dir/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-warn-script-location "$@" ||
        die "pip could not install: $*. Is a package index reachable from here?"
}

# install_wheel DIR EXTRAS: builds the wheel of this tree and installs it with these extras. What is unchanged since the
# last time is not done again: a few seconds when only our own files changed, nothing when nothing did.
install_wheel() {
    local dir=$1 extras=$2 requirements sources wheel
    requirements="$extras $(fingerprint "$top/pyproject.toml")"
    sources="$requirements $(fingerprint "$top/pyproject.toml" "$top/README.md" "$top/LICENSE" "$top/meshcompute" "$top/controlplane")"
    if [ "$(cat "$dir/.installed" 2>/dev/null)" = "$sources" ]; then
        return
    fi
    rm -rf "$dir/.installed" "$dir/wheel"
    pip_install "$dir" hatchling
    "$dir/bin/python" -m pip wheel --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --wheel-dir "$dir/wheel" "$top" || die "the wheel could not be built"
    wheel=$(echo "$dir"/wheel/*.whl)
    if [ "$(cat "$dir/.requirements" 2>/dev/null)" != "$requirements" ]; then
        say "installing meshcompute[$extras] and what it needs (once; some minutes where nothing is cached)"
        rm -f "$dir/.requirements"
        pip_install "$dir" "$wheel[$extras]"
    fi
    # The version does not change with every edit, so the same version must replace itself.
    pip_install "$dir" --no-deps --force-reinstall "$wheel"
    printf '%s' "$requirements" >"$dir/.requirements"
    printf '%s' "$sources" >"$dir/.installed"
}
