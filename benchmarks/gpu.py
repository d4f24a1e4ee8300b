"""How fast, and in how much memory, main.py and others train Gemma 3 270M on a GPU, in minutes and without a network.

    bash tests/run.sh --gpu                      the values of tests/test_gpu.py, then this table
    python benchmarks/gpu.py [--minutes 5]       this table alone

The most valuable rows come first; a row that the minutes left are too few for says "no time". Each is a fresh process
that makes 4 + 12 steps on random tokens, with a model of Gemma 3 270M's shape and random weights; throughput.py holds
the stopwatch, outside, and does not time the first 4 steps. Tables go to standard output and, as they grow, to
$OUT/gpu.md if OUT is set. Nothing is installed: TRL and Liger have rows of their own where they can be imported.

Exit status 1: a trainer failed, or first losses of the same batch differ. 2: there is nothing to measure on.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import throughput  # noqa: E402  the model, the text, the children, the stopwatch
from mfu import peak_of  # noqa: E402

NEEDED = ("torch", "pytest", "transformers", "datasets", "accelerate", "tokenizers", "tensorboard")
SHOWN = (*NEEDED, "triton", "trl", "liger-kernel")
COMPILED = "--torch_compile True"
ROWS = (  # trainer, which of --batches, flags of main.py; the most valuable first
    ("ours", 0, "--bf16"), ("plain", 0, ""), ("ours", 2, "--bf16"), ("ours", 0, f"--bf16 {COMPILED}"),
    ("ours", 2, f"--bf16 {COMPILED}"), ("ours", 2, "--bf16 --gradient_checkpointing"), ("ours", 1, "--bf16"),
    ("liger", 0, ""), ("trl", 0, ""), ("ours", 0, "--fp16"), ("ours", 0, ""), ("ours", 0, "--bf16 --use_liger_kernel"),
)  # fmt: skip
NAMES = {"plain": "plain Trainer, bf16", "liger": "Trainer with Liger, bf16", "trl": "TRL's SFTTrainer, bf16"}
COLUMNS = ("run", "tokens a step", "tokens/s", "MFU", "peak GB", "reserved GB", "predicted GB", "loss", "seconds")


def note(*lines):
    """Print lines, and append them to the report."""
    print(*lines, sep="\n", flush=True)
    if os.environ.get("OUT"):
        with open(Path(os.environ["OUT"], "gpu.md"), "a", encoding="utf-8") as report:
            report.write("\n".join(lines) + "\n")


def obstacle():
    """Why nothing can be measured here, in a sentence, or None. It takes the GPU, so only a child may ask."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name}: set PYTHON to a Python that has {', '.join(NEEDED)}"
    if os.environ.get("OUT") and not (os.path.isdir(os.environ["OUT"]) and os.access(os.environ["OUT"], os.W_OK)):
        return f"OUT is {os.environ['OUT']}, where nothing can be written: make that folder, or leave OUT out"
    try:
        import torch

        if not torch.cuda.is_available():
            here = f"torch {torch.__version__} of {sys.executable} sees no CUDA GPU here"
            return f"{here}: this is for a machine that has one; PYTHON chooses another Python"
        torch.ones(8, device="cuda").sum().item()
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch cannot use the GPU: {' '.join(str(error).split())[:300]}"
    return None


def check(args):
    """Say why nothing can be measured here, or begin a part of the report: device, versions, date, command."""
    if not args.quick and (why := obstacle()):
        print(f"tests/run.sh --gpu: error: {why}", file=sys.stderr)
        return 2
    import torch

    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout.split()
        except (OSError, subprocess.SubprocessError):
            driver = []
        size = torch.cuda.get_device_properties(0).total_memory / 1e9
        device = f"{torch.cuda.get_device_name()}, {size:.0f} GB, driver {driver[0] if driver else 'unknown'}"
    known = [f"Python {platform.python_version()}"]
    for name in SHOWN:
        try:
            known.append(f"{name} {torch.__version__ if name == 'torch' else version(name)}")
        except PackageNotFoundError:
            known.append(f"no {name}")
    code = hashlib.sha256((HERE.parent / "main.py").read_bytes()).hexdigest()[:12]
    words = [word for word in sys.argv[1:] if word not in ("--check", args.check)]
    command = "bash tests/run.sh --gpu" if args.check.startswith("# ") else "python benchmarks/gpu.py"
    what = f"`{' '.join([command, *words])}` — {device}; {', '.join(known)}; main.py {code}"
    return note("", args.check, "", f"{what}; {time.strftime('%Y-%m-%d %H:%M')}")


