"""How fast, and in how much memory, four trainers make the same steps on Gemma 3 270M.

    python benchmarks/throughput.py             on what there is, a GPU or the CPU; --quick: three short steps of each

    plain   transformers' Trainer as its example run_clm.py calls it: map, default_data_collator, float32 weights
    trl     TRL's SFTTrainer with its own loss, given the same tokens
    liger   as plain, with --use_liger_kernel (needs a GPU)
    ours    python main.py, the command line that a user types

All train the same chunks in the same order, with the same labels (none for BOS), float32 weights under bfloat16
autocast, with the same batch, learning rate and optimizer, no gradient checkpointing, a log line a step. The model is a
random one in the shape of Gemma 3 270M, as speed does not depend on what the weights are; --model takes a real one.

The stopwatch is outside: every run is a fresh process, whose log lines this one times, and of whose largest memory it
asks the kernel at the end. So all are measured alike, and main.py knows nothing of it. The trainers take turns, in
another order each round, and ratios are made within a round: a machine's speed drifts from minute to minute.

Exit status 1: a trainer failed, or the losses of the first step differ, so that not all did the same work.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from mfu import flops_per_token, peak_of  # beside this file

HERE = Path(__file__).resolve().parent
NAMES = ("plain", "trl", "liger", "ours")
PEERS = {"trl": "trl==1.16.*", "liger": "liger-kernel==0.8.*"}  # without dependencies: torch is the machine's
TOLERANCE = 0.01  # of losses near 12.5, which in bfloat16 round differently

# ── The children: each of these functions has a process to itself ────────────────────────────────────────────────────


def probe(args):
    """Import what every trainer imports. Returns: what the machine is; the parent reads off the memory this took."""
    import datasets  # noqa: F401
    import torch
    import transformers
    from transformers import Gemma3ForCausalLM, Trainer  # noqa: F401  lazy: the names make the modules load

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"gpu": gpu, "device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def make_model(folder):
    """Save a model of Gemma 3 270M's shape with random weights, and a tokenizer whose words are the ids' numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    config = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, max_position_embeddings=32_768, sliding_window=512,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3, query_pre_attn_scalar=256,
        tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)  # bfloat16, as Google publishes it
    words = Tokenizer(models.WordLevel({str(number): number for number in range(262_144)}, unk_token="3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(folder)


def prepare(args):
    """Decode random ids to text, let main.py's functions cut it into chunks, save these. Returns: model's figures."""
    sys.path.insert(0, str(HERE.parent))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import main

    if not os.path.isdir(args.model):
        make_model(args.work + "/model")
        os.rename(args.work + "/model", args.model)  # whole or absent
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    draw, rows = random.Random(0), args.batch * args.steps
    with open(f"{args.work}/text.jsonl", "w") as file:
        for _ in range(2 * rows):  # more than enough: a text decoded and tokenized again may have fewer tokens
            ids = [draw.randrange(4, len(tokenizer)) for _ in range(args.length)]
            file.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
    chunks, _ = main.load_and_prepare_dataset(main.parse_args(command_line(args)[1:]), tokenizer)
    chunks.save_to_disk(f"{args.work}/chunks")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    return {"parameters": model.num_parameters(), "flops": flops_per_token(model, args.length)}


def command_line(args):
    """Return the words that train with main.py."""
    return [str(word) for word in [
        HERE.parent / "main.py", "--model_name_or_path", args.model, "--train_file", f"{args.work}/text.jsonl",
        "--max_seq_length", args.length, "--no_truncation", "--max_train_samples", args.batch * args.steps,
        "--cache_dir", f"{args.work}/cache", "--output_dir", f"{args.work}/out", *getattr(args, "flags", ["--bf16"]),
        "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", 1, "--max_steps", args.steps,
        "--learning_rate", 2e-5, "--weight_decay", 0.01, "--warmup_steps", 0, "--save_strategy", "no",
        "--logging_steps", getattr(args, "logging", 1), "--report_to", "none", "--disable_tqdm", "True",
    ]]  # fmt: skip


def label(batch):
    """Give chunks what run_clm.py's group_texts ends with: labels, and the mask that its tokenizer made.

    main.py's chunks hold ~id for BOS, which is seen but never predicted: it gets no label here either.
    """
    chunks = batch["input_ids"]
    ids = [[~token if token < 0 else token for token in chunk] for chunk in chunks]
    labels = [[-100 if token < 0 else token for token in chunk] for chunk in chunks]
    return {"input_ids": ids, "attention_mask": [[1] * len(chunk) for chunk in chunks], "labels": labels}


def train(args):
    """Train with one of the peers, and save the model as run_clm.py does. Returns: the GPU's peak memory, if any."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

    set_seed(42)
    options = {  # what command_line() says; every other setting is the library's own
        "output_dir": f"{args.work}/out", "per_device_train_batch_size": args.batch, "max_steps": args.steps,
        "learning_rate": 2e-5, "weight_decay": 0.01, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "bf16": True, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    chunks = datasets.load_from_disk(f"{args.work}/chunks").take(args.batch * args.steps).map(label, batched=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.child == "trl":
        from trl import SFTConfig, SFTTrainer

        options |= {"max_length": args.length, "packing": False, "gradient_checkpointing": False}
        chunks = chunks.remove_columns("attention_mask")  # the collator makes one; labels that are there stay as is
        trainer = SFTTrainer(model=model, args=SFTConfig(**options), train_dataset=chunks)
    else:
        arguments = TrainingArguments(**options, use_liger_kernel=args.child == "liger")
        trainer = Trainer(model=model, args=arguments, train_dataset=chunks, data_collator=default_data_collator)
    trainer.train()
    trainer.save_model()
    return gpu_memory()


def ours(args):
    """Run main.py as the interpreter would, to know what it does not print. Returns: as train() does."""
    sys.argv = command_line(args)
    runpy.run_path(sys.argv[0], run_name="__main__")
    return gpu_memory()


def gpu_memory():
    """Peaks of this process in GB: what tensors took, and what PyTorch had reserved for them; {} without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu_memory": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}


# ── The parent: starts them in turns, holds the stopwatch ────────────────────────────────────────────────────────────


def run(command, args, limit=None, seconds=None):
    """Run a command to its end, in `limit` GB of memory of its own if that is not None, or kill it after `seconds`.

    Returns: status, its lines with their times of arrival, its standard error, and its largest resident memory in GB.
    """
    size = int((limit or 0) * 1e9)
    restrict = size and (lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)))
    env = {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    env |= {"PYTHONUNBUFFERED": "1", "HF_DATASETS_CACHE": f"{args.work}/cache"}  # lines arrive when they are printed
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [f"{args.cache}/peers", os.environ.get("PYTHONPATH")]))
    with open(f"{args.work}/stderr", "w+") as errors:
        child = subprocess.Popen(
            [sys.executable, *command], stdout=-1, stderr=errors, text=True, env=env, preexec_fn=restrict or None)
        alarm = threading.Timer(seconds or 86_400, os.kill, (child.pid, signal.SIGKILL))
        alarm.daemon = True  # Ctrl-C ends this process without waiting for it
        alarm.start()
        lines = [(time.perf_counter(), line.strip()) for line in child.stdout]
        _, status, usage = os.wait4(child.pid, 0)  # of this child alone; it began no larger than this small process
        alarm.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return child.returncode, lines, errors.read(), usage.ru_maxrss * 1024 / 1e9


