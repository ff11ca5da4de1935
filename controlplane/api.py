"""HTTP/JSON on a unix socket: decode, call, encode.

Covers requests, answers and the mapping of errors. Does not cover what is done (:mod:`controlplane.site`) nor the
table of routes (:mod:`controlplane.openapi`). The caller is who the kernel says is at the other end of the socket.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, TypeAdapter, ValidationError

from controlplane.admission import check_caller
from controlplane.errors import BadRequestError, InvalidSpecError, SiteError
from controlplane.identity import Caller, caller_of, read_credentials
from controlplane.metrics import render_metrics
from controlplane.openapi import CLUSTER_ID_PATTERN, ROUTES, EpochQuery, LogsQuery, openapi_document
from controlplane.site import Site
from meshcompute.protocol import (
    STATUS_BY_ERROR_KIND,
    ClusterSpec,
    ClusterStatus,
    Condition,
    ErrorInfo,
    ErrorResponse,
    Health,
    LeaseRequest,
    SiteInfo,
)

__all__ = ["Api"]

logger = logging.getLogger(__name__)

MAX_BODY_NBYTES = 256 * 1024  # 255 peers take a tenth of it
MAX_MESSAGE_CHARACTERS = 1000
MAX_ERRORS_SHOWN = 3
_KIND_BY_STATUS = {status: kind for kind, status in STATUS_BY_ERROR_KIND.items()}
_CLUSTERS = TypeAdapter(list[ClusterStatus])
Model = TypeVar("Model", bound=BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The routes of a site.

    Parameters
    ----------
    site
        What does the work.
    own_uid
        The account of this process.
    site_info
        What the site is and offers.
    health
        Whether the daemon can do its work.
    failures
        How many looks ended with a problem.
    """

    def __init__(
        self,
        *,
        site: Site,
        own_uid: int,
        site_info: Callable[[], Awaitable[SiteInfo]],
        health: Callable[[], Sequence[Condition]],
        failures: Callable[[], int],
    ) -> None:
        self._site = site
        self._own_uid = own_uid
        self._site_info = site_info
        self._health = health
        self._failures = failures
        self._requests: Counter[tuple[str, str, int]] = Counter()

    def application(self) -> web.Application:
        """Make the application that a server runs."""
        app = web.Application(middlewares=[self._answer_errors], client_max_size=MAX_BODY_NBYTES)
        for route in ROUTES:
            path = route.path.replace("{cluster_id}", "{cluster_id:[^/]+}")
            app.router.add_route(route.method, path, getattr(self, route.operation))
        return app

    # ----------------------------------------------------------------------------------------------------- the routes

    async def get_site(self, request: web.Request) -> web.Response:
        """Answer what the site is and offers."""
        check_caller(self._caller(request), self._site.config.pool)
        return _json(await self._site_info())

    async def list_clusters(self, request: web.Request) -> web.Response:
        """Answer all clusters of the caller."""
        found = await self._site.list_clusters(self._caller(request))
        return web.Response(body=_CLUSTERS.dump_json(found), content_type="application/json")

    async def put_cluster(self, request: web.Request) -> web.Response:
        """Set what a cluster should be."""
        caller, cluster_id = self._caller(request), _cluster_id(request)
        check_caller(caller, self._site.config.pool)
        spec = await _body(request, ClusterSpec)
        return _json(await self._site.put(cluster_id, spec, caller))

    async def get_cluster(self, request: web.Request) -> web.Response:
        """Answer what is true of a cluster."""
        return _json(await self._site.get(_cluster_id(request), self._caller(request)))

    async def delete_cluster(self, request: web.Request) -> web.Response:
        """End a cluster."""
        query = _query(request, EpochQuery)
        return _json(await self._site.delete(_cluster_id(request), query.epoch, self._caller(request)))

    async def renew_lease(self, request: web.Request) -> web.Response:
        """Renew a cluster's lease."""
        caller, cluster_id = self._caller(request), _cluster_id(request)
        check_caller(caller, self._site.config.pool)
        renewal = await _body(request, LeaseRequest)
        return _json(await self._site.renew(cluster_id, renewal.epoch, caller))

    async def get_logs(self, request: web.Request) -> web.Response:
        """Answer the last lines of a cluster's logs."""
        query = _query(request, LogsQuery)
        caller, cluster_id = self._caller(request), _cluster_id(request)
        return web.Response(text=await self._site.logs(cluster_id, query.worker, query.lines, caller))

    async def get_health(self, request: web.Request) -> web.Response:
        """Answer whether the daemon can do its work."""
        conditions = tuple(self._health())
        return _json(Health(is_healthy=all(condition.is_true for condition in conditions), conditions=conditions))

    async def get_metrics(self, request: web.Request) -> web.Response:
        """Answer numbers for monitoring."""
        info = await self._site_info()
        text = render_metrics(
            self._site.all_statuses(),
            version=info.version,
            pool=info.pool,
            is_engine_known=all(condition.is_true for condition in self._health() if condition.kind == "engine"),
            n_failures=self._failures(),
            requests=self._requests,
        )
        return web.Response(text=text)

    async def get_openapi(self, request: web.Request) -> web.Response:
        """Answer the OpenAPI document."""
        info = await self._site_info()
        return web.json_response(openapi_document(info.version))

    # --------------------------------------------------------------------------------------------------------- inside

    def _caller(self, request: web.Request) -> Caller:
        peer = request.transport.get_extra_info("socket") if request.transport is not None else None
        if peer is None:
            raise BadRequestError("The connection was closed before its caller was known. Connect again.")
        return caller_of(read_credentials(peer), self._site.config.access, own_uid=self._own_uid)

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Map every error to a status and a body, in this one place."""
        try:
            response = await handler(request)
        except SiteError as exc:
            response = _error(exc.kind, str(exc))
            if exc.kind == "internal":
                logger.exception("request failed method=%s path=%s", request.method, request.path)
        except web.HTTPException as exc:
            kind = _KIND_BY_STATUS.get(exc.status, "bad_request")
            response = _error(kind, _HTTP_MESSAGES.get(kind, exc.reason).format(request=request))
            if "Allow" in exc.headers:
                response.headers["Allow"] = exc.headers["Allow"]
        except Exception:
            logger.exception("request failed method=%s path=%s", request.method, request.path)
            response = _error("internal", "The daemon failed at this request; its log says where. Please report it.")
        resource = request.match_info.route.resource
        route = re.sub(r":\[\^/\]\+", "", resource.canonical) if resource is not None else "none"
        self._requests[request.method if request.method in _METHODS else "other", route, response.status] += 1
        return response


_METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "HEAD", "PATCH", "OPTIONS"})
_HTTP_MESSAGES: Mapping[str, str] = {
    "not_found": "There is no {request.path}. GET /v1/openapi.json tells what there is.",
    "method_not_allowed": "{request.path} does not take {request.method}. GET /v1/openapi.json tells what it takes.",
    "too_large": f"The body has more than {MAX_BODY_NBYTES} bytes, which no cluster needs. Send fewer peers.",
}


def _json(model: BaseModel) -> web.Response:
    return web.Response(body=model.model_dump_json().encode(), content_type="application/json")


def _error(kind: str, message: str) -> web.Response:
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    body = ErrorResponse(error=ErrorInfo(kind=kind, message=message))
    text = json.dumps(body.model_dump())  # in ASCII: a message may quote what no encoding can carry
    return web.Response(text=text, status=STATUS_BY_ERROR_KIND[kind], content_type="application/json")


def _cluster_id(request: web.Request) -> str:
    cluster_id = request.match_info["cluster_id"]
    if not re.fullmatch(CLUSTER_ID_PATTERN.strip("^$"), cluster_id):
        raise InvalidSpecError(
            f"{cluster_id[:80]!r} is no id of a cluster: that is 32 hexadecimal digits (uuid4().hex)."
        )
    return cluster_id


def _query(request: web.Request, model: type[Model]) -> Model:
    values: dict[str, Any] = {}
    for key, value in request.query.items():
        if key in values:
            raise BadRequestError(f"The query names {key[:80]!r} twice. Name it once.")
        values[key] = value
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        raise BadRequestError(f"The query of {request.method} {request.path} is wrong: {_what_is_wrong(exc)}") from exc


async def _body(request: web.Request, model: type[Model]) -> Model:
    content = await request.read()
    try:
        return model.model_validate_json(content)
    except ValidationError as exc:
        if exc.errors(include_url=False)[0]["type"] == "json_invalid":
            raise BadRequestError(f"The body is no JSON: {exc.errors(include_url=False)[0]['msg']}.") from exc
        raise InvalidSpecError(f"The body is no {model.__name__}: {_what_is_wrong(exc)}") from exc


def _what_is_wrong(exc: ValidationError) -> str:
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        f"{'.'.join(str(part)[:40] for part in error['loc']) or 'all of it'}: "
        f"{error['msg'].removeprefix('Value error, ')}"
        for error in errors[:MAX_ERRORS_SHOWN]
    ]
    more = f"; and {len(errors) - MAX_ERRORS_SHOWN} more" if len(errors) > MAX_ERRORS_SHOWN else ""
    return "; ".join(shown) + more + "."
