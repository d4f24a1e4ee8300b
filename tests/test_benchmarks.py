"""The benchmarks: the formula of scaling.py against arithmetic by hand, and small runs of the others."""

import re
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT, in_child, launch

sys.path.append(str(ROOT / "benchmarks"))

import loss  # noqa: E402
import mfu  # noqa: E402
import scaling  # noqa: E402


def test_the_ring_sends_each_byte_nearly_twice():
    """2 (N − 1) / N of the bytes, and 2 (N − 1) messages: 1 GB at 1 GB/s."""
    assert scaling.wire(2, 1e9, 0, 1e9) == pytest.approx(1.0)
    assert scaling.wire(4, 1e9, 0, 1e9) == pytest.approx(1.5)
    assert scaling.wire(1, 1e9, 5, 1e9) == 0
    assert scaling.wire(3, 0, 10, 1e9, latency=0.001) == pytest.approx(0.04)


def test_a_step_is_its_micro_batches_the_update_and_what_no_computing_hides(monkeypatch):
    """Cases by hand, in a model of 600 and 400 weights, 4 bytes each, at 1,000 bytes/s."""
    monkeypatch.setattr(scaling, "LATENCY", 0)
    monkeypatch.setattr(scaling.wire, "__defaults__", (0,))
    sizes = {"embedding": 600, "layers": 400}
    assert scaling.step_time(1, 1000, 3, 1, 8, **sizes) == 8 * 3 + 1  # alone: nothing travels
    # Two processes: 1.6 s of layers, 2.4 s of embedding; 2/3 · 3 s · 40 % = 0.8 s of the layers' are hidden.
    assert scaling.step_time(2, 1000, 3, 1, 8, **sizes) == pytest.approx(25 + 0.8 + 2.4)
    # Half the bytes: 0.8 s of layers are hidden whole, 1.2 s of embedding are not.
    assert scaling.step_time(2, 1000, 3, 1, 8, width=2, **sizes) == pytest.approx(25 + 1.2)
    # Accumulation adds computing only: the gradients travel once a step.
    waits = [scaling.step_time(4, 1000, 3, 1, steps, **sizes) - 3 * steps - 1 for steps in (1, 8, 64)]
    assert waits == pytest.approx([6 - 0.8] * 3)


def test_enough_accumulation_is_the_least_that_reaches_the_efficiency():
    """One micro-batch fewer falls short of 90 %."""
    rate = 10 * scaling.GBIT
    for width in (2, 4):
        least = scaling.enough(8, rate, 0.272, 0.02, width)
        share = [(count * 0.272 + 0.02) / scaling.step_time(8, rate, 0.272, 0.02, count, width)
                 for count in (least - 1, least)]  # fmt: skip
        assert share[0] < 0.9 <= share[1]


def test_the_sizes_are_those_of_gemma_3_270m():
    """268.1 M weights; 1.07 GB of float32 gradients."""
    assert scaling.EMBEDDING + scaling.LAYERS == 268_098_176


def test_what_was_not_measured_is_called_assumed():
    """The default time of a micro-batch, in the table and in the help; a time that is given is not."""
    script = ROOT / "benchmarks" / "scaling.py"
    for flags, word in (([], "0.272 s (assumed: "), (["--help"], "0.272, assumed: ")):
        assert word in launch(sys.executable, script, *flags).out
    given = launch(sys.executable, script, "--compute", "0.1").out
    assert "0.100 s" in given and "assumed" not in given


def test_the_rows_a_chunk_are_those_of_main():
    """Its chunks are even: 1,029 rows fit 0.54 GB, so 2,048 tokens make two of 1,024; the others cut at 1,029."""
    assert loss.rows_of("torch-none", 2048, 0.54) == 1029
    assert [loss.rows_of("ours", tokens, 0.54) for tokens in (2048, 100, 1030)] == [1024, 100, 515]
    assert loss.rows_of("ours", 7, 0) == 1


