"""Lets a model write: prints each prompt and how the model goes on from it.

    python examples/generate.py "The with statement"                        the likeliest token each time
    python examples/generate.py "Once" "A list" --temperature 0.8 --seed 3  by chance, the same for the same seed
    echo "The with statement" | python examples/generate.py                 a prompt from another program

`bash example_run.sh generate` does the same and chooses the Python and the model. A GPU is used where there is one.
"""

import argparse  # flags
import os  # settings of the libraries
import re  # what a name on the hub looks like
import signal  # for `| head`
import sys  # status, standard input
import warnings  # silenced
from pathlib import Path  # folders

MODEL = "quickstart/model"  # what the quickstart trains
ADVICE = "Run `bash example_run.sh quickstart` first, or name another model."  # ends sentences about missing models


def die(sentence, status=2):  # 2: a wrong call, 1: what may work when tried again
    """End the program with one sentence."""
    print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)  # nothing else goes to stderr
    sys.exit(status)  # no traceback


def number(kind, least, most):  # most: None where there is no limit
    """Return a function for argparse that reads an int or a float and refuses one outside a range."""

    def read(word):  # argparse turns the error into a sentence with the flag's name
        """Return the number that a word says."""
        value = kind(word)  # ValueError: argparse's own sentence
        if not value >= least or (most is not None and value > most):  # `not >=` refuses nan, too
            limits = f"{least} or more" if most is None else f"from {least} to {most}"  # in words
            raise argparse.ArgumentTypeError(f"{word} is not {limits}")  # names flag and range
        return value  # in range

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read  # goes into type=


def parse_args():  # of the process
    """Return the flags; prompts come from standard input where none is given."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of the docstring
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)  # short errors
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to go on from")  # each by itself
    parser.add_argument("--model", default=MODEL, help="folder or name on the hub (default: %(default)s)")  # any causal
    length = "tokens to write at most; EOS ends a text earlier (default: 40)"  # main.py --add_eos teaches EOS
    parser.add_argument("--max_new_tokens", type=number(int, 1, None), default=40, help=length)  # about 30 words
    chance = "0: always the likeliest token; 0.8: some chance; 1: as the model has learnt (default: 0)"  # others, too
    parser.add_argument("--temperature", type=number(float, 0, None), default=0.0, help=chance)  # divides the logits
    parser.add_argument("--top_k", type=number(int, 0, None), default=0, help="choose among the K likeliest; 0: all")
    parser.add_argument("--top_p", type=number(float, 0, 1), default=1.0, help="among the likeliest that sum to P")
    parser.add_argument("--seed", type=number(int, 0, None), default=0, help="of the chance (default: 0)")  # repeatable
    args = parser.parse_intermixed_args()  # prompts may stand between flags
    try:  # other encodings end in a sentence
        if not args.prompts and sys.stdin is not None and not sys.stdin.isatty():  # a pipe or a file
            args.prompts = [sys.stdin.read().rstrip("\n")]  # the line break is echo's
        "".join(args.prompts).encode()  # Python hands bytes that it does not know on as half letters
    except UnicodeError:  # such as Latin-1
        parser.error("the prompt is not UTF-8")  # status 2
    if not args.prompts or "" in args.prompts:  # nothing to go on from
        parser.error('give a prompt: generate.py "The with statement"')  # status 2
    return args  # numbers are in range


def check_model(name):  # before torch is loaded
    """End with a sentence if `name` is neither a folder with a model nor a possible name on the hub."""
    folder = Path(name)  # if it is one
    if folder.is_dir():  # main.py makes the folder long before the model
        for needed in ("config.json", "*.safetensors", "tokenizer.json"):  # sharded weights have several files
            if not any(folder.glob(needed)):  # a training that has not ended, or another folder
                die(f"{name} holds no finished model: {needed} is missing. {ADVICE}")
    else:  # a path with a slip, or a name on the hub
        owner = name.partition("/")[0]  # google in google/gemma-3-270m
        if name == MODEL or Path(owner).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):  # a path
            die(f"there is no folder {name}. {ADVICE}")


def quiet():  # before the imports
    """Keep progress bars and advice of the libraries off the terminal."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}  # read when they are imported
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # bars of weights and downloads
    warnings.filterwarnings("ignore")  # of torch and others


def load(name):  # seconds
    """Return tokenizer and model in float32 on the GPU, or on the CPU where there is none."""
    try:  # the first to be missed
        import torch  # late: a wrong call is answered at once
        from transformers import AutoModelForCausalLM, AutoTokenizer  # any architecture
    except ImportError as error:  # another Python than that of the training
        die(f"{error.name} is not installed here: pip install -r requirements.txt", status=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES=2 chooses another GPU
    try:  # the hub may be out of reach, a name unknown, a file damaged
        tokenizer = AutoTokenizer.from_pretrained(name)  # with Gemma's BOS
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)  # 1.1 GB: CPUs are slow in bfloat16
    except (OSError, ValueError) as error:  # what from_pretrained raises
        die(f"{name} cannot be loaded: {str(error).strip().splitlines()[0]}", status=1)
    return tokenizer, model.to(device).eval()  # no dropout


def encode(tokenizer, prompt):  # the place for a template, once there are models that chat
    """Return the ids of a prompt, shape (1, T): BOS and the text as it is."""
    return tokenizer(prompt, return_tensors="pt")["input_ids"]  # the tokenizer adds BOS


def write(args):  # the work
    """Print every prompt and its continuation, token by token."""
    tokenizer, model = load(args.model)  # once for all prompts
    from transformers import TextStreamer, set_seed  # imported already

    choice = {"do_sample": False}  # the likeliest token
    if args.temperature > 0:  # else the other flags of chance have no effect
        choice = {"do_sample": True, "temperature": args.temperature}  # drawn from the softmax
        choice |= {"top_k": args.top_k, "top_p": args.top_p}  # of what is left of it
    for index, prompt in enumerate(args.prompts):  # one by one: padding would change nothing but memory
        ids = encode(tokenizer, prompt).to(model.device)  # (1, T)
        context = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + args.max_new_tokens  # tokens
        if ids.shape[1] + args.max_new_tokens > context:  # beyond it a model writes nonsense
            die(f"{ids.shape[1]:,} tokens and --max_new_tokens {args.max_new_tokens:,} exceed the model's {context:,}")
        if index:  # not the first
            print()  # an empty line between texts
        set_seed(args.seed)  # a prompt's text does not depend on the prompts before
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # prints the prompt, then word by word
        model.generate(ids, attention_mask=ids.new_ones(ids.shape), streamer=streamer,  # stops at EOS
                       max_new_tokens=args.max_new_tokens, **choice)  # fmt: skip


def main():  # of the script
    """Run; Ctrl-C ends it without a traceback."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it silently
    args = parse_args()  # status 2 if wrong
    check_model(args.model)  # status 2 if it is not there
    quiet()  # before torch and transformers
    try:  # a long text may be cut short
        write(args)  # prints
    except KeyboardInterrupt:  # by the user
        sys.exit(130)  # what a shell reports for a program ended by Ctrl-C


if __name__ == "__main__":  # to_gguf.py imports functions of this file
    main()  # status 0
