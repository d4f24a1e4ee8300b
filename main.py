"""Fine-tune Google's Gemma 3 270M on your own text.

    python main.py --train_file data/train.jsonl --validation_file data/val.jsonl --bf16

The file is in the order of a run, and main(), its last function, is the table of contents:

    argv ─▶ parse_args ───────────── a slip is answered at once: torch and its kin are imported below
    join_group ───────────────────── several processes meet, and from here on end together
    make_training_arguments ──────── the Trainer's own flags, vetted
    find_checkpoint ──────────────── where an earlier call of the same command has stopped, if one has
    load_model, use_chunked_loss ─── float32 weights, 16-bit products, never all logits at once
    load_and_prepare_dataset ─────── read_texts ─▶ tokenize_texts ─▶ group_texts: chunks of max_seq_length tokens
    make_trainer, train_and_save ─── .staging ─▶ checkpoint-N, curves ─▶ the finished model in output_dir
"""
import argparse  # the command line
import atexit  # what is to be closed before Python ends
import contextlib  # what happens around a block
import csv  # rows of .csv files, with their line numbers
import ctypes  # prctl, for which Python has no name
import difflib  # "did you mean": the nearest name
import fcntl  # the lock on output_dir
import gzip  # .gz files are read as they are
import hashlib  # checksums of checkpoints
import importlib.util  # is a package there? without importing it
import json  # data, manifests, error files
import math  # perplexity is exp(loss)
import multiprocessing  # data loaders that are still alive
import os  # paths and the environment
import re  # names of flags, of checkpoints, of GPUs
import resource  # memory of this process
import shutil  # removes directories, measures disks
import signal  # SIGTERM and Ctrl-C
import socket  # names and addresses of machines
import sys  # exit status, standard error
import threading  # errors of TensorBoard's writer
import time  # speed, and the seconds of all calls
import traceback  # errors with all their causes
from dataclasses import asdict, dataclass, field, replace  # state whose fields are listed in one place
from datetime import timedelta  # how torch takes a timeout
from glob import escape, glob  # "data/*.jsonl" given in quotes
from importlib.metadata import version  # of a package, without importing it
from os.path import abspath, basename, dirname, exists, getsize, isdir, isfile, join, realpath  # paths

MODEL_ALIASES = {"google/gemma-270m": "google/gemma-3-270m"}  # the short name → the published one
WIKITEXT = "Salesforce/wikitext"  # the one data set whose configuration is chosen here
DATASET_ALIASES = {"wikitext": WIKITEXT}  # its name before hub names had owners
WIKITEXT_CONFIG = "wikitext-2-raw-v1"  # 2 million words of untouched text
FORMATS = (".json", ".jsonl", ".csv", ".txt")  # local files, each also with .gz behind it
SPEAKER = os.environ.get("LOCAL_RANK", "0") == "0"  # says what all processes of this machine know
REPORTERS = (  # places where the Trainer can draw curves
    "tensorboard", "wandb", "none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive",
    "flyte", "kubeflow", "mlflow", "neptune", "swanlab", "trackio")  # each needs its package
PARTIAL = "makes checkpoints that no run can go on from"  # without the optimizer, or a part for each process
REFUSED = {  # flags of the Trainer that would break a promise of the README, and why
    "--save_only_model": PARTIAL, "--enable_jit_checkpoint": PARTIAL, "--save_on_each_node": PARTIAL,  # checkpoints
    "--fsdp": PARTIAL, "--deepspeed": PARTIAL,  # for models that one GPU cannot hold
    "--auto_find_batch_size": "changes the effective batch in the middle of a run",  # when the GPU is full
    "--batch_eval_metrics": "leaves no loss of each chunk to make the mean of",  # as each has to count once
    "--eval_do_concat_batches": "leaves no mean over all chunks"}  # but a list for each batch
INEXACT = {  # flags of the Trainer with which a run that was stopped may end with other weights
    "--ignore_data_skip", "--train_sampling_strategy", "--accelerator_config", "--dataloader_persistent_workers"}
REMEDIES = (  # against a full GPU, the cheapest first
    "(1) add --bf16; (2) halve --per_device_train_batch_size (4, 2, 1) and double --gradient_accumulation_steps: "
    "the same training; (3) add --gradient_checkpointing: about 20 % slower; "
    "(4) shorten --max_seq_length (2048, 1024, 512)")

# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────
def log0(*lines):  # progress goes to standard output, from rank 0 alone
    if os.environ.get("RANK", "0") == "0":  # launchers set it; a single process has none
        print(*lines, sep="\n", flush=True)  # a log file shows them at once

def die(sentence, status=2, speaks=True):  # errors go to standard error, by reported()
    """End the run with a sentence and a status: 2 for a wrong call or wrong data, else 1; speaks: see reported()."""
    end = SystemExit(status)  # no Exception: no library on the way wraps it
    vars(end).update(sentence=sentence, speaks=speaks)  # for reported(), and for the other ranks
    raise end  # to reported(), which stands around everything

def die_if(wrong, sentence):  # wrong: a condition, named where this is called, or what is empty if all is well
    if wrong:  # most checks have this form
        die(sentence)  # which says what to do

@contextlib.contextmanager  # for with statements
def reported():  # around the command line, and around main()
    """Print the sentence of die(), unless another rank speaks for this machine, and leave it for the launcher."""
    try:  # the block of the with statement
        yield  # SystemExit comes out of it
    except SystemExit as end:  # from die(), or from --help, which has no sentence
        sentence = getattr(end, "sentence", "")  # in the user's words
        if sentence and "TORCHELASTIC_ERROR_FILE" in os.environ:  # of this rank, for tools/launch.py
            with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as note:  # in torchrun's format
                json.dump({"message": sentence, "timestamp": int(time.time())}, note)  # ASCII
        if sentence and end.speaks:  # a line break first: a progress bar may be there
            print(f"\nmain.py: error: {sentence}", file=sys.stderr, flush=True)  # apart from the results
        raise  # with the exit status

def did_you_mean(name, names):  # " (did you mean 'text'?)" for the closest of names, or ""
    close = difflib.get_close_matches(name, names, n=1)  # 0.6 of the letters fit, at least
    return f" (did you mean {close[0]!r}?)" if close else ""  # stands behind the wrong name

def bounded(kind, low, above=False):  # a type for argparse: a finite int or float, at least low, or above it
    def read(text):  # argparse adds the flag's name to what this raises
        value = kind(text)  # ValueError becomes "invalid whole number value: '1e-3'"
        if not low <= value < math.inf or (above and value == low):  # nan fails every comparison
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low}")  # 0 is no rate
        return value  # what args will hold
    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse puts it into its sentence
    return read  # for add(type=…)

def trainer_flags():  # names of the 114 fields of transformers.TrainingArguments, from its source, in milliseconds
    package = importlib.util.find_spec("transformers")  # finds the package without importing it
    die_if(package is None, "transformers is not installed: pip install -r requirements.txt")  # a fresh machine
    with open(join(dirname(package.origin), "training_args.py"), encoding="utf-8") as source:  # 3,000 lines of text
        return re.findall(r"^    (\w+): .*= field\(", source.read(), re.MULTILINE)  # "    max_steps: int = field("

def parse_args(argv=None):  # all that the user decides
    """Read argv (list[str], or None for the process's own) and check all that can be checked without torch.

    Returns: argparse.Namespace of our flags, with `given`, the flags as typed, and `trainer_argv`, those left for
        transformers.TrainingArguments. Raises: SystemExit(2) with one sentence.
    """
    parser = argparse.ArgumentParser(  # our flags; the Trainer's are left over
        usage="python main.py (--dataset_name NAME | --train_file FILE ...) [flags]",  # instead of twenty lines
        description="Fine-tune Google's Gemma 3 270M on text.",  # the second line of --help
        epilog="All other flags of transformers.TrainingArguments work too, such as --max_steps.",  # 90 of them
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,  # every flag's help ends with its default
        allow_abbrev=False)  # a shortened flag may be a misspelt one
    parser.error = lambda message: die(f"{message}; see python main.py --help")  # one sentence, no page
    switch = {"action": "store_true"}  # off unless given
    path = {"type": os.path.expanduser}  # --output_dir=~/x, which the shell leaves as it is
    count = bounded(int, 1)  # sizes
    positive = bounded(float, 0, above=True)  # rates; steps, where a value below 1 is a part of the run
    add = parser.add_argument_group("model").add_argument  # which weights, which attention
    add("--model_name_or_path", **path, default="google/gemma-270m", help="hub name or directory")  # an alias
    add("--use_flash_attention", **switch, help="version 2; needs a GPU and flash-attn; sets --bf16")  # else sdpa
    add = parser.add_argument_group("data").add_argument  # files or a data set, never both
    add("--dataset_name", **path, help="hub name, or a local data set directory")  # train and validation
    add("--dataset_config_name", help="configuration of the hub data set")  # often a language
    add("--train_file", **path, nargs="+", help=".json .jsonl .csv .txt, also .gz; several, or a glob")  # yours
    add("--validation_file", **path, nargs="+", help="the same, for evaluation")  # held out: never trained on
    add("--text_column", default="text", help="the column that holds the text")  # of all formats but .txt
    add("--max_seq_length", type=bounded(int, 2), default=2048, help="tokens per chunk")  # the context learnt
    add("--no_truncation", **switch, help="keep texts longer than a chunk whole")  # for long documents
    add("--add_eos", **switch, help="end each text with the end-of-sequence token")  # teaches where to stop
    add("--max_train_samples", type=count, help="train on the first N chunks only")  # for a quick try
    add("--max_eval_samples", type=count, help="evaluate on the first N chunks only")  # for quick evaluations
    add("--preprocessing_num_workers", type=count, help="processes that tokenize")  # unset: one, on all cores
    add("--cache_dir", **path, help="where prepared data is kept for the next run")  # unset: that of datasets
    add("--overwrite_cache", **switch, help="prepare the data anew")  # changed files do that by themselves
    add = parser.add_argument_group("training").add_argument  # schedule and optimizer
    add("--num_train_epochs", type=positive, default=3, help="passes over the data")  # each in a new order
    add("--per_device_train_batch_size", type=count, default=4, help="chunks per device at a time")  # memory
    add("--per_device_eval_batch_size", type=count, default=4, help="the same, in evaluation")  # no result
    add("--gradient_accumulation_steps", type=count, default=8, help="batches per optimizer step")  # time
    add("--learning_rate", type=positive, default=2e-5, help="the peak, after the warm-up")  # then down to zero
    add("--weight_decay", type=bounded(float, 0), default=0.01, help="of AdamW")  # not of norms and biases
    add("--warmup_steps", type=bounded(float, 0), default=500, help="steps to the peak; below 1 a part")  # of all
    group = parser.add_argument_group("memory")  # for when a GPU is full
    group.add_argument("--gradient_checkpointing", **switch, help="recompute activations: 20 %% slower")  # less kept
    add = group.add_mutually_exclusive_group().add_argument  # argparse refuses both
    add("--bf16", **switch, help="bfloat16 autocast over float32 weights")  # A40, H100 and newer; CPUs
    add("--fp16", **switch, help="float16 autocast, for GPUs before Ampere")  # with loss scaling
    add = parser.add_argument_group("logging and checkpoints").add_argument  # what is written, and when
    add("--output_dir", **path, default="./outputs", help="checkpoints, logs and the finished model")  # of a run
    add("--logging_steps", type=positive, default=10, help="steps between log lines")  # a line is their mean
    add("--save_steps", type=positive, default=500, help="steps between checkpoints")  # 3.2 GB each
    add("--eval_steps", type=positive, default=500, help="steps between evaluations")  # of validation data
    add("--overwrite_output_dir", **switch, help="move another run's files aside")  # into previous-1
    add("--save_total_limit", type=count, default=3, help="newest checkpoints that are kept")  # older ones go
    add("--report_to", nargs="+", choices=REPORTERS, default=["tensorboard"], help="where curves go")  # or none
    add("--resume_from_checkpoint", **path, help="go on from this one, not the newest")  # in any output_dir
    add = parser.add_argument_group("misc").add_argument  # processes, repeatability, what to do
    add("--ddp_timeout", type=count, default=600, help="seconds a process waits for the others")  # in training
    add("--ddp_backend", choices=("nccl", "gloo"), help="between processes; unset: nccl, on CPUs gloo")  # sums
    add("--seed", type=bounded(int, 0), default=42, help="of the order of chunks and of new weights")  # dropout
    add("--do_train", **switch, help="train; on unless --do_eval is given alone")  # as in transformers' scripts
    add("--do_eval", **switch, help="given alone: only evaluate the model on the validation data")  # no training
    words = sys.argv[1:] if argv is None else argv  # tests pass their own
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]  # a-b
    args, args.trainer_argv = parser.parse_known_args(words)  # left over: the Trainer's, or a slip
    known = [f"--{name}" for name in [*vars(args), *trainer_flags()]]  # args has a field for each of our flags
    args.given = [word.partition("=")[0] for word in words if word.startswith("--")]  # "--seed=1" → "--seed"
    for flag in args.given:  # before anything heavy is imported; the Trainer's switches have a --no_
        die_if(flag not in known and flag.replace("--no_", "--") not in known,  # a slip of a letter, or shortened
               f"unknown flag {flag}{did_you_mean(flag, known)}; see python main.py --help")
        die_if(flag in REFUSED, f"{flag} {REFUSED.get(flag)}: leave it out")  # this model needs none of them
    check_args(args)  # combinations and paths
    return args  # the call makes sense, as far as can be told without torch

