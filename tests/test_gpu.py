"""What only a GPU can tell: its values against float64, and whole runs of main.py on it. `bash tests/run.sh --gpu`.

The values come first, then runs. Each test says what it measured, for the table. Needs nothing but what trains, and
pytest; runs that share nothing are started together, as their imports take longer than they do.
"""

import copy
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import GPU, ROOT, free_port, last_wins, manual, refused, same_weights, write_jsonl
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import main

if not GPU:
    pytest.skip("needs a GPU: bash tests/run.sh --gpu", allow_module_level=True)
pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PATIENCE = 150  # seconds for a run that takes twenty


def off(ours, exact):
    """Distance of a tensor from the exact one, as a share of the latter's length."""
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def autocast(dtype):
    return torch.autocast(DEVICE, dtype=dtype, enabled=dtype != FP32)


def named(value):
    """How a parameter is called in a test's name."""
    return str(value).removeprefix("torch.")


def forget_compiled():
    """As in a new process: main.py forbids to compile anew in training, and torch compiles a function eight times."""
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("dtype, cap, limit", [(BF16, None, 1e-2), (BF16, 30.0, 1e-2), (FP16, None, 2e-3),
                                               (FP16, 30.0, 2e-3), (FP32, 30.0, 1e-5)], ids=named)  # fmt: skip
def test_the_chunked_loss_is_that_of_float64(dtype, cap, limit, way, monkeypatch, record_property):
    """301 tokens in chunks of 100 or fewer, some without a label; states in the dtype of autocast, a float32 head."""
    tokens, words, width = 301, 262_144 if DEVICE == "cuda" else 2_000, 640
    monkeypatch.setitem(main.LOGITS_BYTES, DEVICE, 100 * dtype.itemsize * words + 1)
    monkeypatch.setitem(main.SOFTMAX_ROWS, DEVICE, 33)
    monkeypatch.setattr(main, "COMPILED", {})
    forget_compiled()
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE).to(dtype)
    head = (torch.randn(words, width, device=DEVICE) * 0.1).to(dtype).float()  # logits of about 2.5, up to 12
    labels = torch.randint(words, (tokens,), device=DEVICE)
    labels[::7] = -100
    if way == "compiled":
        with autocast(dtype):
            assert main.use_compiled_softmax(head, cap) and (DEVICE, dtype) in main.COMPILED

    h, w = (tensor.double().requires_grad_() for tensor in (hidden, head))
    logits = h @ w.T
    logits = torch.tanh(logits / cap) * cap if cap else logits
    losses = cross_entropy(logits, labels, reduction="none")
    (losses.sum() / tokens).backward()
    exact = losses.detach(), h.grad, w.grad
    del logits, losses

    h, w = (tensor.clone().requires_grad_() for tensor in (hidden, head))
    with autocast(dtype):
        total, losses = main.ChunkedLoss.apply(h, w, labels, cap, True)
        _, seen = main.ChunkedLoss.apply(h.detach(), w.detach(), labels, cap, False)  # as an evaluation does
    (total / tokens).backward()
    assert losses.dtype == w.grad.dtype == FP32 and h.grad.dtype == dtype
    assert torch.allclose(total, losses.sum()) and torch.allclose(seen, losses, rtol=1e-3, atol=1e-3)
    assert not losses[::7].any() and not h.grad[::7].any()
    errors = [off(mine, true) for mine, true in zip((losses, h.grad, w.grad), exact, strict=True)]
    for name, error in zip(("losses", "to hidden", "to head"), errors, strict=True):
        record_property(name, f"{error:.1e}")
    assert max(errors) <= limit, errors