NAMES = {"NVIDIA A40": 149.7, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
         "NVIDIA GH200 480GB": 989, "NVIDIA L40S": 362, "NVIDIA GeForce RTX 4090": 165, "NVIDIA RTX A4000": 0,
         "NVIDIA RTX A1000": 0, "NVIDIA L40": 0, "NVIDIA GeForce RTX 4090 D": 0}  # fmt: skip


def test_a_peak_is_that_of_the_device_of_exactly_this_name():
    """MFU is measured against the maker's number; an unlisted device with a similar name has none."""

    def peaks():
        import torch

        told = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16", world_size=2)
        found = {}
        for name in NAMES:
            torch.cuda.get_device_name = lambda device, name=name: name  # no such device is here
            found[name] = mfu.peak_flops(told)
        others = [{"mixed_precision": "no"}, {"device": torch.device("cpu")}]
        return found, [mfu.peak_flops(SimpleNamespace(**vars(told) | other)) for other in others]

    assert in_child(peaks) == ({name: pytest.approx(2e12 * peak) for name, peak in NAMES.items()}, [0, 0])


@pytest.mark.parametrize("tied", [True, False])
def test_the_flops_of_a_token_are_those_of_its_products_counted_one_by_one(tied):
    """Forward and twice that backward: 2 a weight of each matrix, 2 each way for each number of each key in sight."""

    def counted():
        import torch
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(
            vocab_size=96, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
            head_dim=8, intermediate_size=32, sliding_window=5, layer_types=kinds, tie_word_embeddings=tied,
            bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = Gemma3ForCausalLM(config)
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
        norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)  # counted as if products
        sight = sum(min(token + 1, 5 if "sliding" in kind else 12) for kind in kinds for token in range(12)) / 12
        expected = 3 * 2 * (sum(part.weight.numel() for part in linear) + norms) + 3 * 2 * 2 * 4 * 8 * sight
        return mfu.flops_per_token(model, 12), expected

    found, expected = in_child(counted)
    assert found == pytest.approx(expected)


def test_a_token_of_gemma_3_270m_takes_1_73_gflop():
    """At 2,048 tokens a chunk, as the reports say."""

    def counted():
        import gpu_memory
        from transformers import AutoModelForCausalLM, Gemma3TextConfig

        with gpu_memory.FakeTensorMode():
            model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**gpu_memory.SHAPE))
        return mfu.flops_per_token(model, 2048)

    assert in_child(counted) == pytest.approx(1.73e9, rel=0.003)


def test_the_peers_learn_from_mains_chunks_but_for_bos():
    """Ids for all, no label for what main.py holds as ~id."""
    import throughput

    made = throughput.label({"input_ids": [[~2, 5, 6], [7, ~2, 8]]})
    assert made["input_ids"] == [[2, 5, 6], [7, 2, 8]] and made["labels"] == [[-100, 5, 6], [7, -100, 8]]
    assert made["attention_mask"] == [[1, 1, 1], [1, 1, 1]]


def test_memory_is_counted_from_an_operation_to_the_end_of_its_result():
    """By hand: 4,000 bytes count as 4,096, a view as nothing, and what is gone leaves room."""
    import gpu_memory
    import torch

    with gpu_memory.Tracker() as tracker:
        kept = torch.zeros(1000)
        part = kept[:10].view(2, 5)
        gone = torch.zeros(3, 1000)
        assert tracker.now == 4096 + 12_288
        del gone, part
        last = torch.zeros(256, dtype=torch.bfloat16)
        assert (tracker.now, tracker.peak) == (4096 + 512, 4096 + 12_288)
        del kept, last
    assert tracker.now == 0
    assert list(tracker.largest(1)) == [(12_288, 1, "aten.zeros float32 [3, 1000]")]


