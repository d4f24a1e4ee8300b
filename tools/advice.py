"""What is wrong with what people bring to a training, and what to do: words for the sentences of main.py.

main.py knows what is right, and asks here once something is wrong, or might be: advice("file", flag, path, endings).
Each function takes facts and returns words, or "" where it knows nothing better than main.py does by itself. Nothing
here changes what is trained: without this file main.py trains the same, and ends with shorter sentences, or later.
"""
import difflib  # the nearest name
import glob  # what an output_dir holds
import gzip  # looks into .gz files
import itertools  # numbers for names of new files
import json  # objects that span lines
import os  # permissions, the environment
import re  # libraries' errors are known by their words
import runpy  # reads foreign_flags.py
import shlex  # quotes paths for the shell
import shutil  # free space
import traceback  # errors with all their causes
import unicodedata  # kinds of letters
from contextlib import suppress  # what cannot be read here is left to main.py
from importlib.metadata import distributions  # which flash-attn is installed
from types import SimpleNamespace  # arguments with changes

HEAD = 4096  # bytes of a file that tell its kind

def in_one_line(error):  # → str: kind and words of an error and all its causes
    return " ".join(" ".join(traceback.format_exception(error, limit=0)).split())  # without line breaks
def is_gzip(path):  # by its name, as main.py tells it
    return path.lower().endswith(".gz")  # .GZ, too
def opener(path):  # → the function that reads a file, unpacked where its name says that it is gzipped
    return gzip.open if is_gzip(path) else open  # both take the same arguments
def nearest(name, names):  # → " (did you mean 'text'?)", or "" if none of names is similar
    known = {other.lower(): other for other in names}  # TEXT is near to text
    close = difflib.get_close_matches(name.lower(), known, n=1)  # the nearest one, if at least 0.6 similar
    return f" (did you mean {known[close[0]]!r}?)" if close else ""  # goes behind the wrong name
def shell(path):  # → a path as it is typed
    return shlex.quote(f"./{path}" if path.startswith("-") else path)  # no command takes it for an option
def fresh(path, ending=""):  # → the name of a new file in the current directory, made from that of a path
    stem, kind = os.path.splitext(re.sub(r"\.gz$", "", os.path.basename(path), flags=re.I))  # without .gz
    counts = map(str, itertools.count(1))  # "1", "2" and so on
    names = (f"new{count}-{stem.lstrip('-')}{ending or kind}" for count in counts)  # the first that is free
    return shell(next(name for name in names if not os.path.lexists(name)))  # nothing is written over

# ── The call ───────────────────────────────────────────────────────────────────────────────────────
def flag(name, known):  # name (str): an unknown flag, such as --block_size or LitGPT's --train.micro_batch_size
    """Return ": " and what does here what the flag does in another trainer, or the nearest of the known flags."""
    table = runpy.run_path(os.path.join(os.path.dirname(__file__), "foreign_flags.py"))["FOREIGN"]  # 260 flags
    words = table.get("--" + name.lower().lstrip("-").rpartition(".")[2])  # None for a misspelt flag
    return f": {words}" if words else nearest(name, known)  # "" if none is near

