"""How much CUDA memory a training step of Gemma 3 270M will take: a prediction, made on a machine without a GPU.

    python benchmarks/gpu_memory.py                              4, 8 and 16 × 2,048 tokens
    python benchmarks/gpu_memory.py --batch 2 --length 8192      another batch
    python benchmarks/gpu_memory.py --batch 16 --largest 20      and what is alive at the peak of the first column

main.py's own functions train on fake tensors, which have a shape, a dtype and a lifetime, but no values and no memory.
Every storage is counted from the operation that makes it to its end, rounded up to 512 bytes as PyTorch's allocator for
CUDA does. The tensors say that they are on a CPU, as a PyTorch without CUDA has no autograd for fake tensors elsewhere;
cuda_choices() lists what is exchanged so that the same tensors are made as on a GPU, and WORKSPACES what its kernels
take for themselves while they run.

A step is the last micro-batch of an accumulation: weights, gradients and Adam's two moments are there, in float32. Not
counted are the CUDA context and the workspaces of cuBLAS, about 0.6 GB, what the allocator has reserved but not given
to tensors, and up to 1 MB by which it may enlarge a block above 1 MB. The layers are not compiled; a compiler would
keep fewer tensors for the backward pass. sdpa is taken to have flash and memory-efficient kernels for heads of 256
numbers, as on an A100 or H100; elsewhere it may make all scores, and take more.
"""

import argparse
import sys
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate.utils.operations import convert_outputs_to_fp32  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm  # noqa: E402

import main  # noqa: E402

SHAPE = {  # of Gemma 3 270M
    "vocab_size": 262_144, "hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048, "max_position_embeddings": 32_768,
    "sliding_window": 512, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
}  # fmt: skip
CASES = {  # column: what predict() is asked for
    "bf16": {}, "`--gradient_checkpointing`": {"checkpointing": True}, "bf16, sdpa": {"attention": "sdpa"},
    "`--fp16`, sdpa": {"fp16": True, "attention": "sdpa"}, "plain Trainer": {"plain": True},
}  # fmt: skip

# ── What runs on a GPU ───────────────────────────────────────────────────────────────────────────────────────────────


def flash_backward(grad, query, key, *_):
    """Bytes: queries' gradients and a number a row in float32; gradients of keys and values for every query head."""
    rows = query.numel() // query.shape[-1]
    return 4 * query.numel() + 4 * rows + 2 * query.numel() * query.itemsize * (key.numel() < query.numel())


def efficient_backward(grad, query, key, value, *_):
    """Bytes: the three gradients in float32, before they are rounded, and a number a row."""
    return 4 * (query.numel() + key.numel() + value.numel() + query.numel() // query.shape[-1])


def embedding_backward(grad, ids, *_):
    """Bytes: room for 1.1 rows a token, the sums of ten rows or fewer, and four lists of sorted int64."""
    return int(1.1 * 4 * grad.numel()) + 32 * ids.numel()


WORKSPACES = {  # operation: function of its arguments → bytes that its CUDA kernel holds beside inputs and outputs
    torch.ops.torch_attn._varlen_attn_backward.default: flash_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    torch.ops.aten.embedding_dense_backward.default: embedding_backward,
}


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """As CUDA under autocast: flash without a mask, else memory-efficient with a bias in 16 bits, which is kept."""
    dtype = torch.get_autocast_dtype("cpu")
    query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        if attn_mask is None:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, is_causal, False, scale=scale)[0]
        bias = torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
        bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, torch.is_grad_enabled(), 0.0, False, scale=scale)[0]


def compiled_softmax(logits, targets, softcap, train):
    """In the place of main.softmax_gradients() as one kernel: it works in the logits and makes two numbers a row."""
    return tuple(torch.empty(len(logits), 1) for _ in range(2))


@contextmanager
def exchanged(*others):
    """Set attributes for the length of a with statement. others: (object, name, value), any number of them."""
    with ExitStack() as stack:
        for place, name, other in others:
            stack.enter_context(patch.object(place, name, other))
        yield


