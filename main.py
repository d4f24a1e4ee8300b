"""Fine-tune Google's Gemma 3 270M on your own text.

    python main.py --train_file data/train.jsonl --validation_file data/val.jsonl --bf16

The file is laid out by subject; main() at the end is its table of contents, and calls in this order:

    argv ─ Stop, parse_args ─▶ args                                      (from here on signals end the run in order)
    args ─ make_training_arguments ─▶ training_args                      (several processes meet: Ranks)
    output_dir ─ find_checkpoint, same_run ─▶ where to go on from
    args ─ load_tokenizer, load_and_prepare_dataset ─▶ train and validation chunks  (read → tokenize → group_texts)
    args ─ load_model ─▶ float32 weights, sdpa or flash attention
    all of it ─ make_trainer, train_and_save ─▶ checkpoints, TensorBoard ─▶ finished model in output_dir

Only the standard library is imported up here: --help and a misspelt flag answer at once, because torch, transformers
and datasets (six seconds together) are imported by the functions that need them, after the command line was read.
"""

import argparse  # the command line
import atexit  # what has to be closed before Python ends
import contextlib  # to go on after an error that does not matter
import csv  # rows of .csv files, with the line number of a bad one
import ctypes  # two calls that Python has no name for: prctl and malloc_trim
import difflib  # "did you mean": the real name nearest to a misspelt one
import errno  # which kind of OSError: locked, disk full, over quota
import fcntl  # a lock on output_dir
import functools  # a function in the place of another
import glob  # "data/*.jsonl" given in quotes
import gzip  # .gz files are read as they are
import hashlib  # checksums of checkpoints
import importlib.util  # is a package installed? answered without importing it
import itertools  # numbers without end
import json  # .json and .jsonl files
import math  # perplexity = exp(loss)
import multiprocessing  # the helpers of this process
import os  # paths, environment
import platform  # Python's version
import re  # checkpoint-N, names of flags
import shutil  # removes directories, measures disks
import signal  # SIGTERM and Ctrl-C
import socket  # this machine's name
import sys  # exit status, standard error
import threading  # beside the training: signs of life, and the end of other processes
import time  # how long a run took, over all its calls
from datetime import timedelta  # the type of torch's timeouts
from importlib.metadata import version  # of a package, without importing it

MODEL_ALIASES = {"google/gemma-270m": "google/gemma-3-270m"}  # the short name people type → the published id
WIKITEXT = "Salesforce/wikitext"  # the one hub data set for which a configuration is chosen here
DATASET_ALIASES = {"wikitext": WIKITEXT}  # as it was called when names had no owner
WIKITEXT_CONFIG = "wikitext-2-raw-v1"  # 2 million words, untouched text: minutes on a GPU
FORMATS = (".json", ".jsonl", ".csv", ".txt")  # local files; each also with .gz behind it
REMEDIES = (  # out of memory: the README's four remedies, the cheapest first
    "(1) add --bf16; (2) halve --per_device_train_batch_size (4, 2, 1) and double "  # fewer activations at a time …
    "--gradient_accumulation_steps: the same training; "  # … and the same effective batch
    "(3) add --gradient_checkpointing: about 20 % slower; "  # keeps one activation per layer
    "(4) shorten --max_seq_length (2048, 1024, 512)"  # the one remedy that changes what is learnt
)


def say(*lines):  # progress and results, on standard output
    """Print lines once, however many processes train: only rank 0 speaks."""
    if os.environ.get("RANK", "0") == "0":  # set by accelerate launch and torchrun; absent for one process
        print(*lines, sep="\n", flush=True)  # flushed, so that a log file shows it before the run ends


def fail(message, status=2):  # every error that the user can mend ends the run here
    """End the run with one sentence and no traceback. Args: status (int): 2 for a wrong call or wrong data, else 1."""
    start = "\n" if "datasets" in sys.modules else ""  # a progress bar may stand on the last line
    print(f"{start}main.py: error: {message}", file=sys.stderr, flush=True)  # every rank: it may not be 0 that fails
    end = SystemExit(status)  # no Exception, so no library on the way wraps it
    end.sentence = message  # for the other processes, if any
    raise end  # caught by nobody but Ranks