def call(args, say):  # args: Namespace of parse_args(); say (function): prints a line
    """Return what is wrong with a call, or "": what would fail after minutes, or be ignored. Say what is odd."""
    files = args.train_file + args.validation_file  # absolute paths
    documents = [path for path in files if re.search(r"\.(txt|md)(\.gz)?$", path.lower())]  # files without rows
    versions = {(found.version or "")[:1] for found in distributions(name="flash-attn")}  # 4 is flash-attn-4
    model, folder = args.model_name_or_path, args.dataset_name or ""  # names of the hub, or directories
    configs = [os.path.join(model, name) for name in ("config.json", "adapter_config.json")]  # if model is a directory
    flags = [part for word in args.trainer_argv for part in word.split("=", word.startswith("--"))]  # --a=b is --a b
    words = " ".join(flags)  # of the Trainer, which has not parsed them so far
    best = re.search("--load_best_model_at_end(?! (?i:false|f|no|n|0)( |$))", words)  # None: not asked for
    steps = not re.search("--(save|eval)_strategy (?!steps)", words)  # True: both happen at steps
    output = args.output_dir  # may not exist yet
    marks = (".lock", "manifest.json", "checkpoint-[0-9]*")  # of a training
    patient = bool(args.early_stopping_patience)  # it keeps the best model, too
    asks = "--early_stopping_patience" if patient else "--load_best_model_at_end"  # which flag wants evaluations
    no_best = re.search("--load_best_model_at_end (?i:false|f|no|n|0)( |$)|--no_load_best_model_at_end", words)  # asked
    split = args.validation_split_percentage or 0  # percent of the training data that are held out
    faults = [  # (whether it is wrong, the sentence)
        (not os.path.exists(os.readlink("/proc/self/cwd")),  # "… (deleted)"
         "the current directory was removed: cd to another"),
        ((best or patient) and steps and args.save_steps != args.eval_steps,  # the best one would be lost
         f"{asks} needs a checkpoint of each evaluation: make --save_steps equal to --eval_steps"),
        (patient and no_best,  # the last weights are worse than those of some evaluations before
         "--early_stopping_patience ends with the best model: leave --load_best_model_at_end out"),
        (split >= 100,  # nothing would be left
         f"--validation_split_percentage {split:g} leaves nothing to train on: choose one below 100, such as 5"),
        (args.evaluate_only and (split or args.dry_run),  # there is no training
         f"{'--validation_split_percentage' if split else '--dry_run'} is for a training: leave it out of --do_eval"),
        (split and args.validation_file,  # there is validation data
         "--validation_split_percentage and --validation_file exclude each other: leave one out"),
        (args.evaluate_only and any(glob.glob(mark, root_dir=output) for mark in marks),  # would be mixed
         f"--output_dir {output} holds a training run: choose another for --do_eval"),
        (os.path.exists(configs[1]),  # of PEFT, alone or beside its base
         f"--model_name_or_path {model} holds an adapter, which would be ignored: save the model with the adapter "
         "merged into it (merge_and_unload), and give that directory"),
        (args.use_flash_attention and versions != {"2"},  # missing, or another version
         "--use_flash_attention needs flash-attn 2: pip install flash-attn --no-build-isolation"),
        (args.ddp_backend and os.environ.get("WORLD_SIZE", "1") == "1",  # torch would miss the others
         "--ddp_backend is for several processes: leave it out, or start them with accelerate launch"),
        (args.dataset_config_name and not args.dataset_name,  # files have no configurations
         "--dataset_config_name is for --dataset_name: leave it out"),
        (args.text_column != "text" and files and len(documents) == len(files),  # no file has columns
         "--text_column is for files with columns; .txt and .md have none: leave it out"),
        (args.seed >= 2**32, f"--seed {args.seed} is too large: choose one below {2**32:,}"),  # numpy takes 32 bits
        ("--sample_by" in args.given and not (documents or os.path.isdir(folder)),  # no document is there
         "--sample_by is for .txt and .md files; of this data each row is a text: leave it out"),
        (args.evaluate_only and args.resume_from_checkpoint,  # an evaluation has no steps
         f"--do_eval goes on from nothing: give --model_name_or_path {args.resume_from_checkpoint}"),
        (os.path.isdir(model) and not os.access(model, os.R_OK | os.X_OK),  # of another user
         f"--model_name_or_path {model} cannot be read: no permission for the directory (try chmod +rx)"),
        (os.path.isdir(model) and not any(map(os.path.exists, configs)),  # not even that of an adapter
         f"--model_name_or_path {model}: no config.json, which each saved model has; give the directory of one")]
    for name, value in (("--model_name_or_path", model), ("--dataset_name", folder)):  # here, or on the hub
        local = value.startswith((".", os.sep)) or value.count("/") > 1 or os.path.isfile(value)  # no hub name
        faults.append((local and not os.path.isdir(value),  # else the hub is asked for half a minute
                       f"{name} {value}: no such directory; give one, or a hub name (text goes to --train_file)"))
    for name, value in zip(flags, flags[1:], strict=False):  # pairs of neighbouring words
        faults.append((name.endswith("_kwargs") and no_object(value),  # it is a JSON object that is asked for
                       f"{name} {value} is no JSON object such as '{{\"min_lr\": 1e-6}}': {no_object(value)}"))
    train = [*map(os.path.realpath, args.train_file)]  # without links
    validation = [*map(os.path.realpath, args.validation_file)]  # without links
    for path in sorted({*train} & {*validation}):  # as a glob may bring it about
        say(f"note     {path} is training and validation data: an evaluation shows what was memorized")  # perhaps meant
    for given in (train, validation):  # by a glob and by its name, say
        pairs = zip(sorted(given), sorted(given)[1:], strict=False)  # equal ones are side by side
        for path in [path for path, other in pairs if path == other]:  # once for each time too much
            say(f"note     {path} is given twice, and counts twice")  # perhaps meant
    return next((sentence for wrong, sentence in faults if wrong), "")  # the first fault is enough

def no_object(text):  # → why a text is no JSON object, or ""
    try:  # the Trainer would not name the flag
        return "" if isinstance(json.loads(text), dict) else "it is another kind of value"  # a list, say
    except ValueError as error:  # quotes that the shell has taken away, mostly
        return str(error)  # with the place

def trainer(plan, args):  # plan: TrainingArguments; args: Namespace of parse_args()
    """Return what is wrong with the flags of the Trainer, or "": what would fail behind data and model."""
    import torch  # main.py has loaded it
    known = torch._dynamo.list_backends(())  # names of compilers, with those for tests
    wanted = args.torch_compile or {}  # of torch.compile; empty: nothing is compiled
    backend, mode = wanted.get("backend"), wanted.get("mode")  # None where none was asked for
    pushed = [flag for flag in args.given if re.match("--(hub_|push_to_hub)", flag)]  # what is to be uploaded, and how
    odd = sorted({*pushed} - {"--push_to_hub", "--hub_model_id", "--hub_token", "--hub_private_repo"})  # of no use here
    old = plan.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0)  # a T4 or V100
    faults = [  # (whether it is wrong, the sentence)
        (plan.max_steps < 1 and plan.max_steps != -1,  # -1 stands for not given
         f"--max_steps: {plan.max_steps} must be at least 1, or be left out to train --num_train_epochs"),
        (backend and backend not in known,  # a typo
         f"--torch_compile_backend {backend}: known are {', '.join(known)}"),
        (mode not in (None, "default", "max-autotune-no-cudagraphs"),  # torch documents it for accumulation
         f"--torch_compile_mode {mode}: known are default and max-autotune-no-cudagraphs; the others use CUDA graphs, "
         "which cannot add up the gradients of several batches"),
        (plan.use_liger_kernel and backend,  # Liger would replace parts of compiled layers
         "--use_liger_kernel and --torch_compile exclude each other: leave one out"),
        (pushed and args.evaluate_only,  # nothing is made
         f"{', '.join(pushed)} is for a training: leave it out of --do_eval"),
        (odd, f"{', '.join(odd)}: the finished model is uploaded once, to the main branch; leave it out"),  # no
        (pushed and "--push_to_hub" not in pushed,  # they would be ignored
         f"{', '.join(pushed)} is for --push_to_hub: give that, too, or leave it out"),
        (old and plan.mixed_precision == "bf16", "--bf16 needs an A40 or a newer GPU: use --fp16")]  # emulated, slow
    return next((sentence for wrong, sentence in faults if wrong), "") or optimizer(plan, args.given)  # the first

