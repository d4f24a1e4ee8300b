"""What accompanies and carries a finished model: its card, its notice, its upload to a hub.

card(facts) returns texts to be put beside the model; ready() asks a hub before a training, upload() pushes after it.
Nothing here changes what is trained, and no function raises for what a hub, a base or a name may be like.
"""
import json  # quotes values of YAML
import logging  # silences the hub's library
import os  # paths and the environment
import re  # names on a hub
import shutil  # copies tokenizer.model
import threading  # a hub that does not answer is not waited for
import time  # pauses between tries
import warnings  # silences the hub's library
from contextlib import contextmanager, suppress  # with statements of our own; files that cannot be read
from fnmatch import fnmatch  # names of files that are uploaded

BEFORE = 20  # seconds in all that a hub has to answer before a training
PATIENCE = 60  # seconds without any progress, in or out, that end an upload
PAUSES = (2, 8)  # seconds before the second and the third try, where a hub has a fault of its own
TERMS = "ai.google.dev/gemma/terms"  # Google's Gemma Terms of Use
POLICY = "ai.google.dev/gemma/prohibited_use_policy"  # a part of section 3.2 of the terms
MARKS = {  # what tells a text of ours from one of the user, who may take the first away
    "README.md": "<!-- main.py writes this page after a training; without this line it stays -->",  # hidden by a hub
    "NOTICE": "which changed the weights (model.safetensors); configuration and tokenizer were saved anew."}  # no other
NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # owner/name on a hub; \w is ASCII by re.ASCII
PUBLISHED = {268_098_176: r"gemma-3-270m(-it)?"}  # parameters: names of their models under google/
FINISHED = (  # what a model on a hub consists of: no run.json, no training_args.bin, which know the machine
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "README.md", "NOTICE",
    "all_results.json", "eval_results.json", "train_results.json")
OURS = (  # flags of main.py that decide weights: all are shown that have a value
    "max_seq_length", "no_truncation", "add_eos", "sample_by", "text_column", "max_train_samples", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps",
    "early_stopping_patience", "use_flash_attention", "ddp_comm_hook", "seed")
TRAINERS = re.compile(  # flags of the Trainer that decide weights; of the others some hold tokens or paths
    "--(no_)?(max_steps|max_grad_norm|optim|lr_sched|adam_|label_smoothing|neftune|data_seed|tf32|full_determinism|"
    "use_liger|torch_compile|load_best|greater_is|warmup_ratio|average_tokens|group_by|train_sampling|bf16_full)")

# ── The card ───────────────────────────────────────────────────────────────────────────────────────
def card(facts):  # facts (dict): of a run that has ended
    """Return {file name: text}: README.md, and NOTICE for a model that is made of Gemma. The same facts, the same text.

    facts: args (Namespace of parse_args()), model_type, parameters, dtype, processes, device, autocast, steps, epochs,
    tokens (trained on), metrics (dict; without eval_loss nothing was evaluated), versions (dict).
    """
    args = facts["args"]  # flags
    gemma = is_gemma(facts["model_type"])  # under Google's terms
    base, came, theirs = base_of(args.model_name_or_path, facts["parameters"])  # hub name or "", words, header
    license = license_of(theirs, gemma)  # fields of the header
    versions = facts["versions"].items()  # of torch, transformers and the like
    sections = {  # title: lines
        "License": notice(gemma, license), "Data": data(args), "Evaluation": evaluation(facts),  # what to know first
        "Training": training(facts), "Use": usage(args),  # how to make it, and how to take it
        "Versions": [", ".join(f"{code(name)} {code(value)}" for name, value in versions)]}  # on a line
    lines = [*header(args, base, license, facts), MARKS["README.md"], "",  # for the hub and its readers
             f"# {code(short(args.model_name_or_path))}, fine-tuned", "",  # the title
             f"A language model of {facts['parameters']:,} parameters, fine-tuned from {came}."]  # one line
    for title, text in sections.items():  # in this order
        lines += ["", f"## {title}", "", *text]  # Markdown wants lines between
    texts = {"README.md": "\n".join(lines) + "\n"}  # one line break at its end
    if gemma:  # the terms ask for a text file of its own
        texts["NOTICE"] = NOTICE.format(base=plain(came.replace("`", "")))  # no Markdown
    return texts  # written by main.py

