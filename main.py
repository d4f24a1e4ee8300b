"""Fine-tune Google's Gemma 3 270M on your own text.

    python main.py --train_file data/train.jsonl --validation_file data/val.jsonl --bf16

The file is in the order of a run, and main(), its last function, is the table of contents:

    argv ─▶ parse_args ────────────── a slip is answered at once: torch and its kin are imported below
    join_group, check_plan ────────── several processes meet, agree, and from here on end together
    find_checkpoint ───────────────── where an earlier call of the same command has stopped, if one has
    load_model ────────────────────── float32 weights; 16-bit products come from autocast
    load_and_prepare_dataset ──────── read_texts ─▶ tokenize_texts ─▶ group_texts: chunks of one length
    make_trainer ──────────────────── the Trainer, lean norms, windowed attention on a GPU, compiled layers
    use_chunked_loss ──────────────── a loss that never holds all logits
    train_and_save ────────────────── .staging ─▶ checkpoint-N, curves ─▶ the finished model in output_dir
"""
import argparse  # parses the command line
import atexit  # closes the process group before Python ends
import csv  # rows of .csv files, with their line numbers
import ctypes  # prctl, which Python has no function for
import fcntl  # the lock on output_dir
import gc  # frees objects that refer to each other, such as a Trainer
import gzip  # reads .gz files without unpacking them first
import hashlib  # SHA-256 of checkpoints, weights and data
import importlib.util  # finds a package without importing it
import json  # data, manifests, error files
import math  # perplexity is exp(loss)
import multiprocessing  # finds data loaders that outlive the training
import os  # paths and the environment
import re  # names of flags, of checkpoints, of GPUs
import resource  # the most memory that this process has held
import runpy  # runs tools/advice.py once something is wrong
import shutil  # removes directories, measures disks
import signal  # SIGTERM and Ctrl-C
import socket  # names and addresses of machines
import sys  # arguments, exit status, standard error
import tempfile  # tries whether a directory can be written
import time  # speed, and the seconds of all calls
import warnings  # silences one of torch's
from contextlib import contextmanager, nullcontext, suppress  # with statements: our own, none, without errors
from dataclasses import dataclass, field  # state whose fields are listed in one place
from datetime import timedelta  # how torch takes a timeout
from glob import escape, glob  # expands "data/*.jsonl" where the shell did not
from importlib.metadata import version  # of a package, without importing it
from os.path import abspath, basename, dirname, exists, getsize, isdir, isfile, join, lexists, realpath  # paths

DOCUMENTS = (".txt", ".md")  # a file is one text, unless --sample_by cuts it
FORMATS = (*DOCUMENTS, ".json", ".jsonl", ".csv", ".tsv", ".parquet")  # the others hold a text in each row
SPEAKER = os.environ.get("LOCAL_RANK", "0") == "0"  # True in one process of each machine, the one that speaks
ADD_UP = ("--train_file", "--validation_file", "--sample_prompt")  # flags that may be repeated
PARTIAL = "makes checkpoints that no run can go on from"  # no optimizer state, or only one rank's part
REFUSED = {  # flags of the Trainer that would break a promise of the README, and why
    "--save_only_model": PARTIAL, "--enable_jit_checkpoint": PARTIAL,  # no optimizer; a SIGTERM handler
    "--save_on_each_node": PARTIAL, "--fsdp": PARTIAL, "--deepspeed": PARTIAL,  # each process saves a part
    "--auto_find_batch_size": "changes the effective batch in the middle of a run",  # for GPUs that are full
    "--dataloader_drop_last": "leaves chunks out of every epoch and evaluation",  # a smaller batch is fine
    "--ignore_data_skip": "lets a stopped run go on with other data",  # skipping a million batches takes 2 s
    "--dataloader_in_order": "trains in an order that no second run repeats",  # that of the fastest worker
    "--batch_eval_metrics": "leaves no loss of each chunk to make the mean of",  # every chunk counts once
    "--eval_do_concat_batches": "leaves no mean over all chunks",  # losses would come as one array per batch
    "--overwrite_output_dir": "would lose what an earlier run has made"}  # a flag of transformers 4

MISSING = "the folder tools/ is not beside main.py"  # what is tried before its use is not used then

# ── Command line ───────────────────────────────────────────────────────────────────────────────────
def log0(*lines):  # progress goes to standard output, from rank 0 alone
    if lines and os.environ.get("RANK", "0") == "0":  # launchers set RANK; a single process has none
        bars = sys.modules.get("tqdm")  # progress bars; here once the libraries are
        with bars.tqdm.external_write_mode() if bars else nullcontext():  # a line of its own, and the bar below it
            print(*lines, sep="\n", flush=True)  # flush: a log file shows the lines at once
def die(sentence, status=2, speaks=SPEAKER):  # ends the run; status 2: a wrong call or wrong data
    end = SystemExit(status)  # no Exception, so that no library catches or wraps it
    vars(end).update(sentence=sentence, speaks=speaks)  # read by reported(), and sent to other ranks
    raise end  # caught by reported(), which stands around everything
def die_if(wrong, sentence, status=2):  # wrong: any value; what is true or not empty ends the run
    if wrong:  # saves an if and a line at each check
        die(sentence, status)  # 2: the call or the data is wrong

@contextmanager  # makes `with reported():` possible
def reported():  # around the command line, the imports and main(): prints the sentence of die()
    try:  # the block of the with statement
        yield  # the block runs here; die() ends it by SystemExit
    except SystemExit as end:  # of die(), of --help or of a signal
        sentence = getattr(end, "sentence", "")  # what the user reads; empty for --help
        if sentence and "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun names a file for each rank
            with suppress(OSError), open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as note:  # read by launch.py
                json.dump({"message": sentence, "timestamp": int(time.time())}, note)  # in torchrun's format
        if sentence and end.speaks:  # one process a machine is enough
            line = f"\nmain.py: error: {sentence}\n"  # the first \n leaves a progress bar
            os.write(2, line.encode(sys.stderr.encoding, "backslashreplace"))  # a handler may not print()
        raise  # Python ends with the exit status
    except BrokenPipeError:  # of `main.py ... | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains once more at its end
        raise SystemExit(141) from None  # 128 + SIGPIPE, as a shell shows it; nothing is said

def ask(topic, *facts, otherwise=""):  # topic: "report.plan" is the function plan() of tools/report.py
    file, name = topic.split(".")  # read only when it is needed; otherwise: where main.py stands alone
    path = join(dirname(realpath(__file__)), "tools", f"{file}.py")  # has what is around a training
    return runpy.run_path(path)[name](*facts) if isfile(path) else otherwise  # what the function returns
def advice(topic, *facts):  # → what tools/advice.py knows of something wrong, or ""
    return ask(f"advice.{topic}", *facts)  # words
def refuse(topic, *facts):  # ends the run, if tools/advice.py finds a fault, which would show later or never
    fault = advice(topic, *facts)  # a sentence, or ""
    die_if(fault, fault)  # with status 2
def bounded(kind, low, above=False):  # a type for argparse: a finite int or float, at least low, or above it
    def read(text):  # argparse passes the text behind a flag
        value = kind(text)  # ValueError becomes "invalid whole number value: '1e-3'"
        if not low <= value < math.inf or (above and value == low):  # nan fails every comparison
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low}")  # parser.error
        return value  # what args will hold
    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse puts this name into its sentence
    return read  # argparse calls read() on each value
def switched(text):  # a type for argparse: what stands behind --bf16, as other trainers write it
    if text.lower() not in ("true", "false"):  # a stray word
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")  # parser.error
    return text.lower() == "true"  # bool
def trainer_flags():  # names of the Trainer's 114 flags, read from its source in milliseconds
    package = importlib.util.find_spec("transformers")  # importing transformers would take seconds
    die_if(package is None, "transformers is not installed: pip install -r requirements.txt")  # a new machine
    with open(join(dirname(package.origin), "training_args.py"), encoding="utf-8") as source:  # as plain text
        return re.findall(r"^    (\w+): .*= field\(", source.read(), re.MULTILINE)  # "    seed: int = field("

def parse_args(argv=None):  # list[str], or None for the process's own words
    """Return the Namespace of our flags, `given` (flags as typed), `trainer_argv` (words for the Trainer)."""
    parser = argparse.ArgumentParser(  # knows our 46 flags; the Trainer's are left over
        usage="python main.py (--dataset_name NAME | --train_file FILE ...) [flags]",  # instead of all flags
        description="Fine-tune Google's Gemma 3 270M on text.",  # the second paragraph of --help
        epilog="All other flags of transformers.TrainingArguments work too.",  # about 90 flags
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,  # every flag's help ends with its default
        allow_abbrev=False)  # a shortened flag may be a misspelt one
    parser.error = lambda message: die(f"{message}; see python main.py --help")  # one sentence, no usage page
    switch = {"nargs": "?", "const": True, "default": False, "type": switched, "metavar": "True"}  # else off
    path = {"type": os.path.expanduser}  # the shell leaves the ~ of --output_dir=~/x
    count = bounded(int, 1)  # sizes and limits: whole, at least 1
    positive = bounded(float, 0, above=True)  # rates; steps, where 0.1 is a tenth of the run
    add = parser.add_argument_group("model").add_argument  # which weights, which attention
    add("--model_name_or_path", **path, default="google/gemma-270m", help="hub name or directory")  # the base model
    add("--use_flash_attention", **switch, help="needs a GPU and flash-attn; sets --bf16")  # off means sdpa
    add = parser.add_argument_group("data").add_argument  # files or a data set, never both
    add("--dataset_name", **path, help="hub name, or a local data set directory")  # validation is optional
    add("--dataset_config_name", help="configuration of the hub data set")  # often the name of a language
    files = path | {"nargs": "+", "action": "extend"}  # a flag that is repeated adds files
    add("--train_file", **files, help=" ".join(FORMATS) + ", .gz; several, globs, folders")  # local
    add("--validation_file", **files, help="the same, for evaluation")  # held out: never trained on
    add("--text_column", default="text", help="the column that holds the text")  # only .txt has no columns
    add("--sample_by", choices=("document", "paragraph", "line"), default="document",  # as in datasets' own loader
        help="a text in a .txt or .md file: the whole of it, a block between blank lines, or a line")  # no rows
    add("--max_seq_length", type=bounded(int, 2), default=2048, help="tokens per chunk")  # the context learnt
    add("--no_truncation", **switch, help="keep texts longer than a chunk whole")  # for long documents
    add("--add_eos", **switch, help="end each text with the end-of-sequence token")  # teaches where to stop
    add("--validation_split_percentage", type=positive, help="of the texts, held out for evaluation")  # by the seed
    add("--max_train_samples", type=count, help="train on the first N chunks only")  # for a quick try
    add("--max_eval_samples", type=count, help="evaluate on the first N chunks only")  # for quick evaluations
    add("--preprocessing_num_workers", type=count, help="threads that tokenize")  # unset: one on each core
    add("--cache_dir", **path, help="where prepared data is kept for the next run")  # unset: datasets' cache
    add("--overwrite_cache", **switch, help="prepare the data anew")  # changed files need no flag
    add = parser.add_argument_group("training").add_argument  # schedule and optimizer
    add("--num_train_epochs", type=positive, default=3, help="passes over the data")  # each in a new order
    add("--per_device_train_batch_size", type=count, default=4, help="chunks per device at a time")  # limited by memory
    add("--per_device_eval_batch_size", type=count, default=4, help="the same, in evaluation")  # any value, same result
    add("--gradient_accumulation_steps", type=count, default=8, help="batches per optimizer step")  # costs no memory
    add("--learning_rate", type=positive, default=2e-5, help="the peak, after the warm-up")  # then down to 0
    add("--weight_decay", type=bounded(float, 0), default=0.01, help="of AdamW")  # norms and biases have none
    add("--warmup_steps", type=bounded(float, 0), default=500, help="steps to the peak; 0.1: a tenth")  # or a share
    group = parser.add_argument_group("memory")  # for when a GPU is full
    group.add_argument("--gradient_checkpointing", **switch, help="recompute activations: 20 %% slower")  # few are kept
    add = group.add_mutually_exclusive_group().add_argument  # argparse refuses the two together
    add("--bf16", **switch, help="bfloat16 autocast over float32 weights")  # Ampere GPUs, newer ones and CPUs
    add("--fp16", **switch, help="float16 autocast, for GPUs before Ampere")  # accelerate scales the loss
    add = parser.add_argument_group("logging and checkpoints").add_argument  # what is written, and when
    add("--output_dir", **path, default="./outputs", help="checkpoints, logs and finished model")  # one for each run
    add("--logging_steps", type=positive, default=10, help="steps between log lines")  # a line is their mean
    add("--save_steps", type=positive, default=500, help="steps between checkpoints")  # 3.2 GB each
    add("--eval_steps", type=positive, default=500, help="steps between evaluations")  # needs validation data
    add("--early_stopping_patience", type=count, help="end after so many evaluations that are no better")  # in a row
    add("--sample_prompt", nargs="+", action="extend", help="texts to continue at each evaluation")  # into the log
    add("--metric_for_best_model", choices=("loss", "eval_loss"), help="unset: loss")  # perplexity follows
    add("--save_total_limit", type=count, default=3, help="newest checkpoints that are kept")  # older ones go
    add("--save_dtype", choices=("bfloat16", "float16", "float32"), help="unset: that of the base")  # float32: 1.07 GB
    add("--report_to", nargs="+", default=["tensorboard"], help="where curves go, or none")  # wandb, mlflow and more
    add("--resume_from_checkpoint", **path, help="go on from this one, not the newest")  # from any output_dir
    add = parser.add_argument_group("misc").add_argument  # processes, repeatability, what to do
    add("--ddp_timeout", type=count, default=600, help="seconds a process waits for the others")  # then the run ends
    add("--ddp_backend", choices=("nccl", "gloo"), help="unset: nccl, on CPUs gloo")  # the library that sums gradients
    add("--ddp_comm_hook", choices=("bf16",), help="send gradients in bfloat16")  # for slow networks
    add("--seed", type=bounded(int, 0), default=42, help="of chunks' order, new weights, dropout")  # chance
    add("--config", **path, help="YAML file of flags; the command line wins")  # name: value, one a line
    add("--dry_run", **switch, help="only tell how long it takes, what memory, what disk")  # by three steps
    add("--do_train", **switch, help="train; on unless --do_eval is given alone")  # a name from run_clm.py
    add("--do_eval", **switch, help="given alone: only evaluate on the validation data")  # and no training
    words = sys.argv[1:] if argv is None else argv  # tests pass words of their own
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)  # --a-b is --a_b
             for word in words]  # values keep their hyphens
    args, rest = parser.parse_known_args(words)  # rest: the Trainer's, or a slip
    known = [f"--{name}" for name in [*vars(args), *trainer_flags()]]  # args holds every flag of ours
    if args.config:  # flags that the command line does not give
        facts = (args.config, words, known, lambda flag: advice("flag", flag, known))  # what an unknown one may mean
        more, note, fault = ask("config.words", *facts, otherwise=([], "", MISSING))  # more: as if typed
        die_if(fault, fault)  # no such file, no such flag
        log0(note)  # what the command line replaces
        parser.error = lambda message: die(f"--config {args.config}: {message}")  # the rest was sound
        words += more  # none of them stands on the command line
        args, rest = parser.parse_known_args(words)  # of both
    args.trainer_argv = rest  # for make_training_arguments()
    args.given = [word.partition("=")[0] for word in words if word.startswith("--")]  # "--seed=1" → "--seed"
    bare = [flag.replace("--no_", "--") for flag in args.given]  # the Trainer's switches may say --no_
    for flag, name in zip(args.given, bare, strict=True):  # before the heavy imports
        die_if(name in REFUSED, f"{flag} {REFUSED.get(name)}: leave it out")  # it breaks a promise
        if not {flag, name} & {*known}:  # misspelt, or of another trainer
            die(f"unknown flag {flag}{advice('flag', flag, known)}; see --help")  # and what may be meant
        die_if(bare.count(name) > 1 and name not in ADD_UP,  # one value would win
               f"{flag} is given twice: leave one out")  # perhaps a script adds the second
    check_args(args)  # combinations and paths; may end the run
    return args  # sound, as far as can be told without torch