def attention(query, key, value, window):
    """(B, heads, T, D) and (B, kv heads, T, D) → (B, T, heads, D) by torch's own attention under a mask."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    back = torch.arange(length, device=DEVICE)[:, None] - torch.arange(length, device=DEVICE)  # keys behind a token
    mask = (back >= 0) & (back < (window or length))
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=256**-0.5).transpose(1, 2)


@pytest.mark.parametrize("window", [512, None], ids=["window", "full"])
@pytest.mark.parametrize("length", [640, 2048])
@pytest.mark.parametrize("dtype, limit", [(BF16, 1e-2), (FP16, 2e-3)], ids=named)
def test_the_windowed_attention_is_that_of_a_mask_in_float64(dtype, limit, length, window, record_property):
    """4 heads, 1 of keys and values, 256 wide, as in Gemma 3 270M; the rotation leaves queries and keys in float32."""
    torch.manual_seed(0)
    given = [torch.randn(2, heads, length, 256, device=DEVICE).to(dtype) for heads in (4, 1, 1)]
    slope = torch.randn(2, length, 4, 256, device=DEVICE).to(dtype)
    exact = [tensor.double().requires_grad_() for tensor in given]
    result = attention(*exact, window)
    result.backward(slope.double())

    query, key, value = (tensor.float().requires_grad_() for tensor in given)
    options = {"scaling": 256**-0.5, "sliding_window": window, "dropout": 0.0}  # as transformers calls it
    with autocast(dtype):
        out, _ = main.windowed_attention(None, query, key, value.to(dtype), None, **options)
    out.backward(slope)
    errors = [off(out, result.detach())]
    errors += [off(mine.grad, true.grad) for mine, true in zip((query, key, value), exact, strict=True)]
    for name, error in zip(("out", "to q", "to k", "to v"), errors, strict=True):
        record_property(name, f"{error:.1e}")
    assert out.shape == (2, length, 4, 256) and max(errors) <= limit, errors


@pytest.mark.parametrize("dtype, limit", [(BF16, 1e-2), (FP16, 2e-3), (FP32, 1e-5)], ids=named)
def test_a_lean_norm_is_the_models_own_under_autocast(dtype, limit, record_property):
    """The output in the dtype of autocast, the gradients those of float64."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    torch.manual_seed(0)
    norm = Gemma3RMSNorm(640).to(DEVICE)
    torch.nn.init.normal_(norm.weight, std=0.3)
    given, slope = (torch.randn(4, 300, 640, device=DEVICE) for _ in range(2))
    wide, x = copy.deepcopy(norm).double(), given.double().requires_grad_()
    true = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (1 + wide.weight)
    true.backward(slope.to(dtype).double())
    mine = given.clone().requires_grad_()
    with autocast(dtype):
        out = main.LeanNorm.apply(mine, norm.weight, norm.eps)
        assert out.dtype == dtype
        assert torch.allclose(out.float(), norm(given).float(), rtol=2 * limit, atol=limit)
    out.backward(slope.to(dtype))
    errors = [off(out, true.detach()), off(mine.grad, x.grad), off(norm.weight.grad, wide.weight.grad)]
    record_property("out, to x, to weight", ", ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= limit, errors


def gemma(layers):
    """A random Gemma 3 of 270M's widths, with 4,096 words and few layers, float32."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * (layers // 4)
    config = Gemma3TextConfig(
        vocab_size=4096, hidden_size=640, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, max_position_embeddings=2048, sliding_window=512, layer_types=kinds,
        query_pre_attn_scalar=256, tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).to(DEVICE).train()


def as_main_trains(model, folder, dtype, compiled=False):
    """Let main.py put a model and its Trainer together: its attention, its norms, its loss, its compiled layers."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainingArguments

    forget_compiled()
    args = TrainingArguments(
        str(folder / "out"), report_to=[], per_device_train_batch_size=2, bf16=dtype == BF16, fp16=dtype == FP16,
        use_cpu=DEVICE == "cpu")  # fmt: skip
    chunks = Dataset.from_dict({"input_ids": [[*range(1024)]] * 2})  # of the size for which layers are compiled
    options = {"backend": "inductor", "mode": None} if compiled else False
    run = SimpleNamespace(settings={"torch_compile": options, "ddp_comm_hook": None})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    main.make_trainer(model, tokenizer, args, chunks, None, run, main.Resume())
    assert "forward" in vars(model), "the model has kept its own loss"
    if DEVICE == "cuda" and dtype != FP32:
        assert model.config._attn_implementation == "windowed" and (DEVICE, dtype) in main.COMPILED
    return model


def learnt(model, ids, dtype):
    """The loss of a batch, and {name: gradient}, float16's scaled as GradScaler does and scaled back."""
    scale = 1024 if dtype == FP16 else 1
    with autocast(dtype):
        loss = model(input_ids=ids, labels=ids)["loss"]
    (loss * scale).backward()
    return loss.item(), {name: weight.grad / scale for name, weight in model.named_parameters()}


def slower_for(said):
    """The notes by which main.py says that a fast path does not work here: none on an A40 or newer."""
    return [line for line in said.splitlines() if line.startswith("note") and re.search("slower|longer", line)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=named)
def test_a_model_learns_as_plain_transformers_do(dtype, compiled, tiny, own_norms, capsys, record_property):
    """Four layers, 2 × 1,024 tokens: no farther from float64 than plain transformers under the same autocast."""
    ids = torch.randint(5, 4096, (2, 1024), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    model = gemma(4)
    loss, exact = learnt(copy.deepcopy(model).double(), ids, FP32)
    results = {"plain": learnt(copy.deepcopy(model), ids, dtype)}  # first: main.py changes the norms of all models
    results["ours"] = learnt(as_main_trains(model, tiny, dtype, compiled), ids, dtype)
    far = {}
    for name, (mine, grads) in results.items():
        errors = {key: off(grads[key], exact[key]) for key in exact}
        worst = max(errors, key=errors.get)
        far[name] = off(torch.cat([grads[key].flatten() for key in exact]),
                        torch.cat([exact[key].flatten() for key in exact]))  # fmt: skip
        record_property(name, f"loss {mine - loss:+.1e}, gradients {far[name]:.1e}, {worst} {errors[worst]:.1e}")
        assert abs(mine - loss) < 5e-3 and errors[worst] < 0.1
    assert far["ours"] < 1.5 * far["plain"] + 1e-3
    assert slower_for(capsys.readouterr().out) == []


def test_deeper_models_compile_no_more_graphs(tiny, own_norms, record_property):
    """Four layers and eight: one graph of layers with a window, one of the others, those of the loss; all are used."""
    from torch._dynamo.utils import counters

    ids, counts = torch.arange(5, 2053, device=DEVICE).view(2, 1024), []
    for layers in (4, 8):
        counters.clear()
        model = as_main_trains(gemma(layers), tiny, BF16, True)
        learnt(model, ids, BF16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
            learnt(model, ids, BF16)
        calls = sum(event.count for event in record.key_averages() if event.key == "CompiledFunction")
        assert calls == layers, f"{calls} of {layers} layers ran compiled"
        counts.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    record_property("graphs and breaks with 4 layers, with 8", counts)
    assert counts[0] == counts[1] and counts[0][0] > 0, counts


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def flags(tiny, folder, out="out"):
    """Words for 30 steps of 4 × 128 tokens on the tiny model, a log line a step."""
    text = write_jsonl(folder / "train.jsonl", manual("with", "while", "try", "class"))
    return ["--model_name_or_path", tiny, "--train_file", text, "--max_seq_length", 128, "--no_truncation",
            "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_steps", 30,
            "--learning_rate", 1e-3, "--warmup_steps", 0, "--logging_steps", 1, "--report_to", "none",
            "--disable_tqdm", True, "--cache_dir", folder / f"cache-{out}", "--output_dir", folder / out]  # fmt: skip


def start(*argv, env=None):
    """Start main.py, or another program of Python's, as a user would. Returns: the process, for end()."""
    words = last_wins(argv)
    command = [sys.executable, *([str(ROOT / "main.py")] if words[0] != "-m" and words[0] != "-c" else []), *words]
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {})
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=env, cwd=ROOT)


def end(process, seconds=PATIENCE):
    """Wait for a process. Returns: status, out, err."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"no end within {seconds} s: {out[-1500:]}{err[-1500:]}")
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def ended_well(process):
    done = end(process)
    assert done.status == 0 and "Done: the model is in " in done.out, done.out[-2000:] + done.err[-3000:]
    return done


def losses(done):
    return [float(value) for value in re.findall(r"'loss': '?([\d.naife+-]+)", done.out)]


WAYS = {"float32": [], "bf16": ["--bf16"], "fp16": ["--fp16"], "compiled": ["--bf16", "--torch_compile", True],
        "checkpointing": ["--bf16", "--gradient_checkpointing"]}  # fmt: skip


def test_the_loss_goes_down_alike_in_every_way(tiny, tmp_path, record_property):
    """30 steps each, started together: float32, both 16-bit types, compiled layers, checkpointing."""
    runs = {name: start(*flags(tiny, tmp_path, name), *more) for name, more in WAYS.items()}
    done = {name: ended_well(run) for name, run in runs.items()}
    curves = {name: losses(run) for name, run in done.items()}
    for name, curve in curves.items():
        record_property(name, f"{curve[0]:.3f} → {curve[-1]:.3f}")
    for name, curve in curves.items():
        assert len(curve) == 30 and curve[-1] < 0.9 * curve[0], name
        assert curve == pytest.approx(curves["float32"], rel=0.03), name
        assert slower_for(done[name].out) == []


def test_samples_and_a_dry_run_on_the_gpu(tiny, tmp_path, record_property):
    """U1, U5: samples change no loss, in windowed attention and in compiled layers; a dry run has the GPU's numbers."""
    more = ["--bf16", "--validation_split_percentage", 20, "--eval_steps", 10]
    ways = {"plain": [], "samples": ["--sample_prompt", "The with statement"]}
    ways |= {"compiled": ["--torch_compile", True], "compiled samples": ["--torch_compile", True, *ways["samples"]]}
    runs = {name: start(*flags(tiny, tmp_path, name), *more, *words) for name, words in ways.items()}
    done = {name: ended_well(run) for name, run in runs.items()}
    for name in ("samples", "compiled samples"):
        assert done[name].out.count("sample   'The with statement': ") == 4
        without = losses(done[name.replace("samples", "").strip() or "plain"])
        assert losses(done[name]) == pytest.approx(without, rel=2e-3)
    dry = end(start(*flags(tiny, tmp_path, "dry"), *more, "--dry_run"))
    assert dry.status == 0 and "Dry run: 30 steps; " in dry.out and not (tmp_path / "dry").exists(), dry.out + dry.err
    memory = re.search(r"^memory +([\d.]+) GB at the peak of a process, of ([\d.]+) GB$", dry.out, re.M)
    assert float(memory[1]) < float(memory[2]) == pytest.approx(torch.cuda.mem_get_info()[1] / 1e9, rel=0.06)
    record_property("memory", memory[0])


def test_a_missing_flash_attention_is_said_in_a_sentence(tiny, tmp_path, record_property):
    """F5: on a GPU, too; where the package is there, the run trains."""
    done = end(start(*flags(tiny, tmp_path), "--use_flash_attention"))
    record_property("flash-attn", "missing" if done.status else "there")
    if done.status:
        refused(done, "--use_flash_attention needs ")


WATCH = """
import collections, sys, traceback, warnings
sys.path.insert(0, ".")
import torch, transformers
import main
seen = collections.Counter()
def show(message, category, filename, lineno, file=None, line=None):
    if "synchroniz" in str(message):
        frames = reversed(traceback.extract_stack()[-8:-2])  # without the module warnings
        seen[" < ".join(f"{part.filename.rsplit('/', 1)[-1]}:{part.lineno} {part.name}" for part in frames)] += 1
class Watch(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 10:
            warnings.simplefilter("always")
            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode("warn")
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 19:
            torch.cuda.set_sync_debug_mode("default")
            print("SYNCHRONISATIONS", sum(seen.values()), *(f"{n} x {where}" for where, n in seen.items()), sep="|")
make = main.make_trainer
def make_trainer(*parts):
    trainer = make(*parts)
    trainer.add_callback(Watch())
    return trainer
main.make_trainer = make_trainer
main.main(main.parse_args(sys.argv[1:]), main.Signals())
"""


def test_a_step_waits_for_the_gpu_only_at_a_log_line(tiny, tmp_path, record_property):
    """Steps 11 to 19 of 20, two batches each, with a log line every 10: torch reports each synchronisation."""
    argv = [*flags(tiny, tmp_path), "--logging_steps", 10, "--max_steps", 20, "--gradient_accumulation_steps", 2]
    done = ended_well(start("-c", WATCH, *argv, "--bf16"))
    count, *places = re.search(r"SYNCHRONISATIONS\|(.*)", done.out)[1].split("|")
    record_property("in 9 steps", count)
    assert count == "0", places


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tiny, tmp_path, record_property):
    """SIGTERM in the third step or so: status 143; the same command again ends bit for bit the same."""
    more = ["--bf16", "--full_determinism", True, "--max_steps", 150, "--save_steps", 1000]
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as torch asks for; read before the Trainer sets its own
    whole = start(*flags(tiny, tmp_path, "whole"), *more, env=env)
    argv = [*flags(tiny, tmp_path, "stopped"), *more]
    process = start(*argv, env=env)
    began, said = time.time(), ""
    while said.count("'loss'") < 3 and process.poll() is None and time.time() - began < PATIENCE:
        said += process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    stopped = end(process)
    assert stopped.status == 143, said + stopped.out + stopped.err
    step = re.search(r"stopped by SIGTERM at step (\d+) of 150", stopped.err)
    assert step and "Traceback" not in stopped.err, stopped.err
    again = ended_well(start(*argv, env=env))
    assert f"step {step[1]} of 150" in again.out
    ended_well(whole)
    record_property("stopped at step", step[1])
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def ranks(argv, **env):
    """Start two ranks by hand, as on two machines: each takes the first GPU that it sees, the one that there is."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    known = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, **place, **env}
    known = {name: str(value) for name, value in known.items()}
    return [start(*argv, env=known | {"RANK": str(rank)}) for rank in (0, 1)]


def test_one_rank_over_nccl_and_two_over_gloo_learn_as_one_process(tiny, tmp_path, record_property):
    """torchrun with one rank, two ranks with half the batch each on one GPU: the losses of a plain run."""
    more = ["--bf16", "--max_steps", 8]
    half = [*flags(tiny, tmp_path, "two"), *more, "--per_device_train_batch_size", 2, "--ddp_backend", "gloo"]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, ROOT / "main.py"]
    one = start(*words, *flags(tiny, tmp_path, "one"), *more)
    two = ranks(half)
    plain = start(*flags(tiny, tmp_path, "plain"), *more)
    plain, one = (losses(ended_well(run)) for run in (plain, one))
    first, second = (end(run) for run in two)
    assert first.status == second.status == 0 and ", 2 processes" in first.out, first.err + second.err
    for name, curve in (("plain", plain), ("one rank", one), ("two ranks", losses(first))):
        record_property(name, f"{curve[0]:.4f} → {curve[-1]:.4f}")
    assert one == pytest.approx(plain, rel=5e-3)
    assert losses(first) == pytest.approx(plain, rel=5e-3)


def test_two_nccl_ranks_on_one_gpu_end_with_a_sentence(tiny, tmp_path, record_property):
    """NCCL refuses two ranks on one device: both say so, without a traceback."""
    argv = [*flags(tiny, tmp_path), "--bf16", "--ddp_timeout", 20, "--ddp_backend", "nccl"]
    began = time.time()
    for done in [end(run) for run in ranks(argv)]:
        assert done.status in (1, 2), done.out + done.err
        assert done.err.count("main.py: error: ") == 1 and "Traceback" not in done.err, done.err
        sentence = done.err.partition("main.py: error: ")[2].splitlines()[0]
    record_property("the sentence", sentence[:200])
    record_property("after", f"{time.time() - began:.0f} s")


WIDEN = """
import sys, torch
from transformers import AutoConfig, AutoTokenizer, Gemma3ForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
config.intermediate_size, config.num_hidden_layers = 65_536, 4
config.layer_types = config.layer_types * 2
Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


