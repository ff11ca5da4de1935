"""Links between pools: the settings, measured rates, and the costs that placement gets."""

from __future__ import annotations

import pickle

import dask
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcompute.clients import links_wanted
from meshcompute.errors import SettingError
from meshcompute.links import Link, LinkTable, RateBook, objective_of, parse_links


def table(*links, objective="bytes", **measured):
    rates = {tuple(pair.split("_")): rate for pair, rate in measured.items()}
    return LinkTable(given=parse_links(links), measured=rates, objective=objective)


@pytest.mark.parametrize(
    ("given", "bytes_per_second"),
    [
        (125e6, 125e6),
        ("100 MB/s", 100e6),
        ("100 MiB/s", 100 * 2**20),
        ("100 MB", 100e6),
        ("1 Gbit/s", 125e6),
        ("10Mbps", 1.25e6),
        ("800 bit/s", 100),
    ],
)
def test_a_bandwidth_is_bytes_per_second_or_says_its_unit(given, bytes_per_second):
    (link,) = parse_links([{"from": "a", "to": "b", "bandwidth": given}])
    assert link.bandwidth_bytes_per_second == pytest.approx(bytes_per_second)


def test_a_latency_is_seconds_or_says_its_unit():
    links = parse_links([{"from": "a", "to": "b", "latency": given} for given in (0.02, "20 ms", "20ms")])
    assert [link.latency_seconds for link in links] == pytest.approx([0.02] * 3)


def test_what_is_not_given_is_not_known():
    assert parse_links(None) == ()
    assert parse_links([{"from": "a", "to": "b"}]) == (Link(source="a", destination="b"),)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"from": "a", "to": "b"}, "it is a list"),
        ("a-b", "it is a list"),
        (7, "it is a list"),
        ([7], "each link is a mapping"),
        ([{"from": "a"}], "'to' names a pool"),
        ([{"from": "", "to": "b"}], "'from' names a pool"),
        ([{"from": "a", "to": "a"}], "two different pools"),
        ([{"from": "a", "to": "b", "speed": 7}], "no key 'speed'"),
        ([{"from": "a", "to": "b", "bandwidth": "fast"}], "bandwidth 'fast'"),
        ([{"from": "a", "to": "b", "bandwidth": 0}], "bandwidth 0"),
        ([{"from": "a", "to": "b", "bandwidth": -1}], "bandwidth -1"),
        ([{"from": "a", "to": "b", "bandwidth": True}], "bandwidth True"),
        ([{"from": "a", "to": "b", "bandwidth": float("nan")}], "bandwidth nan"),
        ([{"from": "a", "to": "b", "latency": "soon"}], "latency 'soon'"),
        ([{"from": "a", "to": "b", "cost": "much"}], "cost 'much'"),
    ],
)
def test_a_setting_that_cannot_be_read_says_what_is_wrong_and_what_would_do(value, says):
    with pytest.raises(SettingError, match=r"meshcompute\.links") as caught:
        parse_links(value)
    assert says in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_unknown_objective_names_those_that_there_are():
    assert objective_of("seconds") == "seconds"
    with pytest.raises(SettingError, match="bytes, money, seconds"):
        objective_of("speed")


def test_a_client_sends_its_settings_along():
    assert links_wanted() == {"links": None, "objective": "bytes"}
    with dask.config.set(
        {"meshcompute.links": [{"from": "a", "to": "*", "cost": 0.09}], "meshcompute.objective": "money"}
    ):
        wanted = links_wanted()
    assert wanted["objective"] == "money"
    assert wanted["links"][0].cost_per_gigabyte == 0.09