def check_args(args):  # what argparse cannot say; globs and aliases are expanded in place
    if args.model_name_or_path == "google/gemma-270m":  # no repository on the hub has the short name
        args.model_name_or_path = "google/gemma-3-270m"  # the published name from here on
        log0("google/gemma-270m is published as google/gemma-3-270m: using that.")  # printed once, by rank 0
    args.evaluate_only = eval_only = args.do_eval and not args.do_train  # True: no training, no checkpoints
    home = os.environ.get("HF_HOME", join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))  # by default
    cache = args.cache_dir or os.environ.get("HF_DATASETS_CACHE", join(home, "datasets"))  # as datasets
    args.cache_dir = os.path.expanduser(cache)  # named in sentences
    args.train_file = expand_files("--train_file", args.train_file)  # [] without the flag
    args.validation_file = expand_files("--validation_file", args.validation_file)  # [] without the flag
    args.resume_from_checkpoint = args.resume_from_checkpoint and realpath(args.resume_from_checkpoint)  # or None
    output = args.output_dir_asked = args.output_dir  # may not exist yet
    refuse("call", args, log0)  # what would fail behind minutes of work, or be ignored; notes on what is odd
    die_if(args.dataset_name and args.train_file + args.validation_file,  # data given twice
           "--dataset_name and --train_file or --validation_file exclude each other: leave one out")
    need = "validation_file" if eval_only else "train_file"  # the data that this call cannot do without
    die_if(not (args.dataset_name or vars(args)[need]), f"no data: give --dataset_name or --{need}")  # nothing to read
    die_if(not eval_only and realpath(output) == realpath(args.model_name_or_path),  # the base model would be replaced
           f"--output_dir {output} is the model to start from: choose another directory")
    if args.dry_run:  # writes nothing in it, but beside it, until it ends
        output, name = os.path.split(abspath(output))  # the disk that the run will fill
        args.output_dir = join(output, f".{name}.dry-run")  # hidden: no name that a user has given
    for flag, folder in (("cache_dir", args.cache_dir), ("output_dir", output)):  # tried before the work
        try:  # a read-only disk, a file in the way, no permission
            os.makedirs(folder, exist_ok=True)  # makes the directories above it, too
            tempfile.TemporaryFile(dir=folder).close()  # a file of no name, gone once closed
        except OSError as error:  # error.strerror is the reason, from Linux
            die(f"--{flag} {folder}: no files can be written there ({error.strerror}); choose another")  # why

def kind_of(path):  # → ".jsonl", also for X.JSONL.gz
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]  # "" for a name without an ending
def expand_files(flag, patterns):  # → absolute paths of existing, readable files of known formats
    files = []  # in the order given: that of the text
    for pattern in patterns or []:  # None without the flag
        found = [pattern] if lexists(pattern) else sorted(glob(pattern, recursive=True))  # in a fixed order
        if not found:  # a misspelt name, or a folder that may not be looked into
            die(f"{flag} {pattern}: {advice('absent', pattern) or 'no such file'}")  # perhaps a near one
        for path in [path for path in found if "**" not in pattern or not isdir(path)]:  # ** finds all below anyway
            files += in_folder(flag, path) if isdir(path) else [path]  # in the order of their names
    refuse("file", flag, files, FORMATS)  # a broken link, a PDF, UTF-16, an unknown ending and the like
    return [*map(abspath, files)]  # a part of the cache's key
def in_folder(flag, folder, used=None):  # used: paths that are wanted; None: all → those of known formats
    refuse("folder", flag, folder)  # one of save_to_disk(), one that cannot be read
    paths = [join(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]  # files
    inside = dict(zip(map(realpath, reversed(paths)), reversed(paths), strict=True)).values()  # each once
    wanted = used or [path for path in inside if "/." not in path[len(folder.rstrip(os.sep)):]]  # not hidden
    files = sorted(path for path in wanted if kind_of(path) in FORMATS)  # the same order everywhere
    others = sorted({*inside} - {*files})  # hidden, of another split, of another kind
    more = f"; left out: {', '.join(others[:9])}{' and more' * (len(others) > 9)}" * bool(others)  # not silent
    log0(f"{flag} {folder}: {len(files):,} of {len(inside):,} files are read{more}")  # by rank 0
    die_if(not files, f"{flag} {folder} holds no files of the kinds {' '.join(FORMATS)}{more}")  # to be read
    return files  # checked by expand_files()

# ── Signals ────────────────────────────────────────────────────────────────────────────────────────
# SIGTERM comes from batch systems and launchers, SIGINT from Ctrl-C. Outside the training either ends the
# run at once. In training it is kept until the end of the step, where all ranks agree on it, save and stop.
STOPS = (signal.SIGTERM, signal.SIGINT)  # what asks for a stop; kill -9 cannot be caught, and need not be
class Signals:  # what has been received, and what becomes of it
    def __init__(self):  # before the heavy imports, as a signal may come at any time
        self.received = 0  # number of the first signal, 0 before one has come
        self.since = 0.0  # time of the first signal, seconds since 1970
        self.in_training = False  # True: a signal waits for the end of the step
        self.scratch = None  # a directory that goes with the process: that of a dry run
        self.launcher = 0  # process id of accelerate or torchrun, 0 without one
        for number in STOPS:  # both mean: stop, but lose nothing
            signal.signal(number, self.receive)  # Python calls receive() between two instructions
        os.register_at_fork(after_in_child=lambda: (  # in a data loader, as Ctrl-C signals every process
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS),  # deaf: only its parent answers
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)))  # PR_SET_PDEATHSIG: it ends with its parent
        if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # launchers set these
            self.launcher = os.getppid()  # accelerate passes no signal on to a single process
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: SIGTERM when the launcher dies
    def receive(self, number, frame):  # noted in training; else, or when repeated after 3 seconds, the end
        if self.launcher:  # the launcher's death arrives as a SIGTERM
            time.sleep(0.1)  # Linux signals a moment before getppid() changes
            number = number if self.launcher == os.getppid() else signal.SIGKILL  # 9 stands for the launcher's death
        if self.in_training and not self.received:  # the first signal; print() is unsafe in a handler
            os.write(2, b"\nStopping: a checkpoint is saved at the end of this step ...\n")  # 2 is stderr
        if not self.received:  # launchers repeat a signal at once
            self.since = time.time()  # the 3 seconds count from here
            self.received = number  # on_step_end() looks at the number
        if not self.in_training or time.time() - self.since > 3:  # nothing to save, or a signal that insists
            try:  # as after a kill -9, but with a sentence: an exception might be lost in a library
                with reported():  # writes the sentence
                    self.leave(number, "")  # checkpoints saved before are whole
            except SystemExit as end:  # from reported(); 128 + 15 or 2, or 1
                shutil.rmtree(self.scratch or "", ignore_errors=True)  # of a dry run
                os._exit(end.code)  # at once: nothing is left to do
    def leave(self, number, saved):  # every signal ends here; saved: words on a checkpoint, or ""
        self.in_training = False  # a further signal ends the run at once
        lost = number == signal.SIGKILL  # status 1: MAX_RETRIES of multinode_train.sh tries again
        name = "the loss of a launcher" if lost else signal.Signals(number).name  # else SIGTERM or SIGINT
        die(f"stopped by {name}{saved}; the same command again goes on", 1 if lost else 128 + number)  # 128 + 15 or 2

# ── The answer, and behind it the imports ──────────────────────────────────────────────────────────
if __name__ == "__main__":  # not where tests import this file
    with reported():  # --help and a slip are answered in 0.06 s
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know only ASCII
        SIGNALS = Signals()  # from here on a signal ends the run with a sentence
        try:  # a wrong call ends in here
            ARGS = parse_args()  # checked as far as possible without torch
        except SystemExit as slip:  # --help, with status 0, or a wrong call
            if not slip.code or os.environ.get("WORLD_SIZE", "1") == "1":  # --help, or no other process waits
                raise  # reported() prints the sentence
            ARGS = slip  # main() tells the other ranks first

with reported():  # also for a signal that comes during the imports
    try:  # six seconds, for which nobody waits who has mistyped a flag
        import accelerate  # the Trainer's layer for ranks and devices
        import datasets  # Arrow files, memory-mapped: data may be larger than memory
        import numpy as np  # arrays of ids, cut into chunks
        import pyarrow as pa  # Arrow, the file format of the cache
        import pyarrow.compute as pc  # counts and cuts lists without Python objects
        import pyarrow.parquet as pq  # reads .parquet files
        import torch  # tensors and autograd
        import torch.distributed as dist  # sums and messages between processes
        import transformers  # models, tokenizers, the Trainer
        from datasets.data_files import DataFilesDict, get_data_patterns  # tells splits by the names of files
        from datasets.fingerprint import Hasher  # hashes that are the same in each call
        from datasets.packaged_modules.generator.generator import Generator  # the builder of from_generator()
        from datasets.utils.info_utils import get_size_checksum_dict as checksum  # size and SHA-256 of a file
        from torch.nn.attention.varlen import varlen_attn  # Flash Attention with windows, for CUDA alone
        from transformers.integrations import integration_utils  # has the Trainer's TensorBoard callback
        from transformers.trainer_utils import get_last_checkpoint, speed_metrics  # newest checkpoint; speeds
    except (ImportError, OSError) as missing:  # a fresh machine, or half an installation
        die(f"{missing}: pip install -r requirements.txt", status=1)  # the command that helps in both cases

# ── Processes ──────────────────────────────────────────────────────────────────────────────────────
# A launcher starts a process, a rank, for each device. Before the training the ranks wait for each other, for
# hours if need be, compare what they will do, and end together if one fails. In training a rank that dies
# closes its connections, which ends all; a silent one ends them after --ddp_timeout. tools/launch.py watches.
@dataclass  # Python writes __init__() from the fields
class Ranks:  # the processes of this run on all machines; a single one exchanges nothing
    rank: int = 0  # this process among all, from 0
    machine: int = 0  # rank of the first process of this machine
    size: int = 1  # processes on all machines
    name: str = ""  # "rank 1 on node1", for sentences
    patient: object = None  # gloo group for the time before the training
    prompt: object = None  # gloo group for the training, which waits for --ddp_timeout
    def gather(self, value):  # → [value of rank 0, value of rank 1, …], pickled, over gloo
        values = [value] * self.size  # a single process needs no more
        try:  # a rank may die while the others wait for it
            if self.size > 1:  # torch fills in the values of all ranks
                dist.all_gather_object(values, value, group=self.patient)  # waits up to 12 hours
        except RuntimeError as error:  # gloo's answer to a closed connection
            die(f"another process was lost ({one_line(error)}); the same command again goes on", 1, True)  # retry
        return values  # the same on all ranks
    def max(self, number):  # → the largest number (int) of all ranks; called once a step
        largest = torch.tensor(number)  # on the CPU: no GPU is waited for
        if self.size > 1:  # a single process has nobody to ask
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.prompt)  # RuntimeError when a rank is lost
        return largest.item()  # the same on all ranks
    @contextmanager  # makes `with ranks.together():` possible
    def together(self):  # around each phase before the training: all ranks end when one of them fails
        mine = None  # the error of this rank, if any
        try:  # a phase may fail on one rank only
            yield  # the phase runs here, and raises its error
        except (SystemExit, Exception) as error:  # die(), or a fault of this program
            mine = error  # the other ranks hear of it first
        words = getattr(mine, "sentence", f"{type(mine).__name__}: {one_line(mine)}")  # else kind and words
        ends = self.gather(mine and (self.machine, self.name, getattr(mine, "code", 1), words))  # None: no failure
        if isinstance(mine, Exception):  # a fault of this program: no SystemExit
            raise mine  # explained by main(), or printed with its traceback
        for machine, name, status, words in filter(None, ends):  # the first failure is that of all ranks
            die(words if machine == self.machine else f"{name}: {words}", status)  # elsewhere with the rank
    def check_same(self, facts):  # end all ranks, unless facts (dict of JSON values) are the same everywhere
        (first, wanted), *others = self.gather((self.name, facts))  # rank 0's facts are the measure
        for who, own in others:  # the first rank that differs ends all, as training would hang
            die_if(own != wanted, f"{who} differs from {first}: {differences(wanted, own)}; all need the same")  # facts

def explain(error, *facts):  # ends the run with a sentence, if the user can mend the error
    if known := advice("failure", error, *facts):  # (sentence, status): 2 for a wrong call, 1 to try again
        die(*known, True)  # perhaps on this rank only
def one_line(error):  # an error's own words, without line breaks
    return " ".join(str(error).split())  # fits into a sentence of die()
def differences(saved, now):  # → str: a clause for each setting of now that differs from saved (dicts)
    names = [name for name, value in now.items() if saved.get(name) != value]  # in the order of the flags
    return "; ".join(f"{name} is {now[name]!r} instead of {saved.get(name)!r}" for name in names)  # None: not saved

