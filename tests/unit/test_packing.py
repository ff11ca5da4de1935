"""Which codec is chosen for which link, and that what is packed comes out as it went in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed.core import ConnectionPool, Server
from distributed.protocol import dumps, loads
from distributed.protocol.serialize import Serialize, Serialized, serialize_and_split

from meshcompute import packing
from meshcompute.packedtransfers import announce, link_to, pack_frames, prepare_unpacking, withdraw
from meshcompute.packing import AUTO, MIN_NBYTES, OFF, WIRE_NAME, Chooser, Links, Transfer, Trial, choose, mode_of
from meshcompute.scheduler.packing import _is_packed, _unpack_all

MB = 1e6
SLOW_LINK, FAST_LINK = 30e6 / 8, 10e9 / 8  # bytes per second
ZSTD = Trial("zstd", 2, 4, 0.4, 1 / (200 * MB))
LZ4 = Trial("lz4", 1, 4, 0.6, 1 / (700 * MB))


def smooth(shape: tuple[int, ...] = (480, 640), dtype: str = "f4") -> np.ndarray:
    y, x = np.linspace(0, 6, shape[0])[:, None], np.linspace(0, 9, shape[1])
    return (280 + 10 * np.sin(y) * np.cos(x)).round(1).astype(dtype)


# ---------------------------------------------------------------------- decisions


def test_a_slow_link_gets_the_codec_that_packs_best_and_a_faster_one_the_fast_codec() -> None:
    assert choose([ZSTD, LZ4], SLOW_LINK) is ZSTD
    assert choose([ZSTD, LZ4], 100 * MB) is LZ4


@pytest.mark.parametrize("rate", [FAST_LINK, float("inf")])
def test_on_a_link_faster_than_the_codecs_values_go_plain(rate: float) -> None:
    assert choose([ZSTD, LZ4], rate) is None


@pytest.mark.parametrize("rate", [0.0, 1e3, 1e6, 1e7, 1e8, 1e9, 1e10, float("inf")])
def test_what_is_chosen_is_never_slower_than_plain(rate: float) -> None:
    for ratio in (0.01, 0.3, 0.6, 0.89, 0.9, 0.99, 1.1):
        for speed in (1 * MB, 50 * MB, 300 * MB, 3000 * MB):
            trial = Trial("zstd", 1, 4, ratio, 1 / speed)
            if choose([trial], rate) is not None:
                assert rate == 0 or ratio / rate + 1 / speed < 1 / rate


def test_what_does_not_get_smaller_goes_plain_however_slow_the_link() -> None:
    assert choose([ZSTD._replace(ratio=0.95)], 1.0) is None
    assert choose([], SLOW_LINK) is None


def sent(seconds: float, nbytes: int = 4_000_000, *, written: int = 0, packing: float = 0.0) -> Transfer:
    return Transfer(nbytes, written or nbytes, packing, seconds)


def test_a_link_is_as_fast_as_its_fastest_recent_transfer() -> None:
    links = Links()
    for seconds in (2.0, 1.0, 4.0):
        links.note("b", sent(seconds), 0.0)
    assert links.bytes_per_second("b", None, 1.0) == 4 * MB
    assert links.bytes_per_second("c", None, 1.0) == float("inf")
    for _ in range(8):
        links.note("b", sent(4.0), 2.0)
    assert links.bytes_per_second("b", None, 3.0) == 1 * MB
    links.note("b", sent(1.0, written=1_000_000, packing=0.01), 4.0)
    assert links.bytes_per_second("b", None, 5.0) == 1 * MB


def test_what_was_measured_long_ago_is_forgotten() -> None:
    links = Links()
    links.note("b", sent(4.0), 0.0)
    assert links.bytes_per_second("b", None, 60.0) == 1 * MB
    assert links.bytes_per_second("b", None, 61.0) == float("inf")


def test_small_transfers_say_nothing_about_a_link() -> None:
    links = Links()
    links.note("b", sent(1.0, 10_000), 0.0)
    assert links.bytes_per_second("b", None, 0.0) == float("inf")


def test_where_plain_values_were_there_sooner_than_packed_ones_values_go_plain_for_a_while() -> None:
    links = Links()
    links.note("b", sent(1.0), 0.0)
    links.note("b", sent(0.5, written=1_000_000, packing=1.0), 10.0)
    assert choose([ZSTD, LZ4], links.bytes_per_second("b", 0.02, 11.0)) is None
    links.note("b", sent(4.0), 30.0)
    assert choose([ZSTD, LZ4], links.bytes_per_second("b", 0.02, 61.0)) is ZSTD
    links.note("b", sent(4.1, packing=0.1), 61.0)  # noise: tried, and sent plain
    assert choose([ZSTD, LZ4], links.bytes_per_second("b", 0.02, 61.0)) is ZSTD
    links.note("b", sent(0.1, written=1_000_000, packing=0.1), 62.0)
    assert choose([ZSTD, LZ4], links.bytes_per_second("b", 0.02, 63.0)) is not None


def test_before_it_is_measured_a_far_link_is_taken_for_modest_and_a_near_one_for_fast() -> None:
    assert choose([ZSTD, LZ4], Links().bytes_per_second("b", 0.020, 0.0)) is ZSTD
    assert choose([ZSTD, LZ4], Links().bytes_per_second("b", 0.0001, 0.0)) is None


def test_the_farther_an_unmeasured_link_the_slower_a_fresh_connection() -> None:
    """5 MB: 8.4 round trips of slow start; never faster than what distributed takes any connection to have."""
    rates = [Links().bytes_per_second("b", seconds, 0.0, 5_000_000) for seconds in (0.002, 0.02, 0.1)]
    assert rates == pytest.approx([100 * MB, 29.7 * MB, 5.9 * MB], rel=0.01)
    assert Links().bytes_per_second("b", 0.02, 0.0, 500_000) == pytest.approx(4.9 * MB, rel=0.01)


def test_before_it_is_measured_a_link_is_no_faster_than_was_said() -> None:
    links = Links(["a"], [("a", "*", 8 * MB), ("a", "b", 4 * MB), ("c", "b", 1 * MB), ("*", "client", 2 * MB)])
    assert links.bytes_per_second("b", 0.02, 0.0, 5_000_000) == 4 * MB
    assert links.bytes_per_second("c", 0.02, 0.0, 5_000_000) == 8 * MB
    assert links.bytes_per_second("client", None, 0.0) == 2 * MB
    assert Links(["a"], [("a", "b", 1e10)]).bytes_per_second("b", 0.02, 0.0, 5_000_000) < 30 * MB
    links.note("b", sent(1.0, 20_000_000), 0.0)
    assert links.bytes_per_second("b", 0.02, 1.0) == 20 * MB


def test_of_codecs_that_are_as_quick_the_one_that_sends_less_is_chosen() -> None:
    less, sooner = ZSTD._replace(ratio=0.47, seconds_per_byte=4e-9), LZ4._replace(ratio=0.55, seconds_per_byte=1e-9)
    assert choose([less, sooner], 30 * MB) is less  # 0.59 and 0.58 of the time
    assert choose([less, sooner], 60 * MB) is sooner  # 0.71 and 0.61
    almost = less._replace(ratio=0.4, seconds_per_byte=18e-9)
    assert choose([almost, sooner._replace(ratio=0.85, seconds_per_byte=0.0)], 30 * MB).ratio == 0.85  # 0.94: no gain


def test_what_a_codec_sets_up_at_first_is_not_taken_for_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    used, pack = set(), packing.pack

    def with_set_up(frame: Any, how: Trial) -> bytes:
        if (how.codec, how.shuffle) not in used:
            used.add((how.codec, how.shuffle))
            time.sleep(0.5)
        return pack(frame, how)

    monkeypatch.setattr(packing, "pack", with_set_up)
    frame = memoryview(smooth().ravel())
    trials = packing.try_codecs(frame, ["zstd", "lz4"])
    assert len(used) == 4
    assert all(trial.seconds_per_byte * len(packing.sample_of(frame)) < 0.5 for trial in trials)


def test_small_values_and_fast_links_are_not_worth_a_sample() -> None:
    assert not packing.is_worth_a_sample(MIN_NBYTES - 1, 1.0)
    assert packing.is_worth_a_sample(MIN_NBYTES, SLOW_LINK)
    assert not packing.is_worth_a_sample(1_000_000, FAST_LINK)
    assert not packing.is_worth_a_sample(10**12, float("inf"))


@pytest.mark.parametrize(
    ("given", "mode"), [("auto", AUTO), (True, AUTO), (None, OFF), (False, OFF), ("off", OFF), ("lz4", "lz4")]
)
def test_the_setting_is_read_as_yaml_writes_it(given: Any, mode: str) -> None:
    assert mode_of(given) == mode


@pytest.mark.parametrize("given", ["gzip", 1, ""])
def test_a_setting_that_does_not_exist_names_those_that_do(given: Any) -> None:
    with pytest.raises(ValueError, match="auto, off, zstd, lz4"):
        mode_of(given)


def test_a_link_is_what_lies_between_different_pools() -> None:
    said = {"meshcompute": {"pools": ["b"], "codecs": ["zstd", "lz4"]}}
    assert link_to({"a"}, said) == ("b", ("zstd", "lz4"))
    assert link_to({"b"}, said) is None
    assert link_to({"a", "b"}, said) is None


@pytest.mark.parametrize(
    ("own", "handshake"),
    [
        (set(), {"meshcompute": {"pools": ["b"], "codecs": ["lz4"]}}),
        ({"a"}, {}),
        ({"a"}, {"meshcompute": {"pools": [], "codecs": ["lz4"]}}),
        ({"a"}, {"meshcompute": {"pools": ["b"], "codecs": []}}),
        ({"a"}, {"meshcompute": "b"}),
    ],
)
def test_where_nobody_knows_the_place_or_a_codec_there_is_no_link(own: set[str], handshake: dict[str, Any]) -> None:
    assert link_to(own, handshake) is None


def test_connections_that_were_busy_as_something_was_announced_are_not_used_again() -> None:
    async def check() -> None:
        async with Server({"echo": lambda x: x}) as server, ConnectionPool() as pool:
            await server.listen("tcp://127.0.0.1:0")
            worker = SimpleNamespace(rpc=pool)
            idle, busy = await pool.connect(server.address), await pool.connect(server.address)
            pool.reuse(server.address, idle)
            announce(worker, ["a"], ("zstd",))
            assert pool.open == 1
            pool.reuse(server.address, busy)
            assert pool.open == 0
            comm = await pool.connect(server.address)
            assert comm.local_info["meshcompute"] == {"pools": ["a"], "codecs": ["zstd"]}
            pool.reuse(server.address, comm)
            assert await pool.connect(server.address) is comm
            withdraw(worker)
            pool.reuse(server.address, comm)
            assert pool.open == 0
            assert await pool(server.address).echo(x=1) == 1
            assert pool.open == 1
            (comm,) = pool.available[server.address]
            assert "meshcompute" not in comm.local_info
            pool._validate()

    asyncio.run(check())


# ---------------------------------------------------------------------- the codec


def crossed(value: Any, codecs: tuple[str, ...] = ("zstd",), rate: float = 0.0, shard: int = 64 * 2**20) -> Any:
    """What comes out at the other end, and the names of the frames' codecs."""
    prepare_unpacking()
    header, frames = serialize_and_split(Serialize(value), None, "raise", {}, shard)
    header, frames = pack_frames(header, frames, Chooser(codecs, rate), None)
    message = dumps({"x": Serialized(header, frames)})
    return loads([bytes(frame) for frame in message])["x"], header["compression"]