@pytest.mark.parametrize("options", ({}, {"checkpointing": True}, {"plain": True}), ids=str)
def test_fake_tensors_take_what_real_ones_take(options, tiny, own_norms):
    """main.py's choices for a CPU: the same peak; the allocator's own count also has what kernels take inside, 5 %."""
    import gpu_memory
    import torch
    import transformers
    from torch.profiler import ProfilerActivity, profile

    def train(fake):
        config = transformers.AutoConfig.from_pretrained(tiny)
        return gpu_memory.train(config, 4, 256, torch.bfloat16, attention="sdpa", fake=fake, **options)

    fake, real = train(True).peak, train(False).peak
    assert fake == real
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train(False)
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert most == pytest.approx(fake, rel=0.05)


def test_four_chunks_without_checkpointing_fit_13_gb_of_a_gpu(own_norms):
    """4 × 2,048 tokens, bfloat16; the weights are 268.1 M, and those of an accumulation have gradients: 4.29 GB."""
    import gpu_memory
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    import main

    with gpu_memory.FakeTensorMode():
        model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**gpu_memory.SHAPE))
    assert model.num_parameters() == scaling.EMBEDDING + scaling.LAYERS
    choices = main.LOGITS_BYTES, main.COMPILED, main.add_product
    assert 10 < gpu_memory.predict(4, 2048) < 13
    assert choices == (main.LOGITS_BYTES, main.COMPILED, main.add_product)  # all is as it was


@pytest.mark.slow
def test_the_predicted_memory_of_a_gpu_stays_within_its_limits():
    """8 × 2,048 tokens: 18 GB; 16 × 2,048: 28 GB; a table with a column for each way to train."""
    script = ROOT / "benchmarks" / "gpu_memory.py"
    done = launch(sys.executable, script, "--batch", "8", "16", "--largest", "3")
    rows = [line.strip("| ").split(" | ") for line in done.out.splitlines() if re.match(r"\| (tokens|\d+ ×)", line)]
    assert [row[0] for row in rows] == ["tokens", "8 × 2,048", "16 × 2,048"], done.out + done.err
    told = {row[0]: dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[1:]}
    assert told["8 × 2,048"]["bf16"] < 18 and told["16 × 2,048"]["bf16"] < 28, done.out
    for row in told.values():
        assert row["`--gradient_checkpointing`"] < row["bf16"] < row["bf16, sdpa"] < row["plain Trainer"], done.out
        assert row["`--fp16`, sdpa"] == pytest.approx(row["bf16, sdpa"], abs=0.1)
    assert "a prediction" in done.out and "Alive at the peak of 16 × 2,048, bf16" in done.out


@pytest.mark.slow
def test_the_losses_agree_and_memory_is_counted_above_the_inputs():
    """8 tokens: the head's gradient in float32 is 0.67 GB, its 16-bit copy half of that; inputs are not counted."""
    done = launch(sys.executable, ROOT / "benchmarks" / "loss.py", "--tokens", "8", "--rounds", "1", "--memory", "0.54",
                  "--only", "plain", "ours", "checkpointed")  # fmt: skip
    rows = [line.split(" | ") for line in done.out.splitlines() if re.match(r"\| (plain|ours|check)", line)]
    assert len(rows) == 3 and not done.err, done.out + done.err
    assert [row[1] for row in rows[:2]] == ["8", "8"]
    assert all(0.67 < float(row[3]) < 2.1 for row in rows), done.out
    means = [float(row[4].split()[0]) for row in rows]
    assert max(means) - min(means) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("steps", (1, 8))
def test_the_profile_files_all_time_under_a_part(steps, tiny):
    """Steps of the tiny model: the shares add up, and the optimizer is among them; of eight, two are timed."""
    script = ROOT / "benchmarks" / "step_profile.py"
    done = launch(sys.executable, script, "--model", tiny, "--length", "64", "--steps", str(steps))
    shares = dict(re.findall(r"^\| (.+?) \| [\d.]+ \| ([\d.]+)% \|$", done.out, re.MULTILINE))
    assert "optimizer and clipping" in shares and "attention" in shares, done.out + done.err
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)
    assert ("without the profiler: " in done.out) == (steps == 8), done.out
    assert f"64 tokens a step; {min(steps, 2)} of {steps} steps recorded" in done.out


