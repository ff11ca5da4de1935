"""The models of the wire: what they take, and what they refuse."""

import pytest
from pydantic import ValidationError

from meshcompute.protocol import ClusterSpec, ClusterStatus, LeaseRequest, Peer

KEY = "8zS/mY7CL6pJx6iUjZgSB6WlklHQU2TvlLltjvhN1Mc="
SPEC = {"name": "c", "epoch": 1, "role": "site", "prefix": "fda5:c0ff:eeee::/48", "site": 1}
WRONG = [
    ({"epoch": "1"}, "epoch"),
    ({"epoch": 0}, "epoch"),
    ({"epoch": 1.5}, "epoch"),
    ({"epoch": 2**60}, "epoch"),
    ({"name": "-rf"}, "name"),
    ({"name": "a\n"}, "name"),
    ({"role": "both"}, "role"),
    ({"prefix": "fda5:c0ff:eeee::/64"}, "prefix"),
    ({"prefix": "2001:db8::/48"}, "prefix"),
    ({"prefix": "10.0.0.0/8"}, "prefix"),
    ({"site": 65536}, "site"),
    ({"site": True}, "site"),
    ({"mtu": 1279}, "mtu"),
    ({"lease_seconds": 0.5}, "lease_seconds"),
    ({"lease_seconds": float("inf")}, "lease_seconds"),
    ({"surprise": 1}, "surprise"),
    ({"peers": ({"site": 1, "name": "me"},)}, "cannot be its own peer"),
    ({"peers": ({"site": 2, "name": "a"}, {"site": 2, "name": "b"})}, "same site number"),
    ({"peers": ({"site": 2, "name": "a", "public_key": KEY[:-2] + "B="},)}, "public_key"),
    ({"peers": ({"site": 2, "name": "a", "endpoint": "host"},)}, "no port"),
    ({"peers": ({"site": 2, "name": "a", "endpoint": "host:0"},)}, "no port"),
    ({"peers": ({"site": 2, "name": "a", "endpoint": "host:99999"},)}, "no port"),
    ({"peers": ({"site": 2, "name": "a", "endpoint": "fd00::1:51820"},)}, "brackets"),
    ({"peers": ({"site": 2, "name": "a", "endpoint": "[fd00::g]:51820"},)}, "no IPv6 address"),
    ({"peers": ({"site": 2, "name": "a", "endpoint": "a b:51820"},)}, "neither"),
    ({"peers": ({"site": 2, "name": "a", "endpoint": "-o:51820"},)}, "neither"),
    ({"peers": ({"site": 2, "name": "a", "via": 3},)}, "no direct peer"),
    ({"workers": {"containers": 0}}, "containers"),
    ({"workers": {"image": "--privileged"}}, "image"),
    ({"workers": {"scheduler_address": "file:///etc"}}, "scheduler_address"),
    ({"scheduler": {}}, "role is 'scheduler'"),
    ({"role": "scheduler", "scheduler": {"client_port": 0}}, "client_port"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_what_is_wrong_is_refused_with_its_name(change, reason):
    with pytest.raises(ValidationError) as caught:
        ClusterSpec.model_validate({**SPEC, **change})
    assert reason in str(caught.value)


def test_a_spec_survives_the_wire():
    peer = Peer(site=0, name="client", public_key=KEY, endpoint="[2001:db8::1]:51820", initiates=True)
    spec = ClusterSpec(**SPEC, peers=(peer, Peer(site=2, name="b", via=0)))
    assert ClusterSpec.model_validate_json(spec.model_dump_json()) == spec


def test_one_prefix_has_one_form():
    spec = ClusterSpec(**{**SPEC, "prefix": "fda5:0:1::/48"})
    assert spec.prefix == ClusterSpec(**{**SPEC, "prefix": "fda5:0000:0001::/48"}).prefix


@pytest.mark.parametrize("endpoint", ["192.0.2.7:1", "gw.ecmwf.int:65535", "[fd00::1]:51820", "localhost:51820"])
def test_endpoints_are_hosts_with_ports(endpoint):
    assert Peer(site=1, name="a", endpoint=endpoint).endpoint == endpoint


def test_models_cannot_be_changed():
    renewal = LeaseRequest(epoch=1)
    with pytest.raises(ValidationError):
        renewal.epoch = 2


def test_no_model_has_a_place_for_a_private_key():
    for model in (ClusterSpec, ClusterStatus, Peer):
        assert not [name for name in str(model.model_json_schema()).lower().split("'") if "private" in name]