def join_group(args):  # → Ranks, connected before a device is touched; args may be the error of a wrong call
    rank, local, size = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))  # unset: 0
    if size < 2:  # no launcher, or one that starts a single process
        return Ranks()  # rank 0 of 1, which waits for nobody
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()  # launchers set all
    die_if(missing, f"WORLD_SIZE is set, but not {', '.join(sorted(missing))}: use accelerate launch")  # by hand
    ranks = Ranks(rank, rank - local, size, f"rank {rank} on {socket.gethostname()}")  # groups are made below
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # by accelerate
    cpu |= bool(re.search("--use_cpu(?![= ][Ff0Nn])", " ".join(getattr(args, "trainer_argv", ()))))  # not its False
    seconds = getattr(args, "ddp_timeout", 600)  # the default after a wrong call
    patience = timedelta(seconds=seconds + (0 if cpu else 120))  # gloo gives up first: NCCL gives no reason
    try:  # some rank may never come
        if os.environ.get("LOCAL_WORLD_SIZE") != str(size):  # several machines: gloo would trust the host name
            ask("network.choose_interface", os.environ["MASTER_ADDR"])  # the one that leads to rank 0
        state = accelerate.PartialState(cpu, backend=getattr(args, "ddp_backend", None), timeout=patience)  # gradients
        state.wait_for_everyone()  # NCCL connects only now
        ranks.prompt = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))  # used at each step
        ranks.patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # for downloads and data
    except (RuntimeError, ValueError, OSError) as error:  # torch's own errors are RuntimeErrors
        die(f"{size} processes could not connect at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, "  # rank 0
            f"with --ddp_timeout {seconds} ({one_line(error)}): mend that, and start all again", 1, True)  # 1: retry
    atexit.register(gc.collect)  # runs second: frees the groups, and waits for gloo's threads
    atexit.register(dist.destroy_process_group)  # runs first: torch itself lets go of the groups
    return ranks  # all ranks have come

# ── The Trainer's arguments ────────────────────────────────────────────────────────────────────────
HARMLESS = tuple(  # beginnings of flags that change no weights: they may differ when a run goes on
    "output_dir log save_ eval_ do_ hub push_ report_to run_name project trackio_ disable_tqdm debug skip_ "
    "include_ batch_eval per_device_eval prediction_ label_names length_column dataloader_ metric_ "
    "ddp_b ddp_f ddp_t local_rank use_cpu torch_empty resume_ validation_file max_eval preprocessing_ "
    "cache_dir overwrite_ evaluate_only given trainer_argv config dry_run sample_p vocab".split())  # run_settings() too

def make_training_arguments(args):  # → transformers.TrainingArguments, vetted, or a sentence
    cpu = not torch.cuda.is_available()  # True: the same command trains on the CPU
    half = args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"  # by `accelerate config`
    die_if(cpu and (half or args.use_flash_attention or args.ddp_comm_hook),  # made for GPUs alone
           "--fp16 (or accelerate's --mixed_precision fp16), --use_flash_attention and --ddp_comm_hook "
           "need a GPU; on the CPU use --bf16, or leave them out")
    if cpu:  # else days pass before somebody misses the GPU
        log0("No GPU found: training on the CPU.")  # printed once, by rank 0
    args.bf16 |= args.use_flash_attention and not args.fp16  # Flash Attention takes only 16-bit numbers
    parser = transformers.HfArgumentParser(transformers.TrainingArguments, allow_abbrev=False)  # of 114 flags
    parser.error = die  # one sentence instead of 600 lines of usage
    parser.set_defaults(  # defaults that the Trainer's flags override
        **{name: getattr(args, name) for name in trainer_flags() if hasattr(args, name)},  # flags both have
        activation_checkpointing=args.gradient_checkpointing,  # the flag's new name in transformers
        use_cpu=cpu,  # else the Trainer refuses --bf16 without a GPU
        logging_nan_inf_filter=False,  # the Trainer would show a mean in the place of a NaN
        ddp_find_unused_parameters=False,  # every weight is used in every step
        ddp_broadcast_buffers=False,  # its buffers never change: nothing to send before each forward pass
        eval_strategy="steps")  # main() sets "no" without validation data
    plan, rest = parser.parse_known_args(args.trainer_argv)  # rest: "--bf16 true", or a file without its flag
    die_if(rest, f"{', '.join(map(repr, rest))} belongs to no flag: leave it out, or put --train_file before")  # stray
    asked = os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "NO").lower()  # by `accelerate config`
    backend = plan.torch_compile_backend or {"no": None}.get(asked, asked)  # None without any wish
    mode = plan.torch_compile_mode  # max-autotune-no-cudagraphs, default or None
    forbidden = {"--torch_compile", "--no_torch_compile"} & {*args.given} and not plan.torch_compile  # by a flag
    wanted = not forbidden and bool(plan.torch_compile or backend or mode)  # any of them
    args.torch_compile = wanted and {"backend": backend or "inductor", "mode": mode}  # False: none
    plan.torch_compile = plan.torch_compile_backend = plan.torch_compile_mode = None  # each would compile all
    for name in ("fsdp", "deepspeed"):  # `accelerate config` may have them switched on
        die_if(os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true", f"accelerate's {name} {PARTIAL}")  # sharded
    plan.load_best_model_at_end |= bool(args.early_stopping_patience)  # the last model is not the best
    args.hub = plan.push_to_hub and (plan.hub_model_id, plan.hub_token, plan.hub_private_repo)  # for push()
    plan.push_to_hub = False  # the Trainer would upload locks and optimizer states
    plan.hub_token = None  # checkpoints hold the Trainer's arguments
    plan.report_to = "none" if args.dry_run else plan.report_to  # three steps make no curve
    if not args.evaluate_only:  # the Trainer shall not reach published checkpoints
        plan.output_dir = join(args.output_dir, ".staging")  # on_save() publishes what is whole
    try:  # TrainingArguments check combinations of their own
        made = transformers.TrainingArguments(**vars(plan))  # from here on the device is known
        for reporter in integration_utils.get_reporting_integration_callbacks(made.report_to):  # wandb, say
            reporter()  # RuntimeError where its package is missing
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:  # any flag's fault
        die(f"the Trainer does not accept these flags: {one_line(error)}")  # in the Trainer's own words
    refuse("trainer", made, args)  # what would fail behind data and model: optimizer, schedule and more
    if made.n_gpu > 1:  # the Trainer would copy the model to all GPUs at every step
        log0(f"note     of {made.n_gpu} GPUs one is used: accelerate launch --num_processes N uses more")  # N ranks
        made._n_gpu = 1  # CUDA_VISIBLE_DEVICES chooses the GPU
    if made.use_liger_kernel:  # Liger's layers are welcome, its loss would replace ours
        made.liger_kernel_config = {"fused_linear_cross_entropy": False, "cross_entropy": False}  # ours stays in use
    return made  # vetted; its device is set up

def check_plan(args, training_args, ranks):  # ends all ranks, unless machines agree and share output_dir
    own = ["given", "trainer_argv", "cache_dir", "preprocessing_num_workers", "local_rank"]  # a machine's
    own += ["config", "hub", "vocabulary"]  # paths and a token
    flags = training_args.to_dict() | vars(args)  # the Trainer's flags and ours
    facts = {f"--{name}": value for name, value in flags.items() if name not in own}  # even harmless flags
    facts |= {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}  # packages
    facts |= {"main.py": checksum(__file__, True)["checksum"], "Python": sys.version.split()[0]}  # same code
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate divides --num_processes by machines
        facts["processes a machine (--num_processes)"] = os.environ.get("LOCAL_WORLD_SIZE")  # a slip shows up
    ranks.check_same(json.loads(json.dumps(facts, default=str)))  # enumerations as text
    mine = tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".staging-", ignore_cleanup_errors=True)  # empty
    with mine as probe, ranks.together():  # each rank writes a part of every checkpoint
        path = join(args.output_dir, ranks.gather(basename(probe))[0])  # the directory that rank 0 has made
        until = time.time() + 10  # network storage may take seconds to show it
        while not (exists(path) or args.evaluate_only):  # with --do_eval only rank 0 writes
            time.sleep(0.5)  # seconds: the storage is not flooded
            die_if(time.time() > until,  # each machine has a directory of its own
                   f"--output_dir {args.output_dir} lacks what rank 0 writes: use storage that all machines share")

def run_settings(args, training_args):  # → {name: JSON value} of the flags that decide the final weights
    flags = vars(args) | training_args.to_dict()  # defaults included, ours and the Trainer's
    steered = training_args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")  # losses steer the rate
    steered |= training_args.load_best_model_at_end  # the best one becomes the result
    looks = ("validation_file", "max_eval_samples", "eval_", "save_st") if steered else ()  # save_st: strategy, steps
    settings = {name: value for name, value in flags.items()  # about 60 stay
                if not name.startswith(HARMLESS) or name.startswith(looks)}  # harmless flags may still change
    settings |= {"processes": training_args.world_size, "autocast": training_args.mixed_precision}  # set by accelerate
    settings["torch_compile"] = args.torch_compile  # False, or backend and mode: the Trainer's own says False
    for name in {"train_file", "validation_file"} & settings.keys():  # fingerprints() compares every id later
        settings[name] = [f"{basename(path)} ({getsize(path):,} bytes)" for path in flags[name]]  # its path may change
    settings["model_name_or_path"] = basename(args.model_name_or_path.rstrip(os.sep))  # its path may change
    return json.loads(json.dumps(settings, default=str))  # as run.json gives them back

# ── Checkpoints ────────────────────────────────────────────────────────────────────────────────────
# The Trainer saves into .staging; on_save() publishes what is whole. What a kill may leave, at any instant:
#   .staging/checkpoint-N ──rename──▶ checkpoint-N ──rename──▶ unused-checkpoint-N: damaged, or left behind
#     half made: the next start               └──────rename──▶ .trash-checkpoint-N: beyond --save_total_limit,
#     removes it                                               perhaps half deleted: the next start goes on
#  1. A directory gets the name checkpoint-N by a rename, when all of it is on the disk: whole, or absent.
#  2. Its manifest.json holds size and SHA-256 of each file; all are verified before use.
#  3. A checkpoint is never written into again; what is found damaged is set aside, never deleted.
#  4. The finished model is in output_dir, with a manifest.json; model.safetensors is the last file to arrive.
#  5. One process, rank 0 with the lock on output_dir, decides, renames and deletes.
@dataclass  # made once, by main()
class Run:  # who this run is; run.json keeps settings, versions and chosen
    settings: dict  # flags, data and model that decide the weights: none may differ
    versions: dict  # torch, transformers, device, attention of this call: may differ, with a warning
    chosen: str | None  # path of --resume_from_checkpoint; None: the newest whole one
    output_dir: str  # where the finished model goes
    ranks: Ranks  # all processes of this run
    signals: Signals  # SIGTERM or SIGINT, if one has come
    args: object = None  # argparse.Namespace: the flags of this call
    lock: object = None  # the open lock file; None for --do_eval and on ranks other than 0
@dataclass  # made by verify(), returned by find_checkpoint()
class Resume:  # where this call goes on from
    path: str | None = None  # a checkpoint; output_dir if the run has finished; None: a fresh start
    settings: dict = field(default_factory=dict)  # those of the run that has made it
    versions: dict = field(default_factory=dict)  # torch, transformers and device of the call that saved it
    chosen: str | None = None  # --resume_from_checkpoint of the call that has made it
    state: object = None  # transformers.TrainerState: steps made and to come, every log line
    best: str | None = None  # path of the checkpoint with the best evaluation

def lock_output_dir(output_dir):  # → the open lock file; the lock ends with the process
    try:  # a full disk, or a lock file of another user
        file = open(join(output_dir, ".lock"), "a+")  # a+ leaves the owner's name in the file
        try:  # lockf: a lock of flock would live on in forked data loaders
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if another process has the lock
        except BlockingIOError:  # another run has the lock
            file.seek(0)  # a+ opens the file at its end
            die(f"--output_dir {output_dir} is in use by {file.read().strip()}: wait, or choose another", 1)  # for now
        except OSError as error:  # a file system without locks, such as an old NFS
            log0(f"note     {output_dir} cannot be locked ({error.strerror}): start no second run in it")  # runs on
        file.truncate(0)  # removes the name of the last owner
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)  # who has the lock
    except OSError as error:  # error.strerror: the reason, from Linux
        die(f"--output_dir {output_dir} cannot be written ({error.strerror}): choose another", 1)  # a full disk, say
    return file  # main() keeps the file open until the process ends

def fsync(path):  # wait until a file or directory is on the disk: a rename must not overtake it
    handle = os.open(path, os.O_RDONLY)  # a directory can be opened for reading, too
    os.fsync(handle)  # now; Linux alone would take half a minute
    os.close(handle)  # else a long run would use up all handles
def write_manifest(folder, run):  # seal a folder and flush it to the disk; a rename comes next
    lock = join(run.output_dir, ".lock")  # another run may have made this file anew
    if not exists(lock) or not os.path.samestat(os.fstat(run.lock.fileno()), os.stat(lock)):  # gone, or new
        die(f"--output_dir {run.output_dir} was moved or removed during the run: "  # or a second one was made there
            "put it back in the place of what is there now, and the same command again goes on", 1)  # then
    with open(join(folder, "run.json"), "w") as file:  # who the run is; trainer_state.json says how far it is
        json.dump({"settings": run.settings, "versions": run.versions, "chosen": run.chosen}, file)  # see class Resume
    names = [name for name in os.listdir(folder) if not name.endswith("_results.json")]  # results may vanish
    with open(join(folder, "manifest.json"), "w") as file:  # the last file to be written
        json.dump({name: checksum(join(folder, name), True) for name in names}, file)  # 2 s for 3 GB
    for path in glob(join(escape(folder), "*")):  # all files, with results and manifest
        shutil.copymode(file.name, path)  # as the umask says: safetensors lets only the owner read
        fsync(path)  # costs 0.2 s for 500 MB
    fsync(folder)  # file names are on the disk before any rename

def verify(folder, chosen=None):  # before a checkpoint or a finished model is trusted
    """Return (Resume, "") for what is whole and is, or came of, the chosen one; else (None, the fault)."""
    try:  # checkpoints of other programs have no manifest
        with open(join(folder, "manifest.json")) as file:  # the last file that write_manifest() wrote
            files = json.load(file)  # {name: {"num_bytes": size, "checksum": SHA-256}}
        for name in {"run.json", "trainer_state.json"} | files.keys():  # another program has none
            if checksum(join(folder, name), True) != files.get(name):  # OSError for a missing file
                return None, f"{name} is damaged"  # one damaged file is reason enough
        with open(join(folder, "run.json")) as file:  # its checksum is right
            resume = Resume(folder, **json.load(file))  # TypeError: of another version of main.py
        resume.state = transformers.TrainerState.load_from_json(join(folder, "trainer_state.json"))  # and its log lines
        best = resume.settings["load_best_model_at_end"] and resume.state.best_model_checkpoint  # None when finished
        if best:  # needed at the end of the run
            beside = join(dirname(folder), basename(best))  # there also when the run has been moved
            resume.best = beside if exists(beside) else best  # elsewhere: beside a chosen checkpoint
            fault = realpath(resume.best) != realpath(folder) and verify(resume.best)[1]  # 2 seconds more
            if fault:  # --load_best_model_at_end could not end without it
                return None, f"the best one, {resume.best}, cannot be used: {fault}"  # fault is that of the best one
        if chosen not in (None, realpath(folder), resume.chosen):  # neither the chosen one nor made from it
            return None, f"it did not come of {chosen}"  # --resume_from_checkpoint leaves this one behind
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # missing, or not ours
        return None, one_line(error)  # such as "No such file or directory"
    return resume, ""  # every file is as it was written