def test_the_profile_of_a_gpu_files_kernels_by_what_launched_them(monkeypatch, capsys):
    """Events as the profiler of a GPU gives them, by hand: two steps, two waits, kernels in five parts and in none."""
    import step_profile

    monkeypatch.setattr(step_profile, "HEAD", {500})

    def event(name, parent=None, shapes=(), kernels=(), device="CPU", micros=0, note=False):
        return SimpleNamespace(
            name=name, cpu_parent=parent, input_shapes=list(shapes), device_type=f"DeviceType.{device}",
            kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels],
            is_user_annotation=note, time_range=SimpleNamespace(elapsed_us=lambda: micros),
        )  # fmt: skip

    step, update = event("ProfilerStep#3"), event("Optimizer.step#AdamW.step")
    attention, loss = event("torch_attn::_varlen_attn_backward"), event("ChunkedLoss")
    item = event("aten::item", step)
    events = [
        step, update, attention, loss, item,
        event("aten::mm", step, [[64, 8], [8, 8]], [("gemm", 40)]),
        event("aten::addmm", loss, [[64, 8], [8, 9]], [("gemm", 30)]),
        event("triton_red_fused__log_softmax_1", step, [], [("softmax", 10)]),
        event("aten::mul", step, [[8, 500], []], [("scale", 2)]),
        event("aten::sum", attention, [[64, 8]], [("reduce", 8)]),
        event("aten::add_", event("aten::_foreach_add_", update), [[500, 8]], [("add", 5)]),
        event("triton_poi_fused_gelu_0", event("CompiledFunction", step), [[64, 8]], [("gelu", 4)]),
        *[event("cudaLaunchKernel", step)] * 6, event("cuLaunchKernelEx", step), event("cudaMemcpyAsync", item),
        event("cudaStreamSynchronize", item), event("cudaStreamSynchronize", item), event("cudaDeviceSynchronize"),
        event("gemm", device="CUDA", micros=40), event("gemm", device="CUDA", micros=30),
        *[event(name, device="CUDA", micros=micros) for name, micros in (
            ("softmax", 10), ("scale", 2), ("reduce", 8), ("add", 5), ("gelu", 4), ("stray", 1))],
        event("Optimizer.step#AdamW.step", device="CUDA", micros=77, note=True),
    ]  # fmt: skip
    assert {part: round(1e6 * seconds) for part, seconds in step_profile.parts_of(events, True).items()} == {
        "layers: matrix products": 40, "head: matrix products": 30, "head: softmax, losses, casts, sums": 12,
        "attention": 8, "optimizer and clipping": 5, "layers: norms, activations, casts, sums": 4,
        "launched outside of operations": 1}  # fmt: skip
    step_profile.report_gpu(events, 2)
    told = capsys.readouterr().out
    assert "- 4 launches of kernels a step" in told and "- 1.50 waits" in told  # 7 / 2, rounded to the even 4
    assert "| cudaStreamSynchronize | 1.00 | aten::item |" in told and "| cudaDeviceSynchronize | 0.50 |" in told
    assert "| `gemm` | layers: matrix products | 0.035 | 70.0% | 1.0 |" in told
    assert "| `stray` | – |" in told and "AdamW" not in told


def test_steps_to_profile_are_divided_as_the_help_says():
    """Left out, timed, before those recorded; at least one step is recorded."""
    import step_profile

    assert step_profile.plan(20) == (5, 5, 11) and step_profile.plan(8) == (2, 2, 5)
    assert [step_profile.plan(steps) for steps in (1, 2, 7)] == [(0, 0, 0), (1, 0, 1), (1, 0, 1)]