def nearest(name, names):  # the help that a misspelt name gets
    """Return a hint such as " (did you mean 'text'?)" for the closest of names, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1)  # similarity of at least 0.6, else nothing
    return f" (did you mean {close[0]!r}?)" if close else ""  # stands right behind the wrong name in a sentence


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def number(kind, low, above=False):  # the type of a flag: a wrong value is found before anything heavy is loaded
    """Return a function for argparse that reads a finite int or float (the kind), at least low, or above low."""

    def read(text):  # argparse passes the word behind the flag, and reports what it raises
        try:  # "abc", or "1e-3" for an int
            value = kind(text)  # what the flag will hold
        except ValueError:  # not a number of this kind
            wanted = "a whole number" if kind is int else "a number"  # the user's words, not Python's
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None  # argparse adds the flag's name
        if not low <= value < math.inf or (above and value == low):  # also finds nan, which fails every comparison
            bound = f"{'above' if above else 'at least'} {low}"  # what the flag may be
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")  # argparse puts the flag's name before it
        return value  # what args holds under the flag's name

    return read  # the type= of a flag


def trainer_flags():  # as the Trainer's documentation lists them
    """Return the names of all fields of transformers.TrainingArguments, read from its source in a few milliseconds."""
    package = importlib.util.find_spec("transformers")  # finds the package, imports nothing
    if package is None:  # a fresh machine before the set-up
        fail("transformers is not installed: pip install -r requirements.txt", status=1)  # names the one command
    path = os.path.join(os.path.dirname(package.origin), "training_args.py")  # where the class is written down
    with open(path, encoding="utf-8") as source:  # 3,000 lines, of which nothing runs
        return re.findall(r"^    (\w+): .*= field\(", source.read(), re.MULTILINE)  # "    max_steps: int = field("


def parse_args(argv=None):  # all that the user decides
    """Read argv (list[str], or None for the process's own arguments) and check whatever can be checked without torch.

    Returns: argparse.Namespace with our flags and `trainer_argv`, the flags left for transformers.TrainingArguments.
    Raises: SystemExit(2) after one sentence when a flag, a value or a path is wrong.
    """
    parser = argparse.ArgumentParser(  # ours first: the flags of this script with its defaults
        usage="python main.py (--dataset_name NAME | --train_file FILE ...) [flags]",  # instead of twenty lines of it
        description="Fine-tune Google's Gemma 3 270M on text.",  # the next line of --help
        epilog="Every other flag of transformers.TrainingArguments works too, "  # the last lines of --help
        "for example --max_steps, --lr_scheduler_type cosine, --dataloader_num_workers.",  # some 90 of them
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,  # every flag's help ends with its default
        allow_abbrev=False,  # a shortened flag is a misspelt flag: it must not pick another one silently
    )
    parser.error = lambda message: fail(f"{message}; see python main.py --help")  # one sentence, without the usage
    switch = {"action": "store_true"}  # off unless given
    count, positive = number(int, 1), number(float, 0, above=True)  # sizes; rates, and steps (below 1: of the run)
    path = {"type": os.path.expanduser}  # "~/data" also where the shell does not expand it, as in --output_dir=~/data

    add = parser.add_argument_group("model").add_argument  # which weights, which attention
    add("--model_name_or_path", **path, default="google/gemma-270m", help="hub name or directory")  # an alias, above
    add("--use_flash_attention", **switch, help="version 2; needs a GPU and flash-attn; sets --bf16")  # else sdpa

    add = parser.add_argument_group("data").add_argument  # either files or a data set, never both
    add("--dataset_name", **path, help="hub name, or a local data set directory")  # its train and validation splits
    add("--dataset_config_name", help="configuration of the hub data set")  # many hold several, such as languages
    add("--train_file", **path, nargs="+", help=".json .jsonl .csv .txt, also .gz; several, or a glob")  # your text
    add("--validation_file", **path, nargs="+", help="the same, for evaluation")  # held out: never trained on
    add("--text_column", default="text", help="the column that holds the text")  # of .json, .csv and data sets
    add("--max_seq_length", type=number(int, 2), default=2048, help="tokens per chunk")  # the context that is learnt
    add("--no_truncation", **switch, help="keep texts longer than a chunk whole")  # for books; the default cuts them
    add("--add_eos", **switch, help="end each text with the end-of-sequence token")  # so that the model learns to stop
    add("--max_train_samples", type=count, help="train on the first N chunks only")  # for a quick try
    add("--max_eval_samples", type=count, help="evaluate on the first N chunks only")  # for quick evaluations
    add("--preprocessing_num_workers", type=count, help="processes that tokenize")  # unset: one, on all cores
    add("--cache_dir", **path, help="where prepared data is kept for the next run")  # unset: the cache of datasets
    add("--overwrite_cache", **switch, help="prepare the data anew")  # changed files and flags do that by themselves

    add = parser.add_argument_group("training").add_argument  # the schedule and the optimizer
    add("--num_train_epochs", type=positive, default=3, help="passes over the data")  # each in a new order
    add("--per_device_train_batch_size", type=count, default=4, help="chunks per device at a time")  # fills the GPU
    add("--per_device_eval_batch_size", type=count, default=4, help="the same, in evaluation")  # changes no result
    add("--gradient_accumulation_steps", type=count, default=8, help="batches per optimizer step")  # costs no memory
    add("--learning_rate", type=positive, default=2e-5, help="the peak, after the warm-up")  # then falls to zero
    add("--weight_decay", type=number(float, 0), default=0.01, help="of AdamW")  # not on norms and biases
    add("--warmup_steps", type=number(float, 0), default=500, help="steps up to the peak; below 1 a fraction")  # of all

    add = parser.add_argument_group("memory").add_argument  # what to reach for when a GPU is full
    add("--bf16", **switch, help="bfloat16 autocast over float32 weights")  # the right choice on an A40 or H100
    add("--fp16", **switch, help="float16 autocast, for GPUs before Ampere")  # with loss scaling
    add("--gradient_checkpointing", **switch, help="recompute activations: 20 %% slower")  # keeps one per layer

    add = parser.add_argument_group("logging and checkpoints").add_argument  # what is written, and when
    add("--output_dir", **path, default="./outputs", help="checkpoints, logs and the finished model")  # one run each
    add("--logging_steps", type=positive, default=10, help="steps between log lines")  # loss, rate, gradient norm
    add("--save_steps", type=positive, default=500, help="steps between checkpoints")  # each 3.2 GB on the disk
    add("--eval_steps", type=positive, default=500, help="steps between evaluations")  # only with validation data
    add("--overwrite_output_dir", **switch, help="move another run's files aside")  # into previous-1, never deleted
    add("--save_total_limit", type=count, default=3, help="newest checkpoints that are kept")  # older ones are deleted
    add("--report_to", nargs="+", default=["tensorboard"], help="tensorboard, wandb or none")  # where curves go
    add("--resume_from_checkpoint", **path, help="go on from this one, not the newest")  # a path in output_dir

    add = parser.add_argument_group("misc").add_argument  # several processes, repeatability, what to do
    add("--ddp_timeout", type=count, default=600, help="seconds a process waits for the others")  # for a lost one
    add("--seed", type=number(int, 0), default=42, help="of the order of chunks and of new weights")  # and dropout
    add("--do_train", **switch, help="train; on unless --do_eval is given alone")  # accepted as other scripts do
    add("--do_eval", **switch, help="given alone: only evaluate the model on the validation data")  # before and after

    argv = sys.argv[1:] if argv is None else argv  # the tests pass their own
    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in argv]  # a-b → a_b
    args, left = parser.parse_known_args(argv)  # left: flags of the Trainer, their values, and whatever is misspelt
    known = [f"--{name}" for name in [*vars(args), *trainer_flags()]]  # every field of args is the name of a flag
    args.given = [text.partition("=")[0] for text in argv if text.startswith("--")]  # "--max_steps=10" → "--max_steps"
    for flag in args.given:  # the Trainer also has a --no_NAME for each switch that is on by default
        if flag not in known and flag.replace("--no_", "--") not in known:  # a slip of a letter, or a shortened flag
            fail(f"unknown flag {flag}{nearest(flag, known)}; see python main.py --help")  # before anything is imported
    args.trainer_argv = left  # HfArgumentParser checks the values, and finds stray words, once it is imported
    check_args(args)  # paths and combinations: everything that can be found wrong without torch
    return args  # from here on the call is known to be sensible


def check_args(args):  # what argparse cannot say
    """Check combinations and paths, expand globs and aliases in place. Raises: SystemExit(2) after one sentence."""
    args.evaluate_only = args.do_eval and not args.do_train  # as in transformers' own scripts
    if args.bf16 and args.fp16:  # two autocast types at once
        fail("--bf16 and --fp16 exclude each other: keep --bf16 (A40 and newer GPUs), or --fp16")  # T4, V100: fp16
    if args.seed >= 2**32:  # numpy takes 32 bits
        fail(f"--seed {args.seed} is too large: choose one below {2**32:,}")  # numpy would raise after the imports
    if args.use_flash_attention and importlib.util.find_spec("flash_attn") is None:  # the optional package
        fail("--use_flash_attention needs a package: pip install flash-attn --no-build-isolation")  # built from source
    if "wandb" in args.report_to and importlib.util.find_spec("wandb") is None:  # the other optional package
        fail("--report_to wandb needs a package: pip install wandb")  # else found after the data is prepared

    if args.dataset_name and (args.train_file or args.validation_file):  # which of the two was meant?
        fail("data given twice: use either --dataset_name or --train_file/--validation_file")  # never a silent choice
    if not args.evaluate_only and not (args.dataset_name or args.train_file):  # nothing to train on
        fail(f"no training data: give --dataset_name NAME or --train_file FILE ({' '.join(FORMATS)})")  # or the hub's
    if args.evaluate_only and not (args.dataset_name or args.validation_file):  # nothing to evaluate on
        fail("--do_eval needs validation data: give --dataset_name NAME or --validation_file FILE")  # held-out text
    if args.evaluate_only and args.resume_from_checkpoint:  # a checkpoint is a model, too, and that is what is wanted
        fail("--resume_from_checkpoint is for training; with --do_eval alone give "  # a checkpoint is a model, too
             f"--model_name_or_path {args.resume_from_checkpoint}")  # one flag for models of any origin
    trained = [name for pattern in ("manifest.json", "checkpoint-[0-9]*")  # what a training run leaves
               for name in glob.glob(pattern, root_dir=args.output_dir)]  # [] where there is no directory yet
    if args.evaluate_only and trained:  # the evaluation's all_results.json would replace that run's
        fail(f"--output_dir {args.output_dir} holds a training run: choose another for --do_eval")  # keeps its numbers
    args.train_file = find_files("--train_file", args.train_file)  # a list of existing, readable files
    args.validation_file = find_files("--validation_file", args.validation_file)  # an empty one where none was given

    if args.model_name_or_path in MODEL_ALIASES:  # the short name is not a repository on the hub
        published = MODEL_ALIASES[args.model_name_or_path]  # google/gemma-3-270m
        say(f"{args.model_name_or_path} is published as {published}: using that.")  # what is loaded has to be known
        args.model_name_or_path = published  # also what the banner and the errors will name
    model, data = args.model_name_or_path, args.dataset_name or ""  # each a directory or a name on the hub
    for flag, name in (("--model_name_or_path", model), ("--dataset_name", data)):  # the hub is tried for half a minute
        local = name.startswith((".", os.sep)) or name.count("/") > 1 or os.path.isfile(name)  # no name on the hub
        if local and not os.path.isdir(name):  # nothing there, or a file
            fail(f"{flag} {name}: no such directory; give one, or a hub name (text goes to --train_file)")  # a slip?
    if os.path.isdir(model):  # look at once whether it can be a model
        if not os.path.isfile(os.path.join(model, "config.json")):  # what kind of model is it?
            fail(f"--model_name_or_path {model}: the directory has no config.json; name a saved model")  # a wrong path
        both = ("*.safetensors", "pytorch_model*.bin")  # what weights are called now, and were called once
        if not any(glob.glob(pattern, root_dir=model) for pattern in both):  # neither: a copy that was cut short
            fail(f"--model_name_or_path {model}: the directory has no weights (model.safetensors)")  # save it anew

    last = args.resume_from_checkpoint  # a path; unset means the newest one in output_dir
    last = args.resume_from_checkpoint = last and os.path.realpath(last)  # so it is known again, however it is written
    if last and not os.path.isfile(os.path.join(last, "optimizer.pt")):  # without which the Trainer cannot go on
        fail(f"--resume_from_checkpoint {last}: not a checkpoint, it has no optimizer.pt")  # a model alone?
    over = os.path.realpath(args.output_dir) == os.path.realpath(model)  # the finished model would replace its base
    if over and not args.evaluate_only:  # which writes no model
        fail(f"--output_dir {args.output_dir} is the model to start from: choose another directory")  # keeps the base
    places = {"--output_dir": args.output_dir, "--cache_dir": args.cache_dir or args.output_dir}  # it may be unset
    for flag, folder in places.items():  # a bad one is found now, not at the first checkpoint hours later
        try:  # to have it, and to be let in
            os.makedirs(folder, exist_ok=True)  # raises for a file in the way, and where we may not write
            fault = "" if os.access(folder, os.W_OK | os.X_OK) else "no permission"  # it may be somebody else's
        except OSError as error:  # FileExistsError, NotADirectoryError, PermissionError, read-only file system, …
            fault = error.strerror  # in the system's words
        if fault:  # else the first checkpoint would fail
            fail(f"{flag} {folder}: no files can be written there ({fault}); choose another directory")  # a way on


def find_files(flag, patterns):  # --train_file and --validation_file
    """Expand globs and check each file. Returns: list[str] of absolute paths. Raises: SystemExit(2)."""
    files = []  # in the order given: it is the order of training text before shuffling
    for pattern in patterns or []:  # the shell has expanded unquoted globs already
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))  # a stable order
        if not found:  # neither a file nor a glob that matches one
            near = glob.glob(os.path.join(glob.escape(os.path.dirname(pattern)), "*"))  # what lies beside it
            fail(f"{flag} {pattern}: no such file{nearest(pattern, near)}")  # often a slip of a letter
        for path in found:  # each must be a file of a known kind with something in it
            if os.path.isdir(path):  # a data set directory goes to the other flag
                fail(f"{flag} {path} is a directory: name files in it, or use --dataset_name")  # a data set on disk
            if os.path.splitext(path.removesuffix(".gz"))[1].lower() not in FORMATS:  # others through --dataset_name
                fail(f"{flag} {path}: unknown extension; known are {' '.join(FORMATS)}, each also with .gz")  # no guess
            if not os.access(path, os.R_OK):  # somebody else's file
                fail(f"{flag} {path} cannot be read: no permission (try chmod +r)")  # before six seconds of imports
            if os.path.getsize(path) == 0:  # a failed export
                fail(f"{flag} {path} is empty")  # rather than "too little text" later
            files.append(os.path.abspath(path))  # absolute: part of the key of the cache
    return files  # empty when the flag was not given


# ── Signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stop:  # SIGTERM comes from batch systems, SIGINT from Ctrl-C; kill -9 cannot be caught, and need not be
    """Ends the run with a sentence when a signal comes; in training at the end of the step, after a checkpoint."""

    def __init__(self):  # called before the heavy imports: a signal may come at any time
        """Take over both signals, and see to it that the death of a launcher arrives as one of them."""
        self.signal, self.since, self.training = 0, 0.0, False  # 0: no signal has come so far
        for number_ in (signal.SIGTERM, signal.SIGINT):  # each with the same answer
            signal.signal(number_, self.receive)  # Python calls it between two of its own instructions
        os.register_at_fork(after_in_child=self.release)  # helpers have answers of their own
        self.launcher = 0  # the process id of accelerate or torchrun, if one of them has started us
        if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # variables that they set
            self.launcher = os.getppid()  # accelerate's for one process dies of SIGTERM without passing it on
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # so Linux sends us one at its death (PR_SET_PDEATHSIG)

    def release(self):  # runs in every process that Python forks
        """Let signals end a tokenizer's process at once, but no data loader's, which is needed to make the step."""
        if self.training:  # terminals and batch systems may signal all processes at once
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))  # torch sets handlers of its own
        for number_ in (signal.SIGTERM, signal.SIGINT):  # else the pool of tokenizers sends one, and waits
            signal.signal(number_, signal.SIG_DFL)  # no Python in it, which would wait for locks

    def end_helpers(self):  # when nothing is read any more
        """Kill the data loaders that are left. They do not listen to signals, and Python would wait for their end."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of it
        for helper in multiprocessing.active_children():  # --dataloader_persistent_workers, or a run that was stopped
            helper.kill()  # they have nothing to lose

    def receive(self, number_, frame):  # the signature that Python wants
        """Note the signal, or end at once when there is nothing to save, or when it comes again after 3 seconds."""
        if self.launcher:  # the system signals already at the end of the thread that has started us
            time.sleep(0.1)  # a launcher that is being killed is gone by then
        if self.launcher not in (0, os.getppid()):  # the launcher has died, and we were given to another parent
            number_ = signal.SIGKILL  # a failure that nobody has asked for: all ranks shall know
        if self.training and (not self.signal or time.time() - self.since < 3):  # launchers send a second one at once
            if not self.signal:  # a second one within three seconds changes nothing
                os.write(2, b"\nStopping: a checkpoint is saved at the end of this step ...\n")  # print is unsafe here
            self.signal, self.since = number_, self.since or time.time()  # the end of the step will see it
        else:  # before or after training, or impatience
            self.signal = number_  # kept, as Python ignores an exit inside a destructor: then the first step sees it
            self.leave(number_, "")  # what was saved before is whole

    def leave(self, number_, saved):  # every signal ends here, sooner or later
        """Exit with 128 + the signal's number, as a shell reports it. saved (str): what the sentence says of it."""
        self.training = False  # a further signal ends it at once
        if number_ == signal.SIGKILL:  # not asked for: multinode_train.sh may try again
            fail(f"stopped by the loss of a launcher{saved}; the same command again goes on", 1)  # as any failure
        name = signal.Signals(number_).name  # SIGTERM or SIGINT
        fail(f"stopped by {name}{saved}; the same command again goes on", 128 + number_)  # 143 for SIGTERM, 130 for INT


# ── Several processes ────────────────────────────────────────────────────────────────────────────────────────────────
# A launcher starts one process, called a rank, for each device of each machine. They meet at a store: a small server on
# the main machine, that of rank 0, where each can read what another has set under a name. Before any work all machines
# compare with rank 0 what they are about to do. A rank that fails sets its end in the store; in each other one a thread
# looks for that every second, says why, and ends its process. One that is killed sets nothing: then torch fails in the
# ranks that wait for it, when its connections close, or when nothing has come from it for --ddp_timeout seconds. The
# thread also sets a sign of life: when none comes, as after a cut cable, a second one says so until that time is over.
# Gradients travel over NCCL between GPUs, which ends a process that waits in vain; all else over gloo, which raises.


class Ranks:  # made by accelerate launch or torchrun
    """The processes of this run on all machines. Where there is only one, nothing here does anything."""

    def __init__(self):  # reads what the launcher says
        self.rank = int(os.environ.get("RANK") or 0)  # among all processes, from 0
        self.local = int(os.environ.get("LOCAL_RANK") or 0)  # among those of this machine: 0 speaks for the machine
        self.size = int(os.environ.get("WORLD_SIZE") or 1)  # how many processes there are
        self.machine = self.rank - self.local  # a machine is known by the rank of its first process
        self.name = f"rank {self.rank} on {socket.gethostname()}"  # as sentences for the user name it
        self.store = self.group = self.said = None  # where all meet; what wait() needs; what this rank has failed with
        self.tried, self.limit = False, 30  # has begun to look for the store; seconds in which all hear of a failure
        self.signs = {}  # of life, seen from here: rank → (its name, the last one, when that came)
        self.over = threading.Event()  # set when it has ended well, or is being ended: no news matter any more

    def connect(self, args, plan):  # before any work, and before a device is touched
        """Compare all machines, then make the process group. plan (Namespace): the fields of TrainingArguments."""
        import torch.distributed as dist  # has been imported by the Trainer's arguments
        from accelerate import PartialState  # what the Trainer asks for rank and device

        self.tried = True  # a failure from here on is no reason to look for the others once more
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # what launchers set beside WORLD_SIZE
            if name not in os.environ:  # each process would train on its own, all of them into one output_dir
                fail(f"WORLD_SIZE is {self.size}, but {name} is not set: start several processes with "  # they set it
                     "accelerate launch, or unset WORLD_SIZE for a single one")  # left by a batch system
        own = ("given", "trainer_argv", "cache_dir", "preprocessing_num_workers")  # may differ between machines
        facts = {f"--{name}": value for name, value in (vars(args) | vars(plan)).items() if name not in own}  # flags
        facts |= {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}  # they round …
        facts |= {"main.py": sha256(__file__)[:12], "Python": platform.python_version()}  # … or count differently
        facts["WORLD_SIZE"] = self.size  # differs when one node script has another TOTAL_GPUS
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate gives each machine as many, torchrun need not
            facts["processes a machine (--num_processes)"] = os.environ.get("LOCAL_WORLD_SIZE")  # a slip in one total
        cpu = plan.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # asked for by the launcher
        if os.environ.get("LOCAL_WORLD_SIZE") != str(self.size):  # there are other machines
            self.choose_interface()  # before gloo chooses one itself
        patience = plan.ddp_timeout + (0 if cpu else 120)  # NCCL ends the process without a word: gloo shall be first
        try:  # some rank may never come
            self.meet(plan.ddp_timeout)  # the launchers have met there already
            self.compare("plan", facts)  # before unequal versions have to talk to each other
            state = PartialState(cpu, backend=plan.ddp_backend, timeout=timedelta(seconds=patience))  # makes the group
            state.wait_for_everyone()  # NCCL connects only now, and what is wrong with that is caught below
            self.greet(self.store)  # all have greeted by now: from here on each is known by name
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # a more patient one, for wait()
            self.limit = 6  # from here on all look every second
        except (RuntimeError, ValueError, OSError) as error:  # torch's own errors are RuntimeErrors
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"  # the address that every rank was given
            words = f"within --ddp_timeout {plan.ddp_timeout} ({' '.join(str(error).split())})"  # in torch's own words
            fail(f"{self.size} processes could not connect at {place} {words}", 1)  # a wrong address, a firewall
        atexit.register(dist.destroy_process_group)  # its threads must not see Python shut down
        if not args.evaluate_only:  # there will be checkpoints, and every rank writes a part of each
            self.share(args.output_dir)  # into the same directory

    def choose_interface(self):  # gloo would take that of the host name, which on Debian is a loopback address
        """Let gloo use the network interface that leads to MASTER_ADDR, unless GLOO_SOCKET_IFNAME is set already."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:  # as meet() fails
            query.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing: it only looks up the way there
            own = query.getsockname()[0]  # this machine's address on that way
            for _, name in socket.if_nameindex():  # lo, eth0, …
                with contextlib.suppress(OSError):  # an interface without an address
                    found = fcntl.ioctl(query, 0x8915, name.encode().ljust(40, b"\0"))[20:24]  # SIOCGIFADDR: 4 bytes
                    if socket.inet_ntoa(found) == own:  # the one that others reach
                        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # gloo reads it when a group is made

    def meet(self, seconds):  # the store is at MASTER_ADDR and MASTER_PORT
        """Find the store within some seconds, and begin to watch it. Raises: ValueError, RuntimeError."""
        import torch.distributed as dist  # takes two seconds if a rank fails so early

        self.store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))  # the launcher's, or ours
        missed = range(1, self.size) if self.rank == 0 else [0]  # rank 0 misses all others, and they miss rank 0
        self.signs = {rank: (f"rank {rank}", "", time.monotonic()) for rank in missed}  # silent from now on
        self.greet(self.store)  # before anybody waits for this rank, so that all know its name
        second = self.store.clone()  # another connection to it, as the first one may be busy waiting
        threading.Thread(target=self.watch, args=(second, time.time() + 2 * seconds)).start()  # now others can end us
        if self.local == 0:  # speaks for the machine
            threading.Thread(target=self.listen, args=(seconds,)).start()  # and now others are missed

    def compare(self, what, facts):  # the plan, the data
        """End the run unless the first rank of this machine has the same facts (a dict) as rank 0."""
        self.wait()  # rank 0 may still be downloading its model, and the store waits for --ddp_timeout only
        if self.size == 1 or self.local:  # the others of a machine have the same launcher and files
            return  # and need not look
        facts = json.loads(json.dumps(facts, default=str))  # as they will arrive elsewhere
        if self.rank == 0:  # sets the example
            self.store.set(what, json.dumps([self.name, facts]))  # under a name that the others know
        name, theirs = json.loads(self.store.get(what))  # waits for rank 0
        other = [f"{key} is {facts.get(key)!r} instead of {theirs.get(key)!r}"  # this machine's value, then rank 0's
                 for key in theirs | facts if facts.get(key) != theirs.get(key)]  # None where nothing is known of it
        if other:  # training would hang, or mean nothing
            fail(f"{self.name} differs from {name}: {'; '.join(other)}. All machines need the same")  # command, files

    def share(self, folder):  # each machine may have a directory of that name for itself
        """End the run unless every machine sees a file that rank 0 makes in folder for a moment."""
        path = os.path.join(folder, f".probe-{os.environ['MASTER_PORT']}")  # a name that no other run uses
        if self.rank == 0:  # it writes most of a checkpoint
            open(path, "w").close()  # empty: fits on a full disk, too
        self.wait()  # the file is there before anybody looks
        until = time.time() + 10  # network storage may take seconds to show it
        while not (seen := os.path.exists(path)) and time.time() < until:  # usually at once
            time.sleep(0.5)  # network storage is asked again
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
        try:  # whatever ends this rank has to be told to the others, which would wait for it
            main()  # the whole run, of which an error comes out here
            self.wait()  # for what rank 0 saves last
            self.over.set()  # ends both threads, for which Python would wait
        except BaseException as error:  # also SystemExit, which fail() raises
            status = (error.code or 0) if isinstance(error, SystemExit) else 1  # what fail() was given
            if self.size == 1 or not status:  # one process, or --help
                raise  # as Python does it
            for number_ in (signal.SIGTERM, signal.SIGINT):  # the launcher ends the others of this machine
                signal.signal(number_, lambda *_: os._exit(status))  # nothing is left to do here
            self.said = getattr(error, "sentence", f"{type(error).__name__}: {error}")  # for the other machines
            if not isinstance(error, SystemExit) and not self.over.is_set():  # nobody has explained it
                if isinstance(error, RuntimeError) and re.search("timed ?out|by peer", self.said, re.I):  # gloo's words
                    lost = self.missing(5) or "another process was lost or does not answer"  # whom, if that is known
                    self.complain(f"{lost}, so the run ends ({self.said})")  # a traceback would only show who waited
                else:  # a fault of this rank
                    sys.excepthook(type(error), error, error.__traceback__)  # as Python would print it
            threading.Timer(self.limit, os._exit, [status]).start()  # at the latest: a cut network may hold this thread
            with contextlib.suppress(Exception):  # nobody can be told
                if not self.tried:  # a wrong flag, or a file that only this machine lacks
                    self.meet(self.limit)  # the others are about to come
                self.store.compare_set("end", "", json.dumps([status, self.machine, self.name, self.said]))  # if first
                time.sleep(60)  # the thread will find it, as on all ranks, and end this process
            os._exit(status)  # at once: Python's own exit might wait for a lost rank

    def watch(self, store, deadline):  # in a thread, as the main one may be waiting in torch
        """End this process when any rank has ended with an error, or the store, or without a group at the deadline."""
        end, patience = [1, None, self.name, "no connection to the other processes"], 30  # if no store, …
        with contextlib.suppress(RuntimeError):  # … of which torch may know more in half a minute
            while not store.check(["end"]) and (self.group or time.time() < deadline):  # nobody has failed so far
                self.greet(store)  # every second
                if self.over.wait(1):  # a second, or until this rank has ended
                    return  # with its work done: there is nobody to end
            end, patience = json.loads(store.compare_set("end", "", json.dumps(end))), 2  # the first one counts
        if self.over.wait(patience):  # this rank may just be ending, too
            return  # the main thread has finished, or gives a reason of its own
        self.over.set()  # the main thread need not speak of lost connections any more
        status, machine, name, sentence = end  # of the rank that was the first
        if machine != self.machine and not self.local and sentence != self.said:  # it was not said on this machine
            self.complain(f"{name}: {sentence.removeprefix(name + ' ')}")  # once a machine
        with contextlib.suppress(RuntimeError):  # a rank is lost, or the store
            store.set(f"{self.rank} knows", "")  # but the store may end with this process, and a launcher ends others
            store.wait([f"{rank} knows" for rank in range(self.size)], timedelta(seconds=self.limit))  # so all wait
        os._exit(status)  # the same on all ranks

    def greet(self, store):  # the store keeps the last sign of each rank
        """Set a sign of life of this rank, and note those of the ranks that this one would miss."""
        store.set(f"{self.rank} lives", json.dumps([self.name, time.time()]))  # another one each time
        for rank, (_, seen, _) in self.signs.items():  # what was read before
            if store.check([f"{rank} lives"]) and (sign := store.get(f"{rank} lives")) != seen:  # it has moved on
                self.signs[rank] = json.loads(sign)[0], sign, time.monotonic()  # by this machine's clock

    def missing(self, seconds):  # the thread above cannot say it: when a cable is cut it waits for the store's answer
        """Return a sentence on the ranks of which nothing was heard for so many seconds, or ""."""
        now = time.monotonic()  # seconds, by a clock that is never put right
        gone = {name: now - last for name, _, last in self.signs.values() if now - last > seconds}  # how long each
        if not gone:  # nearly always
            return ""  # all is well
        more = f" and {len(gone) - 2} more" if len(gone) > 2 else ""  # a machine has up to eight
        return f"nothing was heard of {', '.join([*gone][:2])}{more} for {max(gone.values()):.0f} seconds"  # until now

    def listen(self, timeout):  # in a second thread
        """Say it when another machine is silent, and again and again; end this process a minute after the timeout."""
        while not self.over.wait(15) and not self.said:  # seconds; until this rank ends, well or not
            if quiet := self.missing(20):  # so it is said after half a minute
                quiet += f": is it down, or the network? the run waits for --ddp_timeout {timeout} seconds"  # or less
                print(f"warning  {quiet}", file=sys.stderr, flush=True)  # as long as it lasts
            if quiet := self.missing(timeout + 60):  # torch would have ended a wait for gradients, but not wait()
                self.over.set()  # the other threads need not speak
                self.complain(f"{quiet}, so the run ends")  # status 1: MAX_RETRIES tries again
                threading.Timer(self.limit, os._exit, [1]).start()  # whether or not the store can be told
                with contextlib.suppress(RuntimeError):  # the store may be what is lost
                    self.store.compare_set("end", "", json.dumps([1, self.machine, self.name, quiet]))  # for a third

    def complain(self, sentence):  # as fail() without the exit: for a thread, or a process that is ending anyway
        """Print an error."""
        print(f"\nmain.py: error: {sentence}", file=sys.stderr, flush=True)  # behind a progress bar


RANKS = Ranks()  # before the command line is read: a wrong flag has to reach the other machines, too


# ── Trainer's arguments ──────────────────────────────────────────────────────────────────────────────────────────────

HARMLESS = (  # beginnings of the names of flags that cannot change weights: they may differ when a run goes on
    "output_dir", "logging_", "log_", "save_", "eval_", "do_", "hub_", "push_to_hub", "report_to", "run_name",  # files
    "project", "trackio_", "disable_tqdm", "debug", "include_", "skip_memory_metrics", "batch_eval_metrics",  # reports
    "per_device_eval_batch_size", "prediction_loss_only", "label_names", "length_column_name",  # how it evaluates
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent",  # speed
    "ddp_timeout", "ddp_backend", "ddp_bucket", "local_rank", "use_cpu", "torch_empty", "resume_",  # where it runs
    "validation_file", "max_eval_samples", "preprocessing_", "cache_dir", "overwrite_", "evaluate_only",  # ours
    "given", "trainer_argv",  # the command line as typed: the values of all its flags are compared instead
)


def make_training_arguments(args):  # the first use of torch
    """Turn the command line into transformers.TrainingArguments; of several processes also make a process group.

    Raises: SystemExit(2) after one sentence for a value that the Trainer does not take.
    """
    import torch  # takes two seconds
    from transformers import HfArgumentParser, TrainingArguments  # four more
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # name → where curves can go

    cpu = not torch.cuda.is_available()  # then the same commands run on the CPU, with one notice
    if cpu and (args.fp16 or args.use_flash_attention):  # whose kernels are made for GPUs only
        fail("--fp16 and --use_flash_attention need a GPU; on the CPU use --bf16, or leave them out")  # bf16 is fine
    if cpu:  # slow, but the same training
        say("No GPU found: training on the CPU.")  # else days pass before somebody misses the GPU
    if args.use_flash_attention and not args.fp16:  # its kernels take 16-bit inputs only
        args.bf16 = True  # autocast makes them from the float32 weights

    ours = {name: getattr(args, name) for name in trainer_flags() if hasattr(args, name)}  # the Trainer has them, too
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)  # one flag for each of its 114 fields
    parser.error = fail  # one sentence instead of 600 lines of usage
    parser.set_defaults(  # what a flag of the Trainer may still change
        **ours,  # our values and defaults
        activation_checkpointing=args.gradient_checkpointing,  # the flag's new name in transformers
        use_cpu=cpu,  # also makes several processes talk over gloo instead of NCCL
        logging_nan_inf_filter=False,  # the Trainer's default shows a mean instead of a NaN
        ddp_find_unused_parameters=False,  # every weight is used in every step: no search for others
        eval_strategy="steps",  # main() sets "no" without validation data
    )
    plan, rest = parser.parse_known_args(args.trainer_argv)  # plan: the fields of TrainingArguments
    if rest:  # "--bf16 true", "--max_steps 10 20", or a file name without its flag
        fail(f"{rest[0]!r} belongs to no flag: put --train_file or another before it, or leave it out")  # the first one
    if plan.max_steps < 1 and plan.max_steps != -1:  # -1 is the Trainer's "not given"
        fail(f"--max_steps: {plan.max_steps} must be at least 1, or be left out to train --num_train_epochs")  # 0 too
    partial = "makes checkpoints that no run can go on from"  # without the optimizer, or in a part for each process
    for name, fault in {  # flags of the Trainer that are off by default
        "save_only_model": partial, "enable_jit_checkpoint": partial, "save_on_each_node": partial,  # checkpoints
        "fsdp": partial, "deepspeed": partial,  # for models that one GPU cannot hold; accelerate config has them, too
        "auto_find_batch_size": "changes the effective batch in the middle of a run",  # when the GPU is full
        "batch_eval_metrics": "leaves no loss of each chunk to make the mean of",  # as each has to count once
    }.items():  # what the README promises would not hold any more
        if getattr(plan, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":  # the launcher's word
            fail(f"--{name} {fault}: leave it out")  # this model of 1 GB needs none of them
    if not plan.eval_do_concat_batches:  # a switch that is on by default
        fail("--eval_do_concat_batches False leaves no mean over all chunks: leave it out")  # only a list of batches
    for name in ("load_best_model_at_end", "eval_on_start"):  # both of them evaluate
        if getattr(plan, name) and not (args.validation_file or args.dataset_name):  # a data set may have a split
            fail(f"--{name} needs validation data: give --validation_file")  # before minutes of work
    when = [(plan.save_strategy, plan.save_strategy == "steps" and plan.save_steps),  # of checkpoints …
            (plan.eval_strategy, plan.eval_strategy == "steps" and plan.eval_steps)]  # … and of evaluations
    if plan.load_best_model_at_end and when[0] != when[1]:  # the best one could be in no checkpoint
        fail("--load_best_model_at_end needs a checkpoint of each evaluation: "  # not of some of them
             "make --save_strategy equal to --eval_strategy, "  # steps or epoch, whichever of the two
             "and --save_steps equal to --eval_steps")  # the number only counts with steps
    measure = plan.metric_for_best_model  # None is the Trainer's "loss"
    if measure not in (None, "loss", "eval_loss", "perplexity", "eval_perplexity"):  # all that an evaluation reports
        fail(f"--metric_for_best_model {measure}: choose loss or perplexity")  # else found at the first evaluation
    if measure and "perplexity" in measure and plan.greater_is_better is None:  # the Trainer knows only a loss by name
        plan.greater_is_better = False  # it would load the worst model
    known = ["none", "all", *INTEGRATION_TO_CALLBACK]  # where the Trainer can report to
    for name in args.report_to:  # one after the other
        if name not in known or (name in ("none", "all") and len(args.report_to) > 1):  # misspelt, or contradictory
            fail(f"--report_to {name}{nearest(name, known)}: give none or all alone, or some of "  # before the data
                 f"{', '.join(known[2:])}")  # tensorboard, wandb, mlflow, …

    if RANKS.size > 1:  # TrainingArguments look for a process group, and touch the device
        RANKS.connect(args, plan)  # compares what the machines are about to do
    try:  # TrainingArguments check combinations of their own
        made = TrainingArguments(**vars(plan))  # from here on the device is known
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:  # each raised for some flag
        fail(f"the Trainer does not accept these flags: {' '.join(str(error).split())}")  # its own words, on one line
    if made.world_size != RANKS.size:  # each process would train on its own, all of them into one output_dir
        fail(f"WORLD_SIZE is {RANKS.size}, but the Trainer sees {made.world_size}: use accelerate launch")  # no group
    if made.n_gpu > 1:  # one process, several GPUs: the Trainer would copy the model to all of them at every step
        made._n_gpu = 1  # the first one trains; a process for each GPU is the way to use all
        say(f"note     {torch.cuda.device_count()} GPUs are visible, one is used: CUDA_VISIBLE_DEVICES chooses "  # one
            "it, accelerate launch --num_processes N uses several")  # as the README's section on several GPUs says
    inexact = {"--ignore_data_skip": made.ignore_data_skip,  # starts the epoch again
               "--train_sampling_strategy": made.train_sampling_strategy not in ("random", "sequential"),  # they sort
               "--accelerator_config": not made.accelerator_config.use_seedable_sampler,  # orders by the global state
               "--dataloader_persistent_workers": made.dataloader_persistent_workers}  # which outlive an epoch
    for flag in (flag for flag, given in inexact.items() if given):  # allowed: some data is too large to be skipped
        say(f"note     {flag}: a stopped run may go on with other data than it would have had")  # no equal weights then
    if made.label_smoothing_factor:  # the Trainer makes that loss, from all logits
        say("note     --label_smoothing_factor holds all logits in memory: a smaller batch may be needed")  # 2 GB each
    if made.use_liger_kernel:  # its kernels for the layers are welcome
        ours = {"fused_linear_cross_entropy": False, "cross_entropy": False}  # its loss would take the place of ours
        made.liger_kernel_config = (made.liger_kernel_config or {}) | ours  # what to replace in the model
    return made  # checked, and on several processes connected


def run_settings(args, training_args):  # what has to stay the same when a run goes on
    """Return {name: value}, as JSON values, of everything that decides the weights a run ends with."""
    flags = vars(args) | training_args.to_dict()  # ours and the Trainer's, defaults included
    plateau = training_args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")  # the rate follows evaluations
    decisive = ("validation_file", "max_eval_samples", "eval_", "save_st")  # save_strategy, save_steps
    decisive = decisive if plateau or training_args.load_best_model_at_end else ()  # else looking changes no weight
    settings = {name: value for name, value in flags.items()  # about 70 flags stay
                if not name.startswith(HARMLESS) or name.startswith(decisive)}  # of the run as it is asked for
    settings |= {"processes": training_args.world_size, "autocast": training_args.mixed_precision}  # of the launcher
    for name in {"train_file", "validation_file"} & settings.keys():  # a quick look: digests() compares every token
        settings[name] = [f"{os.path.basename(path)} ({os.path.getsize(path):,} bytes)"  # its folder may change
                          for path in flags[name]]  # in their order, which is that of the chunks
    settings["model_name_or_path"] = os.path.basename(args.model_name_or_path.rstrip(os.sep))  # may have moved, too
    return json.loads(json.dumps(settings, default=str))  # tuples become lists, as they will be in the manifest


def digests(model, train, validation):  # what no flag says
    """Return {"model": …, "train_data": …, "validation_data": …}: SHA-256 of config and weights, and of all tokens."""
    config = model.config.to_dict()  # what the weights do: a softcap, the width of a sliding window, …
    for name in ("transformers_version", "_name_or_path", "use_cache", "dtype"):  # where from and how saved
        config.pop(name, None)  # not what is learnt
    sums = {"model": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())}  # then the weights
    for weight in model.parameters():  # also finds a model directory that was changed in between
        sums["model"].update(weight.detach().numpy().data)  # its bytes; float32, still on the CPU: half a second
    for name, data in (("train_data", train), ("validation_data", validation)):  # each a Dataset of chunks, or None
        sums[name] = hashlib.sha256()  # of nothing, if there is none
        for chunks in data.data.column("input_ids").chunks if data else ():  # Arrow arrays in memory-mapped files
            sums[name].update(chunks.flatten().to_numpy().data)  # all chunks are equally long: the tokens say all
    return {name: digest.hexdigest()[:16] for name, digest in sums.items()}  # enough to see a difference


# ── Data: read → tokenize → group_texts ──────────────────────────────────────────────────────────────────────────────

TOKENIZE_BYTES = 1_000_000  # text per call of the tokenizer: its working memory is about 100 times that


def load_and_prepare_dataset(args, tokenizer, rebuild=False):  # text in, chunks out
    """Read, tokenize and pack the training and validation text; rebuild (bool): without a look into the cache.

    Returns: (train, validation), each a memory-mapped datasets.Dataset whose one column `input_ids` holds lists of
        max_seq_length int32 token ids, or None where there is no data. Raises: SystemExit(2) after one sentence.
    """
    from datasets import Features, Value  # the schema of rows from files

    plan = {"validation": (args.validation_file, args.max_eval_samples)}  # split → paths, at most so many chunks
    if not args.evaluate_only:  # else the training text is not even read: it may be large
        plan = {"train": (args.train_file, args.max_train_samples), **plan}  # first: its errors matter more
    texts = load_named_dataset(args, list(plan)) if args.dataset_name else {}  # split → Dataset of one column
    for split, (files, _) in plan.items():  # both are read before one is tokenized: their faults show early
        if files:  # an empty list without the flag
            kwargs = {"files": tuple(files), "column": args.text_column}  # a tuple: datasets would split a list
            schema = Features({"text": Value("large_string")})  # large: 64-bit offsets, for texts of gigabytes
            texts[split] = cached(f"{split}_rows", read_texts, kwargs, args.cache_dir, rebuild, schema)  # read once

    chunks = {}  # split → Dataset of chunks
    for split, (_, limit) in plan.items():  # limit: None without the flag
        if split in texts:  # validation is optional
            packed = prepare_split(split, texts.pop(split), tokenizer, args, rebuild)  # pop lets go of the raw text
            if limit and limit < len(packed):  # some chunks that were made will not be used
                say(f"{split}: only the first {limit:,} of {len(packed):,} chunks are used "  # and how many are not
                    "(--max_*_samples)")  # on purpose: the user gave the flag
                packed = packed.take(limit)  # a view, no copy
            chunks[split] = packed  # ready for the Trainer
    return chunks.get("train"), chunks.get("validation")  # None for the one that there is no text for


def load_named_dataset(args, wanted):  # for --dataset_name; files go the way of read_texts()
    """Load the splits `wanted` (list of names, the first must be there) from the hub, its cache or a directory.

    Returns: {split: Dataset of the text column only}. Raises: SystemExit(2) after one sentence.
    """
    import datasets  # Arrow files, memory-mapped: data may be larger than memory

    config, column = args.dataset_config_name, args.text_column  # config: None if not given
    name = DATASET_ALIASES.get(args.dataset_name, args.dataset_name)  # the library does not know the old short name
    if name == WIKITEXT and not config:  # the example everybody starts with
        config = WIKITEXT_CONFIG  # the small one, of 2 million words
        say(f"{name}: no --dataset_config_name given, taking {config}.")  # the large one has 50 times as much
    saved = any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))  # by datasets
    if saved and config:  # there is nothing to choose from
        fail(f"--dataset_config_name {config}: {name} is one saved data set; leave the flag out")  # nothing to choose
    try:  # the hub may not know it, may not answer, or may not let us in
        if saved:  # a directory made by save_to_disk
            loaded = datasets.load_from_disk(name)  # a Dataset, or a dictionary of them
        else:  # a hub name, or a directory of files as on the hub
            loaded = datasets.load_dataset(name, config, cache_dir=args.cache_dir)  # downloaded once, then cached
    except Exception as error:  # the libraries raise a dozen kinds for a handful of reasons
        fail(explain_loading_error("--dataset_name", name, "datasets/", error))  # one sentence with what to do

    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}  # a single saved Dataset is training data
    if wanted[0] not in loaded:  # a data set of test questions, say: no other split is taken silently
        fail(f"--dataset_name {name} has no {wanted[0]} split, only {', '.join(loaded)}: "  # those that there are
             "give files instead, with --train_file and --validation_file")  # which name their purpose
    splits = {split: loaded[split] for split in wanted if split in loaded}  # the test split stays untouched
    for split, rows in splits.items():  # the same column is needed in each
        check_column(f"{name}, split {split}", column, rows.column_names)  # the usual first error with others' data
        kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)  # "int64", "List"
        if kind not in ("string", "large_string"):  # numbers, lists, nulls, pictures
            fail(f"{name}, split {split}: column {column!r} holds {kind}, not text; "  # its type on the hub
                 "choose another with --text_column")  # the flag to change
        splits[split] = rows.select_columns([column])  # the others are not read from the disk
    return splits  # nothing has been read into memory so far


def explain_loading_error(flag, name, kind, error):  # hub, cache and broken files
    """Return the sentence that says what to do about error. kind (str): "datasets/", or "" for models."""
    from huggingface_hub import constants  # which hub: HF_ENDPOINT may name another

    kinds, words = [], ""  # the libraries wrap the reason up to four times, and some hide it in the message only
    while error and len(kinds) < 9:  # from the outermost to the first one raised; chains may be circular
        kinds += [base.__name__ for base in type(error).__mro__]  # names: three libraries, and some kinds are private
        words += " ".join(str(error).split()) + " "  # a message may have many lines
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
                "check the network (and HF_HUB_OFFLINE), or give a local directory")  # two ways out, one without a hub
    if "EmptyDatasetError" in kinds:  # a directory without .json, .csv, .txt, .parquet, …
        return f"{flag} {name}: the directory holds no data files"  # perhaps one level up
    if "Config name is missing" in words:  # several: choosing one silently could train on the wrong language
        configs = re.search(r"configs: \[(.*?)\]", words)[1].replace("'", "")  # as its card lists them
        return f"{flag} {name} has several configurations: choose one with --dataset_config_name: {configs}"  # all
    return f"{flag} {name} cannot be loaded; if damaged, download or save it anew: {words[:400].strip()}"  # their words


def cached(name, generator, kwargs, cache_dir, rebuild, features=None):  # for what is read and for what is packed
    """Return a datasets.Dataset of what generator(**kwargs) yields, made once and then memory-mapped from the cache.

    It is made again when one of kwargs["files"] or the generator's code has changed. This is Dataset.from_generator,
    which has no switch to do it again. features: the schema of a row; None takes that of the first rows.
    """
    from datasets.fingerprint import Hasher  # stable over processes and Python's hash seeds
    from datasets.packaged_modules.generator.generator import Generator  # what from_generator is made of

    versions = [(os.path.getsize(path), os.stat(path).st_mtime_ns) for path in kwargs["files"]]  # bytes, nanoseconds
    builder = Generator(  # looks into the cache
        config_id=f"{name}-{Hasher.hash((generator, kwargs, versions))}",  # the directory there; appears when complete
        generator=generator, gen_kwargs=kwargs,  # called if it is not there
        split=name, cache_dir=cache_dir, features=features,  # the progress bar says "Generating … split"
    )
    builder.download_and_prepare(download_mode="force_redownload" if rebuild else None)  # nothing if it is there
    return builder.as_dataset(split=name)  # costs no memory until it is touched


def read_texts(files, column):  # a generator: one row in memory at a time
    """Yield {"text": str or None} for every row of the files, in order. Raises: SystemExit(2), with file and place.

    .txt: a line is a text, its line break kept. .csv: the header names the columns. .json: an array of objects, or an
    object a line, as in .jsonl. A null counts as a blank row later.
    """
    empty = True  # no row in any file so far
    for path in files:  # each on its own: formats may be mixed
        extension = os.path.splitext(path.removesuffix(".gz"))[1].lower()  # ".jsonl"
        if extension == ".txt":  # the one format without columns
            texts = read_lines(path)  # with their line breaks, which are part of the text
        elif extension == ".csv":  # read here, because datasets would read "NA" as null and fill short rows
            texts = read_csv(path, column)  # every value as it stands there
        else:  # .json and .jsonl, read here because the errors of datasets name no line
            texts = read_json(path, column)  # either layout under either name
        for text in texts:  # maybe blank: those are counted later
            empty = False  # a blank row is a row
            yield {"text": text}  # one row of the cache
    if empty:  # a header alone, "[]", line breaks alone
        fail(f"{', '.join(files)}: no rows, so nothing to train on; check how the file was written")  # a failed export


def read_lines(path):  # a generator, too: a file may be larger than memory
    """Yield the lines of a file, which may be gzipped, as str that end with \\n. Raises: SystemExit(2)."""
    unpack = gzip.open if path.endswith(".gz") else open  # they take the same arguments
    with unpack(path, "rt", encoding="utf-8-sig", newline="\n") as lines:  # sig: without the mark that Excel puts first
        try:  # newline: a line ends at \n only, for every reader of JSON lines
            for place, line in enumerate(lines, 1):  # as editors count
                if "\0" in line:  # every other byte of UTF-16 without the mark that would show it
                    fail(f"{path} is not UTF-8: line {place} holds NUL characters; "  # which no text has
                         "if it is UTF-16, convert it, for example with iconv -f utf-16le -t utf-8")  # from Windows
                yield line.replace("\r\n", "\n")  # files from Windows
        except UnicodeDecodeError as error:  # Latin-1, UTF-16, a picture
            part = error.object  # the bytes that were being decoded, the last ones read so far
            byte = lines.buffer.tell() - len(part) + error.start  # its place in the file, unpacked, from 0
            encoding = "utf-16" if part[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"  # by its first bytes
            fail(f"{path} is not UTF-8: byte {byte} is 0x{part[error.start]:02x}; "  # at which it cannot go on
                 f"convert it, for example with iconv -f {encoding} -t utf-8")  # the tool that every machine has
        except (OSError, EOFError, gzip.zlib.error) as error:  # a bad disk; a .gz that was cut short, or is none
            fail(f"{path} cannot be read to its end: {error}")  # in the system's words


def read_csv(path, column):  # a row at a time
    """Yield the text of each row of a .csv file; values in quotes may span lines. Raises: SystemExit(2)."""
    csv.field_size_limit(2**31 - 1)  # Python's default refuses texts over 128 KiB
    rows = csv.reader(read_lines(path), strict=True)  # strict: an open quote is an error, not the rest of the file
    try:  # csv.Error names what is wrong, line_num says where
        header = next(rows, [])  # the names of the columns
        check_column(f"{path}, line 1", column, header)  # once is enough: rows must be as long as the header
        place, numeric = header.index(column), True  # numeric: until a text is seen that is no number
        for row in rows:  # lists of str, one for each cell
            if row and len(row) != len(header):  # a comma too many or too few: which cell is the text?
                fail(f"{path}, line {rows.line_num}: {len(row)} values, but the header has {len(header)}; "  # ragged
                     "texts with commas or line breaks need double quotes around them")  # the usual reason
            text = row[place] if row else ""  # an empty line is a blank row
            numeric = numeric and re.fullmatch(r"[+-]*\d*(\.\d*)?", text.strip())  # "-1.5", also a blank
            yield text  # as it stands there
        if numeric and rows.line_num > 1:  # there were rows: a column of ids or prices, surely the wrong one
            fail(f"{path}: column {column!r} holds only numbers or blanks, not text; "  # never trained on silently
                 f"choose another with --text_column (columns: {', '.join(header)})")  # what there is instead
    except csv.Error as error:  # bad quoting, a NUL byte
        fail(f"{path}, line {rows.line_num}: broken CSV: {error}")  # e.g. "unexpected end of data": an open quote


def read_json(path, column):  # a line at a time, or one array as a whole: for gigabytes JSON lines are better
    """Yield the text (str or None) of each object of JSON lines or of one JSON array. Raises: SystemExit(2)."""
    array = next((line for line in read_lines(path) if line.strip()), "").lstrip().startswith("[")  # else objects
    parts = ["".join(read_lines(path))] if array else read_lines(path)  # each one JSON value
    for start, part in enumerate(parts, 1):  # start: the first line of the part, counted from 1 as editors do
        if not part.strip():  # a blank line is no row
            continue  # with the next line
        try:  # rstrip: the parser would say that a fault at the end is on the next line
            parsed = json.loads(part.rstrip())  # an object, or with an array a list of them
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            line = start + getattr(error, "lineno", 1) - 1  # the parser counts from the start of the part
            fail(f"{path}, line {line}: broken JSON: {getattr(error, 'msg', error)}; "  # the parser's words
                 "the file must hold one object a line or one array of objects")  # the two layouts

        for item, row in enumerate(parsed if array else [parsed], 1):  # the rows in this part
            where = f"{path}, item {item}" if array else f"{path}, line {start}"  # in an array lines mean little
            if not isinstance(row, dict):  # a bare string, number or list
                fail(f'{where}: {json.dumps(row)[:60]} is no JSON object; write {{"{column}": "…"}}')  # the remedy
            check_column(where, column, row)  # in each row: a name may change half-way
            text = row[column]  # str or None, if the file is right
            if not isinstance(text, str) and text is not None:  # numbers and lists are no text
                fail(f"{where}: column {column!r} holds {json.dumps(text)[:60]}, not text; "  # as it is written there
                     "choose another with --text_column, or put quotes around it")  # both ways out
            if text and re.search(r"[\ud800-\udfff]", text):  # half of an emoji, say: no file can hold it
                fail(f"{where}: the text has half a character, an escape from \\ud800 to \\udfff "  # how it is written
                     "without its other half; remove it")  # the one way out
            yield text  # None is counted as a blank row later


def check_column(where, column, columns):  # every source of data needs the column
    """Raise SystemExit(2) unless columns, the names that there are, holds column. where (str): the file and line."""
    if column not in columns:  # list them: the right one is usually obvious
        names = [str(name) for name in columns]  # a header's cells or an object's keys
        fail(f"{where}: no column {column!r}{nearest(column, names)}; "  # a slip, or the default name
             f"columns: {', '.join(names) or 'none'}; choose one with --text_column")  # the flag to change


def prepare_split(split, rows, tokenizer, args, rebuild):  # one line of report a split
    """Tokenize and pack rows, a Dataset of one column, and report what became of each. Returns: Dataset of chunks."""
    import datasets  # map runs the tokenizer over memory-mapped rows
    import pyarrow.compute  # counts without Python objects

    recipe = (tokenize_texts, rows._fingerprint, tokenizer.backend_tokenizer.to_str(), args.add_eos)  # all that decides
    key = datasets.fingerprint.Hasher.hash(recipe)  # a changed text, tokenizer, flag or function makes a new cache file
    cache = os.path.expanduser(args.cache_dir or datasets.config.HF_DATASETS_CACHE)  # also for a read-only data set
    size = TOKENIZE_BYTES * len(rows) // max(1, rows.data.nbytes)  # rows that hold about so many bytes of text
    tokenized = rows.map(  # with a progress bar; in batches, so that memory stays flat
        tokenize_texts,  # a batch of texts → a batch of lists of ids
        fn_kwargs={"tokenizer": tokenizer, "eos": [tokenizer.eos_token_id] if args.add_eos else []},  # what to append
        input_columns=rows.column_names, remove_columns=rows.column_names,  # the text: only its token ids are kept
        batched=True, batch_size=max(1, min(1000, size)),  # many at once, on all cores; fewer when texts are long
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),  # 4 bytes hold 262,144 ids
        num_proc=args.preprocessing_num_workers,  # None: this process, whose tokenizer is threaded already
        load_from_cache_file=not rebuild,  # a second run starts at once
        cache_file_name=os.path.join(cache, f"tokenized-{key}.arrow"),  # several processes: with a number each
        new_fingerprint=key,  # hashing the tokenizer object instead would take four seconds
        desc=f"Tokenizing {split}",  # on the progress bar
    )
    if len(tokenized) == 0:  # blank rows make no tokens; a saved data set may even have no rows
        fail(f"the {split} data holds no text: all {len(rows):,} rows are blank or null")  # surely not meant

    length = args.max_seq_length  # tokens per chunk
    sizes = pyarrow.compute.list_value_length(tokenized.data.column("input_ids")).to_numpy()  # tokens of each text …
    kept = sizes if args.no_truncation else sizes.clip(max=length)  # … and those of them that are packed
    total, cut = kept.sum(), sizes.sum() - kept.sum()  # numpy adds int32 up in 64 bits
    chunks, dropped = divmod(total, length)  # the one remainder of the whole split
    say(  # every row and every token is accounted for
        f"{split}: {len(rows):,} rows read, {len(rows) - len(tokenized):,} blank skipped, "  # blank: only white space
        f"{(kept < sizes).sum():,} texts truncated (-{cut:,} tokens), "  # --no_truncation keeps them
        f"{total:,} tokens kept = {chunks:,} chunks of {length:,} + {dropped:,} tokens dropped at the end"  # adds up
    )
    if cut > 0.2 * sizes.sum():  # a fifth: long documents, of which only the beginnings are learnt
        say(f"note     truncation takes {cut / sizes.sum():.0%} of the {split} tokens: "  # in proportion it is noticed
            "--no_truncation keeps them")  # in further chunks
    if chunks == 0:  # as many tokens as are kept make a chunk, also when a shorter length truncates more
        fail(f"the {split} data has {total:,} tokens, too few for one chunk of {length:,}: "  # a handful of sentences
             f"add text, or use --max_seq_length {total} or less")  # a length that works
    files = tuple(file["filename"] for file in tokenized.cache_files)  # one for each process that tokenized, in order
    kwargs = {"files": files, "length": length, "truncate": not args.no_truncation}  # for group_texts
    return cached(f"{split}_chunks", group_texts, kwargs, args.cache_dir, rebuild)  # lists of int32


def tokenize_texts(texts, tokenizer, eos):  # runs in datasets.map, maybe in several processes
    """Map list[str or None] to {"input_ids": list[list[int]]}, blank texts left out; eos (list[int]) ends each text.

    The tokenizer puts Gemma's BOS before each. Truncation comes in group_texts: another length, the same tokens.
    """
    texts = [text for text in texts if text and not text.isspace()]  # a blank one would be a lone BOS
    ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []  # all in one call
    return {"input_ids": [row + eos for row in ids]}  # rows of their own length


def group_texts(files, length, truncate):  # texts of any length → chunks of one length: no padding is computed
    """Concatenate all texts and yield {"input_ids": chunk}, chunk an int32 array of exactly `length` tokens.

    Works on Arrow's buffers through numpy: 12 million tokens take a fraction of a second.
    Args: files (sequence of str): Arrow files of tokenized texts. truncate (bool): at most `length` tokens of each.
    """
    import numpy as np  # array arithmetic
    import pyarrow as pa  # the format of the cache
    import pyarrow.compute as pc  # cuts lists without Python objects

    tail = np.empty(0, dtype=np.int32)  # tokens that are in no chunk yet: always fewer than length
    for path in files:  # the tokenized texts, in their order
        with pa.OSFile(path) as source, pa.ipc.open_stream(source) as batches:  # read, not mapped: memory stays flat
            for batch in batches:  # at most a thousand texts
                texts = batch["input_ids"]  # one Arrow array of lists
                texts = pc.list_slice(texts, 0, length) if truncate else texts  # shorter ones stay as they are
                tokens = np.concatenate([tail, texts.flatten().to_numpy()])  # end to end, none twice
                whole = len(tokens) // length * length  # only whole chunks train: no padding, no mask
                yield from ({"input_ids": chunk} for chunk in tokens[:whole].reshape(-1, length))  # rows of the cache
                tail = tokens[whole:]  # first in the next batch; in the end, what the report calls dropped


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_tokenizer(name, max_seq_length):  # the first thing a model must have
    """Return the fast tokenizer of model `name`, whose context must hold max_seq_length. Raises: SystemExit(2)."""
    from transformers import AutoConfig, AutoTokenizer  # pick the classes by the model's config.json
    from transformers.utils import cached_file  # path of one file of a model, downloaded if need be

    part = ""  # which file of the model is at fault, where the error itself does not say it
    try:  # the first contact with the hub: what is wrong with the access shows here
        config = AutoConfig.from_pretrained(name)  # a gated or misspelt name fails here, before 536 MB
        cached_file(name, "tokenizer.json")  # raises if there is none: AutoTokenizer would make up an empty tokenizer
        part = " (in its tokenizer.json)"  # from here on it is the tokenizer's fault
        tokenizer = AutoTokenizer.from_pretrained(name)  # 33 MB for Gemma 3
    except Exception as error:  # the libraries raise a dozen kinds for a handful of reasons
        fail(explain_loading_error("--model_name_or_path", name, "", error) + part)  # one sentence with what to do
    context = getattr(config.get_text_config(), "max_position_embeddings", max_seq_length)  # 32,768 for Gemma 3 270M
    if max_seq_length > context:  # positions that the model has never seen
        fail(f"--max_seq_length {max_seq_length} is longer than the model's context: use {context} or less")  # its size
    if tokenizer.pad_token is None:  # the collator asks for one though full chunks need no padding
        tokenizer.pad_token = tokenizer.eos_token  # as everywhere in this field
    return tokenizer  # adds BOS by itself, never EOS


def load_model(name, tokenizer, flash_attention):  # from the hub, its cache or a directory
    """Load the causal language model `name` with float32 weights, on the CPU. Raises: SystemExit(2).

    float32, because bfloat16's 8 bits lose an update of 2e-5 of a weight: the 16-bit matrix products of --bf16 and
    --fp16 come from autocast, which leaves these master weights alone.
    """
    import torch  # names of number formats
    from transformers import AutoModelForCausalLM  # picks Gemma3ForCausalLM by config.json

    try:  # the weights: 536 MB from the hub at the first time
        model, report = AutoModelForCausalLM.from_pretrained(  # memory-maps the file, then copies
            name,  # hub name or directory
            dtype=torch.float32,  # also for Flash Attention, which warns of it: a finished model must not be rounded
            attn_implementation="flash_attention_2" if flash_attention else "sdpa",  # sdpa: PyTorch's kernels
            ignore_mismatched_sizes=True,  # do not raise for a wrong shape: the report lists it
            output_loading_info=True,  # also tell which weights the file lacked
        )
    except Exception as error:  # broken files, a model of another kind, no network
        fail(explain_loading_error("--model_name_or_path", name, "", error))  # one sentence with what to do
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])  # absent, misshapen
    if wrong:  # transformers fills them with random numbers and a warning
        fail(f"--model_name_or_path {name}: the file lacks {', '.join(wrong[:3])}; save the model anew")  # a bad copy
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens were added to the tokenizer
        model.resize_token_embeddings(len(tokenizer))  # the head grows, too, tied or not
    return model  # the Trainer moves it to the device


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────
# A checkpoint is made under .staging, sealed with a manifest of checksums, and gets its name by a rename: whatever is
# called checkpoint-N is whole. Nothing is written into it again; what is found damaged is set aside, never deleted.


def claim(output_dir):  # one run per directory
    """Lock output_dir for this process. Returns: the open lock file: closing it, or dying, lets go of the lock.

    lockf and not flock, because flock's lock is inherited by data loader processes that may outlive this one.
    """
    try:  # the disk may be full, the file somebody else's
        file = open(os.path.join(output_dir, ".lock"), "a+", encoding="utf-8")  # not truncated: it names the owner
        try:  # held by the system, so a run that was killed holds nothing
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process holds it
        except OSError as error:  # locked by another process, or a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX allows both for "locked"
                file.seek(0)  # mode a+ begins at the end
                owner = file.read().strip()  # "process 4711 on node0"
                fail(f"--output_dir {output_dir} is in use by {owner}: wait for it, or choose another", 1)  # not ours
            say(f"note     {output_dir} cannot be locked ({error.strerror}): start no second run in it")  # old NFS
        file.truncate(0)  # the owner before has ended
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)  # for the sentence above
    except OSError as error:  # No space left on device, Permission denied
        words = error.strerror  # the system's own
        fail(f"--output_dir {output_dir} cannot be written ({words}): make space, or choose another", 1)  # at once
    return file  # main() keeps it open


def check_claim(lock, output_dir):  # before anything is written into it
    """End the run unless lock, the file of claim(), still lies in output_dir. Ranks other than 0 have None."""
    path = os.path.join(output_dir, ".lock")  # gone with the directory; another file, if another run has made it anew
    if lock and not (os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path))):  # by its inode
        fail(f"--output_dir {output_dir} was moved or removed during the run: what was saved "  # it is whole, …
             "before is where it was moved to; put it back, and the same command goes on", 1)  # … not in another's


def sha256(path):  # 1.8 GB/s: two seconds for a checkpoint of 3.2 GB
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:  # weights, an optimizer's state, a few small files
        while block := file.read(1 << 20):  # 1 MB at a time, so that memory stays small
            digest.update(block)  # in C, as fast as the processor can
    return digest.hexdigest()  # 64 characters for a file of any size


def flush(path):  # a rename may reach the disk before the data does: after a power cut it would name an empty file
    """Wait until a file, or the list of a directory's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)  # a directory can be opened so, too
    os.fsync(handle)  # the system writes it now, not in half a minute
    os.close(handle)  # a long run would otherwise use up the file handles


def seal(folder, facts):  # before a checkpoint gets its name
    """Write manifest.json: facts (dict), and size and checksum of every file in folder. Then flush all of it."""
    names = sorted(os.listdir(folder))  # weights, optimizer, schedule, random states, …
    paths = [os.path.join(folder, name) for name in [*names, "manifest.json"]]  # what has to be on the disk
    files = {name: [os.path.getsize(path), sha256(path)] for name, path in zip(names, paths, strict=False)}  # contents
    body = json.dumps({**facts, "files": files}, sort_keys=True)  # the same facts give the same text
    manifest = {"sha256": hashlib.sha256(body.encode()).hexdigest(), **facts, "files": files}  # it guards itself, too
    with open(paths[-1], "w", encoding="utf-8") as file:  # manifest.json, written last
        json.dump(manifest, file, sort_keys=True)  # on one line: it is for programs

    os.umask(mask := os.umask(0))  # there is no way to read it without setting it
    for path in paths:  # safetensors makes its files readable by their owner only
        os.chmod(path, 0o666 & ~mask)  # what any other program would have given them
        flush(path)  # 0.2 s for 500 MB
    flush(folder)  # only now may it be renamed


def read_manifest(folder, chosen=None):  # before a checkpoint is trusted
    """Check all files of a checkpoint against its manifest, and that it is, or came of, the chosen one if there is one.

    Returns: (manifest, None) or (None, what is wrong).
    """
    try:  # there is none in checkpoints that another program made
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:  # by seal(), behind all others
            manifest = json.load(file)  # settings, progress, versions, files, and the checksum of them all
        body = json.dumps({key: manifest[key] for key in manifest if key != "sha256"}, sort_keys=True)  # as in seal()
        if hashlib.sha256(body.encode()).hexdigest() != manifest["sha256"]:  # a flipped bit in the manifest itself
            return None, "its manifest.json was changed"  # so nothing in it can be trusted
        for name, (size, digest) in manifest["files"].items():  # none may be missing
            path = os.path.join(folder, name)  # e.g. optimizer.pt
            if os.path.getsize(path) != size or sha256(path) != digest:  # cut short, or a bit flipped
                return None, f"{name} is damaged"  # the first one found is reason enough
        best = manifest["progress"].get("best")  # what --load_best_model_at_end would publish, beside this one
        if best and best != os.path.basename(folder):  # without it the run could not end as it should
            fault = read_manifest(os.path.join(os.path.dirname(folder), best))[1]  # all of it is read, just as here
            if fault:  # then an older checkpoint, made before it, has to do
                return None, f"the best one, {best}, cannot be used: {fault}"  # which one, and what is wrong with it
        if chosen not in (None, os.path.realpath(folder), manifest["chosen"]):  # of --resume_from_checkpoint
            return None, f"it did not come of {chosen}"  # going back means to leave it
    except (OSError, ValueError, KeyError) as error:  # missing, unreadable, not JSON
        return None, " ".join(str(error).split())  # e.g. No such file or directory: …
    return manifest, None  # whole, to the last bit


def find_checkpoint(output_dir, chosen, settings):  # what has an earlier call of the same command left?
    """Find what to go on from: the newest whole checkpoint, of those that came of the chosen one if there is one.

    Others that are newer are renamed to unused-checkpoint-N, never deleted: damaged ones, those of another program.
    Returns: (path, manifest); path is output_dir itself where the run has finished, and None for a fresh start. Rank 0
        looks and tells the others. Raises: SystemExit(2): the chosen one is not whole, or of a run with other settings
        than now; a model would be written over.
    """
    from accelerate.utils import broadcast_object_list  # rank 0 chooses: two choices would train two different runs
    from transformers.trainer_utils import get_last_checkpoint  # the highest N of checkpoint-N, or None

    found = [None, {}]  # a fresh start, unless something is found
    if RANKS.rank == 0:  # reads every byte, so once is enough
        saving = os.path.isdir(os.path.join(output_dir, ".staging"))  # a save was killed, perhaps the final one
        for name in os.listdir(output_dir):  # and perhaps the removal of an old checkpoint
            if name.startswith((".staging", ".trash-")):  # half made, or half deleted
                shutil.rmtree(os.path.join(output_dir, name), ignore_errors=True)  # gives its space back

        path = output_dir  # a finished run has a manifest there, written last
        manifest, fault = read_manifest(path, chosen)  # reads all of it: 2 seconds for a checkpoint
        if fault and chosen:  # by --resume_from_checkpoint: it is looked at before anything is renamed
            manifest, harm = read_manifest(chosen)  # of the one that the user wants
            if harm:  # it is not replaced by another one
                fail(f"--resume_from_checkpoint {chosen} cannot be used: {harm}; "  # what is wrong with it
                     "leave the flag out to take the newest one that is whole")  # as it does without being told to
            if differences(manifest, settings):  # then nothing is renamed: same_run() is going to refuse it
                path, fault = chosen, None  # or to move all of it aside, if asked for
        while fault and (path := get_last_checkpoint(output_dir) or chosen):  # the newest first
            manifest, fault = read_manifest(path, chosen)  # most often it can be used, and the loop ends
            if fault:  # then it must no longer be seen as a checkpoint of this run
                aside = os.path.join(output_dir, f"unused-{os.path.basename(path)}")  # for you to look at
                while os.path.exists(aside):  # set aside more than once
                    aside += "-again"  # nothing is ever written over
                os.rename(path, aside)  # the next newest one is tried
                say(f"warning  {path} is not used ({fault}); set aside as {aside}")  # never in silence
        if fault and not saving and os.path.exists(os.path.join(output_dir, "model.safetensors")):  # whose is it?
            fail(f"--output_dir {output_dir} holds a model, which would be written over, and no checkpoint "  # not ours
                 f"to go on from ({fault}): move it, or choose another directory")  # made elsewhere, or changed since
        found = found if fault else [path, manifest]  # fault: no whole checkpoint was left
    return broadcast_object_list(found)  # the same on all ranks


def checkpoints(output_dir):  # all of them are whole
    """Return the paths of output_dir's checkpoints, the oldest first by number: times change with a copy."""
    numbers = [int(name[11:]) for name in os.listdir(output_dir) if re.fullmatch(r"checkpoint-\d+", name)]  # N of each
    return [os.path.join(output_dir, f"checkpoint-{number_}") for number_ in sorted(numbers)]  # the newest is the last


def differences(manifest, now):  # settings that no longer hold
    """Return a clause for each of now, a dict of settings, that a manifest holds with another value; "" for none."""
    saved = manifest.get("settings", now)  # a fresh start has no manifest: nothing to compare with
    return "; ".join(f"{name} was {saved.get(name)!r}, is {value!r}"  # both values; None where it knows nothing of it
                     for name, value in now.items() if saved.get(name) != value)  # in the order of the flags


def same_run(args, checkpoint, manifest, now):  # called twice: for the flags, and again when data and weights are known
    """Refuse to go on with other settings than those of the manifest. now (dict): some or all of them.

    Returns: (checkpoint, manifest) as given, or (None, {}) when --overwrite_output_dir had another run moved aside.
    Raises: SystemExit(2) after one sentence that names each difference with both values.
    """
    other = differences(manifest, now)  # of the same command, the same data, the same model
    if not other:  # nearly always
        return checkpoint, manifest  # nothing to refuse, nothing to move
    if not args.overwrite_output_dir:  # going on would give neither the one run nor the other
        fail(f"{checkpoint} belongs to a run with other settings: {other}. "  # one clause for each
             "Give the old ones to go on; for a new run give another --output_dir "  # nothing of the old one is lost
             "(the finished model may be its --model_name_or_path), "  # a second training, of what the first has made
             "or --overwrite_output_dir to move the old run aside")  # the third way on, into previous-1
    for path in [*args.train_file, *args.validation_file, args.cache_dir or "", args.model_name_or_path]:  # this run's
        if os.path.abspath(path).startswith(os.path.join(os.path.abspath(args.output_dir), "")):  # would move as well
            fail(f"{path} lies in --output_dir {args.output_dir}, which is to be emptied: move it out first")  # kept
    if RANKS.rank == 0:  # one process moves, all others wait below
        old = [name for name in os.listdir(args.output_dir) if not name.startswith(("previous-", ".lock"))]  # stays
        names = (os.path.join(args.output_dir, f"previous-{number_}") for number_ in itertools.count(1))  # without end
        aside = next(name for name in names if not os.path.exists(name))  # earlier ones may have been moved or deleted
        os.makedirs(aside)  # after the list was made, which it must not be in
        for name in old:  # checkpoints, curves, results, model
            os.rename(os.path.join(args.output_dir, name), os.path.join(aside, name))  # nothing is copied or deleted
        say(f"The old run was moved to {aside}.")  # where its checkpoints can still be gone on from
    RANKS.wait()  # nobody writes before
    return None, {}  # the new run finds an empty directory


def rotate(output_dir, limit, keep):  # after the new one is safe
    """Delete all checkpoints but the newest `limit` and those named in keep, each whole or not at all."""
    for path in checkpoints(output_dir)[:-limit]:  # all but the newest ones
        if os.path.basename(path) not in keep:  # the best so far, the one just saved, the one that the user chose
            trash = os.path.join(output_dir, f".trash-{os.path.basename(path)}")  # invisible, also half deleted
            os.rename(path, trash)  # from this instant on it is no checkpoint any more
            shutil.rmtree(trash, ignore_errors=True)  # 3.2 GB; a kill in here leaves the rest to the next start


# ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Of all matrix work 63 % is the projection of 640 numbers a token onto the 262,144 words of the vocabulary, and its
# result, the logits, would be the largest thing in memory: 1.07 GB for each 2,048 tokens in 16 bits, and again twice as
# much in the float32 of the softmax. So the loss goes through the tokens in chunks and never keeps the logits of one.


LOSS_SIZES = {  # bytes of a chunk's logits, its tokens in the float32 softmax at a time, words multiplied at a time, …
    "cuda": (2.2e9, 256, 32_768, True),  # … and is the head cast as a whole? Large products, as a GPU wants them
    "cpu": (0.135e9, 16, 8_192, False),  # chunks of 256 tokens and casts of 8,192 words: here memory is what counts
}


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
    from torch.nn.functional import log_softmax  # float32 inside, whatever the dtype of its input

    kind, (vocabulary, width) = hidden.device.type, weight.shape  # "cuda" or "cpu"; V, H
    mixed = torch.is_autocast_enabled(kind)  # with --bf16, --fp16, or set by the launcher
    dtype = torch.get_autocast_dtype(kind) if mixed else hidden.dtype  # of the products with the vocabulary
    # GradScaler has not scaled these gradients yet, and unscaled they can be too small for float16: float32 instead.
    precise = torch.float32 if dtype == torch.float16 else dtype  # of the logits' gradients and of products with them
    memory, few, part, whole = LOSS_SIZES.get(kind, LOSS_SIZES["cpu"])  # other devices have little memory, too
    most = memory / (precise.itemsize * vocabulary)  # tokens that fit it
    rows = math.ceil(len(labels) / math.ceil(len(labels) / max(1, int(most))))  # tokens in a chunk, all nearly equal
    size = min(vocabulary, part)  # words in a part
    parts = [slice(first, min(first + size, vocabulary)) for first in range(0, vocabulary, size)]  # 8 on a GPU
    cast, made, sums = (weight.new_empty(size, width, dtype=of) for of in (dtype, precise, torch.float32))  # used again
    head = weight.to(dtype) if whole else weight  # once for all chunks, or part by part: 0.3 GB less
    with contextlib.suppress(AttributeError):  # the layers have freed much, which the GNU C library, and no other, …
        ctypes.CDLL(None).malloc_trim(0)  # … gives back so, before the largest tensors are made: 0.3 GB, in 25 ms
    learnt = labels != -100  # (N,): which tokens count
    targets = labels.clamp(min=0)[:, None]  # (N, 1): -100 is no index
    losses = torch.empty(len(labels), dtype=torch.float32, device=labels.device)  # (N,)
    to_hidden = torch.empty_like(hidden) if with_gradients else None  # (N, H)
    to_weight = torch.empty_like(weight, dtype=torch.float32) if with_gradients else None  # (V, H)

    def words(part, wanted):  # (size, H)
        """Return a part of the head in the wanted dtype."""
        for matrix in (head, weight):  # one of them may have it
            if matrix.dtype == wanted:  # then nothing has to be copied
                return matrix[part]  # a view: no memory
        return cast[: part.stop - part.start].copy_(weight[part])  # valid until the next part

    with torch.no_grad(), torch.autocast(kind, enabled=False):  # every dtype is chosen here
        for first in range(0, len(labels), rows):  # a chunk: few enough tokens for their logits to fit
            chunk = slice(first, first + rows)  # the last one may be shorter
            states = hidden[chunk].to(dtype)  # (rows, H)
            logits = torch.empty(len(states), vocabulary, dtype=precise, device=weight.device)  # the one large tensor
            for part in parts:  # all words: the chunk's logits are complete then
                logits[:, part] = states @ words(part, dtype).T  # (rows, size)
            if cap:  # Gemma 2 has 30, Gemma 3 none
                logits.div_(cap).tanh_().mul_(cap)  # in place, as no one else needs them uncapped
            splits = (tensor.split(few) for tensor in (logits, targets[chunk], losses[chunk]))  # views: writable
            for scores, target, loss in zip(*splits, strict=True):  # a few tokens at a time: float32 is large
                logs = log_softmax(scores, -1, dtype=torch.float32)  # log p of every word
                known = logs.gather(-1, target)  # log p(label), one a token
                loss.copy_(-known[:, 0])  # in its place in losses
                if with_gradients:  # d loss / d logit is p − 1 for the label and p for all other words
                    bend = 1 - (scores / cap).square() if cap else None  # the derivative of the tanh is 1 − tanh²
                    torch.exp(logs, out=scores)  # p, in the place of the logits
                    scores.scatter_(-1, target, known.expm1().to(precise))  # p − 1, exact also where p is nearly 1
                    if cap:  # d loss / d logit, by the chain rule
                        scores.mul_(bend)  # × d capped / d logit

            if with_gradients:  # logits holds d loss / d logit by now
                inputs = hidden[chunk].to(precise) * learnt[chunk, None]  # (rows, H): 0 for -100
                back = torch.zeros(len(states), width, device=weight.device)  # (rows, H), float32: a sum over the parts
                for part in parts:  # once more through the vocabulary
                    slope, gradient = logits[:, part], made[: part.stop - part.start]  # (rows, size), (size, H)
                    back += slope @ words(part, precise)  # d loss / d hidden
                    torch.mm(slope.T, inputs, out=gradient)  # d loss / d head
                    if first == 0:  # the first chunk: spares filling to_weight with zeros
                        to_weight[part].copy_(gradient)  # in float32, the dtype of the sum
                    else:  # further ones; cast first, as adding 16 to 32 bits takes a CPU four times as long
                        to_weight[part].add_(sums[: len(gradient)].copy_(gradient))  # summed in float32
                to_hidden[chunk] = back * learnt[chunk, None]  # in the dtype of hidden
    return losses * learnt, to_hidden, None if to_weight is None else to_weight.to(weight.dtype)  # no logits survive


def use_chunked_loss(model):  # instead of the model's own, which holds all logits
    """Make model(input_ids, labels=…) return a dict with `loss` and `token_losses`, computed in chunks of tokens.

    `loss` is a scalar: the sum ÷ num_items_in_batch, or the mean, over labels other than -100 (0 if there are none);
    `token_losses` (batch, length - 1), float32, is without gradient. Without labels the model returns logits as ever.
    A model whose loss is more than its head and a softcap keeps its own: eight tokens through both show which is which.
    Returns: bool, whether the chunked loss is in use.
    """
    import torch  # automatic differentiation

    class ChunkedLoss(torch.autograd.Function):  # gradients of our own instead of a recorded graph
        """(hidden, weight, labels, cap, gradients, made) → (sum of losses, losses), as token_losses makes them.

        made: a list, to which the weight's gradient goes for TableRows to finish, or None.
        """

        @staticmethod  # apply() calls it on the class, not on an object
        def forward(ctx, hidden, weight, labels, cap, gradients, made):  # ctx carries things to the backward pass
            """Compute losses and gradients at once."""
            losses, *ctx.gradients = token_losses(hidden, weight, labels, cap, gradients)  # chunk by chunk
            ctx.made = made  # the gradients are of the sum of losses: backward() only has to scale them
            ctx.mark_non_differentiable(losses)  # for evaluations only
            return losses.sum(), losses  # the sum carries the gradient

        @staticmethod  # called by loss.backward(), once a micro-batch
        def backward(ctx, upstream, _):  # upstream: d (final loss) / d (sum), a scalar on the device
            """Scale what the forward pass has made."""
            gradients, ctx.gradients = ctx.gradients, None  # 0.67 GB that nothing shall hold longer than it must
            to_hidden, to_weight = (gradient.mul_(upstream.to(gradient.dtype)) for gradient in gradients)  # × it
            if ctx.made is not None:  # the backward pass ends at the table, with the same weight
                ctx.made.append(to_weight)  # kept until then
                to_weight = None  # so autograd has nothing to add up
            return to_hidden, to_weight, None, None, None, None  # none for labels, cap, gradients and made

    class TableRows(torch.autograd.Function):  # a tied weight, on its way to where it is the table of embeddings
        """(weight, made) → weight. Its gradient here is a row for each token: nothing as large as the weight."""

        @staticmethod  # apply() calls it on the class, not on an object
        def forward(ctx, weight, made):  # made: the list of above
            """Change nothing."""
            ctx.made = made  # empty until the loss goes backward
            return weight.view_as(weight)  # the same memory

        @staticmethod  # called at the end of the backward pass
        def backward(ctx, rows):  # a sparse tensor of shape (V, H)
            """Add the rows to the head's gradient, in place: 0.67 GB and a second less than adding two dense ones."""
            to_weight = ctx.made.pop()  # no other reference stays, so that autograd takes it without a copy
            return to_weight.index_add_(0, rows._indices()[0], rows._values()), None  # in a fixed order

    own, head = model.forward, model.get_output_embeddings()  # the model's forward pass; its (V, H) matrix
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2 and 3n

    @torch.compiler.disable  # --torch_compile is for the layers: a loop of large products gains nothing from it
    def chunked(hidden, labels, items, made):  # (batch, length, H), (batch, length), a number or None, a list or None
        """Return what the new forward pass returns."""
        labels = labels[:, 1:].to(hidden.device)  # token t is predicted …
        before = hidden[:, :-1].flatten(0, 1)  # … from all before it
        training = torch.is_grad_enabled()  # not in evaluations
        total, losses = ChunkedLoss.apply(before, head.weight, labels.flatten(), cap, training, made)  # a scalar; (N,)
        items = (labels != -100).sum().clamp(min=1) if items is None else items  # the Trainer counts those of a step
        return {"loss": total / items, "token_losses": losses.view(labels.shape)}  # no logits

    @functools.wraps(own)  # the Trainer reads the names of its arguments
    def forward(*inputs, labels=None, num_items_in_batch=None, **named):  # in place of the model's
        """Call the layers and the loss, or, without labels, the model as it was."""
        if labels is None:  # generation needs the logits of the last token
            return own(*inputs, **named)  # as if nothing had been changed
        spare = tied and torch.is_grad_enabled() and not torch.compiler.is_compiling()  # which knows no sparse tensors
        made = [] if spare and head.weight.device.type == "cpu" else None  # a GPU would add in any order
        table.sparse = made is not None  # its gradient; only now, as DDP would take the weight's for sparse, too
        if table.sparse:  # the table takes its weight from TableRows
            rows = dict.fromkeys(tied, TableRows.apply(head.weight, made))  # by its name in the model
            outputs = torch.func.functional_call(model.base_model, rows, inputs, named)  # instead of its own
        else:  # a GPU, a compiled model, an evaluation, a head of its own
            outputs = model.base_model(*inputs, **named)  # through all layers
        hidden = outputs.last_hidden_state  # (batch, length, H)
        return chunked(hidden, labels, num_items_in_batch, made)  # gradients go to the head and to all layers

    if not isinstance(head, torch.nn.Linear) or head.bias is not None:  # None, or of another kind
        return False  # something else than a matrix product
    table = model.get_input_embeddings()  # row t is what the layers see of token t
    tied = [name for name, weight in model.base_model.named_parameters() if weight is head.weight]  # its name there
    ids = torch.arange(8, device=head.weight.device)[None]  # eight tokens are enough to tell two losses apart
    with torch.no_grad():  # two forward passes on 8 tokens: a fraction of a second
        theirs, ours = own(input_ids=ids, labels=ids).loss, forward(input_ids=ids, labels=ids)["loss"]  # two scalars
    if not torch.isclose(theirs.float(), ours, rtol=1e-3, equal_nan=True):  # scaled logits, a loss of experts, …
        return False  # it keeps its own, and make_trainer() says so
    model.forward = forward  # on this object: accelerate wraps autocast around it later
    return True  # never holds more than a chunk of logits


def use_lean_norms(model):  # six in each of the 18 layers
    """Make Gemma 3's RMSNorm keep only its input for the backward pass; other models' norms stay as they are.

    Autograd would also keep the normalized values, in float32: with them a token takes 1.2 MB of activations, without
    0.8. The values are the same to the last bit; the gradient is that of the paper (arXiv:1910.07467), with 1 + weight.
    """
    import torch  # automatic differentiation

    class LeanNorm(torch.autograd.Function):  # gradients of our own instead of a recorded graph
        """(x, weight, eps) → x ÷ its root mean square × (1 + weight). x (…, D), any float dtype; weight (D,)."""

        @staticmethod  # apply() calls it on the class, not on an object
        def forward(ctx, x, weight, eps):  # eps: keeps a row of zeros from a division by zero
            """Compute in float32, as the model's own does."""
            wide = x.float()  # squares of 16-bit numbers need more digits
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (…, 1): one number a token
            ctx.save_for_backward(x, weight, scale)  # x is kept by the layer anyway
            return (wide * scale * (1 + weight.float())).type_as(x)  # (…, D)

        @staticmethod  # once a micro-batch for each norm
        def backward(ctx, upstream):  # (…, D): d loss / d output
            """Compute the normalized values once more: two multiplications a number."""
            x, weight, scale = ctx.saved_tensors  # as above
            normed, upstream = x.float() * scale, upstream.float()  # (…, D), float32
            to_weight = (upstream * normed).flatten(0, -2).sum(0)  # (D,): over all tokens
            upstream = upstream * (1 + weight.float())  # d loss / d normed
            to_x = scale * (upstream - normed * (upstream * normed).mean(-1, keepdim=True))  # scale depends on x, too
            return to_x.type_as(x), to_weight.type_as(weight), None  # none for eps

    for norm in model.modules():  # 109 of them are such norms
        if type(norm).__name__ == "Gemma3RMSNorm":  # Gemma's has 1 + weight, others' have not
            norm.forward = lambda x, norm=norm: LeanNorm.apply(x, norm.weight, norm.eps)  # of this object


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PEAKS = {  # dense 16-bit TFLOP/s that the makers state, by whole words of the device's name; MFU is a share of them
    "H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "A100": 312, "A40": 149.7,  # the first name that fits
    "L40S": 362, "L4": 121, "V100": 125, "RTX 4090": 165, "RTX 3090": 71, "RTX A6000": 155,  # without sparsity
}


def flops_per_token(config, parameters, length):  # for MFU, the share of the device's peak that is used
    """Return the floating-point operations to train on one token: 6 a matrix weight, and causal attention beside them.

    Args: config: of the model. parameters (int): all weights, a tied head once. length (int): tokens per chunk.
    """
    config, attention = config.get_text_config(), 0  # as in appendix B of the PaLM paper; attention: of all layers
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # weights that only look up
    heads = config.num_attention_heads  # 4 for Gemma 3 270M
    width = heads * getattr(config, "head_dim", config.hidden_size // heads)  # 4 × 256: all heads' queries side by side
    for kind in getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers:  # 15 and 3
        seen = min(length, config.sliding_window or length) if kind == "sliding_attention" else length  # tokens back
        attention += 12 * width * (seen - seen * (seen - 1) / 2 / length)  # causal: the mean of min(position, seen)
    return 6 * (parameters - lookup) + attention  # 1.73e9 for Gemma 3 270M at 2,048


def peak_flops(training_args):  # what the processes could do at best
    """Return the dense 16-bit FLOP/s of all devices together, or None: unknown device, CPU, or float32."""
    import torch  # the device's name

    if training_args.device.type != "cuda" or training_args.mixed_precision == "no":  # float32 has another peak
        return None  # rather than a share of a number that does not apply
    name = torch.cuda.get_device_name(training_args.device)  # "NVIDIA A40"
    peaks = [PEAKS[part] for part in PEAKS if re.search(rf"\b{part}\b", name)]  # by whole words: an A4000 is no A40
    return peaks[0] * 1e12 * training_args.world_size if peaks else None  # of all together


def epoch_of(chunks, training_args):  # known before the Trainer starts
    """Return (chunks in a forward pass of all processes, chunks used in an epoch, its optimizer steps, at least 1)."""
    batch = training_args.train_batch_size * training_args.world_size  # the last one of an epoch may be smaller
    used = chunks - chunks % batch if training_args.dataloader_drop_last else chunks  # or is left out, by this flag
    return batch, used, max(1, math.ceil(used / batch / training_args.gradient_accumulation_steps))  # the last is short


def make_trainer(model, tokenizer, training_args, train, validation, stop, facts, lock):  # the loop, made unkillable
    """Put the parts together.

    Args: stop (Stop): knows of signals. facts (dict): for the manifest of each checkpoint: `settings`, `versions`, and
        `progress` of the checkpoint that the run goes on from. lock: the file of claim(), on rank 0.
    Returns: transformers.Trainer, whose evaluations report perplexity and whose checkpoints are complete or absent.
        It overrides five methods that are not public: requirements.txt holds transformers to the tested version.
    """
    from resource import RUSAGE_SELF, getrusage  # this process's memory

    import torch  # numbers on the device
    import torch.distributed as dist  # to agree with the other processes
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback  # batches; the loop; its events

    world, output_dir = training_args.world_size, training_args.output_dir  # processes on all machines; where to write
    staging = os.path.join(output_dir, ".staging")  # where checkpoints are made: on the same file system
    past = facts["progress"]  # what earlier calls of this run did; empty at a fresh start
    chunks = len(train) if train is not None else 0  # of the training data; none for --do_eval
    length = len(train[0]["input_ids"]) if chunks else 1  # tokens per chunk
    batch, used, epoch_steps = epoch_of(chunks, training_args)  # chunks in a forward pass; chunks and steps in an epoch
    flops = flops_per_token(model.config, sum(weight.numel() for weight in model.parameters()), length)  # 1.7e9
    peak = peak_flops(training_args)  # of all devices; None on a CPU
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # mlm=False: predict the next token
    limit = training_args.ddp_timeout_delta  # how long a rank waits for the others
    group = dist.new_group(backend="gloo", timeout=limit) if world > 1 else None  # to agree on a stop, beside the GPUs

    by_epoch = training_args.logging_strategy == "epoch"  # then the last line may be of a part of one
    for kind in ("logging", "eval", "save"):  # with --eval_strategy epoch, for example
        if getattr(training_args, f"{kind}_strategy") == "epoch":  # an epoch's end is a step as any other
            steps = type(getattr(training_args, f"{kind}_strategy"))("steps")  # one of transformers' enumerations
            setattr(training_args, f"{kind}_strategy", steps)  # so all that is due at a step comes in one place …
            setattr(training_args, f"{kind}_steps", epoch_steps)  # … and in this order: line, evaluation, checkpoint
            training_args.eval_delay *= epoch_steps if kind == "eval" else 1  # it was in epochs

    def last_line(state):  # state: the Trainer's
        """Return the step after which the last line of training was logged, 0 if none was."""
        return next((row["step"] for row in reversed(state.log_history) if "loss" in row), 0)  # also of earlier calls

    def collate(rows):  # on the CPU, while the GPU works on the last batch
        """Make a batch of chunks: input_ids and labels of shape (batch, max_seq_length), int64."""
        made = collator([row["input_ids"] for row in rows])  # its labels are the inputs, but for the pad token's …
        made["labels"] = made["input_ids"]  # … though nothing here is padded, and pad may be EOS: learn them all
        return made  # the loss shifts the labels by one itself; no mask, as no chunk has a gap

    def tokens_until(step):  # no process has to be asked: every chunk is full, and an epoch has as many each time
        """Return the tokens that all processes have trained on after so many optimizer steps of the run."""
        epochs, steps = divmod(step, epoch_steps)  # whole epochs, and steps in the present one
        now = min(steps * batch * training_args.gradient_accumulation_steps, used)  # its last step may be short
        return (epochs * used + now) * length  # chunks → tokens

    class Abandoned(Exception):  # noqa: N818  no error
        """An evaluation ends early, because a signal has come."""

    class ReliableTrainer(Trainer):  # a subclass, as no callback may change a log line, an evaluation or a save
        """The Trainer with an honest log line, a guard against NaN, and checkpoints that are complete or absent."""

        started = time.time()  # less the time that earlier calls took, once training begins
        began = logged = (0.0, 0)  # time and step at which this call began to train; at the last log line
        due = False  # whether the evaluation of this step is left to the next call
        bad_step = torch.zeros((), device=training_args.device)  # the first without a finite loss; there: nobody waits

        def training_step(self, *rest, **named):  # forward and backward pass of a batch
            """Return the batch's share of the step's mean loss, times the step's tokens: a sum that log() divides."""
            step = self.state.global_step  # made before this one
            return super().training_step(*rest, **named) * (tokens_until(step + 1) - tokens_until(step))  # a tensor

        def log(self, logs, *rest):  # every number passes here once, on its way to console, TensorBoard and JSON
            """Add perplexity to the line of an evaluation; speed, memory and time left to a line of training."""
            step = self.state.global_step  # after which this line is written
            if "train_loss" in logs:  # the line behind the last step
                logs["train_loss"] *= step / max(tokens_until(step), 1)  # a mean over tokens, as those below
            if "eval_loss" in logs:  # the mean over all tokens of the validation data
                loss = min(logs["eval_loss"], 700)  # exp(710) is more than a float can hold
                logs["eval_perplexity"] = math.exp(loss)  # tokens it hesitates between; evaluate() returns it, too
            if "learning_rate" in logs:  # a line of training; its loss has just waited for the device anyway
                now, last = time.time(), last_line(self.state)  # when, and after which step, the lines are written
                logs["loss"] *= (step - last) / (tokens_until(step) - tokens_until(last))  # a mean over tokens
                speed = (tokens_until(step) - tokens_until(self.logged[1])) / max(now - self.logged[0], 1e-9)  # of all
                pace = (now - self.began[0]) / (step - self.began[1])  # seconds a step, evaluations and saves included
                gpu = self.args.device.type == "cuda"  # then its memory is the one that matters
                memory = torch.cuda.max_memory_allocated() if gpu else getrusage(RUSAGE_SELF).ru_maxrss * 1024  # bytes
                logs |= {"tokens_per_second": round(speed), "tokens_seen": tokens_until(step),  # of all processes
                         "peak_memory_gb": round(memory / 1e9, 2),  # near the GPU's size it is time for the remedies
                         "minutes_left": round((self.state.max_steps - step) * pace / 60, 1)}  # to the last step
                if peak:  # on a GPU that the table above knows
                    logs["mfu"] = round(speed * flops / peak, 3)  # of the peak that banner() names
                self.logged = now, step  # where the next line's speed begins
            super().log(logs, *rest)  # to console, TensorBoard, wandb and trainer_state.json

        def evaluate(self, *rest, **named):  # in training, and at its end
            """Evaluate every chunk and leave no trace: the random state, of which dropout is made, stays as it was."""
            drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # it is meant for training
            try:  # a signal may end it
                with torch.random.fork_rng(devices=[]):  # the data loader draws a number from it
                    return super().evaluate(*rest, **named)  # metrics, which log() has completed
            finally:  # for the steps to come
                self.args.dataloader_drop_last = drop  # as the user wants it in training

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # in evaluations
            """Return (None, losses, losses), float32 of shape (batch,): one of each chunk, so that each counts once.

            The Trainer's own mean over a batch counts those chunks twice that fill up the last batch of many processes.
            """
            if self.is_in_train and (ordered := agree(stop.signal)):  # all ranks leave after the same batch
                if not self.control.should_evaluate:  # it is that of --eval_on_start
                    stop.leave(ordered, " before the first step")  # there is nothing to save
                raise Abandoned  # the step is saved now, and evaluated by the next call
            ids = self._prepare_inputs(inputs)["input_ids"]  # (batch, max_seq_length), on the device
            with torch.no_grad():  # autocast is in the model that accelerate has prepared
                result = model(input_ids=ids, labels=ids)  # the labels are the inputs
                if "token_losses" in result:  # (batch, max_seq_length - 1)
                    losses = result["token_losses"].mean(1)  # one of each chunk
                else:  # a model's own loss, the mean of a batch: one chunk at a time
                    each = [model(input_ids=row[None], labels=row[None]).loss.float() for row in ids]  # scalars
                    losses = torch.stack(each)  # (batch,): one for each chunk, as above
            return None, losses, losses  # predictions and labels: gathered over the ranks, the repeated ones dropped

        def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *rest, **named):  # after a step; again after an epoch
            """Do what is due; stop all ranks at a NaN before it is saved, or at a signal after a checkpoint."""
            step, control = self.state.global_step, self.control  # steps made; what the Trainer is about to do
            scaled = self.args.mixed_precision == "fp16"  # perhaps by the launcher: infinite norms skip their step
            noted = 0 if grad_norm is None or scaled else grad_norm  # others spoil the weights
            bad = ~torch.isfinite(tr_loss + noted) & (self.bad_step == 0)  # on the device, not waited for
            self.bad_step = torch.where(bad, step, self.bad_step)  # the first; the sum tr_loss stays NaN after it
            control.should_log |= by_epoch and step == self.state.max_steps  # wherever the last epoch ends
            ordered = agree(stop.signal)  # the number of a signal, the same on all ranks
            if ordered:  # the lines below and the Trainer do it
                control.should_save = control.should_training_stop = True  # a checkpoint, and no further step
            if control.should_log or control.should_save or control.should_training_stop:  # moments that wait anyway
                first = int(self.accelerator.gather(self.bad_step).max())  # the same on all ranks: all stop together
                if first:  # the weights are spoilt from this step on
                    causes = "a --learning_rate too high, --fp16, a broken model"  # the likeliest first
                    fail(f"the loss or gradient of step {first} is not a finite number: training stops, "  # the first
                         f"and nothing was saved after it. Usual causes: {causes}. Change that, "  # what to look at
                         "and start with another --output_dir", status=1)  # going on would end the same way

            start = time.time()  # evaluations and saves shall not count as slow training
            try:  # a log line, an evaluation, a checkpoint: what is due
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **named)  # as the Trainer does
            except Abandoned:  # a signal has come before or during the evaluation
                ordered, self.due = agree(stop.signal), True  # the next call begins with it
                self._save_checkpoint(*rest[:2])  # model and trial
            spent = time.time() - max(start, self.logged[0])  # the log line, if any, came before them
            self.logged = self.logged[0] + spent, self.logged[1]  # as if they had taken no time
            if ordered:  # the checkpoint is there
                saved = os.path.join(output_dir, f"checkpoint-{step}")  # where the same command goes on
                stop.leave(ordered, f" at step {step:,} of {self.state.max_steps:,}; saved {saved}")  # exits

        def _run_epoch(self, **named):  # the Trainer rounds up to whole epochs
            """Train an epoch, unless a call that was killed behind its last step had made all steps."""
            if self.state.global_step < self.state.max_steps:  # else one more would be made, and again by each call
                super()._run_epoch(**named)  # an epoch, or what is left of it

        def _finalize_training(self, trial, samples, start):  # the last checkpoint is there
            """Return the metrics of all calls together. From here on a signal ends the run at once."""
            stop.training = False  # no step will come that would see it: the same command does the rest
            if stop.signal:  # it came after the last step
                stop.leave(stop.signal, " after the last step")  # only the final model is missing
            self._tr_loss = self.accelerator.gather(self._tr_loss[None]).mean()  # the Trainer takes rank 0's for all
            return super()._finalize_training(trial, samples, self.started)  # also loads the best model, if asked to

        def _get_output_dir(self, trial):  # the Trainer asks where to put checkpoint-N, and which are old
            """Return .staging: what has its place in output_dir is out of the Trainer's reach, also for deletion."""
            return staging  # absent except while saving

        def _save_checkpoint(self, model, trial):  # called on all ranks at the same step
            """Save under .staging, seal with a manifest, then rename: in an instant the whole checkpoint is there."""
            name = f"checkpoint-{self.state.global_step}"  # what get_last_checkpoint() looks for
            draft, final = os.path.join(staging, name), os.path.join(output_dir, name)  # before and after the rename
            if os.path.isdir(final):  # saved already, at the end of this step or before a stop
                return  # the same state: a whole checkpoint is never touched again
            check_claim(lock, output_dir)  # another run may have taken its place
            loss = self.accelerator.gather(self._tr_loss[None]).mean().item()  # of the steps since the last log line
            progress = {"step": self.state.global_step, "max_steps": self.state.max_steps,  # finished when equal
                        "seconds": time.time() - self.started, "evaluate": self.due,  # so far; what to begin with
                        "loss": loss, "losses": self._total_loss_scalar}  # since the last line; up to it
            super()._save_checkpoint(model, trial)  # each rank writes its random state, rank 0 all else
            self.accelerator.wait_for_everyone()  # nobody is still writing
            if (self.state.best_model_checkpoint or "").startswith(staging):  # this one: all ranks will load it …
                self.state.best_model_checkpoint = final  # … from where it is going to be
            best = self.state.best_model_checkpoint  # this one, one of before, or None
            if self.args.should_save:  # rank 0, which has written most of it
                self.state.save_to_json(os.path.join(draft, "trainer_state.json"))  # with the best one's final place
                if best and self.args.load_best_model_at_end:  # without it no later call could end as this one
                    progress["best"] = os.path.relpath(*map(os.path.realpath, (best, output_dir)))  # a run may move
                seal(draft, {**facts, "progress": progress})  # checksums, and on the disk
                os.rename(draft, final)  # from this instant on it is the newest checkpoint
                os.rmdir(staging)  # empty by now
                flush(output_dir)  # the rename as well
                keep = [os.path.basename(path or "") for path in (final, best, facts["chosen"])]  # at any age
                rotate(output_dir, self.args.save_total_limit, keep)  # the oldest of the others go
            self.accelerator.wait_for_everyone()  # the others see it, too

    def agree(signal_):  # signals reach processes at different moments, but all have to stop after the same step
        """Return the highest number of a signal that any rank has received, 0 for none."""
        highest = torch.tensor(signal_)  # on the CPU, so that no GPU is waited for
        if group:  # a single process need not ask anybody
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)  # a few bytes a step, or an evaluated batch
        return highest.item()  # the same on all ranks

    class Restore(TrainerCallback):  # an event that is no method of the Trainer
        """Takes up where the last call stopped, so that logs and results cover the whole run."""

        def on_train_begin(self, args, state, control, **_):  # everything is loaded, nothing has been trained
            """Restore what the Trainer starts anew with every call."""
            stop.training = True  # from now on a signal waits for a checkpoint
            state.compute_steps(args, state.max_steps)  # a changed --logging_steps or --save_steps takes effect
            trainer.began = trainer.logged = time.time(), state.global_step  # for speed and time left
            trainer.started = time.time() - past.get("seconds", 0)  # train_runtime is that of all calls together
            trainer._total_loss_scalar, trainer._initial_global_step = past.get("losses", 0.0), 0  # for train_loss
            trainer._tr_loss += past.get("loss", 0)  # of steps that no log line has shown yet …
            trainer._globalstep_last_logged = last_line(state)  # … and the step after which they come
            if past.get("evaluate"):  # the last call was stopped before it could
                for row in [row for row in state.log_history if row["step"] == state.global_step]:  # of this step
                    row = {name: value for name, value in row.items() if name != "step"}  # as log() had it
                    trainer.callback_handler.on_log(args, state, control, row)  # the curve goes on from before it
                control.should_evaluate = True  # the result is logged at its own step
                trainer._maybe_log_save_evaluate(trainer._tr_loss, *[None] * 6)  # or left to the next call once more
            new = state.best_global_step == state.global_step  # by the evaluation above, or one before the save
            best = f"checkpoint-{state.global_step}" if new else past.get("best")  # this one, or one of before
            if best:  # to be loaded at the end, if asked for
                state.best_model_checkpoint = os.path.join(past["folder"], best)  # the run may have been moved

    trainer = ReliableTrainer(  # it also sets the seed and makes optimizer and schedule
        model=model,  # moved to the device here
        args=training_args,  # everything from the command line
        train_dataset=train and train.with_format("torch"),  # chunks, shuffled anew every epoch; tensors, because …
        eval_dataset=validation and validation.with_format("torch"),  # … lists of Python's numbers take long to stack
        data_collator=collate,  # chunks → batches
        processing_class=tokenizer,  # saved beside every checkpoint and the final model
        callbacks=[Restore()],  # after the Trainer's own
        compute_metrics=lambda seen: {"loss": seen.predictions.mean()},  # all chunks have as many tokens: a plain mean
    )
    model.to(training_args.device)  # where it is already, but for --bf16_full_eval
    if not (training_args.use_liger_kernel or training_args.torch_compile):  # which have lean ones of their own
        use_lean_norms(model)  # a third less to keep for the backward pass
    with trainer.accelerator.autocast():  # 16 bits, without which Flash Attention refuses the trial of eight tokens
        if not use_chunked_loss(model):  # on the device by now
            say("note     this model has no plain head: its own loss is used, "  # slower, and with more memory
                "which holds all logits in memory")  # halve the batch if it is too much
    if "tensorboard" in training_args.report_to and training_args.process_index == 0:  # the others write nothing
        use_one_curve(trainer, past)  # however often the run is stopped
    return trainer  # ready to train or to evaluate


