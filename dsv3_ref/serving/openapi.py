"""The description of `dsv3 serve` in the OpenAPI format, made of the fields that it validates."""

from collections.abc import Mapping

from dsv3_ref.serving.fields import Field, JSONObject, object_schema
from dsv3_ref.serving.protocol import CHAT, COMPLETIONS, DETOKENIZE, RELOAD, TOKENIZE

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
ERRORS = {
    400: "a mistake in the request",
    401: "no valid API key",
    403: "a foreign Host header",
    404: "an unknown model",
    413: "a body that is too large",
    415: "a content type other than JSON",
    429: "the queue is full",
    500: "the server could not continue this request",
    503: "the server is shutting down or has failed",
}


def describe_api(fields: Mapping[str, Mapping[str, Field]], max_body_bytes: int) -> JSONObject:
    """Return the description. fields: of each endpoint that reads a body.

    Null stands everywhere for a field that is absent.
    """
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "dsv3 serve",
            "version": "1",
            "description": "OpenAI's API for one model",
        },
        "security": [{}, {"key": []}],
        "paths": {
            COMPLETIONS: completion_path(
                fields[COMPLETIONS], [], "text_completion", max_body_bytes
            ),
            CHAT: completion_path(fields[CHAT], ["messages"], "chat.completion", max_body_bytes),
            **token_paths(fields),
            "/v1/models": {"get": operation("List the model", object_of(data={"type": "array"}))},
            "/v1/models/{name}": {
                "get": operation("Describe a model", object_of(id=TEXT), 404),
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": TEXT}],
            },
            "/health": {"get": operation("Tell the status", object_of(status=TEXT), 503)},
            "/metrics": {"get": operation("Return Prometheus' metrics", TEXT, kind="text/plain")},
            **({RELOAD: {"post": reload_operation(fields[RELOAD])}} if RELOAD in fields else {}),
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def token_paths(fields: Mapping[str, Mapping[str, Field]]) -> JSONObject:
    """Return the descriptions of the endpoints between texts and tokens."""
    tokens = object_of(count=COUNT, max_model_len=COUNT, tokens={"type": "array"})
    tokenize = body_operation(
        "Return the tokens of a prompt or of a conversation",
        tokens,
        object_schema(fields[TOKENIZE], []),
    )
    detokenize = body_operation(
        "Return the text of tokens", object_of(prompt=TEXT),
        object_schema(fields[DETOKENIZE], ["tokens"]),
    )  # fmt: skip
    return {TOKENIZE: {"post": tokenize}, DETOKENIZE: {"post": detokenize}}


def reload_operation(fields: Mapping[str, Field]) -> JSONObject:
    """Return the description of the endpoint that loads other weights."""
    answer = object_of(success={"type": "boolean"}, message=TEXT)
    return body_operation("Load other weights", answer, object_schema(fields, ["model_path"]))


def completion_path(
    fields: Mapping[str, Field], required: list[str], kind: str, max_body_bytes: int
) -> JSONObject:
    """Return the description of an endpoint that completes texts."""
    choices = {"type": "array", "items": object_of(index=COUNT, finish_reason={}, logprobs={})}
    usage = object_of(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
    response = object_of(
        id=TEXT, object={"const": kind}, created=COUNT, model=TEXT, choices=choices, usage=usage
    )
    schema = object_schema(fields, required)
    post = body_operation(f"At most {max_body_bytes} bytes", response, schema)
    event = object_of(data=TEXT)
    post["responses"]["200"]["content"]["text/event-stream"] = {"itemSchema": event}
    return {"post": post}


def body_operation(summary: str, response: JSONObject, schema: JSONObject) -> JSONObject:
    """Return the description of an operation that reads a body of this schema."""
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation(summary, response, *ERRORS) | {"requestBody": body}


def object_of(**properties: JSONObject) -> JSONObject:
    """Return the schema of an object that has at least these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def operation(
    summary: str, schema: JSONObject, *errors: int, kind: str = "application/json"
) -> JSONObject:
    """Return the description of an operation with its responses."""
    text = {"anyOf": [TEXT, {"type": "null"}]}
    error = object_of(error=object_of(message=TEXT, type=TEXT, param=text, code=text))
    responses: JSONObject = {
        "200": {"description": "success", "content": {kind: {"schema": schema}}}
    }
    for status in sorted({*errors, 401, 403}):
        content = {"application/json": {"schema": error}}
        if (status, summary) == (503, "Tell the status"):
            content = {"application/json": {"schema": schema}}
        responses[str(status)] = {"description": ERRORS[status], "content": content}
    return {"summary": summary, "responses": responses}