def check_args(args):  # combinations and paths: what argparse cannot say; globs and aliases are expanded in place
    model = MODEL_ALIASES.get(args.model_name_or_path, args.model_name_or_path)  # a hub name or a directory
    if model != args.model_name_or_path:  # no repository on the hub has the short name
        log0(f"{args.model_name_or_path} is published as {model}: using that.")  # errors will name it so
    args.model_name_or_path = model  # from here on
    args.evaluate_only = args.do_eval and not args.do_train  # as in transformers' own scripts
    args.train_file = expand_files("--train_file", args.train_file)  # [] without the flag
    args.validation_file = expand_files("--validation_file", args.validation_file)  # a list as well
    args.resume_from_checkpoint = args.resume_from_checkpoint and realpath(args.resume_from_checkpoint)  # through links
    output = args.output_dir  # may not exist so far
    run = [mark for mark in ("manifest.json", "checkpoint-[0-9]*") if glob(mark, root_dir=output)]  # of a training
    die_if(args.seed >= 2**32, f"--seed {args.seed} is too large: choose one below {2**32:,}")  # numpy's limit
    die_if(args.use_flash_attention and not importlib.util.find_spec("flash_attn"),  # built from source, by hand
           "--use_flash_attention needs a package: pip install flash-attn --no-build-isolation")
    die_if("wandb" in args.report_to and not importlib.util.find_spec("wandb"),  # else found after the data
           "--report_to wandb needs a package: pip install wandb")
    die_if({"none", "all"} & {*args.report_to} and args.report_to[1:], "--report_to: none and all stand alone")  # both?
    die_if(args.dataset_name and (args.train_file or args.validation_file),  # which was meant?
           "data given twice: use either --dataset_name or --train_file/--validation_file")
    die_if(not (args.evaluate_only or args.dataset_name or args.train_file),  # nothing to train on
           f"no training data: give --dataset_name NAME or --train_file FILE ({' '.join(FORMATS)})")
    die_if(args.evaluate_only and not (args.dataset_name or args.validation_file),  # nothing to evaluate on
           "--do_eval needs validation data: give --dataset_name NAME or --validation_file FILE")
    die_if(args.evaluate_only and args.resume_from_checkpoint,  # a checkpoint is a model, too
           f"--do_eval alone goes on from nothing: give --model_name_or_path {args.resume_from_checkpoint}")
    die_if(args.evaluate_only and run,  # its all_results.json would be written over
           f"--output_dir {output} holds a training run: choose another for --do_eval")
    die_if(not args.evaluate_only and realpath(output) == realpath(model),  # the result would replace its base
           f"--output_dir {output} is the model to start from: choose another directory")
    for flag, name in (("--model_name_or_path", model), ("--dataset_name", args.dataset_name or "")):  # or hub names
        local = name.startswith((".", os.sep)) or name.count("/") > 1 or isfile(name)  # the hub has no such names
        die_if(local and not isdir(name),  # the hub would be asked for half a minute
               f"{flag} {name}: no such directory; give one, or a hub name (text goes to --train_file)")
    for flag, folder in (("--output_dir", output), ("--cache_dir", args.cache_dir or output)):  # now, not in hours
        fault = "no permission"  # unless the system says more
        try:  # with all directories above it
            os.makedirs(folder, exist_ok=True)  # a file may be in the way
        except OSError as error:  # in the system's words
            fault = error.strerror  # such as "Not a directory"
        die_if(not os.access(folder, os.W_OK | os.X_OK),  # also somebody else's
               f"{flag} {folder}: no files can be written there ({fault}); choose another directory")

def expand_files(flag, patterns):  # → absolute paths of existing, readable files of known formats
    files = []  # in the order given, which is that of the text
    for pattern in patterns or []:  # None without the flag
        found = [pattern] if exists(pattern) else sorted(glob(pattern, recursive=True))  # in a fixed order
        beside = glob(join(escape(dirname(pattern)), "*"))  # one of them may be meant
        die_if(not found, f"{flag} {pattern}: no such file{did_you_mean(pattern, beside)}")  # a slip, mostly
        for path in found:  # before six seconds of imports
            die_if(isdir(path), f"{flag} {path} is a directory: name files in it, or use --dataset_name")  # which?
            die_if(os.path.splitext(path.removesuffix(".gz"))[1].lower() not in FORMATS,  # never guessed
                   f"{flag} {path}: unknown extension; known are {' '.join(FORMATS)}, each also with .gz")
            die_if(not os.access(path, os.R_OK), f"{flag} {path} cannot be read: no permission (try chmod +r)")  # whose?
            die_if(getsize(path) == 0, f"{flag} {path} is empty")  # a failed export
            files.append(abspath(path))  # a part of the cache's key
    return files  # all of them can be read

# ── Signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# SIGTERM comes from batch systems and launchers, SIGINT from Ctrl-C. Before and after the training either ends the run
# at once. In training it waits for the end of the step, where all ranks agree on it, save a checkpoint and stop.

class Signals:  # what has been received, and what becomes of it; kill -9 cannot be caught, and need not be
    def __init__(self):  # before the heavy imports, as a signal may come at any time
        self.received = 0  # number of the signal once one has come, 0 before
        self.since = 0.0  # when it came, in seconds since 1970
        self.in_training = False  # then a signal waits for the end of the step
        self.launcher = 0  # process id of accelerate or torchrun, 0 without one
        for number in (signal.SIGTERM, signal.SIGINT):  # both mean: stop, but lose nothing
            signal.signal(number, self.receive)  # Python calls it between two instructions
        os.register_at_fork(after_in_child=self.release)  # data loaders and tokenizers
        if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by a launcher
            self.launcher = os.getppid()  # accelerate's for a single process passes no signal on
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: Linux sends it at the launcher's death

    def release(self):  # in each process that Python forks: a tokenizer ends at once, but a data loader is needed
        if self.in_training:  # terminals and batch systems signal all processes alike
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))  # torch sets handlers later
        for number in (signal.SIGTERM, signal.SIGINT):  # a pool ends its tokenizers by SIGTERM
            signal.signal(number, signal.SIG_DFL)  # no Python, which might wait for a lock

    def receive(self, number, frame):  # noted in training; else, or when one comes again after 3 seconds, the end
        if self.launcher:  # Linux signals at the end of the launcher's thread
            time.sleep(0.1)  # its process ends a moment later
        if self.launcher not in (0, os.getppid()):  # the launcher is dead: nobody has asked us to stop
            number = signal.SIGKILL  # a larger number than the others, so that all ranks agree on it
        if self.in_training and not self.received:  # print() is unsafe in here
            os.write(2, b"\nStopping: a checkpoint is saved at the end of this step ...\n")  # to standard error
        if not self.received:  # launchers send a second one at once
            self.since = time.time()  # from then on the 3 seconds count
            self.received = number  # on_step_end() sees it
        if not self.in_training or time.time() - self.since > 3:  # nothing to save, or impatience
            self.leave(number, "")  # what was saved before is whole

    def leave(self, number, saved):  # where every signal ends; saved: what the sentence says of a checkpoint
        self.in_training = False  # a further signal ends it at once
        lost = number == signal.SIGKILL  # a failure, with status 1: MAX_RETRIES tries again
        name = "the loss of a launcher" if lost else signal.Signals(number).name  # SIGTERM or SIGINT
        status = 1 if lost else 128 + number  # 143 or 130, as a shell reports it
        die(f"stopped by {name}{saved}; the same command again goes on", status, SPEAKER or not saved)  # all ranks stop

# ── The answer, and behind it the imports ────────────────────────────────────────────────────────────────────────────
if __name__ == "__main__":  # not where tests or worker processes import this file
    SIGNALS = Signals()  # from here on a signal ends the run with a sentence
    with reported():  # --help and a slip are answered in 0.06 s
        try:  # the whole command line
            ARGS = parse_args()  # checked, as far as can be without torch
        except SystemExit as slip:  # --help, with status 0, or a wrong call
            if not slip.code or os.environ.get("WORLD_SIZE", "1") == "1":  # nobody else waits
                raise  # to reported(), which prints it
            ARGS = slip  # main() lets the other machines know first

try:  # six seconds, for which nobody waits who has mistyped a flag
    import accelerate  # the Trainer's own idea of rank and device
    import datasets  # Arrow files, memory-mapped: data may be larger than memory
    import numpy as np  # ids in a row, cut into chunks
    import psutil  # addresses of network interfaces
    import pyarrow as pa  # the format of the cache
    import pyarrow.compute as pc  # counts and cuts lists without Python objects
    import torch  # tensors and autograd
    import torch.distributed as dist  # several processes
    import transformers  # models, tokenizers, the Trainer
    from datasets.fingerprint import Hasher  # hashes that are the same in each call
    from datasets.packaged_modules.generator.generator import Generator  # behind Dataset.from_generator
    from transformers.integrations import integration_utils  # TensorBoard's callback
    from transformers.trainer_utils import get_last_checkpoint, speed_metrics  # the highest N; steps a second
except ImportError as missing:  # a fresh machine, or half an installation
    with reported():  # in place of a traceback
        die(f"{missing}: pip install -r requirements.txt", status=1)  # the command that mends it

# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────
# A launcher starts one process, a rank, for each device of each machine. Before the training the ranks wait for each
# other for hours if need be, compare what they are about to do, and end together if one of them fails. In training a
# rank that dies closes its connections, which ends those that wait for it; one that falls silent ends them after
# --ddp_timeout. Gradients travel over NCCL between GPUs, all else over gloo. Machines are watched by tools/launch.py.

@dataclass
class Ranks:  # made by join_group(); where there is only one process, nothing here does anything
    """The processes of this run on all machines."""
    rank: int = 0  # of this process, among all
    machine: int = 0  # rank of the first process of this machine
    size: int = 1  # number of processes
    name: str = ""  # "rank 1 on node1", for sentences
    patient: object = None  # gloo group for the time before the training
    prompt: object = None  # gloo group for the training, which waits for --ddp_timeout

    def gather(self, value):  # → [value of rank 0, value of rank 1, …], pickled, over gloo
        values = [value] * self.size  # all there is to do for a single process
        try:  # a rank may die while the others wait for it
            if self.size > 1:  # each value takes its place
                dist.all_gather_object(values, value, group=self.patient)  # hours, if a download takes them
        except RuntimeError as error:  # torch's word for a closed connection
            die(f"another process was lost ({one_line(error)}); the same command again goes on", 1)  # as in training
        return values  # the same on all ranks

    def max(self, number):  # → the largest number (int) of all ranks, on which all agree; once a step
        largest = torch.tensor(number)  # on the CPU: no GPU is waited for
        if self.size > 1:  # a few bytes
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.prompt)  # RuntimeError when a rank is lost
        return largest.item()  # the same on all ranks

    @contextlib.contextmanager  # for with statements
    def together(self):  # around each phase before the training
        """End all ranks when one of them fails, with its sentence and status."""
        mine = None  # the error of this rank
        try:  # the phase
            yield  # its error comes out of here
        except (SystemExit, Exception) as error:  # die(), or a fault of this program
            mine = error  # first the others have to hear of it
        words = getattr(mine, "sentence", f"{type(mine).__name__}: {one_line(mine)}")  # die()'s, if it was that
        ends = self.gather(mine and (self.machine, self.name, getattr(mine, "code", 1), words))  # None: all is well
        here = [rank for rank, end in enumerate(ends) if end and end[0] == self.machine]  # have failed, too
        if isinstance(mine, SystemExit):  # perhaps in all ranks, as with a wrong flag
            mine.speaks = self.rank == here[0]  # one sentence a machine
        if mine:  # with its traceback, if it is a fault of this program
            raise mine  # and its own status
        for _, name, status, words in filter(None, ends):  # the first one ends all others
            die(f"{name}: {words}", status, SPEAKER and not here)  # where it has not been said

    def check_same(self, facts):  # end all ranks, unless facts (dict) are the same everywhere
        (first, wanted), *others = self.gather((self.name, as_json(facts)))  # rank 0 sets the example
        for name, theirs in others:  # the first one that differs is enough
            wrong = [f"{key} is {theirs.get(key)!r} instead of {wanted.get(key)!r}"  # None: it knows nothing of it
                     for key in wanted | theirs if theirs.get(key) != wanted.get(key)]  # in the order of the flags
            if wrong:  # training would hang, or mean nothing
                die(f"{name} differs from {first}: {'; '.join(wrong)}. All machines need the same", 2, SPEAKER)  # said

def one_line(error):  # an error's own words, which may be long, without line breaks
    return " ".join(str(error).split())  # for a sentence

def as_json(facts):  # as a manifest or another machine gives them back: enumerations as text, tuples as lists
    return json.loads(json.dumps(facts, default=str))  # for comparisons