def use_one_curve(trainer, past):  # the Trainer's own callback opens a folder for each call
    """Let TensorBoard show one curve in output_dir/runs. past (dict): the progress that the run goes on from, or {}."""
    from torch.utils.tensorboard import SummaryWriter  # the files that tensorboard --logdir reads
    from transformers.integrations import TensorBoardCallback  # the Trainer has added one without purge_step

    trainer.remove_callback(TensorBoardCallback)  # it would open a folder for each call
    runs = os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(trainer.args.output_dir, "runs")  # for every call
    if not past or past["step"] < past["max_steps"] or past["evaluate"]:  # something is left to be shown
        first = past.get("step", -1) + 1 - past.get("evaluate", False)  # the first step to come, or to be shown anew
        first = None if trainer.train_dataset is None else first  # --do_eval adds a point
        board = TensorBoardCallback(SummaryWriter(runs, purge_step=first))  # hides what was written from there on
        board._SummaryWriter = None  # or the final evaluation, a result, would open another folder and curve
        trainer.add_callback(board)  # flushes after every line, closes after the last step
        # The writer's thread ends with a traceback when the disk is full or gone: the next line says it in a sentence.
        threading.excepthook = lambda end: issubclass(end.exc_type, OSError) or threading.__excepthook__(end)  # only


