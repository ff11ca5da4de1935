"""``site.toml``: what is right gives records, what is wrong names its key."""

import re
from pathlib import Path

import pytest

import controlplane.config
from controlplane.config import DEFAULT_SOCKET, Service, SiteConfig, parse_config, read_config
from controlplane.errors import ConfigError

WRONG = [
    ({}, "pool", "is missing"),
    ({"pool": "ECMWF"}, "pool", "lower-case"),
    ({"pool": 7}, "pool", "7 is not"),
    ({"role": "boss"}, "role", "'site', 'scheduler', 'both'"),
    ({"role": ["site"]}, "role", "is not one of"),
    ({"runtime": "podman"}, "runtime", "'docker', 'process'"),
    ({"network": "loopback"}, "network", "containers have a network"),
    ({"runtime": "process"}, "network", "processes have no network"),
    ({"socket": "site.sock"}, "socket", "absolute"),
    ({"socket": "/" + "x" * 120}, "socket", "longer than 100"),
    ({"state_folder": "/var/../etc"}, "state_folder", "without . and .."),
    ({"poool": "a"}, "poool", "nobody knows this key"),
    ({"access": ["root"]}, "access", "must be a table"),
    ({"access": {"users": "me"}}, "access.users", "is not a list"),
    ({"access": {"users": ["a b"]}}, "access.users", "'a b' is not"),
    ({"access": {"users": ["a", "a"]}}, "access.users", "twice"),
    ({"access": {"groups": ["*"]}}, "access.groups", "'*' is not"),
    ({"access": {"operators_group": 3}}, "access.operators_group", "3 is not"),
    ({"access": {"operator": "x"}}, "access.operator", "known here: groups, operators_group, users"),
    ({"limits": {"workers": -1}}, "limits.workers", "-1 is not a whole number"),
    ({"limits": {"workers": 2.5}}, "limits.workers", "2.5"),
    ({"limits": {"workers": True}}, "limits.workers", "True"),
    ({"limits": {"clusters": "many"}}, "limits.clusters", "'many'"),
    ({"limits": {"memory_per_worker": "4 Gb"}}, "limits.memory_per_worker", "4 GiB"),
    ({"limits": {"memory_per_worker": 1}}, "limits.memory_per_worker", "16 MiB"),
    ({"limits": {"lease_seconds": 0}}, "limits.lease_seconds", "from 1 to 3600"),
    (
        {"limits": {"threads_per_worker": 1}, "workers": {"threads_per_process": 2}},
        "workers.threads_per_process",
        "more",
    ),
    ({"workers": {"memory_per_process": "8 GiB"}}, "workers.memory_per_process", "more than"),
    ({"workers": {"image": "-v"}}, "workers.image", "'-v'"),
    ({"workers": {"images": ["a b"]}}, "workers.images", "'a b'"),
    ({"workers": {"data_folders": ["/data/"]}}, "workers.data_folders", "'/data/'"),
    ({"workers": {"data_folders": ["/"]}}, "workers.data_folders", "'/'"),
    ({"workers": {"data_folders": ["/a:rw"]}}, "workers.data_folders", "'/a:rw'"),
    ({"workers": {"data_folders": "/data"}}, "workers.data_folders", "list of folders"),
    ({"workers": {"user": "a/b"}}, "workers.user", "'a/b'"),
    ({"network_options": {"endpoints": ["gw:51820"]}}, "network_options.endpoints", "without a port"),
    ({"network_options": {"udp_ports": [51820]}}, "network_options.udp_ports", "range"),
    ({"network_options": {"udp_ports": [80, 90]}}, "network_options.udp_ports", "1024"),
    ({"network_options": {"udp_ports": [6000, 5000]}}, "network_options.udp_ports", "range"),
    ({"network_options": {"udp_ports": [6000, True]}}, "network_options.udp_ports", "range"),
    ({"network_options": {"wireguard": "go"}}, "network_options.wireguard", "'auto'"),
    ({"network_options": {"services": ["a:1"]}}, "network_options.services", "table"),
    ({"network_options": {"services": {"a": "10.1.0.5"}}}, "network_options.services", "its port"),
    ({"network_options": {"services": {"a": "10.1.0.5:0"}}}, "network_options.services", "its port"),
    ({"network_options": {"services": {"a": "-v:1"}}}, "network_options.services", "'-v:1'"),
    ({"network_options": {"services": {"a b": "10.1.0.5:1"}}}, "network_options.services", "'a b'"),
    ({"network_options": {"services": {"10.1.0.5": "10.1.0.5:1"}}}, "network_options.services", "the name of a host"),
    ({"network_options": {"services": {"localhost": "10.1.0.5:1"}}}, "network_options.services", "'localhost'"),
    (
        {"runtime": "process", "network": "loopback", "network_options": {"services": {"a": "10.1.0.5:1"}}},
        "network_options.services",
        "plain processes",
    ),
    ({"docker": {"engine": "tcp://1.2.3.4:2375"}}, "docker.engine", "unix socket"),
    ({"process": {"views": {"/a": "b"}}}, "process.views", "absolute"),
    ({"process": {"environment": {"A": 1}}}, "process.environment", "texts"),
    ({"process": {"python": "python3"}}, "process.python", "absolute"),
]