def join_group(args):  # before a device is touched; args may be the SystemExit of a wrong call
    """Connect the processes of a launcher. Returns: Ranks. Raises: SystemExit(1) when some rank never comes."""
    rank, local, size = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))  # from 0
    if size < 2:  # no launcher, or one that starts a single process
        return Ranks()  # which waits for nobody
    ranks = Ranks(rank, rank - local, size, f"rank {rank} on {socket.gethostname()}")  # the groups follow
    cpu = not torch.cuda.is_available() or "--use_cpu" in getattr(args, "given", ())  # asked for by a flag
    cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # or by the launcher
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"  # None: no launcher has set it
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):  # other machines: gloo would use the host name's interface
        with contextlib.suppress(OSError, KeyError), socket.socket(type=socket.SOCK_DGRAM) as query:  # else gloo's choice
            query.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing: Linux looks up the way
            names = {part.address: name for name, parts in psutil.net_if_addrs().items() for part in parts}  # "eth0"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", names[query.getsockname()[0]])  # on Debian not the same
    seconds = getattr(args, "ddp_timeout", 600)  # after a wrong call the default
    patience = timedelta(seconds=seconds + (0 if cpu else 120))  # NCCL says nothing when it ends: gloo shall be first
    try:  # some rank may never come
        state = accelerate.PartialState(cpu, backend=getattr(args, "ddp_backend", None), timeout=patience)  # a group
        state.wait_for_everyone()  # NCCL connects only now
        ranks.prompt = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))  # for each step
        ranks.patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # for downloads and data
    except (RuntimeError, ValueError, OSError) as error:  # torch's own are RuntimeErrors
        die(f"{size} processes could not connect at {place} within --ddp_timeout {seconds} ({one_line(error)})", 1)  # why
    atexit.register(dist.destroy_process_group)  # its threads must not see Python shut down
    return ranks  # all of them are here

# ── The Trainer's arguments ──────────────────────────────────────────────────────────────────────────────────────────
HARMLESS = tuple(  # beginnings of the names of flags that cannot change weights: they may differ when a run goes on
    "output_dir logging_ log_ save_ eval_ do_ hub_ push_to_hub report_to run_name project trackio_ disable_tqdm debug "
    "include_ skip_memory_metrics batch_eval_metrics per_device_eval_batch_size prediction_loss_only label_names "
    "length_column_name dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent "
    "ddp_timeout ddp_backend ddp_bucket local_rank use_cpu torch_empty resume_ validation_file max_eval_samples "
    "preprocessing_ cache_dir overwrite_ evaluate_only given trainer_argv".split())  # those of ours last

def make_training_arguments(args):  # the Trainer's flags
    """Turn the command line into transformers.TrainingArguments. Raises: SystemExit(2) with one sentence."""
    cpu = not torch.cuda.is_available()  # then the same command trains on the CPU
    die_if(cpu and (args.fp16 or args.use_flash_attention),  # made for GPUs alone
           "--fp16 and --use_flash_attention need a GPU; on the CPU use --bf16, or leave them out")
    if cpu:  # else days pass before somebody misses the GPU
        log0("No GPU found: training on the CPU.")  # the one notice
    args.bf16 |= args.use_flash_attention and not args.fp16  # its kernels take 16 bits: autocast makes them
    parser = transformers.HfArgumentParser(transformers.TrainingArguments, allow_abbrev=False)  # a flag a field
    parser.error = die  # one sentence for 600 lines of usage
    parser.set_defaults(  # what flags of the Trainer may still change
        **{name: getattr(args, name) for name in trainer_flags() if hasattr(args, name)},  # those that are ours, too
        activation_checkpointing=args.gradient_checkpointing,  # the flag's new name in transformers
        use_cpu=cpu,  # else --bf16 without a GPU is refused
        logging_nan_inf_filter=False,  # the Trainer would show a mean in the place of a NaN
        ddp_find_unused_parameters=False,  # every weight is used in every step
        eval_strategy="steps")  # main() sets "no" without validation data
    plan, rest = parser.parse_known_args(args.trainer_argv)  # plan: the fields of TrainingArguments
    if rest:  # "--bf16 true", or a file without its flag
        die(f"{rest[0]!r} belongs to no flag: put --train_file or another before it, or leave it out")  # the first one
    for name in ("fsdp", "deepspeed"):  # `accelerate config` may have them switched on
        die_if(os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true", f"accelerate's {name} {PARTIAL}")  # off!
    die_if(plan.max_steps < 1 and plan.max_steps != -1,  # -1: not given
           f"--max_steps: {plan.max_steps} must be at least 1, or be left out to train --num_train_epochs")
    for flag in ("load_best_model_at_end", "eval_on_start"):  # both evaluate; a data set may have a split for it
        die_if(getattr(plan, flag) and not (args.validation_file or args.dataset_name),  # before minutes of work
               f"--{flag} needs validation data: give --validation_file")
    saves = (plan.save_strategy, plan.save_steps * (plan.save_strategy == "steps"))  # when: else the number is void
    looks = (plan.eval_strategy, plan.eval_steps * (plan.eval_strategy == "steps"))  # evaluations, likewise
    die_if(plan.load_best_model_at_end and saves != looks,  # the best one could be in no checkpoint
           "--load_best_model_at_end needs a checkpoint of each evaluation: make --save_strategy equal to "
           "--eval_strategy, and --save_steps equal to --eval_steps")
    measure = (plan.metric_for_best_model or "loss").removeprefix("eval_")  # as the Trainer does
    die_if(measure not in ("loss", "perplexity"), f"--metric_for_best_model {measure}: choose loss or perplexity")  # all
    if measure == "perplexity" and plan.greater_is_better is None:  # the Trainer knows only losses by name
        plan.greater_is_better = False  # it would load the worst model
    if not args.evaluate_only:  # checkpoints in output_dir are out of the Trainer's reach, also for deletion
        plan.output_dir = join(args.output_dir, ".staging")  # on_save() publishes what is whole
    try:  # TrainingArguments check combinations of their own
        made = transformers.TrainingArguments(**vars(plan))  # from here on the device is known
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:  # each for some flag
        die(f"the Trainer does not accept these flags: {one_line(error)}")  # its own words
    if made.n_gpu > 1:  # the Trainer would copy the model to all GPUs at every step
        log0(f"note     of {made.n_gpu} GPUs one is used: accelerate launch --num_processes N uses several")  # a rank each
        made._n_gpu = 1  # CUDA_VISIBLE_DEVICES chooses which
    for flag in INEXACT.intersection(args.given):  # allowed: some data is too large to skip
        log0(f"note     {flag}: a stopped run may go on with other data than it would have had")  # and other weights
    if made.label_smoothing_factor:  # the Trainer makes that loss itself
        log0("note     --label_smoothing_factor holds all logits in memory: a smaller batch may be needed")  # 2 GB each
    if made.use_liger_kernel:  # its layers are welcome, its loss would take the place of ours
        made.liger_kernel_config = {"fused_linear_cross_entropy": False, "cross_entropy": False}  # left as they are
    return made  # vetted

def check_plan(args, training_args, ranks):  # where there are several processes
    """End all ranks unless all machines have the same flags and versions, and see the same output_dir."""
    own = ("given", "trainer_argv", "cache_dir", "preprocessing_num_workers", "local_rank")  # of a machine
    flags = training_args.to_dict() | vars(args)  # the Trainer's and ours
    facts = {f"--{name}": value for name, value in flags.items() if name not in own}  # also those of no consequence
    facts |= {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}  # round and count
    facts |= {"main.py": sha256(__file__)[:12], "Python": sys.version.split()[0]}  # the same way
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate gives each machine as many processes
        facts["processes a machine (--num_processes)"] = os.environ.get("LOCAL_WORLD_SIZE")  # a slip in one total
    ranks.check_same(facts)  # or a sentence
    path = join(args.output_dir, f".probe-{os.environ['MASTER_PORT']}")  # a name that no other run uses
    if ranks.rank == 0:  # writes most of each checkpoint
        open(path, "w").close()  # an empty file
    ranks.gather(None)  # it is there before anybody looks
    until = time.time() + 10  # network storage may take seconds to show it
    while not exists(path) and time.time() < until:  # usually at once
        time.sleep(0.5)  # then it is asked again
    seen = ranks.gather((ranks.name, args.evaluate_only or exists(path)))  # --do_eval writes from rank 0 alone
    if ranks.rank == 0:  # whose file it is
        os.remove(path)  # the directory is as it was
    for name in [name for name, sees in seen if not sees]:  # each rank writes a part of every checkpoint
        die(f"{name} does not see what rank 0 writes in --output_dir {args.output_dir}: it has to be on "  # its own
            "storage that all machines share", 2, SPEAKER)

def run_settings(args, training_args):  # → {name: JSON value} of all flags that decide the weights a run ends with
    flags = vars(args) | training_args.to_dict()  # defaults included
    plateau = training_args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")  # the rate follows evaluations
    best = plateau or training_args.load_best_model_at_end  # else looking changes no weight
    looks = ("validation_file", "max_eval_samples", "eval_", "save_st") if best else ()  # save_strategy, save_steps
    settings = {name: value for name, value in flags.items()  # about 70 stay
                if not name.startswith(HARMLESS) or name.startswith(looks)}  # the others may change
    settings |= {"processes": training_args.world_size, "autocast": training_args.mixed_precision}  # the launcher's
    for name in {"train_file", "validation_file"} & settings.keys():  # a quick look; fingerprints() reads every id
        settings[name] = [f"{basename(path)} ({getsize(path):,} bytes)" for path in flags[name]]  # may have moved
    settings["model_name_or_path"] = basename(args.model_name_or_path.rstrip(os.sep))  # likewise
    return as_json(settings)  # as a manifest gives them back

# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────
# The Trainer saves into .staging; FineTuner.on_save() publishes what is whole. What a kill may leave, at any instant:
#
#   .staging/checkpoint-N ──rename──▶ checkpoint-N ──rename──▶ unused-checkpoint-N: damaged, or left behind
#     half made: the next start               └──────rename──▶ .trash-checkpoint-N: older than --save_total_limit,
#     removes it                                               perhaps half deleted: the next start does the rest
#
#  1. A directory gets the name checkpoint-N by a rename, when all of it is on the disk: it is whole, or absent.
#  2. Its manifest.json holds size and SHA-256 of each file, and of itself; all are verified before it is used.
#  3. A checkpoint is never written into again; what is found damaged is set aside, never deleted.
#  4. output_dir has a manifest.json of its own when the finished model is there: it is the last file to arrive.
#  5. One process, rank 0 with the lock on output_dir, decides, renames and deletes.

@dataclass
class Progress:  # in each manifest: how far the run has come over all its calls
    step: int = 0  # optimizer steps made
    max_steps: int = 0  # of the whole run: finished when equal
    seconds: float = 0.0  # of training
    tokens: int = 0  # trained on
    loss: float = 0.0  # the sum of losses up to the last log line
    learnt: float = 0.0  # how many tokens they are of
    tail: tuple = (0.0, 0.0)  # both since that line
    best: str | None = None  # what --load_best_model_at_end would publish, relative to output_dir

@dataclass
class Run:  # who this run is; the first three fields are in each manifest: by them the next call knows its run
    settings: dict  # flags, data and model that decide the weights: none may differ
    versions: dict  # may differ, with a warning
    chosen: str | None  # --resume_from_checkpoint: only what came of it is gone on from
    output_dir: str  # where the finished model goes
    ranks: Ranks  # the processes
    signals: Signals  # what has been received
    lock: object = None  # the open lock file; None on ranks other than 0

@dataclass
class Resume:  # where this call goes on from
    path: str | None = None  # a checkpoint; output_dir itself when the run has finished; None: a fresh start
    manifest: dict = field(default_factory=dict)  # what it says of its run
    progress: Progress = field(default_factory=Progress)  # how far that had come

def lock_output_dir(output_dir):  # → the open lock file: closing it, or dying, lets go of the lock
    try:  # the disk may be full
        file = open(join(output_dir, ".lock"), "a+")  # a+: it names its owner
        try:  # lockf, as data loaders would inherit flock's lock and outlive this process
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process has it
        except (BlockingIOError, PermissionError):  # POSIX allows either
            file.seek(0)  # a+ begins at the end
            die(f"--output_dir {output_dir} is in use by {file.read().strip()}: wait, or choose another", 1)  # whom
        except OSError as error:  # an old NFS
            log0(f"note     {output_dir} cannot be locked ({error.strerror}): start no second run in it")  # said
        file.truncate(0)  # the owner before has ended
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)  # for the sentence above
    except OSError as error:  # No space left on device
        die(f"--output_dir {output_dir} cannot be written ({error.strerror}): make space, or choose another", 1)  # now
    return file  # main() keeps it open

def check_lock(run):  # before anything is written: output_dir may have been moved or removed
    path = join(run.output_dir, ".lock")  # another file, if another run has made it anew
    if run.lock and not (exists(path) and os.path.samestat(os.fstat(run.lock.fileno()), os.stat(path))):  # by inode
        die(f"--output_dir {run.output_dir} was moved or removed during the run: what was saved before is where "  # it
            "it was moved to; put it back, and the same command goes on", 1)

