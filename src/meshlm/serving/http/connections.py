"""HTTP connections with the bounds that uvicorn's own lack: headers, unread bodies, slow readers.

A subclass of uvicorn's protocol over h11. What uvicorn bounds by itself is the time between two
requests of a kept connection, and the size of the headers.
"""

import asyncio
import json
import sys
from typing import Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from meshlm.serving.config import Limits
from meshlm.serving.errors import error_body, error_headers
from meshlm.serving.http.refusals import LINGER_S
from meshlm.serving.metrics import Metrics

# Read at once; asyncio's own 256 KiB would be what a refused body is read too far.
_READ_BYTES = 16 << 10
# Of a body that the answer did not wait for, before the connection is closed.
_MOST_UNREAD_BYTES = 64 << 10


class Connection(H11Protocol):
    """One connection. `connection_class` makes the class that a server uses."""

    limits: ClassVar[Limits]
    metrics: ClassVar[Metrics]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request; closes at once where there are too many connections."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._is_over = False
        if hasattr(transport, "max_size"):
            cast(Any, transport).max_size = _READ_BYTES
        if len(self.connections) > self.limits.max_connections:
            self.metrics.rejected("connections")
            transport.abort()
            return
        self._start(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the timers."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Takes bytes of a request. The first byte of its headers starts their time."""
        super().data_received(data)
        if self._is_over or self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._start(self.limits.header_timeout_s)
        elif self._answered_early():
            self._unread_bytes += len(data)
            if self._unread_bytes > _MOST_UNREAD_BYTES:
                self._linger()
        else:
            self._stop()

    def on_response_complete(self) -> None:
        """Waits for the next request, or for what the client still sends of this one."""
        super().on_response_complete()
        self._unread_bytes = 0
        if not self.transport.is_closing() and self._answered_early():
            self._unset_keepalive_if_required()
            self._start(self.limits.body_timeout_s)

    def shutdown(self) -> None:
        """Closes, or closes after the answer that is under way."""
        try:
            super().shutdown()
        except h11.LocalProtocolError:
            # h11 has given this connection up, and would end the server's shutdown with it.
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP with OpenAI's error body, and closes."""
        # Called where h11's error is being handled, which knows the status that fits.
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(error_body(status, msg)).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error_headers(status, can_retry=False),
        }
        events = (
            h11.Response(status_code=status, headers=list(headers.items())),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.metrics.rejected("invalid")
        self.metrics.responded(status)
        self._linger()

    def pause_writing(self) -> None:
        """Begins the time in which a client has to take what waits for it."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.idle_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Ends that time."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _answered_early(self) -> bool:
        """Whether the answer is whole and the request is not."""
        answered = self.cycle is not None and self.cycle.response_complete
        return answered and self.conn.their_state is h11.SEND_BODY

    def _linger(self) -> None:
        """Reads no more, and closes once the client had time to take the answer."""
        self._stop()
        self._is_over = True
        self.flow.pause_reading()
        self._timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _start(self, seconds: float) -> None:
        # A running time goes on: bytes that drip do not lengthen it.
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection_class(limits: Limits, metrics: Metrics) -> type[Connection]:
    """Returns a class of connections with these limits, as uvicorn wants one to make them from."""
    return type("BoundConnection", (Connection,), {"limits": limits, "metrics": metrics})
