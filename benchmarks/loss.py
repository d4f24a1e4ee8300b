"""The loss alone, at the real shape, across chunk sizes: seconds and peak memory beside the plain loss.

    python benchmarks/loss.py [--tokens 2048] [--rounds 3] [--memory 0.125 0.25 0.5 1 2 4]

Hidden states (tokens, 640) and the head (262,144, 640) are random; each measurement is a process of its own, in turns.
A round computes loss and both gradients under bfloat16 autocast, as training does; peak memory is above the inputs.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter

WIDTH, WORDS = 640, 262_144  # of Gemma 3 270M


def measure(tokens, gigabytes):
    """Print seconds (the second of two calls), peak GB above the inputs, and the mean loss; 0 gigabytes: plain."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import main

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
    weight = (torch.randn(WORDS, WIDTH, device=device) * 0.1).requires_grad_()
    labels = torch.randint(WORDS, (tokens,), device=device)
    main.LOSS_MEMORY[device] = gigabytes * 1e9

    def peak():  # bytes
        return torch.cuda.max_memory_allocated() if device == "cuda" else getrusage(RUSAGE_SELF).ru_maxrss * 1024

    start = peak()
    for _ in range(2):
        hidden.grad = weight.grad = None
        before = perf_counter()
        with torch.autocast(device, torch.bfloat16):
            if gigabytes:
                losses, hidden.grad, weight.grad = main.token_losses(hidden, weight, labels, None, True)
                loss = losses.detach().sum()
            else:
                loss = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
        if not gigabytes:
            loss.backward()
        mean = loss.item() / tokens  # waits for the device
        seconds = perf_counter() - before
    print(seconds, (peak() - start) / 1e9, mean)


def run(argv=None):
    """Measure in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1, 2, 4], help="GB of a chunk")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        return measure(args.tokens, args.one)
    seen = {gigabytes: [] for gigabytes in [0, *args.memory]}
    for _ in range(args.rounds):
        for gigabytes in seen:
            words = [sys.executable, __file__, "--tokens", str(args.tokens), "--one", str(gigabytes)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            seen[gigabytes].append([float(word) for word in done.stdout.split()])
    print("| loss | rows a chunk | seconds (least to most) | peak GB | mean loss |\n|---|---|---|---|---|")
    for gigabytes, rows in seen.items():
        seconds, peaks, means = zip(*rows, strict=True)
        size = int(gigabytes * 1e9 / (8 * WORDS)) or args.tokens
        print(f"| {f'chunks of {gigabytes:g} GB' if gigabytes else 'plain'} | {min(size, args.tokens):,} "
              f"| {median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {max(peaks):.2f} "
              f"| {means[0]:.4f} |")  # fmt: skip


if __name__ == "__main__":
    run()
