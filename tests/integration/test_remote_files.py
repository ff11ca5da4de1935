"""Files and tables of sites whose folders neither the client nor the scheduler sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import wait

import meshcompute as mc


def ran_at(sites: Any, collection: Any) -> set[str]:
    """Compute and return the addresses of the workers that hold the result."""
    persisted = collection.persist()
    wait(persisted)
    found = {address for addresses in sites.client.who_has(persisted).values() for address in addresses}
    assert found
    return found


def test_files_of_a_site_are_listed_found_and_read(sites: Any) -> None:
    deep = sites.store("a", "files/deep")
    deep.mkdir(parents=True)
    (deep / "one.txt").write_text("hello\nworld\n")
    content = np.random.default_rng(0).bytes(9_000_000)
    (deep.parent / "two.bin").write_bytes(content)
    top = sites.path("a", "files")
    files = mc.filesystem("a")
    assert sorted(files.ls(top, detail=False)) == [f"{top}/deep", f"{top}/two.bin"]
    assert {info["type"] for info in files.ls(top)} == {"directory", "file"}
    assert files.glob(f"{top}/**/*.txt") == [f"{top}/deep/one.txt"]
    assert files.find(top) == [f"{top}/deep/one.txt", f"{top}/two.bin"]
    assert list(files.walk(top)) == [(top, ["deep"], ["two.bin"]), (f"{top}/deep", [], ["one.txt"])]
    assert files.info(f"{top}/two.bin")["size"] == len(content)
    assert files.exists(f"{top}/two.bin")
    assert not files.exists(f"{top}/three.bin")
    assert files.isdir(top)
    assert files.isfile(f"{top}/two.bin")
    with files.open(f"{top}/deep/one.txt", "rt") as file:
        assert list(file) == ["hello\n", "world\n"]
    with files.open(f"{top}/two.bin") as file:
        file.seek(8_000_000)
        assert file.read(5) == content[8_000_000:8_000_005]
        file.seek(0)
        assert file.read() == content
    assert files.cat_file(f"{top}/two.bin", 3, 10) == content[3:10]
    with pytest.raises(FileNotFoundError) as caught:
        files.open(f"{top}/three.bin")
    assert "site 'a'" in caught.value.__notes__[-1]
    assert not mc.filesystem("b").exists(top)


def test_reading_a_part_of_a_file_ships_only_that_part(sites: Any) -> None:
    sites.store("a", "big.bin").write_bytes(bytes(50_000_000))
    with mc.measure_traffic() as traffic, mc.filesystem("a").open(sites.path("a", "big.bin"), block_size=2**20) as file:
        file.seek(20_000_000)
        assert file.read(100) == bytes(100)
    assert sum(traffic.bytes_between_pools.values()) < 3_000_000


# ---------------------------------------------------------------------------------------------------------------
# Tables


@pytest.fixture(scope="module")
def table(sites: Any) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(
        {"station": [f"s{i % 7}" for i in range(100)], "t": rng.random(100), "year": 2000 + np.arange(100) // 50},
        index=pd.Index(np.arange(100), name="number"),
    )
    sites.store("a", "table").mkdir()
    frame.iloc[:60].to_parquet(sites.store("a", "table/0.parquet"), row_group_size=20)
    frame.iloc[60:].to_parquet(sites.store("a", "table/1.parquet"), row_group_size=20)
    frame.reset_index().to_parquet(sites.store("a", "by-year"), partition_cols=["year"])
    return frame


@pytest.mark.parametrize("pattern", ["table", "table/*.parquet"])
def test_a_table_at_a_site_is_a_lazy_frame(sites: Any, table: pd.DataFrame, pattern: str) -> None:
    opened = mc.open_dataframe("a", sites.path("a", pattern))
    assert opened.npartitions == 2
    pd.testing.assert_frame_equal(opened.compute(), table, check_dtype=False)
    assert ran_at(sites, opened) <= set(sites.workers("a").values())
    means = opened.groupby("station").t.mean().compute().sort_index()
    pd.testing.assert_series_equal(means, table.groupby("station").t.mean(), check_index_type=False)


def test_columns_that_are_not_needed_are_not_read(sites: Any, table: pd.DataFrame) -> None:
    opened = mc.open_dataframe("a", sites.path("a", "table"))
    assert "columns=['t']" in opened[["t"]].optimize().tree_repr()
    pd.testing.assert_frame_equal(opened[["t"]].compute(), table[["t"]])
    assert list(mc.open_dataframe("a", sites.path("a", "table"), columns=["year"]).compute()) == ["year"]


def test_row_groups_and_filters_choose_what_is_read(sites: Any, table: pd.DataFrame) -> None:
    assert mc.open_dataframe("a", sites.path("a", "table"), split_row_groups=True).npartitions == 5
    pairs = mc.open_dataframe("a", sites.path("a", "table"), split_row_groups=2)
    assert pairs.map_partitions(len).compute().tolist() == [40, 20, 40]
    opened = mc.open_dataframe("a", sites.path("a", "by-year"), filters=[("year", "==", 2001), ("t", ">", 0.5)])
    assert opened.npartitions == 1
    expected = table[(table.year == 2001) & (table.t > 0.5)]
    np.testing.assert_array_equal(opened.compute().number, expected.index)


def test_a_table_that_is_not_there_or_is_none_names_the_site(sites: Any) -> None:
    for name in ("nothing.parquet", "nothing-*.parquet", "not-a-dataset.nc"):
        with pytest.raises(Exception, match=r".") as caught:
            mc.open_dataframe("a", sites.path("a", name))
        assert "site 'a'" in caught.value.__notes__[-1]
        assert isinstance(caught.value, FileNotFoundError) or "nothing" not in name