def ask(name, args):
    """Run one of the functions above in a process of its own. Returns: what it returned, and its memory in GB."""
    status, lines, errors, memory = run(child(name, args), args)
    return (json.loads(lines[-1][1]), memory) if status == 0 else sys.exit(f"{name} failed:\n{errors}")


def child(name, args):
    """Return the words that start this script as one of the functions above."""
    keys = ("model", "work", "length", "batch", "steps", "flags")
    settings = {key: getattr(args, key) for key in keys if hasattr(args, key)}
    return [__file__, "--child", json.dumps(settings | {"child": name})]


def measure(name, args, limit, inside=False, patience=None):
    """Train once, for `patience` seconds at most; inside: let main.py run in a child that tells what it reserved.

    Returns: {"speed", "memory", "loss", "last"}, with the losses of the first and the last step, on a GPU perhaps
    "reserved"; or {"failed": why}.
    """
    command = command_line(args) if name == "ours" and not inside else child(name, args)
    began = time.monotonic()
    status, lines, errors, memory = run(command, args, limit, patience)
    shutil.rmtree(f"{args.work}/out", ignore_errors=True)  # a gigabyte of weights
    if status == -9 and patience and time.monotonic() - began >= patience:
        return {"failed": f"no end within {patience:.0f} s"}
    full = re.search(r"out of memory|can't allocate memory|MemoryError|bad_alloc", errors, re.IGNORECASE)
    if status == -9 or (status and full):  # -9: the kernel's own remedy
        return {"failed": "out of memory"}
    steps = [(when, line) for when, line in lines if "'loss':" in line]
    if status or len(steps) != args.steps:
        print(errors[-3000:], file=sys.stderr)
        last = [line.strip() for line in errors.splitlines() if line.strip()][-1:]
        return {"failed": f"exit status {status} after {len(steps)} of {args.steps} steps", "said": "".join(last)}
    seconds = steps[-1][0] - steps[args.warmup - 1][0]  # the first steps also allocate, tune and compile
    speed = (args.steps - args.warmup) * args.batch * args.length / seconds
    said = "\n".join(line for _, line in lines) if args.gpu else ""  # only a trainer itself knows its GPU memory
    numbers = re.findall(r"""['"](?:peak_memory_gb|gpu_memory)['"]: '?([\d.]+)""", said)
    first, last = (float(re.search(r"'loss': '?([\d.einfa+-]+)", line)[1]) for _, line in (steps[0], steps[-1]))
    row = {"speed": speed, "memory": max(map(float, numbers), default=memory), "loss": first, "last": last}
    reserved = re.search(r'"reserved": ([\d.]+)', said)
    return row | ({"reserved": float(reserved[1])} if reserved else {})


