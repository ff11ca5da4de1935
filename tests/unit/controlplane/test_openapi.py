"""The published document says what there is."""

import json

import pytest

from controlplane.api import Api
from controlplane.metrics import render_metrics
from controlplane.openapi import ROUTES, EpochQuery, LogsQuery, openapi_document
from meshcompute import protocol

DOCUMENT = openapi_document("1.2.3")


def references(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_route_is_in_it_and_has_a_handler():
    found = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert found == {(route.method, route.path) for route in ROUTES}
    assert all(callable(getattr(Api, route.operation)) for route in ROUTES)


def test_every_route_of_the_protocols_table_is_there():
    for line in protocol.__doc__.splitlines():
        words = line.split()
        if words and words[0] in {"GET", "PUT", "POST", "DELETE"}:
            path = words[1].partition("?")[0].replace("{id}", "{cluster_id}")
            assert (words[0], path) in {(route.method, route.path) for route in ROUTES}


def test_every_reference_leads_somewhere():
    schemas = DOCUMENT["components"]["schemas"]
    for reference in references(DOCUMENT):
        assert reference.removeprefix("#/components/schemas/") in schemas


def test_every_answer_that_is_an_error_is_described_with_its_body():
    for methods in DOCUMENT["paths"].values():
        for operation in methods.values():
            assert {"200", "500"} <= set(operation["responses"])
            for status, response in operation["responses"].items():
                if status != "200":
                    assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")


def test_it_is_json_and_says_that_unknown_fields_are_refused():
    schemas = json.loads(json.dumps(DOCUMENT))["components"]["schemas"]
    assert schemas["ClusterSpec"]["additionalProperties"] is False


@pytest.mark.parametrize("text", ["-1", "0", "1.0", " 1", "1_0", "x", "", "9" * 17])
def test_an_epoch_in_a_query_is_digits_and_nothing_else(text):
    with pytest.raises(ValueError, match="epoch"):
        EpochQuery.model_validate({"epoch": text})


def test_a_query_of_logs_has_defaults():
    assert LogsQuery.model_validate({}) == LogsQuery(worker=None, lines=200)


def test_metrics_have_types_and_no_names_of_people():
    text = render_metrics(
        [], version="1", pool="p", is_engine_known=False, n_failures=2, requests={("GET", "/x", 200): 3}
    )
    assert "meshcompute_site_engine_up 0\n" in text
    assert 'meshcompute_site_requests_total{method="GET",route="/x",status="200"} 3\n' in text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    assert text.endswith("\n")
