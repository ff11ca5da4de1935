"""The daemon against its own OpenAPI document: schemathesis makes requests that fit it, and requests that do not."""

import pytest
from hypothesis import HealthCheck, given, settings
from sitedaemon import SiteDaemon, TcpDoor

from controlplane.openapi import ROUTES, openapi_document

CONFIG = """
[limits]
workers = 0
clusters = 3
"""
EXAMPLES = 15
CASES = [
    (route.operation, mode)
    for route in ROUTES
    for mode in ("fitting", "not fitting")
    if mode == "fitting" or route.body or route.query or "{" in route.path  # nothing else can be wrong
]


@pytest.fixture(scope="module")
def door():
    """A daemon that starts no workers, reachable over TCP because schemathesis knows no unix sockets."""
    daemon = SiteDaemon(CONFIG)
    daemon.config.write_text(daemon.config.read_text().replace('role = "both"', 'role = "site"'))
    daemon.start()
    door = TcpDoor(daemon.socket)
    yield door
    door.close()
    daemon.close()


@pytest.fixture(scope="module")
def operations(need):
    """Operations of the document, by name."""
    try:
        import schemathesis
    except ImportError:
        schemathesis = None
    need("schemathesis", schemathesis, "pip install 'meshcompute[test]'")
    schema = schemathesis.openapi.from_dict(openapi_document("0"))
    found = [result.ok() for result in schema.get_all_operations()]
    return {operation.definition.raw["operationId"]: operation for operation in found}


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_every_answer_is_one_that_the_document_describes(door, operations, name, mode):
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    operation = operations[name]
    wanted = GenerationMode.POSITIVE if mode == "fitting" else GenerationMode.NEGATIVE
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=wanted))
    def run(case):
        response = case.call(base_url=door.url, timeout=20)
        case.validate_response(response, checks=checks)

    run()