def missing(name, args):
    """Install a peer that is not there yet. Returns: why it cannot run here, or None."""
    if name == "liger" and not args.gpu:
        return "skipped: its kernels need a GPU"
    module, target = {"trl": "trl", "liger": "liger_kernel"}.get(name), Path(args.cache, "peers")
    if module is None or (target / module).is_dir():
        return None
    if args.no_peer_install:
        return None if importlib.util.find_spec(module) else f"skipped: {module} is not installed"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), PEERS[name]]
    return "skipped: pip could not install it" if subprocess.run(command).returncode else None


def spread(values, form):
    return f"{median(values):{form}}" + f" ({min(values):{form}} to {max(values):{form}})" * (len(values) > 1)


def table(results, args, facts):
    """Yield the rows of the report, in Markdown."""
    mfu, state = facts["peak"], 16 * facts["parameters"] / 1e9
    yield "| trainer | tokens/s | × plain | peak memory | above the state | first loss |" + " MFU |" * bool(mfu)
    yield "|---|---|---|---|---|---|" + "---|" * bool(mfu)
    for name, rounds in results.items():
        good = [row for row in rounds if "speed" in row]
        if not good:
            yield f"| {name} | {rounds[0]['failed']} | | | | |" + " |" * bool(mfu)
            continue
        pairs = zip(rounds, results.get("plain", []), strict=False)  # of the same round
        ratios = [row["speed"] / plain["speed"] for row, plain in pairs if "speed" in row and "speed" in plain]
        speed, memory = [row["speed"] for row in good], max(row["memory"] for row in good)
        cells = [name, spread(speed, ",.0f"), spread(ratios, ".2f") if ratios else "–", f"{memory:.2f} GB"]
        cells += [f"{memory - state - facts['import']:.2f} GB", f"{good[0]['loss']:.4f}"]
        cells += [f"{median(speed) * facts['flops'] / mfu / 1e12:.1%}"] if mfu else []
        yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory of a model and its tokenizer; unset: random weights in Gemma 3 270M's shape")
    add("--batch", type=int, help="chunks a step; 4 on a GPU, 1 on a CPU")
    add("--length", type=int, help="tokens a chunk; 2048 on a GPU, 1024 on a CPU")
    add("--steps", type=int, help="of each run; 40 on a GPU, 6 on a CPU; the first fifth is not timed")
    add("--rounds", type=int, default=5, help="runs of each trainer (default: 5)")
    add("--only", nargs="+", choices=NAMES, default=NAMES, help="some of the trainers")
    add("--memory", type=float, help="GB that a run on the CPU may take; unset: what is free now")
    add("--quick", action="store_true", help="one round of three steps of 64 tokens, unless said otherwise")
    add("--output", help="file for the table, in Markdown")
    add("--no-peer-install", action="store_true", help="use the peers that can be imported, install nothing")
    add("--cache", default=str(HERE / ".cache"), help="where the random model and the peers are kept")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model and not os.path.isdir(args.model):
        parser.error(f"--model {args.model}: no such directory")
    if args.child:  # started by run()
        args = argparse.Namespace(**json.loads(args.child))
        return print(json.dumps({"probe": probe, "prepare": prepare, "ours": ours}.get(args.child, train)(args)))
    os.makedirs(args.cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.cache) as args.work:
        return compare(args)


