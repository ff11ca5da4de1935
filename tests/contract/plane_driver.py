"""A daemon with nothing but a data plane, driven by JSON lines: one for each host of test_data_plane.py.

A process of its own, as in reality, so that it can be killed and started again, and lives in its host's namespaces.
"""

import asyncio
import dataclasses
import json
import logging
import sys
from ipaddress import IPv6Address, IPv6Network

from controlplane.config import Service
from controlplane.errors import SiteError
from controlplane.network.gateway import NamespacePlane
from controlplane.network.loopback import LoopbackPlane
from controlplane.network.topology import GatewayConfig, PeerConfig


def config_of(data):
    peers = tuple(
        PeerConfig(**{**peer, "allowed": tuple(IPv6Network(network) for network in peer["allowed"])})
        for peer in data["peers"]
    )
    services = tuple(Service(**service) for service in data["services"])
    return GatewayConfig(**{**data, "prefix": IPv6Network(data["prefix"]), "peers": peers, "services": services})


async def call(plane, request):
    name, arguments = request["call"], request["arguments"]
    if "config" in arguments:
        arguments["config"] = config_of(arguments["config"])
    if "address" in arguments:
        arguments["address"] = IPv6Address(arguments["address"])
    if "keep" in arguments:
        arguments["keep"] = set(arguments["keep"])
    answer = await getattr(plane, name)(**arguments)
    if isinstance(answer, dict):
        return {key: dataclasses.asdict(value) for key, value in answer.items()}
    return answer if answer is None else dataclasses.asdict(answer)


async def main(kind, instance):
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    plane = LoopbackPlane() if kind == "loopback" else NamespacePlane(kind, instance=instance)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        try:
            answer = {"answer": await call(plane, json.loads(line))}
        except SiteError as exc:
            answer = {"error": type(exc).__name__, "message": str(exc)}
        print(json.dumps(answer), flush=True)
    await plane.close()


asyncio.run(main(*sys.argv[1:]))
