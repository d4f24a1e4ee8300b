#!/usr/bin/env bash
# Training on several machines: the guide, and the one launcher that run_node0.sh and run_node1.sh call.
#
#     bash multinode_train.sh                      prints the guide
#     bash multinode_train.sh RANK [main.py flags] starts this machine's part; RANK is 0 on the main machine, 1, 2, …

set -euo pipefail  # a step that fails ends the script

# ── Settings: the same on every machine, but for GPUS ────────────────────────────────────────────────────────────────

MAIN_NODE_IP=${MAIN_NODE_IP:-192.168.1.100}  # the address of the machine with rank 0, as the others see it
MAIN_PORT=${MAIN_PORT:-29500}  # where it listens for them; open in its firewall
NUM_MACHINES=${NUM_MACHINES:-2}  # they have the ranks 0, 1, and so on
GPUS=${GPUS:-2,3}  # of this machine: leaves 0 and 1 to others
TOTAL_GPUS=${TOTAL_GPUS:-4}  # of all machines together: one process each
OUTPUT_DIR=${OUTPUT_DIR:-/shared/outputs/gemma-270m}  # on storage that all machines share
NODE_WAIT=${NODE_WAIT:-600}  # seconds that a machine waits for the others before the launch, with a line every ten
MAX_RETRIES=${MAX_RETRIES:-0}  # how often this machine joins in again after it has lost another

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

The machines wait NODE_WAIT=$NODE_WAIT seconds for each other. After the loss of one the others end; with MAX_RETRIES=5
on all (now $MAX_RETRIES) they wait for it to be started again, and go on from the last checkpoint.

OUTPUT_DIR must be on storage that all machines share. Without flags wikitext-2 is trained; flags replace that.
By hand, on all machines alike, with R the rank of the machine:

  CUDA_VISIBLE_DEVICES=$GPUS accelerate launch --num_machines $NUM_MACHINES \\
      --num_processes $TOTAL_GPUS --machine_rank R --main_process_ip $MAIN_NODE_IP --main_process_port $MAIN_PORT \\
      --multi_gpu main.py ${training[*]} --output_dir $OUTPUT_DIR
TEXT
}

# ── Launch ───────────────────────────────────────────────────────────────────────────────────────────────────────────

stop() {  # the end of every wrong call
    echo "multinode_train.sh: $1" >&2  # one sentence that says what to do
    exit 2  # the status that main.py has for it, too
}

