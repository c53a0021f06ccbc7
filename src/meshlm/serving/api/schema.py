"""What `/openapi.json` says: the handlers read their bodies themselves, so it is told here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from meshlm.serving.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Strict,
    TokenizeRequest,
)

_BODIES: tuple[type[Strict], ...] = (
    CompletionRequest,
    ChatRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
_NUMBER = {"anyOf": [{"type": "number"}, {"type": "string"}]}
_COMPLETE: dict[str, Any] = {
    "type": "object",
    "properties": {"context": {"type": "string"}, "top_p": _NUMBER, "temp": _NUMBER},
    "required": ["context"],
    "additionalProperties": False,
}
_DEMO = _COMPLETE | {
    "properties": _COMPLETE["properties"]
    | {
        "topP": _NUMBER,
        "response_length": _NUMBER,
        "remove_input": {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
    },
    "additionalProperties": True,
}
_SCHEMAS = {
    "CompleteRequest": _COMPLETE,
    "DemoRequest": _DEMO,
    "Error": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                "required": ["message", "type", "param", "code"],
                "additionalProperties": False,
            }
        },
        "required": ["error"],
        "additionalProperties": False,
    },
}
_ERROR = {
    "description": "What is wrong",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def describe_body(name: str, *, streams: bool = False) -> dict[str, Any]:
    """Returns what the schema says of a route that takes the JSON object `name`."""
    kinds = {"application/json": {"schema": {}}}
    if streams:
        kinds["text/event-stream"] = {"schema": {}}
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "The answer", "content": kinds}, "default": _ERROR},
    }


def describe_query(**names: str) -> dict[str, Any]:
    """Returns what the schema says of a route with these parameters: name -> description."""
    return {
        "parameters": [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
            for name, text in names.items()
        ],
        "responses": {"default": _ERROR},
    }


def describe_schema(app: FastAPI, version: str) -> dict[str, Any]:
    """Returns the whole schema of the app's routes."""
    schema = get_openapi(title="MeshLM", version=version, routes=app.routes)
    _, definitions = models_json_schema(
        [(model, "validation") for model in _BODIES],
        ref_template="#/components/schemas/{model}",
    )
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    components |= definitions["$defs"] | _SCHEMAS
    return schema
