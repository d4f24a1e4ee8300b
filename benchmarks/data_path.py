"""How much time, memory and disk the data path takes: text → tokens → chunks, through main.py's own functions.

    python benchmarks/data_path.py --model quickstart/gemma-3-270m --megabytes 10 100 1000

Each size runs twice in fresh processes: the first prepares the data, the second finds it in the cache. The text is
JSON lines made from the sources of Python's standard library, over and over until the size is reached. Peak memory is
the kernel's high-water mark of resident memory, mapped files included, and the largest anonymous part of it seen in
samples a tenth of a second apart.
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
    """Write JSON lines of about `size` bytes, a source file of the standard library a line."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(file for file in library.rglob("*.py") if "site-packages" not in file.parts)
    lines, written = [], 0
    for file in sources:
        lines.append(json.dumps({"text": file.read_text(encoding="utf-8", errors="replace")}) + "\n")
    with open(path, "w", encoding="utf-8") as out:
        while written < size:
            for line in lines:
                written += out.write(line)  # ASCII: json.dumps escapes the rest
                if written >= size:
                    break


def resident(key):
    """Return the field `key` of /proc/self/status in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def measure(model, path, cache, length):
    """Prepare the file in this process and print one JSON object with the figures."""
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
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000], help="sizes of the text")
    parser.add_argument("--max_seq_length", type=int, default=2048)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # the child: text file, cache directory
    args = parser.parse_args()
    if args.measure:
        return measure(args.model, *args.measure, args.max_seq_length)

    print("  text      run        seconds   tokens/s   peak RSS  of it anonymous   at start   cache")
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path, cache = os.path.join(folder, "text.jsonl"), os.path.join(folder, "cache")
            write_text(path, megabytes * 1_000_000)
            for name in ("first", "cached"):
                command = [sys.executable, __file__, "--model", args.model, "--measure", path, cache]
                command += ["--max_seq_length", str(args.max_seq_length)]
                child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(child.stdout.splitlines()[-1])
                size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file()) / 1e6
                print(
                    f"{megabytes:5,} MB  {name:7} {row['seconds']:9.1f} s {row['tokens'] / row['seconds']:10,.0f} "
                    f"{row['peak']:7,.0f} MB {row['anonymous']:13,.0f} MB {row['base']:7,.0f} MB {size:6,.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