NOTICE = (  # of all that is made of Gemma; the first line is what the terms ask for, word by word
    f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS}\n\n"
    "This model is a modification of Gemma. The files were modified: it was fine-tuned from\n{base},\n"
    f"{MARKS['NOTICE']}\n\n"
    "The use restrictions in section 3.2 of the terms, which include the Gemma Prohibited Use Policy found at\n"
    f"{POLICY}, apply to this model and to all that is made of it.\n"
    "Whoever passes it on has to pass on these restrictions, a copy of the terms, and this notice.\n")

def is_gemma(kind):  # kind (str): model_type of config.json → whether the Gemma Terms of Use apply
    return bool(re.search(r"gemma(?![4-9])", kind.lower()))  # Gemma 4 is under the Apache license
def plain(text):  # → text on one line, printable, in valid UTF-8
    escaped = (letter.encode("unicode_escape").decode() for letter in str(text))  # é is \xe9
    letters = zip(str(text), escaped, strict=True)  # each letter, and how to write it in ASCII
    return "".join(letter if letter.isprintable() else other for letter, other in letters)  # \n, half an emoji
def code(text):  # → text as code of Markdown, whatever it holds; also in a table
    text = plain(text).replace("|", "\\|")  # a bare one would end the cell
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))  # longer than any inside
    space = " " * ("`" in text or not text.strip())  # else the fence would join them
    return f"{fence}{space}{text}{space}{fence}"  # no letter of it is Markdown
def quoted(value):  # → value (str, list or dict) as YAML, on one line
    text = json.dumps(value, ensure_ascii=False)  # JSON is YAML, but for letters that YAML forbids
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)  # U+2028, say
def short(path):  # → the last part of a path or of a name on a hub
    return os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path.rpartition("/")[2]  # "." has one
def on_hub(name):  # → whether a hub may have this name
    return bool(re.fullmatch(NAME, name, re.ASCII))  # owner/name
def header_of(folder):  # → dict: the YAML header of the card in a directory, {} without one
    with suppress(Exception):  # no card, no YAML, no UTF-8: the base has no say then
        from huggingface_hub import metadata_load  # loads no Python objects
        return metadata_load(os.path.join(folder, "README.md")) or {}  # None without a header
    return {}  # nothing is known

def base_of(name, parameters):  # name: --model_name_or_path; parameters (int or None)
    """Return (the base's name on the hub or "", words for it, the header of its own card). No path of the machine."""
    if not os.path.isdir(name):  # on the hub
        return name, code(name), {}  # its card is not here
    theirs = header_of(name)  # {} without a card
    local = f"{code(short(name))}, a local model"  # its name says something, its place does not
    stored = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", os.path.realpath(name))  # the hub's own cache
    if stored:  # as it was downloaded
        return f"{stored[1]}/{stored[2]}", code(f"{stored[1]}/{stored[2]}"), theirs  # no guess
    own = theirs.get("base_model")  # a name, or a list of names
    own = own[0] if isinstance(own, list) and len(own) == 1 else own  # a merge has several
    if isinstance(own, str) and on_hub(own) and not os.path.isdir(own):  # such as a model of an earlier run
        return own, f"{local} whose own card names {code(own)} as its base", theirs  # an ancestor
    if re.fullmatch(PUBLISHED.get(parameters, ""), short(name)):  # "" fits no name
        google = f"google/{short(name)}"  # where Google publishes it
        return google, f"{local}, by its name and size {code(google)}", theirs  # a copy
    with suppress(OSError, ValueError, AttributeError):  # written by older versions of transformers
        with open(os.path.join(name, "config.json"), encoding="utf-8") as file:  # what the model was loaded from
            known = str(json.load(file).get("_name_or_path"))  # also paths of other machines
        if re.fullmatch(r"google/[\w.-]+", known, re.ASCII):  # nobody else's directory is called so
            return known, f"{local} that was made of {code(known)}", theirs  # an ancestor
    return "", local, theirs  # the header names no base

