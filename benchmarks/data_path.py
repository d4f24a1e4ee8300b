"""How much time, memory and disk the data path takes: text → tokens → chunks, through main.py's own functions.

    python benchmarks/data_path.py --model quickstart/gemma-3-270m --megabytes 25 250 1000
    python benchmarks/data_path.py --model quickstart/gemma-3-270m --format txt    one document instead of JSON lines

Each size runs three times in fresh processes: "tokenizer" is the tokenizer alone, which gets the same texts from memory
in batches of 1 MB, 100 MB of them at most, and whose ids are thrown away; "first" prepares the data; "cached" finds it
in the cache. The share is the speed of "first" ÷ that of "tokenizer". The text is made from the sources of Python's
standard library, over and over until the size is reached. Peak memory is the kernel's high-water mark of resident
memory, mapped files included, and the largest anonymous part of it seen in samples a tenth of a second apart.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_text(path, size):
    """Write about `size` bytes, as a source file of the standard library a line of JSON, or as one .txt document."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(file for file in library.rglob("*.py") if "site-packages" not in file.parts)
    lines, written = [], 0
    for file in sources:
        source = file.read_text(encoding="utf-8", errors="replace")
        lines.append(json.dumps({"text": source}) + "\n" if path.endswith(".jsonl") else source)
    with open(path, "w", encoding="utf-8") as out:
        while written < size:
            for line in lines:
                written += out.write(line)  # characters: nearly all are one byte
                if written >= size:
                    break


def resident(key):
    """Return the field `key` of /proc/self/status in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def tokenizer_alone(model, path):
    """Print the tokenizer's own speed on the first 100 MB of the file, as JSON."""
    from transformers import AutoTokenizer

    with open(path, encoding="utf-8") as file:
        head = file.read(100_000_000)
    rows = head.splitlines(keepends=True)
    texts = [json.loads(row)["text"] for row in rows if row.endswith("\n")] if path.endswith(".jsonl") else rows
    batches, size = [[]], 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size > 1_000_000:
            batches.append([])
            size = 0
    backend = AutoTokenizer.from_pretrained(model).backend_tokenizer
    start = time.perf_counter()
    tokens = sum(len(code.ids) for batch in batches for code in backend.encode_batch_fast(batch))
    print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}))


def measure(model, path, cache, length):
    """Prepare the file in this process and print one JSON object with the figures."""
    if cache == "none":
        return tokenizer_alone(model, path)
    sys.path.insert(0, str(ROOT))
    from transformers import AutoTokenizer

    import main

    command = ["--train_file", path, "--model_name_or_path", model, "--cache_dir", cache, "--output_dir", cache]
    args = main.parse_args([*command, "--max_seq_length", str(length), "--no_truncation"])
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    base, anonymous, done = resident("VmRSS"), [0.0], threading.Event()

    def sample():
        while not done.wait(0.1):
            anonymous[0] = max(anonymous[0], resident("RssAnon"))

    threading.Thread(target=sample, daemon=True).start()
    start = time.perf_counter()
    chunks, _ = main.load_and_prepare_dataset(args, tokenizer)
    seconds = time.perf_counter() - start
    done.set()
    figures = {"seconds": seconds, "tokens": len(chunks) * length, "base": base, "peak": resident("VmHWM")}
    print(json.dumps(figures | {"anonymous": anonymous[0]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with the tokenizer, such as the quickstart's")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[25, 250, 1000], help="sizes of the text")
    parser.add_argument("--format", choices=["jsonl", "txt"], default="jsonl", help="JSON lines, or one document")
    parser.add_argument("--max_seq_length", type=int, default=2048)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # the child: text file, cache directory
    args = parser.parse_args()
    if args.measure:
        return measure(args.model, *args.measure, args.max_seq_length)

    print("  text      run          seconds   tokens/s   share   peak RSS  of it anonymous   at start   cache")
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path, cache = os.path.join(folder, f"text.{args.format}"), os.path.join(folder, "cache")
            write_text(path, megabytes * 1_000_000)
            speeds = {}
            for name in ("tokenizer", "first", "cached"):
                place = "none" if name == "tokenizer" else cache
                command = [sys.executable, __file__, "--model", args.model, "--measure", path, place]
                command += ["--max_seq_length", str(args.max_seq_length)]
                child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(child.stdout.splitlines()[-1])
                speeds[name] = row["tokens"] / row["seconds"]
                said = f"{megabytes:5,} MB  {name:9} {row['seconds']:9.1f} s {speeds[name]:10,.0f}"
                if name != "tokenizer":
                    share = f"{speeds['first'] / speeds['tokenizer']:7.0%}" if name == "first" else " " * 7
                    size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file()) / 1e6
                    said += f" {share} {row['peak']:7,.0f} MB {row['anonymous']:13,.0f} MB {row['base']:7,.0f} MB"
                    said += f" {size:6,.0f} MB"
                print(said, flush=True)


if __name__ == "__main__":
    main()