def find_checkpoint(run):  # on rank 0 → Resume of the finished run, the newest whole checkpoint, or none
    output_dir = run.output_dir  # a short name for the lines below
    for name in [*glob(".staging*", root_dir=output_dir), *glob(".trash-*", root_dir=output_dir)]:  # left by a kill
        shutil.rmtree(join(output_dir, name), ignore_errors=True)  # gives the disk space back
    resume, fault = verify(output_dir, run.chosen)  # a finished run has its manifest in output_dir
    if fault and run.chosen:  # fault: no finished run is here; and a checkpoint was chosen
        resume, harm = verify(run.chosen)  # the user's choice is never silently replaced
        die_if(harm, f"--resume_from_checkpoint {run.chosen} cannot be used: {harm}; leave it out")  # then the newest
        if differences(resume.settings, run.settings):  # refuse_other_run() will name the differences
            return resume  # before anything has been renamed
    while fault and (path := get_last_checkpoint(output_dir) or run.chosen):  # newest first, chosen one last
        resume, fault = verify(path, run.chosen)  # reads 3.2 GB in two seconds
        if fault:  # then no later call may see the checkpoint
            aside = join(output_dir, f"unused-{basename(path)}")  # kept, for the user to look at
            aside += f"-{time.time():.0f}" * exists(aside)  # when the same step was set aside before
            os.rename(path, aside)  # renamed: now invisible
            log0(f"warning  {path} is not used ({fault}); set aside as {aside}")  # the next newest is tried
    die_if(fault and exists(join(output_dir, "model.safetensors")),  # made by something else
           f"--output_dir {output_dir} holds a model, which would be written over ({fault}): choose another")
    return resume or Resume()  # None from verify(): a fresh start

def refuse_other_run(run, resume):  # called twice: for the flags, then with data and weights
    other = resume.path and differences(resume.settings, run.settings)  # "" if nothing differs
    die_if(other, f"{resume.path} belongs to a run with other settings: {other}. "  # else neither is right
           "Give the old ones to go on; for a new run another --output_dir (the model as --model_name_or_path)")
def rotate(output_dir, limit, protected):  # keep the newest `limit` checkpoints and the protected paths
    names = [name for name in os.listdir(output_dir) if re.fullmatch(r"checkpoint-\d+", name)]  # all whole
    kept = {realpath(path) for path in protected if path}  # however --output_dir is written
    for name in sorted(names, key=lambda name: int(name[11:]))[:-limit]:  # by step: a copy changes file times
        if realpath(join(output_dir, name)) not in kept:  # neither the best nor the chosen checkpoint
            os.rename(join(output_dir, name), join(output_dir, f".trash-{name}"))  # renamed: now invisible
            shutil.rmtree(join(output_dir, f".trash-{name}"), ignore_errors=True)  # a kill may leave a part

# ── Model and loss ─────────────────────────────────────────────────────────────────────────────────
# The head multiplies 640 numbers a token by 262,144 words: 63 % of all matrix work. Its result, the logits,
# would be the largest thing in memory: 1.07 GB for 2,048 tokens in 16 bits, and twice that in the float32 of
# the softmax. So the loss takes a chunk of tokens at a time and turns its logits into their gradients, in one
# buffer, as Liger's fused linear cross-entropy does (arXiv:2410.10989), but in chunks large enough for a GPU.
LOGITS_BYTES = {"cuda": 1.1e9, "cpu": 0.135e9}  # the buffer: 2,098 tokens in 16 bits on a GPU, 257 on a CPU
SOFTMAX_ROWS = {"cuda": 256, "cpu": 16}  # tokens at a time, 1 MB each in float32, where nothing is compiled
VOCABULARY_PART = {"cpu": 8_192}  # words that a CPU multiplies at a time, 10 MB; a GPU takes all
GRAD_SCALE = {torch.float16: 2.0**15}  # float16 ends at 6e-8: gradients are held 32,768 times as large
COMPILED = {}  # ("cuda", dtype): softmax_gradients(), compiled, once a trial has seen it work

def loaded(flag, name, load, *args, **named):  # → load(*args, **named), or a sentence that says what is wrong
    try:  # the hub's libraries raise a dozen kinds of errors for a handful of reasons
        return load(*args, **named)  # from the hub, its cache or a directory
    except Exception as error:  # gated, misspelt, no network, a file that is missing or damaged
        if advice("rebuilt", error, named):  # a data set whose cache is damaged
            raise  # prepare_dataset() makes it anew
        die(f"{flag} {name} {advice('loading', flag, name, error) or one_line(error)}")  # what to do

def load_model(args):  # from the hub, its cache or a directory
    """Return (tokenizer, model in float32, on the CPU): bfloat16 would lose updates of 2e-5. Raises: SystemExit."""
    name = args.model_name_or_path  # a hub name or a directory
    flag = "--model_name_or_path"  # names the flag in sentences
    config = loaded(flag, name, transformers.AutoConfig.from_pretrained, name)  # a wrong name fails here
    args.save_dtype = args.save_dtype or str(config.dtype or torch.float32)[6:]  # for Gemma bfloat16
    loaded(flag, name, transformers.utils.cached_file, name, "tokenizer.json")  # else an empty one is made
    tokenizer = loaded(flag, f"{name}: tokenizer.json", transformers.AutoTokenizer.from_pretrained, name)  # 33 MB
    most = getattr(config.get_text_config(), "max_position_embeddings", math.inf)  # tokens: 32,768 for 270M
    die_if(args.max_seq_length > most, f"--max_seq_length {args.max_seq_length}: choose at most {most}")  # the context
    model, report = loaded(  # downloads 536 MB the first time
        flag, name, transformers.AutoModelForCausalLM.from_pretrained, name, dtype=torch.float32,  # for small updates
        attn_implementation="flash_attention_2" if args.use_flash_attention else None,  # None: sdpa, or eager
        ignore_mismatched_sizes=True, output_loading_info=True)  # the report says what is missing
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])  # random
    die_if(wrong, f"{flag} {name} lacks a fitting {', '.join(wrong[:3])}: give a whole language model")  # random
    if not args.use_flash_attention:  # its kernels need a GPU, and the model is on the CPU here
        fault = ask("trials.causal", model)  # as of BERT, whose tokens see those behind them
        die_if(fault, f"{flag} {name}: {fault}: give a model like google/gemma-3-270m")  # or ""
    args.vocabulary = ask("publish.vocabulary", name)  # path of its tokenizer.model; "" if it has none
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # the collator asks; nothing is padded
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens were added to the tokenizer
        log0(f"note     new tokens, which the model has to learn: {len(tokenizer):,} in the tokenizer")  # random rows
        model.resize_token_embeddings(len(tokenizer))  # table and head get new rows
    model._keys_to_ignore_on_save = {*model.all_tied_weights_keys}  # the Trainer does not call them missing
    return tokenizer, model  # the Trainer moves the model to the device

def tried(what, trial, *facts):  # → whether a trial of tools/trials.py goes well; if not, a note says why
    try:  # a compiler may be missing, a GPU too old, torch another one
        why = ask(f"trials.{trial}", *facts, otherwise=MISSING)  # "" if all is well, else words
    except Exception as error:  # dozens of kinds: the compiler's, the driver's, torch's own
        if isinstance(error, torch.OutOfMemoryError):  # a full GPU
            raise  # explain() has a sentence for it
        why = f"{type(error).__name__}: {one_line(error)[:160]}"  # its beginning tells the cause
    if why and SPEAKER:  # each machine speaks of its own devices
        print(f"note     {what} is not used ({why}): slower, but not wrong", flush=True)  # the run goes on
    return not why  # True: what was tried is in use

def windowed_attention(module, query, key, value, mask, scaling=None, sliding_window=None, **_):  # on CUDA
    """(B, heads, T, D) queries, (B, kv heads, T, D) keys and values → (B, T, heads, D), None; causal.
    Flash Attention from torch (arXiv:2307.08691): no mask is made, only the keys in the window are read."""
    length = query.shape[2]  # T, the tokens of a chunk
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))  # (B × T, …, D)
    starts = torch.arange(0, len(q) + 1, length, dtype=torch.int32, device=q.device)  # (B + 1,): borders
    window = (sliding_window - 1 if sliding_window else -1, 0)  # keys before and behind a token; -1: all
    out = varlen_attn(  # (B × T, heads, D)
        q, k, v, starts, starts, length, length, scale=scaling, window_size=window, enable_gqa=True)  # T: the longest
    return out.unflatten(0, (-1, length)), None  # None in the place of attention weights

def use_windowed_attention(model):  # where there is a kernel for it, and it gives what sdpa gives
    dtype = product_dtype(model.get_input_embeddings().weight)  # bfloat16 with --bf16
    kind = (model.config.model_type, model.config._attn_implementation, model.device.type)  # all must fit
    fits = kind == ("gemma3_text", "sdpa", "cuda") and dtype != torch.float32  # what its kernel is made for
    trial = (windowed_attention, model.config, model.device, dtype)  # compared with sdpa in float32
    if fits and tried("windowed attention", "attention", *trial):  # since Ampere
        transformers.AttentionInterface.register("windowed", windowed_attention)  # "flash" means a package
        model.set_attn_implementation("windowed")  # for a name of ours transformers makes no masks

def product_dtype(x):  # → dtype of matrix products with the tensor x: that of autocast, or its own
    kind = x.device.type  # "cuda" or "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype  # else float32
def add_product(total, a, b):  # total (M, N), in float32, += a (M, K) @ b (K, N)
    if a.is_cuda and a.dtype != total.dtype:  # 16-bit factors: tensor cores add their products up in float32
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)  # read and written in one go
    elif a.dtype == torch.bfloat16:  # on a CPU, where adding one dtype to another takes four times as long
        total += (a @ b).float()  # rounded to bfloat16 before the addition
    else:  # float32, or float16 on a CPU, whose sum would be rounded to float16, which ends at 65,504
        total.addmm_(a.float(), b.float())  # in place: no copy of the sum is made

def softmax_gradients(logits, targets, softcap, train):  # made to be compiled: 6 bytes moved for each logit
    """(R, V) logits, (R, 1) labels → log p of the label and d loss / d its logit, (R, 1) each, in float32.
    train: the other words' gradients, p, take the place of the logits. All are times GRAD_SCALE."""
    capped = softcap * torch.tanh(logits.float() / softcap) if softcap else logits  # Gemma 2: within ±30
    logs = torch.log_softmax(capped, -1, dtype=torch.float32)  # (R, V): log p of every word
    label = logs.gather(-1, targets)  # (R, 1): log p of the label
    if not train:  # an evaluation needs no gradients
        return label, None  # the logits stay as they are
    scale = GRAD_SCALE.get(logits.dtype, 1.0)  # 1 unless the logits are float16
    grad_label = label.expm1() * scale  # (R, 1): p - 1 of the label, exact also near p = 1
    grad = logs.exp_().mul_(scale)  # (R, V): p of every word
    if softcap:  # the chain rule
        bend = 1 - (capped / softcap).square()  # (R, V): d capped / d logit
        grad_label = grad_label * bend.gather(-1, targets)  # (R, 1): of the label
        grad = grad.mul_(bend)  # (R, V): of every word
    logits.copy_(grad)  # in the dtype of the logits
    return label, grad_label  # ChunkedLoss writes the label's: in here that would cost a second buffer

def use_compiled_softmax(head, softcap):  # on a GPU, where it works and gives the same values
    dtype = product_dtype(head)  # of the logits
    rows = int(LOGITS_BYTES[head.device.type] / (dtype.itemsize * len(head)))  # R of a full buffer
    trial = (softmax_gradients, COMPILED, rows, head, dtype, softcap)  # a success is put into COMPILED
    return tried("a compiled loss", "softmax", *trial)  # else 256 rows at a time

class ChunkedLoss(torch.autograd.Function):  # replaces head and cross entropy
    """(hidden (N, H), head (V, H), labels (N,), softcap, train) → (sum of the losses, losses (N,)), float32.
    A label of -100 costs and teaches nothing. Only the sum has a gradient; train: make it, in forward()."""
    @staticmethod  # called on the class, by autograd
    def forward(ctx, hidden, head, labels, softcap, train):  # ctx carries the gradients to backward()
        kind = hidden.device.type  # "cuda" or "cpu"
        dtype = product_dtype(hidden)  # of all matmuls
        counted = (labels != -100)[:, None]  # (N, 1): False where the label is -100
        targets = labels.clamp(min=0)[:, None]  # (N, 1): -100 would be no index
        losses = torch.empty(len(labels), device=hidden.device)  # (N,), float32: -log p(label)
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device) if train else None  # (N, H), float32
        grad_head = torch.zeros(head.shape, device=head.device) if train else None  # (V, H), float32
        size = VOCABULARY_PART.get(kind, len(head))  # words of a part: a GPU has only one
        words = [slice(first, first + size) for first in range(0, len(head), size)]  # 32 parts on a CPU
        low = head.to(dtype) if len(words) == 1 else head  # (V, H): on a GPU cast once for all chunks
        most = LOGITS_BYTES.get(kind, 0.135e9) / (dtype.itemsize * len(head))  # tokens whose logits fit
        rows = math.ceil(len(labels) / math.ceil(len(labels) / max(1, int(most))))  # chunks of similar length
        buffer = torch.empty(rows, len(head), dtype=dtype, device=head.device)  # (rows, V): for all chunks
        softmax = COMPILED.get((kind, dtype), softmax_gradients)  # compiled or not
        step = rows if (kind, dtype) in COMPILED else SOFTMAX_ROWS.get(kind, 16)  # tokens in a call of it
        with torch.autocast(kind, enabled=False):  # each dtype below is chosen by hand
            for start in range(0, len(labels), rows):  # first token of each chunk
                chunk = slice(start, start + rows)  # the last chunk may be shorter
                states = hidden[chunk].to(dtype) * counted[chunk]  # (rows, H): 0 where the label is -100
                logits = buffer[:len(states)]  # (rows, V): the largest tensor of a training step
                for part in words:  # a CPU makes 16-bit copies of the head a part at a time
                    torch.mm(states, low[part].to(dtype).T, out=logits[:, part])  # (rows, words of part)
                parts = (t.split(step) for t in (logits, targets[chunk], losses[chunk]))  # views of step rows
                for scores, target, loss in zip(*parts, strict=True):  # once, where the softmax is compiled
                    label, grad_label = softmax(scores, target, softcap, train)  # (step, 1) each
                    loss.copy_(-label[:, 0])  # cross entropy of each token
                    if train:  # scores holds p of every word
                        scores.scatter_(-1, target, grad_label.to(dtype))  # p - 1 for the label
                if train:  # logits holds d loss / d logit by now
                    for part in words:  # a part at a time on a CPU
                        add_product(grad_hidden[chunk], logits[:, part], low[part].to(dtype))  # (rows, H)
                        add_product(grad_head[part], logits[:, part].T, states)  # (words of part, H)
        losses *= counted[:, 0]  # 0 where the label is -100
        ctx.mark_non_differentiable(losses)  # losses are for evaluations alone
        ctx.gradients = (grad_hidden, grad_head)  # of the sum, times GRAD_SCALE
        ctx.counted = counted  # (N, 1): for backward()
        ctx.scale = GRAD_SCALE.get(dtype, 1.0)  # 1 but for float16
        return losses.sum(), losses  # the sum to learn from, losses to report
    @staticmethod  # called on the class, by autograd
    def backward(ctx, upstream, _):  # upstream: d loss of the step / d sum, a scalar
        grad_hidden, grad_head = ctx.gradients  # (N, H); (V, H): 0.67 GB in float32
        ctx.gradients = None  # ctx no longer holds 0.67 GB
        upstream = upstream / ctx.scale  # takes GRAD_SCALE out again
        grad_hidden.mul_(ctx.counted * upstream)  # (N, H): 0 where the label is -100
        return grad_hidden, grad_head.mul_(upstream), None, None, None  # autograd casts to the inputs' dtypes

