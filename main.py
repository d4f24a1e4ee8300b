"""Fine-tune Google's Gemma 3 270M on your own text.

    python main.py --train_file data/train.jsonl --validation_file data/val.jsonl --bf16

The file reads from top to bottom in the order in which things happen; main() at the end is its table of contents:

    argv ─ parse_args ─▶ args
    args ─ load_tokenizer ─▶ tokenizer
    args ─ load_and_prepare_dataset ─▶ train and validation chunks       (read → tokenize → group_texts)
    args ─ load_model ─▶ float32 weights, sdpa or flash attention
    args ─ find_checkpoint ─▶ where to go on from
    all of it ─ Trainer ─▶ checkpoints, TensorBoard ─▶ finished model in output_dir

Only the standard library is imported up here: --help and a misspelt flag answer at once, because torch, transformers
and datasets (six seconds together) are imported by the functions that need them, after the command line was read.
"""

import argparse  # the command line
import ast  # reads the Trainer's flag names from its source without importing it
import atexit  # what has to be closed before Python ends
import contextlib  # to go on after an error that does not matter
import csv  # rows of .csv files, with the line number of a bad one
import ctypes  # one call of the operating system that Python has no name for
import difflib  # "did you mean": the real name nearest to a misspelt one
import errno  # which kind of OSError: locked, disk full, over quota
import fcntl  # a lock on output_dir
import functools  # a function in the place of another
import glob  # "data/*.jsonl" given in quotes
import gzip  # .gz files are read as they are
import hashlib  # checksums of checkpoints
import importlib.util  # is a package installed? answered without importing it
import itertools  # puts the first line of a file back in front of the rest
import json  # .json and .jsonl files
import math  # perplexity = exp(loss)
import os  # paths, environment
import platform  # Python's version
import re  # checkpoint-N
import shutil  # removes directories, measures disks
import signal  # SIGTERM and Ctrl-C
import socket  # this machine's name
import sys  # exit status, standard error
import threading  # one that listens for the end of other processes
import time  # how long a run took, over all its calls
from datetime import timedelta  # torch wants its timeouts so
from importlib.metadata import version  # of a package, without importing it

MODEL_ALIASES = {"google/gemma-270m": "google/gemma-3-270m"}  # the short name people type → the published id
WIKITEXT = "Salesforce/wikitext"  # the one hub data set for which a configuration is chosen here
DATASET_ALIASES = {"wikitext": WIKITEXT}  # as it was called when names had no owner
WIKITEXT_CONFIG = "wikitext-2-raw-v1"  # 2 million words, untouched text: trains in an evening on one GPU
FORMATS = (".json", ".jsonl", ".csv", ".txt")  # local files; each also with .gz behind it
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")  # what a model directory keeps its weights in
PEAKS = {  # dense 16-bit TFLOP/s that the makers state, by a part of the device's name; MFU is measured against them
    "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "A40": 149.7, "L40S": 362, "L4": 121,  # server
    "RTX 4090": 165, "RTX 3090": 71, "RTX A6000": 155, "V100": 125,  # desktop; the first name that fits counts
}
LOSS_MEMORY = {"cuda": 4e9, "cpu": 0.5e9}  # bytes for the logits of one chunk of tokens: some 2,000, or 240, at a time
TOKENIZE_BYTES = 1_000_000  # text per call of the tokenizer: its working memory is about 100 times that
REMEDIES = (  # out of memory: the README's four remedies, the cheapest first
    "(1) add --bf16; "  # halves the activations, costs nothing on a GPU since Ampere
    "(2) halve --per_device_train_batch_size (4, 2, 1) and double "  # fewer activations at a time …
    "--gradient_accumulation_steps: the same training; "  # … and the same effective batch
    "(3) add --gradient_checkpointing: about 20 % slower; "  # keeps one activation per layer
    "(4) shorten --max_seq_length (2048, 1024, 512)"  # the one remedy that changes what is learnt
)


def say(*lines):  # progress and results, on standard output
    """Print lines once, however many processes train: only rank 0 speaks."""
    if os.environ.get("RANK", "0") == "0":  # set by accelerate launch and torchrun; absent for one process
        print(*lines, sep="\n", flush=True)  # flushed, so that a log file shows it before the run ends


def fail(message, status=2):  # every sentence of promise 3 goes through here
    """End the run with one sentence instead of a traceback.

    Args: message (str): what is wrong, where, and what to do. status (int): 2 for a wrong call or wrong data, 1 else.
    Raises: SystemExit, always.
    """
    start = "\n" if "datasets" in sys.modules else ""  # a progress bar may stand on the last line
    print(f"{start}main.py: error: {message}", file=sys.stderr, flush=True)  # every rank: it may not be 0 that fails
    end = SystemExit(status)  # no Exception, so no library on the way wraps it
    end.sentence = message  # for the other processes, if any
    raise end  # caught by nobody but Ranks