def license_of(theirs, gemma):  # theirs (dict): header of the base's card → fields on the license, {} if unknown
    fields = {name: theirs[name] for name in ("license", "license_name", "license_link")  # of a hub's header
              if isinstance(theirs.get(name), str)}  # a list would need several files
    if not str(fields.get("license_link", "http")).startswith("http"):  # a file beside the base
        del fields["license_link"]  # it is not beside this model
    if gemma and fields.get("license") != "other":  # "other": terms of its own, as MedGemma has
        return {"license": "gemma"}  # the hub's name of the terms
    return fields if "license" in fields else {}  # that of the base

def header(args, base, license, facts):  # → lines of YAML between two lines of dashes
    fields = dict(license)  # first, as the hub writes it
    if on_hub(base) or re.fullmatch(r"[\w.-]+", base, re.ASCII):  # gpt2 has no owner
        fields |= {"base_model": base, "base_model_relation": "finetune"}  # links both pages
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}  # how the hub runs it
    name = data_set(args)  # "" for files
    if on_hub(name):  # a hub links it, too
        fields["datasets"] = [name]  # a list by its rules
    if "eval_loss" in facts["metrics"]:  # evaluated
        fields["metrics"] = ["perplexity"]  # a name that the hub knows
    fields["tags"] = ["causal-lm", "fine-tuned"]  # for its search
    return ["---", *(f"{name}: {quoted(value)}" for name, value in fields.items()), "---"]  # a line each

def notice(gemma, license):  # → lines on the license, in the card itself
    if gemma:  # what section 3.1 of the terms asks for
        return [  # a paragraph
            f"Gemma is provided under and subject to the Gemma Terms of Use found at [{TERMS}](https://{TERMS}). "
            "This model is a modification of Gemma: its weights were changed by fine-tuning. The use restrictions in "
            f"section 3.2 of the terms, with the [Gemma Prohibited Use Policy](https://{POLICY}), apply to it and to "
            "all that is made of it; whoever passes it on has to pass them on, with the file `NOTICE`."]
    named = f" ({code(license.get('license_name') or license['license'])})" if license else ""  # as the base's card
    return [f"The license of the base model{named} applies."]  # whatever it is

def data_set(args):  # → --dataset_name by its full name on the hub, a directory as is, "" without the flag
    return {"wikitext": "Salesforce/wikitext"}.get(args.dataset_name, args.dataset_name) or ""  # as main.py renames it
def listed(paths):  # → lines: names of files, without their places
    names = [f"- {code(os.path.basename(path))}" for path in paths]  # in the order of the training
    more = [f"- and {len(names) - 20:,} more"] if len(names) > 20 else []  # a folder of documents
    return [*names[:20], *more]  # of a page's length
def data(args):  # → lines on what the model was trained on
    name = data_set(args)  # "" for files
    if not name:  # --train_file
        count = len(args.train_file)  # files
        return [f"Trained on {count:,} file{'s' * (count != 1)}:", "", *listed(args.train_file)]  # in their order
    if os.path.isdir(name):  # no hub has it
        return [f"Trained on the training split of {code(short(name))}, a local data set."]  # its name alone
    default = "wikitext-2-raw-v1" if name == "Salesforce/wikitext" else None  # as main.py chooses
    config = args.dataset_config_name or default  # None for most data sets
    more = f", configuration {code(config)}" if config else ""  # a language, say
    return [f"Trained on the training split of {code(name)}{more}."]  # on a hub

def held_out(args):  # → words for the text of the evaluation, and lines of names
    share = getattr(args, "validation_split_percentage", None)  # of the training's own texts
    if args.validation_file:  # files of their own
        both = {*map(os.path.realpath, args.validation_file)} & {*map(os.path.realpath, args.train_file)}  # a slip
        known = ", of which some are training data, too" * bool(both)  # then the figures show what was memorized
        count = len(args.validation_file)  # files
        return f"{count:,} file{'s' * (count != 1)}{known}", ["", *listed(args.validation_file)]  # names below
    if share:  # by the seed
        return f"{share:g} % of the texts, which were not trained on", []  # by --validation_split_percentage
    return "the validation split of the data set", []  # of --dataset_name