def use_chunked_loss(model):  # replaces the model's own loss
    """Make model(input_ids, labels=…) return {"loss": scalar, "token_losses": (B, T - 1)} without all logits.
    Returns: bool, False for a model whose loss is more than a head and a softcap: it keeps its own."""
    own = model.forward  # the original, with all logits
    head = model.get_output_embeddings()  # head.weight is (V, H)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # None for Gemma 3
    def forward(input_ids, labels=None, num_items_in_batch=None, **rest):  # the Trainer passes these names
        if labels is None:  # generation asks for logits
            return own(input_ids, **rest)  # the model's own logits
        hidden = model.base_model(input_ids=input_ids, **rest).last_hidden_state[:, :-1]  # (B, T - 1, H)
        labels = labels[:, 1:].to(hidden.device)  # (B, T - 1): token t is predicted from all before it
        total, losses = ChunkedLoss.apply(  # scalar, (B × (T - 1),)
            hidden.flatten(0, 1), head.weight, labels.flatten(), softcap, torch.is_grad_enabled())  # train
        if num_items_in_batch is None:  # tokens that are learnt from in the step
            num_items_in_batch = (labels != -100).sum().clamp(min=1)  # never 0: 0/0 is no number
        return {"loss": total / num_items_in_batch, "token_losses": losses.view(labels.shape)}  # by token
    if isinstance(head, torch.nn.Linear) and head.weight.is_cuda:  # a CPU is as fast without a compiler
        use_compiled_softmax(head.weight, softcap)  # 6 bytes moved for each logit
    fits = tried("the chunked loss", "loss", model.config, head, own, forward)  # do both give the same?
    model.forward = forward if fits else own  # on this object; accelerate wraps autocast around it
    return fits  # False: tried() has said why

# Six norms in each layer: values as in the model's own, but only x is kept, a third of all activations less.
class LeanNorm(torch.autograd.Function):  # in the place of Gemma3RMSNorm's forward()
    """(x (…, D), weight (D,), eps) → x ÷ root mean square × (1 + weight), the RMSNorm of arXiv:1910.07467.
    The result has the dtype of autocast's matrix products, to which the layer behind would cast it."""
    @staticmethod  # called on the class, by autograd
    def forward(ctx, x, weight, eps):  # eps: keeps a row of zeros finite
        wide = x.float()  # squares of 16-bit numbers need more digits
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (…, 1): one number for each row
        ctx.save_for_backward(x, weight, scale)  # the layer keeps x anyway; scale is small
        return (wide * scale * (1 + weight.float())).to(product_dtype(x))  # (…, D), in 16 bits with --bf16
    @staticmethod  # called on the class, by autograd
    def backward(ctx, upstream):  # upstream (…, D): d loss / d output
        x, weight, scale = ctx.saved_tensors  # as saved by forward()
        normed = x.float() * scale  # (…, D): computed anew instead of kept
        slope = upstream.float() * (1 + weight.float())  # (…, D): d loss / d normed
        grad_weight = (upstream.float() * normed).flatten(0, -2).sum(0)  # (D,): summed over all rows
        grad_x = scale * (slope - normed * (slope * normed).mean(-1, keepdim=True))  # scale depends on x, too
        return grad_x.type_as(x), grad_weight.type_as(weight), None  # eps has no gradient
def use_lean_norms(model):  # one function for all norms, so that the compiler finds all layers alike
    kinds = {type(part) for part in model.modules()}  # classes of its parts
    for kind in [kind for kind in kinds if kind.__name__ == "Gemma3RMSNorm"]:  # 109 parts in Gemma 3 270M
        kind.forward = lambda norm, x: LeanNorm.apply(x, norm.weight, norm.eps)  # other norms stay as is

# ── Data: read ─▶ tokenize ─▶ pack ─────────────────────────────────────────────────────────────────
# Text becomes chunks of one length, without padding: each token read is in one chunk, or in the report.
# Each step is cached in memory-mapped Arrow files: memory stays flat, and the next run starts at once.
# In a chunk ~id stands for a token that is seen and never predicted: BOS, which no text calls for.
# A row is a text, or a piece of a document. Its `_marks` are a sum: does a text begin here (BOS goes before it),
# does one end here (EOS may go behind it), may it be cut to a chunk, has it a BOS or an EOS of its own?
BEGINS, ENDS, CUT, HAD_BOS, HAD_EOS = (2**bit for bit in range(5))  # 1, 2, 4, 8, 16
TEXT = BEGINS + ENDS + CUT  # a row that is a text of its own
TOKENIZE_BYTES = 1_000_000  # text per call of the tokenizer, whose working memory is about 100 times that
PIECE = 32_768  # characters of a document in a row: a thousand rows are in memory at a time

def prepare_dataset(args, tokenizer, rebuild):  # load_and_prepare_dataset(), also where the cache is damaged
    for again in (rebuild, True):  # as often as not all is in the cache
        try:  # a file may have been cut short, a disk may be full
            return load_and_prepare_dataset(args, tokenizer, again)  # (train, validation)
        except (OSError, ValueError, MemoryError, datasets.exceptions.DatasetGenerationError) as error:  # a bad cache
            explain(error, "--cache_dir", args.cache_dir, "", False)  # a full disk ends the run
            die_if(again, f"the data cannot be prepared in {args.cache_dir}: {one_line(error)}")  # saved data, say
            log0(f"note     data in {args.cache_dir} is damaged ({one_line(error)[:99]}): it is made anew")  # once
def load_and_prepare_dataset(args, tokenizer, rebuild=False):  # rebuild (bool): remake what the cache holds
    """Return (train, validation): datasets.Dataset or None, `input_ids` of max_seq_length int32 each."""
    if args.preprocessing_num_workers:  # the tokenizer is written in Rust, where threads share the work
        os.environ["RAYON_NUM_THREADS"] = str(args.preprocessing_num_workers)  # read when it is first used
    files = {"train": args.train_file, "validation": args.validation_file}  # lists of paths, [] if not given
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}  # None: all chunks
    if args.evaluate_only:  # --do_eval without --do_train
        del files["train"]  # training text would be read for nothing
    named = load_named_dataset(args, list(files), rebuild) if args.dataset_name else {}  # split → rows, or files
    files |= {split: named.pop(split) for split in files if isinstance(named.get(split), list)}  # of a folder
    documents = any(kind_of(path) in DOCUMENTS for path in sum(files.values(), []))  # in pieces as rows
    die_if("--sample_by" in args.given and not documents, "--sample_by is for .txt and .md: leave it out")  # in vain
    size = PIECE if not documents or splits_at_lines(tokenizer) else math.inf  # characters in a row
    schema = {"text": datasets.Value("large_string"), "_marks": datasets.Value("int8")}  # 64-bit offsets
    for split in [split for split in files if files[split]]:  # all files are read first: faults show early
        kwargs = {"files": tuple(files[split]), "column": args.text_column,  # datasets would split up a list
                  "sample_by": args.sample_by, "size": size}  # of .txt files
        named[split] = cached(f"{split}_rows", read_texts, kwargs, args.cache_dir, rebuild, schema)  # as rows
    die_if(args.validation_split_percentage and "validation" in named,  # of a data set
           "--validation_split_percentage: the data has a validation split of its own; leave the flag out")
    chunks = {}  # split → Dataset of chunks
    for split in list(named):  # list(): pop() shrinks it in the loop
        chunks |= pack_split(split, named.pop(split), tokenizer, args, rebuild)  # frees each after its use
    for split, packed in chunks.items():  # training data, validation data
        chunks[split] = packed.take(min(limits[split] or len(packed), len(packed)))  # a view, no copy
        if len(chunks[split]) < len(packed):  # --max_train_samples or --max_eval_samples is in force
            log0(f"{split}: only the first {limits[split]:,} of {len(packed):,} chunks are used")  # as asked
    return chunks.get("train"), chunks.get("validation")  # None for a split without data

def load_named_dataset(args, wanted, rebuild):  # wanted: names of splits, of which the first must be there
    """Return {split: Dataset of the text column, or list of files} of --dataset_name, a hub's name or a folder."""
    name = {"wikitext": "Salesforce/wikitext"}.get(args.dataset_name, args.dataset_name)  # renamed on the hub
    config = args.dataset_config_name  # None without the flag
    if name == "Salesforce/wikitext" and not config:  # the example that everybody starts with
        config = "wikitext-2-raw-v1"  # untouched text; wikitext-103 has 50 times as much
        log0(f"{name}: no --dataset_config_name given, taking {config}.")  # no choice is made in silence
    saved = isfile(join(name, "state.json")) or isfile(join(name, "dataset_dict.json"))  # from save_to_disk()
    card = join(name, "README.md")  # may hold a loading configuration: which files, which columns
    configured = isfile(card) and re.match(rb"---\n(?:(?!---).*\n)*configs:", open(card, "rb").read())  # in its header
    folder = isdir(name) and not (saved or configured)  # of files, to be read as those of --train_file
    die_if(config and (saved or folder), f"--dataset_config_name {config}: {name} has none; leave it out")  # unused
    if saved:  # a Dataset or a DatasetDict
        data = loaded("--dataset_name", name, datasets.load_from_disk, name)  # maps its files only
    elif folder:  # names tell the splits
        patterns = loaded("--dataset_name", name, get_data_patterns, escape(name))  # the rules of datasets
        found = DataFilesDict.from_patterns(patterns, base_path=escape(name))  # split → absolute paths
        data = {str(split): [*paths] for split, paths in found.items()}  # the library has classes of its own
    else:  # on the hub, or a directory with a configuration
        kwargs = {"cache_dir": args.cache_dir, "download_mode": "reuse_cache_if_exists" * rebuild or None}  # or as is
        data = loaded("--dataset_name", name, datasets.load_dataset, name, config, **kwargs)  # cached
    data = data if isinstance(data, dict) else {"train": data}  # a lone Dataset is training data
    die_if(wanted[0] not in data,  # no other split is taken in silence
           f"--dataset_name {name} has no {wanted[0]} split, only {', '.join(data)}: give --{wanted[0]}_file instead")
    splits = {split: data[split] for split in wanted if split in data}  # never the test split
    if folder:  # read_texts() will read them
        used = in_folder("--dataset_name", abspath(name), sum(splits.values(), []))  # says what is left out
        for split, paths in splits.items():  # in the order of their names
            splits[split] = expand_files("--dataset_name", [path for path in used if path in paths])  # readable
            die_if(not splits[split], f"--dataset_name {name}: no {split} file is one of {' '.join(FORMATS)}")  # others
        return splits  # lists of files
    for split, rows in splits.items():  # each split must have the text column
        check_column(f"{name}, split {split}", args.text_column, rows.column_names)  # the usual first mistake
        kind = rows.features[args.text_column]  # the column's type: Value, List, Image and so on
        kind = getattr(kind, "dtype", type(kind).__name__)  # "int64" or "null" of a Value, else "List"
        die_if(kind not in ("string", "large_string"),  # numbers, lists, nulls, pictures
               f"{name}, split {split}: column {args.text_column!r} holds {kind}, not text: see --text_column")
        rows = rows.select_columns([args.text_column])  # other columns are not read from the disk
        splits[split] = rows.add_column("_marks", np.full(len(rows), TEXT, np.int8))  # next to the text
    return splits  # memory-mapped: nothing is in memory so far
def cached(name, generator, kwargs, cache_dir, rebuild, features=None):  # → Dataset of generator(**kwargs)
    versions = [(getsize(path), os.stat(path).st_mtime_ns) for path in kwargs["files"]]  # in bytes and in ns
    key = f"{name}-{Hasher.hash((generator, kwargs, versions))}"  # the folder; new for new files or code
    if rebuild:  # also what describes the data may be damaged
        shutil.rmtree(join(cache_dir, "generator", key), ignore_errors=True)  # the builder's own folder
    builder = Generator(config_id=key, generator=generator, gen_kwargs=kwargs, split=name, cache_dir=cache_dir,  # found
                        features=features and datasets.Features(features))  # None: those of the first row
    builder.download_and_prepare()  # skipped when cached
    return whole(builder.as_dataset(split=name))  # memory-mapped: read from the disk only where touched
def whole(data):  # → data (Dataset), none of whose Arrow files has been cut short: rows would be missing
    for path in [file["filename"] for file in data.cache_files]:  # none for data in memory
        with open(path, "rb") as arrow:  # a stream of batches of rows
            arrow.seek(-8, os.SEEK_END)  # OSError for an empty file
            if arrow.read() != b"\xff\xff\xff\xff\0\0\0\0":  # the end of a stream of Arrow
                raise ValueError(f"{path} has lost its end")  # prepare_dataset() makes it anew
    return data  # every row is there