def nearest(name, names):  # the help that a misspelt name gets
    """Return a hint such as ' (did you mean "text"?)' for the closest of names, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1)  # similarity of at least 0.6, else nothing
    return f" (did you mean {close[0]}?)" if close else ""  # stands right behind the wrong name in a sentence


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):  # its own error message, nothing else
    """argparse whose errors are one sentence, without the usage of sixty flags before it."""

    def error(self, message):  # argparse calls it for a wrong value
        """Fail with message and exit status 2, as argparse does."""
        fail(f"{message}; see python main.py --help")  # the list of flags is one command away


def number(kind, low, strict=False):  # for the type= of a flag
    """Return an argparse type: kind (int or float), at least low, or above low when strict. Raises: a clear error."""

    def parse(text):  # kind, low and strict are remembered
        try:  # "abc", "1e-3" for an int
            value = kind(text)  # what the flag will hold
        except ValueError:  # not a number of this kind
            wanted = "a whole number" if kind is int else "a number"  # the user's words, not Python's
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None  # argparse adds the flag's name
        if not math.isfinite(value) or value < low or (strict and value == low):  # nan fails every comparison
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if strict else 'at least'} {low}")  # with bound
        return value  # checked before anything heavy is loaded

    return parse  # argparse calls it with the flag's text


def trainer_flags():  # for the names that are not ours
    """Return the names of all fields of transformers.TrainingArguments, read from its source in a few milliseconds."""
    package = importlib.util.find_spec("transformers")  # finds the package, imports nothing
    if package is None:  # a fresh machine before the set-up
        fail("transformers is not installed: pip install -r requirements.txt", status=1)  # names the one command
    path = os.path.join(os.path.dirname(package.origin), "training_args.py")  # where the class is written down
    with open(path, encoding="utf-8") as source:  # 2,500 lines
        tree = ast.parse(source.read())  # syntax only: nothing of it runs
    classes = [node for node in tree.body if getattr(node, "name", "") == "TrainingArguments"]  # exactly one
    return [node.target.id for node in classes[0].body if isinstance(node, ast.AnnAssign)]  # "name: type = field(…)"


def parse_args(argv=None):  # the whole command line
    """Read the command line.

    Args: argv (list[str] or None): the arguments; None takes the process's own.
    Returns: argparse.Namespace with our flags and `trainer_argv`, the flags left for transformers.TrainingArguments.
    Raises: SystemExit(2) after one sentence when a flag, a value or a path is wrong.
    """
    parser = Parser(  # ours first: the flags of this script with its defaults
        usage="python main.py (--dataset_name NAME | --train_file FILE ...) [flags]",  # instead of twenty lines of it
        description="Fine-tune Google's Gemma 3 270M on text.",  # the next line of --help
        epilog="Every other flag of transformers.TrainingArguments works too, "  # the last lines of --help
        "for example --max_steps, --lr_scheduler_type cosine, --dataloader_num_workers.",  # 120 of them
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,  # every flag's help ends with its default
        allow_abbrev=False,  # a shortened flag is a misspelt flag: it must not pick another one silently
    )
    switch = {"action": "store_true"}  # off unless given
    count, positive = number(int, 1), number(float, 0, strict=True)  # sizes; rates and epochs
    steps = number(float, 0, strict=True)  # an interval in steps, or below 1 a fraction of the run, as the Trainer's

    add = parser.add_argument_group("model").add_argument  # which weights, which attention
    add("--model_name_or_path", default="google/gemma-270m", help="hub name or local directory")  # an alias, see above
    add("--use_flash_attention", **switch, help="Flash Attention 2; needs a GPU and flash-attn")  # skips masked blocks

    add = parser.add_argument_group("data").add_argument  # either files or a data set, never both
    add("--dataset_name", help="hub name, or a local data set directory")  # its train and validation splits
    add("--dataset_config_name", help="configuration of the hub data set")  # many hold several, such as languages
    add("--train_file", nargs="+", help=".json .jsonl .csv .txt, also .gz; several, or a glob")  # your own text
    add("--validation_file", nargs="+", help="the same, for evaluation")  # held out: never trained on
    add("--text_column", default="text", help="the column that holds the text")  # of .json, .csv and data sets
    add("--max_seq_length", type=number(int, 2), default=2048, help="tokens per chunk")  # attention reaches no further
    add("--no_truncation", **switch, help="keep texts longer than a chunk whole")  # for books; the default cuts them
    add("--add_eos", **switch, help="end each text with the end-of-sequence token")  # so that the model learns to stop
    add("--max_train_samples", type=count, help="train on the first N chunks only")  # for a quick try
    add("--max_eval_samples", type=count, help="evaluate on the first N chunks only")  # for quick evaluations
    add("--preprocessing_num_workers", type=count, help="processes that tokenize")  # unset: one, on all cores
    add("--cache_dir", help="where prepared data is kept for the next run")  # unset: the cache of datasets
    add("--overwrite_cache", **switch, help="prepare the data anew")  # normally found out by itself

    add = parser.add_argument_group("training").add_argument  # the schedule and the optimizer
    add("--num_train_epochs", type=positive, default=3, help="passes over the data")  # each in a new order
    add("--per_device_train_batch_size", type=count, default=4, help="chunks per device at a time")  # fills the GPU
    add("--per_device_eval_batch_size", type=count, default=4, help="the same, in evaluation")  # changes no result
    add("--gradient_accumulation_steps", type=count, default=8, help="batches per optimizer step")  # costs no memory
    add("--learning_rate", type=positive, default=2e-5, help="its peak, after the warm-up")  # then falls to zero
    add("--weight_decay", type=number(float, 0), default=0.01, help="of AdamW")  # not on norms and biases
    add("--warmup_steps", type=number(float, 0), default=500, help="steps of rising learning rate")  # below 1: a part

    add = parser.add_argument_group("memory").add_argument  # what to reach for when a GPU is full
    add("--bf16", **switch, help="bfloat16 autocast over float32 weights")  # the right choice on an A40 or H100
    add("--fp16", **switch, help="float16 autocast, for GPUs before Ampere")  # with loss scaling
    add("--gradient_checkpointing", **switch, help="recompute activations: 20 %% slower")  # keeps one per layer

    add = parser.add_argument_group("logging and checkpoints").add_argument  # what is written, and when
    add("--output_dir", default="./outputs", help="checkpoints, logs and the finished model")  # one run each
    add("--logging_steps", type=steps, default=10, help="steps between log lines")  # loss, rate, gradient norm
    add("--save_steps", type=steps, default=500, help="steps between checkpoints")  # 3.2 GB each
    add("--eval_steps", type=steps, default=500, help="steps between evaluations")  # only with validation data
    add("--overwrite_output_dir", **switch, help="move another run's files aside")  # into previous-1, never deleted
    add("--save_total_limit", type=count, default=3, help="newest checkpoints that are kept")  # older ones go
    add("--report_to", nargs="+", default=["tensorboard"], help="tensorboard, wandb or none")  # where curves go
    add("--resume_from_checkpoint", help="go on from this one")  # unset: from the newest in output_dir

    add = parser.add_argument_group("misc").add_argument  # the rest
    add("--ddp_timeout", type=count, default=600, help="seconds a process waits for the others")  # then all end
    add("--seed", type=number(int, 0), default=42, help="of the order of chunks and of new weights")  # repeatable
    add("--do_train", **switch, help="train; on unless --do_eval is given alone")  # accepted as other scripts do
    add("--do_eval", **switch, help="given alone: only evaluate the model on the validation data")  # before and after

    argv = sys.argv[1:] if argv is None else argv  # the tests pass their own
    split = [text.partition("=") for text in argv]  # "--learning-rate=1" → flag, "=", value
    argv = [("--" + a[2:].replace("-", "_") if a[:2] == "--" else a) + b + c for a, b, c in split]  # either spelling
    args, extra = parser.parse_known_args(argv)  # extra: the Trainer's flags and whatever is misspelt
    theirs = trainer_flags() if extra else []  # only looked up when there is something to look up
    known = [f"--{name}" for name in [*vars(args), *theirs]]  # every destination of ours is a flag's name
    for text in extra:  # flags and their values, in the order given
        name = text[2:].partition("=")[0]  # "--max_steps=10" → "max_steps"
        if text.startswith("--") and name not in theirs and name.removeprefix("no_") not in theirs:  # nobody's flag
            fail(f"unknown flag --{name}{nearest('--' + name, known)}; see python main.py --help")  # a slip of a letter
    if extra and not extra[0].startswith("--"):  # a word on its own, such as a file name or "--bf16 true"
        fail(f"{extra[0]!r} belongs to no flag: put --train_file or another before it, or leave it out")  # both slips
    args.given = {text[2:].partition("=")[0] for text in argv if text.startswith("--")}  # flags that were typed
    args.trainer_argv = extra  # HfArgumentParser checks their values once it is imported
    check_args(args)  # paths and combinations: everything that can be found wrong without torch
    return args  # from here on the call is known to be sensible


def check_args(args):  # the part that argparse cannot say
    """Check combinations and paths, expand globs and aliases in place. Raises: SystemExit(2) after one sentence."""
    if args.bf16 and args.fp16:  # two autocast types at once
        fail("--bf16 and --fp16 exclude each other: keep --bf16 (A40 and newer GPUs), or --fp16")  # one of them
    if args.use_flash_attention and importlib.util.find_spec("flash_attn") is None:  # the optional package
        fail("--use_flash_attention needs a package: pip install flash-attn --no-build-isolation")  # built from source
    if "wandb" in args.report_to and importlib.util.find_spec("wandb") is None:  # the other optional package
        fail("--report_to wandb needs the wandb package: pip install wandb")  # else found after the data is prepared

    args.evaluate_only = args.do_eval and not args.do_train  # as in transformers' own scripts
    if args.dataset_name and (args.train_file or args.validation_file):  # which of the two was meant?
        fail("data given twice: use either --dataset_name or --train_file/--validation_file")  # never a silent choice
    if not args.dataset_name and not args.train_file and not args.evaluate_only:  # nothing to train on
        fail("no training data: give --dataset_name NAME or --train_file FILE (.jsonl .json .csv .txt)")  # two ways
    if not args.dataset_name and not args.validation_file and args.evaluate_only:  # nothing to evaluate on
        fail("--do_eval needs validation data: give --validation_file FILE or --dataset_name NAME")  # two ways
    folder = os.path.expanduser(args.dataset_name or "")  # "~/data" works also where the shell did not expand it
    if os.path.isfile(folder):  # the other flag was meant
        fail(f"--dataset_name {folder} is a file: give it to --train_file")  # which names files
    if folder.startswith((".", os.sep)) and not os.path.isdir(folder):  # no hub name looks like that
        fail(f"--dataset_name {folder}: no such directory; give one, or a hub name")  # without half a minute of tries
    args.dataset_name = folder if os.path.isdir(folder) else args.dataset_name  # a directory wins over the hub
    args.train_file = find_files("--train_file", args.train_file or [])  # a sorted list of existing, readable files
    args.validation_file = find_files("--validation_file", args.validation_file or [])  # likewise

    if args.model_name_or_path in MODEL_ALIASES:  # the short name is not a repository on the hub
        published = MODEL_ALIASES[args.model_name_or_path]  # google/gemma-3-270m
        say(f"{args.model_name_or_path} is published as {published}: using that.")  # the one notice line
        args.model_name_or_path = published  # also what the banner and the errors will name
    folder = os.path.expanduser(args.model_name_or_path)  # "~/models/x" works also where the shell did not expand it
    if os.path.isdir(folder):  # a local model: look at once whether it can be one
        args.model_name_or_path = folder  # the expanded path
        if not os.path.isfile(os.path.join(folder, "config.json")):  # what kind of model is it?
            fail(f"--model_name_or_path {folder}: the directory has no config.json; name a saved model")  # a wrong path
        if not any(glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in WEIGHT_FILES):  # no weights
            fail(f"--model_name_or_path {folder}: the directory has no weights (model.safetensors)")  # a half copy
    elif os.path.exists(folder) or folder.startswith((".", os.sep)) or folder.count("/") > 1:  # no hub name either
        fail(f"--model_name_or_path {folder}: no such directory; give one, or a hub name")  # google/gemma-270m, say

    args.output_dir = os.path.expanduser(args.output_dir)  # the Trainer does the same later
    args.cache_dir = args.cache_dir and os.path.expanduser(args.cache_dir)  # None: the cache of datasets
    places = {"--output_dir": args.output_dir, "--cache_dir": args.cache_dir}  # directories that are written to
    for flag, folder in ((flag, folder) for flag, folder in places.items() if folder):  # the cache may be the default
        try:  # a bad place is found now, not at the first checkpoint hours later
            os.makedirs(folder, exist_ok=True)  # raises for a file in the way, and where we may not write
            if not os.access(folder, os.W_OK | os.X_OK):  # exists, but belongs to somebody else
                raise PermissionError("no permission to write there")  # joins the other cases below
        except OSError as error:  # FileExistsError, NotADirectoryError, PermissionError, read-only file system, …
            reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error  # plain words
            fail(f"{flag} {folder} cannot be used: {reason}; choose one you can write to")  # at once
    places = {os.path.realpath(path) for path in (args.output_dir, args.model_name_or_path)}  # links resolved
    if len(places) == 1 and not args.evaluate_only:  # the finished model would be written over its base
        fail(f"--output_dir {args.output_dir} is the model to start from: choose another directory")  # keeps it
    last = args.resume_from_checkpoint  # a path; unset means the newest one in output_dir
    if last and not os.path.isfile(os.path.join(last, "trainer_state.json")):  # what the Trainer goes on from
        fail(f"--resume_from_checkpoint {last}: not a checkpoint, it has no trainer_state.json")  # perhaps one up


def find_files(flag, patterns):  # --train_file and --validation_file
    """Expand globs and check each file. Returns: list[str] of absolute paths. Raises: SystemExit(2)."""
    files = []  # in the order given: it is the order of training text before shuffling
    for pattern in patterns:  # the shell has expanded unquoted globs already
        pattern = os.path.expanduser(pattern)  # "~" in quotes
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))  # a stable order
        if not found:  # neither a file nor a glob that matches one
            near = glob.glob(os.path.join(glob.escape(os.path.dirname(pattern)), "*"))  # what lies beside it
            fail(f"{flag} {pattern}: no such file{nearest(pattern, near)}")  # often a slip of a letter
        for path in found:  # each must be a file of a known kind with something in it
            if os.path.isdir(path):  # a data set directory goes to the other flag
                fail(f"{flag} {path} is a directory: name files in it, or use --dataset_name")  # a data set on disk
            if os.path.splitext(path.removesuffix(".gz"))[1].lower() not in FORMATS:  # the extension is the format
                known = " ".join(FORMATS)  # .parquet and others come in through --dataset_name
                fail(f"{flag} {path}: unknown extension; known are {known}, each also with .gz")  # no guessing
            if not os.access(path, os.R_OK):  # somebody else's file
                fail(f"{flag} {path} cannot be read: no permission (try chmod +r)")  # before six seconds of imports
            if os.path.getsize(path) == 0:  # a failed export
                fail(f"{flag} {path} is empty")  # rather than "too little text" later
            files.append(os.path.abspath(path))  # absolute: part of the key of the cache
    return files  # empty when the flag was not given


# ── Several processes ────────────────────────────────────────────────────────────────────────────────────────────────
# A launcher starts one process, called a rank, for each device of each machine. They meet at a store: a small server on
# the main machine, that of rank 0, where each can read what another has set under a name. Before any work all machines
# compare with rank 0 what they are about to do. A rank that fails sets its end in the store; in each other one a thread
# looks for that every second, says why, and ends its process. One that is killed sets nothing: then torch fails in the
# ranks that wait for it, when its connections close, or when nothing has come from it for --ddp_timeout seconds.


class Ranks:  # made by accelerate launch or torchrun
    """The processes of this run on all machines. Where there is only one, nothing here does anything."""

    def __init__(self):  # reads what the launcher says
        self.rank = int(os.environ.get("RANK") or 0)  # among all processes, from 0
        self.local = int(os.environ.get("LOCAL_RANK") or 0)  # among those of this machine: 0 speaks for the machine
        self.size = int(os.environ.get("WORLD_SIZE") or 1)  # how many processes there are
        self.machine = self.rank - self.local  # a machine is known by the rank of its first process
        self.name = f"rank {self.rank} on {socket.gethostname()}"  # in sentences
        self.store = self.group = self.said = None  # where all meet; what wait() needs; what this rank has failed with
        self.tried, self.limit = False, 30  # has begun to look for the store; seconds in which all hear of a failure
        self.over = threading.Event()  # set when it has ended well, or is being ended: no news matter any more

    def connect(self, args, plan):  # before any work, and before a device is touched
        """Compare all machines, then make the process group. plan (Namespace): the fields of TrainingArguments."""
        import torch.distributed as dist  # has been imported by the Trainer's arguments
        from accelerate import PartialState  # likewise

        self.tried = True  # a failure from here on is no reason to look for the others once more
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # what launchers set beside WORLD_SIZE
            if name not in os.environ:  # each process would train on its own, all of them into one output_dir
                fail(f"WORLD_SIZE is {self.size}, but {name} is not set: start several processes with "  # one way on
                     "accelerate launch, or unset WORLD_SIZE for a single one")  # the other one
        own = ("given", "trainer_argv", "cache_dir", "preprocessing_num_workers")  # may differ between machines
        facts = {f"--{name}": value for name, value in (vars(args) | vars(plan)).items() if name not in own}  # flags
        facts |= {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}  # may round …
        facts |= {"main.py": sha256(__file__)[:12], "Python": platform.python_version()}  # … or count differently
        facts["WORLD_SIZE"] = self.size  # of the launcher
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate gives each machine as many, torchrun need not
            facts["processes a machine (--num_processes)"] = os.environ.get("LOCAL_WORLD_SIZE")  # a slip in one total
        cpu = plan.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # asked for by the launcher
        try:  # some rank may never come
            self.meet(plan.ddp_timeout)  # the launchers have met there already
            self.compare("plan", facts)  # before unequal versions have to talk to each other
            PartialState(cpu, backend=plan.ddp_backend, timeout=timedelta(seconds=plan.ddp_timeout))  # makes the group
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # a more patient one, for wait()
            self.limit = 6  # from here on all look every second
        except (RuntimeError, ValueError, OSError) as error:  # torch's own errors are RuntimeErrors
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"  # where all meet
            words = f"within --ddp_timeout {plan.ddp_timeout} ({' '.join(str(error).split())})"  # in torch's own words
            fail(f"{self.size} processes could not connect at {place} {words}", 1)  # a wrong address, a firewall
        atexit.register(dist.destroy_process_group)  # its threads must not see Python shut down
        if not args.evaluate_only:  # there will be checkpoints, and every rank writes a part of each
            self.share(args.output_dir)  # into the same directory

    def meet(self, seconds):  # at MASTER_ADDR
        """Find the store within some seconds, and begin to watch it. Raises: ValueError, RuntimeError."""
        import torch.distributed as dist  # two seconds

        self.store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))  # the launcher's, or ours
        second = self.store.clone()  # another connection to it, as the first one may be busy waiting
        threading.Thread(target=self.watch, args=(second, time.time() + 2 * seconds)).start()  # now others can end us

    def compare(self, what, facts):  # the plan, the data
        """End the run unless the first rank of this machine has the same facts (a dict) as rank 0."""
        self.wait()  # rank 0 may still be downloading its model, and the store waits for --ddp_timeout only
        if self.size == 1 or self.local:  # the others of a machine have the same launcher and files
            return  # and need not look
        facts = json.loads(json.dumps(facts, default=str))  # as they will arrive elsewhere
        if self.rank == 0:  # sets the example
            self.store.set(what, json.dumps([self.name, facts]))  # a few kB
        name, theirs = json.loads(self.store.get(what))  # waits for rank 0
        other = [f"{key} is {facts.get(key)!r} instead of {theirs.get(key)!r}"  # here; there
                 for key in theirs | facts if facts.get(key) != theirs.get(key)]  # None where nothing is known of it
        if other:  # training would hang, or mean nothing
            fail(f"{self.name} differs from {name}: {'; '.join(other)}. All machines need the same")  # command, files

    def share(self, folder):  # each machine may have a directory of that name for itself
        """End the run unless every machine sees a file that rank 0 makes in folder for a moment."""
        path = os.path.join(folder, f".probe-{os.environ['MASTER_PORT']}")  # no other run's
        if self.rank == 0:  # it writes most of a checkpoint
            open(path, "w").close()  # empty: fits on a full disk, too
        self.wait()  # it is there
        until = time.time() + 10  # network storage may take seconds to show it
        while not (seen := os.path.exists(path)) and time.time() < until:  # usually at once
            time.sleep(0.5)  # and look again
        self.wait()  # all have looked
        if self.rank == 0:  # whose file it is
            os.remove(path)  # the directory is as it was
        if not seen and not self.local:  # one rank speaks for the machine
            fail(f"{self.name} does not see what rank 0 writes in --output_dir {folder}: "  # but its own directory
                 "it has to be on storage that all machines share")  # such as NFS
        self.wait()  # nobody goes on before all have seen it

    def wait(self):  # for hours, if need be: what takes long is data and downloads
        """Wait until all ranks are here. Raises: RuntimeError when one of them is lost."""
        if self.group:  # several processes
            self.group.barrier().wait()  # on the CPU, with that group's patience

    def run(self, main):  # around everything
        """Call main(). What ends one of several processes with an error ends all, each machine with its sentence."""
        try:  # anything may fail
            main()  # hours
            self.wait()  # for what rank 0 saves last
            self.over.set()  # ends the thread, for which Python would wait
        except BaseException as error:  # also SystemExit, which fail() raises
            status = (error.code or 0) if isinstance(error, SystemExit) else 1  # what fail() was given
            if self.size == 1 or not status:  # one process, or --help
                raise  # as Python does it
            for number_ in (signal.SIGTERM, signal.SIGINT):  # the launcher ends the others of this machine
                signal.signal(number_, lambda *_: os._exit(status))  # nothing is left to do here
            if not isinstance(error, SystemExit) and not self.over.is_set():  # nobody has explained it
                sys.excepthook(type(error), error, error.__traceback__)  # as Python would print it
            self.said = getattr(error, "sentence", f"{type(error).__name__}: {error}")  # for the other machines
            threading.Timer(self.limit, os._exit, [status]).start()  # at the latest: a cut network may hold this thread
            with contextlib.suppress(Exception):  # nobody can be told
                if not self.tried:  # a wrong flag, or a file that only this machine lacks
                    self.meet(self.limit)  # the others are about to come
                self.store.compare_set("end", "", json.dumps([status, self.machine, self.name, self.said]))  # if first
                time.sleep(60)  # the thread will find it, as on all ranks, and end this process
            os._exit(status)  # at once: Python's own exit might wait for a lost rank

    def watch(self, store, deadline):  # in a thread, as the main one may be waiting in torch
        """End this process when any rank has ended with an error, or the store, or without a group at the deadline."""
        end, patience = [1, None, self.name, "no connection to the other processes"], 30  # if there is no store, …
        with contextlib.suppress(RuntimeError):  # … of which torch may know more in half a minute
            while not store.check(["end"]) and (self.group or time.time() < deadline):  # all is well
                if self.over.wait(1):  # a second, or until this rank has ended
                    return  # well
            end, patience = json.loads(store.compare_set("end", "", json.dumps(end))), 2  # the first one counts
        if self.over.wait(patience):  # this rank may just be ending, too
            return  # well
        self.over.set()  # the main thread need not speak of lost connections any more
        status, machine, name, sentence = end  # of the rank that was the first
        if machine != self.machine and not self.local and sentence != self.said:  # it was not said on this machine
            print(f"\nmain.py: error: {name}: {sentence.removeprefix(name + ' ')}", file=sys.stderr, flush=True)  # once
        with contextlib.suppress(RuntimeError):  # a rank is lost, or the store
            store.set(f"{self.rank} knows", "")  # but the store may end with this process, and a launcher ends others
            store.wait([f"{rank} knows" for rank in range(self.size)], timedelta(seconds=self.limit))  # so all wait
        os._exit(status)  # the same on all ranks


RANKS = Ranks()  # of this run


# ── Trainer's arguments ──────────────────────────────────────────────────────────────────────────────────────────────

TRAINER_FLAGS = (  # flags above that are TrainingArguments fields of the same name: handed over as they are
    "output_dir num_train_epochs per_device_train_batch_size per_device_eval_batch_size "  # how much at a time
    "gradient_accumulation_steps learning_rate weight_decay warmup_steps bf16 fp16 "  # how each step is made
    "logging_steps save_steps eval_steps save_total_limit seed ddp_timeout"  # what is kept of it
).split()  # a list of names

HARMLESS = (  # beginnings of TrainingArguments fields that cannot change weights: they may differ when a run goes on
    "output_dir", "logging_", "log_", "save_", "eval_", "do_", "hub_", "push_to_hub", "report_to", "run_name",  # output
    "project", "trackio_", "disable_tqdm", "debug", "include_", "skip_memory_metrics", "batch_eval_metrics",  # reports
    "per_device_eval_batch_size", "prediction_loss_only", "label_names", "length_column_name",  # evaluation
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent",  # speed
    "ddp_timeout", "ddp_backend", "ddp_bucket", "local_rank", "use_cpu", "torch_empty", "resume_",  # where it runs
)


def make_training_arguments(args):  # the first use of torch
    """Turn the command line into transformers.TrainingArguments.

    On several processes this also creates the process group; on a machine without a GPU it chooses the CPU.
    Returns: TrainingArguments. Raises: SystemExit(2) after one sentence for a value it does not take.
    """
    import torch  # two seconds
    from transformers import HfArgumentParser, TrainingArguments  # four more

    if not torch.cuda.is_available():  # the same commands run on the CPU, with one notice
        if args.fp16:  # float16 autocast has no CPU kernels worth the name
            fail("--fp16 needs a GPU; on the CPU use --bf16 or neither")  # bfloat16 is fine there
        if args.use_flash_attention:  # its kernels are CUDA kernels
            fail("--use_flash_attention needs a GPU; leave it out to use PyTorch's own attention")  # Ampere or newer
        say("No GPU found: training on the CPU.")  # the one notice line
        args.trainer_argv += ["--use_cpu"]  # also makes several processes talk over gloo instead of NCCL
    if args.use_flash_attention and not args.fp16:  # its kernels take 16-bit inputs only
        args.bf16 = True  # autocast makes them from the float32 weights

    argv = [text for name in TRAINER_FLAGS for text in (f"--{name}", str(getattr(args, name)))]  # values and defaults
    argv += ["--activation_checkpointing", str(args.gradient_checkpointing)]  # the flag's new name in transformers
    argv += ["--logging_nan_inf_filter", "False"]  # the Trainer's default shows a mean instead of a NaN
    argv += ["--ddp_find_unused_parameters", "False"]  # every weight is used in every step: no search for others
    argv += ["--report_to", *args.report_to, "--eval_strategy", "steps"]  # main() sets "no" without validation data
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)  # one flag for each of its 120 fields
    parser.error = fail  # one sentence instead of 600 lines of usage
    if RANKS.size > 1:  # before a device is touched
        RANKS.connect(args, parser.parse_known_args(argv + args.trainer_argv)[0])  # what the Trainer is about to get
    try:  # TrainingArguments checks combinations of its own
        made, rest = parser.parse_args_into_dataclasses(  # rest: words that stand behind no flag
            argv + args.trainer_argv,  # ours first: of two equal flags the last one counts
            look_for_args_file=False,  # a file main.args would be read silently
            return_remaining_strings=True,  # else a traceback
        )
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:  # each raised for some flag
        fail(f"the Trainer does not accept these flags: {' '.join(str(error).split())}")  # its own words, on one line
    if rest:  # "--max_steps 10 20", or a file name without its flag
        fail(f"{rest[0]!r} belongs to no flag: put --train_file or another before it, or leave it out")  # which word
    if made.max_steps < 1 and made.max_steps != -1:  # -1 is the Trainer's "not given"
        fail(f"--max_steps: {made.max_steps} must be at least 1, or be left out to train --num_train_epochs")  # 0 too
    if made.world_size != RANKS.size:  # each process would train on its own, all of them into one output_dir
        fail(f"WORLD_SIZE is {RANKS.size}, but the Trainer sees {made.world_size}: use accelerate launch")  # odd
    for name in ("save_only_model", "enable_jit_checkpoint", "save_on_each_node"):  # the Trainer's, none of them whole
        if getattr(made, name):  # no optimizer; a partial final model; no weights on other nodes
            fail(f"--{name} makes checkpoints that no run can go on from: leave it out")  # ours need none of them
    if made.ignore_data_skip:  # for data too large to skip over; ours takes seconds
        say("note     --ignore_data_skip: a stopped run will not go on with the data it had not seen yet")  # inexact
    if made.use_liger_kernel:  # its kernels for the layers are welcome
        ours = {"fused_linear_cross_entropy": False, "cross_entropy": False}  # its loss would take the place of ours
        made.liger_kernel_config = (made.liger_kernel_config or {}) | ours  # what to replace in the model
    return made  # checked, and on several processes connected


def run_settings(args, training_args):  # what has to stay the same when a run goes on
    """Return {name: value}, as JSON values, of every flag that decides the weights a run ends with."""
    ours = ("dataset_name dataset_config_name text_column max_seq_length no_truncation add_eos "  # which tokens, in …
            "max_train_samples use_flash_attention").split()  # … which chunks; and what rounds differently from sdpa
    flags = training_args.to_dict().items()  # the Trainer's, defaults included
    settings = {name: value for name, value in flags if not name.startswith(HARMLESS)}  # about 60
    settings |= {name: getattr(args, name) for name in ours} | {"processes": training_args.world_size}  # all machines
    sizes = [f"{os.path.basename(path)} ({os.path.getsize(path):,} bytes)" for path in args.train_file]  # no folder
    settings["train_file"] = sizes  # a quick look; digests() compares every token
    settings["model_name"] = os.path.basename(args.model_name_or_path.rstrip(os.sep))  # places may change, names not
    return json.loads(json.dumps(settings, default=str))  # tuples become lists, as they will be in the manifest


def digests(model, train):  # what no flag says
    """Return {"model": …, "train_data": …}: SHA-256 of the weights before training, and of all training tokens."""
    weights, tokens = hashlib.sha256(), hashlib.sha256()  # a second for 1 GB of either
    for weight in model.parameters():  # also finds a model directory that was changed in between
        weights.update(weight.detach().numpy().data)  # its bytes; float32, still on the CPU
    for chunks in train.data.column("input_ids").chunks:  # Arrow arrays in memory-mapped files
        tokens.update(chunks.flatten().to_numpy().data)  # all chunks are equally long: the tokens say all
    return {"model": weights.hexdigest()[:16], "train_data": tokens.hexdigest()[:16]}  # enough to see a difference


# ── Data: read → tokenize → group_texts ──────────────────────────────────────────────────────────────────────────────


def load_and_prepare_dataset(args, tokenizer, rebuild=False):  # text in, chunks out
    """Read, tokenize and pack the training and validation text.

    Args: args: the parsed command line. tokenizer: of the model. rebuild (bool): do not use the cache.
    Returns: (train, validation), each a datasets.Dataset whose only column `input_ids` holds lists of exactly
        max_seq_length int32 token ids, memory-mapped from the cache; None for a split that there is no data for.
    Raises: SystemExit(2) after one sentence when the data is not what it should be.
    """
    needed = "validation" if args.evaluate_only else "train"  # the split without which there is nothing to do
    if args.dataset_name:  # the hub, its cache, or a directory
        name, config = args.dataset_name, args.dataset_config_name  # the configuration may be None
        splits = load_named_dataset(name, config, args.text_column, needed, args.cache_dir)  # split → rows
    else:  # one split for each flag that was given
        given = {"train": args.train_file, "validation": args.validation_file}  # split → list of paths, maybe empty
        options = (args.text_column, args.cache_dir, rebuild)  # the same for both
        splits = {name: load_files(name, files, *options) for name, files in given.items() if files}  # split → rows

    wanted = {"train": args.max_train_samples, "validation": args.max_eval_samples}  # split → at most so many chunks
    if args.evaluate_only:  # the training text is not needed
        del wanted["train"]  # and may be large
    chunks = {}  # split → packed data set
    for name, limit in wanted.items():  # train first: its errors matter more
        if name in splits:  # validation is optional
            packed = prepare_split(name, splits.pop(name), tokenizer, args, rebuild)  # pop: lets go of the raw text
            chunks[name] = packed.select(range(min(limit, len(packed)))) if limit else packed  # a view, no copy
            if limit and limit < len(packed):  # chunks that were made but will not be used
                say(f"{name}: only the first {limit:,} of {len(packed):,} chunks are used (--max_*_samples)")  # asked
    return chunks.get("train"), chunks.get("validation")  # main() needs both names


def load_named_dataset(name, config, column, needed, cache_dir):  # --dataset_name
    """Load a data set from the hub, from its cache or from a local directory.

    Returns: {"train": Dataset, "validation": Dataset} as far as there are such splits, each with the one column `text`.
    Raises: SystemExit(2) after one sentence for an unknown name, configuration or column, and without a network.
    """
    import datasets  # Arrow files, memory-mapped: data may be larger than memory

    name = DATASET_ALIASES.get(name, name)  # the hub knows the old short name, the library no longer does
    if name == WIKITEXT and not config:  # the example everybody starts with
        config = WIKITEXT_CONFIG  # the small one
        say(f"{name}: no --dataset_config_name given, taking {config}.")  # the one notice line
    try:  # the hub may not know it, may not answer, or may not let us in
        saved = [os.path.join(name, file) for file in ("state.json", "dataset_dict.json")]  # of one split; of several
        if any(os.path.isfile(path) for path in saved):  # a directory with Arrow files
            if config:  # there is nothing to choose from
                fail(f"--dataset_config_name {config}: {name} is one saved data set; leave the flag out")  # one only
            loaded = datasets.load_from_disk(name)  # made by Dataset.save_to_disk
        else:  # a hub name, or a directory of files as on the hub
            if not config:  # the data set may have several and no default
                config = datasets.get_dataset_default_config_name(name)  # the only one, or the one marked as default
                if config is None:  # several: choosing one silently could train on the wrong language
                    names = ", ".join(datasets.get_dataset_config_names(name))  # what its card lists
                    fail(f"--dataset_name {name} has several configurations: "  # never guessed
                         f"choose one with --dataset_config_name: {names}")  # all of them
            loaded = datasets.load_dataset(name, config, cache_dir=cache_dir)  # downloads once, then reads the cache
    except Exception as error:  # the libraries raise a dozen kinds for a handful of reasons
        fail(explain_loading_error("--dataset_name", name, "datasets/", error))  # one sentence with what to do

    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}  # a single saved Dataset is training data
    if needed not in loaded:  # a data set of test questions, say
        fail(f"--dataset_name {name} has no {needed} split, only {', '.join(loaded)}: "  # what there is
             "give files instead, with --train_file and --validation_file")  # rather than taking another split silently
    splits = {split: loaded[split] for split in ("train", "validation") if split in loaded}  # test stays untouched
    for split, rows in splits.items():  # the same column is needed in both
        check_column(name, f"split {split}", column, rows.column_names)  # the usual first error with others' data
        kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)  # "int64", "List"
        if kind not in ("string", "large_string"):  # numbers, lists, nulls, pictures
            fail(f"{name}, split {split}: column {column!r} holds {kind}, not text; "  # its type on the hub
                 "choose another with --text_column")  # the flag to change
        rows = rows.select_columns([column])  # the others are not read from the disk any more
        splits[split] = rows if column == "text" else rows.rename_column(column, "text")  # the name used from here on
    return splits  # nothing has been read into memory so far


def explain_loading_error(flag, name, kind, error):  # hub, cache and broken files
    """Turn an exception of transformers, datasets or huggingface_hub into a sentence that says what to do.

    Args: flag (str): the flag that named it. name (str): hub name or path. kind (str): "datasets/" or "" for models.
    """
    from huggingface_hub import constants  # which hub: HF_ENDPOINT may name another

    kinds, words = [], ""  # the libraries wrap the reason up to four times, and some hide it in the message only
    while error and len(kinds) < 9:  # from the outermost to the first one raised; chains may be circular
        kinds += [base.__name__ for base in type(error).__mro__]  # names: three libraries, and some kinds are private
        words += " ".join(str(error).split()) + " "  # on one line
        error = error.__cause__ or error.__context__  # an explicit cause says more than a context
    url = f"{constants.ENDPOINT}/{kind}{name}"  # the page where terms are accepted
    if "GatedRepoError" in kinds or "gated dataset" in words:  # Gemma itself is gated
        if "403" in words or "Visit the dataset page" in words:  # the token is good, but its owner was not let in
            return f"{flag} {name} is gated and your account has no access: accept the terms at {url}"  # once, for good
        return f"{flag} {name} is gated: accept the terms at {url}, then run hf auth login with your token"  # no token
    if "Invalid credentials" in words:  # a token that was revoked or cut short
        return f"{flag} {name}: the hub refuses your token; run hf auth login with a new one"  # hf.co/settings/tokens
    if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds:  # a slip, or a private repository
        return f"{flag} {name}: the hub knows no such name; check {url} (if private: hf auth login)"  # 401 or 404
    if "ConnectionError" in kinds or "LocalEntryNotFoundError" in kinds:  # no way to the hub and not downloaded before
        return (f"{flag} {name} is not in the cache and the hub cannot be reached: "  # after half a minute of tries
                "check the network (and HF_HUB_OFFLINE), or give a local directory")  # the ways out
    if "EmptyDatasetError" in kinds:  # a directory without .json, .csv, .txt, .parquet, …
        return f"{flag} {name}: the directory holds no data files"  # perhaps one level up
    advice = "if it is damaged, download or save it anew"  # the commonest reason that is left
    return f"{flag} {name} cannot be loaded; {advice}: {words[:400].strip()}"  # in the libraries' own words


def load_files(split, files, column, cache_dir, rebuild):  # --train_file, --validation_file
    """Read local files into the cache once. Returns: datasets.Dataset with the one column `text`, memory-mapped."""
    from datasets import Features, Value  # the schema of the cache

    keys = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]  # a changed file is read anew
    kwargs = {"files": tuple(files), "column": column}  # a tuple: datasets would split a list over processes
    schema = Features({"text": Value("large_string")})  # large: 64-bit offsets, for texts of gigabytes
    return cached(f"{split}_rows", read_texts, kwargs, keys, cache_dir, rebuild, schema)  # the second time at once


def cached(name, generator, kwargs, keys, cache_dir, rebuild, features=None):  # read and pack
    """Write what generator(**kwargs) yields to an Arrow file once, and map it into memory now and in every later run.

    This is datasets.Dataset.from_generator, which has no switch to do it again.
    Args: name (str): for the progress bar. keys: whatever decides the content, hashed together with the generator's
        own code. features: the schema of a row.
    Returns: datasets.Dataset. The file appears under its name when it is complete, so a kill leaves no half cache.
    """
    from datasets.fingerprint import Hasher  # stable over processes and Python's hash seeds
    from datasets.packaged_modules.generator.generator import Generator  # what from_generator is made of

    builder = Generator(  # knows its place in the cache by config_id
        generator=generator,  # a function that yields rows
        gen_kwargs=kwargs,  # not hashed, since a config_id is given: hashing a tokenizer takes four seconds
        config_id=f"{name}-{Hasher.hash((generator, kwargs.get('column'), keys))}",  # names the directory
        split=name,  # shown on the progress bar: "Generating train_rows split"
        cache_dir=cache_dir,  # None: the cache of datasets
        features=features,  # None: inferred from the first rows
    )
    builder.download_and_prepare(download_mode="force_redownload" if rebuild else None)  # nothing if it is there
    return builder.as_dataset(split=name)  # memory-mapped: costs no memory until touched


def read_texts(files, column):  # a generator: one row in memory at a time
    """Yield {"text": str or None} for every row of the files, in order; every fault names its file and line.

    .txt: a line is a text, its line break kept. .csv: the header names the columns. .json: an array of objects, or an
    object a line, as in .jsonl. A null is passed on, and counted as a blank row later.
    Args: files (sequence of str): paths. column (str): the column that holds the text.
    Raises: SystemExit(2) after one sentence.
    """
    seen = False  # a row in any of the files?
    for path in files:  # each file on its own: formats may be mixed
        kind = os.path.splitext(path.removesuffix(".gz"))[1].lower()  # ".jsonl"
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as stream:  # bytes: we count lines and offsets
            lines = decode_lines(path, stream)  # lazily: a file may be larger than memory
            reader = {".txt": read_txt, ".csv": read_csv, ".json": read_json, ".jsonl": read_json}[kind]  # by extension
            for where, row in reader(path, lines, column):  # where: "line 7", for the sentence
                if not isinstance(row, str) and row is not None:  # numbers and lists are no text
                    fail(f"{path}, {where}: column {column!r} holds {json.dumps(row)[:60]}, not text; "  # as written
                         "choose another with --text_column, or put quotes around it")  # both ways out
                if row and not row.isascii() and any("\ud800" <= letter <= "\udfff" for letter in row):  # half a pair
                    fail(f"{path}, {where}: the text has half a character, an escape from \\ud800 to \\udfff "  # JSON
                         "without its other half; remove it")  # nothing can be encoded with it
                seen = True  # blank or not
                yield {"text": row}  # one row of the cache

    if not seen:  # a header alone, "[]", line breaks alone
        fail(f"{', '.join(files)}: no rows, so nothing to train on; check how the file was written")  # a failed export


def decode_lines(path, stream):  # bytes → text
    """Yield the lines of a binary stream as str, line breaks as \\n. Raises: SystemExit(2) with the byte offset."""
    offset = 0  # bytes before this line, for the sentence
    try:  # a .gz that was cut short, or is no .gz
        for line in stream:  # split at \n only, as every reader of JSON lines does
            try:  # UTF-8 is the one encoding that is read
                text = line.decode("utf-8")  # most bytes of another encoding fail here
            except UnicodeDecodeError as error:  # Latin-1, UTF-16, a picture
                encoding = "utf-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"  # by its first bytes
                fail(f"{path} is not UTF-8: byte {offset + error.start} is 0x{line[error.start]:02x}; "  # from 0
                     f"convert it, for example with iconv -f {encoding} -t utf-8")  # the tool that every machine has
            text = text.removeprefix("\ufeff") if offset == 0 else text  # the mark that Excel puts in front
            offset += len(line)  # bytes, not characters
            yield text[:-2] + "\n" if text.endswith("\r\n") else text  # files from Windows
    except (OSError, EOFError, gzip.zlib.error) as error:  # BadGzipFile is an OSError
        fail(f"{path} cannot be read to its end: {error}")  # the disk, the network share, or a broken archive


def read_txt(path, lines, column):  # the simplest of three readers
    """Yield ("line N", text) for each line; the column does not matter."""
    for number_, line in enumerate(lines, 1):  # counted from 1, as editors do
        yield f"line {number_}", line  # with its line break: it is part of the text


def read_csv(path, lines, column):  # datasets would read "NA" as null and fill short rows
    """Yield ("line N", text) for each row; values in quotes may span lines. Raises: SystemExit(2)."""
    csv.field_size_limit(2**31 - 1)  # Python's default refuses texts over 128 KiB
    rows = csv.reader(lines, strict=True)  # strict: an open quote is an error, not the rest of the file in one cell
    try:  # csv.Error names what is wrong, line_num says where
        header = next(rows, [])  # the names of the columns
        check_column(path, "line 1", column, header)  # once a file is enough: the rows must be as long as the header
        place, numeric, where = header.index(column), True, ""  # numeric: until a value is seen that is no number
        for row in rows:  # lists of str
            where = f"line {rows.line_num}"  # the last line of a value that spans several
            if row and len(row) != len(header):  # a comma too many or too few: which cell is the text?
                fail(f"{path}, {where}: {len(row)} values, but the header has {len(header)}; "  # ragged
                     "texts with commas or line breaks need double quotes around them")  # the usual reason
            value = row[place] if row else ""  # an empty line is a blank row
            digits = value.strip().lstrip("+-").replace(".", "", 1)  # "-1.5" → "15"
            numeric = numeric and (not digits or digits.isdigit())  # decided by the first real text
            yield where, value  # always str
        if numeric and where:  # a column of ids or prices: surely the wrong one
            fail(f"{path}: column {column!r} holds only numbers or blanks, not text; "  # never trained on silently
                 f"choose another with --text_column (columns: {', '.join(header)})")  # what there is instead
    except csv.Error as error:  # bad quoting, a NUL byte
        fail(f"{path}, line {rows.line_num}: broken CSV: {error}")  # e.g. "unexpected end of data": an open quote


def read_json(path, lines, column):  # both layouts of JSON
    """Yield ("line N" or "item N", value) for each object of JSON lines or of one JSON array. Raises: SystemExit(2)."""
    numbered = enumerate(lines, 1)  # counted from 1, as editors do
    first, line = next((pair for pair in numbered if pair[1].strip()), (1, ""))  # the first line tells the layout
    if line.lstrip().startswith("["):  # one array: parsed as a whole, so for gigabytes .jsonl is the better format
        items = parse_json(path, first, line + "".join(text for _, text in numbered))  # a list, in memory
        rows = ((f"item {count}", item) for count, item in enumerate(items, 1))  # in an array lines mean little
    else:  # an object a line, one line in memory at a time
        rest = itertools.chain([(first, line)], numbered)  # the first line again, then all others
        rows = ((f"line {count}", parse_json(path, count, text)) for count, text in rest if text.strip())  # none blank
    for where, row in rows:  # parsed, of any type
        if not isinstance(row, dict):  # a bare string, number or list
            fail(f'{path}, {where}: {json.dumps(row)[:60]} is no JSON object; write {{"{column}": "…"}}')  # the remedy
        check_column(path, where, column, row)  # each row: a name may change half-way
        yield where, row[column]  # a str, or something that read_texts refuses


def parse_json(path, start, text):  # json.loads with a place
    """Parse text that starts in line `start` of the file. Raises: SystemExit(2) with the line of the fault."""
    try:  # the parser counts lines from the start of text
        return json.loads(text.rstrip())  # rstrip: else a fault at the end would be said to be on the next line
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        line = start + getattr(error, "lineno", 1) - 1  # in the file
        fail(f"{path}, line {line}: broken JSON: {getattr(error, 'msg', error)}; "  # the parser's words
             "the file must hold one object a line or one array of objects")  # the two layouts


def check_column(path, where, column, columns):  # every source of data needs the column
    """Raise SystemExit(2) unless columns, the names there are, holds column."""
    if column not in columns:  # list them: the right one is usually obvious
        names = [str(name) for name in columns]  # a header's cells or an object's keys
        fail(f"{path}, {where}: no column {column!r}{nearest(column, names)}; "  # a slip, or the default name
             f"columns: {', '.join(names) or 'none'}; choose one with --text_column")  # the flag to change


def prepare_split(split, rows, tokenizer, args, rebuild):  # one line of report a split
    """Tokenize and pack one split, and report what became of every row and token.

    Args: split (str): its name. rows: Dataset with the column `text`. Returns: Dataset of chunks, see above.
    """
    import datasets  # map runs the tokenizer over memory-mapped rows
    import pyarrow.compute  # counts without Python objects
    from datasets.fingerprint import Hasher  # stable over processes

    if len(rows) == 0:  # a data set that was saved empty; files are checked while they are read
        fail(f"the {split} data has no rows")  # nothing to tokenize
    size = TOKENIZE_BYTES * len(rows) // max(1, rows.data.nbytes)  # rows that hold about so many bytes of text
    cache = os.path.expanduser(args.cache_dir or datasets.config.HF_DATASETS_CACHE)  # beside what was read
    os.makedirs(cache, exist_ok=True)  # absent on a fresh machine when the data came from a local directory
    recipe = (tokenize_texts, rows._fingerprint, tokenizer.backend_tokenizer.to_str(), args.add_eos)  # all that decides
    key = Hasher.hash(recipe)  # a changed text, tokenizer, flag or function makes a new cache file
    tokenized = rows.map(  # with a progress bar; in batches, so that memory stays flat
        tokenize_texts,  # a batch of texts → a batch of lists of ids
        fn_kwargs={"tokenizer": tokenizer, "eos": [tokenizer.eos_token_id] if args.add_eos else []},  # what to append
        batched=True,  # the tokenizer works on many texts at once, on all cores
        batch_size=max(1, min(1000, size)),  # fewer when texts are long: memory stays flat
        remove_columns=["text"],  # only token ids are kept
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),  # 4 bytes hold 262,144 ids
        num_proc=args.preprocessing_num_workers,  # None: this process, whose tokenizer is threaded already
        load_from_cache_file=not rebuild,  # a second run starts at once
        cache_file_name=os.path.join(cache, f"tokenized-{key}.arrow"),  # one place, also for a read-only data directory
        new_fingerprint=key,  # hashing the tokenizer object instead would take four seconds
        desc=f"Tokenizing {split}",  # on the progress bar
    )
    if len(tokenized) == 0:  # blank rows make no tokens
        fail(f"the {split} data holds no text: all {len(rows):,} rows are blank or null")  # surely not meant

    length = args.max_seq_length  # tokens per chunk
    sizes = pyarrow.compute.list_value_length(tokenized.data.column("input_ids")).to_numpy()  # tokens of each text
    cut = (sizes - length).clip(0) * (not args.no_truncation)  # tokens that truncation takes from each text
    kept = int(sizes.sum(dtype="int64") - cut.sum(dtype="int64"))  # what is packed
    chunks, dropped = divmod(kept, length)  # the one remainder of the whole split
    say(  # every row and every token is accounted for
        f"{split}: {len(rows):,} rows read, {len(rows) - len(tokenized):,} blank skipped, "  # blank: only white space
        f"{(cut > 0).sum():,} texts truncated (-{cut.sum(dtype='int64'):,} tokens), "  # --no_truncation keeps them
        f"{kept:,} tokens kept = {chunks:,} chunks of {length:,} + {dropped:,} tokens dropped at the end"  # adds up
    )
    if chunks == 0:  # any length up to kept gives a chunk, also when it truncates more
        fail(f"the {split} data has {kept:,} tokens, too few for one chunk of {length:,}: "  # a handful of sentences
             f"add text, or use --max_seq_length {kept} or less")  # proven by the comment above
    files = tuple(file["filename"] for file in tokenized.cache_files)  # one for each process that tokenized, in order
    kwargs = {"files": files, "length": length, "truncate": not args.no_truncation}  # for group_texts
    keys = (key, length, args.no_truncation)  # of the packed cache
    return cached(f"{split}_chunks", group_texts, kwargs, keys, args.cache_dir, rebuild)  # lists of int32


def tokenize_texts(batch, tokenizer, eos):  # runs in datasets.map, maybe in several processes
    """Map a batch {"text": list[str or None]} to {"input_ids": list[list[int]]}, blank texts left out.

    The tokenizer puts Gemma's BOS before each text; eos (list[int]) goes behind it. Truncation comes later, in
    group_texts, so that another --max_seq_length need not tokenize again.
    """
    texts = [text for text in batch["text"] if text and not text.isspace()]  # a blank one would be a lone BOS
    ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []  # all in one call
    return {"input_ids": [row + eos for row in ids]}  # rows of their own length


def group_texts(files, length, truncate):  # packing
    """Concatenate all texts and yield {"input_ids": chunk} for chunks of exactly `length` tokens.

    Works on Arrow's buffers through numpy: 12 million tokens take a fraction of a second. A tail shorter than a chunk
    is carried over from batch to batch, so that only the one at the end of the split is dropped.
    Args: files (sequence of str): Arrow files with the column `input_ids`, lists of int32. length (int): tokens per
        chunk. truncate (bool): take at most `length` tokens of each text.
    Yields: numpy arrays of shape (length,), int32.
    """
    import numpy as np  # array arithmetic
    import pyarrow as pa  # the format of the cache
    import pyarrow.compute as pc  # the sizes of lists without Python objects

    tail = np.empty(0, dtype=np.int32)  # tokens that are in no chunk yet: always fewer than length
    for path in files:  # the tokenized texts, in their order
        with pa.OSFile(path) as source, pa.ipc.open_stream(source) as batches:  # read, not mapped: memory stays flat
            for batch in batches:  # at most a thousand texts
                texts = batch["input_ids"]  # one Arrow array of lists
                tokens = texts.flatten().to_numpy()  # the lists' tokens end to end: no copy
                if truncate:  # each token's position in its own text decides
                    sizes = pc.list_value_length(texts).to_numpy()  # (texts,)
                    starts = np.repeat(sizes.cumsum() - sizes, sizes)  # (tokens,): where each token's text begins
                    tokens = tokens[np.arange(len(tokens)) - starts < length]  # what truncating the texts would keep
                tokens = np.concatenate([tail, tokens])  # in order, none twice
                whole = len(tokens) // length * length  # only whole chunks train: no padding, no mask
                yield from ({"input_ids": chunk} for chunk in tokens[:whole].reshape(-1, length))  # rows of the cache
                tail = tokens[whole:]  # first in the next batch; in the end, what the report calls dropped


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_tokenizer(name, max_seq_length):  # the first thing a model must have
    """Load the tokenizer of model `name` and check that the model's context holds max_seq_length tokens.

    Returns: a fast tokenizer that has a pad token. Raises: SystemExit(2) after one sentence.
    """
    from transformers import AutoConfig, AutoTokenizer  # pick the classes by the model's config.json
    from transformers.utils import cached_file  # path of one file of a model, downloaded if need be

    part = ""  # which file of the model is at fault, where the error itself does not say it
    try:  # the first contact with the hub: what is wrong with the access shows here
        config = AutoConfig.from_pretrained(name)  # a few kB
        cached_file(name, "tokenizer.json")  # raises if there is none: AutoTokenizer would make up an empty tokenizer
        part = " (in its tokenizer.json)"  # from here on it is the tokenizer's fault
        tokenizer = AutoTokenizer.from_pretrained(name)  # 33 MB for Gemma 3
    except Exception as error:  # the libraries raise a dozen kinds for a handful of reasons
        fail(explain_loading_error("--model_name_or_path", name, "", error) + part)  # one sentence with what to do
    context = getattr(config.get_text_config(), "max_position_embeddings", max_seq_length)  # 32,768 for Gemma 3 270M
    if max_seq_length > context:  # positions that the model has never seen
        fail(f"--max_seq_length {max_seq_length} is longer than the model's context: use {context} or less")  # 32,768
    if tokenizer.pad_token is None:  # the collator asks for one though full chunks need no padding
        tokenizer.pad_token = tokenizer.eos_token  # as everywhere in this field
    return tokenizer  # adds BOS by itself, never EOS


def load_model(name, tokenizer, flash_attention):  # from the hub, its cache or a directory
    """Load the causal language model `name` with float32 weights.

    float32, because an update of 2e-5 relative to a weight is lost in bfloat16's 8 bits: 16-bit matrix products come
    from autocast (--bf16, --fp16), which leaves these master weights alone. Flash Attention wants a model that was
    loaded as bfloat16; its weights are then made float32 just the same.
    Returns: PreTrainedModel on the CPU. Raises: SystemExit(2) after one sentence.
    """
    import torch  # names of number formats
    from transformers import AutoModelForCausalLM  # picks Gemma3ForCausalLM by config.json

    try:  # the weights: 536 MB from the hub at the first time
        model, report = AutoModelForCausalLM.from_pretrained(  # memory-maps the file, then copies
            name,  # hub name or directory
            dtype=torch.bfloat16 if flash_attention else torch.float32,  # else the file's own: bfloat16
            attn_implementation="flash_attention_2" if flash_attention else "sdpa",  # sdpa: PyTorch's fused kernels
            ignore_mismatched_sizes=True,  # do not raise for a wrong shape: the report lists it
            output_loading_info=True,  # also tell which weights the file lacked
        )
    except Exception as error:  # broken files, a model of another kind, no network
        fail(explain_loading_error("--model_name_or_path", name, "", error))  # one sentence with what to do
    wrong = [*sorted(report["missing_keys"]), *sorted(key for key, *_ in report["mismatched_keys"])]  # absent, or odd
    if wrong:  # transformers fills them with random numbers and a warning
        lacks = ", ".join(wrong[:3])  # a few say enough
        fail(f"--model_name_or_path {name}: the file lacks weights, such as {lacks}; save the model anew")  # a bad copy
    model.float()  # masters; changes nothing unless loaded as bfloat16
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens were added to the tokenizer
        model.resize_token_embeddings(len(tokenizer))  # the head is tied to the embedding and grows with it
    model.config.use_cache = False  # keys and values of past tokens are for generation: in training only a waste
    return model  # the Trainer moves it to the device


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────
# A checkpoint is made under .staging, sealed with a manifest of checksums, and gets its name by a rename: whatever is
# called checkpoint-N is whole. Nothing is written into it again; what is found damaged is set aside, never deleted.


class Stop:  # SIGTERM comes from batch systems, SIGINT from Ctrl-C
    """Ends the run with a sentence when a signal comes; in training at the end of the step, after a checkpoint."""

    def __init__(self):  # called before the heavy imports: a signal may come at any time
        """Take over SIGTERM and SIGINT."""
        self.signal, self.time, self.training, self.owner = 0, 0.0, False, os.getpid()  # 0: none so far
        for number_ in (signal.SIGTERM, signal.SIGINT):  # kill -9 cannot be caught, and need not be
            signal.signal(number_, self.receive)  # Python calls it between two of its own instructions
        os.register_at_fork(after_in_child=self.release)  # tokenizer processes have to end when their pool says so
        self.launcher = 0  # its process id, if there is one
        if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # started by a launcher …
            self.launcher = os.getppid()  # … which may be killed …
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # … and its death shall reach us, too (Linux: PR_SET_PDEATHSIG)

    def release(self):  # runs in every process that Python forks
        """Let SIGTERM end a tokenizer's process at once: in Python a handler waits as long as a lock is waited for."""
        if not self.training:  # data loaders live on until the checkpoint is written
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the system's own, else the pool would wait for ever

    def receive(self, number_, frame):  # the signature that Python wants
        """Note the signal, or end at once when there is nothing to save, or when it comes again after 3 seconds."""
        if os.getpid() == self.owner and self.launcher not in (0, os.getppid()):  # the launcher has died
            number_ = signal.SIGKILL  # nobody has asked for this end: all ranks shall know
        if os.getpid() != self.owner:  # a data loader's or tokenizer's process has inherited this handler
            if not self.training:  # tokenizers are ended by their pool, with SIGTERM
                os._exit(128 + number_)  # data loaders live on until the checkpoint is written
        elif self.training and (not self.signal or time.time() - self.time < 3):  # launchers send a second one at once
            self.signal, self.time = number_, self.time or time.time()  # the end of the step will see it
            os.write(2, b"\nStopping: a checkpoint is saved at the end of this step ...\n")  # print may be interrupted
        else:  # before or after training, or impatience
            self.signal = number_  # kept, as Python ignores an exit inside a destructor: then the first step sees it
            self.leave(number_, "")  # what was saved before is whole

    def leave(self, number_, saved):  # the one way out
        """Exit with 128 + the signal's number, as a shell reports it, after the sentence."""
        self.training = False  # a further signal ends it at once
        if number_ == signal.SIGKILL:  # a failure, after which multinode_train.sh may try again
            fail(f"stopped by the loss of a launcher{saved}; the same command again goes on", 1)  # not asked for
        name = signal.Signals(number_).name  # SIGTERM or SIGINT
        fail(f"stopped by {name}{saved}; the same command again goes on", 128 + number_)  # 143 or 130


