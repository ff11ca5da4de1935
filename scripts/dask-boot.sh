#!/usr/bin/env bash
# One Dask cluster at several data centres: up, a command, down.
#   scripts/dask-boot.sh mesh@10.8.0.4 mesh@10.8.0.2                        until Ctrl-C
#   scripts/dask-boot.sh mesh@10.8.0.4 mesh@10.8.0.2 -- python work.py      until the command ends, with its exit code
# The command finds the cluster by DASK_SCHEDULER_ADDRESS. All options: scripts/dask-boot.sh --help
# PYTHON chooses the interpreter, which needs meshcompute.
set -euo pipefail
# Looking whether it is there, with what it imports, is quicker than importing it twice.
looks='import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("meshcompute.mesh.clustercli", "click", "distributed", "aiohttp", "pydantic"))))'
for python in ${PYTHON:-python python3}; do
    if "$python" -c "$looks" 2>/dev/null; then
        exec "$python" -m meshcompute.mesh.clustercli up "$@"
    fi
done
echo "dask-boot.sh: ${PYTHON:-python} has no meshcompute. Install it (pip install .), or set PYTHON=/path/to/python." >&2
exit 1