def evaluation(facts):  # → lines: loss, perplexity, bits per byte
    args, metrics = facts["args"], facts["metrics"]  # flags, numbers
    if "eval_loss" not in metrics:  # no validation data
        return ["This model was not evaluated: no validation data was given."]  # plainly
    words, names = held_out(args)  # which text
    some = getattr(args, "max_eval_samples", None)  # chunks
    first = f"the first {some:,} chunks of " if some else ""  # not all of it
    rows = {"eval_loss": "loss (nats a token)", "eval_perplexity": "perplexity",  # of the held-out text
            "eval_bits_per_byte": "bits per byte of text", "train_loss": "mean loss of the training"}  # main.py's names
    table = [f"| {label} | {metrics[name]:.5g} |" for name, label in rows.items() if name in metrics]  # nan, too
    return [f"The weights as saved here, on {first}{words}:", *names, "", "| | |", "|---|---|", *table]  # no header row

def typed(argv):  # argv (list of str): words for the Trainer → [(flag, value)] of those that decide weights
    found, at = [], 0  # pairs; the next word
    while at < len(argv):  # a flag, and words without dashes behind it
        flag, equals, value = argv[at].partition("=")  # --a=b is --a b
        values, at = [value] * bool(equals), at + 1  # [] for a switch
        while at < len(argv) and not re.match("--[a-z]", argv[at]):  # -1 is a value
            values.append(argv[at])  # some flags take several
            at += 1  # the next word
        if TRAINERS.match(flag):  # a token of a hub is not
            found.append((flag, " ".join(values)))  # as typed
    return found  # in their order
def training(facts):  # → lines: a table of the flags that decide the weights, and what came of them
    args = facts["args"]  # flags
    given = getattr(args, "given", [])  # as typed
    ours = [(f"--{name}", getattr(args, name, None)) for name in OURS]  # with defaults
    shown = [(flag, value) for flag, value in ours if value not in (None, False)  # switches that are off
             and (flag not in ("--sample_by", "--text_column") or flag in given)]  # apply to some data alone
    shown = [(flag, f"{value:.9g}" if isinstance(value, float) else value) for flag, value in shown]  # 3.0 is 3
    shown = [(flag, "" if value is True else value) for flag, value in shown]  # a switch has no value
    processes = facts["processes"]  # devices, as each process has one
    chunks = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes  # of a step
    dtype = f"{facts['autocast']} autocast".replace("no autocast", "float32 products")  # of matrices
    device = f"{code(facts['device'])}, {processes} process{'es' * (processes > 1)}"  # of each
    batch = f"{args.per_device_train_batch_size} × {args.gradient_accumulation_steps} × {processes}"  # chunks
    rows = [("effective batch", f"{batch} = {chunks:,} chunks = {chunks * args.max_seq_length:,} tokens a step"),  # all
            ("steps", f"{facts['steps']:,}, {facts['epochs']:.4g} epochs"),  # optimizer steps
            ("tokens trained on", f"{facts['tokens']:,}"),  # each pass counts
            ("precision", f"float32 weights, {dtype}; saved in {facts['dtype']}"),  # of both
            ("device", device)]  # other devices round otherwise
    more = typed(getattr(args, "trainer_argv", []))  # the Trainer's
    limited = dict(more).get("--max_steps", "-1").strip() not in ("", "-1")  # -1 stands for not given
    unused = ["--num_train_epochs"] * limited  # would look like the length of the run
    flags = [pair for pair in [*shown, *more] if pair[0] not in unused]  # --max_steps has priority
    rows += [(code(flag), code(value) if str(value) else "on") for flag, value in flags]  # "" for a switch
    table = [f"| {name} | {value} |" for name, value in rows]  # two columns
    return [  # a table has a header in Markdown, here an empty one
        "The effective batch is chunks a device × accumulation × processes. A flag that decides weights and is not "
        "listed had its default.", "", "| | |", "|---|---|", *table]  # whole

