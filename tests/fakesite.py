"""A site's daemon that only remembers: the protocol on a unix socket, with nothing behind it.

Covers what the client side must cope with: every answer of the protocol, and a daemon that is slow, old, or breaks
connections. Does not run workers.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from meshcompute.protocol import (
    API_VERSION,
    STATUS_BY_ERROR_KIND,
    ClusterSpec,
    ClusterStatus,
    Condition,
    ErrorInfo,
    ErrorResponse,
    Health,
    LeaseRequest,
    Limits,
    PeerStatus,
    SiteInfo,
)

KEY = "A" * 42 + "A="  # base64 of 32 zero bytes


class FakeSite:
    """One site; change its attributes to make it misbehave."""

    def __init__(self, pool: str = "ecmwf", *, endpoints: tuple[str, ...] = ("192.0.2.1",)) -> None:
        self.pool = pool
        self.endpoints = endpoints
        self.api_version = API_VERSION
        self.specs: dict[str, ClusterSpec] = {}
        self.history: list[ClusterSpec] = []
        self.deleted: dict[str, int] = {}
        self.renewals = 0
        self.break_next = 0  # so many connections are closed without an answer
        self.refuse: ErrorInfo | None = None

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._misbehave])
        app.add_routes(
            [
                web.get("/v1/health", self._health),
                web.get("/v1/site", self._site),
                web.get("/v1/clusters", self._clusters),
                web.put("/v1/clusters/{id}", self._put),
                web.get("/v1/clusters/{id}", self._status),
                web.delete("/v1/clusters/{id}", self._delete),
                web.post("/v1/clusters/{id}/lease", self._renew),
                web.get("/v1/clusters/{id}/logs", self._logs),
            ]
        )
        return app

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.break_next > 0 and request.path != "/v1/health":
            self.break_next -= 1
            assert request.transport is not None
            request.transport.abort()
        if self.refuse is not None and request.path != "/v1/health":
            return _error(self.refuse.kind, self.refuse.message)
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        return _answer(Health(is_healthy=True, conditions=()))

    async def _site(self, request: web.Request) -> web.Response:
        info = SiteInfo(
            pool=self.pool,
            version="0.1.0",
            api_version=API_VERSION,
            role="both",
            limits=Limits(workers=8, threads_per_worker=4, memory_bytes_per_worker=1 << 30, clusters=2),
            data_folders=(f"/data/{self.pool}",),
            images=("meshcompute-worker",),
            wireguard_backend="userspace",
            runtime="process",
            network="loopback",
            packages={"dask": "2026.8.0"},
            endpoints=self.endpoints,
        )
        return web.json_response({**info.model_dump(mode="json"), "api_version": self.api_version})

    async def _clusters(self, request: web.Request) -> web.Response:
        return web.json_response([self._status_of(key).model_dump(mode="json") for key in self.specs])

    async def _put(self, request: web.Request) -> web.Response:
        key = request.match_info["id"]
        spec = ClusterSpec.model_validate_json(await request.read())
        if spec.epoch <= self.deleted.get(key, 0):
            return _error("conflict", f"cluster {key} was deleted at epoch {self.deleted[key]}; take another id")
        self.specs[key] = spec
        self.history.append(spec)
        return _answer(self._status_of(key))

    async def _status(self, request: web.Request) -> web.Response:
        key = request.match_info["id"]
        if key not in self.specs:
            return _error("not_found", f"there is no cluster {key} here; list your clusters")
        return _answer(self._status_of(key))

    async def _delete(self, request: web.Request) -> web.Response:
        key = request.match_info["id"]
        if key not in self.specs:
            return _error("not_found", f"there is no cluster {key} here; list your clusters")
        self.deleted[key] = int(request.query["epoch"])
        status = self._status_of(key).model_copy(update={"phase": "gone"})
        del self.specs[key]
        return _answer(status)

    async def _renew(self, request: web.Request) -> web.Response:
        key = request.match_info["id"]
        LeaseRequest.model_validate_json(await request.read())
        if key not in self.specs:
            return _error("not_found", f"there is no cluster {key} here; list your clusters")
        self.renewals += 1
        return _answer(self._status_of(key))

    async def _logs(self, request: web.Request) -> web.Response:
        return web.Response(text=f"{request.query['lines']} lines of {request.query['worker']}\n")

    def _status_of(self, key: str) -> ClusterStatus:
        spec = self.specs[key]
        return ClusterStatus(
            cluster_id=key,
            name=spec.name,
            owner="tester",
            epoch=spec.epoch,
            phase="ready",
            lease_remaining_seconds=spec.lease_seconds,
            public_key=KEY,
            endpoint_port=51820 + spec.site,
            address=None,
            peers=tuple(
                PeerStatus(site=peer.site, latest_handshake_age_seconds=1.0, received_nbytes=0, sent_nbytes=0)
                for peer in spec.peers
            ),
            workers=(),
            scheduler=None,
            conditions=(Condition(kind="gateway", is_true=True, reason="Configured", message="It is configured."),),
        )


class RunningSite:
    """A FakeSite behind a socket, in a thread of its own, for the length of a with block."""

    def __init__(self, site: FakeSite, path: Path) -> None:
        self.site = site
        self.path = path
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner = web.AppRunner(site.application(), shutdown_timeout=0.1)

    async def _start(self) -> None:
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()
        self.path.chmod(0o666)

    def __enter__(self) -> FakeSite:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self.site

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self.path.unlink(missing_ok=True)


def _answer(model: Any) -> web.Response:
    return web.Response(text=model.model_dump_json(), content_type="application/json")


def _error(kind: str, message: str) -> web.Response:
    body = ErrorResponse(error=ErrorInfo(kind=kind, message=message))
    return web.Response(text=body.model_dump_json(), status=STATUS_BY_ERROR_KIND[kind], content_type="application/json")
