"""What is missing on a host is told before a user finds out, each with its cure."""

from dataclasses import replace

import pytest
from controlbench import config, mesh_config

from controlplane.findings import HostFacts, judge

GOOD = HostFacts(
    is_root=True,
    programs=frozenset({"wg", "nft", "nsenter", "unshare", "wireguard-go"}),
    has_kernel_wireguard=True,
    has_tun=True,
    has_ipv6=True,
    memory_nbytes=2**40,
    engine_version="20.10.24",
    sshd_options={"allowstreamlocalforwarding": "yes", "disableforwarding": "no"},
    has_systemd=True,
    unit_state="enabled",
)
SITE = mesh_config(
    role="site",
    access={"groups": ["science"]},
    workers={"data_folders": ["/data/x"]},
    network_options={"endpoints": ["gw.example"], "services": {"objects.example": "10.1.0.5:9000"}},
)
MISSING = [
    ({"is_root": False}, "bad", "account", 'runtime = "process"'),
    ({"has_ipv6": False}, "bad", "IPv6", "ipv6.disable"),
    ({"programs": GOOD.programs - {"wg"}}, "bad", "wg", "wireguard-tools"),
    ({"programs": GOOD.programs - {"nft"}}, "bad", "nft", "nftables"),
    ({"has_kernel_wireguard": False}, "note", "WireGuard", "modprobe wireguard"),
    ({"has_kernel_wireguard": False, "has_tun": False}, "bad", "WireGuard", "wireguard-go"),
    ({"engine_problem": "does not answer"}, "bad", "engine", "systemctl start docker"),
    ({"missing_images": frozenset({"meshcompute-worker:latest"})}, "bad", "image", "build-image.sh"),
    ({"problem_by_folder": {"/data/x": "does not exist"}}, "bad", "data folder", "workers.data_folders"),
    ({"state_folder_problem": "cannot be written"}, "bad", "state folder", "state_folder"),
    ({"n_taken_ports": 80}, "bad", "ports", "udp_ports"),
    ({"n_taken_ports": 70}, "note", "ports", "udp_ports"),
    ({"unresolved_endpoints": ("gw.example",)}, "bad", "endpoint", "endpoints"),
    ({"problem_by_service": {"objects.example": "does not answer"}}, "note", "service", "network_options.services"),
    ({"sshd_options": {"allowstreamlocalforwarding": "no"}}, "note", "sshd", "AllowStreamLocalForwarding local"),
    ({"sshd_options": {"disableforwarding": "yes"}}, "note", "sshd", "DisableForwarding no"),
    ({"sshd_options": None}, "note", "sshd", "openssh-server"),
    ({"is_command_on_path": False}, "bad", "command", "/usr/local/bin"),
    ({"unit_state": ""}, "note", "systemd", "install-site.sh"),
    ({"has_systemd": False}, "note", "systemd", "supervisor"),
    ({"unknown_groups": ("science",)}, "bad", "access", "groupadd"),
    ({"unknown_users": ("mesh",)}, "bad", "access", "create it"),
    ({"memory_nbytes": 2**30}, "bad", "memory", "processes_per_container"),
    ({"memory_nbytes": 2**33}, "note", "memory", "limits.workers"),
]


def test_a_host_that_has_everything_is_ok_throughout():
    assert {finding.level for finding in judge(SITE, GOOD)} == {"ok"}


@pytest.mark.parametrize(("change", "level", "subject", "cure"), MISSING, ids=[str(change) for change, *_ in MISSING])
def test_what_is_missing_is_told_with_its_cure(change, level, subject, cure):
    findings = [finding for finding in judge(SITE, replace(GOOD, **change)) if finding.level != "ok"]
    assert [(finding.level, finding.subject) for finding in findings] == [(level, subject)]
    assert cure in findings[0].cure
    assert str(findings[0]).splitlines()[1] == f"      -> {findings[0].cure}"


def test_a_site_of_processes_needs_no_root_no_engine_and_no_wireguard():
    site = config(access={"users": ["*"]}, workers={"data_folders": ["/data/x"]})
    bare = replace(
        GOOD, is_root=False, programs=frozenset(), has_kernel_wireguard=False, has_tun=False, engine_version=None
    )
    assert "bad" not in {finding.level for finding in judge(site, bare)}
    broken = judge(site, replace(bare, python_problem="python3 cannot run Dask"))
    assert [finding.subject for finding in broken if finding.level == "bad"] == ["python"]


def test_who_may_use_the_site_is_always_told():
    assert "nobody but root" in judge(mesh_config(), GOOD)[0].message
    assert "every account" in judge(mesh_config(access={"users": ["*"]}), GOOD)[0].message