def sha256(path):  # hexadecimal; 1.8 GB/s: two seconds a checkpoint
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:  # of any size
        while block := file.read(1 << 20):  # 1 MB at a time
            digest.update(block)  # in C
    return digest.hexdigest()  # 64 characters

def fsync(path):  # wait until a file, or a directory's list of files, is on the disk: else a rename may be first
    handle = os.open(path, os.O_RDONLY)  # a directory as well
    os.fsync(handle)  # now, not in half a minute
    os.close(handle)  # a long run would use up the handles

def seal_of(facts):  # SHA-256 of a manifest (dict), by which it guards itself, too
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()  # equal facts give equal text

def write_manifest(folder, run, progress):  # before anything in folder is renamed; then all of it to the disk
    facts = {"settings": run.settings, "versions": run.versions, "chosen": run.chosen, "progress": asdict(progress)}
    names = [name for name in os.listdir(folder) if not name.endswith("_results.json")]  # which a user may delete
    facts["files"] = {name: [getsize(join(folder, name)), sha256(join(folder, name))] for name in names}  # contents
    with open(join(folder, "manifest.json"), "w") as file:  # behind all others
        json.dump(facts | {"sha256": seal_of(facts)}, file)  # on one line: it is for programs
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)  # as it was
    for path in glob(join(escape(folder), "*")):  # results and manifest as well
        os.chmod(path, 0o666 & ~mask)  # safetensors lets only the owner read
        fsync(path)  # 0.2 s for 500 MB
    fsync(folder)  # only now may anything be renamed

def verify(folder, chosen=None):  # before a checkpoint is trusted
    """Return (Resume, "") for what is whole and is, or came of, the chosen checkpoint; else (None, what is wrong)."""
    try:  # checkpoints of other programs have no manifest
        with open(join(folder, "manifest.json")) as file:  # written behind all others
            manifest = json.load(file)  # settings, progress, files
        if manifest.pop("sha256") != seal_of(manifest):  # a flipped bit
            return None, "its manifest.json was changed"  # so nothing in it can be trusted
        for name, (size, digest) in manifest["files"].items():  # none may be missing
            if getsize(join(folder, name)) != size or sha256(join(folder, name)) != digest:  # cut short, or flipped
                return None, f"{name} is damaged"  # one is reason enough
        resume = Resume(folder, manifest, Progress(**manifest["progress"]))  # another main.py may have other fields
        best = resume.progress.best  # lies beside it
        fault = best and best != basename(folder) and verify(join(dirname(folder), best))[1]  # all of it is read, too
        if fault:  # the run could not end without it: an older checkpoint has to do
            return None, f"the best one, {best}, cannot be used: {fault}"  # which, and why
        if chosen not in (None, realpath(folder), manifest["chosen"]):  # of --resume_from_checkpoint
            return None, f"it did not come of {chosen}"  # going back leaves it behind
    except (OSError, ValueError, KeyError, TypeError) as error:  # missing, unreadable, not JSON
        return None, one_line(error)  # such as "No such file or directory"
    return resume, ""  # whole, to the last bit

def find_checkpoint(run):  # on rank 0: two choices would train two runs
    """Return the Resume of what an earlier call has left: the finished run, or the newest whole checkpoint."""
    output_dir = run.output_dir  # a shorter name
    publishing = exists(join(output_dir, ".staging", "manifest.json"))  # a kill in train_and_save()
    for name in os.listdir(output_dir):  # what a kill has left
        if name.startswith((".staging", ".trash-")):  # half made, or half deleted
            shutil.rmtree(join(output_dir, name), ignore_errors=True)  # gives its space back
    resume, fault = verify(output_dir, run.chosen)  # a finished run has a manifest here
    if fault and run.chosen:  # looked at before anything is renamed
        resume, harm = verify(run.chosen)  # never replaced by another one in silence
        die_if(harm, f"--resume_from_checkpoint {run.chosen} cannot be used: {harm}; without the flag the newest "  # a
               "whole one is taken")
        if differences(resume.manifest, run.settings):  # refuse_other_run() is going to say it
            return resume  # so nothing is renamed
    while fault and (path := get_last_checkpoint(output_dir) or run.chosen):  # the newest first
        resume, fault = verify(path, run.chosen)  # most often it can be used
        if fault:  # then it must not be seen as a checkpoint of this run
            aside = join(output_dir, f"unused-{basename(path)}")  # for the user to look at
            while exists(aside):  # set aside more than once
                aside += "-again"  # nothing is ever written over
            os.rename(path, aside)  # the next newest one is tried
            log0(f"warning  {path} is not used ({fault}); set aside as {aside}")  # never in silence
    die_if(fault and not publishing and exists(join(output_dir, "model.safetensors")),  # whose is it?
           f"--output_dir {output_dir} holds a model, which would be written over, and no checkpoint to go on from "
           f"({fault}): move it, or choose another directory")
    return resume or Resume()  # a fresh start

def differences(manifest, now):  # → a clause for each of now, a dict of settings, that the manifest has otherwise
    saved = manifest.get("settings", now)  # a fresh start has no manifest
    return "; ".join(f"{name} was {saved.get(name)!r}, is {value!r}"  # None: it knows nothing of it
                     for name, value in now.items() if saved.get(name) != value)  # in the order of the flags

def refuse_other_run(args, run, resume):  # called for the flags, and again when data and weights are known
    """Return resume; or a fresh one, if its settings are not those of now and its run may be moved aside."""
    other = differences(resume.manifest, run.settings)  # of the same command, data and model
    die_if(other and not args.overwrite_output_dir,  # going on would give neither the one run nor the other
           f"{resume.path} belongs to a run with other settings: {other}. Give the old ones to go on; for a new run "
           "give another --output_dir (the finished model may be its --model_name_or_path), or "
           "--overwrite_output_dir to move the old run aside")
    for path in [*args.train_file, *args.validation_file, args.cache_dir or "", args.model_name_or_path]:  # of this run
        die_if(other and abspath(path).startswith(join(abspath(run.output_dir), "")),  # it would be moved as well
               f"{path} lies in --output_dir {run.output_dir}, which is to be emptied: move it out first")
    if other and run.ranks.rank == 0:  # the others wait at the end of this phase
        number = 1  # of the first free name
        while exists(aside := join(run.output_dir, f"previous-{number}")):  # earlier ones may have been deleted
            number += 1  # the next name
        old = [name for name in os.listdir(run.output_dir) if not name.startswith(("previous-", ".lock"))]  # all else
        os.makedirs(aside)  # empty so far
        for name in old:  # checkpoints, curves, results, model
            os.rename(join(run.output_dir, name), join(aside, name))  # nothing is copied or deleted
        log0(f"The old run was moved to {aside}.")  # where it can still be gone on from
    return Resume() if other else resume  # nearly always as it was

def rotate(output_dir, limit, protected):  # delete all checkpoints but the newest and the protected ones (paths)
    names = [name for name in os.listdir(output_dir) if re.fullmatch(r"checkpoint-\d+", name)]  # all of them whole
    for name in sorted(names, key=lambda name: int(name[11:]))[:-limit]:  # by number: times change with a copy
        if join(output_dir, name) not in protected:  # the newest, the best, the chosen one
            os.rename(join(output_dir, name), join(output_dir, f".trash-{name}"))  # from now on no checkpoint
            shutil.rmtree(join(output_dir, f".trash-{name}"), ignore_errors=True)  # perhaps half: see above

# ── Model and loss ───────────────────────────────────────────────────────────────────────────────────────────────────
# The head multiplies 640 numbers a token by 262,144 words: 63 % of all matrix work. Its result, the logits, would be
# the largest thing in memory: 1.07 GB for 2,048 tokens in 16 bits, and twice that in the float32 of the softmax. So
# the loss takes a chunk of tokens at a time and makes their gradients while their logits are there, as Liger's fused
# linear cross-entropy does (arXiv:2410.10989), but in chunks large enough for a GPU.

LOGITS_BYTES = {"cuda": 2.2e9, "cpu": 0.135e9}  # of a chunk: 4,096 tokens in 16 bits on a GPU, 256 on a CPU
SOFTMAX_ROWS = {"cuda": 256, "cpu": 16}  # tokens in the float32 softmax at a time, 1 MB each
VOCABULARY_PART = 32_768  # words multiplied at a time: 42 MB of the head in 16 bits
HUB_ERRORS = {  # what exceptions or their messages are called: what to do about it
    r"(?=.*(GatedRepo|gated dataset)).*(403|Visit the dataset page)":  # a good token, of somebody else
    "is gated and your account has no access: accept the terms at {url}",
    "GatedRepo|gated dataset": "is gated: accept the terms at {url}, then run hf auth login with your token",  # no token
    "Invalid credentials": "cannot be had: the hub refuses your token; run hf auth login with a new one",  # revoked
    "RepositoryNotFound|DatasetNotFound":  # a slip, or a private one
    "cannot be found: the hub knows no such name; check {url} (if private: hf auth login)",
    "ConnectionError|LocalEntryNotFound":  # after half a minute of tries
    "is not in the cache and the hub cannot be reached: check the network, or give a local directory",
    "EmptyDataset": "is a directory that holds no data files",  # perhaps a level too high
    r"Config name is missing.*configs: \[(?P<configs>.*?)\]":  # taking one could train on the wrong language
    "has several configurations: choose one with --dataset_config_name: {configs}"}

@contextlib.contextmanager  # for with statements
def loading(flag, name, kind=""):  # models, and data sets with kind "datasets/"
    """End the run with a sentence on any error of the hub, of its cache or of a broken file."""
    try:  # the libraries raise a dozen kinds for a handful of reasons
        yield  # they come out of here
    except Exception as error:  # often wrapped several times: kinds and messages of all are looked at
        words = one_line(" ".join(traceback.format_exception(error, limit=0)))  # "…GatedRepoError: 401 …"
        url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{kind}{name}"  # terms are accepted there
        for pattern, sentence in HUB_ERRORS.items():  # the first one that fits
            if found := re.search(pattern, words):  # configurations, as the data set's card lists them
                configs = found.groupdict().get("configs", "").replace("'", "")  # "de, en"
                die(f"{flag} {name} {sentence.format(url=url, configs=configs)}")  # what to do
        die(f"{flag} {name} cannot be loaded; if damaged, download or save it anew: {words[:400]}")  # the libraries' own

def load_tokenizer(name, max_seq_length):  # the first contact with the hub
    """Return the fast tokenizer of model `name`, whose context must hold max_seq_length. Raises: SystemExit(2)."""
    with loading("--model_name_or_path", name):  # a gated or misspelt name fails here, before 536 MB
        config = transformers.AutoConfig.from_pretrained(name)  # what kind of model it is
        transformers.utils.cached_file(name, "tokenizer.json")  # AutoTokenizer would make up an empty one
    with loading("--model_name_or_path", f"{name} (its tokenizer.json)"):  # the error does not name the file
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)  # 33 MB for Gemma 3
    context = getattr(config.get_text_config(), "max_position_embeddings", max_seq_length)  # 32,768 tokens
    die_if(max_seq_length > context,  # positions that the model has never seen
           f"--max_seq_length {max_seq_length} is longer than the model's context: use {context} or less")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # the collator wants one, but nothing is padded
    return tokenizer  # puts BOS before a text, and no EOS behind it

def load_model(name, tokenizer, flash_attention):  # from the hub, its cache or a directory
    """Load the causal language model `name` with float32 weights, on the CPU. Raises: SystemExit(2).

    float32, because bfloat16's 8 bits lose an update of 2e-5 of a weight: the 16-bit matrix products of --bf16 and
    --fp16 come from autocast, which leaves these master weights alone.
    """
    attention = "flash_attention_2" if flash_attention else "sdpa"  # sdpa: PyTorch's own kernels
    with loading("--model_name_or_path", name):  # broken files, another kind of model, no network
        model, report = transformers.AutoModelForCausalLM.from_pretrained(  # 536 MB from the hub, the first time
            name, dtype=torch.float32, attn_implementation=attention,  # weights that are not rounded
            ignore_mismatched_sizes=True, output_loading_info=True)  # the report lists what does not fit
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])  # names of weights
    die_if(wrong, f"--model_name_or_path {name}: the file lacks {', '.join(wrong[:3])}; save the model anew")  # random
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens were added to the tokenizer
        model.resize_token_embeddings(len(tokenizer))  # the head grows, too
    return model  # the Trainer moves it to the device