def usage(args):  # → lines: how to generate with the model
    ends = "Each text of the training ended with the end-of-sequence token, so the model stops by itself."  # mostly
    if not args.add_eos:  # as pre-training does
        ends = "The training added no end-of-sequence token to its texts: `max_new_tokens` ends a text."  # so
    return [  # code, and what to expect of it
        "```python", "from transformers import pipeline", "",  # can be pasted
        'generate = pipeline("text-generation", model=".")  # this directory, or the name of this model on the hub',
        'print(generate("The", max_new_tokens=100, do_sample=True)[0]["generated_text"])', "```", "", ends]  # on EOS

# ── The hub ────────────────────────────────────────────────────────────────────────────────────────
CONNECTION = (  # why there is no connection, in the words of Linux and of OpenSSL
    "connection refused|name or service not known|temporary failure in name resolution|no route to host|"
    "no address associated with hostname|network is unreachable|reset by peer|certificate verify failed")

class Refusal(Exception):  # what is wrong is known here: its text ends the sentence on the hub
    pass  # no more than a sentence
class Silence(Exception):  # no answer: made of an error of the connection, which the hub's library would retry
    request = None  # what was not answered

def repository(repo, folder):  # → (name for the hub, fault): --hub_model_id, or the name of --output_dir
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # the hub's rules
    name = repo or os.path.basename(os.path.abspath(folder))  # "me/x" or "x"
    try:  # the library says which rule is broken
        validate_repo_id(name)  # letters, digits and - _ .
        return name, ""  # may be new to the hub
    except HFValidationError:  # spaces, umlauts, "a/b/c"
        way = "use letters, digits, '-', '_' and '.', as in name or owner/name"  # no hub takes others
        if repo:  # as typed
            return name, f"--hub_model_id {plain(repo)} cannot be a name on the hub: {way}"  # a wrong flag
        taken = f"--push_to_hub takes the name of --output_dir, {plain(name)}"  # which may stay as it is
        return name, f"{taken}, which cannot be one on the hub: give --hub_model_id, and {way}"  # another name
def credentials(token):  # token: --hub_token or None → (token, fault)
    from huggingface_hub import get_token  # HF_TOKEN, or what `hf auth login` has stored
    token = token or get_token()  # None: nobody has logged in
    if not token:  # nothing to ask the hub with
        return "", "--push_to_hub needs a token that may write: run hf auth login, or set HF_TOKEN"  # made on its site
    if not re.fullmatch("[!-~]+", token):  # a line break or an umlaut, by a slip
        return "", f"the token of {source(token)} holds letters that no token has: {login(token)}"  # never printed
    return token, ""  # may still be refused
def source(token):  # → where a token comes from
    from huggingface_hub import get_token  # of the environment, or stored
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # go before what is stored
        if os.environ.get(name, "").strip() == token:  # as the library reads it
            return name  # a variable
    return "hf auth login" if get_token() == token else "--hub_token"  # stored, or typed
def login(token):  # → what to do for another token, as only one of the places counts
    place = source(token)  # "HF_TOKEN", say
    if place.startswith("H"):  # hf auth login would change nothing
        return f"set {place} to a token that may write"  # a variable
    verb = "run" if place[0] == "h" else "give"  # a command, or a flag
    return f"{verb} {place} {'with ' * (verb == 'run')}a token that may write"  # made on the hub's site

def causes(error):  # → an error and what it came of, the outermost first: threads wrap what they raise
    chain = [error]  # as Python prints them
    while chain[-1].__cause__ or chain[-1].__context__:  # until the first
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # one step inwards
    return chain  # one at least
def host(error):  # → the host that was asked last, "" if that is not known
    for cause in causes(error):  # the outermost first
        with suppress(AttributeError, RuntimeError):  # no error of a request, or one that does not know it
            return cause.request.url.host  # without port
    return ""  # a part of every address