def compare(args):
    """Measure, print and write the report. Returns: the exit status."""
    args.model = args.model or f"{args.cache}/gemma-3-270m-random"
    machine, base = ask("probe", args)
    args.gpu = machine["gpu"]
    sizes = (1, 64, 3) if args.quick else (4, 2048, 40) if args.gpu else (1, 1024, 6)
    for name, usual in zip(("batch", "length", "steps"), sizes, strict=True):
        setattr(args, name, getattr(args, name) or usual)
    args.rounds, args.warmup = 1 if args.quick else args.rounds, max(1, args.steps // 5)
    facts, _ = ask("prepare", args)
    facts |= {"import": 0 if args.gpu else base, "peak": peak_of(machine["device"]) if args.gpu else 0}
    free = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024 / 1e9
    limit = None if args.gpu else args.memory or free  # so that the kernel has no reason to kill anybody

    results = {name: [] for name in NAMES if name in args.only}
    absent = {name: why for name in results if (why := missing(name, args))}
    for turn in range(args.rounds):
        first = turn % len(results)
        for name in [*results, *results][first : first + len(results)]:
            row = {"failed": absent[name]} if name in absent else measure(name, args, limit)
            results[name].append(row)
            said = row.get("failed") or f"{row['speed']:,.0f} tokens/s, {row['memory']:.2f} GB, loss {row['loss']:.4f}"
            print(f"round {turn + 1}  {name:5}  {said}", flush=True)
    losses = [row["loss"] for rounds in results.values() for row in rounds if "loss" in row]
    agree = not losses or max(losses) - min(losses) <= TOLERANCE  # False for a NaN, too
    imports = "" if args.gpu else f"; above the state: less the {base:.2f} GB that the imports alone take, too"
    lines = [
        *table(results, args, facts),
        f"\n{machine['device']}; torch {machine['torch']}, transformers {machine['transformers']}; {args.batch} × "
        f"{args.length:,} tokens a step, {args.steps} steps, of which the first {args.warmup} not timed; rounds: "
        f"{args.rounds}; median (smallest to largest).",
        f"State: weights, gradients and Adam's moments in float32, {16 * facts['parameters'] / 1e9:.2f} GB{imports}.",
        f"The losses of the first step {'agree within' if agree else 'DIFFER by more than'} {TOLERANCE}.",
    ]
    if facts["peak"]:
        lines += [f"MFU: {facts['flops'] / 1e9:.2f} GFLOP a token, against {facts['peak']:,} TFLOP/s."]
    print("", *lines, sep="\n")
    Path(args.output or os.devnull).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(not agree or any("exit status" in row.get("failed", "") for rows in results.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
