#!/usr/bin/env bash
# Checks a machine before a training: one line a check, with what mends it. Nothing is installed, downloaded or changed.
#
#     bash verify_setup.sh              for training on this machine
#     bash verify_setup.sh 0            on the main one of several machines, with the settings of run_node0.sh
#     bash verify_setup.sh 1            on the other one, with the settings of run_node1.sh
#     bash verify_setup.sh --model DIR  with that model instead of google/gemma-3-270m
set -euo pipefail  # a step that fails ends the script
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # in full, whatever directory calls

export SEVERAL=no GPUS_GIVEN=${GPUS:+yes}  # GPUs that were asked for must exist; 2,3 is only a default
[ "${NUM_MACHINES:-1}${MAIN_NODE_IP:-}" = 1 ] || SEVERAL=yes  # one of the two is set: several machines are meant
[ "${NUM_MACHINES:-}" != 1 ] || SEVERAL=no  # one machine, even if it has an address
node=0  # whose settings count: run_node0.sh
for word in "$@"; do  # a number is the rank of this machine among several
    if [[ $word =~ ^[0-9]+$ ]]; then  # what is wrong with the network or the GPUs is a FAIL then
        SEVERAL=yes GPUS_GIVEN=yes node=$((word > 0))  # a third machine has the settings of run_node1.sh
    fi
done
eval "$(grep -E '^export (MAIN_NODE_IP|GPUS|TOTAL_GPUS)=' "$here/run_node$node.sh")"  # the environment goes before them
export MAIN_PORT=${MAIN_PORT:-29500} NUM_MACHINES=${NUM_MACHINES:-2}  # as in multinode_train.sh
export MODEL=${MODEL:-google/gemma-270m}  # as in main.py
OUTPUT=./outputs  # where main.py writes by itself
[ "$SEVERAL" = no ] || OUTPUT=/shared/outputs/gemma-270m  # as in multinode_train.sh
export OUTPUT_DIR=${OUTPUT_DIR:-$OUTPUT} PYTHONSAFEPATH=1 GONE=""  # no torch.py of the current directory is imported

[ ! -x "$here/.venv/bin/python" ] || PATH="$here/.venv/bin:$PATH"  # made by the quickstart or the tests
if ! python=$(command -v python || command -v python3); then  # a bare machine
    echo "FAIL  Python            there is none -> install Python 3.10 or newer, with venv and pip"  # as a check
    echo "0 passed, 0 warnings, 1 failed: mend what FAILs, then run this again"  # as preflight.py would
    exit 1  # the status of any FAIL
fi
if ! [ . -ef "$PWD" ]; then  # the current directory was removed, perhaps made anew
    GONE=$PWD  # one of the checks says so
    cd /  # Python cannot even start where no directory is
fi
exec "$python" "$here/tools/preflight.py" "$@"  # its exit status is the script's
