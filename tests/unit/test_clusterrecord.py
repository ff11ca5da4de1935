"""Records of a person's clusters: which are kept, which are swept."""

import os

import pytest

from meshcompute.mesh.clusterrecord import (
    LEASES_REMEMBERED,
    LOG_REMEMBERED_SECONDS,
    ClusterRecord,
    process_started,
    records,
    remember,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "meshcompute"


def record(name, **fields):
    usual = {
        "name": name,
        "cluster_id": "0" * 32,
        "prefix": "fda5:c0ff:eeee::/48",
        "scheduler": "local",
        "sites": {1: "mesh@10.8.0.4"},
        "pools": {1: "ecmwf"},
        "socket": "/run/s",
        "ssh": ("ssh",),
        "site_command": "meshcompute-site",
        "client_address": "tcp://127.0.0.1:8786",
        "dashboard_address": None,
        "lease_seconds": 100.0,
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
    }
    return ClusterRecord(**{**usual, **fields})


def age(path, seconds):
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_a_cluster_that_is_kept_is_remembered_however_long_ago_it_was_written(folder):
    remember(record("kept"))
    age(folder / "kept.json", 1e6)
    assert [one.name for one in records()] == ["kept"]


def test_a_cluster_whose_keeper_was_killed_is_remembered_as_long_as_a_lease_may_last(folder):
    orphan = record("orphan", pid_started="another time")
    remember(orphan)
    age(folder / "orphan.json", LEASES_REMEMBERED * 100.0 - 5.0)
    assert records() == [orphan]
    age(folder / "orphan.json", 6.0)
    assert records() == []
    assert not folder.exists()  # nor is its folder left


def test_whoever_starts_a_cluster_sweeps_what_others_have_left(folder):
    remember(record("orphan", pid_started="another time"))
    age(folder / "orphan.json", 1e6)
    remember(record("new"))
    assert [path.name for path in folder.iterdir()] == ["new.json"]


def test_writing_it_again_says_that_it_is_kept(folder):
    remember(record("kept"))
    age(folder / "kept.json", 1e6)
    before = (folder / "kept.json").stat().st_mtime
    remember(record("kept"))
    assert (folder / "kept.json").stat().st_mtime > before


def test_a_log_without_a_cluster_is_kept_while_it_may_be_booting(folder):
    remember(record("new"))
    (folder / "booting.log").write_text("")
    (folder / "new.log").write_text("")
    age(folder / "new.log", LOG_REMEMBERED_SECONDS + 1)
    records()
    assert (folder / "booting.log").exists()
    assert (folder / "new.log").exists()
    (folder / ".half.json.77").write_text("{")
    for name in ("booting.log", ".half.json.77"):
        age(folder / name, LOG_REMEMBERED_SECONDS + 1)
    records()
    assert sorted(path.name for path in folder.iterdir()) == ["new.json", "new.log"]