class ChunkedLoss(torch.autograd.Function):  # in place of head and cross entropy
    """(hidden (N, H), head (V, H), labels (N,), train) → (sum of the losses, losses (N,)), in float32.

    A label of -100 costs and teaches nothing. Only the sum has a gradient; it is made in the forward pass (train).
    """
    @staticmethod  # autograd calls it on the class
    def forward(ctx, hidden, head, labels, train):  # ctx carries the gradients to backward()
        kind = hidden.device.type  # "cuda" or "cpu"
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype  # of the products
        dtype = torch.float32 if dtype == torch.float16 else dtype  # unscaled gradients would vanish in float16
        counted = (labels != -100)[:, None]  # (N, 1): tokens that count
        targets = labels.clamp(min=0)[:, None]  # (N, 1): -100 is no index
        losses = torch.empty(len(labels), device=hidden.device)  # (N,): -log p(label)
        grad_hidden = torch.empty_like(hidden) if train else None  # (N, H): d sum / d hidden
        grad_head = torch.zeros_like(head, dtype=torch.float32) if train else None  # (V, H): summed in float32
        words = [slice(first, first + VOCABULARY_PART) for first in range(0, len(head), VOCABULARY_PART)]  # 8 parts
        most = LOGITS_BYTES.get(kind, 0.135e9) / (dtype.itemsize * len(head))  # tokens whose logits fit
        rows = math.ceil(len(labels) / math.ceil(len(labels) / max(1, int(most))))  # all chunks about as long
        with torch.autocast(kind, enabled=False):  # every dtype is chosen here
            for start in range(0, len(labels), rows):  # a chunk of tokens
                chunk = slice(start, start + rows)  # the last one may be shorter
                states = hidden[chunk].to(dtype) * counted[chunk]  # (rows, H): 0 where the label is -100
                logits = torch.empty(len(states), len(head), dtype=dtype, device=head.device)  # the one large tensor
                for part in words:  # so only a part of the head is ever held in 16 bits
                    logits[:, part] = states @ head[part].to(dtype).T  # (rows, part)
                # d loss / d logit is p - 1 for the label and p for every other word, with p = softmax of the logits.
                parts = (tensor.split(SOFTMAX_ROWS.get(kind, 16)) for tensor in (logits, targets[chunk], losses[chunk]))
                for scores, target, loss in zip(*parts, strict=True):  # a few tokens at a time: float32 is large
                    logs = torch.log_softmax(scores, -1, dtype=torch.float32)  # (few, V): log p of every word
                    label = logs.gather(-1, target)  # (few, 1): log p(label)
                    loss.copy_(-label[:, 0])  # cross entropy
                    if train:  # the gradient takes the place of the logits; expm1 is exact also where p is near 1
                        scores.copy_(logs.exp_().scatter_(-1, target, label.expm1()))  # rounded to 16 bits
                if train:  # logits holds d loss / d logit by now
                    logits *= counted[chunk]  # -100 teaches nothing
                    back = torch.zeros(states.shape, device=head.device)  # (rows, H), float32: a sum over the parts
                    for part in words:  # once more through the vocabulary
                        back += logits[:, part] @ head[part].to(dtype)  # d sum / d hidden
                        grad_head[part] += logits[:, part].T @ states  # d sum / d head
                    grad_hidden[chunk] = back  # in the dtype of hidden
        losses *= counted[:, 0]  # -100 costs nothing
        ctx.mark_non_differentiable(losses)  # they are for evaluations
        ctx.gradients = (grad_hidden, grad_head)  # of the sum
        return losses.sum(), losses  # one to learn from, one to report

    @staticmethod  # autograd calls it on the class
    def backward(ctx, upstream, _):  # upstream: d step's loss / d sum, a scalar
        grad_hidden, grad_head = ctx.gradients  # 0.67 GB
        ctx.gradients = None  # that nothing else shall hold
        return grad_hidden.mul_(upstream), grad_head.mul_(upstream).to(grad_hidden.dtype), None, None  # in place

def use_chunked_loss(model, alone=False):  # in place of the model's own loss; alone: one process, not compiled
    """Make model(input_ids, labels=…) return {"loss", "token_losses"} without ever holding all logits.

    `loss` is a scalar: the sum ÷ num_items_in_batch, or the mean over labels other than -100; `token_losses`
    (B, T - 1), float32, has no gradient. Without labels the model returns logits as ever. Returns: bool, False for a
    model whose loss is more than a head: it keeps its own.
    """
    own = model.forward  # with all logits
    head = model.get_output_embeddings()  # its weight is (V, H)
    table = model.get_input_embeddings()  # for Gemma 3 the same weight: row t is what the layers see of token t
    alone = alone and model.config.model_type == "gemma3_text" and table.weight is head.weight  # tied

    def hidden_of(input_ids, **rest):  # (B, T) → the last hidden states (B, T, H)
        if not (alone and torch.is_grad_enabled() and head.weight.device.type == "cpu"):  # a GPU adds in any order
            return model.base_model(input_ids, **rest).last_hidden_state  # autograd adds two dense gradients
        # A tied table needs no dense (V, H) gradient of its own: its rows' gradients go straight into the head's,
        # which the loss has made by the time that those of the layers are there.
        rows = table(input_ids).detach().requires_grad_()  # (B, T, H): no way back into the table
        def add(grad):  # (B, T, H): the last step of the backward pass
            grad = grad * table.scalar_embed_scale * (input_ids != table.padding_idx)[..., None]  # as the table would
            head.weight.grad.index_add_(0, input_ids.flatten(), grad.flatten(0, 1).to(head.weight.dtype))  # (V, H)
        rows.register_hook(add)  # called with the gradient of all layers
        return model.base_model(inputs_embeds=rows, **rest).last_hidden_state  # through all layers

    @torch.compiler.disable  # --torch_compile is for the layers
    def loss_of(hidden, labels, items):  # (B, T, H), (B, T), tokens in the step or None
        labels = labels[:, 1:].to(hidden.device)  # token t is predicted from all before it
        hidden = hidden[:, :-1].flatten(0, 1)  # (B × (T - 1), H)
        total, losses = ChunkedLoss.apply(hidden, head.weight, labels.flatten(), torch.is_grad_enabled())  # scalar; (N,)
        items = (labels != -100).sum().clamp(min=1) if items is None else items  # 0/0 would be no number
        return {"loss": total / items, "token_losses": losses.view(labels.shape)}  # no logits

    def forward(input_ids, labels=None, num_items_in_batch=None, **rest):  # names that the Trainer looks for
        if labels is None:  # generation needs logits
            return own(input_ids, **rest)  # as if nothing had been changed
        return loss_of(hidden_of(input_ids, **rest), labels, num_items_in_batch)  # gradients to head and layers

    if not isinstance(head, torch.nn.Linear) or head.bias is not None:  # more than one matrix
        return False  # keeps its own loss
    ids = torch.arange(8, device=head.weight.device)[None]  # (1, 8): eight tokens tell two losses apart
    with torch.no_grad():  # scaled logits, a softcap or a loss of experts would differ
        theirs = own(ids, labels=ids).loss.float()  # a scalar
        same = torch.isclose(theirs, forward(ids, labels=ids)["loss"], rtol=1e-3, equal_nan=True).item()  # a head alone
    model.forward = forward if same else own  # of this object: accelerate wraps autocast around it
    return same  # make_trainer() says it, where not

class LeanNorm(torch.autograd.Function):  # six in each layer
    """(x (…, D), weight (D,), eps) → x ÷ its root mean square × (1 + weight), as Gemma 3's RMSNorm computes it.

    Keeps x alone for the backward pass; autograd would also keep the normalized values in float32, a third of all
    activations. The same values to the last bit; the gradient is that of the paper (arXiv:1910.07467), with 1 + weight.
    """
    @staticmethod  # autograd calls it on the class
    def forward(ctx, x, weight, eps):  # eps: for a row of zeros
        wide = x.float()  # squares of 16-bit numbers need more digits
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (…, 1): one number a token
        ctx.save_for_backward(x, weight, scale)  # the layer keeps x anyway
        return (wide * scale * (1 + weight.float())).type_as(x)  # (…, D)

    @staticmethod  # autograd calls it on the class
    def backward(ctx, upstream):  # (…, D): d loss / d output
        x, weight, scale = ctx.saved_tensors  # as forward() had them
        normed = x.float() * scale  # (…, D): two multiplications, instead of keeping it
        slope = upstream.float() * (1 + weight.float())  # d loss / d normed
        grad_weight = (upstream.float() * normed).flatten(0, -2).sum(0)  # (D,): over all tokens
        grad_x = scale * (slope - normed * (slope * normed).mean(-1, keepdim=True))  # scale depends on x, too
        return grad_x.type_as(x), grad_weight.type_as(weight), None  # none for eps

def use_lean_norms(model):  # in the place of Gemma 3's RMSNorm; other models' norms stay as they are
    for norm in model.modules():  # 109 of them in Gemma 3 270M
        if type(norm).__name__ == "Gemma3RMSNorm":  # other models multiply by weight, not by 1 + weight
            norm.forward = lambda x, norm=norm: LeanNorm.apply(x, norm.weight, norm.eps)  # of this object

# ── Data: read ─▶ tokenize ─▶ pack ───────────────────────────────────────────────────────────────────────────────────
# Rows of text are read, tokenized and cut into chunks of one length, without padding: every token that is read is in
# one chunk, or in the report. Each step is kept in a cache of Arrow files, which are memory-mapped, so that memory
# stays flat and the next run starts at once.

TOKENIZE_BYTES = 1_000_000  # text per call of the tokenizer, whose working memory is about 100 times that

def load_and_prepare_dataset(args, tokenizer, rebuild=False):  # rebuild (bool): without a look into the cache
    """Read, tokenize and pack the training and validation text. Raises: SystemExit(2) with one sentence.

    Returns: (train, validation), each a memory-mapped datasets.Dataset whose one column `input_ids` holds lists of
        max_seq_length int32 ids, or None where there is no data.
    """
    files = {"train": args.train_file, "validation": args.validation_file}  # [] without the flag
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}  # None: all chunks
    if args.evaluate_only:  # training text may be large
        del files["train"]  # it is not even read
    texts = load_named_dataset(args, list(files)) if args.dataset_name else {}  # split → Dataset of one column
    schema = datasets.Features({"text": datasets.Value("large_string")})  # 64-bit offsets: texts of gigabytes
    for split in [split for split in files if files[split]]:  # both are read before one is tokenized: faults show early
        kwargs = {"files": tuple(files[split]), "column": args.text_column}  # a tuple: datasets would split a list
        texts[split] = cached(f"{split}_rows", read_texts, kwargs, args.cache_dir, rebuild, schema)  # read once
    chunks = {"train": None, "validation": None}  # validation is optional
    for split in list(texts):  # train first
        packed = pack_split(split, texts.pop(split), tokenizer, args, rebuild)  # pop lets go of the text
        chunks[split] = packed.take(min(limits[split] or len(packed), len(packed)))  # a view, no copy
        if len(chunks[split]) < len(packed):  # as asked for
            log0(f"{split}: only the first {limits[split]:,} of {len(packed):,} chunks are used (--max_*_samples)")  # few
    return chunks["train"], chunks["validation"]  # ready for the Trainer

def load_named_dataset(args, wanted):  # wanted: names of splits, of which the first must be there
    """Return {split: Dataset of the text column alone} of --dataset_name: on the hub, in its cache, or a directory."""
    name = DATASET_ALIASES.get(args.dataset_name, args.dataset_name)  # the old short name, or any other
    config = args.dataset_config_name  # None without the flag
    if name == WIKITEXT and not config:  # the example that everybody starts with
        config = WIKITEXT_CONFIG  # the other one has 50 times as much
        log0(f"{name}: no --dataset_config_name given, taking {config}.")  # never a silent choice
    saved = isfile(join(name, "state.json")) or isfile(join(name, "dataset_dict.json"))  # by Dataset.save_to_disk
    die_if(saved and config, f"--dataset_config_name {config}: {name} is one saved data set; leave the flag out")  # one
    with loading("--dataset_name", name, "datasets/"):  # unknown, gated, no network
        load = datasets.load_from_disk if saved else datasets.load_dataset  # a Dataset, or a dictionary of them
        loaded = load(name) if saved else load(name, config, cache_dir=args.cache_dir)  # from the hub, once
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}  # a single saved Dataset is training data
    die_if(wanted[0] not in loaded,  # no other split is taken in silence
           f"--dataset_name {name} has no {wanted[0]} split, only {', '.join(loaded)}: "
           "give files instead, with --train_file and --validation_file")
    splits = {split: loaded[split] for split in wanted if split in loaded}  # never the test split
    for split, rows in splits.items():  # the same column is needed in each
        check_column(f"{name}, split {split}", args.text_column, rows.column_names)  # the usual first error
        kind = rows.features[args.text_column]  # its type
        kind = getattr(kind, "dtype", type(kind).__name__)  # "int64", "null", "List"
        die_if(kind not in ("string", "large_string"),  # numbers, lists, nulls, pictures
               f"{name}, split {split}: column {args.text_column!r} holds {kind}, not text; choose with --text_column")
        splits[split] = rows.select_columns([args.text_column])  # the others are not read from the disk
    return splits  # nothing is in memory so far

def cached(name, generator, kwargs, cache_dir, rebuild, features=None):  # of what is read, and of what is packed
    """Return a datasets.Dataset of what generator(**kwargs) yields, made once and then memory-mapped from the cache.

    It is made again when one of kwargs["files"] or the generator's code has changed. This is Dataset.from_generator,
    which has no switch to do it again. features: the schema of a row; None takes that of the first rows.
    """
    versions = [(getsize(path), os.stat(path).st_mtime_ns) for path in kwargs["files"]]  # bytes, nanoseconds
    key = Hasher.hash((generator, kwargs, versions))  # of the code, too, with the functions that it calls
    builder = Generator(config_id=f"{name}-{key}", generator=generator, gen_kwargs=kwargs, split=name,  # its directory
                        cache_dir=cache_dir, features=features)  # appears there when it is complete
    builder.download_and_prepare(download_mode="force_redownload" if rebuild else None)  # nothing if it is there
    return builder.as_dataset(split=name)  # costs no memory until it is touched