# ── Predictions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def predict(path, rows, length):
    """Write a line of JSON for each of the rows (trainer, batch, flags): GB by gpu_memory.py, or None."""
    import gpu_memory

    with open(path, "w", encoding="utf-8") as answers:
        for trainer, batch, flags in rows:
            known = trainer == "plain" or (trainer == "ours" and "16" in flags and "liger" not in flags)
            gigabytes = None
            if known and COMPILED not in flags:
                options = {"checkpointing": "--gradient_checkpointing" in flags, "fp16": "--fp16" in flags}
                options |= {"plain": trainer == "plain", "accumulation": False}
                gigabytes = gpu_memory.predict(batch, length, **options)
            print(json.dumps([trainer, batch, flags, gigabytes]), file=answers, flush=True)


def predicted(path, *row):
    """What predict() has said about a row so far, as text."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    answers = {tuple(known): gigabytes for *known, gigabytes in map(json.loads, lines)}
    gigabytes = answers.get(row)
    return f"{gigabytes:.1f}" if gigabytes else "–"


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def cells_of(row, trainer, batch, flags, args, facts):
    """The middle columns of a row that was measured."""
    used = "–"
    if facts["peak"] and (trainer != "ours" or "16" in flags):  # not in float32
        used = f"{row['speed'] * facts['flops'] / facts['peak'] / 1e12:.1%}"
    reserved = f"{row['reserved']:.1f}" if "reserved" in row else "–"
    expected = predicted(args.predictions, trainer, batch, flags)
    return [f"{row['speed']:,.0f}", used, f"{row['memory']:.1f}", reserved, expected,
            f"{row['loss']:.3f} → {row['last']:.3f}"]  # fmt: skip


def measure_all(args, facts):
    """Write a row for each run that there is time for. Returns: {(name, batch): result}."""
    results, longest = {}, 20.0  # seconds of the longest row so far
    note("", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|")
    for trainer, size, flags in args.rows:
        name, batch = NAMES.get(trainer, f"main.py {flags}".strip()), args.batches[size]
        more = 40 * (COMPILED in flags)  # compiling takes a while
        began, left = time.monotonic(), args.until - time.monotonic()
        absent = throughput.missing(trainer, args)
        if "liger" in flags:
            absent = absent or throughput.missing("liger", args)
        if absent:
            row = {"failed": absent.removeprefix("skipped: ")}
        elif left < 1.2 * longest + more:
            row = {"failed": "no time"}
        else:
            settings = argparse.Namespace(**vars(args) | {"batch": batch, "flags": flags.split()})
            row = throughput.measure(trainer, settings, None, inside=True, patience=max(left, 30))
        seconds = time.monotonic() - began
        if "speed" in row:
            longest = max(longest, seconds - more)
        results[name, batch] = row
        middle = [f"**{row.get('failed')}**", *["–"] * 5]
        if "failed" not in row:
            middle = cells_of(row, trainer, batch, flags, args, facts)
        note(f"| {' | '.join([name, f'{batch} × {args.length:,}', *middle, f'{seconds:.0f}'])} |")
        if row.get("said"):
            note(f"| ↑ {row['said'].replace('|', '/')[:400]} |" + " |" * (len(COLUMNS) - 1))
    return results


def compare(results, args, facts):
    """Say how the rows of main.py stand beside the plain Trainer's. Returns: whether the first losses agree."""
    plain = results.get((NAMES["plain"], args.batches[0]), {})
    for (name, batch), row in results.items():
        if "speed" in row and "speed" in plain and batch == args.batches[0] and row is not plain:
            times = row["speed"] / plain["speed"]
            note(f"- {name}: {times:.2f} × plain, in {row['memory'] / plain['memory']:.2f} × its memory")
    alike = True
    for size in set(args.batches):
        losses = [row["loss"] for (_, batch), row in results.items() if batch == size and "loss" in row]
        agree = not losses or max(losses) - min(losses) <= throughput.TOLERANCE  # False for a NaN, too
        alike = alike and agree
        if not agree:
            note(f"- the first losses at {size} × {args.length:,} DIFFER by more than {throughput.TOLERANCE}")
    return alike