def test_the_name_of_the_pool_is_all_that_must_be_said():
    found = parse_config({"pool": "ecmwf"})
    assert found == SiteConfig(pool="ecmwf")
    assert found.socket == DEFAULT_SOCKET


@pytest.mark.parametrize(("values", "key", "reason"), WRONG, ids=[f"{key}-{reason}" for _, key, reason in WRONG])
def test_a_wrong_value_is_an_error_with_the_name_of_its_key(values, key, reason):
    given = values if "pool" in values or not values else {"pool": "ecmwf", **values}
    with pytest.raises(ConfigError) as caught:
        parse_config(given, "/etc/site.toml")
    assert caught.value.key == key
    assert str(caught.value).startswith(f"/etc/site.toml: {key}: ")
    assert reason in str(caught.value)


def test_the_documented_file_has_every_key_with_its_default(tmp_path):
    documented = re.search(r"default::\n\n(.*?)\Z", controlplane.config.__doc__, re.DOTALL)
    assert documented
    path = tmp_path / "site.toml"
    path.write_text(re.sub(r"(?m)^    ", "", documented[1]))
    assert read_config(path) == SiteConfig(pool="ecmwf")


def test_services_are_read_with_names_and_addresses_of_both_kinds():
    written = {"objects.example": "10.1.0.5:9000", "b": "store.lan:443", "c": "[fd00::5]:80"}
    services = parse_config({"pool": "a", "network_options": {"services": written}}).network_options.services
    assert services == (
        Service(name="objects.example", host="10.1.0.5", port=9000),
        Service(name="b", host="store.lan", port=443),
        Service(name="c", host="fd00::5", port=80),
    )


def test_sizes_are_read_as_people_write_them():
    def memory(text):
        return parse_config({"pool": "a", "limits": {"memory_per_worker": text}}).limits.memory_bytes_per_worker

    assert memory("8 GiB") == memory("8192MiB") == memory(8 * 2**30) == 8 * 2**30
    assert memory("1.5 GB") == 1_500_000_000 > 2**30


def test_a_file_that_cannot_be_read_or_is_no_toml_says_so(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("pool = ecmwf")
    with pytest.raises(ConfigError, match="is no TOML"):
        read_config(tmp_path / "a.toml")
    Path(tmp_path / "b.toml").write_bytes(b"pool = '\xff'")
    with pytest.raises(ConfigError, match="is no TOML"):
        read_config(tmp_path / "b.toml")


def test_the_default_image_is_always_allowed_and_comes_first():
    workers = parse_config({"pool": "a", "workers": {"image": "x:1", "images": ["y:1", "x:1"]}}).workers
    assert workers.allowed_images == ("x:1", "y:1")
