"""Requests made from the description itself, with each scope: none breaks the server, none does what it may not."""

from __future__ import annotations

import warnings
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.generation import GenerationMode

from adapterctl.registry.domain.access import Scope

#: Requests of each kind to each route. An admin's reach the code behind the routes, the others' mostly their guard.
EXAMPLES = {Scope.READ: 2, Scope.MERGE: 2, Scope.PROMOTE: 2, Scope.FORCE: 2, Scope.ADMIN: 8}
GENERATE = [hypothesis.Phase.generate]  # what fails is told as it was found


@pytest.fixture(scope="module")
def operations(served: Any) -> list[Any]:
    """The routes as schemathesis reads them from the description; it calls the application in this process."""
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", served.door, headers=served.auth("read"))
    return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.parametrize(
    ("mode", "scope"),
    # requests that are wrong are for the one who gets as far as to be told so
    [*((GenerationMode.POSITIVE, scope) for scope in Scope), (GenerationMode.NEGATIVE, Scope.ADMIN)],
    ids=lambda value: value.value,
)
def test_no_request_breaks_the_server(served: Any, operations: list[Any], mode: GenerationMode, scope: Scope):
    broken: list[str] = []
    answered = 0
    for operation in operations:

        @hypothesis.settings(
            max_examples=EXAMPLES[scope], phases=GENERATE, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            nonlocal answered
            answer = case.call(headers=served.auth(scope))
            answered += 1
            if answer.status_code >= 500:
                broken.append(f"{answer.status_code} {case.as_curl_command()}\n{answer.text[:500]}")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                send()
            except hypothesis.errors.Unsatisfiable:  # a route that nothing can be wrong about
                assert mode is GenerationMode.NEGATIVE

    assert broken == []
    assert answered > len(operations)