def answer(error, seconds):  # error: of the hub's library → (words for what the hub did, status or 0)
    chain = causes(error)  # the library's own, and those of the connection
    for cause in chain:  # the outermost first
        response = getattr(cause, "response", None)  # of an HTTP error
        if response is not None:  # the hub has answered
            said = " ".join(str(getattr(cause, "server_message", None) or "").split())[:200]  # in its own words
            words = f" ({plain(said)})" if said else ""  # often nothing
            return f"answered {response.status_code}{words}", response.status_code  # such as 403
    names = " ".join(f"{type(cause).__name__} {cause}" for cause in chain)  # kinds and words
    if re.search("timed out|Timeout", names):  # silent, or too slow to count
        return f"did not answer for {seconds} seconds", 0  # nothing came, nothing went
    if found := re.search(CONNECTION, names, re.I):  # no way to the hub
        return f"cannot be reached ({found[0]})", 0  # in the words of Linux
    return f"cannot be used ({plain(str(chain[-1]) or type(chain[-1]).__name__)[:200]})", 0  # no hub, perhaps

def sentence(error, token, name, seconds):  # → (what is wrong, with the hub's address and what to do; temporary?)
    from huggingface_hub import constants  # HF_ENDPOINT, as the library has read it
    hub = constants.ENDPOINT  # its address
    if isinstance(error, Refusal):  # found out here
        return f"{hub}: {error}", False  # says what to do
    if "OfflineModeIsEnabled" in repr(causes(error)):  # no request was sent
        return f"{hub} is not asked, as HF_HUB_OFFLINE is set: unset it", False  # to push
    words, status = answer(error, seconds)  # "answered 403 (…)"
    if host(error) not in hub:  # large files go to a host of their own
        hub += f": its storage at {host(error)}"  # which a firewall may not know
    way = "check HF_ENDPOINT and --hub_model_id"  # 404, 400 and the like
    if status == 401:  # an unknown token
        way = login(token)  # where the token comes from
    elif status == 403:  # a known one, without the right
        way = f"{login(token)} to {name}, or give another --hub_model_id"  # an organization's, say
    if status in (408, 429) or status >= 500 or not status:  # of the hub or the network
        return f"{hub} {words}", True  # may pass
    return f"{hub} {words}: {way}", False  # will be the same next time

def open_repository(token, name, private):  # → owner/name of a repository that is there and may be written to
    """Make sure that a token may write. Raises: Refusal, errors of huggingface_hub. An existing one stays as it is."""
    from huggingface_hub import HfApi  # all requests, with HF_ENDPOINT
    api = HfApi(token=token)  # asks nothing so far
    who = api.whoami()  # 401 for an unknown token
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")  # read, write, fineGrained
    if role == "read":  # a question less
        raise Refusal(f"the token of {who.get('name')} may only read: {login(token)}")  # before a repository is made
    name = name if "/" in name else f"{who['name']}/{name}"  # the user's own
    api.create_repo(name, private=private, exist_ok=True)  # empty; the only sure test where there is none
    api.auth_check(name, write=True)  # of one that was there, others may be the owners
    if private and not api.model_info(name, expand=["private"]).private:  # made without the flag, earlier
        raise Refusal(  # nothing becomes public by a slip
            f"{name} is public, and --hub_private_repo asks for a private one: change that in its settings, or give "
            "another --hub_model_id")
    return name  # full

def ready(repo, token, private, folder):  # repo: --hub_model_id or None; token: --hub_token or None; folder: output_dir
    """Return (fault, warning) before a training: may a model be pushed at its end? Both "" if so.

    A fault lasts: no token, no right. A warning may pass: no network, a hub that is down. At most BEFORE seconds.
    """
    name, fault = repository(repo, folder)  # the name's letters
    token, lack = credentials(token)  # of HF_TOKEN or stored
    if fault or lack:  # no hub is asked
        return fault or lack, ""  # the first one
    found = []  # the error, or None
    def ask():  # in a thread, as looking up a host's name cannot be interrupted
        try:  # a hub may answer anything
            open_repository(token, name, private)  # three questions, or four
            found.append(None)  # no error
        except Exception as error:  # told below
            found.append(error)  # with its causes
    asking = threading.Thread(target=ask, daemon=True)  # ends with the process
    asking.start()  # a second, with a hub that is well
    asking.join(BEFORE)  # seconds
    error = found[0] if found else Silence("timed out")  # the thread may wait on
    if error is None:  # all is well
        return "", ""  # the training begins
    words, temporary = sentence(error, token, name, BEFORE)  # with the hub's address
    if temporary:  # hours may pass until the hub is needed
        return "", f"{words}: the training goes on, and --push_to_hub tries again at its end"  # then it counts
    return f"--push_to_hub: {words}", ""  # known before a long run