def optimizer(plan, given):  # plan: TrainingArguments; given: flags as typed
    """Return what is wrong with the optimizer and the schedule of a run, or "": both are made, for one weight."""
    import torch  # main.py has loaded it
    from transformers import Trainer, get_scheduler  # as they make both for the run
    weight = torch.nn.Linear(1, 1)  # stands for the model
    def recipe(**changes):  # → (class, arguments) of the optimizer with other flags
        return Trainer.get_optimizer_cls_and_kwargs(SimpleNamespace(**vars(plan) | changes), weight)  # may raise
    what = f"--optim {plan.optim.value}"  # names the flags in the sentence
    what += f" with --optim_args {plan.optim_args}" * bool(plan.optim_args)  # if given
    try:  # a package may be missing, a number out of range, a name unknown
        kind, numbers = recipe()  # of the flags as they are
        parts = filter(None, (plan.optim_args or "").split(","))  # "name=value" each
        ignored = [f"--optim_args {part}" for part in parts  # the Trainer drops names that it does not know
                   if recipe(optim_args=part) == recipe(optim_args=None)]  # no difference
        ignored += [name for name in ("--adam_beta1", "--adam_beta2", "--adam_epsilon")  # where it is no Adam
                    if name in given and recipe(**{name[2:]: 0.123}) == (kind, numbers)]  # no difference
        if "--optim_target_modules" in given and not re.search("galore|apollo", plan.optim.value):  # for these alone
            ignored.append("--optim_target_modules")  # the Trainer does not look at it
        if ignored:  # the run would not be what was asked for
            return f"{', '.join(ignored)} changes nothing for --optim {plan.optim.value}: leave it out"  # or misspelt
        made = kind(weight.parameters(), **numbers)  # looks at its numbers
        what = f"--lr_scheduler_type {plan.lr_scheduler_type.value}"  # the next to be made
        what += f" with --lr_scheduler_kwargs {plan.lr_scheduler_kwargs}" * bool(plan.lr_scheduler_kwargs)  # if given
        if plan.lr_scheduler_kwargs and "type constant" in what:  # transformers drops them
            return f"{what}: it takes none; leave them out"  # constant, constant_with_warmup
        schedule = get_scheduler(plan.lr_scheduler_type, made, 1, 9, plan.lr_scheduler_kwargs)  # warm-up 1 of 9 steps
        for factor in getattr(schedule, "lr_lambdas", ()):  # step → part of the learning rate
            [float(factor(step)) for step in range(9)]  # a number in quotes fails only here
    except Exception as error:  # of any kind, in the words of transformers or torch
        return f"{what} cannot be used: {' '.join(str(error).split())}{way_on(str(error))}"  # what is missing or wrong
    return ""  # both can be made

def way_on(words):  # words (str): of an error on a schedule's or an optimizer's arguments → what to do, or ""
    if found := re.search(r"missing .* argument: '(\w+)'", words):  # as warmup_stable_decay needs one
        return f"; give it, for example --lr_scheduler_kwargs '{{\"{found[1]}\": 100}}'"  # steps
    if re.search("unexpected keyword", words):  # of another schedule, or misspelt
        return "; leave it out"  # the sentence names it
    if re.search("unsupported operand|not supported between|could not convert|must be real", words):  # '"1e-6"'
        return "; write numbers, without quotes"  # JSON tells "1" from 1
    return ""  # the library says it

# ── Files ──────────────────────────────────────────────────────────────────────────────────────────
PICTURE = "is a picture, which holds no text: leave it out"  # of any kind
SIGNATURES = {  # first bytes of a file → what it is, and how its text is had; {path}, {new}: for a command
    b"PK\x03\x04": "is a zip archive (.docx and .xlsx are, too): unpack it, or save its text, or CSV",  # of office
    b"%PDF": "is a PDF: get its text out first, for example with pdftotext {path} {new}",  # of poppler-utils
    b"(\xb5/\xfd": "is zstd data: unpack it with zstd -dc {path} > {new}",  # .zst
    b"BZh": "is bzip2 data: unpack it with bzip2 -dc {path} > {new}",  # .bz2
    b"\xfd7zXZ": "is xz data: unpack it with xz -dc {path} > {new}",  # .xz
    b"7z\xbc\xaf": "is a 7z archive: unpack it",  # .7z
    b"Rar!": "is a RAR archive: unpack it",  # .rar
    b"ARROW1": "is an Arrow file: save its table as parquet, or give --dataset_name the data set it belongs to",  # IPC
    b"\xff\xff\xff\xff": "is an Arrow stream: give --dataset_name the folder that save_to_disk made",  # of datasets
    b"SQLite format": "is a database: export the text as CSV, for example with sqlite3 -csv -header",  # .db
    b"{\\rtf": "is an RTF document: save it as plain text",  # of a word processor
    b"\xd0\xcf\x11\xe0": "is an old Office document: save it as plain text or CSV",  # .doc, .xls
    b"\x89PNG": PICTURE, b"\xff\xd8\xff": PICTURE, b"GIF8": PICTURE,  # .png, .jpg, .gif
    b"\x7fELF": "is a program, which holds no text: leave it out",  # for Linux
    b"version https://git-lfs": "is a pointer of Git LFS, not the data: run git lfs pull where it comes from"}  # a stub