def cuda_choices():
    """Let main.py and transformers take their branches for CUDA, with tensors that say they are on a CPU."""
    return exchanged(
        (main, "LOGITS_BYTES", {"cpu": main.LOGITS_BYTES["cuda"]}),
        (main, "VOCABULARY_PART", {}),  # one part: all words
        (main, "COMPILED", {("cpu", dtype): compiled_softmax for dtype in (torch.bfloat16, torch.float16)}),
        (main, "add_product", lambda total, a, b: None),  # addmm in place, which makes no tensor
        (torch.nn.functional, "scaled_dot_product_attention", sdpa),
    )


def without_values():
    """Answer the questions that transformers and main.py ask of tensors' values, which fake tensors have not."""
    return exchanged(
        (torch, "isclose", lambda *_, **__: SimpleNamespace(item=lambda: True)),  # the loss's trial of eight tokens
        (masking_utils, "find_packed_sequence_indices", lambda positions: None),  # one text a chunk
        (masking_utils, "is_tracing", lambda *_: False),  # masks as a real run makes them
    )


# ── Counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tracker(TorchDispatchMode):
    """Adds up the bytes of all storages, of fake or real tensors, from the operation that made them to their end."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0  # bytes
        self.alive = {}  # address of a storage: bytes
        self.events = []  # (address, bytes, what) when a storage begins, (address, 0, "") when it ends

    def add(self, tensor, maker):
        """Count a tensor's storage until it ends, unless that is done already. maker (str): named by largest()."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = size = (storage.nbytes() + 511) // 512 * 512
        self.now += size
        self.peak = max(self.peak, self.now)
        self.events.append((key, size, f"{maker} {str(tensor.dtype)[6:]} {list(tensor.shape)}"))
        weakref.finalize(storage, self.drop, key).atexit = False

    def drop(self, key):
        self.now -= self.alive.pop(key)
        self.events.append((key, 0, ""))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, str(func).removesuffix(".default"))
        if func in WORKSPACES:
            size = WORKSPACES[func](*args)
            self.peak = max(self.peak, self.now + size)
            self.events += [(func, size, f"workspace of {func}"), (func, 0, "")]
        return out

    def largest(self, count):
        """Yield (bytes, how many, what) of the storages alive at the peak, those made alike together, largest first."""
        now, alive, groups = 0, {}, {}
        for key, size, what in self.events:
            now += size - alive.pop(key, (0,))[0]
            if size:
                alive[key] = (size, what)
            if now == self.peak:
                break
        for size, what in alive.values():
            groups.setdefault(what, []).append(size)
        sums = sorted(((sum(sizes), len(sizes), what) for what, sizes in groups.items()), reverse=True)
        yield from sums[:count]


def train(config, batch, length, dtype, checkpointing=False, attention="windowed", plain=False, accumulation=True,
          fake=True):  # fmt: skip
    """Make a forward and a backward pass on batch × length tokens, as the Trainer does around main.py.

    config (PreTrainedConfig): the model. dtype (torch.dtype): of autocast. attention (str): its name in transformers.
    plain (bool): the model's own norms and loss. accumulation (bool): there are gradients already, of an earlier
    micro-batch. fake (bool): False for real tensors, on the CPU. Returns: Tracker.
    """
    tracker = Tracker()
    config.use_cache = False
    with ExitStack() as stack:
        stack.enter_context(patch.object(Gemma3RMSNorm, "forward", Gemma3RMSNorm.forward))  # undoes use_lean_norms()
        if fake:
            stack.enter_context(without_values())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        transformers.AttentionInterface.register("windowed", main.windowed_attention)
        model.set_attn_implementation(attention)
        stack.enter_context(tracker)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tracker.add(tensor, f"weight {name}")
        moments = [torch.zeros_like(weight) for weight in model.parameters() for _ in range(2)]  # Adam's
        if not plain:
            main.use_lean_norms(model)
            with torch.autocast("cpu", dtype):
                if not main.use_chunked_loss(model):
                    raise SystemExit("main.py leaves this model its own loss: there is nothing to predict")
        if checkpointing:
            model.activation_checkpointing_enable()
        forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))  # as accelerate does
        if accumulation:
            for weight in model.parameters():
                weight.grad = torch.zeros_like(weight)
        ids = torch.zeros(batch, length, dtype=torch.int64)
        loss = forward(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(batch * length))["loss"]
        (loss * torch.tensor(2.0**16) if dtype == torch.float16 else loss).backward()  # accelerate's GradScaler
        del loss
        del moments
    return tracker