NAN = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000], dtype="u4").view("f4")
VALUES = {
    "smooth": smooth(),
    "float64": smooth(dtype="f8"),
    "float16": smooth(dtype="f2"),
    "big-endian": smooth(dtype=">f4"),
    "int16": (smooth() * 10).astype("i2"),
    "uint8": np.tile(np.arange(200, dtype="u1"), 1000),
    "bool": smooth() > 283,
    "complex": smooth().astype("c16"),
    "times": np.arange(100_000).astype("M8[s]"),
    "records": np.zeros(10_000, dtype=[("a", "f4"), ("b", "i8"), ("c", "u1")]),
    "payloads of NaN": np.tile(NAN, 20_000),
    "every other column": smooth()[:, ::2],
    "backwards": smooth()[::-1, ::-1],
    "Fortran's order": np.asfortranarray(smooth()),
    "broadcast": np.broadcast_to(smooth()[0], (500, 640)),
    "no dimension": np.float64(1.5) * np.ones(()),
    "empty": np.empty((0, 640), "f4"),
    "odd size": np.zeros(100_003, "u1"),
    "noise": np.random.default_rng(0).integers(0, 256, 200_000, dtype="u1"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("codec", packing.CODECS)
def test_arrays_come_out_bit_by_bit(name: str, codec: str) -> None:
    value = VALUES[name]
    there, _ = crossed(value, (codec,))
    assert there.dtype == value.dtype
    assert there.shape == value.shape
    assert there.tobytes() == value.tobytes()
    assert there.flags.writeable == value.flags.writeable


def test_a_read_only_array_stays_read_only() -> None:
    value = smooth()
    value.flags.writeable = False
    there, names = crossed(value)
    assert names == (WIRE_NAME,)
    assert not there.flags.writeable


def test_masked_arrays_keep_mask_and_hidden_data() -> None:
    value = np.ma.array(smooth(), mask=smooth() < 281, fill_value=-1)
    there, names = crossed(value)
    assert set(names) == {WIRE_NAME}
    assert there.data.tobytes() == value.data.tobytes()
    assert np.array_equal(there.mask, value.mask)
    assert there.fill_value == value.fill_value


def test_containers_of_xarray_and_pandas_are_packed_inside() -> None:
    dataset = xr.Dataset({"t": (("y", "x"), smooth())}, coords={"y": np.arange(480.0)}, attrs={"units": "K"})
    there, names = crossed(dataset)
    assert WIRE_NAME in names
    xr.testing.assert_identical(there, dataset)
    assert there["t"].values.flags.writeable
    there["t"].values[0] = 0
    frame = pd.DataFrame({"a": np.arange(50_000.0), "b": np.arange(50_000), "c": ["x"] * 50_000})
    there, names = crossed(frame)
    assert WIRE_NAME in names
    pd.testing.assert_frame_equal(there, frame)


def test_objects_without_arrays_come_out_equal() -> None:
    for value in (list(range(50_000)), {"a": "x" * 100_000}, b"y" * 100_000, None, np.array([object, None, "x"] * 9)):
        there, _ = crossed(value)
        assert np.all(there == value)


def test_a_value_larger_than_a_frame_is_packed_frame_by_frame() -> None:
    value = smooth((1000, 1000))
    there, names = crossed(value, shard=1_000_000)
    assert names == (WIRE_NAME,) * 4
    assert there.tobytes() == value.tobytes()
    there[0] = 0


def test_a_smooth_field_becomes_less_than_half_and_noise_stays_as_it_is() -> None:
    header, frames = serialize_and_split(Serialize(smooth((960, 1280))), None, "raise", {}, 2**26)
    _, packed = pack_frames(header, frames, Chooser(["zstd", "lz4"], 0.0), None)
    assert sum(map(len, packed)) < 0.5 * 960 * 1280 * 4
    _, names = crossed(VALUES["noise"])
    assert names == (None,)


def test_small_values_stay_as_they_are() -> None:
    _, names = crossed(np.zeros(MIN_NBYTES // 8 - 1))
    assert names == (None,)


def test_frames_that_we_leave_alone_are_compressed_as_dask_is_told() -> None:
    value = np.zeros(MIN_NBYTES // 8 - 1)
    header, frames = serialize_and_split(Serialize(value), None, "raise", {}, 2**26)
    header, frames = pack_frames(header, frames, Chooser(["zstd"], 0.0), "zlib")
    assert header["compression"] == ("zlib",)
    there = loads([bytes(frame) for frame in dumps({"x": Serialized(header, frames)})])["x"]
    assert np.array_equal(there, value)


def test_a_scheduler_unpacks_what_it_hands_on() -> None:
    prepare_unpacking()
    header, frames = serialize_and_split(Serialize(smooth()), None, "raise", {}, 2**26)
    packed = Serialized(*pack_frames(header, frames, Chooser(["lz4"], 0.0), None))
    assert _is_packed(packed)
    assert not _is_packed(Serialized(header, frames))
    _unpack_all([packed])
    assert not _is_packed(packed)
    there = loads([bytes(frame) for frame in dumps({"x": packed})])["x"]
    assert np.array_equal(there, smooth())


def test_without_numcodecs_there_is_no_codec() -> None:
    code = (
        "import sys; sys.modules['numcodecs'] = None\n"
        "from meshcompute.packedtransfers import prepare_unpacking\n"
        "from distributed.protocol.compression import compressions\n"
        "print(prepare_unpacking(), 'meshcompute-blosc' in compressions)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == ["()", "False"]


def test_a_sample_is_made_of_whole_elements_from_all_over() -> None:
    frame = memoryview(np.repeat(np.arange(100, dtype="u8"), 1000)).cast("B")
    sample = np.frombuffer(packing.sample_of(frame), "u8")
    assert sample.nbytes == 64 * 1024
    assert set(np.unique(sample)) <= set(range(100))
    assert sample.min() == 0
    assert sample.max() >= 98
    small = np.arange(100, dtype="u1")
    assert packing.sample_of(memoryview(small)) == small.tobytes()


def test_the_trials_of_a_frame_know_its_elements() -> None:
    trials = packing.try_codecs(memoryview(smooth().ravel()), ["zstd", "lz4"])
    assert {(trial.codec, trial.shuffle, trial.itemsize) for trial in trials} == {
        (codec, shuffle, 4) for codec in ("zstd", "lz4") for shuffle in (1, 2)
    }
    assert all(trial.seconds_per_byte > 0 for trial in trials)


def test_many_small_frames_share_a_trial_and_a_large_one_has_its_own() -> None:
    chooser = Chooser(["zstd"], 0.0)
    assert chooser.choose(smooth((100, 200)).ravel().data) is not None
    small = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype="u4")
    assert chooser.choose(small.data) is not None  # packing it will show that it does not get smaller
    assert chooser.choose(np.zeros(100_000, "u1").data) is not None
    large = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype="u4")
    assert chooser.choose(large.data) is None
    assert chooser.choose(smooth((100, 200)).ravel().data) is None
    assert chooser.choose(memoryview(b"few")) is None
