"""Requests of HTTP read strictly, one a connection, within limits of size and time; and heads of answers.

What a browser would not send is refused with a status from 400 on. Nothing of a request gets into an answer's
head.
"""

from __future__ import annotations

import io
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from prune_viz.utils.errors import one_line

_LINE, _HEADERS = 8 * 2**10, 64 * 2**10  # of a head, in bytes
_MESSAGE = 400  # characters of a line that says why
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST = re.compile(rb"(" + _TOKEN + rb") (/[\x21\x22\x24-\x7e]*) HTTP/1\.[01]")
_NAME = re.compile(_TOKEN)
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_ONCE = {"host", "origin", "content-length", "transfer-encoding", "sec-fetch-site"}


class RefusalError(Exception):
    """A request is refused.

    Parameters
    ----------
    status : HTTPStatus
        With this status.
    line : str
        Why; the status' own phrase where that says it.
    """

    def __init__(self, status: HTTPStatus, line: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.line = one_line(line)[:_MESSAGE] or status.phrase


class Stream(io.RawIOBase):
    """A connection, read and written until its client is idle or its time is up.

    Parameters
    ----------
    connection : socket
        The connection.
    idle, whole : float
        Seconds without a byte, and in all, after which reading and sending raise `TimeoutError`.

    Attributes
    ----------
    begun, answered : bool
        Whether anything came, and whether anything was sent.
    """

    def __init__(self, connection: socket.socket, idle: float, whole: float) -> None:
        self.begun = self.answered = False
        self._connection = connection
        self._idle, self._until = idle, time.monotonic() + whole

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has come; 0 bytes where the client has ended."""
        self._wait()
        count = self._connection.recv_into(buffer)
        self.begun = self.begun or count > 0
        return count

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self.answered = True
        rest = memoryview(data)
        while rest:
            self._wait()
            rest = rest[self._connection.send(rest) :]

    def _wait(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(min(self._idle, left))


@dataclass(frozen=True)
class Request:
    """The head of a request: names of headers in lower case; the path without what follows a ``?``."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def has_body(self) -> bool:
        """Whether a body is announced."""
        return "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"


class RequestReader:
    """Reads a request from a stream.

    All methods raise `RefusalError` for what is malformed, and `OSError` where the client leaves or idles.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = io.BufferedReader(stream)

    def head(self) -> Request:
        """Read the request line and the headers."""
        parts = _REQUEST.fullmatch(self._line(_LINE, HTTPStatus.REQUEST_URI_TOO_LONG))
        if parts is None:
            raise RefusalError(HTTPStatus.BAD_REQUEST)
        path = parts[2].decode("ascii").partition("?")[0]
        return Request(parts[1].decode("ascii"), path, self._headers())

    def body(self, request: Request, most: int) -> bytes:
        """Read the body, of at most `most` bytes, whose length must be announced."""
        length = request.headers.get("content-length")
        if length is None or "transfer-encoding" in request.headers:
            raise RefusalError(HTTPStatus.LENGTH_REQUIRED)
        if not re.fullmatch(r"[0-9]+", length):
            raise RefusalError(HTTPStatus.BAD_REQUEST)
        if len(length) > len(str(most)) or int(length) > most:
            raise RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        text = self._buffer.read(int(length))
        if len(text) < int(length):
            raise RefusalError(HTTPStatus.BAD_REQUEST)
        return text

    def _headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        left = _HEADERS
        while line := self._line(left, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE):
            left -= len(line) + 2
            name, colon, value = line.partition(b":")
            if not (colon and _NAME.fullmatch(name)) or _CONTROL.search(value):
                raise RefusalError(HTTPStatus.BAD_REQUEST)
            key = name.decode("ascii").lower()
            if key in found and key in _ONCE:
                raise RefusalError(HTTPStatus.BAD_REQUEST)
            found[key] = value.strip(b" \t").decode("latin-1")
        return found

    def _line(self, limit: int, too_long: HTTPStatus) -> bytes:
        """A line of the head, without its end."""
        line = self._buffer.readline(limit + 1)
        if not line and not self._stream.begun:
            raise ConnectionAbortedError
        if len(line) > limit:
            raise RefusalError(too_long)
        if not line.endswith(b"\r\n"):
            raise RefusalError(HTTPStatus.BAD_REQUEST)
        return line[:-2]


def answer_head(status: HTTPStatus, headers: Mapping[str, str]) -> bytes:
    """Write the head of an answer, after which the connection ends."""
    every = {**headers, "Connection": "close"}
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *map(": ".join, every.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii")
