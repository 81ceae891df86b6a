"""The report of a run served to this machine alone, saving reviews straight into the run directory.

Nothing listens beyond the loopback. All paths begin with a random token; requests under another host's name
are refused (a page elsewhere could have its name lead here), and so is what another page sends.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prune_viz.errors import UserError
from prune_viz.review import parse_review, write_review
from prune_viz.runs import RunDirectory

HOST = "127.0.0.1"
REVIEW = "review.json"
_LARGEST = 32 * 2**20  # of a review, in bytes
_KINDS = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".png": "image/png", ".jpg": "image/jpeg",
}  # fmt: skip


class ReviewServer(ThreadingHTTPServer):
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

    Raises
    ------
    UserError
        If there is no report, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, run: RunDirectory, port: int = 0) -> None:
        if not run.report_page.exists():
            raise UserError(f"{run.path} has no report; write it with: prune-viz report {run.path}")
        self.run = run
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; give another one") from None
        self.url = f"http://{HOST}:{self.server_port}/{self.token}/{run.report_page.name}"

    @property
    def review_file(self) -> Path:
        """Where reviews are saved."""
        return self.run.path / REVIEW


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    server_version, sys_version = "prune-viz", ""

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_PUT(self) -> None:
        self._guarded(self._put)

    def _guarded(self, answer: Callable[[str], None]) -> None:
        """Answer requests for paths below the token that were meant for this server."""
        host = f"{HOST}:{self.server.server_port}"
        path = unquote(urlsplit(self.path).path)
        prefix = f"/{self.server.token}/"
        if self.headers.get("Host") != host:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif not secrets.compare_digest(path[: len(prefix)].encode(), prefix.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
        elif self.headers.get("Origin") not in (None, f"http://{host}"):
            self._refuse(HTTPStatus.FORBIDDEN)
        else:
            answer(path[len(prefix) :])

    def _get(self, name: str) -> None:
        folder = self.server.run.report_page.parent.resolve()
        try:
            file = self.server.review_file if name == REVIEW else (folder / name).resolve()
            allowed = name == REVIEW or (file.is_relative_to(folder) and file.suffix in _KINDS)
            body = file.read_bytes() if allowed else None
        except (OSError, ValueError):  # no such file, or a name that cannot be one
            body = None
        if body is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._answer(HTTPStatus.OK, body, _KINDS.get(file.suffix, "application/json"))

    def _put(self, name: str) -> None:
        length = self.headers.get("Content-Length", "")
        if name != REVIEW or not length.isdecimal() or int(length) > _LARGEST:
            self._refuse(HTTPStatus.NOT_FOUND if name != REVIEW else HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        try:
            review = parse_review(json.loads(self.rfile.read(int(length))), self.server.run)
            write_review(review, self.server.review_file)
        except (ValueError, UserError) as error:
            self._answer(HTTPStatus.CONFLICT, str(error).encode(), "text/plain; charset=utf-8")
            return
        self._answer(HTTPStatus.OK, b"{}", "application/json")

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self._answer(status, status.phrase.encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # the terminal shows the address alone
        pass