UTF = {"utf-32-le": "UTF-32LE", "utf-32-be": "UTF-32BE", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}  # for iconv
MARKS = {b"\xff\xfe\0\0": "utf-32-le", b"\0\0\xfe\xff": "utf-32-be",  # beginnings of marked text
         b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}  # behind those of four bytes

def absent(path):  # path (str): of no file that can be seen
    """Return why, and the name of a neighbour that may be meant."""
    try:  # the folder above may be closed
        os.lstat(path)  # does not follow a link
    except PermissionError as error:  # of another user
        return f"cannot be read: no permission for a folder above it ({error.strerror})"  # it may be there
    except OSError:  # the usual case
        pass  # no file, no folder
    return "no such file" + nearest(path, neighbours(path))  # a misspelt name

def neighbours(path):  # → paths of the files beside path
    folder = os.path.dirname(path)  # "" for the current directory
    with suppress(OSError):  # there may be no such folder
        return [os.path.join(folder, name) for name in os.listdir(folder or ".")]  # written as path is
    return []  # nothing is near

def folder(flag, path):  # path (str): of a directory that holds files to read
    """Return the sentence on a folder that must not be read file by file, or ""."""
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):  # of datasets
        return f"{flag} {path} is a data set that save_to_disk made: give it to --dataset_name"  # Arrow
    faults = []  # of folders below
    for _ in os.walk(path, onerror=faults.append, followlinks=True):  # as main.py does
        pass  # what cannot be listed would be left out
    return f"{flag} {faults[0].filename} cannot be read: {faults[0].strerror}" if faults else ""  # no permission, say

def file(flag, paths, endings):  # paths (list of str): of files of any name; endings: known ones
    """Return the sentence on the first file that cannot be read as text, or ""."""
    for path in paths:  # in their order
        fault = unreadable(path) or strange(path) or unknown(path, endings)  # strange() may already look inside
        if fault:  # the first one is enough
            return f"{flag} {path} {fault}"  # what it is, and what to do
    return ""  # main.py reads them

def unreadable(path):  # → what is wrong with a file, whatever it holds, or ""
    try:  # os.path.exists() would tell no reasons
        os.stat(path)  # follows links
    except FileNotFoundError:  # glob finds a link, open() does not
        return f"is a link to {os.path.realpath(path)}, which is not there: give the file itself"  # moved, or removed
    except OSError as error:  # a closed folder, a loop of links
        return f"cannot be read: {error.strerror}"  # in Linux's words
    if not os.path.isfile(path):  # such as <(zcat …) of a shell
        return "is a pipe or a device, which can be read only once: write its content into a file first"  # read twice
    if not os.access(path, os.R_OK):  # of another user
        return "cannot be read: no permission to read it (try chmod +r)"  # or ask its owner
    return "" if os.path.getsize(path) else "is empty: look how it was made"  # often a failed export

def head_of(path, unpack=None):  # unpack: gzip.open, open or None for opener(path) → bytes: the beginning of a file
    with suppress(OSError, EOFError, gzip.zlib.error):  # main.py says why, when it reads the file
        with (unpack or opener(path))(path, "rb") as source:  # may be no gzip data
            return source.read(HEAD)  # may be shorter
    return b""  # nothing is known

def strange(path):  # → what a file holds that is no text in UTF-8, by its first bytes, or ""
    raw, head = head_of(path, open), head_of(path)  # up to 4 kB each; head: b"" where it cannot be unpacked
    packed = raw.startswith(b"\x1f\x8b")  # gzip
    if packed and not is_gzip(path):  # perhaps renamed
        if head_of(path, gzip.open)[257:262] == b"ustar":  # a .tgz
            return f"is a packed tar archive: unpack it with tar -xzf {shell(path)}, and give the folder"  # of files
        return f"is gzip data: give it a name that says so, with mv {shell(path)} {shell(path + '.gz')}"  # no more
    if is_gzip(path) and not packed:  # plain text, or a stub of Git LFS
        head = raw  # looked into as it is
    for start, words in SIGNATURES.items():  # the first that fits, whatever the name says
        if head.startswith(start):  # at its very beginning
            return words.format(path=shell(path), new=fresh(path, ".txt" if start == b"%PDF" else ""))  # what to do
    if head.startswith(b"\x1f\x8b"):  # in a .gz
        return f"is gzipped twice: unpack it once, with zcat {shell(path)} > {fresh(path + '.gz')}"  # still a .gz
    if is_gzip(path) and not packed:  # the name is wrong
        return "is no gzip data: take .gz off its name"  # or pack it
    if head[257:262] == b"ustar":  # also in a .tar.gz
        return f"is a tar archive: unpack it with tar -xf {shell(path)}, and give the folder"  # all of it
    parquet = path.lower().endswith(".parquet")  # the one known kind that is no text
    if parquet != head.startswith(b"PAR1"):  # a CSV that was renamed, or a parquet file that was
        way = "unpack it with gunzip" if is_gzip(path) else "give its name the ending .parquet"  # Arrow unpacks none
        if parquet:  # by its name alone
            way = "give it the ending of what it holds"  # such as .csv
        return f"is {'no' if parquet else 'a'} parquet file: {way}"  # whatever its name says
    if re.search(rb"\x1b(\$[@B]|\([BJ])", head):  # escapes between Latin and Japanese letters
        return f"is ISO-2022-JP: convert it with {to_utf8('ISO-2022-JP', path)}"  # of old mail
    wide = "" if parquet else wide_encoding(head)  # as Windows writes text
    return f"is {UTF[wide]}: convert it with {to_utf8(UTF[wide], path)}" if wide else ""  # "": text, as it seems