def profile(args):
    """Append the tables of step_profile.py, if there is time for them."""
    left = args.until - time.monotonic()
    batch, steps = args.batches[0], 20
    if left < 45:
        return note("", "Where a step's time goes: no time")
    command = [str(HERE / "step_profile.py"), "--model", args.model, "--batch", batch, "--length", args.length,
               "--steps", steps]  # fmt: skip
    status, lines, errors, _ = throughput.run([str(word) for word in command], args, seconds=left)
    said = [line for _, line in lines]
    first = next((number for number, line in enumerate(said) if " tokens a step; " in line), len(said))
    title = f"### Where a step's time goes: `step_profile.py --batch {batch} --length {args.length} --steps {steps}`"
    note("", title, "", *(said[first:] if status == 0 else [f"exit status {status}: {errors.strip()[-300:]}"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=5, help="for this table (default: 5)")
    add("--batches", type=int, nargs=3, default=[4, 8, 16], help="chunks a step, from few to many (default: 4 8 16)")
    add("--length", type=int, default=2048, help="tokens a chunk (default: 2048)")
    add("--steps", type=int, default=16, help="of each run, the first quarter not timed (default: 16)")
    add("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these texts")
    add("--model", help="directory of a model and its tokenizer; unset: random weights in Gemma 3 270M's shape")
    add("--cache", default=str(HERE / ".cache"), help="where the random model is kept")
    add("--quick", action="store_true", help="try the script, also on a CPU: few, short steps of --model, no profile")
    add("--check", metavar="TITLE", help=argparse.SUPPRESS)  # a child: is there a GPU? begins a part of the report
    add("--predict", nargs=3, help=argparse.SUPPRESS)  # a child: file, rows, length
    args = parser.parse_args()
    if args.model and not os.path.isdir(args.model):
        parser.error(f"--model {args.model}: no such directory")
    if args.predict:
        return predict(args.predict[0], json.loads(args.predict[1]), int(args.predict[2]))
    if args.quick and not args.model:
        parser.error("--quick needs --model")
    if args.check:
        return check(args)
    if status := subprocess.run([sys.executable, *sys.argv, "--check", "## Speed and memory"]).returncode:
        return status
    if args.quick:
        args.batches, args.length, args.steps = [1, 2, 3], 64, 4
    os.makedirs(args.cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.cache) as args.work:
        return speeds(args)


def speeds(args):
    """Measure, compare, profile. Returns: the exit status."""
    args.until = time.monotonic() + 60 * args.minutes
    args.gpu, args.no_peer_install, args.warmup = not args.quick, True, max(1, args.steps // 4)
    names = {row: NAMES.get(row[0], f"main.py {row[2]}") for row in ROWS}
    args.rows = [row for row in ROWS if not args.only or any(text in names[row] for text in args.only)]
    args.predictions = Path(args.work, "predictions")
    asked = json.dumps([(trainer, args.batches[size], flags) for trainer, size, flags in args.rows])
    oracle = None
    if not args.quick and (HERE / "gpu_memory.py").exists():  # on the CPU, while the text is made
        command = [sys.executable, __file__, "--predict", str(args.predictions), asked, str(args.length)]
        oracle = subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stderr=subprocess.DEVNULL)

    args.model = args.model or f"{args.cache}/gemma-3-270m-random"
    args.batch = max(args.batches)  # of the text that prepare() makes
    device = throughput.ask("probe", args)[0]["device"]
    facts, _ = throughput.ask("prepare", args)
    facts["peak"] = peak_of(device) if args.gpu else 0
    results = measure_all(args, facts)
    against = f"MFU: {facts['flops'] / 1e9:.2f} GFLOP a token, against {facts['peak']} TFLOP/s."
    note("", f"{facts['parameters'] / 1e6:.0f} M weights; {args.steps} steps, the first {args.warmup} not timed. Peak: "
         "what tensors took; reserved: what PyTorch held for them, to which context and workspaces come, about 0.6 GB; "
         f"predicted: the peak by gpu_memory.py. {against if facts['peak'] else 'No MFU: no peak known.'}")  # fmt: skip
    note("")
    alike = compare(results, args, facts)
    if not args.quick:
        profile(args)
    if oracle:
        oracle.kill()
        oracle.wait()
    note("", f"{60 * args.minutes - (args.until - time.monotonic()):.0f} s in all")
    return int(not alike or any("exit status" in row.get("failed", "") for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
