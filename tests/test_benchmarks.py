"""The benchmarks: the formula of scaling.py against arithmetic by hand, and small runs of the others."""

import re
import sys

import pytest
from helpers import ROOT, launch

sys.path.append(str(ROOT / "benchmarks"))

import loss  # noqa: E402
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
def test_the_profile_files_all_time_under_a_part(tiny):
    """A step of the tiny model: the shares add up, and the optimizer is among them."""
    script = ROOT / "benchmarks" / "step_profile.py"
    done = launch(sys.executable, script, "--model", tiny, "--length", "64", "--steps", "1")
    shares = dict(re.findall(r"^\| (.+?) \| [\d.]+ \| ([\d.]+)% \|$", done.out, re.MULTILINE))
    assert "optimizer and clipping" in shares, done.out + done.err
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)


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