def wide_encoding(head):  # → "utf-16-le" and the like for text of two or four bytes a letter, else ""
    for mark, name in MARKS.items():  # the longer ones first
        if head.startswith(mark):  # no other text begins so
            return name  # whatever follows
    whole = head[:len(head) // 4 * 4]  # of whole letters in all four
    texts = {name: whole.decode(name, "replace")[:-1] for name in UTF}  # the right one, and junk
    sound = {name: text for name, text in texts.items() if not re.search("\ufffd|\0", text) and all(  # no junk
        letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cn", "Cs") for letter in text)}  # no control
    plain = {name: len(re.findall(r"[ -~\n]", text)) for name, text in sound.items()}  # spaces are in any text
    control = len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head))  # half of all bytes in English and Russian
    utf8 = len(head.decode("utf-8", "ignore").encode()) > len(head) - 4  # the last letter may be cut in two
    wide = b"\0" in head and (control > len(head) / 4 or not utf8)  # a stray NUL makes no UTF-16
    best = max(plain, key=plain.get, default="")  # for English all its letters are plain
    return best if wide and plain.get(best) else ""  # "": bytes of something else

def unknown(path, endings):  # → a way on for text whose name has none of the known endings, or ""
    stem, packed = (path[:-3], ".gz") if is_gzip(path) else (path, "")  # x.log.gz stays packed
    if os.path.splitext(stem.lower())[1] in endings:  # ".jsonl", also for x.jsonl.gz
        return ""  # known
    if head_of(path).lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (b"{", b"["):  # .ndjson, .jsonlines, part-00000
        way = f"if it is JSON, name a copy so: cp {shell(path)} {shell(stem + '.jsonl' + packed)}"  # rows
    elif re.search(r"\.(html?|xml|ya?ml)$", stem.lower()):  # text between marks
        way = "get the text out of it, as one .txt file or as rows of .jsonl with a field text"  # nothing else helps
    else:  # code, logs, TeX
        way = f"if it is plain text, name a copy so: cp {shell(path)} {shell(stem + '.txt' + packed)}"  # as one text
    return f"has none of the known endings {' '.join(endings)}, also with .gz: {way}"  # perhaps a typo

def to_utf8(name, path):  # name (str): of an encoding → a command, and what to do with its result
    new = fresh(path)  # keeps its ending
    source = f"iconv -f {name} -t utf-8 {shell(path)}"  # a program of every Linux
    if is_gzip(path):  # iconv does not unpack
        source = f"zcat {shell(path)} | iconv -f {name} -t utf-8"  # can be pasted
    return f"{source} > {new}, and give {new}"  # in the current directory

def nul(path):  # of a file that holds NUL characters
    """Return the rest of the sentence "FILE, line N, column M: a NUL…"."""
    head = head_of(path)  # up to 4 kB
    if len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head)) * 10 > len(head):  # a picture, UTF-16 of a rare kind
        return ", and much else that is no text in UTF-8: find out what it is, and make UTF-8 of it"  # or leave it out
    new = fresh(path)  # without NULs
    way = f"tr -d '\\000' < {shell(path)} > {new}"  # all of them
    if is_gzip(path):  # tr would break the archive
        way = f"zcat {shell(path)} | tr -d '\\000' > {new}"  # can be pasted
    return f" character, which is no text: remove it with {way}, and give {new}"  # from one place or several

def encoding(path, error):  # error (UnicodeDecodeError): of a part of a file that is no UTF-8
    """Return how to convert such a file. Only Windows-1252 is named, with all its letters for the reader to judge."""
    with opener(path)(path, "rb") as source:  # an error is rare
        text = source.read(10_000_000)  # bytes: enough to see its letters
    known = re.search(rb"[\x80-\xff]", text[:-3])  # letters that were UTF-8, if the last one is the first fault
    if error.reason == "unexpected end of data" and known:  # a copy, or a download, that was stopped
        return "the file ends within a letter: it was cut short; copy it anew"  # iconv would not help
    high = re.findall(rb"[\x80-\xff]", text)  # bytes that are no ASCII
    pairs = re.findall(rb"[\x80-\xff]{2}", text)  # side by side, as in Chinese, Japanese, Russian
    if re.search(rb"[\x80-\x9f]", text) and len(pairs) * 4 < len(high):  # quotes, dashes and euros of Windows
        with suppress(UnicodeDecodeError):  # five bytes stand for nothing
            letters = " ".join(sorted(set(b"".join(high).decode("cp1252")), key=ord, reverse=True)[:40])  # each once
            start = max(0, text.rfind(b"\n", 0, text.index(high[0])) + 1, text.index(high[0]) - 30)  # of an excerpt
            words = text[start:start + 60].partition(b"\n")[0].decode("cp1252").strip()  # some letters in their words
            return (f"read as Windows-1252 its letters beyond ASCII are {letters}, as in {words!r}: if all "  # to judge
                    f"are right, convert it with {to_utf8('CP1252', path)}; if not, find out its encoding")  # or
    return ("find out its encoding from whoever wrote it (a program can only guess), and convert it with "  # no guess
            f"{to_utf8('ENCODING', path)}; read the result before you train: a wrong encoding gives wrong letters")

