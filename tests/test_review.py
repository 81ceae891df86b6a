"""What a person decided, and the masks that follow."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Concatenating, Residual, randomise_norms
from typer.testing import CliRunner

import prune_viz as pv
from prune_viz import cli
from prune_viz.errors import UserError
from prune_viz.files import sha256
from prune_viz.review import Review, identity, read_review, reviewed_masks, write_review
from prune_viz.review_server import ReviewServer
from prune_viz.runs import RunDirectory


def residual_with_a_copy() -> Residual:
    """A filter of the inner convolution stands there twice, and one of it is silent."""
    torch.manual_seed(0)
    model = randomise_norms(Residual())
    with torch.no_grad():
        model.inner.weight[5] = model.inner.weight[1]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(model.bn1, name)[5] = getattr(model.bn1, name)[1]
        model.bn1.weight[7], model.bn1.bias[7] = 0.0, -1.0
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    path = tmp_path_factory.mktemp("reviewed") / "run"
    pv.analyze(residual_with_a_copy(), input_shape=(3, 16, 16), steps=12, out=path)
    return RunDirectory(path)


def _review(run: RunDirectory, decisions: dict[tuple[str, int], str]) -> Review:
    return Review(identity(run), decisions)


def _flagged(run: RunDirectory) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for verdict in run.read_decisions()["verdicts"]:
        found.setdefault(verdict["layer"], []).append(verdict["filter"])
    return found


def test_undecided_filters_follow_their_verdicts(run: RunDirectory) -> None:
    masks = reviewed_masks(run, _review(run, {}))
    assert masks == pv.load_masks(run.masks_file)
    assert masks.removed >= 2


def test_masks_follow_what_was_decided(run: RunDirectory) -> None:
    (copy,) = {1, 5} & set(_flagged(run)["inner"])
    decisions = {("inner", copy): "keep", ("inner", 7): "remove", ("inner", 0): "remove"}
    masks = reviewed_masks(run, _review(run, decisions))
    assert masks["inner"].tolist() == [number not in (0, 7) for number in range(8)]
    merged = {merge.filter for merge in masks.merges if merge.layer == "inner"}
    assert merged == {0, 7}
    assert masks.predicted is not None
    assert masks.predicted.damage > 0
    model, images = residual_with_a_copy(), torch.rand(4, 3, 16, 16)
    smaller = pv.remove_filters(model, masks, images[:1], compensate="merge")
    assert smaller.inner.out_channels == 6
    with torch.no_grad():
        torch.testing.assert_close(smaller(images).shape, model(images).shape)


def test_filters_of_one_channel_are_decided_together(run: RunDirectory) -> None:
    masks = reviewed_masks(run, _review(run, {("outer", 3): "remove"}))
    assert [layer for layer in ("stem", "outer", "project") if not masks[layer][3]] == [
        "stem",
        "outer",
        "project",
    ]
    with pytest.raises(
        UserError, match=r"keeps and removes what goes only together: filter 3 of .*, filter 3 of"
    ):
        reviewed_masks(run, _review(run, {("outer", 3): "remove", ("stem", 3): "keep"}))


def test_what_cannot_go_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    everything = {("inner", number): "remove" for number in range(8)}
    with pytest.raises(UserError, match="leaves no filter of inner"):
        reviewed_masks(run, _review(run, everything))
    torch.manual_seed(0)
    pv.analyze(Concatenating(), input_shape=(3, 16, 16), steps=3, out=tmp_path / "run")
    other = RunDirectory(tmp_path / "run")
    with pytest.raises(
        UserError, match="filter 1 of out cannot be removed: its filters are the network's output"
    ):
        reviewed_masks(other, _review(other, {("out", 1): "remove"}))


def _broken(**changes: Any) -> Callable[[RunDirectory], str]:
    return lambda run: json.dumps({"format": 1, "run": identity(run), "decisions": [], **changes})


def _deciding(layer: Any, number: Any, decision: Any) -> Callable[[RunDirectory], str]:
    return _broken(decisions=[{"layer": layer, "filter": number, "decision": decision}])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda run: "{", "is not a review"),
        (lambda run: "[]", "is not a review"),
        (_broken(format=2), "is not a review"),
        (_broken(run="ab" * 32), "is of another run"),
        (_broken(run=None), "is of another run"),
        (_broken(decisions={}), "no list of decisions"),
        (_broken(decisions=[3]), "is damaged"),
        (_deciding("inner", 1, "x"), "is damaged"),
        (_deciding("inner", True, "keep"), "is damaged"),
        (_deciding(["inner"], 1, "keep"), "is damaged"),
        (_deciding("inner", 8, "keep"), "filter 8 of inner, which the run does not have"),
        (_deciding("other", 0, "keep"), "filter 0 of other, which the run does not have"),
    ],
)
def test_files_that_are_no_review_of_the_run_get_one_line(
    run: RunDirectory, tmp_path: Path, make: Callable[[RunDirectory], str], says: str
) -> None:
    (tmp_path / "review.json").write_text(make(run))
    with pytest.raises(UserError, match=says):
        read_review(tmp_path / "review.json", run)


def test_masks_of_a_review_from_the_command_line(run: RunDirectory, tmp_path: Path) -> None:
    review, out = tmp_path / "review.json", tmp_path / "masks.pt"
    write_review(_review(run, {("inner", 7): "keep", ("inner", 0): "remove"}), review)
    assert read_review(review, run).decisions == {("inner", 7): "keep", ("inner", 0): "remove"}
    given = ["masks", str(run.path), "--review", str(review), "--out", str(out)]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, done.output
    assert "0 accepted, 1 rejected" in done.output
    masks = pv.load_masks(out)
    assert masks["inner"][7]
    assert not masks["inner"][0]
    assert masks.merges
    for more, says in (
        (["--ratio", "0.2"], "not both"),
        (["--review", str(tmp_path / "none")], "cannot be read"),
    ):
        refused = CliRunner().invoke(cli.app, [*given, *more])
        assert refused.exit_code == 2
        assert says in refused.output


# Served


@pytest.fixture
def server(run: RunDirectory) -> Iterator[ReviewServer]:
    with ReviewServer(run) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()
    made.review_file.unlink(missing_ok=True)


def _ask(
    server: ReviewServer, path: str, method: str = "GET", body: str = "", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body or None, named)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_the_report_is_served_below_the_token_alone(server: ReviewServer, run: RunDirectory) -> None:
    assert server.server_address[0] == "127.0.0.1"
    below = f"/{server.token}/"
    assert server.url.endswith(f"{below}index.html")
    status, body, headers = _ask(server, f"{below}index.html")
    assert (status, body) == (200, run.report_page.read_bytes())
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "*" not in str(headers)
    assert _ask(server, f"{below}assets/review.js")[2]["Content-Type"].startswith("text/javascript")
    for path in ("/", "/index.html", f"/{'x' * 32}/index.html", f"/{server.token}", f"{below}none.html"):
        assert _ask(server, path)[0] == 404
    for path in (
        "../run.json", "..%2frun.json", "%2e%2e/run.json", "/etc/passwd", "layers/../../run.json",
        "a%00b.html", "x" * 5000 + ".html", "layers", "",
    ):  # fmt: skip
        assert _ask(server, below + path)[0] == 404
    outside = run.report_page.parent / "link.html"
    outside.symlink_to(run.path / "run.json")
    assert _ask(server, f"{below}link.html")[0] == 404
    outside.unlink()


def test_requests_of_other_pages_are_refused(server: ReviewServer, run: RunDirectory) -> None:
    path = f"/{server.token}/review.json"
    review = json.dumps({"format": 1, "run": identity(run), "decisions": []})
    assert _ask(server, path, Host="evil.example")[0] == 421
    assert _ask(server, path, Host=f"localhost:{server.server_port}")[0] == 421
    assert _ask(server, path, "PUT", review, Origin="http://evil.example")[0] == 403
    assert _ask(server, path, "PUT", review, Origin="null")[0] == 403
    for method in ("POST", "DELETE", "OPTIONS"):
        assert _ask(server, path, method)[0] == 501
    assert not server.review_file.exists()


def test_reviews_are_saved_into_the_run(server: ReviewServer, run: RunDirectory) -> None:
    path, origin = f"/{server.token}/review.json", f"http://127.0.0.1:{server.server_port}"
    assert _ask(server, path)[0] == 404
    content = {
        "format": 1,
        "run": identity(run),
        "decisions": [{"layer": "inner", "filter": 7, "decision": "keep"}],
    }
    assert _ask(server, path, "PUT", json.dumps(content), Origin=origin)[0] == 200
    assert read_review(server.review_file, run).decisions == {("inner", 7): "keep"}
    assert json.loads(_ask(server, path)[1]) == content
    before = sha256(server.review_file)
    for body in ("{", json.dumps({**content, "run": "other"}), json.dumps({**content, "decisions": [1]})):
        assert _ask(server, path, "PUT", body)[0] == 409
    assert _ask(server, path, "PUT", "", Content_Length=str(2**40))[0] == 413
    assert _ask(server, f"/{server.token}/index.html", "PUT", "x")[0] == 404
    assert sha256(server.review_file) == before


def test_a_run_without_a_report_and_a_port_in_use_get_one_line(
    server: ReviewServer, run: RunDirectory, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--port {server.server_port}: .*; give another one"):
        ReviewServer(run, server.server_port)
    with pytest.raises(UserError, match="has no report"):
        ReviewServer(RunDirectory(tmp_path))