@contextmanager  # makes `with patience(seconds):` possible
def patience(seconds):  # around requests: none waits longer for any progress, and none is repeated by the library
    from huggingface_hub import close_session, get_session  # one HTTP client for all requests
    client = get_session()  # without limits by default
    send = client.send  # sends one request
    limits = dict.fromkeys(("connect", "read", "write", "pool"), seconds)  # each counts from the last byte that moved
    def limited(request, **more):  # in the place of client.send, also in the library's threads
        request.extensions = {**request.extensions, "timeout": limits}  # some requests ask for no limit
        try:  # the connection may fail
            response = send(request, **more)  # slow is fine, silent is not
        except Exception as error:  # the library would try six times
            silence = Silence(f"{type(error).__name__}: {error}")  # a kind that it does not know
            silence.request = request  # names the host
            raise silence from error  # to sentence()
        if response.status_code >= 500 or response.status_code in (408, 429):  # the library would wait and repeat
            from huggingface_hub import hf_raise_for_status  # makes an error with the hub's own words
            hf_raise_for_status(response)  # upload() tries again, from what is there
        return response  # others are judged by the library
    client.send = limited  # until the end of the with statement
    try:  # requests
        yield  # the block of the with statement
    finally:  # the next request has a new client, as it was
        close_session()  # with its connections

@contextmanager  # makes `with quiet():` possible
def quiet():  # around an upload: no bars, no warnings, and no other way than plain HTTP, which patience() watches
    from huggingface_hub import constants  # read by its functions when they are called
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars  # bars
    logger = logging.getLogger("huggingface_hub")  # of the whole library
    before = (logger.level, constants.HF_HUB_DISABLE_XET, are_progress_bars_disabled())  # put back below
    with warnings.catch_warnings():  # of Python's own kind
        warnings.simplefilter("ignore")  # such as on a header that the hub would have longer
        try:  # the block
            logger.setLevel(logging.CRITICAL)  # the sentence at the end says it
            constants.HF_HUB_DISABLE_XET = True  # a program in Rust, with limits of its own
            disable_progress_bars()  # a log holds no bars
            yield  # the block of the with statement
        finally:  # for whatever else uses the library
            logger.setLevel(before[0])  # as it was
            constants.HF_HUB_DISABLE_XET = before[1]  # as it was
            if not before[2]:  # bars were on
                enable_progress_bars()  # as it was

def finished(folder):  # → names of the files in output_dir that belong on a hub
    return sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))  # no checkpoint
                  and any(fnmatch(name, pattern) for pattern in FINISHED))  # no lock, no state of a run

def commit(folder, names, token, name, private):  # one try of upload() → the repository's address
    from huggingface_hub import CommitOperationAdd, HfApi, constants  # whole commits
    with quiet(), patience(PATIENCE):  # without noise, within bounds
        full = open_repository(token, name, private)  # there, and open for this token
        files = [CommitOperationAdd(part, os.path.join(folder, part)) for part in names]  # read when they are sent
        HfApi(token=token).create_commit(full, files, commit_message="Upload the finished model")  # all, or nothing
    return f"{constants.ENDPOINT}/{full}"  # its page

