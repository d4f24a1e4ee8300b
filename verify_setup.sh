#!/usr/bin/env bash
# Checks a machine before a training: one line a check, with what mends it. Nothing is installed, downloaded or changed.
#
#     bash verify_setup.sh              for training on this machine
#     bash verify_setup.sh 0            on the main one of several machines, with the settings of run_node0.sh
#     bash verify_setup.sh 1            on the other one, with the settings of run_node1.sh
#     bash verify_setup.sh --model DIR  with that model instead of google/gemma-3-270m
set -euo pipefail  # a step that fails ends the script
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # absolute: users may call from anywhere

export SEVERAL=no  # several machines: a fault of the network is a FAIL
[ "${NUM_MACHINES:-1}${MAIN_NODE_IP:-}" = 1 ] || SEVERAL=yes  # a setting of several machines is there
[ "${NUM_MACHINES:-}" != 1 ] || SEVERAL=no  # one machine, even if it has an address
node=0  # whose settings count: run_node0.sh
for word in "$@"; do  # a number is the rank of this machine among several
    if [[ $word =~ ^[0-9]+$ ]]; then  # a rank: the machine's script chooses its GPUs
        SEVERAL=yes node=$((word > 0))  # a third machine has the settings of run_node1.sh
    fi
done
[ "$SEVERAL" = yes ] || GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES:-}}  # chooses where no launcher does
export GPUS_GIVEN=${GPUS:+yes}  # GPUs that were asked for must exist
[ "$SEVERAL" = no ] || GPUS_GIVEN=yes  # also those of a machine's script

names='MAIN_NODE_IP|GPUS|TOTAL_GPUS|MAIN_PORT|NUM_MACHINES|OUTPUT_DIR'  # settings of several machines
own=${OUTPUT_DIR:-./outputs}  # where main.py writes by itself
eval "$(grep -hE "^ *(export )?($names)=" "$here/run_node$node.sh" "$here/multinode_train.sh")"  # the environment wins
[ "$SEVERAL" = yes ] || OUTPUT_DIR=$own  # a single machine needs no shared storage
for name in ${names//|/ }; do  # people edit the scripts
    if [ -z "${!name:-}" ]; then  # a line was removed, or has spaces around =
        echo "verify_setup.sh: no script sets $name: write export $name=VALUE into run_node$node.sh" >&2  # stderr
        exit 2  # a wrong call
    fi
    export "${name?}"  # preflight.py reads the environment
done
export MODEL=${MODEL:-google/gemma-270m}  # as in main.py

for python in "$here/.venv/bin/python" python python3 none; do  # the first one that is new enough
    ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || break  # transformers needs 3.10
done
if [ "$python" = none ]; then  # preflight.py itself would end with a SyntaxError
    found=$(python3 --version 2>/dev/null || echo "there is none")  # such as Python 3.9.18
    echo "FAIL  Python            $found -> install Python 3.10 or newer, with venv and pip"  # in the form of a check
    echo "0 passed, 0 warnings, 1 failed: mend what FAILs, then run this again"  # as preflight.py would
    exit 1  # the status of any FAIL
fi
export GONE=""  # the current directory, if it is gone
if ! [ . -ef "$PWD" ]; then  # it was removed, perhaps made anew
    GONE=$PWD  # one of the checks says so
    cd /  # Python cannot even start where no directory is
fi
exec "$python" "$here/tools/preflight.py" "$@"  # its exit status is the script's