@pytest.mark.slow
def test_the_throughput_benchmark_runs_and_its_trainers_do_the_same_work(tiny, tmp_path):
    """Plain transformers and main.py, on the tiny model: a row each, and the first losses agree."""
    table = tmp_path / "table.md"
    done = launch(sys.executable, ROOT / "benchmarks" / "throughput.py", "--quick", "--model", tiny, "--only", "plain",
                  "ours", "--no-peer-install", "--cache", tmp_path / "cache", "--output", table)  # fmt: skip
    assert done.status == 0, done.out + done.err
    rows = table.read_text()
    assert "| plain |" in rows and "| ours |" in rows and "agree within" in rows
    assert rows.count(" GB |") == 4 and "out of memory" not in rows


@pytest.mark.slow
def test_a_trainer_that_needs_too_much_memory_is_a_row_of_the_table(tiny, tmp_path):
    """A limit that the imports nearly fill: "out of memory", not a traceback."""
    done = launch(sys.executable, ROOT / "benchmarks" / "throughput.py", "--quick", "--model", tiny, "--only", "ours",
                  "--length", "512", "--batch", "256", "--memory", "1.2", "--cache", tmp_path)  # fmt: skip
    assert "| ours | out of memory |" in done.out, done.out + done.err


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_makes_its_table_as_it_goes(tiny, tmp_path):
    """On the CPU, by --quick: a row for each run, what is not there is said, and the first losses agree."""
    words = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--quick", "--model", tiny, "--cache", tmp_path / "cache"]
    done = launch(*words, "--only", "plain", "checkpointing", "Liger", "TRL", env={"OUT": str(tmp_path)})
    assert done.status == 0, done.out + done.err
    table = (tmp_path / "gpu.md").read_text()
    assert table == done.out and "DIFFER" not in table
    title, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert title[:3] == ["run", "tokens a step", "tokens/s"] and {len(row) for row in rows} == {len(title)}, table
    told = {row[0]: row for row in rows}
    for name, tokens in (("plain Trainer, bf16", "1 × 64"), ("main.py --bf16 --gradient_checkpointing", "3 × 64")):
        assert told[name][1] == tokens and float(told[name][2].replace(",", "")) > 0
        assert re.fullmatch(r"[\d.]+ → [\d.]+", told[name][7])
    assert told["Trainer with Liger, bf16"][2] == "**its kernels need a GPU**"
    assert "CPU, " in table and "torch " in table and "python benchmarks/gpu.py --quick" in table

    late = launch(*words, "--only", "plain", "--minutes", "0")
    assert late.status == 0 and "| plain Trainer, bf16 | 1 × 64 | **no time** |" in late.out, late.out + late.err


def test_the_part_of_a_gpu_says_in_a_sentence_that_there_is_none(tmp_path):
    """Status 2, and nothing else happens: no test, no table; the same where torch or a folder is missing."""
    run = ROOT / "tests" / "run.sh"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    for env, words in (({"OUT": str(tmp_path)}, "sees no CUDA GPU here"),
                       ({"PYTHONPATH": str(empty)}, "torch cannot use the GPU: libcudart.so.13"),
                       ({"OUT": "/nowhere"}, "OUT is /nowhere, where nothing can be written")):  # fmt: skip
        done = launch("bash", run, "--gpu", env=env)
        assert done.status == 2 and done.out == "", done.out + done.err
        assert done.err.startswith("tests/run.sh --gpu: error: ") and words in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "gpu.md").exists()


@pytest.mark.slow
def test_no_other_call_collects_the_tests_of_a_gpu():
    """They are neither run nor counted, so that a run on a CPU has nothing to explain."""
    done = launch(sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", "gpu", ROOT / "tests")
    assert "test_gpu.py" not in done.out and "test_benchmarks.py" in done.out, done.out