# ── Rows and columns ───────────────────────────────────────────────────────────────────────────────
CONVERSATIONS = (  # columns of questions and answers, as the data sets of the hub name them
    ("messages",), ("conversations",), ("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen"),  # chats
    ("instruction", "input", "output"), ("instruction", "output"), ("instruction", "response"),  # Alpaca, Dolly
    ("question", "answer"), ("input", "output"))  # quizzes
ANSWERS, ASKS = ("assistant", "gpt", "model"), ("user", "human", "system")  # roles
TURN = (  # for jq: a turn as Gemma is used to it
    '"<start_of_turn>" + (if .{role} | test("^(assistant|gpt|model)$") then "model" else "user" end) '  # two roles
    '+ "\\n" + .{text} + "<end_of_turn>\\n"')

def jq(program, path):  # program (str): for jq; path (str): .json or .jsonl, perhaps gzipped
    """Return a command that writes a new file, and what to do with it. jq is a package of every Linux."""
    new = fresh(path, ".jsonl")  # of a name that is free
    command = f"jq -c {shlex.quote(program)} {shell(path)}"  # -c: an object a line
    if is_gzip(path):  # jq does not unpack
        command = f"zcat {shell(path)} | jq -c {shlex.quote(program)}"  # the same
    return f"{command} > {new}, and give {new}"  # can be pasted

def rows_of(path):  # → the rows of a .json or .jsonl file, of any layout; ValueError where it is broken
    with opener(path)(path, "rt", encoding="utf-8-sig") as source:  # an error is rare
        text = source.read()  # whole: each row has to fit what is advised
    at, rows, decoder = 0, [], json.JSONDecoder()  # at: where the next value begins
    while at < len(text):  # one value after the other
        at = re.compile(r"\s*").match(text, at).end()  # to the next one
        if at < len(text):  # spaces may end the file
            value, at = decoder.raw_decode(text, at)  # over several lines, or not
            rows.append(value)  # an object, an array
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows  # an array is taken apart

def each_of(path):  # → the beginning of a program for jq: ".[] | " where a file holds one array, or ""
    return ".[] | " * (head_of(path).lstrip(b"\xef\xbb\xbf \n\r\t")[:1] == b"[")  # behind a mark and blanks

def joined(row, names):  # row (dict); names: its columns → a program for jq, or "" where none would do
    values = [row.get(name) for name in names]  # text, or lists of turns
    if all(isinstance(value, str) for value in values):  # question and answer
        return "{text: (" + ' + "\\n" + '.join(f".{name}" for name in names) + ")}"  # on lines of their own
    if all(isinstance(value, list) and value for value in values):  # turns
        turns = [turn for value in values for turn in value]  # of prompt and completion, too
        for role, text in (("role", "content"), ("from", "value")):  # of OpenAI, of ShareGPT
            known = [isinstance(turn, dict) and turn.get(role) in ANSWERS + ASKS  # no other speakers
                     and isinstance(turn.get(text), str) for turn in turns]  # no pictures
            if all(known):  # each turn can be written
                lists = " + ".join(f".{name}" for name in names)  # one behind the other
                return f"{{text: ([({lists})[] | {TURN.format(role=role, text=text)}] | add)}}"  # turns end to end
    return ""  # parts of messages, null

def row(place, value, column, path):  # value: of a row that has no text in this column
    """Return the sentence on such a row."""
    if not isinstance(value, dict):  # a bare string, number or list
        return f'{place}: {json.dumps(value)[:60]} is no JSON object; write {{"{column}": "..."}}'  # one a row
    if column not in value:  # names may change from row to row
        return columns(place, value, column, path)  # or nested rows, or a conversation
    held = json.dumps(value[column], default=str)[:60]  # a number, a list, bytes
    way = "choose another with --text_column, or write text there"  # either helps
    return f"{place}: column {column!r} holds {held}, not text; {way}"  # what it holds, as JSON

def columns(place, found, column, path):  # found: dict of a JSON object, or a list of column names; path: "" of the hub
    """Return the sentence on a row, or a table, that lacks a column."""
    names = [str(name) for name in found]  # a header's cells or an object's keys
    reads = isinstance(found, dict) and re.search(r"\.jsonl?(\.gz)?$", path.lower())  # jq can read this file
    way = conversation(found, path if reads else "") or separated(names, column)  # how to get a text column
    if reads and not way:  # {"data": [rows]}
        way = nested(path, column)  # or ""
    near = "" if way else nearest(column, names)  # would mislead
    way = way or "choose one with --text_column"  # the usual first mistake
    return f"{place}: no column {column!r}{near}; columns: {', '.join(names) or 'none'}; {way}"  # all of them