def banner(args, training_args, model, train, validation):  # read it before a night of training
    """Say in six lines what is about to happen, and in notes what of it is allowed, but seldom meant."""
    world, autocast = training_args.world_size, training_args.mixed_precision  # processes; "no", "bf16" or "fp16"
    dtype = "float32" if autocast == "no" else f"{autocast} autocast"  # of matrix products
    peak = peak_flops(training_args)  # of all processes
    assumed = f"; MFU against {peak / 1e12:,.0f} TFLOP/s" if peak else ""  # said once, here
    parameters = sum(weight.numel() for weight in model.parameters())  # the tied head is counted once
    data = [f"{name} {len(chunks):,} chunks = {len(chunks) * args.max_seq_length:,} tokens"  # of all that is used
            for name, chunks in (("train", train), ("validation", validation)) if chunks is not None]  # one or both
    say(  # the first half: what trains where on what
        f"model    {args.model_name_or_path}, {parameters:,} parameters in float32, "  # the weights
        f"{model.config._attn_implementation} attention",  # sdpa or flash_attention_2
        f"device   {training_args.device.type}, {world} process{'es' if world > 1 else ''}, {dtype}{assumed}",  # where
        f"data     {', '.join(data)}",  # how much text there is for each
    )
    if train is not None:  # --do_eval has no plan of steps
        chunks, accumulation = len(train), args.gradient_accumulation_steps  # in an epoch; batches in a step
        batch, used, epoch = epoch_of(chunks, training_args)  # chunks in a forward pass; chunks and steps in an epoch
        total = batch * accumulation  # chunks in one optimizer step
        steps = math.ceil(args.num_train_epochs * epoch)  # as the Trainer counts them; half an epoch is possible
        if training_args.max_steps > 0:  # overrides the epochs
            steps = training_args.max_steps  # -1 where it was not given
        warmup = training_args.get_warmup_steps(steps)  # a fraction below 1 is one of all steps
        if training_args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy"):  # start at the peak
            warmup = 0  # whatever the flag says
        say(  # the second half: the plan
            f"batch    {args.per_device_train_batch_size} per device × {accumulation} accumulation × "  # in turn
            f"{world} = {total:,} chunks = {total * args.max_seq_length:,} tokens a step",  # for which the rate is made
            f"steps    {steps:,} ({steps / epoch:.3g} epochs), learning rate {args.learning_rate:g}, "  # at its peak
            f"warm-up {warmup:,} steps",  # from zero to that peak
        )

        if warmup >= steps:  # the default of 500 is made for long runs; its first step has the rate 0
            reached = f"it reaches only {(steps - 1) / warmup:.1%} of the learning rate"  # in its last step
            reached = reached if steps > 1 else "its one step has the learning rate 0 and learns nothing"  # a trial run
            say(f"note     the run is shorter than its warm-up: {reached}; "  # surely not meant
                f"lower --warmup_steps, to {steps // 10} for example")  # a tenth is usual
        if used == 0:  # the Trainer would make steps of nothing
            fail(f"--dataloader_drop_last leaves nothing to train on: {chunks:,} chunks make no batch of "  # so few
                 f"{batch:,}; leave it out, or lower --per_device_train_batch_size")  # both leave some to train on
        if used < total:  # a handful of texts and the default accumulation
            say(f"note     all {used:,} chunks make less than one step of {total:,}: lower "  # more steps learn more
                f"--gradient_accumulation_steps to {max(1, used // batch)} for a full one")  # what the data fills
        elif used % total:  # nearly always; worth knowing when epochs are short
            say(f"note     the last step of each epoch has {used % total:,} of {total:,} chunks")  # fewer than usual
        if used < chunks:  # others in the next epoch
            say(f"note     {chunks - used:,} chunks are left out of each epoch: --dataloader_drop_last")  # as asked for
        elif world > 1 and chunks % batch:  # all processes must make the same forward passes
            again = batch - chunks % batch  # the first ones of the epoch, in its last pass
            say(f"note     {again:,} chunks are trained on twice an epoch, to give every process as many")  # a few
        if validation is None and "--eval_steps" in args.given:  # a flag that has no effect
            say("note     --eval_steps has no effect without validation data: give --validation_file")  # to evaluate
        if not 1e-6 <= args.learning_rate <= 1e-3:  # full fine-tuning of a model this small
            say(f"note     --learning_rate {args.learning_rate:g} is unusual: this model takes 1e-5 to 1e-4")  # about
        there = len(glob.glob("checkpoint-*", root_dir=args.output_dir))  # of an earlier call
        needed = (args.save_total_limit + 1 - there) * 12 * parameters  # bytes; + 1: the old one goes after the new
        free = shutil.disk_usage(args.output_dir).free  # bytes that this user may still write
        if free < needed:  # 12 bytes a parameter: the weights and Adam's two moments in float32
            say(f"warning  {needed / 1e9:.2g} GB will be needed for checkpoints in {args.output_dir}, where "  # at most
                f"{free / 1e9:.2g} GB are free: make space or lower --save_total_limit")  # each of them is enough
    say(f"output   {args.output_dir} (tensorboard --logdir {os.path.join(args.output_dir, 'runs')})")  # where to look


