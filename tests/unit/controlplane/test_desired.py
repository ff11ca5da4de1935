"""What a site should run for a cluster: names, addresses, shares."""

from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network

from controlbench import KEYS, config, mesh_config, record, scheduler_spec, spec

from controlplane.desired import desired_cluster, fingerprint_of, scheduler_addresses
from controlplane.network.topology import service_address_of
from controlplane.state import Owner
from meshcompute.protocol import Peer, SchedulerRequest, WorkerRequest


def test_processes_are_counted_across_the_containers_of_a_site():
    desired = desired_cluster(record(), mesh_config(), 1000.0)
    assert [unit.name for unit in desired.units] == ["mc-01234567-ecmwf-1-u0", "mc-01234567-ecmwf-1-u1"]
    assert [unit.process_names for unit in desired.units] == [("ecmwf-1-0", "ecmwf-1-1"), ("ecmwf-1-2", "ecmwf-1-3")]


def test_addresses_are_those_of_the_reference():
    desired = desired_cluster(record(), mesh_config(), 1000.0)
    assert [unit.address for unit in desired.units] == [
        IPv6Address("fda5:c0ff:eeee:1::11"),
        IPv6Address("fda5:c0ff:eeee:1::12"),
    ]
    assert desired.gateway.address == IPv6Address("fda5:c0ff:eeee:1::1")
    assert {unit.scheduler_address for unit in desired.units} == {"tcp://[fda5:c0ff:eeee::1]:8786"}


def test_the_scheduler_has_node_one_and_its_gateway_steps_aside():
    wanted = record(wanted=scheduler_spec(scheduler=SchedulerRequest(client_port=9999, dashboard_port=None)))
    desired = desired_cluster(wanted, mesh_config(), 1000.0)
    [unit] = desired.units
    assert (unit.role, unit.address, unit.client_port) == ("scheduler", IPv6Address("fda5:c0ff:eeee::1"), 9999)
    assert unit.data_folders == ()
    assert desired.gateway.address == IPv6Address("fda5:c0ff:eeee::2")
    assert scheduler_addresses(wanted, mesh_config()) == (
        "tcp://[fda5:c0ff:eeee::1]:8786",
        "tcp://127.0.0.1:9999",
        None,
    )


def test_on_the_loopback_network_nothing_waits_for_an_address():
    desired = desired_cluster(record(), config(), 1000.0)
    assert {unit.address for unit in desired.units} == {None}
    assert {unit.scheduler_address for unit in desired.units} == {"tcp://127.0.0.1:8786"}
    address, client, dashboard = scheduler_addresses(record(wanted=scheduler_spec()), config())
    assert (address, client, dashboard) == (
        "tcp://127.0.0.1:8786",
        "tcp://127.0.0.1:8786",
        "http://127.0.0.1:8787/status",
    )


def test_what_is_not_asked_for_is_as_the_operator_says():
    site = mesh_config(workers={"processes_per_container": 3, "threads_per_process": 2, "data_folders": ["/data/x"]})
    [unit] = desired_cluster(record(wanted=spec(workers=WorkerRequest())), site, 1000.0).units
    assert len(unit.process_names) == 3
    assert (unit.threads_per_process, unit.data_folders, unit.image) == (2, ("/data/x",), "meshcompute-worker:latest")


def test_workers_run_as_the_account_that_the_record_says():
    account = Owner(uid=5, gid=6, user="mesh", groups=(6, 7))
    [unit, _] = desired_cluster(replace(record(uid=1000), run_as=account), mesh_config(), 1000.0).units
    assert (unit.uid, unit.gid, unit.groups, unit.owner) == (5, 6, (6, 7), "user1000")


def test_the_side_that_calls_knows_where_and_a_peer_without_a_key_waits():
    peers = (
        Peer(site=0, name="client", public_key=KEYS[0], endpoint="192.0.2.1:51820", initiates=True),
        Peer(site=2, name="eumetsat", public_key=KEYS[1], endpoint="192.0.2.2:51820", initiates=False),
        Peer(site=3, name="metoffice"),
    )
    found = desired_cluster(record(wanted=spec(peers=peers)), mesh_config(), 1000.0).gateway.peers
    assert [(peer.site, peer.endpoint, peer.keepalive_seconds) for peer in found] == [
        (0, "192.0.2.1:51820", 25),
        (2, None, None),
    ]


def test_a_relayed_site_is_behind_its_relay():
    peers = (
        Peer(site=0, name="client", public_key=KEYS[0]),
        Peer(site=2, name="eumetsat", public_key=KEYS[1], via=0),
    )
    [peer] = desired_cluster(record(wanted=spec(peers=peers)), mesh_config(), 1000.0).gateway.peers
    assert peer.allowed == (IPv6Network("fda5:c0ff:eeee::/64"), IPv6Network("fda5:c0ff:eeee:2::/64"))


def test_workers_know_the_services_that_their_gateway_has_and_a_scheduler_none():
    site = mesh_config(network_options={"services": {"objects.example": "10.1.0.5:9000", "b": "c:1"}})
    desired = desired_cluster(record(), site, 1000.0)
    assert desired.gateway.services == site.network_options.services
    address = service_address_of(desired.gateway.prefix, 1, "objects.example")
    assert address in IPv6Network("fda5:c0ff:eeee:1:0:1::/96")
    assert {dict(unit.hosts)["objects.example"] for unit in desired.units} == {address}
    other = mesh_config(network_options={"services": {"a": "c:1", "objects.example": "10.1.0.6:1"}})
    again = desired_cluster(record(), other, 1000.0)
    assert dict(again.units[0].hosts)["objects.example"] == address, "it stays, whatever else there is"
    assert fingerprint_of(again.units[0]) == fingerprint_of(desired.units[0]), "units that run go on"
    assert desired_cluster(record(wanted=scheduler_spec()), site, 1000.0).units[0].hosts == ()


def test_a_fingerprint_changes_with_everything_but_the_deadline():
    unit = desired_cluster(record(), mesh_config(), 1000.0).units[0]
    assert fingerprint_of(replace(unit, deadline_seconds=1.0)) == fingerprint_of(unit)
    assert fingerprint_of(replace(unit, image="other:1")) != fingerprint_of(unit)
