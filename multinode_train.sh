#!/usr/bin/env bash
# Training on several machines: the guide, and the one launcher that run_node0.sh and run_node1.sh call.
#
#     bash multinode_train.sh                      prints the guide
#     bash multinode_train.sh RANK [main.py flags] starts this machine's part; RANK is 0 on the main machine, 1, 2, …

set -euo pipefail  # a step that fails ends the script

# ── Settings: the same on every machine, but for GPUS ────────────────────────────────────────────────────────────────

MAIN_NODE_IP=${MAIN_NODE_IP:-192.168.1.100}  # the address of the machine with rank 0, as the others see it
MAIN_PORT=${MAIN_PORT:-29500}  # where it listens for them; open in its firewall
NUM_MACHINES=${NUM_MACHINES:-2}  # ranks 0 and 1
GPUS=${GPUS:-2,3}  # of this machine: leaves 0 and 1 to others
TOTAL_GPUS=${TOTAL_GPUS:-4}  # of all machines together: one process each
OUTPUT_DIR=${OUTPUT_DIR:-/shared/outputs/gemma-270m}  # on storage that all machines share

training=(--dataset_name wikitext --bf16)  # what is trained, unless flags are given: the same on all machines

# ── Guide ────────────────────────────────────────────────────────────────────────────────────────────────────────────

guide() {  # printed without arguments
    cat <<TEXT  # with the settings as they are now
On the machine with the address MAIN_NODE_IP:   bash run_node0.sh [main.py flags]
On the other one:                               bash run_node1.sh [the same flags]

Settings come from the environment, now: MAIN_NODE_IP=$MAIN_NODE_IP MAIN_PORT=$MAIN_PORT NUM_MACHINES=$NUM_MACHINES
GPUS=$GPUS TOTAL_GPUS=$TOTAL_GPUS OUTPUT_DIR=$OUTPUT_DIR

  2 machines × 2 GPUs   as it is
  2 machines × 4 GPUs   GPUS=0,1,2,3 TOTAL_GPUS=8
  3 machines × 2 GPUs   NUM_MACHINES=3 TOTAL_GPUS=6, and on the third: bash multinode_train.sh 2
  unequal machines      accelerate gives each the same number of processes: use the smaller number on all

OUTPUT_DIR must be on storage that all machines share. Without flags wikitext-2 is trained; flags replace that.
By hand, with R the rank of the machine:

  CUDA_VISIBLE_DEVICES=$GPUS accelerate launch --num_machines $NUM_MACHINES \\
      --num_processes $TOTAL_GPUS --machine_rank R --main_process_ip $MAIN_NODE_IP --main_process_port $MAIN_PORT \\
      --multi_gpu main.py ${training[*]} --output_dir $OUTPUT_DIR
TEXT
}

# ── Launch ───────────────────────────────────────────────────────────────────────────────────────────────────────────

stop() {  # the end of every wrong call
    echo "multinode_train.sh: $1" >&2  # one sentence that says what to do
    exit 2  # as main.py does
}

launch() {  # this machine's part of the training
    local rank=$1  # 0 is the main machine
    shift  # what is left are flags of main.py
    [[ $rank =~ ^[0-9]+$ ]] || stop "the rank is a number, 0 on the main machine, not '$rank'"  # a forgotten rank
    ((rank < NUM_MACHINES)) || stop "rank $rank needs NUM_MACHINES=$((rank + 1)) or more, on every machine"  # from 0 on
    ((TOTAL_GPUS % NUM_MACHINES == 0)) ||  # or accelerate would silently start fewer
        stop "TOTAL_GPUS=$TOTAL_GPUS cannot be shared evenly by NUM_MACHINES=$NUM_MACHINES"  # its sum over all machines
    (($# == 0)) || training=("$@")  # yours instead of the example

    local here  # where main.py is, whatever directory calls
    here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # in full
    [ ! -x "$here/.venv/bin/python" ] || export PATH="$here/.venv/bin:$PATH"  # made by the quickstart or the tests
    export CUDA_VISIBLE_DEVICES=$GPUS  # the processes see them as 0, 1, …; without GPUs they train on the CPU
    if ((NUM_MACHINES > 1)) && [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then  # for gloo, on CPUs
        # Gloo would take the interface of the host name, which often is the loopback that no other machine reaches.
        GLOO_SOCKET_IFNAME=$(ip -o route get "$MAIN_NODE_IP" | sed -n 's/.* dev \([^ ]*\).*/\1/p')  # towards it
        export GLOO_SOCKET_IFNAME  # such as eth0; lo on the main node itself is put right below
        [ "$GLOO_SOCKET_IFNAME" != lo ] || [[ $MAIN_NODE_IP == 127.* ]] ||  # its own address is routed over loopback
            GLOO_SOCKET_IFNAME=$(ip -o -4 addr show to "$MAIN_NODE_IP" | awk '{print $2; exit}')  # whose address it is
    fi

    if ((TOTAL_GPUS == 1)); then  # a launcher around a single process would keep signals from it
        exec python "$here/main.py" "${training[@]}" --output_dir "$OUTPUT_DIR"  # no shell stays in between
    fi
    local machines=(  # how the processes find each other
        --num_machines "$NUM_MACHINES" --num_processes "$TOTAL_GPUS" --machine_rank "$rank"  # all of them
        --main_process_ip "$MAIN_NODE_IP" --main_process_port "$MAIN_PORT"  # where all meet
        --multi_gpu --mixed_precision no  # also without GPUS; main.py's own --bf16 decides
    )
    exec accelerate launch "${machines[@]}" "$here/main.py" "${training[@]}" --output_dir "$OUTPUT_DIR"  # takes signals
}

if (($# == 0)); then  # nothing said
    guide  # what there is to say
else  # a rank, and perhaps flags
    launch "$@"  # does not come back
fi
