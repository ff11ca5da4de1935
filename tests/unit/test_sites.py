"""How a site is named, and what is read from OpenSSH's own words."""

import pickle

import pytest

from meshcompute.errors import MeshError
from meshcompute.mesh.sites import (
    SiteAddress,
    SiteAddressError,
    SiteRefusedError,
    SiteUnreachableError,
    parse_site,
)
from meshcompute.mesh.sshtunnel import cause_of_ssh, ssh_command


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("mesh@10.8.0.4", SiteAddress(user="mesh", host="10.8.0.4")),
        ("mesh@10.8.0.4:2222", SiteAddress(user="mesh", host="10.8.0.4", port=2222)),
        ("mesh@[fd00::4]:22", SiteAddress(user="mesh", host="fd00::4", port=22)),
        ("mesh@[fe80::4%eth0]", SiteAddress(user="mesh", host="fe80::4%eth0")),
        ("a.b@gateway.example.org", SiteAddress(user="a.b", host="gateway.example.org")),
        ("ecmwf-gateway", SiteAddress(host="ecmwf-gateway")),
        ("local", SiteAddress(host=None)),
        ("local:/tmp/a.sock", SiteAddress(host=None, socket="/tmp/a.sock")),
    ],
)
def test_what_names_a_site_is_read_and_written_back(text, address):
    assert parse_site(text) == address
    assert str(address) == text
    assert address.is_local == text.startswith("local")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the host is missing"),
        ("mesh@", "the host is missing"),
        ("@10.8.0.4", "nothing before the '@'"),
        ("mesh@10.8.0.4:", "no port"),
        ("mesh@10.8.0.4:ssh", "'ssh' is no port from 1 to 65535"),
        ("mesh@10.8.0.4:0", "'0' is no port"),
        ("mesh@10.8.0.4:65536", "'65536' is no port"),
        ("mesh@10.8.0.4:²", "no port"),
        ("mesh@fd00::4", "in brackets: mesh@[fd00::4]"),
        ("mesh@[fd00::4", "no IPv6 address in brackets"),
        ("mesh@[host]", "no IPv6 address in brackets"),
        ("mesh@[fd00::4]22", "no IPv6 address in brackets"),
        ("mesh@-oProxyCommand=reboot", "no host's name"),
        ("-oProxyCommand=reboot", "no host's name"),
        ("-l@host", "no account's name"),
        ("a b@host", "no account's name"),
        ("mesh@host name", "no host's name"),
        ("mesh@host\n", "no host's name"),
        ("a@b@c", "no account's name"),
        ("local:a.sock", "absolute path"),
    ],
)
def test_what_names_no_site_is_an_error_that_says_why_and_how_to_write_it(text, reason):
    with pytest.raises(SiteAddressError) as excinfo:
        parse_site(text)
    assert reason in str(excinfo.value)
    assert repr(text) in str(excinfo.value)
    assert "mesh@10.8.0.4" in str(excinfo.value)
    assert isinstance(excinfo.value, ValueError)
    assert isinstance(excinfo.value, MeshError)


@pytest.mark.parametrize(
    "error",
    [
        SiteAddressError("mesh@", "the host is missing"),
        SiteUnreachableError("mesh@a", "no_route", "no route"),
        SiteRefusedError("mesh@a", "quota", "too many workers"),
    ],
)
def test_errors_of_a_site_survive_pickling_with_their_facts(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert error.site in str(error)
    assert error.message in str(error)


# What OpenSSH 9.2 and 9.9 wrote; addresses changed.
@pytest.mark.parametrize(
    ("stderr", "cause", "cure"),
    [
        ("ssh: Could not resolve hostname nowhere: Name or service not known", "no_route", "spelling"),
        ("ssh: connect to host 10.8.0.4 port 22: Connection refused", "no_route", "check the port"),
        ("ssh: connect to host 10.8.0.4 port 22: No route to host", "no_route", "VPN"),
        ("ssh: connect to host 10.8.0.4 port 22: Connection timed out", "no_route", "VPN"),
        ("Connection timed out during banner exchange", "no_route", "sshd"),
        (
            "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nHost key verification failed.",
            "changed_host_key",
            "ssh-keygen -R",
        ),
        ("No ED25519 host key is known for x.\nHost key verification failed.", "unknown_host_key", "accept it"),
        ("mesh@10.8.0.4: Permission denied (publickey).", "refused_key", "ssh-add -l"),
        ("/h/.ssh/config: terminating, 1 bad configuration options", "other", "your own configuration"),
        ("something new", "other", "something new"),
        ("", "other", "it said nothing"),
    ],
)
def test_the_cause_is_read_from_what_openssh_wrote(stderr, cause, cure):
    found, sentence = cause_of_ssh(stderr)
    assert found == cause
    assert cure in sentence


def test_the_command_is_predictable_whatever_the_users_configuration_says():
    command = ssh_command(parse_site("mesh@10.8.0.4:2222"), ssh=("ssh", "-F", "file"), options=["-N"])
    assert command[:3] == ["ssh", "-F", "file"]
    for option in ("BatchMode=yes", "ControlMaster=no", "ControlPath=none", "ForwardAgent=no"):
        assert option in command
    assert command[-7:] == ["-N", "-l", "mesh", "-p", "2222", "--", "10.8.0.4"]


def test_a_site_of_this_host_needs_no_ssh():
    with pytest.raises(ValueError, match="needs no ssh"):
        ssh_command(parse_site("local"))
