#!/usr/bin/env bash
# Two sites on this machine and real climate data: the failure without pools, then the answer with them.
#   scripts/demo.sh                    needs Python 3.11 or newer and a package index; no root
#   scripts/demo.sh --reference        large synthetic fields instead (all options: scripts/demo.sh --help)
#   sudo scripts/demo.sh --lab         in data centres simulated on this machine, with containers and WireGuard
# Makes .venv-demo the first time; PYTHON chooses the interpreter. Arguments go to `meshcompute demo`.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/_setup.sh
. "$top/scripts/_setup.sh"
venv=$top/.venv-demo

make_venv "$venv" "$(find_python)"
extras=demo
case " $* " in *" --lab "*) extras=demo,site ;; esac # what daemons with containers and gateways need
install_wheel "$venv" "$extras"
unset PYTHONPATH
exec "$venv/bin/meshcompute" demo "$@"