def test_later_links_count_where_several_fit_and_each_attribute_by_itself():
    links = table(
        {"from": "*", "to": "*", "bandwidth": 1e6, "latency": 0.1, "cost": 1.0},
        {"from": "a", "to": "b", "bandwidth": 2e6},
        {"from": "*", "to": "client", "cost": 0.5},
    )
    assert links.bytes_per_second("a", "b") == 2e6
    assert links.latency_seconds("a", "b") == 0.1
    assert links.bytes_per_second("b", "a") == 1e6
    assert links.cost("a", "client", 2e9) == 1.0
    assert links.seconds("b", "a", 3e6, n_values=2) == pytest.approx(3.2)


def test_what_is_given_counts_before_what_was_measured_and_that_before_what_is_assumed():
    links = table({"from": "a", "to": "b", "bandwidth": 1e6}, a_b=5e6, b_a=7e6)
    assert links.bytes_per_second("a", "b") == 1e6
    assert links.bytes_per_second("b", "a") == 7e6
    assert links.bytes_per_second("a", "c") == 100e6
    assert links.is_known("a", "b")
    assert links.is_known("b", "a")
    assert not links.is_known("a", "c")


@given(st.lists(st.floats(1e3, 1e9), min_size=8, max_size=40), st.floats(1e3, 1e9))
def test_a_few_odd_transfers_do_not_change_a_rate(odd, usual):
    book = RateBook()
    for rate in odd:
        book.add("a", "b", rate)
    for _ in range(17):  # more than half of those that count
        book.add("a", "b", usual)
    book.add("a", "b", 0.0)
    assert book.rates() == {("a", "b"): pytest.approx(usual)}


def test_bytes_need_no_matrix():
    assert table({"from": "a", "to": "b", "cost": 7}).costs(["a", "b"]) is None


def test_seconds_are_the_inverse_of_rates_with_latencies_and_the_client():
    links = table(
        {"from": "a", "to": "b", "bandwidth": 1e6, "latency": 0.5},
        {"from": "b", "to": "client", "bandwidth": 4e6, "latency": 0.25},
        objective="seconds",
        b_a=2e6,
    ).costs(["a", "b"], [4, 8])
    assert links.per_byte[0][1] == pytest.approx(1e-6)
    assert links.per_byte[1][0] == pytest.approx(5e-7)
    assert links.per_message[0][1] == 0.5
    assert links.per_message[1][0] == 0
    assert links.per_byte_to_client[1] == pytest.approx(2.5e-7)
    assert links.per_message_to_client[1] == 0.25
    assert list(links.threads) == [4, 8]


def test_money_prefers_fewer_bytes_where_the_price_is_the_same():
    links = table(
        {"from": "*", "to": "*", "cost": 0.0}, {"from": "a", "to": "b", "cost": 90.0}, objective="money"
    ).costs(["a", "b"])
    assert links.per_byte[0][1] == pytest.approx(9e-8, rel=1e-5)
    assert 0 < links.per_byte[1][0] < 1e-5 * links.per_byte[0][1]
    assert links.per_byte_to_client[0] == 0


def test_money_without_a_price_names_the_pair_and_the_cure():
    with pytest.raises(SettingError, match="b -> a has no cost") as caught:
        table({"from": "a", "to": "b", "cost": 1}, objective="money").costs(["a", "b"])
    assert "'*'" in str(caught.value)


def test_links_break_ties_between_replicas_and_never_weigh_against_bytes() -> None:
    table = LinkTable(given=parse_links([{"from": "a", "to": "c", "bandwidth": "1 MB/s"}]))
    assert table.costs(["a", "b", "c"]) is None
    costs = table.costs(["a", "b", "c"], has_replicas=True)
    assert costs is not None
    assert costs.per_byte[0][2] > costs.per_byte[1][2]
    crossings = [cost for i, row in enumerate(costs.per_byte) for j, cost in enumerate(row) if i != j]
    assert max(crossings) <= 1.001 * min(crossings)
    assert LinkTable().costs(["a", "b", "c"], has_replicas=True) is None  # nothing is known
    assert table.costs(["a", "c"], has_replicas=True) is None  # one of two has the reader