def track(batch, length, checkpointing=False, fp16=False, attention="windowed", plain=False, accumulation=True,
          model=None):  # fmt: skip
    """As predict(). Returns: the Tracker, which knows more than the peak."""
    config = transformers.AutoConfig.from_pretrained(model) if model else transformers.Gemma3TextConfig(**SHAPE)
    dtype = torch.float16 if fp16 else torch.bfloat16
    with cuda_choices():
        return train(config, batch, length, dtype, checkpointing, "sdpa" if plain else attention, plain, accumulation)


def predict(batch, length, checkpointing=False, fp16=False, attention="windowed", plain=False, accumulation=True,
            model=None):  # fmt: skip
    """Predict the peak of torch.cuda.max_memory_allocated() while main.py trains on batch × length tokens, in GB.

    attention (str): "windowed", main.py's on an A40 or newer, or "sdpa". plain (bool): transformers' Trainer with the
    model's own norms, loss and sdpa. accumulation (bool): the gradients of an earlier micro-batch are there; False for
    --gradient_accumulation_steps 1. model (str): directory of a model; None: Gemma 3 270M's shape.
    """
    return track(batch, length, checkpointing, fp16, attention, plain, accumulation, model).peak / 1e9


def run(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    count = main.bounded(int, 1)
    add("--batch", type=count, nargs="+", default=[4, 8, 16], help="chunks of a micro-batch (default: 4 8 16)")
    add("--length", type=main.bounded(int, 2), default=2048, help="tokens a chunk (default: 2048)")
    add("--model", help="directory of a Gemma 3 text model; unset: the shape of Gemma 3 270M")
    add("--no-accumulation", action="store_true", help="no gradients of an earlier micro-batch are there")
    add("--largest", type=count, default=0, metavar="N", help="also list the N largest tensors at the peak of bf16")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    if args.model:
        try:
            kind = transformers.AutoConfig.from_pretrained(args.model, local_files_only=True).model_type
        except (OSError, ValueError) as error:
            parser.error(f"--model {args.model} holds no model: {main.one_line(error)[:200]}")
        if kind != "gemma3_text":
            parser.error(f"--model {args.model} is of the kind {kind}: the prediction knows gemma3_text alone")
    print(f"| tokens | {' | '.join(CASES)} |\n|---{'|---' * len(CASES)}|")
    alive = []
    for batch in args.batch:
        cells = []
        for name, options in CASES.items():
            seen = track(batch, args.length, **options, accumulation=not args.no_accumulation, model=args.model)
            cells.append(f"{seen.peak / 1e9:.1f}" if seen.peak > 1e9 else f"{seen.peak / 1e9:.3f}")
            if args.largest and not options:
                alive.append((batch, name, seen.peak, list(seen.largest(args.largest))))
        print(f"| {batch} × {args.length:,} | {' | '.join(cells)} |", flush=True)
    print("\nGB of tensors at the peak of a step: a prediction, by fake tensors on a CPU. The CUDA context and "
          "workspaces come on top, about 0.6 GB; layers not compiled. bf16, sdpa: where main.py's trial of windowed "
          f"attention fails. torch {torch.__version__}, transformers {transformers.__version__}.")  # fmt: skip
    for batch, name, peak, rows in alive:
        print(f"\nAlive at the peak of {batch} × {args.length:,}, {name}, {peak / 1e9:.2f} GB:\n")
        print("| GB | tensors | made by |\n|---|---|---|")
        for size, count, what in rows:
            print(f"| {size / 1e9:.3f} | {count} | {what} |")


if __name__ == "__main__":
    run()