def claim(output_dir):  # one run per directory
    """Lock output_dir for this process. Returns: the open lock file: closing it, or dying, lets go of the lock.

    lockf and not flock, because flock's lock is inherited by data loader processes that may outlive this one.
    """
    file = open(os.path.join(output_dir, ".lock"), "a+", encoding="utf-8")  # not truncated: it names the owner
    try:  # held by the system, so a run that was killed holds nothing
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # does not wait
    except OSError as error:  # BlockingIOError, or a file system that has no locks
        file.seek(0)  # a+ stands at the end
        if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX allows both for "locked"
            owner = file.read().strip()  # "process 4711 on node0"
            fail(f"--output_dir {output_dir} is in use by {owner}: wait for it, or choose another", 1)  # no harm done
        say(f"note     {output_dir} cannot be locked ({error.strerror}): start no second run in it")  # old NFS
    file.truncate(0)  # of the last run
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)  # for the sentence above
    return file  # main() keeps it open


def sha256(path):  # 1.8 GB/s: two seconds for a checkpoint of 3.2 GB
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:  # unbuffered reading would be no faster
        while block := file.read(1 << 20):  # 1 MB at a time
            digest.update(block)  # releases the interpreter's lock
    return digest.hexdigest()  # 64 characters


def seal(folder, facts):  # before a checkpoint gets its name
    """Write manifest.json (facts, and size and checksum of every file of folder), and all of it to the disk."""
    paths = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}  # weights, optimizer, states …
    files = {name: [os.path.getsize(path), sha256(path)] for name, path in paths.items()}  # what will be read back
    facts = {**facts, "files": files}  # what decides whether and how a run goes on
    body = json.dumps(facts, sort_keys=True)  # the same facts give the same text
    paths["manifest.json"] = os.path.join(folder, "manifest.json")  # written last
    with open(paths["manifest.json"], "w", encoding="utf-8") as file:  # sealed itself as well
        json.dump({"sha256": hashlib.sha256(body.encode()).hexdigest(), **facts}, file, sort_keys=True)  # one line
    os.umask(mask := os.umask(0))  # there is no way to read it without setting it
    for path in paths.values():  # safetensors makes its files readable by their owner only
        os.chmod(path, 0o666 & ~mask)  # what any other program would have given them
        flush(path)  # 0.2 s for 500 MB
    flush(folder)  # only now may it be renamed


