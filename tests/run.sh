#!/usr/bin/env bash
# Runs the tests on a fresh machine: needs Python 3.10 or newer with venv, and pip.
#
#     bash tests/run.sh             everything: also the quickstart on the real weights, in a fresh copy
#     bash tests/run.sh --fast      about four minutes: the tiny model only
#     bash tests/run.sh -k csv      further words go to pytest
#     bash tests/run.sh --gpu       ten minutes on a GPU: values, then speeds; installs nothing (docs/gpu.md)

set -euo pipefail  # a step that fails ends the run
[ -z "${OUT:-}" ] || OUT=$(realpath -m -- "$OUT")  # a folder for the tables of --gpu, from where we are
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."  # the paths below are those of the repository

if [ "${1:-}" = --gpu ]; then  # uses what the machine has: no network, no environment of its own
    shift  # the rest belongs to benchmarks/gpu.py
    python=${PYTHON:-.venv/bin/python}  # the one that is asked for, or that of the README's commands
    has_torch="import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"  # answers without importing it
    [ -n "${PYTHON:-}" ] || "$python" -c "$has_torch" 2>/dev/null || python=python3  # a machine with packages of its own
    command -v "$python" >/dev/null || { echo "tests/run.sh: error: no $python here: set PYTHON" >&2; exit 2; }  # a slip
    case " $* " in *" --help "* | *" -h "*) exec "$python" benchmarks/gpu.py --help ;; esac  # and no tests
    "$python" benchmarks/gpu.py --check "# On a GPU" "$@"  # says in a sentence what is missing: status 2
    trap 'exit 130' INT  # Ctrl-C ends all of it; the limit below ends the tests alone
    worst=0  # the exit status of the whole
    export TESTS_GPU=1  # lets pytest collect test_gpu.py, and the tests see the first GPU
    limit=(timeout --foreground --signal INT --kill-after 20 300)  # seconds: the speeds shall have their time
    "${limit[@]}" "$python" -m pytest -q --tb=short --durations=5 -p no:cacheprovider tests/test_gpu.py || worst=1  # values
    "$python" benchmarks/gpu.py "$@" || worst=1  # speeds also where a value is wrong
    exit "$worst"  # 0: all tests passed, all rows were measured
fi

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
    choice=(-m "not slow")  # about four minutes on two cores
fi
.venv/bin/ruff check .  # names, imports, line lengths
exec .venv/bin/python -m pytest -q --durations=10 "${choice[@]}" "$@"  # pytest's last line counts the tests
