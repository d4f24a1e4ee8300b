"""The loss alone, at the real shape: seconds and peak memory of main.py's and of others, across chunk sizes.

    python benchmarks/loss.py [--tokens 2048] [--rounds 3] [--memory 0.27 0.54 1.08] [--only ours torch-none]

    plain         all logits at once, as transformers does
    ours          main.py's ChunkedLoss: gradients made beside the loss, chunk by chunk
    torch-none    torch.nn.functional.linear_cross_entropy (torch 2.13 or newer), each loss returned, summed in float32
    torch-sum     the same, summed inside, in the dtype of its inputs
    torch-auto    the same with its own choice of rows, which follows V/H
    checkpointed  chunks under torch.utils.checkpoint: the logits are computed a second time in the backward pass
    liger, cce    Liger's and Apple's fused kernels, on a GPU where liger-kernel or cut-cross-entropy is installed

Hidden states (tokens, 640) and the head (262,144, 640) are random; each measurement is a process of its own, in turns.
A round computes loss and both gradients under bfloat16 autocast, as training does, and scales them by the gradient that
comes from above, here 1, as every backward pass does. Peak memory is above the inputs.
"""

import argparse
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter

WIDTH, WORDS = 640, 262_144  # of Gemma 3 270M
OTHERS = ("torch-none", "torch-sum", "torch-auto", "checkpointed", "liger", "cce")
NEEDS = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


def loss_of(name, hidden, weight, labels, rows):
    """Return the summed loss of one of the others, to go backward from. rows (int): tokens in a chunk."""
    import torch
    from torch.nn.functional import cross_entropy

    if name == "plain":
        return cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    if name == "checkpointed":
        from torch.utils.checkpoint import checkpoint

        def part(states, targets):
            return cross_entropy((states @ weight.T).float(), targets, reduction="sum")

        parts = zip(hidden.split(rows), labels.split(rows), strict=True)
        return sum(checkpoint(part, states, targets, use_reentrant=False) for states, targets in parts)
    if name == "liger":
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)
    low, head = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)  # these two do not heed autocast
    if name == "cce":
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(low, head, labels, reduction="sum")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if name == "torch-auto" else rows)
    reduction = "none" if name == "torch-none" else "sum"
    losses = torch.nn.functional.linear_cross_entropy(low, head, labels, reduction=reduction, options=options)
    return losses.float().sum()


def measure(name, tokens, gigabytes):
    """Print seconds (the second of two calls), peak GB above the inputs, and the mean loss."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import main

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, device=device).mul_(0.1).requires_grad_()  # in place: 0.67 GB, not twice that
    labels = torch.randint(WORDS, (tokens,), device=device)
    main.LOGITS_BYTES[device] = gigabytes * 1e9
    if name == "ours" and device == "cuda":  # as in main.use_chunked_loss()
        with torch.autocast(device, torch.bfloat16):
            main.use_compiled_softmax(weight, None)

    def peak():  # bytes
        return torch.cuda.max_memory_allocated() if device == "cuda" else getrusage(RUSAGE_SELF).ru_maxrss * 1024

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = peak()
    for _ in range(2):
        hidden.grad = weight.grad = None
        before = perf_counter()
        with torch.autocast(device, torch.bfloat16):
            if name == "ours":
                loss, _ = main.ChunkedLoss.apply(hidden, weight, labels, None, True)  # no softcap
            else:
                loss = loss_of(name, hidden, weight, labels, rows_of(name, tokens, gigabytes))
        loss.backward()
        mean = loss.item() / tokens  # waits for the device
        seconds = perf_counter() - before
    print(seconds, (peak() - start) / 1e9, mean)


def rows_of(name, tokens, gigabytes):
    """Tokens whose logits, as main.py counts them (2 bytes a logit under bfloat16), fill so much memory at most."""
    most = max(1, int(gigabytes * 1e9 / (2 * WORDS)))
    return math.ceil(tokens / math.ceil(tokens / most)) if name == "ours" else most  # main.py's chunks are even


def run(argv=None):
    """Measure in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=2048)
    add("--rounds", type=int, default=3)
    add("--memory", type=float, nargs="+", default=[0.07, 0.135, 0.27, 0.54, 1.08], help="GB of a chunk, for ours")
    add("--others", type=float, default=0.54, help="GB of a chunk, for the others (default: 0.54)")
    add("--only", nargs="+", choices=["plain", "ours", *OTHERS], help="some of them")
    add("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        return measure(args.one[0], args.tokens, float(args.one[1]))
    cases = [("plain", 0), *(("ours", size) for size in args.memory), *((name, args.others) for name in OTHERS)]
    seen = {case: [] for case in cases if not args.only or case[0] in args.only}
    for name in NEEDS:
        if not importlib.util.find_spec(NEEDS[name]):
            seen.pop((name, args.others), None)
    for _ in range(args.rounds):
        for name, gigabytes in seen:
            words = [sys.executable, __file__, "--tokens", str(args.tokens), "--one", name, str(gigabytes)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            *notes, figures = done.stdout.strip().splitlines()
            print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
            seen[name, gigabytes].append([float(word) for word in figures.split()])
    print("| loss | rows a chunk | seconds (least to most) | peak GB | mean loss |\n|---|---|---|---|---|")
    for (name, gigabytes), measured in seen.items():
        if not measured:
            print(f"| {name} | | failed | | |")
            continue
        seconds, peaks, means = zip(*measured, strict=True)
        rows = f"{args.tokens if name == 'plain' else rows_of(name, args.tokens, gigabytes):,}"
        rows = "its own" if name == "torch-auto" else rows
        print(f"| {name} | {rows} | {median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
              f"| {max(peaks):.2f} | {means[0]:.4f} |")  # fmt: skip


if __name__ == "__main__":
    run()