def evaluate_and_save(trainer, known=None):  # --do_eval, and the end of every training with validation data
    """Save loss and perplexity on the validation data to eval_results.json and all_results.json.

    Args: known (dict or None): metrics of this very model, from training's last step; None evaluates it now.
    """
    metrics = known or trainer.evaluate()  # the mean loss over all chunks of all processes
    metrics["perplexity"] = metrics.pop("eval_perplexity")  # the name under which transformers' scripts save it
    save_metrics(trainer, "eval", metrics)  # eval_results.json, and joined to train's in all_results.json


def save_metrics(trainer, split, metrics):  # of "train" or "eval"
    """Print metrics as a table, write them to {split}_results.json, and join them to those in all_results.json."""
    trainer.log_metrics(split, metrics)  # on the console, of rank 0
    try:  # reads what all_results.json holds already
        trainer.save_metrics(split, metrics)  # rank 0 writes
    except ValueError:  # a kill has cut it short
        os.remove(os.path.join(trainer.args.output_dir, "all_results.json"))  # made from what is saved now
        trainer.save_metrics(split, metrics)  # now it makes a new one


def train_and_save(trainer, checkpoint, facts, lock):  # the night: after a kill anywhere in it the same command goes on
    """Train, save model and tokenizer to output_dir, evaluate, and save the metrics beside them.

    Args: checkpoint (str or None): where to go on from; when it is the last one of the run, only the rest is done.
        facts (dict): for the manifest, which is written last: the sign of a finished run. lock: the file of claim().
    """
    output_dir = trainer.args.output_dir  # from_pretrained() will read it
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics  # hours; a signal ends the process in here
    check_claim(lock, output_dir)  # another run may have taken its place
    staging = os.path.join(output_dir, ".staging")  # a kill in here leaves no half model: the same command goes on
    trainer.model.config.use_cache = True  # generation with the saved model wants its cache back
    trainer.save_model(staging)  # model.safetensors, config.json, tokenizer; all ranks call it, rank 0 writes
    if trainer.args.should_save:  # rank 0, whose files these are
        trainer.state.save_to_json(os.path.join(staging, "trainer_state.json"))  # the log of the whole run
        seal(staging, {**facts, "progress": {"step": trainer.state.global_step}})  # a checksum of every file
        for name in sorted(os.listdir(staging), key=lambda name: name.endswith(".safetensors")):  # the weights last
            if name != "manifest.json":  # waits for the metrics
                os.replace(os.path.join(staging, name), os.path.join(output_dir, name))  # whole or absent

    if trainer.eval_dataset is not None:  # held-out text says whether it learnt or memorized
        rows = [row for row in trainer.state.log_history if "eval_loss" in row][-1:]  # the last one in training
        best = trainer.args.load_best_model_at_end  # then the model is no longer that of the last step
        same = rows and rows[0]["step"] == trainer.state.global_step and not best  # nothing new to measure
        evaluate_and_save(trainer, {**rows[0]} if same else None)  # loss and perplexity
    save_metrics(trainer, "train", metrics)  # train_results.json and all_results.json
    if trainer.args.should_save:  # rank 0, as before
        os.replace(os.path.join(staging, "manifest.json"), os.path.join(output_dir, "manifest.json"))  # finished
        shutil.rmtree(staging, ignore_errors=True)  # empty by now; if this is killed, the next start removes it
        flush(output_dir)  # all renames above are on the disk before the exit status says so


def explain(error, trainer):  # what has ended a training or an evaluation
    """End the run with one sentence for an error that the user can mend; return for any other."""
    from safetensors import SafetensorError  # its word for a disk that is full

    words, output_dir = " ".join(str(error).split()), trainer.args.output_dir  # the error's own words, on one line
    full = "out of memory" in words or "can't allocate memory" in words  # CUDA's words; the CPU's
    if full or isinstance(error, MemoryError):  # Python's own and numpy's
        fail(f"out of memory on {trainer.args.device}: {REMEDIES}", status=1)  # the data is right, the call too
    disk = isinstance(error, (OSError, SafetensorError))  # No space left on device, Read-only file system, …
    if disk or re.search("PytorchStreamWriter|inline_container|strerror|os error", words):  # torch's; the tokenizer's
        for draft in glob.glob(os.path.join(glob.escape(output_dir), ".staging", "checkpoint-*")):  # half a checkpoint
            shutil.rmtree(draft, ignore_errors=True)  # gives its space back
        needed = 12 * sum(weight.numel() for weight in trainer.model.parameters())  # float32 weights, Adam's two
        free = shutil.disk_usage(output_dir).free if os.path.isdir(output_dir) else 0  # bytes; 0: it is gone
        fail(f"--output_dir {output_dir} cannot be written ({words}). "  # where and why
             f"A checkpoint needs {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB are free. "  # both in gigabytes
             "What was saved before is whole: make space or mend that, then the same command goes on", 1)  # no loss
    if isinstance(error, (ImportError, ValueError)):  # --use_liger_kernel without its package, --adam_beta1 2, …
        fail(f"a flag of the Trainer cannot be used: {words}")  # it is known only where it is used