check() {  # what this machine can tell by itself
    local name listed gpu count each needed advice  # names that only this function uses
    for name in MAIN_PORT NUM_MACHINES TOTAL_GPUS NODE_WAIT MAX_RETRIES; do  # the settings that are numbers
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || stop "$name is a number, not '${!name}'"  # 08 is octal to bash
    done
    [[ $NODE =~ ^(0|[1-9][0-9]{0,8})$ ]] ||  # it was forgotten, and a flag of main.py stands in its place
        stop "the rank is a number, 0 on the main machine, not '$NODE'"  # the guide says so, too
    ((NODE < NUM_MACHINES)) ||  # ranks count from 0
        stop "rank $NODE needs NUM_MACHINES=$((NODE + 1)) or more, on every machine"  # else the others would not wait
    ((TOTAL_GPUS > 0 && TOTAL_GPUS % NUM_MACHINES == 0)) ||  # or accelerate would silently start fewer
        stop "TOTAL_GPUS=$TOTAL_GPUS cannot be shared evenly by NUM_MACHINES=$NUM_MACHINES"  # each starts as many
    each=$((TOTAL_GPUS / NUM_MACHINES))  # processes on this machine
    [[ $GPUS =~ ^[A-Za-z0-9/-]+(,[A-Za-z0-9/-]+)*$ ]] || stop "GPUS is a list such as 2,3, not '$GPUS'"  # no spaces

    listed=$(nvidia-smi -L 2>/dev/null) || listed=""  # a line for each GPU, and for each part of one (MIG)
    count=$(grep -c '^GPU ' <<<"$listed") || DEVICE=CPU  # grep fails when it counts none
    if [ "$DEVICE" = CPU ]; then  # to try it out, and for tests
        echo "multinode_train.sh: no GPU here: $each of the $TOTAL_GPUS processes train on this CPU" >&2  # slowly
    else  # what is asked for must be there
        for gpu in ${GPUS//,/ }; do  # numbers, or names such as GPU-8d7d…
            if [[ $gpu =~ ^[0-9]+$ ]] && ((10#$gpu < count)) || grep -q -- "UUID: $gpu" <<<"$listed"; then  # exists
                continue  # to the next of GPUS
            fi
            stop "GPUS=$GPUS: there is no GPU $gpu among the $count here; \`nvidia-smi -L\` lists them"  # from 0 on
        done
        gpu=${GPUS//[!,]/}  # one comma fewer than GPUs
        needed="TOTAL_GPUS=$TOTAL_GPUS over NUM_MACHINES=$NUM_MACHINES are $each here"  # one GPU for each process
        ((${#gpu} + 1 >= each)) || stop "$needed: GPUS=$GPUS lists fewer"  # the last process would find none
    fi

    mkdir -p -- "$OUTPUT_DIR" 2>/dev/null || true  # the next line finds out whether it is there
    advice="mount the shared storage, or choose another directory"  # every process writes a part of a checkpoint
    [ -w "$OUTPUT_DIR" ] || stop "OUTPUT_DIR=$OUTPUT_DIR cannot be written: $advice"  # hours before the first one
}

launch() {  # this machine's part of the training
    NODE=$1 DEVICE=GPU  # the rank of this machine; check() may find that it has no GPU
    shift  # what is left are flags of main.py
    (($# == 0)) || training=("$@")  # the flags that were given instead of the example
    check  # ends with a sentence unless all is well

    local here status tries again  # where main.py is; how it ended, how often; what is said then
    here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # in full, whatever directory calls
    [ ! -x "$here/.venv/bin/python" ] || export PATH="$here/.venv/bin:$PATH"  # made by the quickstart or the tests
    export CUDA_VISIBLE_DEVICES=$GPUS  # the processes see them as 0, 1, …; without GPUs they train on the CPU
    export NODE DEVICE MAIN_NODE_IP MAIN_PORT NUM_MACHINES TOTAL_GPUS NODE_WAIT MAX_RETRIES  # for tools/launch.py
    training+=(--output_dir "$OUTPUT_DIR")  # given twice, the last one counts
    if ((TOTAL_GPUS == 1)); then  # a launcher around a single process would keep signals from it
        exec python "$here/main.py" "${training[@]}"  # gets the signals itself, in the place of this shell
    fi
    local command=(python "$here/tools/launch.py"  # the machines meet, then it is `accelerate launch`
        --num_machines "$NUM_MACHINES" --num_processes "$TOTAL_GPUS" --machine_rank "$NODE"  # of all machines together
        --main_process_ip "$MAIN_NODE_IP" --main_process_port "$MAIN_PORT" --rdzv_conf timeout=60  # where all meet
        --gpu_ids all --multi_gpu  # those of CUDA_VISIBLE_DEVICES, whatever `accelerate config` was told; also on CPUs
        --mixed_precision no --dynamo_backend no  # main.py's own --bf16 decides
        "$here/main.py" "${training[@]}"  # the same on every machine
    )
    ((MAX_RETRIES > 0)) || exec "${command[@]}"  # signals reach the launcher, and its status is ours

    set -m  # a process group of its own for the launcher: Ctrl-C comes here, and is passed on, once
    local stopped="" launcher=0  # the signal that came here; none so far
    trap 'stopped=143; kill -TERM "$launcher" 2>/dev/null || true' TERM INT  # it saves a checkpoint and ends
    for ((tries = 0; ; tries++)); do  # until it is done, or hopeless
        "${command[@]}" &  # beside this shell, which has to hear signals
        launcher=$!  # the process that the trap above signals
        while status=0; wait "$launcher" || status=$?; kill -0 "$launcher" 2>/dev/null; do :; done  # a signal ends wait
        case $stopped$status in  # 2: a wrong call; 130, 143: stopped here or on another machine
            0 | 2 | 130 | 143*) exit "${stopped:-$status}" ;;  # going on is not asked for, or would not help
        esac
        ((tries < MAX_RETRIES)) || exit "$status"  # tried often enough
        again="joining in again, $((tries + 1)) of MAX_RETRIES=$MAX_RETRIES"  # the others do the same
        echo "multinode_train.sh: status $status; $again" >&2  # then training goes on from the last checkpoint
    done
}

if (($# == 0)); then  # called without a rank
    guide  # tells how to call it
else  # a rank, and perhaps flags of main.py
    launch "$@"  # ends this script with the status of the training
fi