def conversation(found, path):  # path (str) of a file that jq can read, or ""
    """Return how to make one text of questions and answers, or ""."""
    spoken = next((names for names in CONVERSATIONS if {*names} <= {*found}), None)  # the first that fits
    if not spoken:  # something else
        return ""  # as a table of numbers
    way = ""  # without a command
    with suppress(OSError, EOFError, ValueError, RecursionError):  # a broken file has no command
        rows = rows_of(path) if path else []  # all of them
        programs = {joined(row, spoken) if isinstance(row, dict) else "" for row in rows}  # one, if all are alike
        if len(programs) == 1 and "" not in programs:  # else rows would be lost
            way = f", for example with {jq(each_of(path) + programs.pop(), path)}"  # keeps who speaks
    left = [name for name in found if name not in spoken]  # such as context, id
    lost = f" ({', '.join(left)} would be left out)" * bool(left and way)  # nothing is silent
    return f"{' and '.join(spoken)} hold questions and answers: make one column 'text' of them{way}{lost}"  # for now

def nested(path, column):  # path (str) of a file that jq can read
    """Return how to take rows out of the one object that a file holds, or ""."""
    with suppress(OSError, EOFError, ValueError, RecursionError, AttributeError, IndexError):  # no rows of objects
        rows = rows_of(path)  # mostly one: {"version": 1, "data": [{"text": …}, …]}
        lists = {name: [row.get(name) for row in rows] for name in rows[0]}  # name → values of all objects
        fits = {name: sum(values, []) for name, values in lists.items() if {*map(type, values)} == {list}}  # end to end
        fits = {name: items for name, items in fits.items() if {*map(type, items)} == {dict}}  # lists of objects
        known = [name for name, items in fits.items() if all(column in item for item in items)]  # those with the column
        alone = sorted(fits, key=lambda name: -len(fits[name])) if len(rows) == 1 else []  # else lists belong to rows
        if found := known + alone:  # the likeliest first
            program = f"{each_of(path)}.[{json.dumps(found[0])}][]"  # any name is allowed in quotes
            return f"the rows are a list in {found[0]!r}: take them out with {jq(program, path)}"  # one a line
    return ""  # main.py names --text_column

def separated(names, column):  # names: those of a table that seems to have one column
    """Return what stands between the columns of a table, or ""."""
    found = len(names) == 1 and re.fullmatch(rf"(.*)({re.escape(column)})(.*)", names[0])  # 'id:text'
    mark = (found[1][-1:] or found[3][:1]) if found else ""  # the letter beside the name
    if not mark or mark.isalnum() or mark in "_- ":  # a longer name, such as text_en
        return ""  # one column indeed
    return f"columns seem to be separated by {mark!r}: separate them by commas, and put texts in quotes"  # CSV

def layout(path, column):  # of a JSON file that has a line which is no JSON
    """Return what to do with objects that span lines, or "" if the file is broken in another way."""
    with suppress(OSError, EOFError, ValueError, RecursionError):  # main.py says where it is broken
        rows = rows_of(path)  # of any layout
        if rows and all(isinstance(value, dict) for value in rows):  # objects over several lines, or on one line
            known = "" if column in rows[0] else conversation(rows[0], path) or nested(path, column)  # {"data": […]}
            return known or f"its objects do not stand on a line each: mend that with {jq('.', path)}"  # any layout
    return ""  # main.py names the two layouts

def packed(split, bos, eos, lost):  # numbers of pack_split(); lost (float): the share of tokens that is cut away
    """Return notes on the data of a split, [] for ordinary data."""
    notes = [  # (whether it applies, the line)
        (bos or eos,  # written by another program
         f"note     {bos:,} {split} texts have a BOS, {eos:,} an EOS where one is added: none gets two"),
        (lost > 0.2,  # long documents, of which only the beginnings are learnt
         f"note     truncation takes {lost:.0%} of the {split} tokens: see --no_truncation")]
    return [line for applies, line in notes if applies]  # in this order

def rebuilt(error, named):  # error: of load_dataset(**named), perhaps
    """Return whether the cache of a data set is damaged, and has not been made anew already."""
    words = "ArrowInvalid|Expected to be able to read|JSONDecodeError"  # of pyarrow, of dataset_info.json
    return named.get("download_mode", 0) is None and bool(re.search(words, repr(error)))  # 0: a model, a directory

# ── Models and the hub ─────────────────────────────────────────────────────────────────────────────
LOADING = {  # pattern for an exception's kind or message: what to do about it
    r"(GatedRepo|gated dataset).*":  # no token, or one of an account without access
    "is gated: accept the terms at {url}, then run hf auth login with a token of that account",
    "Invalid credentials": "cannot be had: the hub refuses your token; run hf auth login with a new one",  # a bad token
    "RepositoryNotFound|DatasetNotFound":  # a misspelt or a private name
    "cannot be found: the hub knows no such name; check {url} (if private: hf auth login)",
    "HFValidationError": "is no directory here and cannot be a name on the hub: correct it",  # e.g. outputs/
    "ConnectionError|LocalEntryNotFound":  # the hub was tried for half a minute
    "is not in the cache and the hub cannot be reached: check the network, or give a local directory",
    r"Unrecognized configuration class <class '[\w.]*\.(\w+)Config'":  # an encoder-decoder, such as T5
    "is a {found}, which predicts no next token: give a model like google/gemma-3-270m",
    r"Config name is missing.*configs: \[(.*?)\]":  # a guess could train on the wrong language
    "has several configurations: choose one with --dataset_config_name: {found}",
    r"(No space left|Not enough disk space|Disk quota|Permission denied: '\S+'|Read-only file system)":  # a cache
    "cannot be kept in the cache ({found}): make space there, or choose another: HF_HOME=/path, --cache_dir for data"}

