"""The table of routes, and the OpenAPI document made from it and from the models; pure.

Covers what there is to call. Does not cover answering (:mod:`controlplane.api`, which serves exactly this table).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from meshcompute.protocol import (
    API_VERSION,
    STATUS_BY_ERROR_KIND,
    ClusterSpec,
    ClusterStatus,
    ErrorResponse,
    Health,
    LeaseRequest,
    SiteInfo,
)

__all__ = ["CLUSTER_ID_PATTERN", "ROUTES", "EpochQuery", "LogsQuery", "Route", "openapi_document"]

CLUSTER_ID_PATTERN = r"^[0-9a-f]{32}$"
MAX_LOG_LINES = 10_000


def _plain_number(value: object) -> object:
    """Digits only: no signs, spaces or underscores, which int() would take."""
    if isinstance(value, str) and not (value.isascii() and value.isdecimal() and len(value) <= 16):
        raise ValueError(f"{value[:40]!r} is not a whole number")
    return value


class EpochQuery(BaseModel):
    """Query of a DELETE."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    epoch: Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=2**53 - 1)]


class LogsQuery(BaseModel):
    """Query of logs: all workers unless one is named."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    worker: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    lines: Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=MAX_LOG_LINES)] = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One call. ``answer`` is a model, ``[model]`` for a list of it, or a media type for text."""

    method: str
    path: str
    operation: str
    summary: str
    answer: Any
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    errors: tuple[str, ...] = ()


_CLUSTER = f"/v{API_VERSION}/clusters/{{cluster_id}}"
_NO_BODY = ("bad_request", "forbidden", "not_found", "invalid")
ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path=f"/v{API_VERSION}/site",
        operation="get_site",
        summary="What the site is and offers",
        answer=SiteInfo,
        errors=("forbidden",),
    ),
    Route(
        method="GET",
        path=f"/v{API_VERSION}/clusters",
        operation="list_clusters",
        summary="The caller's clusters; an operator's list has everybody's",
        answer=[ClusterStatus],
        errors=("forbidden",),
    ),
    Route(
        method="PUT",
        path=_CLUSTER,
        operation="put_cluster",
        summary="Set what a cluster should be, and renew its lease",
        answer=ClusterStatus,
        body=ClusterSpec,
        errors=("bad_request", "forbidden", "conflict", "too_large", "invalid", "quota"),
    ),
    Route(
        method="GET",
        path=_CLUSTER,
        operation="get_cluster",
        summary="What is true of a cluster now",
        answer=ClusterStatus,
        errors=_NO_BODY,
    ),
    Route(
        method="DELETE",
        path=_CLUSTER,
        operation="delete_cluster",
        summary="End a cluster",
        answer=ClusterStatus,
        query=EpochQuery,
        errors=(*_NO_BODY, "conflict"),
    ),
    Route(
        method="POST",
        path=f"{_CLUSTER}/lease",
        operation="renew_lease",
        summary="Renew a cluster's lease",
        answer=ClusterStatus,
        body=LeaseRequest,
        errors=(*_NO_BODY, "conflict", "too_large"),
    ),
    Route(
        method="GET",
        path=f"{_CLUSTER}/logs",
        operation="get_logs",
        summary="The last lines that a cluster's workers have written",
        answer="text/plain",
        query=LogsQuery,
        errors=(*_NO_BODY, "engine_unknown"),
    ),
    Route(
        method="GET",
        path=f"/v{API_VERSION}/health",
        operation="get_health",
        summary="Whether the daemon can do its work",
        answer=Health,
    ),
    Route(
        method="GET",
        path=f"/v{API_VERSION}/metrics",
        operation="get_metrics",
        summary="Numbers in Prometheus' exposition format",
        answer="text/plain",
    ),
    Route(
        method="GET",
        path=f"/v{API_VERSION}/openapi.json",
        operation="get_openapi",
        summary="This document",
        answer="application/json",
    ),
)


def _content(answer: Any) -> dict[str, Any]:
    if isinstance(answer, str):
        return {answer: {"schema": {"type": "object" if answer == "application/json" else "string"}}}
    if isinstance(answer, list):
        return {"application/json": {"schema": {"type": "array", "items": _reference(answer[0])}}}
    return {"application/json": {"schema": _reference(answer)}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _query_parameters(query: type[BaseModel] | None) -> list[dict[str, Any]]:
    if query is None:
        return []
    schema = query.model_json_schema()
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "schema": next((part for part in field.get("anyOf", ()) if part.get("type") != "null"), field),
        }
        for name, field in schema["properties"].items()
    ]


def _operation(route: Route) -> dict[str, Any]:
    parameters = _query_parameters(route.query)
    if "{cluster_id}" in route.path:
        schema = {"type": "string", "pattern": CLUSTER_ID_PATTERN}
        parameters.insert(0, {"name": "cluster_id", "in": "path", "required": True, "schema": schema})
    error = {"application/json": {"schema": _reference(ErrorResponse)}}
    kinds_by_status: dict[int, list[str]] = {}
    for kind in (*route.errors, "internal"):
        kinds_by_status.setdefault(STATUS_BY_ERROR_KIND[kind], []).append(kind)
    responses: dict[str, Any] = {"200": {"description": route.summary, "content": _content(route.answer)}}
    for status, kinds in sorted(kinds_by_status.items()):
        responses[str(status)] = {"description": ", ".join(kinds), "content": error}
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "parameters": parameters,
        "responses": responses,
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(route.body)}
    return operation


def openapi_document(version: str) -> Mapping[str, Any]:
    """Make the OpenAPI document.

    Parameters
    ----------
    version
        Version of the software that answers.

    Returns
    -------
    Mapping
        The document, ready for JSON.

    References
    ----------
    OpenAPI Specification 3.1.0.
    """
    models: list[type[BaseModel]] = [ClusterSpec, LeaseRequest, ClusterStatus, SiteInfo, Health, ErrorResponse]
    _names, definitions = models_json_schema(
        [(model, "validation" if model in {ClusterSpec, LeaseRequest} else "serialization") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "meshcompute site daemon",
            "version": version,
            "description": "HTTP on a unix socket; the caller is the account at the other end of it.",
        },
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }
