#!/usr/bin/env bash
# Runs the tests on a fresh machine: needs Python 3.10 or newer with venv, and pip.
#
#     bash tests/run.sh             everything: also the quickstart on the real weights, in a fresh copy
#     bash tests/run.sh --fast      about three minutes: the tiny model only
#     bash tests/run.sh -k csv      further words go to pytest

set -euo pipefail  # a step that fails ends the run
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."  # the paths below are those of the repository

stamp=.venv/tests-installed  # written when everything is installed
wanted=$(cat requirements.txt tests/requirements.txt | cksum)  # changes when one of them does
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then  # the first time, or after a change
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv  # the one that the quickstart uses, too
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt  # once
    echo "$wanted" >"$stamp"  # last: a stopped installation is done again
fi

choice=()  # all tests
if [ "${1:-}" = --fast ]; then  # leaves out what is marked slow
    shift  # the rest belongs to pytest
    choice=(-m "not slow")  # about three minutes on two cores
fi
.venv/bin/ruff check .  # names, imports, line lengths
exec .venv/bin/python -m pytest -q --durations=10 "${choice[@]}" "$@"  # pytest's last line counts the tests
