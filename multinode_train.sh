#!/usr/bin/env bash
# Training on several machines: the guide, and what run_node0.sh and run_node1.sh start.
#
#     bash multinode_train.sh                        prints the guide
#     bash multinode_train.sh RANK [main.py flags]   starts this machine's part; RANK is 0 on the main machine

set -euo pipefail  # a step that fails ends the script

# ── Settings: each is also an environment variable ───────────────────────────────────────────────────────────────────

MAIN_PORT=${MAIN_PORT:-29500}  # TCP port of the main machine, open in its firewall
NUM_MACHINES=${NUM_MACHINES:-2}  # they have the ranks 0 to NUM_MACHINES - 1
OUTPUT_DIR=${OUTPUT_DIR:-/shared/outputs/gemma-270m}  # on storage that all machines share
NODE_WAIT=${NODE_WAIT:-600}  # seconds until a machine gives up on missing ones
MAX_RETRIES=${MAX_RETRIES:-0}  # how often this machine joins in again after a loss

training=(--dataset_name wikitext --bf16)  # main.py's flags where none are given

# MAIN_NODE_IP, GPUS and TOTAL_GPUS stand at the top of run_node0.sh and run_node1.sh, for people to edit, and are read
# from there when this script is called without them. A third machine takes those of run_node1.sh.
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # absolute: users may call from anywhere
node=$here/run_node${1:-0}.sh  # the guide shows the main machine's settings
[ -f "$node" ] || node=$here/run_node1.sh  # no script bears the rank of a third machine
eval "$(grep -E '^ *(export )?(MAIN_NODE_IP|GPUS|TOTAL_GPUS)=' "$node")"  # runs only these lines of the script

# ── Guide ────────────────────────────────────────────────────────────────────────────────────────────────────────────

guide() {  # printed when no rank is given
    cat <<TEXT  # shows the settings as they are now
On the machine with the address MAIN_NODE_IP:   bash run_node0.sh [main.py flags]
On the other one:                               bash run_node1.sh [the same flags]

The settings are now, where the environment goes before the files:
  at the top of run_node0.sh and run_node1.sh   MAIN_NODE_IP=$MAIN_NODE_IP GPUS=$GPUS TOTAL_GPUS=$TOTAL_GPUS
  at the top of multinode_train.sh              MAIN_PORT=$MAIN_PORT NUM_MACHINES=$NUM_MACHINES OUTPUT_DIR=$OUTPUT_DIR
                                                NODE_WAIT=$NODE_WAIT MAX_RETRIES=$MAX_RETRIES
All but GPUS are the same on all machines.

  2 machines × 2 GPUs   as it is
  2 machines × 4 GPUs   GPUS=0,1,2,3 TOTAL_GPUS=8
  3 machines × 2 GPUs   NUM_MACHINES=3 TOTAL_GPUS=6, and on the third, with run_node1.sh as on the second:
                        bash multinode_train.sh 2 [the same flags]
  unequal machines      accelerate gives each the same number of processes: use the smaller number on all

The machines wait NODE_WAIT seconds for each other. After the loss of one the others end; with MAX_RETRIES=5 on all
they wait for it to be started again, and go on from the last checkpoint.

OUTPUT_DIR must be on storage that all machines share. Without flags wikitext-2 is trained; flags replace that.
By hand, on all machines alike, with R the rank of the machine; without --multi_gpu accelerate starts a single process
where there is no GPU:

  CUDA_VISIBLE_DEVICES=$GPUS accelerate launch --num_machines $NUM_MACHINES \\
      --num_processes $TOTAL_GPUS --machine_rank R --main_process_ip $MAIN_NODE_IP --main_process_port $MAIN_PORT \\
      --multi_gpu main.py ${training[*]} --output_dir $OUTPUT_DIR
TEXT
}

# ── Launch ───────────────────────────────────────────────────────────────────────────────────────────────────────────

launch() {  # takes the rank of this machine and flags of main.py
    export NODE=$1  # the rank: launch.py finds out whether it is a number
    shift  # leaves main.py's flags
    case " $* " in *" --output_dir"[\ =]* | *" --output-dir"[\ =]*)  # OUTPUT_DIR would silently replace it
        echo "multinode_train.sh: set OUTPUT_DIR=DIRECTORY instead of --output_dir" >&2  # one sentence
        exit 2 ;;  # the status of a wrong call
    esac
    (($# == 0)) || training=("$@")  # given flags replace the example
    export MAIN_NODE_IP MAIN_PORT NUM_MACHINES GPUS TOTAL_GPUS OUTPUT_DIR NODE_WAIT MAX_RETRIES  # launch.py checks them
    export CUDA_VISIBLE_DEVICES=$GPUS  # the processes see these GPUs as 0, 1 and so on

    [ ! -x "$here/.venv/bin/python" ] || PATH=$here/.venv/bin:$PATH  # made by the quickstart or the tests
    local python=python  # its name in every virtual environment
    command -v python >/dev/null || python=python3  # Debian and Ubuntu have no other name
    exec "$python" "$here/tools/launch.py" "${training[@]}" --output_dir "$OUTPUT_DIR"  # launch.py gets the signals
}

if (($# == 0)) || [[ $1 =~ ^(-h|--help)$ ]]; then  # no rank is given
    guide  # ends with status 0
else  # a rank, perhaps flags of main.py
    launch "$@"  # does not return
fi
