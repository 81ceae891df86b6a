"""The report of a run served to this machine alone, saving reviews straight into the run directory.

Nothing listens beyond the loopback. All paths begin with a random token; requests under another host's name
are refused (a page elsewhere could have its name lead here), and so is what another page sends. Requests are
read strictly, one a connection: what is not plainly one of those that the report's pages make is refused.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import stat
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any, BinaryIO

from prune_viz.pruning.review import (
    LARGEST,
    ReviewedRun,
    parse_review,
    review_content,
    reviewed_run,
    write_review,
)
from prune_viz.report import CONTENT_SECURITY_POLICY
from prune_viz.report.strict_http import RefusalError, Request, RequestReader, Stream, answer_head
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError, one_line
from prune_viz.utils.json_files import decode_json

HOST = "127.0.0.1"
REVIEW = "review.json"
_MESSAGE = 400  # characters of an error
_CHUNK = 2**18  # bytes sent or read at a time
_PARTING = 1.0  # seconds that a client has to take what it is refused with
_KINDS = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8", "png": "image/png", "jpg": "image/jpeg",
}  # fmt: skip
_TEXT, _JSON = "text/plain; charset=utf-8", "application/json"
_FILE = re.compile(r"(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+\.([a-z]+)")  # as the report names its files


class ReviewServer(ThreadingTCPServer):
    """Serves the report of a run, and takes its review.

    Parameters
    ----------
    run : RunDirectory
        A run with a report.
    port : int
        Where to listen; any that is free for 0.

    Attributes
    ----------
    url : str
        Of the first page, token included.
    idle, whole : float
        Seconds without a byte, and in all, after which a request is given up.
    most : int
        Connections at a time; more wait until one ends.

    Raises
    ------
    UserError
        If there is no report, or the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128
    idle, whole, most = 10.0, 60.0, 128

    def __init__(self, run: RunDirectory, port: int = 0) -> None:
        if not run.report_page.is_file():
            raise UserError(f"{run.path} has no report; write it with: prune-viz report {run.path}")
        self.run = run
        self.token = secrets.token_urlsafe(24)
        self._free = threading.BoundedSemaphore(self.most)
        self._saving = threading.Lock()
        self._reading = threading.Lock()
        self._known: tuple[tuple[int, ...], ReviewedRun] | None = None
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; give another one") from None
        self.server_port = int(self.server_address[1])
        # As browsers write it: the usual port is left out.
        self.host = HOST if self.server_port == 80 else f"{HOST}:{self.server_port}"
        self.url = f"http://{self.host}/{self.token}/{run.report_page.name}"

    @property
    def review_file(self) -> Path:
        """Where reviews are saved."""
        return self.run.path / REVIEW

    def reviewed(self) -> ReviewedRun:
        """What reviews are checked against, read again only where the file has changed.

        Raises
        ------
        UserError
            If the run has no verdicts, or they cannot be read.
        """
        with self._reading:
            file = self.run.decisions_file
            try:
                status = file.stat()
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}") from None
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{file} is not a regular file")
            signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._known is None or self._known[0] != signature:
                self._known = signature, reviewed_run(self.run)
            return self._known[1]

    def save(self, text: bytes) -> None:
        """Save a review as the page sent it.

        Raises
        ------
        UserError
            If it is not a review of the run, or cannot be written.
        """
        content = decode_json(text, "the review")
        with self._saving:
            review = parse_review(content, self.run, expected=self.reviewed())
            _check_replaceable(self.review_file)
            write_review(review, self.review_file)

    def saved(self) -> bytes | None:
        """The review in the run directory, written anew from what was read; None where there is none.

        Raises
        ------
        UserError
            If what is there is not a review of the run.
        """
        file = open_regular(self.run.path, REVIEW)
        if file is None:
            return None
        with file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{self.review_file} is too large to be a review")
        name = str(self.review_file)
        review = parse_review(decode_json(text, name), self.run, name, self.reviewed())
        return json.dumps(review_content(review)).encode("ascii")

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection once there is room for it."""
        if not self._free.acquire(timeout=0.1):
            raise BlockingIOError  # the server's loop asks again, unless it is to end
        try:
            return super().get_request()
        except BaseException:
            self._free.release()
            raise

    def shutdown_request(self, request: Any) -> None:
        """End a connection, which makes room for another."""
        try:
            super().shutdown_request(request)
        finally:
            self._free.release()

    def server_close(self) -> None:
        """Stop listening, once what is being saved is saved."""
        with self._saving:
            super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report a failure on one line, unless a client merely left."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"failed: {one_line(f'{type(error).__name__}: {error}')[:_MESSAGE]}", file=sys.stderr)


def open_regular(folder: Path, name: str) -> BinaryIO | None:
    """Open a regular file below a folder; None where there is none, or a link leads to it."""
    *folders, file = name.split("/")
    try:
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in folders:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = inner
            # Without O_NONBLOCK a pipe would wait for one who writes into it.
            handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
        finally:
            os.close(here)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return None
    return os.fdopen(handle, "rb")


def _check_replaceable(file: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(file.lstat().st_mode):
            raise UserError(f"{file} is not a regular file: remove it to save reviews there")


class _Handler(BaseRequestHandler):
    """Answers one request, and takes leave of the connection."""

    server: ReviewServer
    request: socket.socket

    def handle(self) -> None:
        """Answer the request, or refuse it."""
        self._stream = Stream(self.request, self.server.idle, self.server.whole)
        self._reader = RequestReader(self._stream)
        with suppress(OSError):  # the client has left
            try:
                self._answer()
            except RefusalError as refusal:
                self._refuse(refusal.status, refusal.line)
            except TimeoutError:
                if self._stream.begun and not self._stream.answered:
                    self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def finish(self) -> None:
        """Wait until the client has gone: closing on what it still sends would take the answer from it."""
        until = time.monotonic() + 2 * _PARTING
        with suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
            self.request.settimeout(_PARTING)
            while self.request.recv(_CHUNK) and time.monotonic() < until:
                pass

    def _answer(self) -> None:
        """Answer requests for paths below the token that were meant for this server."""
        request = self._reader.head()
        host, prefix = self.server.host, f"/{self.server.token}/"
        site = f"http://{host}"
        if "host" not in request.headers:
            raise RefusalError(HTTPStatus.BAD_REQUEST)
        if request.headers["host"] != host:
            raise RefusalError(HTTPStatus.MISDIRECTED_REQUEST)
        if request.method not in ("GET", "PUT"):
            raise RefusalError(HTTPStatus.METHOD_NOT_ALLOWED)
        if not secrets.compare_digest(request.path[: len(prefix)].encode(), prefix.encode()):
            raise RefusalError(HTTPStatus.NOT_FOUND)
        if request.headers.get("origin", site) != site:
            raise RefusalError(HTTPStatus.FORBIDDEN)
        if "expect" in request.headers:
            raise RefusalError(HTTPStatus.EXPECTATION_FAILED)
        name = request.path[len(prefix) :]
        if request.method == "PUT":
            self._put(name, request)
        elif request.has_body:
            raise RefusalError(HTTPStatus.BAD_REQUEST)
        elif name == REVIEW:
            self._get_review()
        else:
            self._get(name)

    def _get(self, name: str) -> None:
        known = _FILE.fullmatch(name)
        kind = _KINDS.get(known[1]) if known else None
        folder = self.server.run.report_page.parent
        file = open_regular(folder.parent, f"{folder.name}/{name}") if kind else None
        if kind is None or file is None:
            raise RefusalError(HTTPStatus.NOT_FOUND)
        with file:
            left = os.fstat(file.fileno()).st_size
            self._stream.send(_head(HTTPStatus.OK, left, kind))
            while left and (chunk := file.read(min(left, _CHUNK))):
                self._stream.send(chunk)
                left -= len(chunk)

    def _get_review(self) -> None:
        try:
            text = self.server.saved()
        except (UserError, OSError) as error:
            raise RefusalError(HTTPStatus.CONFLICT, str(error)) from None
        if text is None:
            raise RefusalError(HTTPStatus.NOT_FOUND)
        self._stream.send(_head(HTTPStatus.OK, len(text), _JSON) + text)

    def _put(self, name: str, request: Request) -> None:
        if name != REVIEW:
            raise RefusalError(HTTPStatus.NOT_FOUND)
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise RefusalError(HTTPStatus.FORBIDDEN)
        text = self._reader.body(request, LARGEST)
        try:
            self.server.save(text)
        except (UserError, OSError) as error:
            raise RefusalError(HTTPStatus.CONFLICT, str(error)) from None
        self._stream.send(_head(HTTPStatus.OK, 2, _JSON) + b"{}")

    def _refuse(self, status: HTTPStatus, line: str = "") -> None:
        text = (line or status.phrase).encode()
        self.request.settimeout(_PARTING)
        self.request.sendall(_head(status, len(text), _TEXT) + text)


def _head(status: HTTPStatus, length: int, kind: str) -> bytes:
    headers = {
        "Content-Type": kind,
        "Content-Length": str(length),
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = "GET, PUT"
    return answer_head(status, headers)
