"""Where the time of a training step goes: main.py's own loop under torch.profiler, at the real shape.

    python benchmarks/step_profile.py [--model DIR] [--batch 1] [--length 1024] [--steps 3] [flags of main.py]

Times are of the device that computes: the GPU's where there is one, else the CPU's. Of eight steps or more the first
quarter is left out, the second is timed without the profiler, one is the profiler's own warm-up, and the last one,
which writes a log line, is left out again; of fewer steps only the first. On a GPU take `--steps 20`: told are also the
kernels that take most, how many are launched, what the host waits for, and, if mfu.py knows the GPU's peak, the MFU.

A kernel belongs to the operation of the CPU that launched it, and that to a part by its name, by those of its
callers, and by its shapes. In compiled layers Triton's kernels are told from the products and the attention between
them by their names. Attention that falls back to plain operations goes to the layers' matrix products and sums.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import throughput  # noqa: E402  its model, text and command line
from mfu import flops_per_token, peak_flops  # noqa: E402

HEAD = set()  # what has one of these sizes belongs to the head: the words, and those that main.py takes at a time
PRODUCT = re.compile(r"aten::_?(scaled_)?(mm|addmm|bmm|baddbmm|linear|matmul)_?\b|triton_tem_")  # beginnings of names
LAUNCH = re.compile(r"(cuda|cu|hip)(Module)?(Launch(Cooperative)?Kernel|GraphLaunch)")  # calls that start kernels
WAIT = re.compile(r"(cuda|cu|hip)((Device|Stream|Event|Ctx)Synchronize|Memcpy(DtoH|HtoD)?(_v2)?$)")  # calls that wait
COUNT = 25  # kernels in the table


def line_of(event):
    """Names of an operation and of all that it was called by, innermost first, in lower case."""
    names = []
    while event is not None:
        names.append(event.name.lower())
        event = event.cpu_parent
    return names


def kind_of(event):
    """The part of a step that an operation belongs to, by its name, its callers and the shapes of its inputs."""
    shapes = [shape for shape in event.input_shapes or () if isinstance(shape, list)]
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    names = line_of(event)
    line = " ".join(names)
    if re.search("optimizer|adam|foreach|clip_grad", line):
        return "optimizer and clipping"
    if re.search("attention|attn|flash", line):
        return "attention"
    matrix = PRODUCT.match(names[0])
    head = HEAD & sizes or "chunkedloss" in line or ("triton" in names[0] and "softmax" in names[0])
    if head:
        return "head: matrix products" if matrix else "head: softmax, losses, casts, sums"
    return "layers: matrix products" if matrix else "layers: norms, activations, casts, sums"


def parts_of(events, gpu):
    """Sum up what the events took on the device that computes. Returns: {part: seconds}."""
    times = Counter()
    for event in events:
        if on_device(event) or event.name.startswith("ProfilerStep"):  # a kernel by itself; a frame around a step
            continue
        time = sum(kernel.duration for kernel in event.kernels) if gpu else event.self_cpu_time_total
        if time:
            times[kind_of(event)] += time / 1e6
    lost = sum(seconds for seconds, _ in kernels_of(events).values()) - sum(times.values()) if gpu else 0
    if lost > 1e-6 * sum(times.values()):
        times["launched outside of operations"] = lost
    return times


def on_device(event):
    """Whether an event is of a GPU itself: a kernel, a copy, or the shadow of an annotation."""
    return str(event.device_type) != "DeviceType.CPU"


def kernels_of(events):
    """What ran on the GPU. Returns: {name: (seconds, count)}, copies and fills included."""
    seen = {}
    for event in events:
        if on_device(event) and not event.is_user_annotation:
            seconds, count = seen.get(event.name, (0, 0))
            seen[event.name] = (seconds + event.time_range.elapsed_us() / 1e6, count + 1)
    return seen


def calls_of(events):
    """What the host asked CUDA for. Returns: the number of launches, and {(call that waits, its operation): count}."""
    launches, waits = 0, Counter()
    for event in events:
        if on_device(event):
            continue
        launches += bool(LAUNCH.match(event.name))
        if WAIT.match(event.name):
            around = [name for name in line_of(event)[1:] if not name.startswith("profilerstep")]
            waits[event.name, " in ".join(around[:3]) or "no operation"] += 1
    return launches, waits


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
        args.flags = [] if "--fp16" in more else ["--bf16"]
        args.logging = args.steps  # one log line, at the end
        argv = [*throughput.command_line(args)[1:], *more]
        profile(argv, args)


def plan(steps):
    """Divide steps, as the docstring says. Returns: how many are left out, timed, and not recorded before the rest."""
    if steps < 8:
        return min(1, steps - 1), 0, min(1, steps - 1)
    return steps // 4, steps // 4, 2 * (steps // 4) + 1


def profile(argv, args):
    """Train under the profiler, print the share of each part."""
    import torch
    import transformers
    from torch.profiler import ProfilerActivity, schedule
    from torch.profiler import profile as profiler

    import main as trainer

    gpu = torch.cuda.is_available()
    HEAD.update(set() if gpu else {trainer.VOCABULARY_PART["cpu"]})
    skipped, timed, before = plan(args.steps)
    recorded = args.steps - before - (args.steps >= 8)  # the last one writes a log line
    events, clock, made = [], {}, []

    class Recorder(transformers.TrainerCallback):
        """Starts and stops the profiler, and the clock, between steps."""

        def on_train_begin(self, *_, **__):
            self.record = profiler(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu, record_shapes=True,
                schedule=schedule(wait=max(0, before - 1), warmup=min(1, before), active=recorded, repeat=1),
                on_trace_ready=lambda record: events.extend(record.events()))  # fmt: skip
            self.record.start()

        def on_step_begin(self, args, state, *_, **__):
            if gpu and state.global_step in (skipped, skipped + timed, before):  # nothing goes on from earlier steps
                torch.cuda.synchronize()
            clock[state.global_step] = perf_counter()
            if state.global_step:
                self.record.step()

        def on_train_end(self, *_, **__):
            self.record.stop()

    make = trainer.make_trainer

    def make_trainer(*parts):
        made.append(make(*parts))
        HEAD.add(made[0].model.get_output_embeddings().weight.shape[0])
        if args.batch * args.length in HEAD:
            sys.exit(f"{args.batch} x {args.length} tokens cannot be told from as many words: choose another --length")
        made[0].add_callback(Recorder())
        return made[0]

    trainer.make_trainer = make_trainer
    trainer.main(trainer.parse_args(argv), trainer.Signals())
    tokens = args.batch * args.length * made[0].args.gradient_accumulation_steps  # of a step
    print(f"\n{tokens:,} tokens a step; {recorded} of {args.steps} steps recorded\n")
    times = parts_of(events, gpu)
    total = sum(times.values())
    print("| part | seconds a step | share |\n|---|---|---|")
    for kind, seconds in times.most_common():
        print(f"| {kind} | {seconds / recorded:.{4 if gpu else 3}f} | {seconds / total:.1%} |")
    print()
    if timed:
        step = (clock[skipped + timed] - clock[skipped]) / timed  # seconds
        busy = f"; the GPU computes for {total / recorded / step:.1%} of that" * gpu
        print(f"- without the profiler: {step:.4f} s a step, {tokens / step:,.0f} tokens/s{busy}")
        if peak := peak_flops(made[0].args):  # FLOP/s
            flops = flops_per_token(made[0].model, args.length)
            print(f"- MFU: {tokens / step * flops / peak:.1%}, {flops / 1e9:.2f} GFLOP a token against "
                  f"{peak / 1e12:,.0f} TFLOP/s; {tokens * recorded * flops / peak / total:.1%} while it computes")
    if gpu:
        report_gpu(events, recorded)


def report_gpu(events, steps):
    """Print launches, waits and the kernels that take most. events: those of so many steps."""
    launches, waits = calls_of(events)
    print(f"- {launches / steps:,.0f} launches of kernels a step")
    print(f"- {sum(waits.values()) / steps:.2f} waits of the host for the GPU a step (one in all is the profiler's):\n")
    print("| call | times a step | in |\n|---|---|---|")
    for (name, where), count in waits.most_common():
        print(f"| {name} | {count / steps:.2f} | {where} |")
    parts = {}  # kernel: {part: seconds}
    for event in events:
        for kernel in event.kernels if not on_device(event) else ():
            parts.setdefault(kernel.name, Counter())[kind_of(event)] += kernel.duration / 1e6
    kernels = kernels_of(events)
    total = sum(seconds for seconds, _ in kernels.values())
    rows = sorted(kernels.items(), key=lambda row: -row[1][0])[:COUNT]
    print("\n| kernel | mostly for | ms a step | share | times a step |\n|---|---|---|---|---|")
    for name, (seconds, count) in rows:
        part = parts[name].most_common(1)[0][0] if name in parts else "–"
        short = re.sub(r"\s+", " ", name).replace("|", "/")[:100]
        print(f"| `{short}` | {part} | {1e3 * seconds / steps:.3f} | {seconds / total:.1%} | {count / steps:,.1f} |")


if __name__ == "__main__":
    main()