def upload(folder, names, repo, token, private):  # names: files of folder, None for finished(folder)
    """Return (url, fault): push files as one commit. What the hub has already is not sent again. A fault is a sentence.

    repo: --hub_model_id or None. token: --hub_token or None. private: --hub_private_repo, True, False or None.
    """
    name, wrong = repository(repo, folder)  # as ready() has it
    token, lack = credentials(token)  # may have been stored meanwhile
    names = finished(folder) if names is None else names  # of the finished model
    lost = [part for part in names if not os.path.isfile(os.path.join(folder, part))]  # removed meanwhile
    if lost:  # a hub must not get half of a model
        return "", f"the model was not pushed: {folder} lacks {', '.join(map(plain, lost))}"  # no fault of the hub
    fault = wrong or lack  # "" if there is something to ask with
    for pause in () if fault else (0, *PAUSES):  # the whole again, as only what is missing is sent
        time.sleep(pause)  # seconds, for a hub that is busy
        try:  # the hub may refuse any step
            return commit(folder, names, token, name, private), ""  # done
        except Exception as error:  # of the hub's library, of the connection, of a disk
            fault, temporary = sentence(error, token, name, PATIENCE)  # with the hub's address
        if not temporary or "did not answer" in fault:  # a minute of silence was enough
            break  # no further try
    whole = f"it is whole in {folder}, and the same command again pushes it"  # trains nothing
    return "", f"the model was not pushed: {fault}; {whole}"  # one sentence

# ── What main.py calls ─────────────────────────────────────────────────────────────────────────────
def vocabulary(name):  # name (str): of a model, on a hub or a directory
    """Return the path of its tokenizer.model, the tokenizer in SentencePiece's format, or "" if there is none."""
    from transformers.utils import cached_file  # looks into the directory, the cache, the hub
    lenient = ("missing_entries", "connection_errors", "gated_repo")  # other programs want the file, no training does
    kwargs = {f"_raise_exceptions_for_{kind}": False for kind in lenient}  # None instead of an error
    return cached_file(name, "tokenizer.model", **kwargs) or ""  # of several, the one that the hub has on main

def accompany(trainer, run, folder):  # trainer: main.py's FineTuner; run: its Run; folder: of the model, unpublished
    """Put model card, notice and tokenizer.model beside a finished model. A README.md of the user's own stays."""
    args, state = run.args, trainer.state  # flags; the log of the whole run
    if args.vocabulary:  # the base has it
        shutil.copyfile(args.vocabulary, os.path.join(folder, "tokenizer.model"))  # 4.7 MB, for llama.cpp and LiteRT
    with open(os.path.join(folder, "all_results.json"), encoding="utf-8") as file:  # of evaluation and training
        metrics = json.load(file)  # name → number
    seen = [line["tokens_seen"] for line in state.log_history if "tokens_seen" in line] or [0]  # of all calls
    facts = {"args": args, "metrics": metrics, "versions": run.versions, "device": run.versions["device"]}  # of the run
    facts |= {"parameters": trainer.model.num_parameters(), "model_type": trainer.model.config.model_type}  # sizes
    facts |= {"processes": run.ranks.size, "autocast": trainer.args.mixed_precision}  # of this call
    facts |= {"steps": state.global_step, "epochs": state.epoch, "tokens": seen[-1], "dtype": args.save_dtype}  # ends
    for name, text in card(facts).items():  # README.md, and for a Gemma NOTICE
        there = os.path.join(run.output_dir, name)  # from an earlier call, or of the user
        with suppress(OSError), open(there, encoding="utf-8", errors="replace") as file:  # mostly there is none
            if MARKS[name] not in file.read():  # the user has written it, or made it his own
                words = f"{there} is not of main.py and stays: the model has no {name} of its own"  # a user's page
                print(f"note     {words}", flush=True)  # the run goes on
                continue  # to the next file
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:  # published with the weights
            file.write(text)  # the same text for the same run

def check(output_dir, repo, token, private):  # before a training; repo, token, private: --hub_model_id and so on
    """Return what keeps the token from writing there, or "". A hub that does not answer now is only noted."""
    fault, warning = ready(repo, token, private, output_dir)  # within 20 seconds
    if warning:  # the hub may be back by the end
        print(f"warning  {warning}", flush=True)  # the training goes on
    return fault  # a sentence, or ""

def push(output_dir, repo, token, private):  # output_dir (str): with the finished model
    """Upload the finished model and print its address. Returns: "", or a sentence on what the hub has answered."""
    page, fault = upload(output_dir, None, repo, token, private)  # as one commit
    if page:  # all of it is there
        print(f"Pushed to {page}", flush=True)  # its address
    return fault  # the model in output_dir is whole