def flush(path):  # a rename may reach the disk before the data does: after a power cut it would name an empty file
    """Wait until a file, or the list of a directory's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)  # a directory can be opened so, too
    os.fsync(handle)  # the system writes it now, not in half a minute
    os.close(handle)  # or there would be too many open ones some day


def read_manifest(folder):  # before a checkpoint is trusted
    """Check all files of a checkpoint against its manifest. Returns: (manifest, None) or (None, what is wrong)."""
    try:  # absent in checkpoints that another program made
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:  # written last
            manifest = json.load(file)  # facts, files, and the checksum of them all
        body = json.dumps({key: manifest[key] for key in manifest if key != "sha256"}, sort_keys=True)  # as in seal
        if hashlib.sha256(body.encode()).hexdigest() != manifest["sha256"]:  # a flipped bit in the manifest itself
            return None, "its manifest.json was changed"  # so nothing in it can be trusted
        for name, (size, digest) in manifest["files"].items():  # every file that was there
            path = os.path.join(folder, name)  # none may be missing
            if os.path.getsize(path) != size or sha256(path) != digest:  # cut short, or a bit flipped
                return None, f"{name} is damaged"  # which one
    except (OSError, ValueError, KeyError) as error:  # missing, unreadable, not JSON
        return None, f"{' '.join(str(error).split())}"  # e.g. No such file or directory: …
    return manifest, None  # whole, to the last bit


def find_checkpoint(output_dir, chosen):  # the same command again goes on
    """Find the checkpoint to go on from: the chosen one, else the newest whole one. For rank 0 to call.

    Damaged ones, and those of other programs, are renamed to incomplete-checkpoint-N with a warning, never deleted.
    Returns: (path, manifest), or (None, {}) for a fresh start. Raises: SystemExit(2) when the chosen one is not whole.
    """
    from transformers.trainer_utils import get_last_checkpoint  # the highest N of checkpoint-N

    while path := chosen or get_last_checkpoint(output_dir):  # None in a fresh directory
        manifest, fault = read_manifest(path)  # reads all of it: 2 seconds
        if not fault:  # the usual case
            return path, manifest  # the newest one that is whole
        if chosen:  # the user's choice is not replaced by another
            advice = "leave the flag out to take the newest one"  # that is whole
            fail(f"--resume_from_checkpoint {path} cannot be used: {fault}; {advice}")  # and nothing was changed
        aside = os.path.join(output_dir, f"incomplete-{os.path.basename(path)}")  # no longer seen as a checkpoint
        while os.path.exists(aside):  # set aside more than once
            aside += "-again"  # nothing is ever written over
        os.rename(path, aside)  # and the next newest one is tried
        say(f"warning  {path} is not whole ({fault}); set aside as {aside}")  # for you to look at
    return None, {}  # the first start


def same_run(args, checkpoint, manifest, now):  # on every rank
    """Compare the settings that a manifest holds with those of now, a dict with some or all of them.

    Returns: (checkpoint, manifest) as given, or (None, {}) when --overwrite_output_dir had another run moved aside.
    Raises: SystemExit(2) after one sentence that names each difference with both values.
    """
    from accelerate import PartialState  # ranks and barriers

    saved = manifest.get("settings", now)  # no manifest: nothing to compare with
    pairs = {name: (saved.get(name), value) for name, value in now.items()}  # then and now
    other = [f"{name} was {old!r}, is {new!r}" for name, (old, new) in pairs.items() if old != new]  # for the sentence
    if not other:  # the usual case
        return checkpoint, manifest  # the same run
    if not args.overwrite_output_dir:  # going on would give neither the one run nor the other
        fail(f"{checkpoint} belongs to a run with other settings: {'; '.join(other)}. "  # one clause for each
             "Give the old ones to go on; for a new run give another --output_dir (the finished model may be its "  # a
             "--model_name_or_path), or --overwrite_output_dir to move the old run aside")  # three ways on
    if PartialState().is_main_process:  # one of them
        count = 1 + len(glob.glob(os.path.join(glob.escape(args.output_dir), "previous-*")))  # the next free number
        aside = os.path.join(args.output_dir, f"previous-{count}")  # a directory for everything of the old run
        old = [name for name in os.listdir(args.output_dir) if not name.startswith(("previous-", ".lock"))]  # stays
        os.makedirs(aside)  # only now: it would be in the list
        for name in old:  # checkpoints, curves, results, model
            os.rename(os.path.join(args.output_dir, name), os.path.join(aside, name))  # nothing is copied or deleted
        say(f"The old run was moved to {aside}.")  # where its checkpoints can still be gone on from
    PartialState().wait_for_everyone()  # nobody writes before
    return None, {}  # a fresh start


def find_run(args, settings):  # what is in output_dir already?
    """Look for a finished model, else for a checkpoint, on rank 0, and tell all ranks.

    Returns: (path, manifest, finished): the checkpoint to go on from or None, or output_dir itself when it is finished.
    """
    from accelerate import PartialState  # which rank this is
    from accelerate.utils import broadcast_object_list  # rank 0 chooses: two choices would train two different runs

    found = [None, {}]  # what the other ranks are about to receive
    if PartialState().is_main_process:  # reads every byte, so once is enough
        for name in os.listdir(args.output_dir):  # half-made, or to be deleted anyway
            if name.startswith((".staging", ".trash-")):  # of a save or a rotation that was killed
                shutil.rmtree(os.path.join(args.output_dir, name), ignore_errors=True)  # gives its space back
        manifest, _ = read_manifest(args.output_dir)  # written last: where it fits the files, the run has finished
        found = [args.output_dir, manifest]  # nothing is left to train, unless …
        if not manifest or args.resume_from_checkpoint:  # … the model is not whole, or the user wants to go back
            found = list(find_checkpoint(args.output_dir, args.resume_from_checkpoint))  # the newest that is whole
    path, manifest = same_run(args, *broadcast_object_list(found), settings)  # the same on all ranks
    return path, manifest, path == args.output_dir  # a path: there is something to go on from


def rotate(output_dir, limit, best):  # after the new one is safe
    """Delete all but the newest `limit` checkpoints and the best one (a path or None), each whole or not at all."""
    numbers = [int(name[11:]) for name in os.listdir(output_dir) if re.fullmatch(r"checkpoint-\d+", name)]  # all whole
    for number_ in sorted(numbers)[:-limit]:  # by number: the times of files change when a directory is copied
        name = f"checkpoint-{number_}"  # an old one
        if not best or os.path.basename(best) != name:  # what --load_best_model_at_end will load
            trash = os.path.join(output_dir, f".trash-{name}")  # invisible from now on, also half deleted
            os.rename(os.path.join(output_dir, name), trash)  # in one instant
            shutil.rmtree(trash, ignore_errors=True)  # 3.2 GB


# ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Of all matrix work 63 % is the projection of 640 numbers a token onto the 262,144 words of the vocabulary, and its
# result, the logits, would be the largest thing in memory: 1.07 GB for each 2,048 tokens in 16 bits, and again twice as
# much in the float32 of the softmax. So the loss goes through the tokens in chunks and never keeps the logits of one.


def token_losses(hidden, weight, labels, cap, with_gradients):  # a plain function: no graph is recorded in here
    """Return −log p(label) of every token, and the gradients of their sum with respect to hidden and weight.

    The gradients are made right beside the loss, while a chunk's logits are still there: they need not be computed a
    second time in the backward pass. Liger's fused linear cross-entropy (arXiv:2410.10989) does likewise, but makes
    chunks of V/H = 410 parts of the tokens: slivers, for a vocabulary this large and a hidden size this small.
    Args: hidden (N, H), any float dtype; weight (V, H); labels (N,), int64, -100 is left out: its loss is 0. cap
        (float or None): logits become cap × tanh(logits / cap). with_gradients (bool): else both gradients are None.
    Returns: losses (N,), float32; (N, H) as hidden, or None; (V, H) as weight, or None. The sums are made in float32.
    """
    import torch  # matrix products
    from torch.nn.functional import linear, log_softmax, softmax  # fused kernels: float32 inside, whatever the dtype

    kind = hidden.device.type  # cuda or cpu
    mixed = torch.is_autocast_enabled(kind)  # --bf16, --fp16
    dtype = torch.get_autocast_dtype(kind) if mixed else hidden.dtype  # of the products with the vocabulary
    # GradScaler has not scaled these gradients yet, and unscaled they can be too small for float16: float32 instead.
    precise = torch.float32 if dtype == torch.float16 else dtype  # of the products that make gradients
    each = dtype.itemsize + 4 + precise.itemsize  # bytes a logit: as computed, its log p in float32, its gradient
    rows = max(1, int(LOSS_MEMORY.get(kind, LOSS_MEMORY["cpu"]) / (each * len(weight))))  # tokens in a chunk
    with torch.no_grad(), torch.autocast(kind, enabled=False):  # every dtype is chosen here
        learnt = labels != -100  # (N,): which tokens count
        targets = labels.clamp(min=0)[:, None]  # (N, 1): -100 is no index
        losses = torch.empty(len(labels), dtype=torch.float32, device=labels.device)  # (N,)
        to_hidden = torch.empty_like(hidden) if with_gradients else None  # (N, H)
        to_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if with_gradients else None  # (V, H)
        head = weight.to(dtype)  # (V, H): once for all chunks
        back = weight.to(precise) if precise != dtype else head  # (V, H): the same, but for fp16
        for first in range(0, len(labels), rows):  # as many tokens at a time as the memory allows
            chunk = slice(first, first + rows)  # the last one may be shorter
            logits = linear(hidden[chunk].to(dtype), head)  # (rows, V): the large one
            if cap:  # Gemma 2 has 30, Gemma 3 none
                logits.div_(cap).tanh_().mul_(cap)  # in place
            known = log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[chunk])  # (rows, 1): log p(label)
            losses[chunk] = -known[:, 0] * learnt[chunk]  # 0 for -100
            if with_gradients:  # d loss / d logit is p − 1 for the label and p for all other words
                slope = softmax(logits, -1).to(precise)  # (rows, V): p
                slope.scatter_(-1, targets[chunk], known.expm1().to(precise))  # p − 1, exact also where p is nearly 1
                if cap:  # the chain rule through the tanh
                    slope.mul_(1 - (logits / cap).square())  # its derivative is 1 − tanh²
                inputs = hidden[chunk].to(precise) * learnt[chunk, None]  # (rows, H): 0 for -100
                for part, words in zip(to_weight.split(32768), slope.split(32768, dim=1), strict=True):  # an eighth
                    part += words.T @ inputs  # summed over the chunks in float32; no (V, H) product beside it
                to_hidden[chunk] = (slope @ back) * learnt[chunk, None]  # (rows, H)
    return losses, to_hidden, None if to_weight is None else to_weight.to(weight.dtype)  # no logits survive


def use_chunked_loss(model):  # instead of the model's own, which holds all logits
    """Make model(input_ids, labels=…) return a dict with `loss` and `token_losses`, computed in chunks of tokens.

    `loss` is a scalar: the sum ÷ num_items_in_batch, or the mean, over labels other than -100 (0 if there are none);
    `token_losses` (batch, length - 1), float32, is without gradient. Without labels the model returns logits as ever.
    A model whose loss is more than its head and a softcap keeps its own: eight tokens through both show which is which.
    Returns: bool, whether the chunked loss is in use.
    """
    import torch  # automatic differentiation

    class ChunkedLoss(torch.autograd.Function):  # gradients of our own instead of a recorded graph
        """(hidden, weight, labels, cap, with_gradients) → (sum of losses, losses); see token_losses for the shapes."""

        @staticmethod  # as PyTorch wants it
        def forward(ctx, hidden, weight, labels, cap, with_gradients):  # ctx carries things to the backward pass
            """Compute losses and gradients at once."""
            losses, *gradients = token_losses(hidden, weight, labels, cap, with_gradients)  # chunk by chunk
            ctx.gradients = gradients  # of the sum
            ctx.mark_non_differentiable(losses)  # for evaluations only
            return losses.sum(), losses  # float32

        @staticmethod  # likewise
        def backward(ctx, upstream, _):  # upstream: d (final loss) / d (sum), a scalar on the device
            """Scale what the forward pass has made."""
            gradients, ctx.gradients = ctx.gradients, None  # 0.67 GB that nothing shall hold longer than it must
            to_hidden, to_weight = (gradient.mul_(upstream.to(gradient.dtype)) for gradient in gradients)  # × it
            return to_hidden, to_weight, None, None, None  # none for labels, cap and with_gradients

    own, head = model.forward, model.get_output_embeddings()  # the model's forward pass; its (V, H) matrix
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2 and 3n

    @torch.compiler.disable  # --torch_compile is for the layers: a loop of large products gains nothing from it
    def chunked(hidden, labels, items):  # (batch, length, H), (batch, length), a number or None
        """Return what the new forward pass returns."""
        labels = labels[:, 1:].to(hidden.device)  # token t is predicted …
        before = hidden[:, :-1].flatten(0, 1)  # … from all before it
        training = torch.is_grad_enabled()  # not in evaluations
        total, losses = ChunkedLoss.apply(before, head.weight, labels.flatten(), cap, training)  # a scalar; (N,)
        items = (labels != -100).sum().clamp(min=1) if items is None else items  # the Trainer counts those of a step
        return {"loss": total / items, "token_losses": losses.view(labels.shape)}  # no logits

    @functools.wraps(own)  # the Trainer reads the names of its arguments
    def forward(*inputs, labels=None, num_items_in_batch=None, **named):  # in place of the model's
        """Call the layers and the loss, or, without labels, the model as it was."""
        if labels is None:  # generation
            return own(*inputs, **named)  # logits
        hidden = model.base_model(*inputs, **named).last_hidden_state  # (batch, length, H)
        return chunked(hidden, labels, num_items_in_batch)  # gradients go to the head and to all layers

    if not isinstance(head, torch.nn.Linear) or head.bias is not None:  # None, or of another kind
        return False  # something else than a matrix product
    ids = torch.arange(8, device=head.weight.device)[None]  # any tokens
    with torch.no_grad():  # two forward passes on 8 tokens: a fraction of a second
        theirs, ours = own(input_ids=ids, labels=ids).loss, forward(input_ids=ids, labels=ids)["loss"]  # scalars
    if not torch.isclose(theirs.float(), ours, rtol=1e-3):  # scaled logits, a further loss of the experts, …
        return False  # one that we do not know
    model.forward = forward  # from now on
    return True  # never holds more than a chunk of logits


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def flops_per_token(config, parameters, length):  # for MFU, the share of the device's peak that is used
    """Return the floating-point operations to train on one token: 6 a matrix weight, and causal attention beside them.

    Args: config: of the model. parameters (int): all weights; a tied head counts once, as it multiplies once. length
        (int): tokens per chunk. Source: appendix B of the PaLM paper, with the sliding window's shorter rows.
    """
    config, attention = config.get_text_config(), 0  # of all layers
    tied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # an untied table only looks up
    heads = config.num_attention_heads  # 4
    width = heads * getattr(config, "head_dim", config.hidden_size // heads)  # 4 × 256: all heads' queries side by side
    for kind in getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers:  # 15 and 3
        seen = min(length, config.sliding_window or length) if kind == "sliding_attention" else length  # keys
        attention += 12 * width * (seen - seen * (seen - 1) / 2 / length)  # causal: the mean of min(position, seen)
    return 6 * (parameters - tied) + attention  # 1.73e9 for Gemma 3 270M at 2,048


def peak_flops(training_args):  # what the processes could do at best
    """Return the dense 16-bit FLOP/s of all devices together, or None: unknown device, CPU, or float32."""
    import torch  # the device's name

    if training_args.device.type != "cuda" or not (training_args.bf16 or training_args.fp16):  # float32
        return None  # has another peak: no share of a number that does not apply
    name = torch.cuda.get_device_name(training_args.device)  # "NVIDIA A40"
    peak = next((PEAKS[part] for part in PEAKS if part in name), None)  # TFLOP/s of one
    return peak and peak * 1e12 * training_args.world_size  # of all


def make_trainer(model, tokenizer, training_args, train, validation, stop, facts):  # the loop, made unkillable
    """Put the parts together.

    Args: stop (Stop): knows of signals. facts (dict): for the manifest of each checkpoint: `settings`, `versions`, and
        `progress` of the checkpoint that the run goes on from.
    Returns: transformers.Trainer, whose evaluations report perplexity and whose checkpoints are complete or absent.
        It overrides three methods that are not public: requirements.txt holds transformers to the tested version.
    """
    from resource import RUSAGE_SELF, getrusage  # this process's memory

    import torch  # numbers on the device
    import torch.distributed as dist  # other processes
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback  # batches; the loop; its events

    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # mlm=False: predict the next token
    length = len(train[0]["input_ids"]) if train is not None else 0  # tokens per chunk
    flops = flops_per_token(model.config, sum(weight.numel() for weight in model.parameters()), length or 1)  # 1.7e9
    peak = peak_flops(training_args)  # None on a CPU
    output_dir, past = training_args.output_dir, facts["progress"]  # past: what earlier calls of this run did
    staging = os.path.join(output_dir, ".staging")  # where checkpoints are made: on the same file system

    def collate(chunks):  # on the CPU, while the GPU works on the last batch
        """Make a batch of chunks: input_ids and labels of shape (batch, max_seq_length), int64."""
        batch = collator(chunks)  # its labels are the inputs, less those that equal the pad token …
        batch["labels"] = batch["input_ids"].clone()  # … but nothing here is padded, and pad may be EOS: learn them all
        del batch["attention_mask"]  # all ones; without it nothing waits for the GPU to look for a zero
        return batch  # the loss shifts the labels by one itself

    class ReliableTrainer(Trainer):  # a subclass: no callback may change an evaluation or a save
        """The Trainer with an honest log line, a guard against NaN, and checkpoints that are complete or absent."""

        started = time.time()  # less the time that earlier calls took, once training begins
        began = (0.0, 0)  # time and tokens when this call began to train, and …
        lately = (0.0, 0)  # … at the last log line
        bad_step = torch.tensor(0, device=training_args.device)  # the first with a NaN; there, so that nobody waits

        def log(self, logs, *rest):  # every number passes here once
            """Add eval_perplexity to the metrics of an evaluation on their way to console, TensorBoard and JSON."""
            if "eval_loss" in logs:  # the mean over all tokens of the validation data
                loss = min(logs["eval_loss"], 700)  # exp(710) is more than a float can hold
                logs["eval_perplexity"] = math.exp(loss)  # tokens it hesitates between; evaluate() returns it, too
            if "learning_rate" in logs:  # a line of training; .item() has just waited for the device anyway
                now, tokens = time.time(), self.tokens_seen()  # of this moment
                speed = (tokens - self.lately[1]) / max(now - self.lately[0], 1e-9)  # since the last line
                steps = self.state.global_step - past.get("step", 0)  # of this call
                pace = (now - self.began[0]) / steps  # seconds a step, evaluations and saves included
                minutes = (self.state.max_steps - self.state.global_step) * pace / 60  # to the last step
                memory = getrusage(RUSAGE_SELF).ru_maxrss * 1024  # bytes of this process, at its highest
                if torch.cuda.is_available():  # then the GPU's is the one that matters
                    memory = torch.cuda.max_memory_allocated()  # of this process's GPU
                logs |= {"tokens_per_second": round(speed), "tokens_seen": tokens,  # on console and progress bar, …
                         "peak_memory_gb": round(memory / 1e9, 2), "minutes_left": round(minutes, 1)}  # … TensorBoard
                if peak:  # a known GPU
                    logs["mfu"] = round(speed * flops / peak, 3)  # of what banner() names
                self.lately = now, tokens  # the next line begins here
            super().log(logs, *rest)  # to everybody who wants to know

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # in evaluations
            """Return (None, losses, losses), float32 of shape (batch,): one of each chunk, so that each counts once.

            The Trainer's own mean over a batch counts those chunks twice that fill up the last batch of many processes.
            """
            chunks = self._prepare_inputs(inputs)["input_ids"]  # (batch, max_seq_length), on the device
            with torch.no_grad(), self.compute_loss_context_manager():  # autocast
                result = model(input_ids=chunks, labels=chunks)  # the labels are the inputs
                if "token_losses" in result:  # (batch, max_seq_length - 1)
                    losses = result["token_losses"].mean(1)  # one of each chunk
                else:  # a model's own loss, the mean of a batch: one chunk at a time
                    each = [model(input_ids=ids[None], labels=ids[None]).loss.float() for ids in chunks]  # scalars
                    losses = torch.stack(each)  # (batch,)
            return None, losses, losses  # predictions and labels: gathered over the ranks, the repeated ones dropped

        def tokens_seen(self):  # since the first step of the run
            """Return the tokens trained on so far by all processes, those of earlier calls included."""
            epochs, part = divmod(self.state.epoch or 0, 1)  # whole passes, and how far this one is
            batch = self.args.train_batch_size * self.args.world_size  # chunks in one forward pass of all processes
            rounding = math.floor if self.args.dataloader_drop_last else math.ceil  # is a short last batch trained on?
            batches = rounding(len(train) / batch)  # forward passes in an epoch
            an_epoch, now = min(batches * batch, len(train)), min(round(part * batches) * batch, len(train))  # chunks
            return int(epochs * an_epoch + now) * length  # every chunk is full

        def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *rest, **named):  # after every step
            """Stop at a loss or gradient that is no number, before a log line hides it or a checkpoint keeps it."""
            noted = 0 if grad_norm is None or self.args.fp16 else grad_norm  # fp16's loss scaling skips infinite ones
            bad = ~torch.isfinite(tr_loss + noted) & (self.bad_step == 0)  # on the device, not waited for
            self.bad_step = torch.where(bad, self.state.global_step, self.bad_step)  # the first; as a sum it stays NaN
            control = self.control  # what is due after this step
            if control.should_log or control.should_save or control.should_training_stop:  # moments that wait anyway
                first = int(self.accelerator.gather(self.bad_step).max())  # the same on all ranks: all stop together
                if first:  # the weights are spoilt from this step on
                    causes = "a --learning_rate too high, --fp16, a broken model"  # the likeliest first
                    fail(f"the loss or gradient of step {first} is not a finite number: training stops, and "  # which
                         f"nothing was saved after it. Usual causes: {causes}. Change that, and start with "  # why
                         "another --output_dir", status=1)  # going on from the last checkpoint would end the same way
            start = time.time()  # evaluations and saves shall not count as slow training
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **named)  # as the Trainer does
            spent = time.time() - max(start, self.lately[0])  # the log line, if any, came before them
            self.lately = self.lately[0] + spent, self.lately[1]  # as if they had taken no time

        def _get_output_dir(self, trial):  # the Trainer asks where to put checkpoint-N, and which are old
            """Return .staging: what has its place in output_dir is out of the Trainer's reach, also for deletion."""
            return staging  # absent except while saving

        def _save_checkpoint(self, model, trial):  # called on all ranks at the same step
            """Save under .staging, seal with a manifest, then rename: in an instant the whole checkpoint is there."""
            name = f"checkpoint-{self.state.global_step}"  # what get_last_checkpoint() looks for
            draft, final = os.path.join(staging, name), os.path.join(output_dir, name)  # before and after the rename
            if os.path.isdir(final):  # saved already, at the end of this step or before a stop
                return  # the same state: a whole checkpoint is never touched again
            loss = self.accelerator.gather(self._tr_loss).mean().item()  # of the steps since the last log line
            progress = {"step": self.state.global_step, "max_steps": self.state.max_steps,  # finished when equal
                        "seconds": time.time() - self.started, "logged": self._globalstep_last_logged,  # the last line
                        "loss": loss, "losses": self._total_loss_scalar}  # since that line; the sum of all before it
            try:  # the disk may be full, or gone
                super()._save_checkpoint(model, trial)  # each rank writes its random state, rank 0 all else
                self.accelerator.wait_for_everyone()  # nobody is still writing
                if self.args.should_save:  # rank 0
                    if self.state.best_model_checkpoint:  # recorded as a path in .staging
                        best = os.path.basename(self.state.best_model_checkpoint)  # checkpoint-M
                        self.state.best_model_checkpoint = os.path.join(output_dir, best)  # where it is going to be
                        self.state.save_to_json(os.path.join(draft, "trainer_state.json"))  # put right
                    seal(draft, {**facts, "progress": progress})  # checksums, and on the disk
                    os.rename(draft, final)  # from this instant on it is the newest checkpoint
                    flush(output_dir)  # the rename as well
                    rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)  # the oldest
                self.accelerator.wait_for_everyone()  # the others see it, too
            except Exception as error:  # torch and safetensors report a full disk with kinds of their own
                needed = 12 * sum(weight.numel() for weight in self.model.parameters())  # float32 weights, Adam's two
                free = shutil.disk_usage(output_dir).free if os.path.isdir(output_dir) else 0  # bytes
                disk = isinstance(error, OSError) or "strerror" in str(error)  # torch.save's word for the reason
                if not disk and free > needed:  # something else
                    raise  # not ours to explain
                words = " ".join(str(error).split())  # No space left on device, …
                size = f"it needs {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB are free"  # gigabytes
                fail(f"{name} could not be saved in {output_dir} ({words}): {size}. Earlier checkpoints are "  # … and …
                     "whole: make space, then the same command goes on", status=1)  # … nothing else is lost
            finally:  # saved or not
                if self.args.should_save:  # the others leave it alone
                    shutil.rmtree(staging, ignore_errors=True)  # empty after a rename; gives its space back otherwise

    class Keeper(TrainerCallback):  # what happens between steps
        """Takes up where the last call stopped, and stops all ranks at the same step when any of them got a signal."""

        signal = 0  # agreed by all ranks

        def on_train_begin(self, args, state, control, **_):  # everything is loaded, nothing has been trained
            """Restore what the Trainer starts anew with every call, so that the logs cover the whole run."""
            stop.training = True  # from now on a signal waits for a checkpoint
            state.compute_steps(args, state.max_steps)  # a changed --logging_steps or --save_steps takes effect
            trainer.started = time.time() - past.get("seconds", 0)  # train_runtime is that of all calls together
            trainer._tr_loss += past.get("loss", 0)  # of steps that no log line has counted yet
            trainer._total_loss_scalar, trainer._initial_global_step = past.get("losses", 0.0), 0  # for train_loss
            trainer._globalstep_last_logged = past.get("logged", 0)  # the next line's mean begins there
            trainer.began = trainer.lately = time.time(), trainer.tokens_seen()  # for speed and time left
            best = os.path.join(output_dir, f"checkpoint-{state.best_global_step}")  # the run may have been moved
            state.best_model_checkpoint = best if os.path.isdir(best) else None  # to load it at the end

        def on_step_end(self, args, state, control, **_):  # all ranks have made the same step
            """Agree on whether to stop, and order the checkpoint."""
            self.signal = stop.signal  # of this process
            if args.world_size > 1:  # signals reach processes at different moments
                any_signal = torch.tensor(stop.signal)  # on the CPU, so that no GPU is waited for
                dist.all_reduce(any_signal, dist.ReduceOp.MAX, group=group)  # a few bytes
                self.signal = any_signal.item()  # the same on all ranks
            if self.signal and state.epoch % 1:  # at the end of an epoch its evaluation comes first
                control.should_save = control.should_training_stop = True  # read right after this

        def on_epoch_end(self, args, state, control, **_):  # the last step of an epoch
            """Order the checkpoint where on_step_end left it to us."""
            if self.signal:  # the evaluation of the epoch comes before the save
                control.should_save = control.should_training_stop = True  # read right after this

        def on_save(self, args, state, control, **_):  # the checkpoint is there
            """Leave when a signal ordered it."""
            if self.signal and control.should_training_stop:  # not after a save that was due anyway
                saved = os.path.join(output_dir, f"checkpoint-{state.global_step}")  # where it is
                where = f"at step {state.global_step:,} of {state.max_steps:,}"  # how far it came
                stop.leave(self.signal, f" {where}; saved {saved}")  # exits

        def on_train_end(self, args, state, control, **_):  # the last checkpoint is there
            """From here on a signal ends the run at once: the same command does the rest."""
            stop.training = False  # no step will come that would see it
            if stop.signal:  # it came after the last step
                stop.leave(stop.signal, " after the last step")  # only the final model is missing

    group = dist.new_group(backend="gloo") if training_args.world_size > 1 else None  # for the agreement, beside NCCL
    trainer = ReliableTrainer(  # it also sets the seed and makes optimizer and schedule
        model=model,  # moved to the device here
        args=training_args,  # everything from the command line
        train_dataset=train,  # chunks, shuffled anew every epoch
        eval_dataset=validation,  # in order
        data_collator=collate,  # chunks → batches
        processing_class=tokenizer,  # saved beside every checkpoint and the final model
        callbacks=[Keeper()],  # after the Trainer's own
        compute_metrics=lambda seen: {"loss": seen.predictions.mean()},  # all chunks have as many tokens: a plain mean
    )
    with trainer.compute_loss_context_manager():  # autocast, which Flash Attention needs
        if not use_chunked_loss(model):  # on the device by now
            say("note     this model has no plain head: its own loss is used, which holds all logits in memory")  # slow
    if "tensorboard" in training_args.report_to and training_args.process_index == 0:  # the others write nothing
        from torch.utils.tensorboard import SummaryWriter  # event files
        from transformers.integrations import TensorBoardCallback  # the Trainer has added one without purge_step

        runs = os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(output_dir, "runs")  # one folder, one curve
        trainer.remove_callback(TensorBoardCallback)  # instead of it:
        first = None if train is None else past.get("step", -1) + 1  # the first step to come; --do_eval makes none
        if not past or past["step"] < past["max_steps"]:  # there are steps to make
            writer = SummaryWriter(runs, purge_step=first)  # hides what an earlier call wrote from there on
            board = TensorBoardCallback(writer)  # flushes after every line, closes after the last step
            board._SummaryWriter = None  # or the final evaluation, a result, would open another folder and curve
            trainer.add_callback(board)  # beside the console
    return trainer  # ready to train or to evaluate


