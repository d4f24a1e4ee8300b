"""Where the time of a training step goes: main.py's own loop under torch.profiler, at the real shape.

    python benchmarks/step_profile.py [--model DIR] [--batch 1] [--length 1024] [--steps 3] [flags of main.py]

Times are of the device that computes: the GPU's where there is one, else the CPU's. The first step is profiled too, so
take a few; on a GPU `--steps 20` drowns it.

The profiler lists a GPU's kernel twice, in the operation of the CPU that launched it and as an event of its own. Only
the former has shapes, so only the former counts. Parts are told apart by names and shapes, and what falls back to plain
operations may be misfiled: attention's math fallback goes to the layers' matrix products and sums, a _foreach_ that
works tensor by tensor to the layers or, for the embedding, to the head.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import throughput  # noqa: E402  its model, text and command line

WORDS = 262_144  # of Gemma 3's vocabulary
HEAD = {WORDS}  # what has one of these sizes belongs to the head; profile() adds the words that main.py takes at a time


def kind_of(event):
    """The part of a step that an operation belongs to, by its name and the shapes of its inputs."""
    sizes = {size for shape in event.input_shapes if isinstance(shape, list) for size in shape if isinstance(size, int)}
    name = event.key.lower()
    if "optimizer" in name or "adam" in name or "foreach" in name or "_clip_grad" in name:
        return "optimizer and clipping"
    if "scaled_dot_product" in name or "attention" in name or "flash" in name:
        return "attention"
    matrix = name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")
    if HEAD & sizes:
        return "head: matrix products" if matrix else "head: softmax, losses, casts, sums"
    return "layers: matrix products" if matrix else "layers: norms, activations, casts, sums"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(HERE / ".cache/gemma-3-270m-random"), help="made if it is not there")
    add("--batch", type=int, default=1)
    add("--length", type=int, default=1024)
    add("--steps", type=int, default=3)
    args, more = parser.parse_known_args()
    os.makedirs(HERE / ".cache", exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HERE / ".cache") as args.work:
        throughput.prepare(args)
        profile(throughput.command_line(args)[1:] + more, args)


def profile(argv, args):
    """Train under the profiler, print the share of each part."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    import main as trainer

    gpu = torch.cuda.is_available()
    HEAD.add(trainer.VOCABULARY_PART["cuda" if gpu else "cpu"])
    if args.batch * args.length in HEAD:
        sys.exit(f"{args.batch} x {args.length} tokens cannot be told from as many words: choose another --length")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    make, seen = trainer.make_trainer, []

    def make_trainer(*parts):
        made = make(*parts)
        step = made.train

        def train(*words, **named):
            with profiler(activities=activities, record_shapes=True) as record:
                result = step(*words, **named)
            seen.append(record.key_averages(group_by_input_shape=True))
            return result

        made.train = train
        return made

    trainer.make_trainer = make_trainer
    trainer.main(trainer.parse_args(argv), trainer.Signals())
    times = {}
    for event in seen[0]:
        if event.device_type != DeviceType.CPU:  # a kernel by itself
            continue
        time = event.self_device_time_total if gpu else event.self_cpu_time_total
        times[kind_of(event)] = times.get(kind_of(event), 0) + time / 1e6
    total = sum(times.values())
    print(f"\n{args.batch} × {args.length} tokens a step, {args.steps} steps\n")
    print("| part | seconds a step | share |\n|---|---|---|")
    for kind, seconds in sorted(times.items(), key=lambda row: -row[1]):
        print(f"| {kind} | {seconds / args.steps:.3f} | {seconds / total:.1%} |")


if __name__ == "__main__":
    main()
