import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import prune_viz as pv

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    "scripts/setup.sh", "scripts/demo.sh", "scripts/test.sh", "scripts/efficientnet_lite0.sh", ".ci/run",
]  # fmt: skip


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pv.__version__ == project["version"]
    assert f"## [{pv.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert project["scripts"] == {"prune-viz": "prune_viz.cli:main"}
    assert (ROOT / "prune_viz" / "py.typed").exists()


def test_every_name_is_there() -> None:
    assert set(pv.__all__) <= set(dir(pv))
    for name in pv.__all__:
        assert getattr(pv, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = pv.nothing_like_it


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import prune_viz, sys; dir(prune_viz); print({'torch', 'numpy', 'rich', 'typer'} & set(sys.modules))"
    )
    assert python(code) == "set()\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert script.endswith("setup.sh") or os.access(ROOT / script, os.X_OK)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts, with a virtual environment whose tools only write down how they are called."""
    root = tmp_path / "check out"
    for name in [*SCRIPTS, "pyproject.toml"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((ROOT / name).read_text())
        (root / name).chmod(0o755)
    tools = root / ".venv" / "bin"
    tools.mkdir(parents=True)
    for tool in ("python", "prune-viz", "ruff", "mypy"):
        forward = f'if [ "$1" = - ]; then exec "{sys.executable}" "$@"; fi\n' if tool == "python" else ""
        (tools / tool).write_text(f'#!/bin/bash\n{forward}echo "{tool} $*" >> "{root}/calls"\n')
        (tools / tool).chmod(0o755)
    return root


def calls(checkout: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """Run a script from another directory; what it called."""
    (checkout / "calls").write_text("")
    clean = {name: value for name, value in os.environ.items() if name != "CI"}
    subprocess.run(
        [checkout / script, *arguments],
        cwd="/",
        env={**clean, **environment},
        check=True,
        capture_output=True,
    )
    return (checkout / "calls").read_text().splitlines()


def test_a_second_run_installs_nothing(checkout: Path) -> None:
    assert [call for call in calls(checkout, "scripts/demo.sh") if "install" in call] == [
        "python -m pip install --quiet --disable-pip-version-check -e ."
    ]
    assert calls(checkout, "scripts/demo.sh", "--out", "a b") == ["prune-viz demo --out a b"]
    assert sum("pip install" in call for call in calls(checkout, "scripts/test.sh")) == 2
    checks = ["ruff check .", "ruff format --check .", "mypy "]
    tests = f"python -m pytest -n {len(os.sched_getaffinity(0)) + 1} --dist loadfile --no-loadscope-reorder"
    assert calls(checkout, "scripts/test.sh", "-k", "x") == [*checks, f"{tests} -k x"]
    everything = f"{tests} -m slow or not slow --durations=40"
    assert calls(checkout, "scripts/test.sh", CI="true", OMP_NUM_THREADS="1") == [*checks, everything]
    with (checkout / "pyproject.toml").open("a") as stream:
        stream.write("# changed\n")
    assert any("pip install" in call for call in calls(checkout, "scripts/demo.sh"))


def test_a_failed_installation_is_tried_again(checkout: Path) -> None:
    tool = checkout / ".venv" / "bin" / "python"
    good = tool.read_text()
    tool.write_text(good + 'case "$*" in *install*) exit 1;; esac\n')
    with pytest.raises(subprocess.CalledProcessError):
        calls(checkout, "scripts/demo.sh")
    tool.write_text(good)
    assert any("pip install" in call for call in calls(checkout, "scripts/demo.sh"))
