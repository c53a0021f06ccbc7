"""OpenAI's error body and headers for every failure, and what fails a request."""

import math
from collections.abc import Mapping
from typing import Any

from meshlm.serving.requests import Failed, NotReadyError, QueueFullError, State

BUSY_RETRY_S = 1
"""A queue moves on within about a second."""
LOADING_RETRY_S = 5
"""Loading takes seconds to minutes; a draining server's place is taken by another."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: "queue_full",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}
# openai's clients try these again by themselves, and 500 and up.
_RETRIED = (408, 409, 429)


def error_body(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    kind: str | None = None,
) -> dict[str, Any]:
    """Returns OpenAI's error body.

    Args:
        status: the HTTP status; `code` and `kind` follow from it unless given.
        param: the field of the request that is at fault.
        kind: what OpenAI calls `type`.
    """
    return {
        "error": {
            "message": message,
            "type": kind or _KINDS.get(status, "invalid_request_error"),
            "param": param,
            "code": code or _CODES.get(status),
        }
    }


def error_headers(
    status: int, *, retry_after_s: float | None = None, can_retry: bool | None = None
) -> dict[str, str]:
    """Returns the headers that tell a client when to try again, or that it should not.

    Args:
        retry_after_s: seconds until it makes sense; for 429 and 503 there is a default.
        can_retry: whether the same request may succeed later; follows from `status` unless given.
    """
    if can_retry is None:
        can_retry = status in (*_RETRIED, 503)
    if not can_retry:
        return {"x-should-retry": "false"}
    if retry_after_s is None:
        retry_after_s = {429: BUSY_RETRY_S, 503: LOADING_RETRY_S}.get(status)
    return {} if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}


class ApiError(Exception):
    """Fails a request with a status, a message for its author, and OpenAI's body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        """Args: headers: instead of those that follow from `status`; reason: see `Metrics`."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(error_headers(status) if headers is None else headers)
        self.reason = reason

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return error_body(self.status, str(self), code=self.code, param=self.param)


def bad_field(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """Returns the 400 for a field, whose name `message` holds too."""
    return ApiError(400, message, param=param, code=code, reason="invalid")


def bug() -> ApiError:
    """Returns the 500 of an error that nobody foresaw; the log has it under the request's id."""
    return ApiError(500, "The server failed; its log has the cause under this request's id.")


def refused(error: QueueFullError | NotReadyError) -> ApiError:
    """Returns the answer to a request that the engine did not take."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), reason="queue_full")
    return not_ready(error.state, str(error))


def not_ready(state: State, detail: str) -> ApiError:
    """Returns the 503 of an engine that takes no requests, in whatever state it is."""
    if state == "loading":
        words = f"Loading model: {detail}" if detail else "Loading model"
        return ApiError(503, words, code="loading", reason="loading")
    if state == "failed":
        return ApiError(
            503,
            "the engine has failed and this server is ending",
            code="engine_failed",
            headers=error_headers(503, can_retry=False),
            reason="failed",
        )
    return ApiError(
        503, "the server is shutting down: try again later", code="draining", reason="draining"
    )


def failed(event: Failed) -> ApiError:
    """Returns what a request ends with that the engine took and could not finish."""
    if event.kind == "deadline":
        # The same request would take as long again.
        headers = error_headers(503, can_retry=False)
        return ApiError(503, event.message, code="timeout", headers=headers)
    if event.kind in ("draining", "cancelled"):
        return ApiError(503, event.message, code=event.kind)
    return ApiError(500, event.message, code="engine_error")