def loading(flag, name, error):  # name (str): of the hub or a directory, which could not be loaded
    """Return the rest of the sentence "FLAG NAME …" for an error of the hub's libraries."""
    words = in_one_line(error)  # all errors in the chain
    page = f"/datasets/{name}" if flag == "--dataset_name" else f"/{name}"  # with the terms
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + page  # to be opened
    folder = name.removesuffix(": tokenizer.json")  # main.py names the file where it fails
    if fault := missing(folder, words) if os.path.isdir(folder) else "":  # the files tell more than the library
        return fault  # of a model, or of a data set
    for pattern, sentence in LOADING.items():  # the first pattern that fits decides
        if found := re.search(pattern, words):  # may capture the list of configurations
            return sentence.format(url=url, found=found[found.re.groups])  # case, remedy
    return f"cannot be loaded; if damaged, download or save it anew: {words[:400]}"  # in the library's words

def missing(folder, words):  # folder (str): of a model or a data set; words (str): of the errors → a fault, or ""
    if not os.access(folder, os.R_OK | os.X_OK):  # of another user
        return "cannot be read: no permission for the directory (try chmod +rx)"  # the library says "no such file"
    names = sorted(os.listdir(folder))  # without what lies in directories below
    if "tokenizer.json" in words and "tokenizer.json" not in names:  # not copied, or of an old kind
        return "holds no tokenizer.json: copy it from the model's base, or save the tokenizer there"  # a fast one
    for part in names:  # the first fault is enough
        path = os.path.join(folder, part)  # a file or a directory
        if not os.access(path, os.R_OK):  # written by another user
            return f"cannot be read: no permission for {part} (try chmod +r)"  # transformers says "no such file"
        if part.endswith((".safetensors", ".bin", "tokenizer.json")):  # large files, in the place of which Git LFS puts
            if head_of(path).startswith(b"version https://git-lfs"):  # a stub, where git-lfs is not installed
                return f"has a pointer of Git LFS in the place of {part}: run git lfs pull there"  # brings the file
        if part.endswith(".index.json"):  # the list of a model in several files
            with open(path, encoding="utf-8", errors="replace") as index:  # {"weight_map": {weight: file}}
                wanted = {*re.findall(r'": "([^"]+\.(?:safetensors|bin))"', index.read())}  # names of files
            if lost := sorted(wanted - {*names}):  # a download that was cut short
                return f"lacks {len(lost)} of its files of weights, such as {lost[0]}: download it again"  # all of it
    if "no file named model.safetensors" in words:  # the directory of a tokenizer, say
        return "holds no weights (model.safetensors): give the directory that has them"  # perhaps one above
    return ""  # all files are there

# ── Failures of a run ──────────────────────────────────────────────────────────────────────────────
REMEDIES = (  # against a full GPU, the cheapest first; they are other settings, so checkpoints no longer fit
    "(1) add --bf16; (2) halve --per_device_train_batch_size (4, 2, 1) and double --gradient_accumulation_steps; "
    "(3) add --gradient_checkpointing; (4) shorten --max_seq_length; after a checkpoint with another --output_dir")

def failure(error, flag, folder, device, training):  # error: an Exception of any library
    """Return (sentence, exit status) for an error that the user can mend, or None.

    flag, folder (str): where the run writes at that time. device: torch's, or "". training (bool): it makes steps.
    """
    words = in_one_line(error)  # a library's error often hides the system's
    again = "the same command again goes on"  # nothing that was saved is lost
    gone = re.search("timed ?out|by peer|remote process", words, re.I)  # words of gloo and NCCL
    if gone and isinstance(error, RuntimeError) and os.environ.get("WORLD_SIZE", "1") != "1":  # launch.py says which
        return f"another process was lost or does not answer ({words[:300]}); {again}", 1  # launch.py knows it
    if re.search("out of memory|an(no|')t allocate memory|MemoryError", words):  # on GPU or CPU
        return f"out of memory on {device or 'this machine'}: {REMEDIES}", 1  # 1: fewer programs may run next time
    if "pinned memory" in words:  # of --activation_checkpointing_kwargs
        return "offloading activations needs a GPU: leave offload out", 2  # the CPU's memory is where they are
    full = re.search("No space left|Not enough disk|[Qq]uota|Read-only|Permission denied|Input/output", words)  # Linux
    disk = re.search("PytorchStreamWriter|inline_container|strerror|os error|SafetensorError", words)  # a checkpoint
    writing = flag == "--output_dir" and (disk or isinstance(error, OSError))  # not of a cache that is damaged
    if (full or writing) and not isinstance(error, BrokenPipeError):  # `main.py ... | head` is no fault
        free = shutil.disk_usage(folder).free / 1e9 if os.path.isdir(folder) else 0  # GB; 0: it is gone
        space = f"{free:.2g} GB are free{', a checkpoint needs 3.2' * (flag == '--output_dir')}"  # of 270M parameters
        return (f"{flag} {folder} cannot be written ({full[0] if full else words[:300]}): it is gone, or lacks "  # why
                f"space ({space}). Mend that; the same command goes on"), 1  # what was saved is whole
    if flag == "--output_dir" and not training and isinstance(error, ImportError | ValueError | TypeError):  # too early
        return f"a flag of the Trainer cannot be used: {words[:300]}", 2  # such as --use_liger_kernel without package
    return None  # main.py prints the traceback
