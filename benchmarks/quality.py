"""Who learns most from the same number of tokens: main.py, run_clm.py's recipe or TRL, on Gemma 3 270M?

    bash example_run.sh quickstart       makes the weights and the texts
    python benchmarks/quality.py         three seeds of each; --steps 8 --seeds 1 for a quick look

    plain   transformers' run_clm.py: each text tokenized, all ids end to end, cut into blocks that begin anywhere
    trl     TRL's SFTTrainer on the same rows, packing=True, packing_strategy="wrapped": EOS behind each text; blocks
    ours    python main.py, the command line that a user types

All three see the same texts, the same number of tokens a step, the same steps, learning rate, schedule, optimizer and
precision (float32 weights, bfloat16 autocast), and one seed for the order of the blocks. One judge reads all models,
and the base model, in float32 with plain transformers: each held-out document whole, behind its BOS, cut only where it
is longer than --judge_length; bits per byte are the losses of all its tokens ÷ ln 2 ÷ the bytes of its text in UTF-8.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import throughput  # beside this file: installs TRL where it is missing

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("plain", "trl", "ours")


# ── The children: each of these functions has a process to itself ────────────────────────────────────────────────────


def settings(args):
    """Return what all three trainers are told, by the Trainer's names."""
    return {
        "output_dir": f"{args.work}/out", "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1,
        "max_steps": args.steps, "learning_rate": args.learning_rate, "weight_decay": 0.01, "seed": args.seed,
        "warmup_steps": max(1, args.steps // 5), "logging_steps": 4, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "bf16": True,
    }  # fmt: skip


def peer(args):
    """Train with run_clm.py's recipe or with TRL, and save the model."""
    import datasets
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    set_seed(args.seed)
    options = settings(args) | {"use_cpu": not torch.cuda.is_available()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = datasets.load_dataset("json", data_files=args.train, split="train", cache_dir=f"{args.work}/cache")
    if args.child == "trl":
        from trl import SFTConfig, SFTTrainer

        packing = {"max_length": args.length, "packing": True, "packing_strategy": "wrapped"}
        config = SFTConfig(**options, **packing, dataset_text_field="text", gradient_checkpointing=False)
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    else:

        def group(batch):  # one batch holds all rows: no remainder but one
            ids = [token for row in tokenizer(batch["text"])["input_ids"] for token in row]
            blocks = [ids[at : at + args.length] for at in range(0, len(ids) - args.length + 1, args.length)]
            return {"input_ids": blocks, "attention_mask": [[1] * args.length] * len(blocks), "labels": blocks}

        blocks = rows.map(group, batched=True, batch_size=None, remove_columns=rows.column_names)
        trainer = Trainer(
            model=model, args=TrainingArguments(**options), train_dataset=blocks, data_collator=default_data_collator
        )
    trainer.train()
    trainer.save_model(f"{args.work}/model")
    tokenizer.save_pretrained(f"{args.work}/model")


def ours(args):
    """Return the words that train with main.py."""
    flags = settings(args) | {"output_dir": f"{args.work}/model", "disable_tqdm": None, "bf16": None}
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return [
        str(ROOT / "main.py"), "--model_name_or_path", args.model, "--train_file", args.train, "--no_truncation",
        "--max_seq_length", str(args.length), "--cache_dir", f"{args.work}/cache", "--save_dtype", "float32", "--bf16",
        "--disable_tqdm", "True", *words,
    ]  # fmt: skip


def judge(args):
    """Return bits per byte of the held-out documents, read by the model in args.judged with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.judged, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)  # the base's: all three kept it
    nats = size = 0
    for line in Path(args.held_out).read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=device)
        size += len(text.encode())
        for part in ids.split(args.judge_length - 1):  # a longer document goes on behind another BOS
            whole = torch.cat([torch.tensor([tokenizer.bos_token_id], device=device), part])[None]
            with torch.no_grad():
                hidden = model.model(whole).last_hidden_state[0, :-1]
                for rows, labels in zip(hidden.split(256), part.split(256), strict=True):  # 0.27 GB of logits
                    nats += torch.nn.functional.cross_entropy(model.lm_head(rows), labels, reduction="sum").item()
    return nats / math.log(2) / size


# ── The parent ───────────────────────────────────────────────────────────────────────────────────────────────────────


def start(words, args):
    """Run a command of Python to its end. Returns: its last line; ends this program where it fails."""
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "CUDA_VISIBLE_DEVICES": "0"} | os.environ
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [f"{args.cache}/peers", os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words[:4])} ... failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return (done.stdout.splitlines() or [""])[-1]


def child(name, args, **more):
    """Return the words that start this script as one of the functions above."""
    return [__file__, "--child", json.dumps(vars(args) | more | {"child": name})]


def measure(name, args):
    """Train once and judge. Returns: bits per byte."""
    shutil.rmtree(f"{args.work}/model", ignore_errors=True)
    start(ours(args) if name == "ours" else child(name, args), args)
    return float(start(child("judge", args, judged=f"{args.work}/model"), args))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="quickstart/gemma-3-270m", help="directory of the base model (default: the quickstart's)")
    add("--train", default="quickstart/train.jsonl", help='one {"text": …} a line')
    add("--held_out", default="quickstart/validation.jsonl", help="the same: whole documents")
    add("--steps", type=int, default=24, help="optimizer steps (default: 24)")
    add("--batch", type=int, default=1, help="chunks a step (default: 1)")
    add("--length", type=int, default=1024, help="tokens a chunk (default: 1024)")
    add("--learning_rate", type=float, default=5e-5)
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the order of chunks (default: 1 2 3)")
    add("--judge_length", type=int, default=4096, help="tokens of a document that the judge reads at a time")
    add("--only", nargs="+", choices=NAMES, default=NAMES, help="some of the trainers")
    add("--cache", default=str(Path(__file__).parent / ".cache"), help="where TRL is kept")
    add("--no-peer-install", action="store_true", help="use TRL only if it can be imported")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:  # started by measure()
        args = argparse.Namespace(**json.loads(args.child))
        return print(judge(args) if args.child == "judge" else peer(args) or "")
    for path in (f"{args.model}/config.json", args.train, args.held_out):
        if not os.path.exists(path):
            parser.error(f"{path} is missing: bash example_run.sh quickstart makes the default one")
    os.makedirs(args.cache, exist_ok=True)
    args.gpu = False  # TRL needs none
    absent = {name: why for name in args.only if (why := throughput.missing(name, args))}
    results = {name: [] for name in args.only if name not in absent}
    with tempfile.TemporaryDirectory(dir=args.cache) as args.work:
        base = float(start(child("judge", args, judged=args.model), args))
        print(f"base model {base:.4f} bits per byte", flush=True)
        for seed in args.seeds:
            args.seed = seed
            for name in results:
                results[name].append(measure(name, args))
                print(f"seed {seed}  {name:5}  {results[name][-1]:.4f}", flush=True)
    print("\n| trainer | bits per byte, mean | spread | each seed |", "|---|---|---|---|", sep="\n")
    print(f"| base model | {base:.4f} | | |")
    for name, values in results.items():
        spread = f"± {stdev(values):.4f}" if len(values) > 1 else ""
        print(f"| {name} | {mean(values):.4f} | {spread} | {', '.join(f'{value:.4f}' for value in values)} |")
    for name, why in absent.items():
        print(f"| {name} | {why} | | |")
    print(f"\n{args.steps} steps of {args.batch} × {args.length:,} tokens, learning rate {args.learning_rate:g}; "
          "spread: standard deviation over the seeds.")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
