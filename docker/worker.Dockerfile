# One image for schedulers and workers. scripts/build-image.sh builds it, with the wheels of this tree beside this file.
#
#   BASE_IMAGE         any Linux with Python 3.11 or newer and its venv module
#   PYTHON             its interpreter
#   PIP_INDEX_URL      where packages come from that are not among the wheels; pip's own default if it is not given
#   PIP_OPTIONS        "--no-index" takes all from the wheels: no network is needed
#   REQUIREMENTS       what is installed; add what your users' tasks import (xarray groups with flox where a user has it)
#
# It holds no key, no user and no address. The daemon starts it with a read-only root, as the caller's uid, without
# capabilities, with a network of its own, and brings the program that keeps the processes (entrypoint.py) along.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PYTHON=python3
ARG PIP_INDEX_URL
ARG PIP_OPTIONS=""
ARG REQUIREMENTS="meshcompute[dashboard,dataframe] flox lz4"
COPY wheels /wheels
RUN ${PYTHON} -m venv /opt/meshcompute \
 && /opt/meshcompute/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
    ${PIP_OPTIONS} --find-links /wheels ${REQUIREMENTS} \
 && /opt/meshcompute/bin/python -m dask --version

# The wheels stay behind in the stage above.
FROM ${BASE_IMAGE}
COPY --from=build /opt/meshcompute /opt/meshcompute
ENV PATH=/opt/meshcompute/bin:/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8
LABEL org.opencontainers.image.title="meshcompute worker" org.opencontainers.image.licenses="BSD-3-Clause"
USER 65534:65534
WORKDIR /
CMD ["python3", "-m", "dask", "--version"]