def read_texts(files, column, sample_by, size):  # a generator: in memory is one row, or one JSON array
    """Yield {"text": str or None, "_marks": int} for each row, in order. Raises: SystemExit(2), with place."""
    rows = 0  # rows of all files so far, blank ones too
    for path in files:  # formats may be mixed
        if kind_of(path) in DOCUMENTS:  # formats without columns
            found = read_txt(path, column, sample_by, size)  # rows made of lines
        else:  # datasets' own reader of CSV would take NA for null
            readers = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}  # each row is a text
            found = readers.get(kind_of(path), read_json)(path, column)  # .json holds either layout
        for place, row, marks in found:  # place (str) names file and line; datasets' errors do not
            rows += 1  # an empty file is an error below
            text = row.get(column, 0) if isinstance(row, dict) else 0  # str or None, if the file is right
            if not isinstance(text, str | None):  # a number, a list, no such column, no object
                die(advice("row", place, row, column, path) or f"{place}: no text in column {column!r}")  # what it is
            if text and re.search(r"[\ud800-\udfff]", text):  # half of an emoji, which UTF-8 cannot hold
                die(f"{place}: the text has half a character, from \\ud800 to \\udfff; remove it")  # no UTF-8
            yield {"text": text, "_marks": marks}  # one row of the cache; null counts as blank later
    die_if(not rows, f"{', '.join(files[:9])}: no rows; check how it was written")  # a lone header, or []

def read_lines(path):  # → (place, line); a line ends with \n; the file may be gzipped, and larger than memory
    unpack = gzip.open if path.lower().endswith(".gz") else open  # gzip.open and open take the same arguments
    with unpack(path, "rt", encoding="utf-8-sig") as lines:  # skips Excel's mark; \r and \r\n become \n
        try:  # the file may be damaged, or in another encoding
            for number, line in enumerate(lines, 1):  # from 1, as editors count
                if "\0" in line:  # by a slip of the program that wrote the file, or it is no text
                    die(f"{path}, line {number}, column {line.index(chr(0)) + 1}: a NUL{advice('nul', path)}")  # why
                yield f"{path}, line {number}", line.replace("\ufeff", "")  # cat leaves marks inside a file
        except UnicodeDecodeError as error:  # the file is in another encoding, or no text
            byte = lines.buffer.tell() - len(error.object) + error.start  # offset from 0, once unpacked
            words = advice("encoding", path, error)  # how to convert it
            die(f"{path} is not UTF-8: byte {byte} is 0x{error.object[error.start]:02x}; {words}")  # what to do
        except (OSError, EOFError, gzip.zlib.error) as error:  # a bad disk; a .gz cut short, or none at all
            die(f"{path} cannot be read to its end: {error}")  # in the words of Linux or of gzip

def read_txt(path, column, sample_by, size):  # → (place, {column: str}, marks) of a document
    document = sample_by == "document"  # comes in pieces of whole lines, about size characters each
    text = ""  # the lines of a row
    marks = BEGINS if document else BEGINS + CUT  # ENDS is added to the last lines of a text
    for place, line in read_lines(path):  # a line has its line break
        blank = line.isspace()  # such a line separates paragraphs, and is no border in documents
        ends = {"line": True, "paragraph": blank, "document": len(text) > size and not blank}  # ends a row?
        if text and ends[sample_by]:  # a row ends with the line before this one
            yield place, {column: text}, marks if document else marks + ENDS  # the document goes on
            text = ""  # the next row
            marks = 0 if document else marks  # the second piece of a document begins no text
        if not blank or sample_by != "paragraph":  # lines between paragraphs belong to none
            text += line  # line breaks are text
    if text:  # a file of paragraphs may end with a blank line
        yield path, {column: text}, marks + ENDS  # the last row
def splits_at_lines(tokenizer):  # → bool: do the pieces of a document have the ids of the whole?
    lines = ["One\n", "  two.\n\n", "\tthree \n", "4\n\n\n", "    five)\n", " six\n\n", "seven"]  # to be cut
    whole, *pieces = tokenizer(["".join(lines), *lines], add_special_tokens=False)["input_ids"]  # 8 lists
    across = re.search("[\nĊ][^\nĊ\0]", "\0".join(tokenizer.get_vocab()))  # a token past a break
    return whole == sum(pieces, []) and not across  # Gemma has no such token; Ċ is how GPT-2 writes a line break

def read_csv(path, column):  # → (place, {column: str}, marks); values in quotes may span lines
    csv.field_size_limit(2**31 - 1)  # per cell; Python's own limit is 128 KiB
    first = next((line for _, line in read_lines(path)), "")  # names of the columns
    marks = {".tsv": "\t,;|"}.get(kind_of(path), ",;\t|")  # the usual one first
    cells = {mark: next(csv.reader([first], delimiter=mark), []) for mark in marks}  # split by each
    mark = max(cells, key=lambda mark: (column in cells[mark], len(cells[mark])))  # it finds the column
    if mark != marks[0]:  # such as a semicolon, where 1,5 is a number
        log0(f"note     {path}: columns are separated by {mark!r}")  # seen in the header
    rows = csv.reader((line for _, line in read_lines(path)), delimiter=mark, strict=True)  # open quotes fail
    try:  # csv.Error says what is wrong, rows.line_num where
        header = next(rows, [])  # names of the columns; [] for a file without rows
        check_column(f"{path}, line 1", column, header, path)  # before the first row
        die_if(header.count(column) > 1, f"{path}, line 1: two columns {column!r}: rename one")  # which one?
        for row in rows:  # row (list[str]): the cells
            if row and len(row) != len(header):  # too many or too few cells: the text's is unknown
                die(f"{path}, line {rows.line_num}: {len(row)} values, but the header has {len(header)}; "  # where
                    f"texts with {mark!r} or line breaks need double quotes around them")
            if mark == "\t" and "\n" in "".join(row):  # a quote that is a letter: rows would vanish silently
                die(f"{path}, line {rows.line_num}: a quote joins lines; write such rows as .jsonl")  # into one value
            cells = dict(zip(header, row or [""] * len(header), strict=True))  # an empty line is a blank row
            yield f"{path}, line {rows.line_num}", cells, TEXT  # the line where the row ends
    except csv.Error as error:  # a quote left open, or text behind a closed one
        die(f'{path}, line {rows.line_num}: broken CSV: {error}; inside of quotes write each " twice')  # an open one
def read_parquet(path, column):  # → (place, {column: value}, marks) of each row
    try:  # the file may be damaged
        source = pq.ParquetFile(path)  # reads its footer only
        check_column(path, column, source.schema_arrow.names, path)  # the usual first mistake
        batches = source.iter_batches(1000, columns=[column])  # rows: memory stays flat
        values = (value for batch in batches for value in batch.column(0).to_pylist())  # str or None
        for number, value in enumerate(values, 1):  # from 1, as lines are counted
            yield f"{path}, row {number}", {column: value}, TEXT  # read_texts() looks at the value
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # cut short, a bad disk, no UTF-8
        die(f"{path} cannot be read to its end: {one_line(error)}")  # in Arrow's words
def read_json(path, column):  # → (place, value, marks) of each line of JSON, or of each item of one array
    first = next((line for _, line in read_lines(path) if line.strip()), "")  # tells the two layouts apart
    array = first.lstrip().startswith("[")  # an array is parsed whole: take lines for gigabytes
    text = array and "".join(line for _, line in read_lines(path))  # "" for lines, which are read one by one
    for place, part in [(path, text)] if array else read_lines(path):  # a part: the array, or one line
        try:  # without rstrip() a fault at the end would count as on the next line
            values = json.loads(part.rstrip() or "[]")  # a list for an array or a blank line, else one value
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            place += f", line {getattr(error, 'lineno', 1)}" * array  # array: counted from the file's start
            way = advice("layout", path, column) or "write one object a line, or one array of objects"  # jq
            die(f"{place}: broken JSON: {getattr(error, 'msg', error)}; {way}")  # in Python's words
        for item, value in enumerate(values if array or not part.strip() else [values], 1):  # counted from 1
            yield f"{path}, item {item}" if array else place, value, TEXT  # lines mean little in an array
def check_column(place, column, names, path=""):  # place (str): for the sentence; names: of all columns
    if column not in names:  # misspelt, or the default "text" that the data lacks
        die(advice("columns", place, names, column, path) or f"{place}: no column {column!r}")  # columns there are

def special_ids(tokenizer, add_eos):  # → (ids before each text, ids behind it): [~2] and [] for Gemma
    die_if(add_eos and tokenizer.eos_token_id is None, "--add_eos: this tokenizer has no EOS; leave it out")  # no id
    ids = tokenizer.encode("a")  # with all that this tokenizer adds
    start = [~token for token in ids[:1] if token == tokenizer.bos_token_id]  # [] if it puts no BOS there
    return start, [tokenizer.eos_token_id] * (add_eos or ids[-1] == tokenizer.eos_token_id)  # some always do