def read_texts(files, column):  # a generator: one row in memory at a time
    """Yield {"text": str or None} for every row of the files, in order. Raises: SystemExit(2), with file and place.

    .txt: a line is a text, its line break kept. .csv: the header names the columns. .json: an array of objects, or an
    object a line, as in .jsonl. A null counts as a blank row later.
    """
    rows = 0  # in all files
    for path in files:  # formats may be mixed
        kind = os.path.splitext(path.removesuffix(".gz"))[1].lower()  # ".jsonl"
        reader = {".txt": read_lines, ".csv": read_csv}.get(kind, read_json)  # datasets would read "NA" as null
        numbers = kind == ".csv"  # until a text is seen that is no number
        for place, row in reader(path):  # datasets' errors would name no line
            rows += 1  # blank ones, too
            row = {column: row} if kind == ".txt" else row  # the one format without columns
            if not isinstance(row, dict):  # a bare string, number or list
                die(f'{place}: {json.dumps(row)[:60]} is no JSON object; write {{"{column}": "…"}}')  # the remedy
            check_column(place, column, row)  # in each row: a name may change half-way
            text = row[column]  # str or None, if the file is right
            if not isinstance(text, str | None):  # numbers and lists are no text
                die(f"{place}: column {column!r} holds {json.dumps(text)[:60]}, not text; "  # as it stands there
                    "choose another with --text_column, or put quotes around it")
            if text and re.search(r"[\ud800-\udfff]", text):  # half of an emoji: no file can hold it
                die(f"{place}: the text has half a character, an escape from \\ud800 to \\udfff "  # as it is written
                    "without its other half; remove it")
            numbers = numbers and re.fullmatch(r"\s*[+-]*\d*(\.\d*)?\s*", text) and row  # "-1.5", also a blank
            yield {"text": text}  # a row of the cache
        if isinstance(numbers, dict):  # ids or prices: surely not meant
            die(f"{path}: column {column!r} holds only numbers or blanks, not text; "  # rather than learn them
                f"choose another with --text_column (columns: {', '.join(numbers)})")
    die_if(not rows,  # a header alone, "[]", line breaks alone
           f"{', '.join(files)}: no rows, so nothing to train on; check how the file was written")

def read_lines(path):  # → (place, line); a line ends with \n; the file may be gzipped, and larger than memory
    unpack = gzip.open if path.endswith(".gz") else open  # they take the same arguments
    with unpack(path, "rt", encoding="utf-8-sig", newline="\n") as lines:  # sig: skips the mark that Excel writes
        try:  # whatever the file holds
            for number, line in enumerate(lines, 1):  # as editors count
                if "\0" in line:  # every other byte of UTF-16
                    die(f"{path} is not UTF-8: line {number} holds NUL characters; if it is UTF-16, "  # from Windows
                        "convert it, for example with iconv -f utf-16le -t utf-8")
                yield f"{path}, line {number}", line.replace("\r\n", "\n")  # files from Windows
        except UnicodeDecodeError as error:  # Latin-1, UTF-16, a picture
            byte = lines.buffer.tell() - len(error.object) + error.start  # its place in the file, unpacked, from 0
            encoding = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"  # by the first bytes
            die(f"{path} is not UTF-8: byte {byte} is 0x{error.object[error.start]:02x}; "  # at which it cannot go on
                f"convert it, for example with iconv -f {encoding} -t utf-8")
        except (OSError, EOFError, gzip.zlib.error) as error:  # a bad disk; a .gz that was cut short, or is none
            die(f"{path} cannot be read to its end: {error}")  # in the system's words

def read_csv(path):  # → (place, {column: str}); values in quotes may span lines
    csv.field_size_limit(2**31 - 1)  # Python's own limit is 128 KiB
    rows = csv.reader((line for _, line in read_lines(path)), strict=True)  # an open quote is an error
    try:  # csv.Error says what is wrong, line_num where
        header = next(rows, [])  # the names of the columns
        for row in rows:  # a list of cells
            if row and len(row) != len(header):  # which cell would be the text?
                die(f"{path}, line {rows.line_num}: {len(row)} values, but the header has {len(header)}; "  # ragged
                    "texts with commas or line breaks need double quotes around them")
            cells = row or [""] * len(header)  # an empty line is a blank row
            yield f"{path}, line {rows.line_num}", dict(zip(header, cells, strict=True))  # as it stands there
    except csv.Error as error:  # bad quoting
        die(f"{path}, line {rows.line_num}: broken CSV: {error}")  # "unexpected end of data": an open quote

def read_json(path):  # → (place, value) of each line of JSON, or of each item of one JSON array
    first = next((line for _, line in read_lines(path) if line.strip()), "")  # tells the two layouts apart
    array = first.lstrip().startswith("[")  # parsed as a whole: for gigabytes take lines
    text = "".join(line for _, line in read_lines(path) if array)  # "" for lines
    for place, part in [(path, text)] if array else read_lines(path):  # each part is one JSON value
        try:  # without rstrip a fault at the end would be on the next line
            values = json.loads(part.rstrip() or "[]")  # one value; of an array, or a blank line, a list of values
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            place += f", line {getattr(error, 'lineno', 1)}" * array  # counted from the start of the file
            die(f"{place}: broken JSON: {getattr(error, 'msg', error)}; "  # the parser's words
                "the file must hold one object a line or one array of objects")
        for item, value in enumerate(values if array or not part.strip() else [values], 1):  # rows
            yield f"{path}, item {item}" if array else place, value  # lines mean little in an array

def check_column(place, column, columns):  # place (str): where, for the sentence; columns: all names
    if column not in columns:  # the right one is usually obvious
        names = [str(name) for name in columns]  # a header's cells or an object's keys
        die(f"{place}: no column {column!r}{did_you_mean(column, names)}; "  # a slip, or the default name
            f"columns: {', '.join(names) or 'none'}; choose one with --text_column")

def pack_split(split, rows, tokenizer, args, rebuild):  # one line of report a split
    """Tokenize and pack rows, a Dataset of one column, and report what became of each. Returns: Dataset of chunks."""
    recipe = (tokenize_texts, rows._fingerprint, tokenizer.backend_tokenizer.to_str(), args.add_eos)  # decides the ids
    key = Hasher.hash(recipe)  # hashing the tokenizer object would take four seconds
    folder = os.path.expanduser(args.cache_dir or datasets.config.HF_DATASETS_CACHE)  # also for a read-only data set
    size = TOKENIZE_BYTES * len(rows) // max(1, rows.data.nbytes)  # rows that hold so many bytes of text
    tokenized = rows.map(  # memory stays flat
        tokenize_texts, desc=f"Tokenizing {split}",  # a batch of texts → a batch of lists of ids
        fn_kwargs={"tokenizer": tokenizer, "eos": [tokenizer.eos_token_id] * args.add_eos},  # what ends a text
        input_columns=rows.column_names, remove_columns=rows.column_names,  # only ids are kept
        batched=True, batch_size=max(1, min(1000, size)),  # many at once, on all cores; fewer when texts are long
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),  # 4 bytes hold 262,144
        num_proc=args.preprocessing_num_workers, load_from_cache_file=not rebuild,  # None: one, on all cores
        cache_file_name=join(folder, f"tokenized-{key}.arrow"), new_fingerprint=key)  # found again by the key
    die_if(not len(tokenized), f"the {split} data holds no text: all {len(rows):,} rows are blank or null")  # no ids
    length = args.max_seq_length  # ids of a chunk
    sizes = pc.list_value_length(tokenized.data.column("input_ids")).to_numpy()  # ids of each text
    kept = sizes if args.no_truncation else sizes.clip(max=length)  # of them, those that are packed
    total = kept.sum()  # numpy adds int32 up in 64 bits
    lost = sizes.sum() - total  # cut off
    log0(f"{split}: {len(rows):,} rows read, {len(rows) - len(tokenized):,} blank skipped, "  # all is accounted for
         f"{(kept < sizes).sum():,} texts truncated (-{lost:,} tokens), {total:,} tokens kept = "
         f"{total // length:,} chunks of {length:,} + {total % length:,} tokens dropped at the end")
    if lost > 0.2 * sizes.sum():  # long documents, of which only the beginnings are learnt
        log0(f"note     truncation takes {lost / sizes.sum():.0%} of the {split} tokens: --no_truncation keeps them")
    die_if(total < length,  # a handful of sentences
           f"the {split} data has {total:,} tokens, too few for one chunk of {length:,}: add text, or use "
           f"--max_seq_length {total} or less")
    files = tuple(file["filename"] for file in tokenized.cache_files)  # one for each process that tokenized
    kwargs = {"files": files, "length": length, "truncate": not args.no_truncation}  # the key of the cache
    return cached(f"{split}_chunks", group_texts, kwargs, args.cache_dir, rebuild)  # lists of int32

def tokenize_texts(texts, tokenizer, eos):  # in datasets.map, maybe in several processes
    """Map list[str or None] to {"input_ids": list[list[int]]}, blank texts left out; eos (list[int]) ends each text.

    The tokenizer puts Gemma's BOS before each. Truncation comes in group_texts: another length, the same ids.
    """
    texts = [text for text in texts if text and not text.isspace()]  # a blank one would be a lone BOS
    ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []  # in one call
    return {"input_ids": [row + eos for row in ids]}  # each of its own length

def group_texts(files, length, truncate):  # texts of any length → chunks of one length: no padding is computed
    """Concatenate all texts and yield {"input_ids": chunk}, chunk an int32 array of exactly `length` ids.

    files (sequence of str): Arrow files of tokenized texts; truncate (bool): at most `length` ids of each text.
    """
    tail = np.empty(0, dtype=np.int32)  # ids that are in no chunk yet: fewer than length
    for path in files:  # the texts in their order
        with pa.OSFile(path) as source, pa.ipc.open_stream(source) as batches:  # read, not mapped: memory stays flat
            for batch in batches:  # at most a thousand texts: 12 million ids take a fraction of a second
                texts = pc.list_slice(batch["input_ids"], 0, length) if truncate else batch["input_ids"]  # no copies
                ids = np.concatenate([tail, texts.flatten().to_numpy()])  # end to end, none twice
                whole = len(ids) // length * length  # only whole chunks train
                yield from ({"input_ids": chunk} for chunk in ids[:whole].reshape(-1, length))  # rows of the cache
                tail = ids[whole:]  # first in the next batch; in the end, what the report calls dropped

def fingerprints(model, train, validation):  # what no flag says: SHA-256 of config and weights, and of all ids
    """Return {"model": str, "train_data": str, "validation_data": str}."""
    config = model.config.to_dict()  # the width of the sliding window and more
    for name in ("transformers_version", "_name_or_path", "use_cache", "dtype"):  # where from and how saved
        config.pop(name, None)  # not what is learnt
    sums = {"model": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())}  # then its weights
    for weight in model.parameters():  # finds a model directory that was changed in between
        sums["model"].update(weight.detach().numpy().data)  # float32, still on the CPU: half a second
    for name, data in (("train_data", train), ("validation_data", validation)):  # Datasets of chunks, or None
        sums[name] = hashlib.sha256()  # of nothing, if there is none
        for chunks in data.data.column("input_ids").chunks if data else ():  # Arrow arrays in memory-mapped files
            sums[name].update(chunks.flatten().to_numpy().data)  # all chunks are equally long
    return {name: digest.hexdigest()[:16] for name, digest in sums.items()}  # enough to see a difference

# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
PEAKS = {  # dense 16-bit TFLOP/s that the makers state; the first whole word of the device's name counts
    "H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "A100": 312, "A40": 149.7,  # without sparsity
    "L40S": 362, "L4": 121, "V100": 125, "RTX 4090": 165, "RTX 3090": 71, "RTX A6000": 155}  # an A4000 is no A40

def peak_flops(args):  # TrainingArguments → FLOP/s of all devices in 16 bits; 0 if unlisted, on a CPU, in float32
    listed = args.device.type == "cuda" and args.mixed_precision != "no"  # no share of a peak that does not apply
    name = torch.cuda.get_device_name(args.device) if listed else ""  # "NVIDIA A40"
    return args.world_size * 1e12 * next((PEAKS[part] for part in PEAKS if re.search(rf"\b{part}\b", name)), 0)  # sum

def flops_per_token(config, parameters, length):  # config: of the model; parameters (int): all weights, a tied head once
    """Return the floating-point operations to train on one token of a chunk of `length` tokens.

    As in appendix B of PaLM (arXiv:2204.02311): 6 a matrix weight, and causal attention, here with a sliding window.
    """
    config = config.get_text_config()  # of the text part of a model that also sees
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) * config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers  # 15 sliding, 3 full
    windows = {"sliding_attention": config.sliding_window or length}  # 512 tokens; else all of them
    seen = [min(length, windows.get(kind, length)) for kind in kinds]  # tokens that a layer looks back at most
    attention = sum(12 * width * (back - back * (back - 1) / 2 / length) for back in seen)  # the mean over positions
    lookup = (not config.tie_word_embeddings) * config.vocab_size * config.hidden_size  # weights that multiply nothing
    return 6 * (parameters - lookup) + attention  # 1.73e9 for Gemma 3 270M at 2,048

