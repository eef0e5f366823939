"""The server is what its OpenAPI description says, for random requests of each kind."""

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from test_serve import folder, served

from dsv3_ref.serving.openapi import describe_api
from dsv3_ref.serving.protocol import RELOAD, FieldLimits, endpoint_fields

__all__ = ["folder"]  # the fixture that makes a model
OPERATIONS = [
    ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"), ("/health", "GET"), ("/metrics", "GET"), ("/tokenize", "POST"),
    ("/detokenize", "POST"),
]  # fmt: skip


# ── Without a server ──

READ = {"GET": {401, 403}, "POST": {400, 401, 403, 404, 413, 415, 429, 500, 503}}
MORE = {"/v1/models/{name}": {404}, "/health": {503}}  # errors that reading alone does not have


def test_every_operation_has_its_errors():
    fields = endpoint_fields(FieldLimits(256, 16, 400)) | {RELOAD: {}}
    paths = describe_api(fields, 1 << 20)["paths"]
    described = []
    for path in paths:
        described += [(path, method.upper()) for method in paths[path] if method != "parameters"]
    assert sorted(described) == sorted([*OPERATIONS, (RELOAD, "POST")])
    for path, method in OPERATIONS:
        responses = paths[path][method.lower()]["responses"]
        assert {int(status) for status in responses} == {200} | READ[method] | MORE.get(path, set())
        for status in responses.keys() - {"200"}:
            (content,) = responses[status]["content"].values()
            is_status = (path, status) == ("/health", "503")  # it answers as if it were ready
            assert content["schema"]["required"] == ["status" if is_status else "error"]


def test_what_a_request_must_have_is_required():
    paths = describe_api(endpoint_fields(FieldLimits(256, 16, 400)), 1 << 20)["paths"]
    assert RELOAD not in paths
    for path, method in OPERATIONS:
        if method == "POST":
            body = paths[path]["post"]["requestBody"]
            schema = body["content"]["application/json"]["schema"]
            must = {"/v1/chat/completions": ["messages"], "/detokenize": ["tokens"]}.get(path)
            assert body["required"] is True and schema.get("required") == must
            assert schema["additionalProperties"] is False
    (name,) = paths["/v1/models/{name}"]["parameters"]
    assert (name["in"], name["name"], name["required"]) == ("path", "name", True)


# ── With a server ──


@pytest.fixture(scope="module")
def description(folder):
    """Return the description of a running server."""
    schemathesis = pytest.importorskip("schemathesis")
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
    import schemathesis  # only now: it takes a second to load
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    kind = schemathesis.GenerationMode[mode]
    if (mode, method) == ("NEGATIVE", "GET"):
        pytest.skip("there is nothing to get wrong")
    unhealthy = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=unhealthy)
    @given(description[path][method].as_strategy(generation_mode=kind))
    def check(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)

    check()