def pack_split(split, rows, tokenizer, args, rebuild):  # prints a line of report for the split, and notes
    """Tokenize and pack rows (a Dataset of text and _marks); report what became of them.
    Returns: {split: Dataset of chunks}, with two splits where a part of the training data is held out."""
    start, end = special_ids(tokenizer, args.add_eos)  # lists of ids
    recipe = (tokenize_texts, rows._fingerprint, start, end, tokenizer.bos_token_id, tokenizer.eos_token_id)  # ids
    key = Hasher.hash((*recipe, tokenizer.backend_tokenizer.to_str()))  # the tokenizer object would take 4 s
    kinds = {"input_ids": datasets.List(datasets.Value("int32")), "_marks": datasets.Value("int8")}  # columns
    tokenized = whole(whole(rows).map(  # a batch at a time: memory stays flat
        tokenize_texts, desc=f"Tokenizing {split}",  # a batch of texts → a batch of lists of ids
        fn_kwargs={"tokenizer": tokenizer, "start": start, "end": end},  # the same for all batches
        input_columns=rows.column_names, remove_columns=rows.column_names,  # the text is not kept
        batched=True, batch_size=max(1, min(1000, TOKENIZE_BYTES * len(rows) // max(1, rows.data.nbytes))),  # 1 MB
        features=datasets.Features(kinds), load_from_cache_file=not rebuild,  # 4 bytes an id
        new_fingerprint=key, cache_file_name=join(args.cache_dir, f"tokenized-{key}.arrow")))  # by key
    read = (rows.data.column("_marks").to_numpy() & BEGINS).sum()  # texts: the pieces of a document are one
    die_if(not len(tokenized), f"the {split} data holds no text: all {read:,} rows are blank")  # or null
    length = args.max_seq_length  # T, the tokens of a chunk
    marks = tokenized.data.column("_marks").to_numpy()  # of each row that is not blank
    sizes = pc.list_value_length(tokenized.data.column("input_ids")).to_numpy()  # tokens of each row, int32
    cut = marks & CUT * (not args.no_truncation)  # (rows,): 0 where a row is kept whole
    kept = np.where(cut, sizes.clip(max=length), sizes)  # tokens of each row that are packed
    lost = sizes.sum() - kept.sum()  # tokens that truncation takes away
    parts = {split: (np.zeros_like(kept), kept)}  # split → first and end of what is packed of each row
    if args.validation_split_percentage:  # of the training data, as there is no other
        parts = hold_out(tokenized, kept, marks, args)  # the same for both splits
    words = (f"{read:,} rows read, {read - (marks & BEGINS).sum():,} blank skipped, "  # no silent loss
             f"{(kept < sizes).sum():,} texts truncated (-{lost:,} tokens), ")
    made = {}  # split → Dataset of chunks
    for name, (first, end) in parts.items():  # mostly one
        total = (end - first).sum()  # tokens; numpy adds int32 up in 64 bits
        others = kept.sum() - total  # tokens of the other part
        words += f"{others:,} tokens held out, " * bool(others) if name == split else ""  # where the rest is
        die_if(total < length,  # text for less than one chunk
               f"the {name} data has {total:,} tokens, {length - total:,} too few for one chunk of {length:,}: "
               f"add text{', hold out another share' * (len(parts) > 1)}, or give --max_seq_length {total} or less")
        kwargs = {"files": (tokenized.cache_files[0]["filename"],), "length": length, "bos": start}  # a key
        kwargs |= {"first": first, "end": end}  # arrays of 4 bytes a row
        chunks = cached(f"{name}_chunks", group_texts, kwargs, args.cache_dir, rebuild)  # of int32 ids
        added = pc.sum(chunks.data.column("added")).as_py()  # BOS before chunks that begin inside a text
        left = total + added - len(chunks) * length  # tokens in no chunk
        log0(f"{name}: {words}{total:,} tokens kept + {added:,} BOS before chunks = "  # adds up
             f"{len(chunks):,} chunks of {length:,} + {left:,} tokens dropped at the end")
        made[name] = chunks.select_columns(["input_ids"])  # what is learnt from
        words = "held out of the training data, "  # of the second part
    had = [(marks & bit > 0).sum() for bit in (HAD_BOS, HAD_EOS)]  # numbers of texts with one of their own
    log0(*advice("packed", split, *had, lost / sizes.sum()))  # notes on these, and on much that is cut away
    return made  # of one split, or of two
def hold_out(tokenized, kept, marks, args):  # kept, marks: (rows,), as in pack_split()
    """Choose a percentage of the texts by the seed, equal ones together; of a single document its end.
    Returns: {"train": (first, end), "validation": (first, end)}, int arrays (rows,): ids taken of each row."""
    none = np.zeros_like(kept)  # (rows,)
    share = args.validation_split_percentage / 100  # 0 < share < 1
    texts = np.cumsum(marks & BEGINS > 0) - 1  # (rows,): number of the text that a row belongs to
    count = texts[-1] + 1  # texts
    if count == 1:  # a document, whose end nothing in its beginning gives away
        ends = np.cumsum(kept, dtype=np.int64)  # (rows,): tokens up to the end of each row
        border = (round(ends[-1] * (1 - share)) - ends + kept).clip(0, kept)  # ids of each row before the cut
        return {"train": (none, border), "validation": (border, kept)}  # the beginning, the end
    sums = np.zeros(count, np.uint64)  # of each text: a hash of what is packed of it
    lists = (ids for part in tokenized.data.column("input_ids").chunks for ids in part)  # ids of each row
    for text, ids, size in zip(texts, lists, kept, strict=True):  # a microsecond or three each
        code = hashlib.blake2b(ids.values[:size].to_numpy(), digest_size=8, key=b"%d" % args.seed).digest()  # by chance
        sums[text] += np.frombuffer(code, np.uint64)[0]  # modulo 2**64: the pieces of a document add up
    _, group, sizes = np.unique(sums, return_inverse=True, return_counts=True)  # equal texts are a group
    wanted = max(1, round(count * share))  # texts
    fits = sizes <= wanted  # (groups,): copies of one text may be more than what is held out
    out = fits & (np.cumsum(sizes * fits) <= wanted)  # (groups,): the first ones, in the order of hashes
    die_if(not out.any() or out.all(),  # copies of one text, say
           "--validation_split_percentage: too few different texts for two parts; give --validation_file")
    held = np.where(out[group][texts], kept, none)  # (rows,): tokens that are held out
    return {"train": (none, kept - held), "validation": (none, held)}  # each text is in one of them
def tokenize_texts(texts, marks, tokenizer, start, end):  # called by datasets.map
    """Map list[str or None], list[int] to {"input_ids": list[list[int]], "_marks": list[int]}; none blank."""
    rows = [row for row in zip(texts, marks, strict=True)  # pairs of a text and its marks
            if row[0] and not (row[0].isspace() and row[1] | CUT == TEXT)]  # blank pieces stay
    codes = tokenizer.backend_tokenizer.encode_batch_fast([text for text, _ in rows], add_special_tokens=False)  # ids
    bos = tokenizer.bos_token_id  # 2 for Gemma
    made = {"input_ids": [], "_marks": []}  # the columns of the result
    for (_, mark), code in zip(rows, codes, strict=True):  # a row at a time
        ids = code.ids  # of the text alone
        if bos in ids and bos != tokenizer.eos_token_id:  # <bos> in the text; if BOS is EOS, it is learnt
            ids = np.where(np.equal(ids, bos), np.invert(ids), ids).tolist()  # seen, not predicted
        before = start * (mark & BEGINS)  # [~2], or [] inside a document
        behind = end * (mark & ENDS > 0)  # [1] with --add_eos, else []
        mark += HAD_BOS * (ids[:1] == before != []) + HAD_EOS * (ids[-1:] == behind != [])  # for the report
        made["input_ids"].append(before * (ids[:1] != before) + ids + behind * (ids[-1:] != behind))  # single
        made["_marks"].append(mark)  # group_texts() looks for CUT
    return made  # lists of equal length

def group_texts(files, length, first, end, bos):  # Arrow files of tokenized texts → chunks, without padding
    """Concatenate ids first to end of each row (arrays); bos ([~id] or []) goes before chunks that lack it.
    Yields: {"input_ids": int32 array (length,), "added": 1 if such a BOS was put before it, else 0}."""
    tail = np.empty(0, np.int32)  # ids that are in no chunk yet: fewer than length
    done = 0  # rows of earlier batches
    for path in files:  # texts stay in their order
        with pa.OSFile(path) as source, pa.ipc.open_stream(source) as batches:  # streamed: memory stays flat
            for batch in batches:  # at most a thousand texts: 12 million ids take a fraction of a second
                sizes = pc.list_value_length(batch["input_ids"]).to_numpy()  # tokens of each row
                at = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place in its row
                rows = slice(done, done + len(batch))  # of first and end
                inside = (at >= np.repeat(first[rows], sizes)) & (at < np.repeat(end[rows], sizes))  # (ids,)
                ids = np.concatenate([tail, batch["input_ids"].flatten().to_numpy()[inside]])  # end to end
                done += len(batch)  # rows
                at = 0  # first of the ids that are in no chunk yet
                while at < len(ids):  # a chunk at a time
                    before = np.array(bos[:ids[at] not in bos], np.int32)  # [~2] inside a text, [] at its BOS
                    chunk = np.concatenate([before, ids[at:at + length - len(before)]])  # may be too short
                    if len(chunk) < length:  # to be filled by the next batch
                        break  # to the tail
                    yield {"input_ids": chunk, "added": len(before)}  # a row of the data set
                    at += length - len(before)  # each id is in one chunk
                tail = ids[at:]  # first in the next batch; in the end, what the report calls dropped

def text_bytes(chunks, tokenizer):  # → UTF-8 bytes of the text that is predicted in a Dataset of chunks
    words = tokenizer.convert_ids_to_tokens(range(1 + max(tokenizer.get_vocab().values())))  # "▁the", <0x0A>
    words = [re.sub("^<0x..>$", "b", word or "").replace("▁", "b") for word in words]  # b: any letter of one byte
    size = len if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else lambda word: len(word.encode())  # UTF-8
    sizes = np.array([*map(size, words)])  # (V,): bytes of each token; GPT-2's tokens have a letter for each byte
    sizes[tokenizer.all_special_ids] = 0  # control words are no text
    ids = (p.flatten().to_numpy().reshape(len(p), -1)[:, 1:] for p in chunks.data.column("input_ids").chunks)  # (n, T)
    return sum(sizes[some[some >= 0]].sum().item() for some in ids)  # first tokens and BOS count for nothing
def fingerprints(model, train, validation):  # → {"model", "train_data", "validation_data": SHA-256}
    odd = ("transformers_version", "_name_or_path", "use_cache", "dtype")  # keys that change no result
    config = {key: value for key, value in model.config.to_dict().items() if key not in odd}  # such as sliding_window
    sums = {"model": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())}  # next, its weights
    for weight in model.parameters():  # finds a model directory that was changed in between
        sums["model"].update(weight.detach().numpy().data)  # float32, still on the CPU: half a second
    for name, data in (("train_data", train), ("validation_data", validation)):  # Datasets of chunks, or None
        sums[name] = hashlib.sha256()  # the hash of nothing where there is no data
        for chunks in data.data.column("input_ids").chunks if data else ():  # memory-mapped Arrow arrays
            sums[name].update(chunks.flatten().to_numpy().data)  # lengths need no hash: all are equal
    return {name: digest.hexdigest()[:16] for name, digest in sums.items()}  # 16 hex digits: 64 bits

# ── Training ───────────────────────────────────────────────────────────────────────────────────────
class FineTuner(transformers.Trainer, transformers.TrainerCallback):  # also its own callback, for on_save()
    """The Trainer with honest numbers, a guard against NaN, a stop at signals, and checkpoints made whole."""
    def __init__(self, run, resume, **named):  # named: for the Trainer
        super().__init__(**named)  # the Trainer sets the seed here
        self.run = run  # who this run is, and its processes
        self.resume = resume  # the checkpoint that earlier calls have left
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # losses, tokens of a line
        self.tokens = 0  # trained on, by all ranks and all calls
        self.compiled = False  # True once the layers are compiled
        self.paces = []  # seconds of this call's second and third step: the first one is slower
        self.curves = None  # TensorBoard's SummaryWriter, on rank 0
        self.add_callback(self)  # called after the Trainer's own callbacks

    def on_train_begin(self, args, state, control, **_):  # everything is loaded, nothing trained
        state.compute_steps(args, state.max_steps)  # a changed --logging_steps or --save_steps takes effect
        state.best_model_checkpoint = self.resume.best or state.best_model_checkpoint  # the run may have been moved
        last = ([{"tokens_seen": 0, "seconds": 0.0}] + self.lines())[-1]  # each checkpoint has a line
        self.tokens = last["tokens_seen"]  # tokens of earlier calls
        self.earlier = last["seconds"]  # training time of earlier calls
        self.first = state.global_step  # steps that earlier calls have made
        self.began = time.time()  # when this call began to train, seconds since 1970
        if self.model_wrapped is not self.model:  # there are several processes
            zero_grad = self.model_wrapped.zero_grad  # a method of DistributedDataParallel
            self.model_wrapped.zero_grad = lambda: zero_grad(set_to_none=False)  # zeros stay in the buckets
        self.start_stopwatch()  # from here on the speed is measured
        self.run.signals.in_training = not self.run.args.dry_run  # now a signal waits for a checkpoint
    def on_step_begin(self, args, state, control, **_):  # the batches of the step are there
        self.step_began = time.time()  # seconds since 1970

    # The Trainer divides a batch's losses by the step's tokens and averages over ranks: times tokens, a sum.
    def training_step(self, model, inputs, num_items_in_batch=None):  # forward and backward pass of a batch
        share = super().training_step(model, inputs, num_items_in_batch)  # of the loss; ranks are averaged
        batches = self.current_gradient_accumulation_steps  # perhaps fewer in an epoch's last step
        tokens = inputs["input_ids"].numel() * self.args.world_size  # tokens of this batch on all ranks
        learnt = tokens * batches if num_items_in_batch is None else num_items_in_batch  # tokens in the step
        self.sums += torch.stack([share * learnt, torch.as_tensor(learnt / batches, device=share.device)])  # no sync
        self.tokens += tokens  # no padding: every id is a token trained on
        return share  # the Trainer sums up the shares itself

    def on_step_end(self, args, state, control, **_):  # the Trainer's own callback has said what is due
        self.stopping = self.run.ranks.max(self.run.signals.received)  # 0, or what all ranks agree on
        if self.stopping:  # the Trainer saves; on_save() ends the run
            control.should_save = control.should_training_stop = True  # in addition to what is due anyway
            args.save_strategy = "steps"  # "best" would save only the best model so far
        made = state.global_step - self.first  # steps of this call
        if made in (1, 3):  # between the two lie two steps, whose time is taken
            self.totals()  # waits for the devices of all ranks
        if made in (2, 3):  # of this call
            self.paces.append(time.time() - self.step_began)  # seconds
        if made == 3:  # the time of the whole is known by now
            log0(*ask("report.time_left", self.paces, state.max_steps - state.global_step))  # steps to come
        if self.run.args.dry_run and state.global_step == min(3, state.max_steps):  # enough is known
            control.should_save = control.should_training_stop = True  # a checkpoint is measured, too
            self.saving = time.time()  # seconds since 1970
        due = control.should_save or control.should_evaluate or state.global_step >= state.max_steps  # or last step
        control.should_log |= due  # a checkpoint holds the log line of its step
        if control.should_log:  # the only steps that wait for the device
            finite = [weight.isfinite().all() for weight in self.model.parameters()]  # gradients spoil them
            if not (math.isfinite(sum(self.totals())) and torch.stack(finite).all()):  # the same on all ranks
                die(f"the loss or the weights are no finite numbers at step {state.global_step}: "  # on all ranks
                    "nothing of it is saved. Usual causes: a high --learning_rate, --fp16, a broken model. "
                    "Change that, and start with another --output_dir", 1)  # 1: the call itself is right
    def on_evaluate(self, args, state, control, **_):  # a checkpoint follows
        if self.exhausted() and self.run.signals.in_training:  # the finished model is evaluated, too
            log0("The last evaluations were no better (--early_stopping_patience): the training ends.")  # early
            control.should_training_stop = True  # the Trainer saves, and leaves its loop
    def exhausted(self):  # → bool: were the last --early_stopping_patience evaluations no better than one before?
        losses = [line["eval_loss"] for line in self.state.log_history if "eval_loss" in line]  # of all calls
        patience = self.run.args.early_stopping_patience or math.inf  # evaluations
        return bool(losses) and len(losses) - 1 - np.argmin(losses) >= patience  # since the best one
    def totals(self):  # since the last log line, of all ranks: [sum of losses, number of their tokens]
        return self.accelerator.gather(self.sums).view(-1, 2).mean(0).tolist()  # waits for all ranks' devices
    def lines(self):  # all log lines of the training so far, also those of earlier calls
        return [line for line in self.state.log_history if "tokens_seen" in line]  # without evaluations
    def start_stopwatch(self):  # after a log line, an evaluation, a checkpoint
        self.before = self.tokens  # tokens so far: the next line's speed counts from here
        self.logged = time.time()  # seconds since 1970

    def log(self, logs, *rest):  # every number passes here, on its way to console, TensorBoard and JSON
        step = self.state.global_step  # optimizer steps made when the line is written
        if "learning_rate" in logs:  # a line of training: the Trainer has just waited for the device
            loss, tokens = self.totals()  # since the last line
            self.sums.zero_()  # the next line counts from here
            speed = (self.tokens - self.before) / max(time.time() - self.logged, 1e-9)  # of all ranks
            seconds = time.time() - self.began  # of this call, evaluations and checkpoints included
            left = (self.state.max_steps - step) * seconds / max(step - self.first, 1)  # seconds to go
            memory = torch.cuda.max_memory_allocated() or resource.getrusage(0).ru_maxrss * 1024  # bytes: the peak
            logs |= {"loss": loss / tokens,  # a mean over tokens: a short step counts for less
                     "tokens_per_second": round(speed), "tokens_seen": self.tokens,  # by all ranks
                     "peak_memory_gb": round(memory / 1e9, 2),  # near the GPU's size: time for REMEDIES
                     "seconds": round(self.earlier + seconds, 1),  # of training, by all calls
                     "minutes_left": round(left / 60, 1)}  # at the pace of this call
            self.start_stopwatch()  # the next line's speed begins here
        if "train_loss" in logs:  # after the last step: numbers of all calls together
            start = time.time() - self.lines()[-1]["seconds"]  # as if all calls were one
            logs |= speed_metrics("train", start, self.tokens // self.length, step)  # chunks, steps a second
            tokens = np.diff([0, *(line["tokens_seen"] for line in self.lines())])  # tokens of each log line
            logs["train_loss"] = float(np.average([line["loss"] for line in self.lines()], weights=tokens))  # the mean
        super().log(logs, *rest)  # to console, TensorBoard and trainer_state.json

    def evaluate(self, *rest, **named):  # leaves dropout's random state as it was
        with torch.random.fork_rng(devices=[]):  # the data loader draws a random number
            metrics = super().evaluate(*rest, **named)  # eval_loss and more, from compute_metrics
            self.write_samples()  # by the weights that were evaluated
        self.start_stopwatch()  # an evaluation is no time of training
        return metrics | {name: metrics["eval_" + name] for name in ("perplexity", "bits_per_byte")}  # under both names
    def write_samples(self):  # what the model writes behind each --sample_prompt; changes no weight
        begin = [~token for token in special_ids(self.processing_class, False)[0]]  # BOS, or none
        log0(*ask("report.samples", self, self.run.args.sample_prompt or (), begin))  # on all ranks

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # → None, (B,), (B,)
        inputs = self._prepare_inputs(inputs)  # {"input_ids", "labels"}: (B, T), int64, on the device
        labels = inputs["labels"][:, 1:]  # (B, T - 1): what is to be predicted
        learnt = (labels != -100).sum(1)  # (B,): predicted tokens of each chunk
        with torch.no_grad():  # accelerate has put autocast into the model
            result = model(**inputs)  # the model shifts the labels
            if "token_losses" in result:  # our loss: (B, T - 1), one of each token
                losses = result["token_losses"].sum(1)  # (B,): of each chunk
            else:  # a model with a loss of its own, which may hold more than cross entropy
                scores = result.logits[:, :-1].float().transpose(1, 2)  # (B, V, T - 1)
                losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none").sum(1)  # (B,)
        return None, losses, learnt  # the Trainer gathers them and drops chunks that filled up a batch

    def on_save(self, args, state, control, **_):  # publishes what the Trainer has written into .staging
        draft = join(args.output_dir, f"checkpoint-{state.global_step}")  # args.output_dir is .staging
        final = join(self.run.output_dir, basename(draft))  # where the next call finds it
        if state.best_model_checkpoint == draft:  # this checkpoint is the best so far
            state.best_model_checkpoint = realpath(final)  # all ranks load the best one from there
        self.accelerator.wait_for_everyone()  # each rank has written its random state
        if self.run.ranks.rank == 0:  # rank 0 renames and deletes for all
            state.save_to_json(join(draft, "trainer_state.json"))  # anew, with the best one's final path
            write_manifest(draft, self.run)  # checksums, and fsync of every file
            os.rename(draft, final)  # atomic: a kill leaves either no checkpoint-N or a whole one
            fsync(self.run.output_dir)  # a power cut cannot undo the rename
            keep = {final, state.best_model_checkpoint, self.run.chosen}  # never deleted, however old
            rotate(self.run.output_dir, args.save_total_limit, keep)  # the oldest beyond the limit go
        self.accelerator.wait_for_everyone()  # all ranks see checkpoint-N from here on
        self.start_stopwatch()  # saving is no time of training
        if self.stopping:  # a signal has come, and all ranks agree on it
            saved = f" at step {state.global_step:,} of {state.max_steps:,}; saved {final}"  # leave() says so
            self.run.signals.leave(self.stopping, saved)  # ends the run, with a sentence

    def _run_epoch(self, **named):  # private: requirements.txt holds transformers to the tested minor version
        if self.state.global_step < self.state.max_steps and not self.exhausted():  # epochs are rounded up
            super()._run_epoch(**named)  # an epoch, or the rest of one

def make_trainer(model, tokenizer, args, train, validation, run, resume):  # → FineTuner, with the model on the device
    a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size  # chunks in an optimizer step
    epoch_steps = max(1, math.ceil(len(train or ()) / a_step))  # the last step of an epoch may be smaller
    for kind in ("logging", "eval", "save"):  # the end of an epoch becomes a step as any other
        if getattr(args, f"{kind}_strategy") == "epoch":  # the Trainer ends an epoch in a call of its own
            setattr(args, f"{kind}_strategy", transformers.IntervalStrategy.STEPS)  # steps instead of epochs
            setattr(args, f"{kind}_steps", epoch_steps)  # due once an epoch, as before
            args.eval_delay *= epoch_steps if kind == "eval" else 1  # --eval_delay: from epochs to steps
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)  # predict the next token
    def collate(rows):  # rows → a batch: input_ids and labels (B, T), int64; on the CPU, while the GPU works
        ids = collator([row["input_ids"] for row in rows])["input_ids"]  # the collator's labels lack pad
        return {"input_ids": torch.where(ids < 0, ~ids, ids), "labels": ids.masked_fill(ids < 0, -100)}  # BOS
    size = validation and text_bytes(validation, tokenizer)  # of the text that an evaluation predicts
    def scores(seen):  # predictions, label_ids: (chunks,) sums of losses, and predicted tokens, of each chunk
        nats = seen.predictions.sum(dtype=float)  # -log p of all that is predicted
        loss = nats / max(1, seen.label_ids.sum())  # each token counts once
        bits = nats / math.log(2) / max(1, size)  # a byte of text: comparable between tokenizers
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}  # exp(710) overflows
    args.accelerator_config.non_blocking = args.dataloader_pin_memory  # a GPU works while a batch is copied
    trainer = FineTuner(  # train() makes optimizer and schedule
        run, resume, model=model, args=args, data_collator=collate, processing_class=tokenizer,  # saved in each model
        train_dataset=train and train.with_format("torch"),  # tensors: lists of numbers take long to stack
        eval_dataset=validation and validation.with_format("torch"),  # None: no evaluation
        compute_metrics=scores)  # called at the end of an evaluation
    ddp = trainer.accelerator.ddp_handler  # settings of DistributedDataParallel
    warnings.filterwarnings("ignore", ".*broadcast_buffers")  # torch renames what the Trainer sets for us
    ddp.gradient_as_bucket_view = True  # gradients live in the buckets that they are sent from: 1.07 GB less
    ddp.comm_hook = accelerate.DDPCommunicationHookType(run.settings["ddp_comm_hook"] or "no")  # a str is ignored
    trainer.length = len((train or validation)[0]["input_ids"])  # T, the tokens of a chunk
    model.to(args.device)  # with --bf16_full_eval the Trainer has not done so
    use_lean_norms(model)  # the same values in less memory
    with trainer.accelerator.autocast():  # the trials run in the dtypes of the training
        use_windowed_attention(model)  # on a GPU
        plain = use_chunked_loss(model)  # False: its own loss is in use
        if compiler := train and run.settings["torch_compile"]:  # asked for; evaluations run uncompiled
            log0("Compiling the layers: this takes a minute or two.")  # else a long silence
            shape = (min(args.train_batch_size, len(train)), trainer.length)  # B, T of a batch
            trial = (model, args, plain, *shape, compiler)  # forward and backward, in the shape of a batch
            trainer.compiled = tried("torch.compile", "layers", *trial)  # one by one
    if trainer.pop_callback(integration_utils.TensorBoardCallback) and run.ranks.rank == 0:  # it makes a folder a call
        again = train and (resume.state.global_step + 1 if resume.path else 0)  # first step to be logged anew
        trainer.curves = ask("report.curves", trainer, run.output_dir, again)  # one curve, of all calls
    return trainer  # ready to train or to evaluate