def epoch_of(chunks, args):  # TrainingArguments → (chunks in a pass of all processes, chunks and steps of an epoch)
    a_pass = args.train_batch_size * args.world_size  # the last one of an epoch may be smaller
    used = chunks - chunks % a_pass * args.dataloader_drop_last  # or is left out, by this flag
    return a_pass, used, max(1, math.ceil(used / a_pass / args.gradient_accumulation_steps))  # optimizer steps

class FineTuner(transformers.Trainer, transformers.TrainerCallback):  # its own callback: on_step_end(), on_save()
    """The Trainer with honest numbers, a guard against NaN, a stop at signals, and checkpoints that are whole or absent.

    It overrides two private methods: _run_epoch, as the Trainer rounds up to whole epochs, and
    _maybe_log_save_evaluate, the one place that sees the gradient's norm before a save. So requirements.txt holds
    transformers to the tested minor version.
    """
    def __init__(self, run, resume, flops, **named):  # Run, Resume, operations a token; named: for the Trainer
        super().__init__(**named)  # sets the seed, too
        self.run = run  # who this is
        self.resume = resume  # where earlier calls have come
        self.progress = resume.progress  # over all calls
        self.flops = flops  # to train on one token
        # Sums since the last log line, of losses and of the tokens they are of: on the device, so that nobody waits.
        self.tail = torch.tensor(resume.progress.tail, dtype=torch.float64, device=self.args.device)  # two numbers
        self.bad_step = torch.zeros((), dtype=torch.int64, device=self.args.device)  # the first without a finite loss
        self.stopping = 0  # number of the signal that all ranks agree on, 0 for none
        self.add_callback(self)  # behind the Trainer's own

    def on_train_begin(self, args, state, control, **_):  # everything is loaded, nothing trained
        state.compute_steps(args, state.max_steps)  # a changed --logging_steps or --save_steps takes effect
        if self.progress.best:  # beside the checkpoint: the run may have been moved
            state.best_model_checkpoint = join(dirname(self.resume.path), self.progress.best)  # in full
        self.first = state.global_step  # what earlier calls have made
        self.began = time.time()  # nothing so far
        self.start_stopwatch()  # of the speed
        self.run.signals.in_training = True  # from now on a signal waits for a checkpoint

    def training_step(self, model, inputs, num_items_in_batch=None):  # forward and backward pass of a batch
        share = super().training_step(model, inputs, num_items_in_batch)  # of the step's loss, the mean over all ranks
        batches = self.current_gradient_accumulation_steps  # of this step: the last one of an epoch may have fewer
        tokens = inputs["input_ids"].numel() * self.args.world_size  # of all processes
        learnt = tokens * batches if num_items_in_batch is None else num_items_in_batch  # of the step
        self.tail += torch.stack([share * learnt, torch.as_tensor(learnt / batches, device=share.device)])  # both sums
        self.progress.tokens += tokens  # no chunk has a gap
        return share  # for the Trainer's own sum

    def on_step_end(self, args, state, control, **_):  # what is due is known: the Trainer's own callback was first
        control.should_log |= state.global_step >= state.max_steps and args.logging_strategy != "no"  # the last steps
        self.stopping = self.run.ranks.max(self.run.signals.received)  # the same on all ranks
        if self.stopping:  # the Trainer saves; on_save() ends the run
            control.should_save = control.should_training_stop = True  # beside what is due
        if control.should_save:  # the directory may be gone, with another run in its place
            check_lock(self.run)  # before anything is written

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *rest, **named):  # behind a step; again behind an epoch
        skips = grad_norm is None or self.args.mixed_precision == "fp16"  # GradScaler skips a step of infinite norm
        bad = ~torch.isfinite(tr_loss if skips else tr_loss + grad_norm) & (self.bad_step == 0)  # not waited for
        self.bad_step = torch.where(bad, self.state.global_step, self.bad_step)  # the first one is kept
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:  # which wait anyway
            first = int(self.accelerator.gather(self.bad_step).max())  # all ranks stop together, before a save
            if first:  # the weights are spoilt from this step on
                die(f"the loss or gradient of step {first} is not a finite number: training stops, and nothing was "  # in
                    "saved after it. Usual causes: a --learning_rate too high, --fp16, a broken model. Change that, "
                    "and start with another --output_dir", 1, SPEAKER)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **named)  # a line, an evaluation, a checkpoint

    def sums(self):  # since the last log line, of all processes: [sum of losses, number of tokens]
        return self.accelerator.gather(self.tail).view(-1, 2).mean(0).tolist()  # waits for the device and all ranks

    def seconds(self):  # of training, by all calls of this run
        return self.progress.seconds + time.time() - self.began  # earlier ones, and this one

    def start_stopwatch(self):  # behind a log line, an evaluation, a checkpoint
        self.shown = self.progress.tokens  # the speed of the next line is that of tokens from here on
        self.logged = time.time()  # seconds since 1970

    def log(self, logs, *rest):  # every number passes here, on its way to console, TensorBoard and JSON
        step = self.state.global_step  # behind which the line is written
        if "eval_loss" in logs:  # of an evaluation
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700))  # exp(710) overflows
        if "learning_rate" in logs:  # of training: its loss has just waited for the device
            loss, tokens = self.sums()  # since the last line of any call
            speed = (self.progress.tokens - self.shown) / max(time.time() - self.logged, 1e-9)  # of all processes
            pace = (time.time() - self.began) / max(step - self.first, 1)  # seconds a step, all included
            gpu = self.args.device.type == "cuda"  # then its memory is what matters
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes, the most so far
            memory = torch.cuda.max_memory_allocated() if gpu else resident  # of this process
            logs |= {"loss": loss / tokens,  # a mean over tokens: a short step counts for less
                     "tokens_per_second": round(speed), "tokens_seen": self.progress.tokens,  # since the first step
                     "peak_memory_gb": round(memory / 1e9, 2),  # near the GPU's size it is time for the remedies
                     "minutes_left": round((self.state.max_steps - step) * pace / 60, 1)}  # to the last step
            if peak := peak_flops(self.args):  # a GPU of PEAKS
                logs["mfu"] = round(speed * self.flops / peak, 3)  # of the peak in the plan
            self.progress.loss += loss  # shown from now on
            self.progress.learnt += tokens  # likewise
            self.tail.zero_()  # the next line begins here
            self.start_stopwatch()  # as does its speed
        if "train_loss" in logs:  # behind the last step: of all calls together
            loss, tokens = self.sums()  # nothing, but for --logging_strategy no
            logs["train_loss"] = (self.progress.loss + loss) / max(self.progress.learnt + tokens, 1)  # over all tokens
            chunks = self.progress.tokens // len(self.train_dataset[0]["input_ids"])  # of all epochs
            logs |= speed_metrics("train", time.time() - self.seconds(), num_samples=chunks, num_steps=step)  # a second
        super().log(logs, *rest)  # to all of them

    def evaluate(self, *rest, **named):  # every chunk; the random state, of which dropout is made, stays as it was
        drop = self.args.dataloader_drop_last  # meant for training
        self.args.dataloader_drop_last = False  # else chunks would be left out
        with torch.random.fork_rng(devices=[]):  # the data loader draws a number
            metrics = super().evaluate(*rest, **named)  # log() has completed them
        self.args.dataloader_drop_last = drop  # for the steps to come
        self.start_stopwatch()  # no time of training
        return metrics  # {"eval_loss": …}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # a batch of an evaluation
        """Return (None, losses, losses), (B,): each chunk counts once, also those that fill up a batch of many ranks."""
        ids = self._prepare_inputs(inputs)["input_ids"]  # (B, T), on the device
        with torch.no_grad():  # autocast is in the prepared model
            result = model(input_ids=ids, labels=ids)  # labels are the inputs
            if "token_losses" in result:  # (B, T - 1)
                losses = result["token_losses"].mean(1)  # one of each chunk
            else:  # a model's own loss is the mean of a batch: one chunk at a time
                losses = torch.stack([model(input_ids=row[None], labels=row[None]).loss.float() for row in ids])  # (B,)
        return None, losses, losses  # predictions and labels: gathered, the repeated ones dropped

    def on_save(self, args, state, control, **_):  # the Trainer has written .staging/checkpoint-N
        """Publish the checkpoint: seal it with a manifest, then rename; in an instant all of it is there."""
        draft = join(args.output_dir, f"checkpoint-{state.global_step}")  # in .staging
        final = join(self.run.output_dir, basename(draft))  # where the next call finds it
        if state.best_model_checkpoint == draft:  # this one is the best so far
            state.best_model_checkpoint = final  # all ranks will load it from there
        progress = replace(self.progress, step=state.global_step, max_steps=state.max_steps,  # up to this step
                           seconds=self.seconds(), tail=self.sums(), best=None)  # all ranks take part
        if args.load_best_model_at_end and state.best_model_checkpoint:  # the run could not end without it
            progress.best = os.path.relpath(realpath(state.best_model_checkpoint), realpath(self.run.output_dir))  # moves
        self.accelerator.wait_for_everyone()  # each rank has written its random state
        if self.run.ranks.rank == 0:  # renames and deletes for all
            state.save_to_json(join(draft, "trainer_state.json"))  # with the best one's place
            write_manifest(draft, self.run, progress)  # checksums; all of it on the disk
            os.rename(draft, final)  # atomic: a kill leaves either no checkpoint-N or a whole one
            fsync(self.run.output_dir)  # a power cut cannot undo the rename
            keep = {final, state.best_model_checkpoint, self.run.chosen}  # at any age
            rotate(self.run.output_dir, args.save_total_limit, keep)  # the oldest of the others go
        self.accelerator.wait_for_everyone()  # the others see it, too
        self.start_stopwatch()  # no time of training
        if self.stopping:  # on all ranks
            saved = f" at step {state.global_step:,} of {state.max_steps:,}; saved {final}"  # for the sentence
            self.run.signals.leave(self.stopping, saved)  # ends the run

    def _run_epoch(self, **named):  # the Trainer rounds up to whole epochs
        if self.state.global_step < self.state.max_steps:  # else each call behind the last step would make one more
            super()._run_epoch(**named)  # an epoch, or what is left of it

def make_trainer(model, tokenizer, args, train, validation, run, resume):  # the loop, made unkillable
    """Put model, data (Datasets of chunks, or None), TrainingArguments, Run and Resume together. Returns: FineTuner."""
    length = len((train or validation)[0]["input_ids"])  # tokens of a chunk
    epoch_steps = epoch_of(len(train or ()), args)[2]  # optimizer steps
    for kind in ("logging", "eval", "save"):  # an epoch's end is a step as any other
        if getattr(args, f"{kind}_strategy") == "epoch":  # so all that is due at a step comes in one place
            setattr(args, f"{kind}_strategy", transformers.IntervalStrategy.STEPS)  # a line, an evaluation, a save
            setattr(args, f"{kind}_steps", epoch_steps)  # in this order
            args.eval_delay *= epoch_steps if kind == "eval" else 1  # it was in epochs
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)  # predict the next token
    def collate(rows):  # a batch of chunks: input_ids and labels (B, T), int64; on the CPU, while the GPU works
        batch = collator([row["input_ids"] for row in rows])  # would leave the pad token out of the labels
        return batch | {"labels": batch["input_ids"]}  # nothing is padded, and pad may be EOS: learn them all
    trainer = FineTuner(  # makes optimizer and schedule in train()
        run, resume, flops_per_token(model.config, model.num_parameters(), length),  # 1.7e9 a token
        model=model, args=args, data_collator=collate, processing_class=tokenizer,  # saved with each checkpoint
        train_dataset=train and train.with_format("torch"),  # tensors: lists of numbers take long to stack
        eval_dataset=validation and validation.with_format("torch"),  # None: no evaluation
        compute_metrics=lambda seen: {"loss": seen.predictions.mean()})  # all chunks have as many tokens
    model.to(args.device)  # is there already, but for --bf16_full_eval
    if not (args.use_liger_kernel or args.torch_compile):  # which have lean norms of their own
        use_lean_norms(model)  # before the loss is tried out
    with trainer.accelerator.autocast():  # Flash Attention refuses the trial of eight tokens in float32
        if not use_chunked_loss(model, alone=args.world_size == 1 and not args.torch_compile):  # slower, and larger
            log0("note     this model has no plain head: its own loss is used, which holds all logits in memory")  # 2 GB
    # The Trainer's own callback would open a folder of curves for each call: this one shows one curve for the run.
    trainer.remove_callback(integration_utils.TensorBoardCallback)  # knows no purge_step
    runs = os.environ["TENSORBOARD_LOGGING_DIR"] = join(run.output_dir, "runs")  # for every call
    step = resume.progress.step  # that earlier calls have made and shown
    if "tensorboard" in args.report_to and args.process_index == 0 and (not step or step < resume.progress.max_steps):
        purge = step + bool(step) if train else None  # hides what is going to come again; --do_eval adds a point
        writer = torch.utils.tensorboard.SummaryWriter(runs, purge_step=purge)  # one folder
        trainer.add_callback(integration_utils.TensorBoardCallback(writer))  # each line at once
        trainer.callback_handler.callbacks[-1]._SummaryWriter = None  # or the last evaluation would open another one
        # The writer's thread ends with a traceback when the disk is full or gone: the next line says it in a sentence.
        threading.excepthook = lambda end: issubclass(end.exc_type, OSError) or threading.__excepthook__(end)  # only then
    return trainer  # ready to train or to evaluate

