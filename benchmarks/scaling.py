"""How long a step takes on several machines: a formula, its tables, and a check against real runs.

    python benchmarks/scaling.py                                    the tables of SCALING.md
    python benchmarks/scaling.py --rate 10 --machines 2 --accumulation 32     one case
    python benchmarks/scaling.py --measure                          two machines in network namespaces, a throttled link

The formula, for N processes, each of which makes `accumulation` micro-batches of `compute` seconds before an update:

    step     = accumulation · compute + update + exposed
    exposed  = max(0, wire(blocks) − window) + wire(embedding)
    wire(x)  = 2 (N − 1) / N · bytes(x) / rate + messages(x) · 2 (N − 1) · latency
    window   = 2/3 · compute · (1 − share of the head)

Gradients travel only with the last micro-batch (accelerate's no_sync), around a ring in which every process sends
2 (N − 1) / N of their bytes. The ring runs at the rate of its slowest link: the network card of a machine, whatever
number of GPUs is behind it. The gradients of the layers travel while the backward pass (two thirds of a micro-batch)
goes on through the layers below. The embedding is also the head: its gradient begins with the very first operation of
the backward pass and ends with the last, so it travels when nothing is left to compute; it is 63 % of all gradients.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
EMBEDDING, LAYERS = 262_144 * 640, 100_326_016  # weights of Gemma 3 270M
GOODPUT = 0.94  # of the rate on the label, after the headers of Ethernet, IP and TCP
LATENCY = 25e-6  # seconds a message, between two machines
BUCKET = 25 * 2**20  # bytes a message of the layers' gradients: ddp_bucket_cap_mb's default; the embedding has its own
GBIT = 1e9 / 8  # bytes/s
COMPUTE = 0.272  # seconds of a micro-batch, where --compute says nothing else
WHY = "4 × 2,048 tokens at 35 %% MFU on an A40, not measured"  # twice %, as argparse wants it


def wire(processes, size, messages, rate, latency=LATENCY):
    """Return the seconds of a ring all-reduce of `size` bytes at `rate` bytes/s."""
    return 2 * (processes - 1) / processes * size / rate + messages * 2 * (processes - 1) * latency


def step_time(processes, rate, compute, update, accumulation=8, width=4, embedding=EMBEDDING, layers=LAYERS):
    """Return the seconds of one optimizer step.

    Args: rate (float): bytes/s of the slowest link. compute (float): seconds of a micro-batch, forward and backward.
        update (float): of clipping and Adam. width (int): bytes of a gradient on the wire; 2 with bfloat16 compression.
    """
    exposed = 0
    if processes > 1:
        window = 2 / 3 * compute * layers / (embedding + layers)  # work goes with weights: 6 operations each a token
        behind = wire(processes, layers * width, -(-layers * 4 // BUCKET), rate)
        exposed = max(0, behind - window) + wire(processes, embedding * width, 1, rate)
    return accumulation * compute + update + exposed


def enough(processes, rate, compute, update, width, efficiency=0.9):
    """Return the smallest accumulation at which a process spends `efficiency` of its time computing."""
    alone = [step_time(count, rate, compute, update, 1, width) for count in (1, processes)]
    waiting = alone[1] - alone[0]
    return max(1, -int(-(efficiency / (1 - efficiency) * waiting - update) // compute))


def tables(args):
    """Print Markdown tables: step time, and the share of it that is not waiting for gradients."""
    compute, update = args.compute or COMPUTE, args.update
    assumed = "" if args.compute else f" (assumed: {WHY % ()})"
    print(f"A micro-batch of {compute:.3f} s{assumed}, an update of {update:.3f} s, {args.gpus} GPUs a machine; the "
          f"percentage is of the tokens that as many GPUs would train on if nothing had to travel.\n")  # fmt: skip

    def cell(processes, rate, width, accumulation=args.accumulation):
        seconds = step_time(processes, rate, compute, update, accumulation, width)
        return f"{seconds:.2f} s, {(accumulation * compute + update) / seconds:.0%}"

    rates = [args.rate] if args.rate else [1, 10, 25, 100]
    counts = [args.machines] if args.machines else [2, 3, 4, 8, 16]
    for width, name in ((4, "float32"), (2, "bfloat16 compression")):
        print(f"Gradients in {name}, accumulation {args.accumulation}:\n")
        print(f"| machines | {' | '.join(f'{rate:g} Gbit/s' for rate in rates)} |\n|---|{'---|' * len(rates)}")
        for count in counts:
            cells = [cell(count * args.gpus, rate * GBIT * GOODPUT, width) for rate in rates]
            print(f"| {count} | {' | '.join(cells)} |")
        print()
    print("Smallest accumulation for 90 %, float32 / bfloat16:\n")
    print(f"| machines | {' | '.join(f'{rate:g} Gbit/s' for rate in rates)} |\n|---|{'---|' * len(rates)}")
    for count in counts:
        pairs = [[enough(count * args.gpus, rate * GBIT * GOODPUT, compute, update, width) for width in (4, 2)]
                 for rate in rates]  # fmt: skip
        print(f"| {count} | {' | '.join(f'{wide} / {narrow}' for wide, narrow in pairs)} |")
    if not args.rate:
        links = {"PCIe 4.0 ×16, through the host": 12e9, "PCIe 4.0 ×16, peer to peer": 22e9, "NVLink bridge": 50e9}
        print(f"\nOne machine, float32, accumulation {args.accumulation}:\n")
        print(f"| GPUs | {' | '.join(f'{name}, {rate / 1e9:g} GB/s' for name, rate in links.items())} |")
        print("|---|---|---|---|")
        for count in (2, 4, 8):
            print(f"| {count} | {' | '.join(cell(count, rate, 4) for rate in links.values())} |")


# ── The check: two machines on this one, as two network namespaces joined by a cable of a given rate ─────────────────

SANDBOX = "unshare --user --map-root-user --net --mount --pid --fork --mount-proc --kill-child".split()
CASES = [(1, 4), (4, 4), (1, 2)]  # accumulation, bytes of a gradient: a run each, in which …
RATES = [None, 1000, 250]  # … the cable changes its rate, in Mbit/s, with every step; None: as fast as the machine
MAKE = """
import sys, torch, random, json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast
size, folder = 32_768, sys.argv[1]
config = Gemma3TextConfig(
    vocab_size=size, hidden_size=640, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    intermediate_size=2048, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
)
model = Gemma3ForCausalLM(config)  # its gradients take a second at 1 Gbit/s
model.save_pretrained(folder)
words = Tokenizer(models.WordLevel({str(number): number for number in range(size)}, unk_token="3"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(folder)
with open(folder + "/text.jsonl", "w") as file:
    for _ in range(400):
        file.write(json.dumps({"text": " ".join(str(random.randrange(4, size)) for _ in range(64))}) + "\\n")
embedding = model.get_input_embeddings().weight.numel()
print(json.dumps({"embedding": embedding, "layers": sum(w.numel() for w in model.parameters()) - embedding}))
"""


HALVE = """
from accelerate.utils import DDPCommunicationHookType as Hook, DistributedDataParallelKwargs as Settings
make = Settings.__init__
make.__defaults__ = tuple(Hook.FP16 if value is Hook.NO else value for value in make.__defaults__)
"""  # as sitecustomize.py it runs before main.py, whose --ddp_comm_hook bf16 is for GPUs only: float16 is as wide


def sh(line):
    return subprocess.run(line, shell=True, check=True)


def throttle(rate):
    """Give both ends of the cable a rate in Mbit/s."""
    limit = f"rate {rate}mbit burst 256kb" if rate else "rate 100gbit burst 64mb"
    for name in ("n0", "n1"):
        sh(f"ip netns exec {name} tc qdisc replace dev eth0 root tbf {limit} latency 100ms")


def train(folder, accumulation, width, rounds, port):
    """Run main.py on both machines through run_node0.sh and run_node1.sh. Returns: {rate: seconds of each step}."""
    Path(folder, "sitecustomize.py").write_text(HALVE if width == 2 else "")
    steps = (rounds + 1) * len(RATES) + 1
    flags = ["--model_name_or_path", folder, "--train_file", f"{folder}/text.jsonl", "--max_seq_length", 64,
             "--cache_dir", f"{folder}/cache", "--per_device_train_batch_size", 1, "--max_steps", steps,
             "--gradient_accumulation_steps", accumulation, "--logging_steps", 1, "--save_strategy", "no",
             "--report_to", "none", "--warmup_steps", 0, "--disable_tqdm", "True"]  # fmt: skip
    env = {**os.environ, "MAIN_NODE_IP": "10.77.0.1", "MAIN_PORT": str(port), "TOTAL_GPUS": "2", "GPUS": "",
           "OUTPUT_DIR": f"{folder}/out-{port}", "PYTHONPATH": folder, "OMP_NUM_THREADS": "1",
           "PYTHONUNBUFFERED": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    nodes = []
    for rank in (1, 0):
        command = ["ip", "netns", "exec", f"n{rank}", "bash", str(HERE.parent / f"run_node{rank}.sh"), *map(str, flags)]
        errors = open(f"{folder}/stderr{rank}", "w")  # noqa: SIM115
        nodes.append(subprocess.Popen(command, env=env, stdout=-1 if rank == 0 else errors, stderr=errors, text=True))
    times, last, rate = {rate: [] for rate in RATES}, None, None
    for line in nodes[1].stdout:
        if "'loss':" in line:  # a step is over: its gradients have arrived
            now = time.perf_counter()
            if last:
                times[rate].append(now - last)
            rate, last = RATES[sum(map(len, times.values())) % len(RATES)], now
            throttle(rate)
    if any(node.wait() for node in nodes) or len(times[None]) <= rounds:
        sys.exit(f"a node failed: {Path(folder, 'stderr0').read_text()[-2000:]}")
    sh(f"rm -rf {folder}/out-{port}")
    return {rate: seconds[1:] for rate, seconds in times.items()}  # the first round makes buffers and connections


def measure_inside(folder, rounds):
    """In the sandbox: join two namespaces by a cable, train over it, and compare with the formula."""
    sh("mount -t tmpfs none /run && ip netns add n0 && ip netns add n1 && ip link add v0 type veth peer name v1")
    for number in (0, 1):
        inside = f"ip -n n{number}"
        sh(f"ip link set v{number} netns n{number} && {inside} link set v{number} name eth0 && {inside} link set lo up")
        sh(f"{inside} addr add 10.77.0.{number + 1}/24 dev eth0 && {inside} link set eth0 up")
    throttle(None)
    sizes = json.loads(subprocess.check_output([sys.executable, "-c", MAKE, folder], text=True).splitlines()[-1])
    size = sum(sizes.values())
    print(f"{size / 1e6:.1f} M weights, {size * 4 / 1e6:.0f} MB of gradients, {rounds} steps at each rate\n")
    print("| gradients | accumulation | link | measured | modelled | difference |\n|---|---|---|---|---|---|")
    for port, (accumulation, width) in enumerate(CASES, 29_501):
        times = train(folder, accumulation, width, rounds, port)
        kind, local = f"{8 * width} bits", median(times[None])
        print(f"| {kind} | {accumulation} | open | {local:.2f} s | as measured | |", flush=True)
        for rate in RATES[1:]:
            # What the computing takes is measured on the open cable; what is tested is the time that the wire adds.
            speed, compute, seconds = rate / 1000 * GBIT * GOODPUT, local / accumulation, median(times[rate])
            model = step_time(2, speed, compute, 0, accumulation, width, **sizes)
            print(f"| {kind} | {accumulation} | {rate:,} Mbit/s | {seconds:.2f} s | {model:.2f} s | "
                  f"{model / seconds - 1:+.0%} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rate", type=float, help="Gbit/s between machines (default: 1, 10, 25 and 100)")
    add("--machines", type=int, help="how many (default: 2 to 16)")
    add("--gpus", type=int, default=2, help="of each machine (default: 2)")
    add("--accumulation", type=int, default=8, help="micro-batches a step (default: 8)")
    add("--compute", type=float, help=f"seconds of a micro-batch (default: {COMPUTE}, assumed: {WHY})")
    add("--update", type=float, default=0.02, help="seconds of clipping and Adam (default: 0.02, assumed)")
    add("--measure", action="store_true", help="compare with real runs; needs Linux, ip and tc, and takes minutes")
    add("--rounds", type=int, default=6, help="measured steps at each rate (default: 6)")
    add("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return measure_inside(args.inside, args.rounds)
    if args.measure:
        with tempfile.TemporaryDirectory() as folder:
            command = [*SANDBOX, sys.executable, __file__, "--inside", folder, "--rounds", str(args.rounds)]
            return subprocess.run(command).returncode
    return tables(args)


if __name__ == "__main__":
    sys.exit(main())
