"""What the benchmark of the reference calculation makes of measurements."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/benchmarks"
MIB = 2**20


@pytest.fixture(scope="module")
def figures():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import reference_figures
    finally:
        sys.path.remove(str(SCRIPTS))
    return reference_figures


def sent(nbytes, udp_nbytes=0, udp_packets=0, wireguard_nbytes=0):
    return {
        "nbytes": nbytes,
        "udp_nbytes": udp_nbytes,
        "udp_packets": udp_packets,
        "wireguard_nbytes": wireguard_nbytes,
    }


@pytest.fixture
def rows(figures):
    files = sent(100 * MIB)
    values = sent(2 * MIB, udp_nbytes=1_000_000, udp_packets=1000, wireguard_nbytes=1_000_000 - 28 * 1000)
    ours = {"settled": [values], "payload": {"ecmwf>client": MIB}, "predicted": {"ecmwf>client": MIB}}
    return [
        figures.Row(number="1", title="", seconds=10, is_right=True, reads=4, reads_away=4, sent={"a>b": files}),
        figures.Row(number="7", title="", seconds=1, is_right=True, reads=4, sent={"a>b": values}, **ours),
    ]


def test_good_figures_miss_no_bar(figures, rows):
    assert figures.missed_bars(rows, None, is_full=False) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"is_right": False}, "not right"),
        ({"error": "OSError: no", "is_right": None}, "OSError: no"),
        ({"reads_away": 1}, "away from the data"),
        ({"seconds": 9}, "took 9.0 s"),
        ({"sent": {"a>b": sent(50 * MIB)}}, "sent 52428800 bytes"),
        ({"predicted": {"ecmwf>client": 2 * MIB}}, "were predicted"),
        ({"settled": [sent(0, 1_000_000, 1000, 1_000_000)]}, "differ by"),
    ],
)
def test_a_bar_that_is_missed_is_named(figures, rows, wrong, said):
    missed = figures.missed_bars([rows[0], replace(rows[1], **wrong)], None, is_full=False)
    assert len(missed) == 1
    assert said in missed[0]


def test_where_the_data_are_small_ours_need_not_be_ahead_but_must_be_right(figures, rows):
    slow = replace(rows[1], seconds=9, sent={"a>b": sent(50 * MIB)})
    assert figures.missed_bars([rows[0], slow], None, is_full=False, held_to=()) == []
    assert len(figures.missed_bars([rows[0], slow], None, is_full=False, held_to={"bytes"})) == 1
    wrong = replace(slow, is_right=False)
    assert figures.missed_bars([rows[0], wrong], None, is_full=False, held_to=()) != []


def test_what_passed_while_counters_were_read_is_no_difference(figures, rows):
    off_by_2000 = sent(0, 1_002_000, 1000, 1_000_000 - 28 * 1000)
    row = replace(rows[1], settled=[off_by_2000])
    assert row.reconciled == pytest.approx(0.002)
    assert replace(row, unsure_nbytes=2000).reconciled == 0


def test_the_floor_is_reading_and_two_crossings_of_what_is_packed(figures):
    floor = figures.Floor(
        payload_nbytes=8_000_000,
        packed_nbytes=2_000_000,
        forward_factor=1.1,
        backward_factor=0.05,
        transfer_bits_per_second=9e6,
        read_seconds=1.5,
        rate_bits_per_second=8e6,
        delay_seconds=0.01,
    )
    assert floor.wire_nbytes == pytest.approx(2_300_000)
    assert floor.seconds == pytest.approx(1.5 + 2.2 + 0.02)


def test_a_way_that_failed_shows_its_error_in_the_table(figures, rows):
    table = figures.render_table([*rows, figures.Row(number="3", title="stock", seconds=2, error="OSError: not there")])
    assert "(3) failed: OSError: not there" in table
