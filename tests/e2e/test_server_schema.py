"""The OpenAPI schema tells the truth: requests made from it, right and wrong ones, get answers of
the kinds it lists, and never a 500."""

from __future__ import annotations

import elastic_cache
import hypothesis
import pytest
import schemathesis
from elastic_cache.server import ServerOptions, create_app
from fake_service import FakeService
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


PATHS = (
    "GET /",
    "GET /health",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/chat/completions",
    "POST /v1/completions",
)


@pytest.fixture(scope="module")
def schema() -> schemathesis.BaseSchema:
    model = elastic_cache.load("tiny").model
    app = create_app(FakeService(model.tokenizer), model, ServerOptions())
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_path_is_in_the_schema(schema: schemathesis.BaseSchema) -> None:
    assert sorted(result.ok().label for result in schema.get_all_operations()) == sorted(PATHS)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, schemathesis.GenerationMode.POSITIVE) for path in PATHS),
        *((path, schemathesis.GenerationMode.NEGATIVE) for path in PATHS if "POST" in path),
    ],
    ids=str,
)
def test_the_schema_holds(
    schema: schemathesis.BaseSchema, path: str, mode: schemathesis.GenerationMode
) -> None:
    method, name = path.split()
    operation = schema[name][method]
    statuses: set[int] = set()

    @hypothesis.settings(
        max_examples=60 if method == "POST" else 10,
        derandomize=True,  # the same requests in every run
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        response = case.call_and_validate(checks=CHECKS)
        statuses.add(response.status_code)
        assert mode.is_positive or response.status_code == 400

    check()
    # Nobody guesses the model's name.
    assert mode.is_negative or (404 if "{name}" in path else 200) in statuses