def banner(args, training_args, model, train, validation):  # read it before a night of training
    """Say in six lines what is about to happen."""
    world = training_args.world_size  # processes on all machines
    dtype = "bf16 autocast" if training_args.bf16 else "fp16 autocast" if training_args.fp16 else "float32"  # products
    parameters = sum(weight.numel() for weight in model.parameters())  # the tied head is counted once
    device, attention = training_args.device.type, model.config._attn_implementation  # cuda or cpu; sdpa or flash
    peak = peak_flops(training_args)  # of all processes
    assumed = f"; MFU against {peak / 1e12:,.0f} TFLOP/s" if peak else ""  # said once, here
    splits = {"train": train, "validation": validation}  # either may be None
    data = [f"{name} {len(chunks):,} chunks = {len(chunks) * args.max_seq_length:,} tokens"  # after limits
            for name, chunks in splits.items() if chunks is not None]  # one for each that there is
    say(  # the first half: what trains where on what
        f"model    {args.model_name_or_path}, {parameters:,} parameters in float32, {attention} attention",  # what
        f"device   {device}, {world} process{'es' if world > 1 else ''}, {dtype}{assumed}",  # where
        f"data     {', '.join(data)}",  # on which text
    )
    if train is not None:  # --do_eval has no plan of steps
        batch = training_args.per_device_train_batch_size * world  # chunks in one forward pass of all processes
        total = batch * training_args.gradient_accumulation_steps  # chunks in one optimizer step
        steps, epoch = count_steps(len(train), batch, training_args)  # of the optimizer: in all, and in an epoch
        warmup = training_args.get_warmup_steps(steps)  # a fraction below 1 is one of all steps
        say(  # the second half: the plan
            f"batch    {training_args.per_device_train_batch_size} per device × "  # the effective batch
            f"{training_args.gradient_accumulation_steps} accumulation × {world} = {total:,} chunks = "  # sequences
            f"{total * args.max_seq_length:,} tokens a step",  # what a learning rate refers to
            f"steps    {steps:,} ({steps / epoch:.3g} epochs), "  # of the optimizer
            f"learning rate {training_args.learning_rate:g}, warm-up {warmup:,} steps",  # how long
        )
        for note in odd_plans(args, len(train), batch, total, steps, warmup, validation):  # none for most runs
            say(f"note     {note}")  # before the night, not after it
        each = 12 * parameters  # bytes of a checkpoint: float32 weights and Adam's two moments
        there = len(glob.glob(os.path.join(glob.escape(args.output_dir), "checkpoint-*")))  # of an earlier call
        free, needed = shutil.disk_usage(args.output_dir).free, (args.save_total_limit + 1 - there) * each  # bytes
        if free < needed:  # one more than the limit, because the oldest goes only when the newest is safe
            say(f"warning  {needed / 1e9:.2g} GB will be needed for checkpoints in {args.output_dir}, where "  # figures
                f"{free / 1e9:.2g} GB are free: make space or lower --save_total_limit")  # two remedies
    say(f"output   {args.output_dir} (tensorboard --logdir {os.path.join(args.output_dir, 'runs')})")  # where to look


