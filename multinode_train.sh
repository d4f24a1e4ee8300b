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

# ── The machines meet ────────────────────────────────────────────────────────────────────────────────────────────────
# Before anything is launched each machine says to the main one who it is: a missing machine, a wrong address, a port
# that is taken and settings that differ show at once. Then this program becomes the launcher: `accelerate launch`.

program() {  # run by Python, with the settings above in its environment and accelerate's arguments behind it
    cat <<'PYTHON'  # the standard library is enough until all are here
import ctypes  # the system's own functions
import json  # what the machines tell each other
import os  # settings, in the environment
import select  # waits for several connections at a time
import signal  # Ctrl-C
import socket  # the network
import sys  # arguments, exit status
import time  # for NODE_WAIT

sys.path.pop(0)  # a torch.py in the current directory is not imported
numbers = ("NODE", "NUM_MACHINES", "NODE_WAIT", "MAIN_PORT")  # of the settings
rank, machines, limit, port = (int(os.environ[key]) for key in numbers)  # check() has seen that they are numbers
address, retries = os.environ["MAIN_NODE_IP"], os.environ.pop("MAX_RETRIES")  # the main machine's; this one's
facts = {key: os.environ[key] for key in ("NUM_MACHINES", "TOTAL_GPUS", "DEVICE")}  # have to be equal everywhere
HELLO = b"multinode_train.sh\n"  # what the main machine says first; any other listener stays silent or says more
clock = {"end": time.monotonic() + limit, "said": time.monotonic() - 8}  # when to give up; when it last said so


def say(words):  # stderr, as main.py's progress on stdout may be read by a program
    """Print one line."""
    print(f"multinode_train.sh: {words}", file=sys.stderr, flush=True)  # at once


def stop(words):  # does here what stop() does in the shell
    """End with a sentence and the status of a wrong call."""
    say(words)  # they name the next step
    sys.exit(2)  # with this status MAX_RETRIES does not try again


def reason(error):  # of an OSError, for the sentences below
    """Return the system's own words, without Python's."""
    return (error.strerror or str(error)).split(" (")[0]  # such as Connection refused


def patience(words):  # called about once a second
    """Say what is missing, once every ten seconds; give up after NODE_WAIT seconds."""
    now = time.monotonic()  # unlike the clock on the wall it is never put right
    if now > clock["end"]:  # nobody comes any more
        stop(f"given up after NODE_WAIT={limit} s: {words}")  # what was missing to the end
    if now >= clock["said"] + 10:  # first after two
        say(f"waiting: {words} ({clock['end'] - now:.0f} s left)")  # so that nobody wonders
        clock["said"] = now  # again in ten seconds


def wrong(theirs, place, here):  # looks at what one machine says of itself
    """Return what is wrong with a machine, a sentence or None. here (dict): the addresses of those that came before."""
    if theirs["rank"] in here and here[theirs["rank"]] != place:  # on the same machine it is only a new start
        both = f"{place} and {here[theirs['rank']]}"  # the addresses of the two machines
        return f"{both} both have rank {theirs['rank']}: give each machine its own"  # run_node1.sh was started on both
    differ = [f"{key} is {theirs.get(key)} at {place} and {facts[key]} on the main machine"  # both values
              for key in facts if theirs.get(key) != facts[key]]  # GPUs here and CPUs there cannot train together
    return "; ".join(differ) + ": make them the same on all machines" if differ else None  # all of them in one sentence


def host():  # on the main machine
    """Wait until all other machines have come, and let all begin."""
    try:  # to listen at the address, on any free port
        socket.create_server((address, 0)).close()  # works with own addresses only
    except OSError as error:  # of another machine, or a name that nobody knows
        fault = f"is no address of this machine ({reason(error)}), which has rank 0"  # as run_node0.sh was started
        stop(f"MAIN_NODE_IP={address} {fault}: start run_node0.sh on the machine that has it, "  # one way on
             "or set MAIN_NODE_IP on all to one of `hostname -I`")  # the other one
    try:  # to listen where the launcher will listen afterwards
        server = socket.create_server(("", port))  # at all addresses of this machine
    except OSError as error:  # also that of a run that has not ended
        stop(f"MAIN_PORT={port} cannot be used here ({reason(error)}): "  # most often it is in use
             "end what listens there (`ss -tlnp`), or set another MAIN_PORT on all machines")  # two ways on
    peers, here = {}, {}  # connections and addresses, by rank
    while len(peers) < machines - 1:  # until nobody is missing
        for ready in select.select([server, *peers.values()], [], [], 1)[0]:  # whoever has something to say
            if ready is not server:  # those that wait have nothing to say: it is gone
                peers = {key: peer for key, peer in peers.items() if peer is not ready}  # wait for it again
                continue  # its address stays known, so that another machine with its rank is noticed
            peer, (place, _) = server.accept()  # a connection and where it comes from
            try:  # perhaps a port scanner, or verify_setup.sh
                peer.settimeout(5)  # seconds for the next two lines, as it may say nothing
                peer.sendall(HELLO)  # asks it to say who it is
                theirs = json.loads(peer.recv(4096))  # its facts and its rank, 100 bytes
                sentence = wrong(theirs, place, here)  # None for a machine that belongs here
            except (OSError, ValueError, KeyError, TypeError):  # it does not speak as join() does
                continue  # as if nobody had come
            if sentence:  # these machines cannot train together
                for other in (peer, *peers.values()):  # also those with nothing wrong
                    other.sendall(sentence.encode())  # each says it, and ends
                stop(sentence)  # this machine as well
            peers[theirs["rank"]], here[theirs["rank"]] = peer, place  # one machine fewer to wait for
        missing = [str(key) for key in range(1, machines) if key not in peers]  # the ranks of the others
        if missing:  # the user shall know which
            patience(f"rank {', '.join(missing)} has not come to {address}:{port}; "  # after a while:
                     "start run_node1.sh there, with this MAIN_NODE_IP and MAIN_PORT")  # or open the firewall
    for peer in peers.values():  # all machines are here
        peer.sendall(b"go")  # ends the waiting in join()
    server.close()  # the launcher takes the port over


def join():  # on the other machines
    """Wait until the main machine says that all are here."""
    while True:  # ends with the sign to go, or in patience() after NODE_WAIT seconds
        state = "cannot be reached"  # holds unless the next line succeeds
        try:  # the main machine may not be up yet
            with socket.create_connection((address, port), 5) as peer:  # 5 seconds: a firewall may just swallow it
                state = "is in use by something else than multinode_train.sh"  # holds unless it says HELLO
                if peer.recv(100) != HELLO:  # a silent one ends in a TimeoutError; nothing was sent to it
                    raise OSError("a wrong answer")  # is said like the other reasons, below
                peer.sendall(json.dumps(facts | {"rank": rank}).encode())  # says who we are
                while not select.select([peer], [], [], 1)[0]:  # a third machine may be late
                    patience(f"the main machine {address} is there, another one is missing")  # the main one says which
                answer = peer.recv(4096).decode()  # empty when it has ended
                if answer == "go":  # all machines are here
                    return  # to load torch, or to start the training
                if answer:  # it has found something wrong
                    stop(answer)  # the same sentence on all machines
        except OSError as error:  # refused, no route, unknown name, silence
            patience(f"{address}:{port} {state} ({reason(error)}); start run_node0.sh there, and check "  # what is
                     "MAIN_NODE_IP, MAIN_PORT and its firewall")  # wrong most often
        time.sleep(1)  # before the next try


meet = join if rank else host  # the main machine counts those that come
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the waiting without a traceback
if retries != "0":  # the shell waits for this process, to start it again
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # its death ends the launcher, too (PR_SET_PDEATHSIG)
if machines > 1:  # one machine has nobody to meet
    meet()  # before seconds are spent on loading torch
from accelerate.commands.launch import main  # what `accelerate launch` calls
from torch.distributed import DistError  # the launchers lost each other
from torch.distributed.elastic.multiprocessing.api import SignalException  # SIGTERM, Ctrl-C
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # main.py has failed

if machines > 1:  # torch loads in 2 seconds here and in 30 there
    meet()  # from here on all go on at the same time
try:  # starts the processes and watches them
    main()  # with accelerate's arguments, in sys.argv
except ChildFailedError as error:  # its traceback is about the launcher, not about main.py
    number, failure = error.get_first_failure()  # the first of this machine's processes to fail
    say(f"rank {number} ended with {'signal' if failure.exitcode < 0 else 'status'} {abs(failure.exitcode)}")  # 9: kill
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)  # signals as in a shell: 137 for 9
except SignalException as error:  # main.py has saved a checkpoint
    sys.exit(128 + error.sigval)  # 143 after SIGTERM, 130 after Ctrl-C
except DistError as error:  # between the meeting and the start of main.py
    say(f"the launchers lost each other: {' '.join(str(error).split())[:300]}")  # torch's own words
    sys.exit(1)  # a status that MAX_RETRIES tries again
PYTHON
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
    export NODE DEVICE MAIN_NODE_IP MAIN_PORT NUM_MACHINES TOTAL_GPUS NODE_WAIT MAX_RETRIES  # for the program above
    training+=(--output_dir "$OUTPUT_DIR")  # given twice, the last one counts
    if ((TOTAL_GPUS == 1)); then  # a launcher around a single process would keep signals from it
        exec python "$here/main.py" "${training[@]}"  # gets the signals itself, in the place of this shell
    fi
    local command=(python -c "$(program)"  # in the place of: accelerate launch
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
