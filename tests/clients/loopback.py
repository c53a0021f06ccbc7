"""What the scripts of this folder share: they reach nothing but loopback, and print one answer.

Each script is a real client in a process of its own: `python ask_X.py ADDRESS ASKED`. ASKED is JSON
with `prompt`, `messages`, `more`, `seed` and `max_tokens`. The answer is JSON, {name: text}. Names
that begin with "text" continue the prompt, with "chat" answer the messages, with "second" answer
`more` after the messages and the answer, and with "refused" are messages of errors.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

# Before a client is imported: no telemetry, no tables of prices.
os.environ |= {
    "DO_NOT_TRACK": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OTEL_SDK_DISABLED": "true",
}

_resolve, _connect = socket.getaddrinfo, socket.socket.connect


def _resolve_here(host: Any, *arguments: Any, **options: Any) -> Any:
    if host not in ("127.0.0.1", "localhost", None):
        os.abort()
    return _resolve(host, *arguments, **options)


def _connect_here(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        os.abort()
    _connect(self, address)


socket.getaddrinfo = _resolve_here
socket.socket.connect = _connect_here

BASE_URL = f"{sys.argv[1]}/v1"
ASKED = json.loads(sys.argv[2])
PROMPT: str = ASKED["prompt"]
MESSAGES: list[Any] = ASKED["messages"]
MORE: str = ASKED["more"]
COMMON: dict[str, Any] = {"seed": ASKED["seed"], "max_tokens": ASKED["max_tokens"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def refusal(work: Any) -> str:
    """The message of the error that `work` raises."""
    try:
        work()
    except Exception as error:
        return str(error)
    raise AssertionError("it was not refused")


def answer(**texts: str | None) -> None:
    """Prints what was answered."""
    print(json.dumps(texts))
