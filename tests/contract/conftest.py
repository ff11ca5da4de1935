"""What the tests of data planes share: the kinds of WireGuard, two hosts, and a cluster that is up."""

import contextlib
import os
import shutil
import subprocess

import pytest
from planebench import Cluster, Host, join


def has_kernel_wireguard():
    probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "wireguard"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def need_backend(need):
    """Skip where a kind of WireGuard is missing; in CI only the kernel's may be."""

    def need_backend(backend):
        need("root, for network namespaces", os.geteuid() == 0)
        if backend == "kernel" and not has_kernel_wireguard():
            pytest.skip("this kernel has no WireGuard module (modprobe wireguard): its backend is not tested here")
        programs = ["wg", "nft", "ping", "setpriv", "unshare", "nsenter", "ip", "ss"]
        for program in [*programs, "wireguard-go"] if backend == "userspace" else programs:
            need(program, shutil.which(program))

    return need_backend


@pytest.fixture(scope="module", params=["userspace", "kernel"])
def wireguard(request, need_backend):
    """Name of a backend that this machine has."""
    need_backend(request.param)
    return request.param


@pytest.fixture(scope="module")
def hosts(wireguard, tmp_path_factory):
    """Two hosts that reach each other."""
    folder = tmp_path_factory.mktemp("hosts")
    with contextlib.ExitStack() as stack:
        made = []
        for number in (1, 2):
            made.append(Host(number, wireguard, folder))
            stack.callback(made[-1].close)
        join(*made)
        yield made


@pytest.fixture(scope="module")
def cluster(hosts):
    """A cluster that is up; tests leave it up."""
    made = Cluster(hosts)
    try:
        yield made.boot().wait_for_handshakes()
    finally:
        made.close()