def main(argv=None):  # the table of contents
    """Run the steps in their order; each is a function above. argv (list[str] or None): as for parse_args."""
    stop = Stop()  # from here on a signal ends the run with a sentence
    args = parse_args(argv)  # a wrong call ends here, at once
    training_args = make_training_arguments(args)  # from here on torch, the device and the other processes are known
    from transformers import set_seed  # of torch, numpy and Python at once
    from transformers.trainer_utils import IntervalStrategy  # "no", "steps" or "epoch"

    set_seed(args.seed)  # new embedding rows, if any, are the same in every run
    facts = {"settings": run_settings(args, training_args)}  # for the manifests of this run
    facts["chosen"] = args.resume_from_checkpoint  # by this an interrupted call of the same command is known again
    facts["versions"] = {name: version(name) for name in ("torch", "transformers")}  # they may round differently …
    facts["versions"]["device"] = training_args.device.type  # … as may the device: going on is allowed, with a warning
    checkpoint, manifest, lock = None, {}, None  # a fresh start …
    if not args.evaluate_only:  # … unless an earlier call was stopped
        lock = claim(args.output_dir) if RANKS.rank == 0 else None  # the file is kept open until the end
        found = find_checkpoint(args.output_dir, args.resume_from_checkpoint, facts["settings"])  # path, manifest
        checkpoint, manifest = same_run(args, *found, facts["settings"])  # or a sentence, before minutes of work
    if checkpoint == args.output_dir:  # the final model is there, and whole
        say(f"This run finished at step {manifest['progress']['step']:,}: nothing is left to train.",  # exit status 0
            f"Its model is in {args.output_dir}; to train it further, start a new run from it with "  # its rate …
            f"--model_name_or_path {args.output_dir} and another --output_dir.")  # … has fallen to zero
        return  # before tokenizer, data and weights are loaded

    tokenizer = load_tokenizer(args.model_name_or_path, args.max_seq_length)  # the hub's first answer
    if RANKS.local:  # one process a machine prepares …
        RANKS.wait()  # … the others read its cache
    train, validation = load_and_prepare_dataset(args, tokenizer, args.overwrite_cache and not RANKS.local)  # chunks
    if not RANKS.local:  # the data of this machine is prepared
        RANKS.wait()  # lets the others go on, when it is so on all machines
    if validation is None:  # nothing to evaluate on
        if training_args.load_best_model_at_end:  # asked for by a Trainer flag
            fail("--load_best_model_at_end needs validation data: give --validation_file")  # best by what?
        training_args.eval_strategy = IntervalStrategy.NO  # --eval_steps has no meaning then

    model = load_model(args.model_name_or_path, tokenizer, args.use_flash_attention)  # float32, still on the CPU
    found = digests(model, train, validation)  # the same files, to the last token and weight?
    RANKS.compare("data", found)  # each machine may have copies of its own
    if not args.evaluate_only:  # is the checkpoint's run really this one?
        facts["settings"] |= {name: found[name] for name in ("model", "train_data")}  # that decide the weights
        checkpoint, manifest = same_run(args, checkpoint, manifest, facts["settings"])  # or a sentence
    past = facts["progress"] = manifest.get("progress", {})  # what earlier calls did: the step, the losses, the time
    if past:  # an earlier call has made some steps, or all of them
        training_args.eval_on_start = False  # an earlier call has made it, if asked for
        past["folder"] = os.path.dirname(checkpoint)  # where the best one lies, too

    RANKS.wait()  # one machine may still be downloading: from here on --ddp_timeout is the limit
    try:  # parts that are asked for by a flag and not there
        trainer = make_trainer(model, tokenizer, training_args, train, validation, stop, facts, lock)  # on the device
    except Exception as error:  # --report_to mlflow without mlflow, --push_to_hub without a network, …
        if "out of memory" in str(error):  # the GPU is taken, or too small for the weights alone
            fail(f"out of memory on {training_args.device}: {REMEDIES}", status=1)  # as in training
        words = " ".join(str(error).split())  # its own words, on one line
        fail(f"the Trainer cannot be set up ({type(error).__name__}): {words}")  # a flag asks for what is not there
    banner(args, training_args, model, train, validation)  # the plan, before the first step
    if checkpoint:  # the same command again
        say(f"Going on from {checkpoint}, step {past['step']:,} of {past['max_steps']:,}.")  # how far it had come
        if manifest["versions"] != facts["versions"]:  # not refused: a run may move to another machine
            say(f"warning  the weights may differ in their last bits: the run began with "  # and why:
                f"{manifest['versions']}, and goes on with {facts['versions']}")  # torch, transformers or the device
    try:  # a full GPU shows at the first step, or at the first evaluation
        if args.evaluate_only:  # --do_eval alone
            evaluate_and_save(trainer)  # loss and perplexity
        else:  # --do_train, or neither of the two
            train_and_save(trainer, checkpoint, facts, lock)  # the finished model in output_dir
    except Exception as error:  # a full GPU, a full disk, …
        explain(error, trainer)  # in a sentence, if the user can mend it
        raise  # not ours to explain
    finally:  # however it ends
        stop.end_helpers()  # with all that it has started
    results = os.path.join(args.output_dir, "all_results.json")  # loss, perplexity, speed
    say(f"Done: the metrics are in {results}" if args.evaluate_only else  # of an evaluation alone
        f"Done: the model is in {args.output_dir}, its metrics in {results}.")  # for from_pretrained()


if __name__ == "__main__":  # imported by tests, which call the functions above
    RANKS.run(main)  # python main.py, accelerate launch main.py
