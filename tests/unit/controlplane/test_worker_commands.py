"""What runs in a unit, and what its container is like: decided without starting anything."""

import json
from dataclasses import replace
from ipaddress import IPv6Address

import pytest

from controlplane.workers.base import WorkerSpec
from controlplane.workers.commands import plan_unit, reason_of, spill_bytes_of
from controlplane.workers.docker import container_options

WORKERS = WorkerSpec(
    cluster_id="0123456789abcdef",
    name="mc-01234567-u0",
    pool="ecmwf",
    site=1,
    process_names=("ecmwf-1-0", "ecmwf-1-1"),
    threads_per_process=3,
    memory_bytes_per_process=4 << 30,
    scheduler_address="tcp://[fda5:c0ff:eeee::1]:8786",
    address=IPv6Address("fda5:c0ff:eeee:1::11"),
    uid=1000,
    gid=1001,
    groups=(2000, 2001),
    data_folders=("/data/ecmwf",),
    deadline_seconds=120.0,
    owner="ann",
)
SCHEDULER = replace(
    WORKERS,
    role="scheduler",
    process_names=("scheduler",),
    scheduler_address=None,
    address=IPv6Address("fda5:c0ff:eeee::1"),
    client_port=18786,
    dashboard_port=18787,
)


def options_of(argv):
    """Options of a command line with their values."""
    return {
        word: argv[place + 1] if place + 1 < len(argv) else None
        for place, word in enumerate(argv)
        if word.startswith("--")
    }


def argv_of(spec, **options):
    plan = plan_unit(spec, python="python3", scratch="/scratch", grace_seconds=5.0, nursery="/n.py", **options)
    return plan["processes"][0]["argv"]


def container_of(spec):
    return container_options(spec, given="/given", folder="/units", image="image:1", mounts=spec.data_folders)


def test_a_plan_can_be_written_as_json_and_read_back():
    plan = plan_unit(WORKERS, python="python3", scratch="/scratch", grace_seconds=5.0, nursery="/n.py")
    assert json.loads(json.dumps(plan)) == plan


def test_each_worker_has_its_own_name_and_its_own_folder():
    plan = plan_unit(WORKERS, python="python3", scratch="/scratch", grace_seconds=5.0, nursery="/n.py")
    found = [options_of(process["argv"]) for process in plan["processes"]]
    assert [options["--name"] for options in found] == ["ecmwf-1-0", "ecmwf-1-1"]
    assert [options["--local-directory"] for options in found] == ["/scratch/ecmwf-1-0", "/scratch/ecmwf-1-1"]


def test_a_worker_on_the_data_plane_listens_there_and_its_http_server_on_its_own_localhost():
    options = options_of(argv_of(WORKERS))
    assert options["--host"] == "[fda5:c0ff:eeee:1::11]"
    assert options["--dashboard-address"] == "127.0.0.1:0"
    assert "--listen-address" not in options


def test_without_a_data_plane_everything_is_on_localhost():
    assert options_of(argv_of(replace(WORKERS, address=None)))["--host"] == "127.0.0.1"
    options = options_of(argv_of(replace(SCHEDULER, address=None)))
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "18786")
    assert options["--dashboard-address"] == "127.0.0.1:18787"


def test_a_scheduler_in_its_own_network_has_the_well_known_ports_there():
    options = options_of(argv_of(SCHEDULER, listener="/given/locallistener.py"))
    assert (options["--host"], options["--port"]) == ("[fda5:c0ff:eeee::1]", "8786")
    assert options["--dashboard-address"] == "127.0.0.1:8787"
    assert options["--preload"] == "/given/locallistener.py"


def test_a_scheduler_without_dashboard_still_keeps_its_http_server_to_itself():
    argv = argv_of(replace(SCHEDULER, dashboard_port=None))
    assert "--no-dashboard" in argv
    assert options_of(argv)["--dashboard-address"] == "127.0.0.1:0"


@pytest.mark.parametrize("lease", [10.0, 120.0, 3600.0])
def test_connections_outlast_every_cut_that_the_lease_outlasts(lease):
    spec = replace(WORKERS, deadline_seconds=lease)
    plan = plan_unit(spec, python="python3", scratch="/scratch", grace_seconds=5.0, nursery="/n.py")
    timeout = plan["processes"][0]["environment"]["DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP"]
    assert float(timeout.removesuffix("s")) > lease


def test_further_variables_win_over_ours():
    plan = plan_unit(
        WORKERS,
        python="python3",
        scratch="/s",
        grace_seconds=5.0,
        nursery="/n.py",
        environment={"POOL_NAME": "x", "OTHER": "y"},
    )
    environment = plan["processes"][0]["environment"]
    assert (environment["POOL_NAME"], environment["OTHER"]) == ("x", "y")


def test_a_container_can_do_nothing_that_it_need_not():
    options = container_of(WORKERS)
    assert options["cap_drop"] == ["ALL"]
    assert options["security_opt"] == ["no-new-privileges"]
    assert options["read_only"]
    assert options["network_mode"] == "none"
    assert options["restart_policy"] == {"Name": "no"}
    assert options["user"] == "1000:1001"
    assert options["group_add"] == ["2000", "2001"]
    assert "privileged" not in options
    assert all(mount["ReadOnly"] for mount in options["mounts"])
    assert all(mount["Source"] == mount["Target"] for mount in options["mounts"][1:])


def test_a_containers_memory_holds_the_share_of_each_process_and_all_that_may_be_spilled():
    options = container_of(WORKERS)
    shares = 2 * WORKERS.memory_bytes_per_process
    spilled = 2 * spill_bytes_of(WORKERS)
    assert options["mem_limit"] > shares + spilled
    assert options["memswap_limit"] == options["mem_limit"]  # no swap
    assert options["cpu_quota"] == 6 * options["cpu_period"]
    assert f"size={spilled}" not in options["tmpfs"]["/scratch"]  # Dask stops before the file system does
    assert int(options["tmpfs"]["/scratch"].split(",")[0].removeprefix("size=")) > spilled


def test_a_container_says_whose_it_is():
    assert container_of(WORKERS)["labels"] == {
        "meshcompute.cluster": "0123456789abcdef",
        "meshcompute.name": "mc-01234567-u0",
        "meshcompute.owner": "ann",
        "meshcompute.folder": "/units",
    }


def test_reasons_are_for_people():
    assert reason_of(None) == "it has ended"
    assert reason_of(3) == "its lease has ended"
    assert "address" in reason_of(4)
    assert "code 137" in reason_of(137)
