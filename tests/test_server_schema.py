"""The server against its own OpenAPI document: whatever is sent, nothing fails and every answer is as declared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving import Served, served

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
BOUND = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("Paris.<eos>", max_body_bytes=100_000) as running:
        yield running
        running.until_empty()


@pytest.fixture
def document(server: Served) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@BOUND
def test_the_server_keeps_to_its_document(case: schemathesis.Case, server: Served) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "scripted"  # else nearly everything ends at the first check
    response = case.call(timeout=60)
    case.validate_response(response, checks=list(CHECKS))
