"""HTTP as uvicorn has it, but for three things: heads that do not arrive, since uvicorn would wait for them without end; heads that are no
HTTP, which uvicorn answers in plain text; and the pieces of streamed bodies, of which there is one for every token.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from herd.serve.errors import RequestError, error_reply

HEAD_BYTES = 1 << 14  # that a head may have
HEAD_S = 30.0  # seconds from a connection, or from the first byte of a further request on it, to the end of the head


class Connection(h11.Connection):
    """h11's, but that a piece of a body in chunks is written without asking its machine of states, in which it changes nothing."""

    _is_chunked = False

    def send(self, event: Any) -> Any:
        if self._is_chunked and type(event) is h11.Data:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        written = super().send(event)
        if isinstance(event, h11.Response):
            self._is_chunked = written is not None and b"\r\nTransfer-Encoding: chunked\r\n" in written
        elif isinstance(event, h11.EndOfMessage):
            self._is_chunked = False
        return written


class Protocol(H11Protocol):
    """uvicorn's, with an eye on the clock, and in OpenAI's words."""

    _late: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: h11.Connection = Connection(h11.SERVER, HEAD_BYTES)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._late is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Bytes came that are no request, as h11 reads HTTP/1.1. Where a reply has begun, they can only be hung up on."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        reply = error_reply(RequestError(400, msg.rstrip(".")))
        head = h11.Response(status_code=400, headers=[*reply.raw_headers, (b"connection", b"close")], reason=b"Bad Request")
        for event in (head, h11.Data(data=bytes(reply.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Not to be logged: a client asks for what herd does not have, and gets a plain reply."""

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