# ── The run ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def print_plan(args, training_args, model, train, validation):  # read it before a night of training
    """Say in six lines what is about to happen, and in notes what of it is allowed, but seldom meant."""
    world = training_args.world_size  # processes
    dtype = f"{training_args.mixed_precision} autocast".replace("no autocast", "float32")  # of matrix products
    peak = peak_flops(training_args)  # of all devices; 0 on a CPU
    mfu = f"; MFU against {peak / 1e12:,.0f} TFLOP/s" if peak else ""  # said once, here
    size = model.num_parameters()  # a tied head counts once
    data = [f"{name} {len(chunks):,} chunks = {len(chunks) * args.max_seq_length:,} tokens"  # that are used
            for name, chunks in (("train", train), ("validation", validation)) if chunks is not None]  # one or both
    log0(f"model    {args.model_name_or_path}, {size:,} parameters in float32, "  # the masters
         f"{model.config._attn_implementation} attention",
         f"device   {training_args.device.type}, {world} process{'es' * (world > 1)}, {dtype}{mfu}",  # of all machines
         f"data     {', '.join(data)}")  # what there is to learn, and to measure
    if train is not None:  # --do_eval has no plan of steps
        a_pass, used, epoch = epoch_of(len(train), training_args)  # chunks in a pass; of an epoch; its steps
        a_step = a_pass * args.gradient_accumulation_steps  # chunks in an optimizer step
        steps = math.ceil(args.num_train_epochs * epoch)  # as the Trainer counts them
        steps = training_args.max_steps if training_args.max_steps > 0 else steps  # overrides the epochs
        at_peak = training_args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy")  # from the start
        warmup = 0 if at_peak else training_args.get_warmup_steps(steps)  # a fraction is one of all steps
        die_if(used == 0,  # the Trainer would make steps of nothing
               f"--dataloader_drop_last leaves nothing to train on: {len(train):,} chunks make no batch of {a_pass:,}; "
               "leave it out, or lower --per_device_train_batch_size")
        log0(f"batch    {args.per_device_train_batch_size} per device × {args.gradient_accumulation_steps} accumulation"
             f" × {world} = {a_step:,} chunks = {a_step * args.max_seq_length:,} tokens a step",  # the effective one
             f"steps    {steps:,} ({steps / epoch:.3g} epochs), learning rate {args.learning_rate:g}, "  # at its peak
             f"warm-up {warmup:,} steps")
        if warmup >= steps:  # the default of 500 suits long runs; the first step has the rate 0
            reached = f"it reaches only {(steps - 1) / warmup:.1%} of the learning rate"  # in its last step
            reached = reached if steps > 1 else "its one step has the learning rate 0 and learns nothing"  # a trial
            log0(f"note     the run is shorter than its warm-up: {reached}; "  # surely not meant
                 f"lower --warmup_steps, to {steps // 10} for example")
        if used < a_step:  # a handful of texts and the default accumulation
            log0(f"note     all {used:,} chunks make less than one step of {a_step:,}: lower "  # more steps learn more
                 f"--gradient_accumulation_steps to {max(1, used // a_pass)} for a full one")
        elif used % a_step:  # worth knowing when epochs are short
            log0(f"note     the last step of each epoch has {used % a_step:,} of {a_step:,} chunks")  # fewer than usual
        if used < len(train):  # others in the next epoch
            log0(f"note     {len(train) - used:,} chunks are left out of each epoch: --dataloader_drop_last")  # as asked
        elif used % a_pass and world > 1:  # all processes make as many forward passes
            log0(f"note     {a_pass - used % a_pass:,} chunks are trained on twice an epoch, for equal shares")  # a few
        free = shutil.disk_usage(args.output_dir).free  # bytes
        needed = (args.save_total_limit + 1 - len(glob("checkpoint-*", root_dir=args.output_dir))) * 12 * size  # Adam's
        if free < needed:  # + 1: the oldest goes after the newest is there
            log0(f"warning  {needed / 1e9:.2g} GB will be needed for checkpoints in {args.output_dir}, where "  # at most
                 f"{free / 1e9:.2g} GB are free: make space or lower --save_total_limit")
    log0(f"output   {args.output_dir} (tensorboard --logdir {join(args.output_dir, 'runs')})")  # where to look

def save_results(trainer, split, metrics):  # a table on the console; {split}_results.json, joined to all_results.json
    if "eval_perplexity" in metrics:  # its name in transformers' scripts
        metrics["perplexity"] = metrics.pop("eval_perplexity")  # tokens that the model hesitates between
    trainer.log_metrics(split, metrics)  # of rank 0
    trainer.save_metrics(split, metrics)  # in the Trainer's output_dir

def train_and_save(trainer, run, resume):  # the night: after a kill anywhere in it the same command goes on
    """Train, evaluate, and publish model, tokenizer, log and metrics in output_dir; the manifest comes last."""
    metrics = trainer.train(resume_from_checkpoint=resume.path).metrics  # hours; a signal ends the run in here
    run.signals.in_training = False  # no step will come that would see one
    if signalled := run.ranks.max(run.signals.received):  # behind the last step, on any rank
        run.signals.leave(signalled, " after the last step")  # the same command makes the finished model
    check_lock(run)  # another run may have taken the directory
    staging = trainer.args.output_dir  # a kill leaves no half model in output_dir
    trainer.model.config.use_cache = True  # generation wants its cache back
    trainer.save_model()  # model.safetensors, config.json, tokenizer
    if trainer.eval_dataset is not None:  # has it learnt, or memorized?
        last = {"step": None} | dict(*[row for row in trainer.state.log_history if "eval_loss" in row][-1:])  # in training
        same = last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end  # the same model
        save_results(trainer, "eval", last if same else trainer.evaluate())  # loss and perplexity
    save_results(trainer, "train", metrics)  # speed and loss of all calls
    if run.ranks.rank == 0:  # whose files these are
        trainer.state.save_to_json(join(staging, "trainer_state.json"))  # the log of the whole run
        write_manifest(staging, run, replace(trainer.progress, step=trainer.state.global_step, best=None))  # flushed
        for name in sorted(os.listdir(staging), key=lambda name: name == "manifest.json"):  # the manifest last
            os.replace(join(staging, name), join(run.output_dir, name))  # each file is whole, or absent
        os.rmdir(staging)  # empty by now
        fsync(run.output_dir)  # on the disk before the exit status says so

def explain(error, training_args, output_dir):  # what has ended a training or an evaluation, if the user can mend it
    words = one_line(error)  # its own
    lost = isinstance(error, RuntimeError) and re.search("timed ?out|by peer|remote process", words, re.I)  # gloo, NCCL
    if lost and training_args.world_size > 1:  # tools/launch.py says which
        die(f"another process was lost or does not answer ({words}); the same command again goes on", 1)  # all end
    if re.search("out of memory|can't allocate memory", words) or isinstance(error, MemoryError):  # of GPU or CPU
        die(f"out of memory on {training_args.device}: {REMEDIES}", 1)  # the data is right, the call too
    disk = re.search("PytorchStreamWriter|inline_container|strerror|os error|SafetensorError", f"{error!r}")  # torch's
    if disk or isinstance(error, OSError):  # No space left on device, and the like
        for draft in glob(join(escape(output_dir), ".staging", "checkpoint-*")):  # half a checkpoint
            shutil.rmtree(draft, ignore_errors=True)  # gives its space back
        free = shutil.disk_usage(output_dir).free if isdir(output_dir) else 0  # bytes; 0: it is gone
        die(f"--output_dir {output_dir} cannot be written ({words}). {free / 1e9:.2g} GB are free, a checkpoint of "  # why
            "Gemma 3 270M needs 3.2. What was saved before is whole: make space or mend that, then the same command "
            "goes on", 1)
    if isinstance(error, (ImportError, ValueError)):  # --use_liger_kernel without its package, --adam_beta1 2
        die(f"a flag of the Trainer cannot be used: {words}")  # known only where it is used

def main(args, signals):  # the table of contents
    """Run the phases in their order. args: Namespace, or the SystemExit of a wrong call. signals: Signals."""
    ranks = join_group(args)  # of one process, or of several on all machines
    with ranks.together():  # the command line
        if isinstance(args, SystemExit):  # a wrong call, on this rank
            raise args  # now the others hear of it
        training_args = make_training_arguments(args)  # from here on the device is known
        transformers.set_seed(args.seed)  # new embedding rows, if any, are the same in every run
        versions = {name: version(name) for name in ("torch", "transformers")} | {"device": training_args.device.type}
        settings = run_settings(args, training_args)  # by which a run is known again
        run = Run(settings, versions, args.resume_from_checkpoint, args.output_dir, ranks, signals)  # this one
        if ranks.rank == 0 and not args.evaluate_only:  # an evaluation writes no checkpoint
            run.lock = lock_output_dir(args.output_dir)  # until this process ends
    if ranks.size > 1:  # before any work
        check_plan(args, training_args, ranks)  # the same everywhere
    found = Resume()  # a fresh start
    with ranks.together():  # what has an earlier call left?
        if run.lock:  # rank 0
            found = find_checkpoint(run)  # two choices would train two runs
    found = ranks.gather(found)[0]  # rank 0's
    with ranks.together():  # refused before minutes of work
        resume = refuse_other_run(args, run, found)  # or the other run is moved aside
    if resume.path == args.output_dir:  # the finished model is there, and whole
        log0(f"This run finished at step {resume.progress.step:,}: nothing is left to train.",  # exit status 0
             f"Its model is in {args.output_dir}; to train it further, start a new run from it with "  # its rate is 0
             f"--model_name_or_path {args.output_dir} and another --output_dir.")
        return  # before data and weights are loaded

    with ranks.together():  # the first process of each machine prepares the data
        tokenizer = load_tokenizer(args.model_name_or_path, args.max_seq_length)  # the hub's first answer
        model = load_model(args.model_name_or_path, tokenizer, args.use_flash_attention)  # float32, still on the CPU
        if ranks.rank == ranks.machine:  # the others would do the same work
            train, validation = load_and_prepare_dataset(args, tokenizer, args.overwrite_cache)  # chunks, or None
    with ranks.together():  # all of it is there
        if ranks.rank != ranks.machine:  # reads the cache
            train, validation = load_and_prepare_dataset(args, tokenizer)  # the same chunks
        die_if(validation is None and training_args.load_best_model_at_end,  # a data set without such a split
               "--load_best_model_at_end needs validation data: give --validation_file")
        if validation is None:  # nothing to evaluate on
            training_args.eval_strategy = transformers.IntervalStrategy.NO  # --eval_steps has no meaning then
        prints = fingerprints(model, train, validation)  # to the last token and weight
    ranks.check_same(prints)  # each machine may have copies of its own
    with ranks.together():  # is the checkpoint's run really this one?
        run.settings |= {name: prints[name] for name in ("model", "train_data")}  # they decide the weights
        resume = refuse_other_run(args, run, resume)  # or a sentence
    training_args.eval_on_start &= not resume.path  # an earlier call has made it
    try:  # a part that is not installed, a full GPU, a full disk
        with ranks.together():  # from here on --ddp_timeout is the limit
            trainer = make_trainer(model, tokenizer, training_args, train, validation, run, resume)  # on the device
            print_plan(args, training_args, model, train, validation)  # before the first step
        if resume.path:  # the same command again
            log0(f"Going on from {resume.path}, step {resume.progress.step:,} of {resume.progress.max_steps:,}.")  # there
            if resume.manifest["versions"] != versions:  # allowed: a run may move to another machine
                log0("warning  the weights may differ in their last bits: the run began with "  # and why
                     f"{resume.manifest['versions']}, and goes on with {versions}")
        if args.evaluate_only:  # --do_eval alone
            save_results(trainer, "eval", trainer.evaluate())  # trains nothing
        else:  # --do_train, or neither of the two
            train_and_save(trainer, run, resume)  # the finished model in output_dir
    except Exception as error:  # die() raises none
        explain(error, training_args, args.output_dir)  # in a sentence, if the user can mend it
        raise  # not ours to explain
    finally:  # --dataloader_persistent_workers, or a run that was stopped
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of what follows
        for loader in multiprocessing.active_children():  # they do not listen to signals: Python would wait for them
            loader.kill()  # they have nothing to lose
    results = join(args.output_dir, "all_results.json")  # loss, perplexity, speed
    what = "the metrics are in" if args.evaluate_only else f"the model is in {args.output_dir}, its metrics in"  # for
    log0(f"Done: {what} {results}.")  # from_pretrained()

if __name__ == "__main__":  # python main.py, accelerate launch main.py
    with reported():  # an error ends in one sentence
        main(ARGS, SIGNALS)  # as the answer above has left them
