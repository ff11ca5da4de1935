"""What is on disk survives, whatever happens to the daemon."""

from dataclasses import replace

import pytest
from controlbench import ID, OTHER_ID, record

from controlplane.errors import StoreError
from controlplane.leases import Tombstone
from controlplane.state import Store

STONE = Tombstone(cluster_id=ID, epoch=3, buried_at=100.0, owner_uid=1000, user="u", name="n", reason="r")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "state")
    store.open()
    return store


def test_what_was_saved_is_read_again(store, tmp_path):
    first = record(fingerprint_by_unit={"mc-1": "abc"}, is_ended=True, end_reason="its lease ended")
    store.save(first)
    store.save(record(OTHER_ID))
    store.bury(STONE)
    again = Store(tmp_path / "state")
    again.open()
    assert again.load() == ({ID: first, OTHER_ID: record(OTHER_ID)}, {ID: STONE})


def test_a_newer_record_replaces_the_older_and_a_forgotten_one_is_gone(store):
    store.save(record())
    store.save(record(listen_port=7))
    assert store.load()[0][ID].listen_port == 7
    store.forget(ID)
    store.forget(ID)
    assert store.load() == ({}, {})


def test_a_file_that_cannot_be_read_is_set_aside_and_told(store, tmp_path):
    store.save(record())
    store.save(record(OTHER_ID))
    (tmp_path / "state/clusters" / f"{ID}.json").write_text("{ half a file")
    records, _ = store.load()
    assert set(records) == {OTHER_ID}
    assert (tmp_path / "state/clusters" / f"{ID}.broken").exists()
    [problem] = store.problems
    assert problem.startswith(f"{ID}.json cannot be used")


def test_a_file_that_is_about_another_cluster_is_not_believed(store, tmp_path):
    store.save(record())
    (tmp_path / "state/clusters" / f"{ID}.json").rename(tmp_path / "state/clusters" / f"{OTHER_ID}.json")
    assert store.load()[0] == {}


def test_a_write_that_was_cut_short_leaves_the_old_record(store, tmp_path):
    store.save(record())
    (tmp_path / "state/clusters" / f".{ID}.json.new").write_text("{ half")
    store.open()
    assert store.load()[0] == {ID: record()}
    assert [path.name for path in (tmp_path / "state/clusters").iterdir()] == [f"{ID}.json"]


def test_tombstones_are_kept_until_they_are_unearthed_and_the_oldest_comes_first(store):
    younger = replace(STONE, cluster_id="0" * 32, buried_at=STONE.buried_at + 1)
    store.bury(younger)
    store.bury(STONE)
    assert list(store.load()[1].values()) == [STONE, younger]
    store.bury(replace(STONE, epoch=9))
    assert store.load()[1][ID].epoch == 9
    store.unearth(ID)
    assert store.load()[1] == {younger.cluster_id: younger}


def test_only_the_daemons_account_can_read_the_records(store, tmp_path):
    store.save(record())
    assert (tmp_path / "state/clusters").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state/clusters" / f"{ID}.json").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Cannot make .*another state_folder"):
        Store(tmp_path / "file" / "state").open()
