# Sourced by the other scripts: goes to the repository root and makes .venv hold what they need.
#
#   install_once NAME ARGUMENTS...   pip install ARGUMENTS, once for each state of pyproject.toml

cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
VENV_PYTHON=.venv/bin/python

if [ ! -x "$VENV_PYTHON" ]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or later is needed; set PYTHON to one" >&2
        exit 2
    fi
    echo "making .venv"
    "$PYTHON" -m venv .venv
fi

install_once() {
    local stamp=".venv/.installed-$1" state
    shift
    state="$("$VENV_PYTHON" - "$@" <<'PYTHON'
import hashlib, pathlib, sys
print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes() + repr(sys.argv[1:]).encode()).hexdigest())
PYTHON
)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
        return
    fi
    echo "installing: $*"
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || "$VENV_PYTHON" -m ensurepip --upgrade
    local quiet=--quiet
    if [ -t 1 ]; then quiet=--progress-bar=on; fi
    "$VENV_PYTHON" -m pip install "$quiet" --disable-pip-version-check "$@"
    echo "$state" >"$stamp"
}
