"""Whose a connection to a scheduler's relay is."""

from __future__ import annotations

import pytest

from controlplane.workers.relay import is_from

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
# Both ends of a connection of user 2001 from port 40000 to 8786, as the kernel shows them; then one of an IPv6 socket.
FAR = "   1: 0100007F:2252 0100007F:9C40 01 00000000:00000000 00:00000000 0  2000        0 71 1\n"
NEAR = "   2: 0100007F:9C40 0100007F:2252 01 00000000:00000000 00:00000000 0  2001        0 72 1\n"
MAPPED = NEAR.replace("0100007F", "0000000000000000FFFF00000100007F").replace("9C40", "9C41")


@pytest.mark.parametrize(
    ("uids", "client_port", "table", "wanted"),
    [
        ({0, 2001}, 40000, FAR + NEAR, True),
        ({0, 2000}, 40000, FAR + NEAR, False),  # the other end is ours, and does not count
        ({0, 2001}, 40001, FAR + NEAR, False),
        ({0, 2001}, 40001, FAR + NEAR + MAPPED, True),
        ({0, 2000}, 40001, FAR + NEAR + MAPPED, False),
        ({0, 2001}, 40000, FAR, False),
        ({0, 2001}, 40000, "", False),
    ],
)
def test_a_connection_is_its_maker_s(uids: set[int], client_port: int, table: str, wanted: bool) -> None:
    assert is_from(frozenset(uids), client_port, 8786, HEAD + table) is wanted


def test_a_connection_that_has_ended_is_not_root_s() -> None:
    ended = NEAR.replace(" 01 ", " 06 ").replace(" 2001 ", "    0 ")
    assert not is_from(frozenset({0}), 40000, 8786, HEAD + ended)
