"""The server against its own OpenAPI document: whatever is sent, nothing fails and every answer is as declared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving import Served, served

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
ROUTES = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/stats"),
)
BOUND = settings(
    max_examples=60, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), deadline=None
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("Paris.<eos>", max_body_bytes=100_000) as running:
        yield running
        running.until_empty()


@pytest.fixture(scope="module")
def document(server: Served) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json")


def test_the_document_has_every_route(document: schemathesis.BaseSchema) -> None:
    operations = [found.ok() for found in document.get_all_operations()]
    assert sorted((o.method.upper(), o.path) for o in operations) == sorted(ROUTES)
    responses = document.raw_schema["paths"]["/v1/completions"]["post"]["responses"]
    assert set(responses) == {"200", "4XX", "5XX"}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_server_keeps_to_its_document(
    document: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        return  # there is nothing to send wrongly

    @given(operation.as_strategy(generation_mode=mode))
    @BOUND
    def asked(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "scripted"  # else nearly everything ends at the first check
        response = case.call(timeout=100)
        case.validate_response(response, checks=list(CHECKS))

    asked()