# ── The run ────────────────────────────────────────────────────────────────────────────────────────
def save_results(trainer, split, metrics):  # a table, {split}_results.json, and a part of all_results.json
    trainer.log_metrics(split, metrics)  # rank 0 prints a table
    trainer.save_metrics(split, metrics)  # into .staging; with --do_eval alone into output_dir
def train_and_save(trainer, run, resume, dtype):  # train, evaluate, publish; a kill anywhere costs nothing
    metrics = trainer.train(resume_from_checkpoint=resume.path).metrics  # a signal may end the run in here
    run.signals.in_training = False  # from here on a signal ends the run at once
    if signalled := run.ranks.max(run.signals.received):  # a signal came after the last step, on some rank
        run.signals.leave(signalled, " after the last step")  # the same command makes the finished model
    staging = trainer.args.output_dir  # a kill leaves no half model in output_dir
    trainer.model.config.use_cache = True  # for config.json: training needs no cache, generation does
    for weight in trainer.model.parameters():  # by default in 16 bits, as Gemma is published
        weight.data = weight.data.to(dtype)  # rounded; checkpoints keep all digits
    trainer.save_model()  # model.safetensors, config.json, tokenizer
    for weight in trainer.model.parameters():  # what was saved is evaluated
        weight.data = weight.data.float()  # exact: every 16-bit number is one of float32
    if trainer.eval_dataset is not None:  # has the model learnt, or memorized?
        save_results(trainer, "eval", trainer.evaluate())  # of the weights that are published
    else:  # an evaluation writes them, too
        trainer.write_samples()  # what it has learnt
    save_results(trainer, "train", metrics)  # speed and loss of all calls
    if run.ranks.rank == 0:  # rank 0 writes and renames for all
        ask("publish.accompany", trainer, run, staging)  # model card, notice, tokenizer.model
        keep = {trainer.state.best_model_checkpoint, run.chosen}  # never deleted, however old
        rotate(run.output_dir, trainer.args.save_total_limit, keep)  # a kill may have left one too many
        trainer.state.best_model_checkpoint = None  # the model needs none of the checkpoints
        trainer.state.save_to_json(join(staging, "trainer_state.json"))  # the log of the whole run
        write_manifest(staging, run)  # checksums, and fsync of every file
        for name in sorted(os.listdir(staging), key=lambda name: name.startswith("model")):  # the weights come last
            os.replace(join(staging, name), join(run.output_dir, name))  # each file is whole, or absent
        os.rmdir(staging)  # .staging is empty by now
        fsync(run.output_dir)  # on the disk before the exit status says so
def push(run):  # uploads the finished model with --push_to_hub; also one that an earlier call has made
    if run.args.hub and run.ranks.rank == 0:  # once
        fault = ask("publish.push", run.output_dir, *run.args.hub, otherwise=MISSING)  # "" when it is there
        die_if(fault, fault, 1)  # the model is whole in output_dir

def main(args, signals):  # the table of contents; args: Namespace, or the SystemExit of a wrong call
    ranks = join_group(args)  # Ranks of one process, or of several on all machines
    with ranks.together():  # phase: the flags and the settings
        if isinstance(args, SystemExit):  # a wrong call, on this rank
            raise args  # together() tells the other ranks
        training_args = make_training_arguments(args)  # from here on the device is known
        transformers.set_seed(args.seed)  # new embedding rows, if any, are the same in every run
        tools = {name: version(name) for name in ("torch", "transformers")}  # a change is no error
        if args.hub and ranks.rank == 0:  # may this token write there? A night later would be late
            fault = ask("publish.check", args.output_dir_asked, *args.hub, otherwise=MISSING)  # "" also for no answer
            die_if(fault, fault)  # nothing has been done
        tools["device"] = torch.cuda.get_device_name() if training_args.device.type == "cuda" else "cpu"  # own rounding
        settings = run_settings(args, training_args)  # by which this run is known again
        run = Run(settings, tools, args.resume_from_checkpoint, args.output_dir, ranks, signals, args)  # all of it
        os.makedirs(args.output_dir, exist_ok=True)  # of a dry run; any other is there
    if ranks.size > 1:  # several processes: compare before any work
        check_plan(args, training_args, ranks)  # flags, versions and output_dir must agree
    found = Resume()  # a fresh start, unless a checkpoint is found
    with ranks.together():  # phase: what has an earlier call left?
        if ranks.rank == 0 and not args.evaluate_only:  # an evaluation writes no checkpoint
            run.lock = lock_output_dir(args.output_dir)  # held until this process ends
            if args.dry_run:  # begins anew, in an empty directory
                signals.scratch = args.output_dir  # removed at the end
                ask("report.clear", args.output_dir)  # a kill may have left something
            else:  # a training
                found = find_checkpoint(run)  # on one rank: two choices would train two runs
                refuse_other_run(run, found)  # flags, before minutes of work
    resume = ranks.gather(found)[0]  # all ranks take what rank 0 has found
    if resume.path == args.output_dir:  # the finished model is there, and whole
        log0(f"This run finished at step {resume.state.global_step:,}: nothing is left to train or save. "  # no error
             f"To train further, give --model_name_or_path {args.output_dir} and another --output_dir.")
        push(run)  # an upload may have failed
        return  # exit status 0, before data and weights are loaded
    with ranks.together():  # phase: the model, float32 and still on the CPU
        tokenizer, model = load_model(args)  # first contact with the hub
    for first in (True, False):  # phase: one process a machine prepares the data, the others read its cache
        with ranks.together():  # the others wait here, for hours if need be
            if (ranks.rank == ranks.machine) == first:  # this process's turn
                train, validation = prepare_dataset(args, tokenizer, args.overwrite_cache and first)  # chunks
    prints = fingerprints(model, train, validation)  # of every token and every weight
    ranks.check_same(prints)  # copies of the data may differ between machines
    steers = ["validation_data"] * ("validation_file" in run.settings)  # there if losses steer the run
    run.settings |= {name: prints[name] for name in ("model", "train_data", *steers)}  # they decide the weights, too
    refuse_other_run(run, resume)  # now data and weights count, too
    needs = steers or training_args.eval_on_start or training_args.save_strategy == "best"  # evaluations
    die_if(needs and not validation,  # no file, no split
           "--load_best_model_at_end, --early_stopping_patience, --eval_on_start, --save_strategy best and a schedule "
           "that follows the loss need validation data: give --validation_file or --validation_split_percentage")
    training_args.eval_strategy = training_args.eval_strategy if validation else transformers.IntervalStrategy.NO  # no
    training_args.eval_on_start &= not resume.path  # an earlier call has made that evaluation
    try:  # a part that is not installed, a full GPU, a full disk
        with ranks.together():  # last phase: after it --ddp_timeout is the limit
            trainer = make_trainer(model, tokenizer, training_args, train, validation, run, resume)  # on the device
            run.versions["attention"] = model.config._attn_implementation  # a trial may fail another time
            run.versions["layers"] = "compiled" if trainer.compiled else "not compiled"  # in use, not asked
            ends = special_ids(tokenizer, args.add_eos)  # whether texts get BOS and EOS
            log0(*ask("report.plan", args, trainer, len(train or ()), *ends))  # what is about to happen
        if resume.path and (state := resume.state):  # the same command again
            log0(f"Going on from {resume.path}, step {state.global_step:,} of {state.max_steps:,}.")  # steps made
            if resume.versions != run.versions:  # allowed: a run may move to another machine
                log0("warning  the weights may differ in their last bits: "  # other kernels round otherwise
                     f"{differences(resume.versions, run.versions)} when that was saved")
        if args.dry_run:  # beside output_dir, in which nothing changes
            sys.exit(ask("report.dry_run", trainer, run, otherwise=MISSING))  # 1: something is lacking
        if args.evaluate_only:  # --do_eval without --do_train
            save_results(trainer, "eval", trainer.evaluate())  # loss and perplexity of the given model
        else:  # every other call trains
            train_and_save(trainer, run, resume, getattr(torch, args.save_dtype))  # publishes in output_dir
            push(run)  # with --push_to_hub
    except Exception as error:  # die() raises SystemExit, which is no Exception
        if args.dry_run and ranks.size == 1:  # with several, the others wait for this one
            ask("report.try_smaller", error, args)  # after a lack of memory: does not return
        explain(error, "--output_dir", args.output_dir, training_args.device, signals.in_training)  # or not
        raise  # unexplained: Python prints the traceback
    log0(f"Done: the {'metrics are' if args.evaluate_only else 'model is'} in {args.output_dir}.")  # a run's last line

if __name__ == "__main__":  # python main.py, accelerate launch main.py
    try:  # however the run ends
        with reported():  # an error ends in one sentence
            main(ARGS, SIGNALS)  # ARGS may be the SystemExit of a wrong call
    finally:  # Python's own end follows, in which nothing may raise, and which waits for living helpers
        for number in (signal.SIGCHLD, *STOPS):  # torch complains about killed loaders; a signal now just kills
            signal.signal(number, signal.SIG_DFL)  # the answer of Linux
        for loader in multiprocessing.active_children():  # deaf to SIGTERM
            loader.kill()  # SIGKILL: a data loader has nothing to lose
        shutil.rmtree(SIGNALS.scratch or "", ignore_errors=True)  # of a dry run
