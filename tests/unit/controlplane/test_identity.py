"""Who is at the other end of a socket, and what it may do."""

import os
import socket

import pytest

from controlplane.config import AccessConfig
from controlplane.errors import ConfigError
from controlplane.identity import PeerCredentials, account_of, caller_of, read_credentials

USERS = {0: "root", 7: "daemon-user", 1000: "alice", 1001: "bob"}
GROUPS = {10: "science", 11: "operators", 1000: "alice", 1001: "bob"}


def judge(access, uid=1000, groups=(1000,)):
    credentials = PeerCredentials(uid=uid, gid=groups[0], groups=tuple(groups))
    return caller_of(
        credentials, AccessConfig(**access), own_uid=7, user_name=USERS.__getitem__, group_name=GROUPS.__getitem__
    )


@pytest.mark.parametrize(
    ("who", "access", "is_allowed", "is_operator"),
    [
        ({}, {}, False, False),
        ({}, {"users": ("alice",)}, True, False),
        ({"uid": 1001, "groups": (1001,)}, {"users": ("alice",)}, False, False),
        ({"groups": (1000, 10)}, {"groups": ("science",)}, True, False),
        ({}, {"users": ("*",)}, True, False),
        ({"groups": (1000, 11)}, {"operators_group": "operators"}, True, True),
        ({"uid": 0}, {}, True, True),
        ({"uid": 7}, {}, True, True),
    ],
    ids=["nobody", "by name", "another", "by group", "everybody", "operator", "root", "the daemon's own account"],
)
def test_the_operator_decides_who_may_use_the_site(who, access, is_allowed, is_operator):
    found = judge(access, **who)
    assert (found.is_allowed, found.is_operator) == (is_allowed, is_operator)


def test_an_empty_operators_group_makes_nobody_an_operator():
    assert not judge({"operators_group": ""}).is_operator


def test_the_kernel_says_who_connected():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        found = read_credentials(ours)
    assert (found.uid, found.gid) == (os.getuid(), os.getgid())
    assert set(found.groups) == {os.getgid(), *os.getgroups()}


def test_an_account_that_is_not_there_is_told_with_its_key():
    with pytest.raises(ConfigError, match=r"workers\.user: 'no-such-account'"):
        account_of("no-such-account")
    assert account_of("root").uid == 0
