"""The server is what its OpenAPI description says, for random requests of each kind."""

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from test_serve import folder, served

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import (  # noqa: E402  after the skip
    positive_data_acceptance,
)

__all__ = ["folder"]  # the fixture that makes a model
OPERATIONS = [
    ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"), ("/health", "GET"), ("/metrics", "GET"), ("/tokenize", "POST"),
    ("/detokenize", "POST"),
]  # fmt: skip


@pytest.fixture(scope="module")
def description(folder):
    """Return the description of a running server."""
    with served(folder, num_speculative_tokens=1, max_n=4, max_new_tokens=8) as (base, _):
        yield schemathesis.openapi.from_url(f"{base}/openapi.json")
        assert httpx.get(f"{base}/health").json() == {"status": "ready"}


STREAMS = {
    "/v1/completions": {"prompt": "a", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
}


@pytest.mark.full
@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_stream_and_a_whole_answer_are_described(description, path, stream):
    """Random requests need not contain a valid one that streams, so both kinds are asked for."""
    case = description[path]["POST"].Case(body=STREAMS[path] | {"stream": stream})
    response = case.call_and_validate(timeout=60)
    kind = "text/event-stream" if stream else "application/json"
    assert response.status_code == 200
    assert response.headers["content-type"][0].startswith(kind)


@pytest.mark.full
@pytest.mark.parametrize("path, method", OPERATIONS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_random_requests_get_the_answers_that_are_described(description, path, method, mode):
    """Fields that contradict each other and prompts that are too long cannot be described."""
    kind = schemathesis.GenerationMode[mode]
    if (mode, method) == ("NEGATIVE", "GET"):
        pytest.skip("there is nothing to get wrong")
    unhealthy = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=unhealthy)
    @given(description[path][method].as_strategy(generation_mode=kind))
    def check(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)

    check()