def odd_plans(args, chunks, batch, total, steps, warmup, validation):  # allowed, but seldom meant
    """Yield a sentence for each oddity of the plan.

    Args: chunks (int): in the training data. batch, total (int): chunks in a forward pass of all processes, and in an
        optimizer step. steps, warmup (int): of the optimizer.
    """
    if warmup >= steps:  # the default of 500 is made for long runs
        yield (f"the run is shorter than its warm-up: it reaches only {steps / warmup:.0%} of the learning rate; "  # …
               f"lower --warmup_steps, to {max(1, steps // 10)} for example")  # a tenth is usual
    if chunks < total:  # a handful of texts and the default accumulation
        fewer = max(1, chunks // batch)  # what the data fills
        yield (f"all {chunks:,} chunks make less than one step of {total:,}: lower "  # more steps learn more
               f"--gradient_accumulation_steps to {fewer} for a full one")  # or less than that
    elif chunks % total:  # nearly always; worth knowing when epochs are short
        yield f"the last step of each epoch has {chunks % total:,} of {total:,} chunks"  # its mean is over fewer
    if batch > args.per_device_train_batch_size and chunks % batch:  # all processes must make the same forward passes
        yield f"{batch - chunks % batch:,} chunks are trained on twice an epoch, to give every process as many"  # few
    if validation is None and "eval_steps" in args.given:  # a flag that has no effect
        yield "--eval_steps has no effect without validation data: give --validation_file"  # or leave it out
    if not 1e-6 <= args.learning_rate <= 1e-3:  # full fine-tuning of a model this small
        yield f"--learning_rate {args.learning_rate:g} is unusual: this model takes about 1e-5 to 1e-4"  # 2e-5


def count_steps(chunks, batch, training_args):  # known before the Trainer starts
    """Return the optimizer steps (of the run, of an epoch), by the arithmetic of Trainer.set_initial_training_values.

    Args: chunks (int): in the training data. batch (int): chunks in one forward pass of all processes.
    """
    rounding = math.floor if training_args.dataloader_drop_last else math.ceil  # the last batch may be short
    batches = rounding(chunks / batch)  # forward passes in an epoch
    epoch = max(1, math.ceil(batches / training_args.gradient_accumulation_steps))  # the last step may be short, too
    planned = math.ceil(training_args.num_train_epochs * epoch)  # half an epoch is possible
    return training_args.max_steps if training_args.max_steps > 0 else planned, epoch  # --max_steps overrides epochs


def evaluate_and_save(trainer, known=None):  # --do_eval, and the end of every training with validation data
    """Save loss and perplexity on the validation data to eval_results.json and all_results.json.

    Args: known (dict or None): metrics of this very model, from training's last step; None evaluates it now.
    """
    metrics = known or trainer.evaluate()  # the mean loss over all chunks of all processes
    metrics["perplexity"] = metrics.pop("eval_perplexity")  # the name under which transformers' scripts save it
    save_metrics(trainer, "eval", metrics)  # eval_results.json, and joined to train's in all_results.json


def save_metrics(trainer, split, metrics):  # of "train" or "eval"
    """Print metrics as a table, write them to {split}_results.json, and join them to those in all_results.json."""
    trainer.log_metrics(split, metrics)  # on the console
    try:  # reads what all_results.json holds already
        trainer.save_metrics(split, metrics)  # rank 0
    except ValueError:  # a kill has cut it short
        os.remove(os.path.join(trainer.args.output_dir, "all_results.json"))  # made from what is saved now
        trainer.save_metrics(split, metrics)  # once more


def train_and_save(trainer, checkpoint, facts):  # the night
    """Train, save model and tokenizer to output_dir, evaluate, and save the metrics beside them.

    Args: checkpoint (str or None): where to go on from; when it is the last one of the run, only the rest is done.
        facts (dict): for the manifest, which is written last: the sign of a finished run.
    """
    past, metrics = facts["progress"], {}  # of earlier calls of this run
    if past and past["step"] >= past["max_steps"]:  # killed after the last checkpoint: its weights are loaded already
        loss = (past["losses"] + past["loss"]) / past["step"]  # the mean over all steps
        metrics = {"train_runtime": past["seconds"], "train_loss": loss}  # as the Trainer would have reported
    else:  # there are steps to make
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics  # hours
        share, metrics["train_runtime"] = metrics["train_runtime"], time.time() - trainer.started  # this call; all
        for name in ("train_samples_per_second", "train_steps_per_second"):  # all steps ÷ the time of this call …
            metrics[name] *= share / metrics["train_runtime"]  # … put right: ÷ the time of all calls

    output_dir = trainer.args.output_dir  # from_pretrained(output_dir) will work
    staging = os.path.join(output_dir, ".staging")  # a kill in here leaves no half model: the same command goes on
    trainer.model.config.use_cache = True  # generation with the saved model wants its cache back
    trainer.save_model(staging)  # model.safetensors, config.json, tokenizer; all ranks call it, rank 0 writes
    if trainer.args.should_save:  # rank 0
        seal(staging, {**facts, "progress": {"step": trainer.state.global_step or past["step"]}})  # with checksums
        for name in sorted(os.listdir(staging), key=lambda name: name.endswith(".safetensors")):  # the weights last
            if name != "manifest.json":  # waits for the metrics
                os.replace(os.path.join(staging, name), os.path.join(output_dir, name))  # whole or absent
    if trainer.eval_dataset is not None:  # held-out text says whether it learnt or memorized
        rows = [row for row in trainer.state.log_history if "eval_loss" in row][-1:]  # the last one in training
        best = trainer.args.load_best_model_at_end  # then the model is no longer that of the last step
        same = rows and rows[0]["step"] == trainer.state.global_step and not best  # nothing new to measure
        evaluate_and_save(trainer, {**rows[0]} if same else None)  # loss and perplexity
    save_metrics(trainer, "train", metrics)  # train_results.json and all_results.json
    if trainer.args.should_save:  # rank 0
        os.replace(os.path.join(staging, "manifest.json"), os.path.join(output_dir, "manifest.json"))  # finished
        shutil.rmtree(staging, ignore_errors=True)  # empty
        flush(output_dir)  # on the disk


def main(argv=None):  # the table of contents
    """Run the steps in their order; each is a function above. argv (list[str] or None): as for parse_args."""
    stop = Stop()  # from here on a signal ends the run with a sentence
    args = parse_args(argv)  # a wrong call ends here, at once
    training_args = make_training_arguments(args)  # from here on torch, the device and the other processes are known
    import torch  # imported by the line above already
    import transformers  # likewise
    from safetensors import SafetensorError  # its word for a disk that is full

    transformers.set_seed(args.seed)  # new embedding rows, if any, are the same in every run
    facts = {"settings": run_settings(args, training_args)}  # for the manifests of this run
    facts["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__,  # they may round …
                         "device": training_args.device.type}  # … differently: going on is allowed, with a warning
    checkpoint, manifest, finished = None, {}, False  # a fresh start …
    if not args.evaluate_only:  # … unless an earlier call was stopped
        lock = claim(args.output_dir) if training_args.process_index == 0 else None  # noqa: F841  kept until the end
        checkpoint, manifest, finished = find_run(args, facts["settings"])  # what an earlier call left
    if finished:  # the final model is there, and whole
        say(f"This run finished at step {manifest['progress']['step']:,}: nothing is left to train.",  # exit status 0
            f"Its model is in {args.output_dir}; to train it further, start a new run from it with "  # its rate …
            f"--model_name_or_path {args.output_dir} and another --output_dir.")  # … has fallen to zero
        return  # in a few seconds

    tokenizer = load_tokenizer(args.model_name_or_path, args.max_seq_length)  # the hub's first answer
    if RANKS.local:  # one process a machine prepares …
        RANKS.wait()  # … the others read its cache
    train, validation = load_and_prepare_dataset(args, tokenizer, args.overwrite_cache and not RANKS.local)  # chunks
    if not RANKS.local:  # it is done
        RANKS.wait()  # lets the others go on, when it is so on all machines
    if validation is None:  # nothing to evaluate on
        if training_args.load_best_model_at_end:  # asked for by a Trainer flag
            fail("--load_best_model_at_end needs validation data: give --validation_file")  # best by what?
        training_args.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO  # --eval_steps has no meaning then

    model = load_model(args.model_name_or_path, tokenizer, args.use_flash_attention)  # float32, still on the CPU
    if not args.evaluate_only:  # is the checkpoint's run really this one?
        facts["settings"] |= digests(model, train)  # the same files, to the last token and weight
        RANKS.compare("data", facts["settings"])  # each machine may have copies of its own
        checkpoint, manifest = same_run(args, checkpoint, manifest, facts["settings"])  # or a sentence
    past = facts["progress"] = manifest.get("progress", {})  # what earlier calls did: the step, the losses, the time
    if past and past["step"] >= past["max_steps"]:  # only the final save is missing
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:  # which one was the best?
            best = json.load(file)["best_global_step"] if training_args.load_best_model_at_end else None  # M, or None
        folder = os.path.join(os.path.dirname(checkpoint), f"checkpoint-{best or past['step']}")  # the one to publish
        model = load_model(folder, tokenizer, args.use_flash_attention)  # trained: nothing is left for the Trainer
    RANKS.wait()  # one machine may still be downloading: from here on --ddp_timeout is the limit
    try:  # parts that are asked for by a flag and not there
        trainer = make_trainer(model, tokenizer, training_args, train, validation, stop, facts)  # on the device
    except Exception as error:  # --report_to mlflow without mlflow, --push_to_hub without a network, …
        words = " ".join(str(error).split())  # its own words, on one line
        fail(f"the Trainer cannot be set up ({type(error).__name__}): {words}")  # a flag asks for what is not there
    banner(args, training_args, model, train, validation)  # the plan, before the first step
    if checkpoint:  # the same command again
        say(f"Going on from {checkpoint}, step {past['step']:,} of {past['max_steps']:,}.")  # how far it had come
        if manifest["versions"] != facts["versions"]:  # not refused: a run may move to another machine
            say(f"warning  the weights may differ in their last bits: the run began with {manifest['versions']}, "  # …
                f"and goes on with {facts['versions']}")  # torch, transformers or the device
    try:  # a full GPU shows at the first step, or at the first evaluation
        if args.evaluate_only:  # --do_eval
            evaluate_and_save(trainer)  # loss and perplexity
        else:  # the usual case
            train_and_save(trainer, checkpoint, facts)  # the finished model in output_dir
    except (ImportError, ValueError) as error:  # --use_liger_kernel without its package, --adam_beta1 2, …
        fail(f"a flag of the Trainer cannot be used: {' '.join(str(error).split())}")  # its own words, on one line
    except (OSError, SafetensorError) as error:  # at the final save; a checkpoint's has a sentence of its own
        fail(f"{args.output_dir} cannot be written ({error}): mend that, then the same command goes on", 1)  # full disk
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        full = "out of memory" in str(error) or "can't allocate memory" in str(error)  # CUDA's words; the CPU's
        if not full and not isinstance(error, MemoryError):  # Python's own and numpy's
            raise  # not ours to explain
        fail(f"out of memory on {training_args.device}: {REMEDIES}", status=1)  # the data is right, the call too
    results = os.path.join(args.output_dir, "all_results.json")  # loss, perplexity, speed
    say(f"Done: the metrics are in {results}" if args.evaluate_only else  # what now
        f"Done: the model is in {args.output_dir}, its metrics in {results}.")  # load it with from_pretrained


if __name__ == "__main__":  # imported by tests, which call the functions above
    RANKS.run(main)  # python main.py, accelerate launch main.py