def test_a_full_gpu_is_said_in_a_sentence_with_the_remedies(tiny, tmp_path, record_property):
    """512 × 512 tokens on a model that keeps 1.6 MB a token: 400 GB."""
    subprocess.run([sys.executable, "-c", WIDEN, tiny, tmp_path / "wide"], check=True, capture_output=True)
    argv = [*flags(tmp_path / "wide", tmp_path), "--max_seq_length", 512, "--per_device_train_batch_size", 512]
    write_jsonl(tmp_path / "train.jsonl", manual("with", "while", "try", "class") * 30)
    done = end(start(*argv, "--bf16"))
    assert done.status == 1 and "Traceback" not in done.out + done.err, done.out + done.err
    assert done.err.count("main.py: error: ") == 1, done.err
    sentence = done.err.partition("main.py: error: ")[2].splitlines()[0]
    record_property("the sentence", sentence[:100])
    assert f"out of memory on {DEVICE}" in sentence and "--gradient_checkpointing" in sentence
    dry = end(start(*argv, "--bf16", "--dry_run"))
    assert dry.status == 1 and "does not fit into memory: less is tried" in dry.out, dry.out + dry.err
    fits = re.search(r"did not fit into memory; this does: (--per_device_train_batch_size \d+ .*)", dry.out)
    record_property("what fits", fits[1])
