"""The server of a report: what it serves and saves, and that nothing a client sends does harm."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from prune_viz.pruning import review
from prune_viz.pruning.review import identity, read_review
from prune_viz.report import CONTENT_SECURITY_POLICY, review_server
from prune_viz.report.review_server import ReviewServer
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import sha256, write_json


def verdicts(filters: dict[str, int]) -> dict[str, Any]:
    """As `decisions.json` has them, on no filter."""
    nothing: dict[str, Any] = {"merges": [], "macs": {}, "groups": [], "verdicts": [], "removal_order": []}
    return {"format": 1, "model_sha256": None, "filters": filters, **nothing}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """As much of a run as the server needs."""
    made = RunDirectory(tmp_path / "run")
    write_json(made.decisions_file, verdicts({"inner": 8, "__proto__": 4}))
    for name in ("report/index.html", "report/assets/review.js", "report/layers/000-inner.html", "run.json"):
        (made.path / name).parent.mkdir(parents=True, exist_ok=True)
        (made.path / name).write_text(f"this is {name}")
    return made


@pytest.fixture
def server(run: RunDirectory, capfd: pytest.CaptureFixture[str]) -> Iterator[ReviewServer]:
    """A server that prints nothing, whatever is asked of it."""
    with serving(ReviewServer(run)) as made:
        yield made
    assert capfd.readouterr() == ("", "")


def ask(
    server: ReviewServer, name: str, method: str = "GET", body: str | bytes = "", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, below(server) + name, body or None, named)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def below(server: ReviewServer) -> str:
    return f"/{server.token}/"


def content(run: RunDirectory, *decisions: tuple[str, Any, str]) -> dict[str, Any]:
    listed = [{"layer": layer, "filter": number, "decision": said} for layer, number, said in decisions]
    return {"format": 1, "run": identity(run), "decisions": listed}


def connect(server: ReviewServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=10)


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def talk(server: ReviewServer, data: bytes) -> bytes:
    with connect(server) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        return received(connection)


def filled(server: ReviewServer, request: str | bytes) -> bytes:
    """A request with TOKEN and HOST replaced by those of the server."""
    data = request.encode("latin-1") if isinstance(request, str) else request
    host = f"Host: 127.0.0.1:{server.server_port}"
    return data.replace(b"TOKEN", server.token.encode()).replace(b"HOST", host.encode())


# What is served and saved


def test_the_report_is_served_below_the_token_alone(server: ReviewServer, run: RunDirectory) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url.endswith(f"{below(server)}index.html")
    status, body, headers = ask(server, "index.html")
    assert (status, body) == (200, run.report_page.read_bytes())
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"] == f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'"
    assert "*" not in str(headers)
    assert ask(server, "index.html?x")[0] == 200
    assert ask(server, "assets/review.js")[2]["Content-Type"].startswith("text/javascript")
    assert ask(server, "layers/000-inner.html")[0] == 200
    for path in ("/", "/index.html", f"/{'x' * 32}/index.html", f"/{server.token}", "//x/index.html"):
        assert (
            b" 404 " in talk(server, filled(server, f"GET {path} HTTP/1.1\r\nHOST\r\n\r\n")).split(b"\r")[0]
        )


@pytest.mark.parametrize(
    "name",
    [
        "", "none.html", "layers", "layers/", "../run.json", "..%2frun.json", "%2e%2e/run.json",
        "/etc/passwd", "layers/../index.html", "layers/../../run.json", "./index.html", "index.html/",
        "index%2ehtml", "..\\run.json", "layers\\000-inner.html", "a%00b.html",
        "index.html%00.html", "%0d%0aSet-Cookie:x.html",
        "x" * 300 + ".html", "x/" * 2000 + "x.html", "x" * 5000 + ".html", ".html", "index.json", "index",
        "report/index.html", "..//index.html",
    ],
)  # fmt: skip
def test_nothing_but_pages_of_the_report_is_served(server: ReviewServer, name: str) -> None:
    assert ask(server, name)[0] == 404


def test_links_pipes_and_sockets_are_not_served(
    server: ReviewServer, run: RunDirectory, tmp_path: Path
) -> None:
    report, outside = run.report_page.parent, tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.html").write_text("secret")
    (report / "outside.html").symlink_to(outside / "secret.html")
    (report / "inside.html").symlink_to(run.report_page)
    (report / "folder").symlink_to(outside)
    (report / "device.html").symlink_to("/dev/zero")
    (report / "round.html").symlink_to("round.html")
    (report / "folder.html").mkdir()
    os.mkfifo(report / "pipe.html")
    os.mkfifo(report / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(report)  # names of sockets are short
    listener.bind("socket.html")
    os.chdir(here)
    for name in (
        "outside.html", "inside.html", "folder/secret.html", "device.html", "round.html", "folder.html",
        "pipe.html", "pipe/index.html", "socket.html",
    ):  # fmt: skip
        assert ask(server, name)[:2] == (404, b"Not Found"), name
    listener.close()


def test_a_report_that_is_a_link_is_not_served(
    server: ReviewServer, run: RunDirectory, tmp_path: Path
) -> None:
    run.report_page.parent.rename(tmp_path / "elsewhere")
    run.report_page.parent.symlink_to(tmp_path / "elsewhere")
    assert ask(server, "index.html")[0] == 404
    run.report_page.parent.unlink()
    (tmp_path / "elsewhere").rename(run.report_page.parent)
    assert ask(server, "index.html")[0] == 200


def test_a_large_file_arrives_whole(server: ReviewServer, run: RunDirectory) -> None:
    data = os.urandom(3_000_001)
    (run.report_page.parent / "layers" / "large.png").write_bytes(data)
    assert ask(server, "layers/large.png")[1] == data


def test_reviews_are_saved_into_the_run(server: ReviewServer, run: RunDirectory) -> None:
    origin = f"http://127.0.0.1:{server.server_port}"
    assert ask(server, "review.json")[0] == 404
    made = content(run, ("__proto__", 0, "remove"), ("inner", 7, "keep"))
    saved = ask(server, "review.json", "PUT", json.dumps(made), Origin=origin, Sec_Fetch_Site="same-origin")
    assert saved[0] == 200
    assert read_review(server.review_file, run).decisions == {
        ("__proto__", 0): "remove",
        ("inner", 7): "keep",
    }
    status, body, headers = ask(server, "review.json")
    assert (status, json.loads(body)) == (200, made)
    assert headers["Content-Type"] == "application/json"


REFUSED = {
    "not JSON": b"{",
    "nothing": b" ",
    "not UTF-8": b'{"format": 1, "run": "\xff"}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a key twice": b'{"format": 1, "format": 1, "run": "RUN", "decisions": []}',
    "NaN": b'{"format": 1, "run": "RUN", "decisions": NaN}',
    "5,000 digits": b'{"format": 1, "run": "RUN", "decisions": [' + b"1" * 5000 + b"]}",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_malformed_reviews_get_one_line(server: ReviewServer, run: RunDirectory, text: bytes) -> None:
    status, body, headers = ask(server, "review.json", "PUT", text.replace(b"RUN", identity(run).encode()))
    assert (status, headers["Content-Type"]) == (409, "text/plain; charset=utf-8")
    assert body.startswith(b"the review ")
    assert body.decode().isprintable()
    assert not server.review_file.exists()


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        (("inner", 8, "keep"), "filter 8 of inner, which the run does not have"),
        (("inner", -1, "keep"), ""),
        (("inner", 10**400, "keep"), ""),
        (("inner", 1e300, "keep"), ""),
        (("inner", True, "keep"), ""),
        (("inner", 1, "\ud800"), ""),
        (("\ud800", 0, "keep"), ""),
        (("a\r\nb\u202e\x1b[31m", 0, "keep"), "of a b\\u202e\\x1b[31m, which"),
        (("<script>" * 10_000, 0, "keep"), "<script>"),
        (("constructor", 0, "keep"), "which the run does not have"),
    ],
)
def test_impossible_decisions_get_one_line(
    server: ReviewServer, run: RunDirectory, decision: tuple[str, Any, str], says: str
) -> None:
    text = json.dumps(content(run, decision)).replace("1e+300", "1e999")
    status, body, headers = ask(server, "review.json", "PUT", text)
    line = body.decode()
    assert status == 409
    assert line.startswith("the review ")
    assert says in line
    assert line.isprintable()
    assert len(line) <= 400
    assert headers["Content-Type"].startswith("text/plain")
    assert not server.review_file.exists()


def test_reviews_of_other_runs_replace_nothing(server: ReviewServer, run: RunDirectory) -> None:
    assert ask(server, "review.json", "PUT", json.dumps(content(run)))[0] == 200
    before = sha256(server.review_file)
    for change in ({"run": "other"}, {"format": 2}, {"decisions": [1]}):
        assert ask(server, "review.json", "PUT", json.dumps({**content(run), **change}))[0] == 409
    assert ask(server, "index.html", "PUT", "x")[0] == 404
    assert sha256(server.review_file) == before


def linked(file: Path) -> None:
    (file.parent / "target").write_text("target")
    file.symlink_to(file.parent / "target")


@pytest.mark.parametrize(
    "make",
    [linked, lambda file: file.symlink_to("/nowhere/at/all"), os.mkfifo, Path.mkdir],
    ids=["link", "broken link", "pipe", "directory"],
)
def test_a_review_that_is_no_regular_file_is_left_alone(
    server: ReviewServer, run: RunDirectory, make: Callable[[Path], None]
) -> None:
    make(server.review_file)
    before = server.review_file.lstat()
    assert ask(server, "review.json")[0] == 404
    status, body, _ = ask(server, "review.json", "PUT", json.dumps(content(run)))
    assert status == 409
    assert b"is not a regular file" in body
    assert server.review_file.lstat() == before
    assert not stat.S_ISREG(before.st_mode)
    if (run.path / "target").exists():
        assert (run.path / "target").read_text() == "target"


@pytest.mark.parametrize(
    "text", [b"root:x:0:0", b'{"format": 1, "run": "other", "decisions": [], "more": "secret"}', b"\0" * 40]
)
def test_what_is_no_review_is_not_shown(server: ReviewServer, text: bytes) -> None:
    server.review_file.write_bytes(text)
    status, body, _ = ask(server, "review.json")
    assert status == 409
    assert b"root:x" not in body
    assert b"secret" not in body


def test_a_review_is_written_anew_when_read(server: ReviewServer, run: RunDirectory) -> None:
    made = content(run, ("inner", 1, "keep"))
    server.review_file.write_text(json.dumps({**made, "more": "secret"}))
    assert json.loads(ask(server, "review.json")[1]) == made


def test_a_review_that_is_too_large_is_not_read(server: ReviewServer) -> None:
    with server.review_file.open("wb") as stream:
        stream.truncate(40 * 2**20)
    assert ask(server, "review.json")[:2] == (
        409, f"{server.review_file} is too large to be a review".encode(),
    )  # fmt: skip


def garbage(file: Path) -> None:
    file.write_bytes(b"\xff{")


def deep(file: Path) -> None:
    file.write_text("[" * 100_000)


def without_filters(file: Path) -> None:
    file.write_text('{"format": 1}')


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("change", [Path.unlink, directory, pipe, garbage, deep, without_filters])
def test_verdicts_that_are_gone_get_one_line(
    server: ReviewServer, run: RunDirectory, change: Callable[[Path], None]
) -> None:
    text = json.dumps(content(run, ("inner", 1, "keep")))
    assert ask(server, "review.json", "PUT", text)[0] == 200
    change(run.decisions_file)
    for method in ("GET", "PUT"):
        status, body, _ = ask(server, "review.json", method, text if method == "PUT" else "")
        assert status == 409
        assert b"decisions.json" in body
        assert body.decode().isprintable()


def test_verdicts_are_read_once_until_they_change(
    server: ReviewServer, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(run: RunDirectory) -> review.ReviewedRun:
        read.append(1)
        return review.reviewed_run(run)

    monkeypatch.setattr(review_server, "reviewed_run", counted)
    text = json.dumps(content(run))
    for _ in range(3):
        assert ask(server, "review.json", "PUT", text)[0] == 200
    assert len(read) == 1
    write_json(run.decisions_file, verdicts({"inner": 9}))
    assert ask(server, "review.json", "PUT", text)[0] == 409  # another run's now
    assert ask(server, "review.json", "PUT", json.dumps(content(run, ("inner", 8, "keep"))))[0] == 200
    assert len(read) == 2


def test_sixty_saves_at_once_all_succeed(server: ReviewServer, run: RunDirectory) -> None:
    texts = [json.dumps(content(run, ("inner", number % 8, "keep"))) for number in range(60)]
    begin = threading.Barrier(60)

    def save(text: str) -> int:
        begin.wait()
        return ask(server, "review.json", "PUT", text)[0]

    with ThreadPoolExecutor(60) as pool:
        assert list(pool.map(save, texts)) == [200] * 60
    assert len(read_review(server.review_file, run).decisions) == 1
    assert sorted(path.name for path in run.path.iterdir()) == [
        "decisions.json", "report", "review.json", "run.json",
    ]  # fmt: skip


# What is refused

PUT = "PUT /TOKEN/review.json HTTP/1.1\r\nHOST\r\n"
GET = "GET /TOKEN/index.html HTTP/1.1\r\n"
MALFORMED = {
    "an address that is none": (400, "GET http://[ HTTP/1.1\r\nHOST\r\n\r\n"),
    "another host's address": (400, "GET http://evil.example/TOKEN/index.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "an address of a file": (400, "GET file:///etc/passwd HTTP/1.1\r\nHOST\r\n\r\n"),
    "a tunnel": (400, "CONNECT evil.example:443 HTTP/1.1\r\nHOST\r\n\r\n"),
    "an asterisk": (400, "OPTIONS * HTTP/1.1\r\nHOST\r\n\r\n"),
    "an empty line": (400, "\r\n"),
    "nothing but a method": (400, "GET\r\n\r\n"),
    "HTTP 0.9": (400, "GET /TOKEN/index.html\r\n\r\n"),
    "HTTP 2": (400, "GET /TOKEN/index.html HTTP/2.0\r\nHOST\r\n\r\n"),
    "HTTP 2 known before": (400, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "a version of superscripts": (400, "GET /TOKEN/index.html HTTP/1.\xb2\r\nHOST\r\n\r\n"),
    "a version without end": (400, "GET /TOKEN/index.html HTTP/" + "1" * 5000 + "\r\nHOST\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "bytes": (400, bytes(range(256)) + b"\r\n\r\n"),
    "lines without returns": (400, "GET /TOKEN/index.html HTTP/1.1\nHOST\n\n"),
    "a method of no letters": (400, "G@T /TOKEN/index.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "two spaces": (400, "GET  /TOKEN/index.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "a tab": (400, "GET\t/TOKEN/index.html\tHTTP/1.1\r\nHOST\r\n\r\n"),
    "a NUL in the path": (400, "GET /TOKEN/index\0.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "a control character in the path": (400, "GET /TOKEN/\x1b[31m.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "a return in the path": (400, "GET /TOKEN/a\rb.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "letters beyond ASCII in the path": (400, "GET /TOKEN/\xe9.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "a fragment": (400, "GET /TOKEN/index.html#x HTTP/1.1\r\nHOST\r\n\r\n"),
    "a long request line": (414, "GET /TOKEN/" + "x" * 100_000 + " HTTP/1.1\r\nHOST\r\n\r\n"),
    "a line without end": (414, "x" * 1_000_000),
    "an unknown token": (404, "GET /" + "x" * 32 + "/index.html HTTP/1.1\r\nHOST\r\n\r\n"),
    "a path that breaks a line": (404, "GET /TOKEN/%0d%0aSet-Cookie:%20a HTTP/1.1\r\nHOST\r\n\r\n"),
    "no host": (400, GET + "\r\n"),
    "two hosts": (400, GET + "HOST\r\nHOST\r\n\r\n"),
    "two different hosts": (400, GET + "HOST\r\nHost: evil.example\r\n\r\n"),
    "another host": (421, GET + "Host: evil.example\r\n\r\n"),
    "another name of this host": (421, GET + "Host: localhost:80\r\n\r\n"),
    "a host with more": (421, GET + "HOST.evil.example\r\n\r\n"),
    "an empty host": (421, GET + "Host:\r\n\r\n"),
    "two origins": (400, GET + "HOST\r\nOrigin: http://127.0.0.1\r\nOrigin: null\r\n\r\n"),
    "another origin": (403, GET + "HOST\r\nOrigin: http://evil.example\r\n\r\n"),
    "no origin in particular": (403, PUT + "Origin: null\r\nContent-Length: 2\r\n\r\n{}"),
    "a save from another site": (403, PUT + "Sec-Fetch-Site: cross-site\r\nContent-Length: 2\r\n\r\n{}"),
    "a save from no site": (403, PUT + "Sec-Fetch-Site: none\r\nContent-Length: 2\r\n\r\n{}"),
    "a header without colon": (400, GET + "HOST\r\nnonsense\r\n\r\n"),
    "a header without name": (400, GET + "HOST\r\n: x\r\n\r\n"),
    "a space before the colon": (400, GET + "HOST\r\nOrigin : x\r\n\r\n"),
    "a folded header": (400, GET + "HOST\r\nX: a\r\n b\r\n\r\n"),
    "a NUL in a header": (400, GET + "HOST\r\nX: a\0b\r\n\r\n"),
    "a return in a header": (400, GET + "HOST\r\nX: a\rb\r\n\r\n"),
    "a long header": (431, GET + "HOST\r\nX: " + "x" * 100_000 + "\r\n\r\n"),
    "many headers": (431, GET + "HOST\r\n" + "X: x\r\n" * 20_000 + "\r\n"),
    "blanks that would take long to match": (400, GET + "HOST\r\nX:" + " " * 60_000 + "\0\r\n\r\n"),
    "no end of the headers": (400, GET + "HOST\r\n"),
    "a body where none belongs": (400, GET + "HOST\r\nContent-Length: 3\r\n\r\nabc"),
    "no length": (411, PUT + "\r\n{}"),
    "an empty length": (400, PUT + "Content-Length:\r\n\r\n{}"),
    "two lengths": (400, PUT + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
    "two lengths in one": (400, PUT + "Content-Length: 2, 2\r\n\r\n{}"),
    "a negative length": (400, PUT + "Content-Length: -2\r\n\r\n{}"),
    "a length with a sign": (400, PUT + "Content-Length: +2\r\n\r\n{}"),
    "a length in hexadecimal": (400, PUT + "Content-Length: 0x2\r\n\r\n{}"),
    "a length with underscores": (400, PUT + "Content-Length: 1_0\r\n\r\n{}"),
    "a length of superscripts": (400, PUT + "Content-Length: \xb2\r\n\r\n{}"),
    "a length of other digits": (400, (PUT + "Content-Length: \u0662\r\n\r\n{}").encode()),
    "a length of 5,000 digits": (413, PUT + "Content-Length: " + "9" * 5000 + "\r\n\r\n{}"),
    "a length beyond the limit": (413, PUT + "Content-Length: 33554433\r\n\r\n{}"),
    "pieces": (411, PUT + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    "pieces and a length": (411, PUT + "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}"),
    "a body shorter than announced": (400, PUT + "Content-Length: 200\r\n\r\n{}"),
    "an expectation": (417, PUT + "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"),
    **{
        f"the method {method[:9]}": (405, f"{method} /TOKEN/review.json HTTP/1.1\r\nHOST\r\n\r\n")
        for method in ("HEAD", "POST", "DELETE", "OPTIONS", "TRACE", "PATCH", "get", "PROPFIND", "X" * 500)
    },
}  # fmt: skip


@pytest.mark.parametrize(("status", "request_"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_are_refused(server: ReviewServer, status: int, request_: str | bytes) -> None:
    answer = talk(server, filled(server, request_))
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    assert lines[0].startswith(f"HTTP/1.1 {status} ")
    names = [line.split(":")[0] for line in lines[1:]]
    assert len(set(names)) == len(names)
    assert "Set-Cookie" not in names
    assert "Content-Security-Policy" in names
    assert body == lines[0].split(" ", 2)[2].encode()  # nothing of what was asked
    assert ("Allow" in names) == (status == 405)
    assert not server.review_file.exists()


def test_clients_that_leave_leave_nothing_behind(server: ReviewServer, run: RunDirectory) -> None:
    text = json.dumps(content(run))
    whole = filled(server, PUT + f"Content-Length: {len(text)}\r\n\r\n{text}")
    for length in range(0, len(whole) + 1, 9):
        with connect(server) as connection:
            connection.sendall(whole[:length])
            if length % 2:  # reset, not closed
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    (run.report_page.parent / "large.png").write_bytes(bytes(30_000_000))
    with connect(server) as connection:
        connection.sendall(filled(server, "GET /TOKEN/large.png HTTP/1.1\r\nHOST\r\n\r\n"))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(server, "index.html")[0] == 200


def test_a_refusal_reaches_who_still_sends(server: ReviewServer) -> None:
    begin = filled(server, PUT + "Content-Length: 40000000\r\n\r\n")
    assert talk(server, begin + bytes(8_000_000)).startswith(b"HTTP/1.1 413 ")


def test_idle_connections_end(server: ReviewServer) -> None:
    server.idle = 0.2
    begun = time.monotonic()
    with connect(server) as silent, connect(server) as half, connect(server) as short:
        half.sendall(b"GET /")
        short.sendall(filled(server, PUT + "Content-Length: 100\r\n\r\n{"))
        assert received(silent) == b""
        assert received(half).startswith(b"HTTP/1.1 408 ")
        assert received(short).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begun < 3


def test_requests_byte_by_byte_end(server: ReviewServer) -> None:
    server.whole = 0.5
    begun = time.monotonic()
    with connect(server) as connection, suppress(ConnectionError):
        while time.monotonic() - begun < 6:
            connection.sendall(b"G")
            connection.settimeout(0.05)
            with suppress(TimeoutError):
                assert connection.recv(12) in (b"HTTP/1.1 408", b"")
                break
    assert 0.4 < time.monotonic() - begun < 3


def test_answers_that_nobody_takes_end(server: ReviewServer, run: RunDirectory) -> None:
    server.whole = 0.5
    (run.report_page.parent / "large.png").write_bytes(bytes(30_000_000))
    with connect(server) as connection:
        connection.sendall(filled(server, "GET /TOKEN/large.png HTTP/1.1\r\nHOST\r\n\r\n"))
        time.sleep(1)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert len(answer) < 30_000_000
    assert b"408" not in answer


class NarrowServer(ReviewServer):
    """Has room for two connections."""

    most = 2


def test_connections_beyond_the_limit_wait(run: RunDirectory) -> None:
    with serving(NarrowServer(run)) as server, connect(server) as one, connect(server) as two:
        with connect(server) as third:
            third.sendall(filled(server, "GET /TOKEN/index.html HTTP/1.1\r\nHOST\r\n\r\n"))
            third.settimeout(0.4)
            with pytest.raises(TimeoutError):
                third.recv(1)
            one.close()
            third.settimeout(10)
            assert received(third).startswith(b"HTTP/1.1 200 OK")
        two.close()


def test_a_full_server_can_be_ended(run: RunDirectory) -> None:
    with serving(NarrowServer(run)) as server:
        waiting = [connect(server) for _ in range(6)]
        time.sleep(0.2)
        begun = time.monotonic()
        server.shutdown()
        assert time.monotonic() - begun < 2
        for connection in waiting:
            connection.close()


def test_a_failure_gets_one_line_without_traceback(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(server: ReviewServer) -> None:
        raise ZeroDivisionError("a\nb\x1b")

    monkeypatch.setattr(ReviewServer, "saved", failing)
    with serving(ReviewServer(run)) as server:
        assert talk(server, filled(server, "GET /TOKEN/review.json HTTP/1.1\r\nHOST\r\n\r\n")) == b""
        assert ask(server, "index.html")[0] == 200
    assert capfd.readouterr() == ("", "failed: ZeroDivisionError: a b\\x1b\n")


def test_missing_report_or_busy_port_is_one_line(
    server: ReviewServer, run: RunDirectory, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--port {server.server_port}: .*; give another one"):
        ReviewServer(run, server.server_port)
    with pytest.raises(UserError, match="has no report"):
        ReviewServer(RunDirectory(tmp_path))
