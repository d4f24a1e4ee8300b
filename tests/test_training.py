"""Numbers a user can trust, from the plan to the results: what must not change a training does not change it."""

import json
import math
import os
import re
import shutil
import sys

import pytest
from helpers import (
    GOOD,
    ROOT,
    chunks_of,
    events,
    finish,
    in_child,
    launch,
    logged,
    losses,
    need,
    plain_loss,
    results,
    run,
    same_weights,
    short_run,
    steps,
    two_processes,
    weights_of,
    write_jsonl,
)

C3 = "--dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 --output_dir ./outputs --bf16"


# ── A whole run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_main_command_trains_evaluates_and_saves(hub, tmp_path):
    """C3, B2, B9, B12: the command exactly as written, with wikitext as small as the stub hub's."""
    done = finish(*C3.split(), env=GOOD, cwd=tmp_path)
    out = tmp_path / "outputs"
    assert "validation: 60 rows" in done.out
    metrics = results(out)
    assert metrics["epoch"] == 3 and metrics["train_loss"] > 0
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert {"config.json", "model.safetensors", "tokenizer.json", "checkpoint-3"} <= set(os.listdir(out))
    assert list((out / "runs").rglob("events.out.tfevents.*"))


def test_results_are_written_as_json(finished):
    """L3, B9, B12: train, eval and all results; loss, perplexity and bits per byte agree in every evaluation."""
    output, _, _, _ = finished
    train, evaluation, everything = (results(output, name) for name in ("train", "eval", "all"))
    assert everything == train | evaluation
    for name in ("perplexity", "bits_per_byte"):
        assert evaluation[name] == evaluation[f"eval_{name}"]
    during = [entry for entry in logged(output) if "eval_loss" in entry]
    bits = evaluation["bits_per_byte"] / evaluation["eval_loss"]  # of a nat a token: the same text each time
    for entry in (evaluation, *during):
        assert entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
        assert entry["eval_bits_per_byte"] == pytest.approx(bits * entry["eval_loss"])
    assert len({entry["eval_loss"] for entry in during}) > 1


def measured(model, path, length, count=None):
    """By transformers, torch and the tokenizer's words alone. Returns: (loss of a token, bits of a byte)."""
    from transformers import AutoTokenizer

    tokenizer, chunks = AutoTokenizer.from_pretrained(model), chunks_of(model, path, length)[:count]
    loss = plain_loss(model, chunks)
    seen = [token for chunk in chunks for token in chunk[1:] if token != tokenizer.bos_token_id]
    text = "".join(json.loads(line)["text"] for line in open(path, encoding="utf-8"))
    size = sum(len(word) for word in tokenizer.convert_ids_to_tokens(seen))  # in which each letter is a byte
    assert text.startswith(tokenizer.decode(seen)) and size == len(tokenizer.decode(seen).encode())
    return loss, len(seen) * loss / math.log(2) / size


def test_evaluation_equals_plain_transformers(finished):
    """L1 to L3, B9: loss and bits per byte are what transformers and torch make of the saved model and the text."""
    output, _, texts, _ = finished
    loss, bits = in_child(measured, output, texts[1], 64)
    mine = results(output, "eval")
    assert mine["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert mine["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_each_predicted_token_counts_once_and_each_byte_of_its_text(tiny, tmp_path):
    """L2, L3: many short texts of letters of two to four bytes: BOS among the tokens is neither counted nor text."""
    rows = [f"Nüchtern – {number} Größen, 漢字, 🙂\n" for number in range(60)]
    path = write_jsonl(tmp_path / "short.jsonl", rows)
    finish("--do_eval", "--model_name_or_path", tiny, "--validation_file", path, "--max_seq_length", 48,
           "--output_dir", tmp_path / "out")  # fmt: skip
    chunks = in_child(chunks_of, tiny, path, 48)
    assert len({chunk.count(2) for chunk in chunks}) > 1  # so that no chunk's mean is a mean over tokens
    loss, bits = in_child(measured, tiny, path, 48)
    mine = results(tmp_path / "out", "eval")
    assert mine["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert mine["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_the_model_learns_and_loads(finished):
    """B12: the loss falls; model and tokenizer load from output_dir with transformers, and generate."""
    output, _, _, _ = finished
    assert losses(output)[-1] < losses(output)[0] - 0.1

    def generate():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(output)
        model = AutoModelForCausalLM.from_pretrained(output)
        ids = model.generate(**tokenizer("The with", return_tensors="pt"), max_new_tokens=8, do_sample=False)
        return str(model.dtype), model.config.use_cache, len(ids[0]) - len(tokenizer("The with")["input_ids"])

    dtype, use_cache, new = in_child(generate)
    assert dtype == "torch.float32" and use_cache is True and 1 <= new <= 8


def kinds_of(folder):
    """The dtypes of a saved model's weights, that of its config.json, and its file's size in bytes."""
    config = json.loads((folder / "config.json").read_text())
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights_of(folder).values()}
    return dtypes, config["dtype"], (folder / "model.safetensors").stat().st_size


def rounding(output):
    """Whether a finished bfloat16 model is its last checkpoint rounded, and whether that changed any weight."""
    import torch

    whole, saved = weights_of(output / "checkpoint-6"), weights_of(output)
    rounded = {name: weight.to(torch.bfloat16) for name, weight in whole.items()}
    changed = [not torch.equal(rounded[name].float(), whole[name]) for name in whole]
    return whole.keys() == saved.keys() and all(torch.equal(rounded[name], saved[name]) for name in saved), any(changed)


def test_the_finished_model_has_the_dtype_of_its_base_and_is_what_was_evaluated(tiny_bf16, tmp_path, texts):
    """L3, L6, B12: half the size, rounded only once and behind all checkpoints; every figure is of what was saved."""
    output, wide = tmp_path / "out", tmp_path / "wide"
    argv = [*short_run(tiny_bf16, texts, output, "--max_steps", 6, "--gradient_accumulation_steps", 1),
            "--cache_dir", tmp_path / "cache"]  # fmt: skip
    finish(*argv)
    finish(*argv, "--output_dir", wide, "--save_dtype", "float32")
    dtypes, config, size = in_child(kinds_of, output)
    assert dtypes == {"bfloat16"} and config == "bfloat16"
    for folder in (wide, wide / "checkpoint-6", output / "checkpoint-6"):
        dtypes, config, full = in_child(kinds_of, folder)
        assert dtypes == {"float32"} and config == "float32" and full == pytest.approx(2 * size, rel=0.02)
    assert in_child(rounding, output) == (True, True)
    assert in_child(same_weights, wide, output / "checkpoint-6")

    figures = []
    for folder in (output, wide):
        finish("--do_eval", "--model_name_or_path", folder, "--validation_file", texts[1], "--no_truncation",
               "--max_seq_length", 64, "--output_dir", tmp_path / f"eval-{folder.name}")  # fmt: skip
        mine, again = results(folder, "eval"), results(tmp_path / f"eval-{folder.name}", "eval")
        loss, bits = in_child(measured, folder, texts[1], 64)
        assert mine["eval_loss"] == pytest.approx(again["eval_loss"], rel=1e-6)
        assert mine["eval_loss"] == pytest.approx(loss, rel=1e-6)
        assert mine["bits_per_byte"] == pytest.approx(again["bits_per_byte"], rel=1e-6)
        assert mine["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        figures.append(loss)
    assert abs(figures[0] / figures[1] - 1) > 5e-6  # the rounding can be told from the figures


def test_an_evaluation_in_16_bits_does_not_round_the_finished_model(tiny, tmp_path, texts):
    """L6, F24: --bf16_full_eval casts the model in place, after it was saved."""
    output = tmp_path / "out"
    argv = short_run(tiny, texts, output, "--max_steps", 2, "--gradient_accumulation_steps", 1)
    finish(*argv, "--bf16_full_eval", "--eval_strategy", "no")
    assert in_child(same_weights, output, output / "checkpoint-2")


def test_do_eval_alone_only_evaluates(finished, tmp_path):
    """B9: the base model's or a finished model's perplexity without training; no training data is needed."""
    output, _, texts, _ = finished
    finish("--do_eval", "--model_name_or_path", output, "--validation_file", texts[1], "--no_truncation",
           "--max_seq_length", 64, "--output_dir", tmp_path / "eval")  # fmt: skip
    again, first = results(tmp_path / "eval", "eval"), results(output, "eval")
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert not list((tmp_path / "eval").glob("*.safetensors")) and not list((tmp_path / "eval").glob("checkpoint*"))


def test_do_eval_alone_leaves_a_training_run_alone(finished):
    """B12: the results of a training run are not replaced by those of an evaluation."""
    output, _, texts, _ = finished
    before = (output / "all_results.json").read_text()
    done = run("--do_eval", "--model_name_or_path", output, "--validation_file", texts[1], "--output_dir", output)
    assert done.status == 2 and "choose another for --do_eval" in done.err, done.err
    assert (output / "all_results.json").read_text() == before


def test_no_validation_data_no_evaluation(tiny, tmp_path, texts):
    """B9, F19, F21: without validation data nothing is evaluated; --report_to none writes no curves."""
    done = finish("--model_name_or_path", tiny, "--train_file", texts[0], "--output_dir", tmp_path / "out",
                  "--max_seq_length", 64, "--max_steps", 2, "--eval_steps", 1, "--report_to", "none")  # fmt: skip
    assert "eval_loss" not in done.out and not (tmp_path / "out" / "eval_results.json").exists()
    assert not (tmp_path / "out" / "runs").exists()


def test_a_loss_that_is_no_number_stops_the_run_before_anything_is_saved(tiny, tmp_path, texts):
    """B10: the sentence names the step; no checkpoint and no model is left."""
    more = ["--learning_rate", 1e38, "--save_steps", 1, "--warmup_steps", 0]
    done = run(*short_run(tiny, texts, tmp_path / "out", *more))
    assert done.status == 1 and "no finite numbers at step 1" in done.err and "Traceback" not in done.err, done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock", ".staging", "runs"}


@pytest.mark.slow
def test_out_of_memory_ends_with_status_1_and_the_four_remedies_in_order(refuse, tmp_path):
    """F9, README: a batch that does not fit the process's address space fails in its first step."""
    need("prlimit")
    rows = ["The quick brown fox jumps over the lazy dog. " * 1000] * 35
    write_jsonl(tmp_path / "much.jsonl", rows)
    flags = (
        "--train_file {tmp}/much.jsonl --max_seq_length 512 --no_truncation --per_device_train_batch_size 2048 "
        "--max_steps 1 --report_to none"
    )

    def little_memory(*argv):
        return launch("prlimit", f"--as={4 * 2**30}", sys.executable, ROOT / "main.py", *argv)

    sentence = refuse(flags, "out of memory", status=1, runner=little_memory)
    remedies = ["--bf16", "--per_device_train_batch_size", "--gradient_checkpointing", "--max_seq_length"]
    assert sorted(remedies, key=sentence.index) == remedies


# ── The plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_banner_says_what_will_happen(finished):
    """F11, F16, B1, L5: model, device, data, effective batch, steps, texts and place, before the first step."""
    output, done, _, _ = finished
    chunks = int(re.search(r"= (\d+) chunks of 64", done.out)[1])
    steps = math.ceil(3 * math.ceil(math.ceil(chunks / 4) / 8))
    for words in (
        "No GPU found: training on the CPU.",
        "99,008 parameters in float32, sdpa attention",
        "device   cpu, 1 process",
        "4 per device x 8 accumulation x 1 = 32 chunks = 2,048 tokens a step",
        f"steps    {steps} (3 epochs), learning rate 0.001, warm-up 2 steps",
        "texts begin with BOS, end without EOS",
        f"output   {output}",
    ):
        assert words in done.out
    assert json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())["max_steps"] == steps


ODD = {  # flags → words of the note
    "--warmup_steps 500": ("shorter than its warm-up: it reaches 0.4%", "--warmup_steps, to 0 for example"),
    "--warmup_steps 500 --max_steps 1": ("it reaches 0.0% of the learning rate", "--warmup_steps, to 0"),
    "--gradient_accumulation_steps 8": ("all 24 chunks make less than one step of 32", "to 6 for a full one"),
}


@pytest.mark.parametrize("flags", ODD)
def test_an_odd_plan_is_said_before_the_first_step(flags, two_epochs, tmp_path):
    """F11, F14: a note, and the run goes on."""
    done = finish(*two_epochs, "--max_steps", 3, *flags.split(), "--output_dir", tmp_path / "out")
    notes = " ".join(re.findall(r"^note +(.*)$", done.out.partition("'loss'")[0], re.M))
    assert [word for word in ODD[flags] if word not in notes] == [], done.out


@pytest.mark.parametrize("flags", ["", "--lr_scheduler_type constant --warmup_steps 500"], ids=["linear", "constant"])
def test_an_ordinary_plan_has_no_notes(flags, two_epochs, tmp_path):
    """F14: nothing to say about a plan that fits; a constant rate has no warm-up."""
    done = finish(*two_epochs, "--output_dir", tmp_path / "out", "--max_steps", 3, *flags.split())
    assert "\nnote " not in done.out and "warm-up 0 steps" in done.out


@pytest.mark.parametrize("steps, said", [(2, False), (3, False), (4, True)])
def test_the_time_is_said_after_the_third_step(steps, said, two_epochs, tmp_path):
    """F17: whatever --logging_steps is, before the fourth step; not where nothing is left."""
    done = finish(*two_epochs, "--max_steps", steps, "--logging_steps", 50, "--output_dir", tmp_path / "out")
    line = re.search(r"^time +[\d.]+ s a step: [\d.]+ s for the 1 to come, besides evaluations and", done.out, re.M)
    assert bool(line) == said and (not said or line.start() < done.out.index("'loss'")), done.out


# ── The dry run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def dry(*argv, **more):
    """A dry run. Returns: (as run does, {word: rest of its line} of the report)."""
    done = run(*argv, "--dry_run", **more)
    report = done.out.partition("\nDry run: ")[2]
    return done, dict(re.findall(r"^(\w+) +(.*)$", "steps " + report, re.M))


def test_a_dry_run_tells_what_a_run_will_take_and_leaves_nothing(two_epochs, tmp_path):
    """U1: the plan, then steps, tokens, speed, time with evaluations and saves, memory and disk; no directory."""
    output = tmp_path / "new" / "out"
    words = [*two_epochs, "--output_dir", output, "--save_steps", 5, "--eval_steps", 4, "--sample_prompt", "with"]
    done, report = dry(*words)
    assert done.status == 0, done.err
    assert "12 steps; 3,072 tokens to come" in done.out  # 2 epochs of 24 chunks of 64, 4 a step
    assert f"output   nothing is written into {output}" in done.out
    assert re.fullmatch(r"[\d.]+ s a step, [\d,]+ tokens a second", report["speed"])
    assert re.search(r"to the end: training [\d.]+ s, 4 evaluations [\d.]+ s, 4 saves [\d.]+ s$", report["time"])
    assert re.fullmatch(r"[\d.]+ GB at the peak of a process, of [\d.]+ GB", report["memory"])
    assert re.fullmatch(r"0\.00\d+ GB for checkpoints, [\d.]+ GB free", report["disk"])  # 4 × 99,008 × 12 bytes
    assert "sample   'with': " in done.out and "{'eval_loss'" not in done.out
    assert not output.exists() and list(output.parent.iterdir()) == []
    assert "Done" not in done.out


def test_a_dry_run_beside_a_stopped_run_counts_what_is_left_and_changes_nothing(every_step_saved, tmp_path):
    """U1: the real run goes on to the same weights afterwards."""
    argv, expected = every_step_saved
    output = tmp_path / "out"
    output.mkdir()
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(expected / name, output / name)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in output.rglob("*")}
    done, report = dry(*argv, "--output_dir", output)
    assert done.status == 0 and "4 steps, 2 of them made; 256 tokens to come" in done.out, done.out + done.err
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in output.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    finish(*argv, "--output_dir", output)
    assert in_child(same_weights, expected, output)


GAPS = ("--save_steps 5 --eval_steps 5", "--save_strategy epoch --eval_strategy epoch", "--save_strategy no",
        "--save_steps 0.25 --eval_steps 4 --eval_on_start")  # fmt: skip


@pytest.mark.parametrize("gaps", GAPS)
def test_a_dry_run_counts_evaluations_and_saves_as_the_run_makes_them(gaps, two_epochs, tmp_path):
    """U1: at every multiple, at the last step, and of the finished model, for each way to say when."""
    words = [*two_epochs, *gaps.split(), "--output_dir", tmp_path / "out", "--save_total_limit", 99]
    done, report = dry(*words)
    told = re.search(r"(\d+) evaluations .*, (\d+) saves", report["time"])
    output, made = finish(*words), tmp_path / "out"
    within = output.out.count("{'eval_loss'")
    saved = len(list(made.glob("checkpoint-*")))
    assert [int(number) for number in told.groups()] == [within + 1, saved + 1], (done.out, output.out)


def test_a_dry_run_clears_what_a_killed_one_has_left(two_epochs, tmp_path):
    """U1: killed at any time it leaves at most a hidden directory, which the next one uses and removes."""
    left = tmp_path / ".out.dry-run"
    run(*two_epochs, "--output_dir", tmp_path / "out", "--dry_run", signals=[(1.0, 9)])
    left.mkdir(exist_ok=True)
    (left / "checkpoint-3").mkdir(exist_ok=True)
    (left / "checkpoint-3" / "x").write_text("half")
    done, _ = dry(*two_epochs, "--output_dir", tmp_path / "out")
    assert done.status == 0 and list(tmp_path.iterdir()) == [], done.err
    for wrong in (["--push_to_hub"], ["--text_column", "none"], ["--optim", "none"]):  # each at another place
        assert dry(*two_epochs, *wrong, "--output_dir", tmp_path / "out")[0].status == 2
        assert list(tmp_path.iterdir()) == []
    for number in (2, 15):
        words = [*two_epochs, "--max_steps", 500, "--output_dir", tmp_path / "out", "--dry_run"]
        done = run(*words, signals=[(0.5, number)])
        assert done.status in (128 + number, 0) and list(tmp_path.iterdir()) == [], done.err


def test_a_dry_run_on_a_small_disk_says_so(two_epochs, disk):
    """U1: the disk for the checkpoints that are kept; status 1, as the run would not get through."""
    disk.resize("size=8m")
    output = disk.folder / "out"
    words = [*two_epochs, "--output_dir", output, "--dry_run"]
    done = disk.server.run([*words, "--save_total_limit", 9, "--save_steps", 1], output)
    assert done["status"] == 1 and "warning  the disk is too small: lower --save_total_limit" in done["out"], done
    done = disk.server.run([*words, "--save_total_limit", 9, "--save_steps", 9], output)
    assert done["status"] == 0 and "too small" not in done["out"], done
    assert disk.call("ls", "-A", disk.folder) == ""


@pytest.mark.slow
def test_a_dry_run_finds_what_fits_into_memory(two_epochs, tmp_path):
    """U1: half the batch and twice the accumulation, until it fits; said with the flags; status 1."""
    need("prlimit")
    rows = ["The quick brown fox jumps over the lazy dog. " * 1000] * 35
    write_jsonl(tmp_path / "much.jsonl", rows)
    words = ["--model_name_or_path", two_epochs[1], "--train_file", tmp_path / "much.jsonl", "--max_seq_length", 512,
             "--no_truncation", "--per_device_train_batch_size", 512, "--gradient_accumulation_steps", 1,
             "--max_steps", 1, "--report_to", "none", "--output_dir", tmp_path / "out", "--dry_run"]  # fmt: skip
    done = launch("prlimit", f"--as={4 * 2**30}", sys.executable, ROOT / "main.py", *words)
    assert done.status == 1 and "Traceback" not in done.err, done.out + done.err
    asked = "--per_device_train_batch_size 512 --gradient_accumulation_steps 1 --max_seq_length 512"
    assert f"note     {asked} does not fit into memory: less is tried" in done.out
    found = re.search(rf"warning  {asked} did not fit into memory; this does: (.*)$", done.out, re.M)[1].split()
    batch, accumulation = int(found[1]), int(found[3])
    assert batch * accumulation == 512 and 1 < batch < 512
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.dry-run").exists()


@pytest.mark.slow
def test_a_dry_run_of_two_processes(two_epochs, tmp_path):
    """U1, B13: one report; nothing is left."""
    done = launch(*two_processes(), *two_epochs, "--per_device_train_batch_size", 2, "--dry_run",
                  "--output_dir", tmp_path / "out")  # fmt: skip
    assert done.status == 0 and done.out.count("Dry run: 12 steps; 3,072 tokens to come") == 1, done.out + done.err
    assert list(tmp_path.iterdir()) == []


# ── Log lines and curves ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_line_tells_speed_memory_and_time_left(finished):
    """F17: tokens seen are those of the steps made so far; time left runs out."""
    output, _, _, _ = finished
    rows = [row for row in logged(output) if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 < row["peak_memory_gb"] < 24 for row in rows)
    seen = [row["tokens_seen"] for row in rows]
    chunks = int(re.search(r"= (\d+) chunks of 64", finished[1].out)[1])
    an_epoch = [min(32 * step, chunks) for step in range(1, math.ceil(chunks / 32) + 1)]  # the last step is short
    assert seen == [64 * (epoch * chunks + part) for epoch in range(3) for part in an_epoch]
    assert rows[-1]["minutes_left"] == 0
    assert {path.name.split(".")[0] for path in (output / "runs").iterdir()} == {"events"}  # no folder: one curve


def test_tensorboard_has_the_curves(finished):
    """B11: loss, learning rate and validation loss are in output_dir/runs."""
    output, _, _, _ = finished
    wanted = {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/perplexity",
              "eval/bits_per_byte"}  # fmt: skip
    assert wanted <= events(output / "runs").keys()


@pytest.mark.slow
def test_the_last_steps_are_logged_as_well(tiny, tmp_path, texts):
    """F17: --logging_steps may be more than all steps, or no divisor of them; the last line is a mean of the rest."""
    rows = {}
    for every in (1, 3, 10):
        done = finish(*short_run(tiny, texts, tmp_path / str(every), "--max_steps", 5, "--logging_steps", every))
        assert re.search(r"'loss': .*'epoch'", done.out), done.out
        rows[every] = [row for row in logged(tmp_path / str(every)) if "loss" in row]
    seen = [0, *(row["tokens_seen"] for row in rows[1])]  # the last step of an epoch has fewer
    sums = [row["loss"] * (seen[step + 1] - seen[step]) for step, row in enumerate(rows[1])]
    for every, ends in ((1, [1, 2, 3, 4, 5]), (3, [3, 5]), (10, [5])):
        assert [row["step"] for row in rows[every]] == ends
        means = [sum(sums[a:b]) / (seen[b] - seen[a]) for a, b in zip([0, *ends], ends, strict=False)]
        assert [row["loss"] for row in rows[every]] == pytest.approx(means, rel=1e-5)


def test_the_last_part_of_an_epoch_is_logged_as_well(evaluated_flags, tmp_path):
    """F17, F24: --logging_strategy epoch, one and a third of it."""
    finish(*evaluated_flags, "--logging_strategy", "epoch", "--max_steps", 8, "--output_dir", tmp_path / "out")
    seen = [step for step, _ in events(tmp_path / "out" / "runs")["train/loss"]]
    assert seen == [2, 4, 6, 8]  # a checkpoint every 2 steps, each with its line


def test_a_logged_loss_is_the_mean_over_tokens(two_epochs, tmp_path):
    """F17: an epoch's last step, of two chunks instead of four, counts half; a stop in between changes nothing."""
    words = [*two_epochs, "--max_train_samples", 22, "--eval_strategy", "no"]
    for name, every in (("each", 1), ("all", 12)):
        finish(*words, "--logging_steps", every, "--save_steps", 5, "--output_dir", tmp_path / name)
    each = losses(tmp_path / "each")
    assert len(each) == 12
    share = [2 if step % 6 == 5 else 4 for step in range(12)]  # chunks of each step
    parts = [range(5), range(5, 10), range(10, 12)]  # a line at each checkpoint and at the end
    means = [sum(each[step] * share[step] for step in part) / sum(share[step] for step in part) for part in parts]
    assert losses(tmp_path / "all") == pytest.approx(means, rel=1e-4)
    assert abs(means[1] / (sum(each[5:10]) / 5) - 1) > 1e-4  # the mean over steps is another number
    mean = sum(loss * chunks for loss, chunks in zip(each, share, strict=True)) / 44
    assert results(tmp_path / "all", "train")["train_loss"] == pytest.approx(mean, rel=1e-4)
    again = [*words, "--logging_steps", 12, "--save_steps", 5, "--output_dir", tmp_path / "again"]
    finish(*again, "--resume_from_checkpoint", tmp_path / "all" / "checkpoint-5")
    assert losses(tmp_path / "again") == losses(tmp_path / "all")


# ── What changes the weights, and what does not ──────────────────────────────────────────────────────────────────────


def close_weights(one, other):
    """The largest difference of two models' weights, relative to the largest weight."""
    first, second = weights_of(one), weights_of(other)
    largest = max(value.abs().max().item() for value in first.values())
    return max((first[name] - second[name]).abs().max().item() for name in first) / largest


SAME = {  # the same chunks in a step, in other portions
    "accumulated": ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4],
    "checkpointed": ["--gradient_checkpointing"],
    "in two processes": ["--per_device_train_batch_size", 2],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_effective_batch_decides_the_training(name, two_epochs, two_epochs_trained, tmp_path):
    """F9, F11, F16, B13, L3: equal losses and final weights to 1e-4, however a batch of 4 is made up."""
    one, words = two_epochs_trained, [*two_epochs, *SAME[name], "--output_dir", tmp_path / "out"]
    done = launch(*two_processes(), *words) if name == "in two processes" else run(*words)
    assert done.status == 0, done.err
    assert losses(tmp_path / "out") == pytest.approx(losses(one), rel=1e-4) and len(losses(one)) == 12
    assert in_child(close_weights, one, tmp_path / "out") < 1e-4
    mine, other = results(tmp_path / "out", "eval"), results(one, "eval")
    for figure in ("eval_loss", "bits_per_byte"):  # of 13 chunks: uneven over two processes
        assert mine[figure] == pytest.approx(other[figure], rel=1e-4)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(two_epochs, two_epochs_trained, tmp_path):
    """F24: --torch_compile compiles the layers one by one, which the plan says; --torch_compile False does not."""
    done = finish(*two_epochs, "--torch_compile", "True", "--output_dir", tmp_path / "out")
    assert " attention, layers compiled\n" in done.out and "note" not in done.out
    assert losses(tmp_path / "out") == pytest.approx(losses(two_epochs_trained), rel=1e-3)
    assert in_child(close_weights, two_epochs_trained, tmp_path / "out") < 1e-3
    done = finish(*two_epochs, "--torch_compile", "False", "--output_dir", tmp_path / "forbidden",
                  env={"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})  # fmt: skip
    assert "layers compiled" not in done.out
    assert in_child(same_weights, two_epochs_trained, tmp_path / "forbidden")


STRICT = """
import sys
sys.path.insert(0, sys.argv[1])
import main
import torch
stance = torch.compiler.set_stance
torch.compiler.set_stance = lambda name: stance("fail_on_recompile" if name == "eager_on_recompile" else name)
signals = main.Signals()
with main.reported():
    main.main(main.parse_args(sys.argv[2:]), signals)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(1, ["--bf16", "--gradient_checkpointing"]), (2, ["--bf16"])])
def test_every_whole_batch_of_a_run_is_computed_by_the_compiled_layers(ranks, more, two_epochs, tmp_path):
    """G2: a batch for which the trial's graphs do not fit would end this run, and train uncompiled otherwise."""
    script = tmp_path / "strict.py"
    script.write_text(STRICT)
    at = two_epochs.index("--validation_file")
    words = [*two_epochs[:at], *two_epochs[at + 2 :], "--per_device_train_batch_size", 4 // ranks, *more,
             "--torch_compile_backend", "aot_eager", "--output_dir", tmp_path / "out"]  # fmt: skip
    start = [*two_processes()[:-1], script] if ranks == 2 else [sys.executable, script]
    done = launch(*start, ROOT, *words)
    assert done.status == 0 and "layers compiled" in done.out, done.out + done.err
    assert len(losses(tmp_path / "out")) == 12


ROUNDED = """
import sys
sys.path.insert(0, sys.argv[1])
import main
import torch
torch.nn.parallel.DistributedDataParallel._check_comm_hook = lambda *given: None
original = main.make_trainer
def make_trainer(*parts):
    parts[5].settings["ddp_comm_hook"] = "bf16"
    return original(*parts)
main.make_trainer = make_trainer
signals = main.Signals()
with main.reported():
    main.main(main.parse_args(sys.argv[2:]), signals)
"""


@pytest.mark.slow
def test_gradients_that_travel_in_bfloat16_train_nearly_the_same(two_epochs, two_epochs_trained, tmp_path):
    """F24: the hook of --ddp_comm_hook bf16, which torch refuses on a CPU unless it is told not to look, over gloo."""
    script = tmp_path / "rounded.py"
    script.write_text(ROUNDED)
    words = [*two_epochs, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "out"]
    done = launch(*two_processes()[:-1], script, ROOT, *words)
    assert done.status == 0, done.out + done.err
    assert losses(tmp_path / "out") == pytest.approx(losses(two_epochs_trained), rel=1e-2)
    assert 2e-4 < in_child(close_weights, two_epochs_trained, tmp_path / "out") < 3e-2


def test_looking_does_not_change_the_training(two_epochs, two_epochs_trained, tmp_path):
    """F17 to F19: bit-equal weights whatever is logged, evaluated and saved."""
    finish(*two_epochs, "--output_dir", tmp_path / "out", "--logging_steps", 5, "--eval_steps", 3, "--save_steps", 2)
    assert in_child(same_weights, two_epochs_trained, tmp_path / "out")


def with_dropout(tiny, folder):
    """Make a copy of the tiny model whose attention drops a tenth: its training draws random numbers."""
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PROMPTS = ["The with statement", "if x:\n    y = ", "ünïcödé 🙂"]


@pytest.mark.parametrize("way", ["plain", "dropout", "--gradient_checkpointing", pytest.param("--torch_compile",
                                                                                          marks=pytest.mark.slow)])
def test_samples_do_not_change_the_training(way, two_epochs, two_epochs_trained, tiny, tmp_path):
    """U5: bit-equal weights with and without, though the model writes at every other step."""
    words, output = [*two_epochs, *([way, True] if way[0] == "-" else [])], tmp_path / "with"
    if way == "dropout":
        words[1] = with_dropout(tiny, tmp_path / "model")
    expected = tmp_path / "without" if way != "plain" else two_epochs_trained
    if way != "plain":
        finish(*words, "--eval_steps", 2, "--output_dir", expected)
    done = finish(*words, "--eval_steps", 2, "--output_dir", output, "--sample_prompt", *PROMPTS)
    assert in_child(same_weights, expected, output)
    assert [f"step {word}" for word in PROMPTS if done.out.count(f"sample   {word!r}: ") != 7] == []  # 6 and the end
    assert "is not used" not in done.out


def greedy(folder, prompt):
    """What transformers itself writes behind a prompt, with its cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(given, max_new_tokens=40, do_sample=False)[0, given.shape[1] :]
    return tokenizer.decode(made)


@pytest.mark.parametrize("validated", [True, False])
def test_the_last_samples_are_what_the_finished_model_writes(validated, two_epochs, tmp_path):
    """U5: in the log and in TensorBoard, with and without validation data."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*two_epochs] if validated else two_epochs[:4] + two_epochs[6:]
    done = finish(*words, "--report_to", "tensorboard", "--output_dir", tmp_path / "out", "--sample_prompt", *PROMPTS)
    loaded = EventAccumulator(str(tmp_path / "out" / "runs"), size_guidance={"tensors": 0}).Reload()
    for number, prompt in enumerate(PROMPTS, 1):
        text = in_child(greedy, tmp_path / "out", prompt)
        assert f"sample   {prompt!r}: {text!r}\n" in done.out
        shown = loaded.Tensors(f"sample {number}/text_summary")[-1]
        assert shown.step == 12 and shown.tensor_proto.string_val[0].decode() == prompt + text


# ── Early stopping ───────────────────────────────────────────────────────────────────────────────────────────────────


def seen_losses(output):
    """The evaluation losses of a finished run but for that of the finished model."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["eval_loss"] for row in history if "eval_loss" in row][:-1]


def test_a_run_ends_when_evaluations_get_no_better_and_keeps_the_best(early, two_epochs, tmp_path):
    """U4: after exactly so many in a row; the finished model is the best one's, and the checkpoint of it is there."""
    argv, output, done = early
    seen = seen_losses(output)
    best = seen.index(min(seen))
    assert 2 < len(seen) < 30 and len(seen) - 1 - best == 2 and len(seen) == steps(output)[-1]
    assert done.out.count("The last evaluations were no better (--early_stopping_patience): the training ends.") == 1
    assert "fewer, once 2 evaluations in a row are no better" in done.out
    assert results(output)["eval_loss"] == pytest.approx(min(seen), rel=1e-6)
    assert in_child(same_weights, output, output / f"checkpoint-{best + 1}")


def test_early_stopping_goes_on_exactly_after_a_kill(early, tmp_path):
    """U4: killed before the end, behind the last checkpoint, or stopped by a signal: never a step more or less."""
    argv, expected, _ = early
    last = steps(expected)[-1]
    for when, left in (("behind the last checkpoint", 3), ("one before", 2)):
        output = tmp_path / when
        shutil.copytree(expected, output)
        for name in ("model.safetensors", "manifest.json"):
            (output / name).unlink()
        for number in steps(output)[left:]:
            shutil.rmtree(output / f"checkpoint-{number}")
        done = finish(*argv, "--output_dir", output)
        assert f"Going on from {output}/checkpoint-{steps(output)[-1] if left == 3 else last - 1}" in done.out
        assert steps(output)[-1] == last and seen_losses(output) == seen_losses(expected)
        assert in_child(same_weights, expected, output)
    output = tmp_path / "signals"
    for number in range(20):
        done = run(*argv, "--output_dir", output, signals=[(0.8 + 0.05 * number, 15)])
        assert done.status in (0, 143), done.err
        if done.status == 0:
            break
    assert done.status == 0 and seen_losses(output) == seen_losses(expected)
    assert in_child(same_weights, expected, output)


def test_a_best_evaluation_starts_the_count_anew(two_epochs, tmp_path):
    """U4: a loss that falls at each evaluation never ends the run."""
    words = ["--eval_steps", 2, "--save_steps", 2, "--early_stopping_patience", 1]
    finish(*two_epochs, *words, "--output_dir", tmp_path / "out")
    assert steps(tmp_path / "out")[-1] == 12


@pytest.mark.parametrize("flags, words", {
    "--eval_steps 2 --save_steps 4": ("--early_stopping_patience needs a checkpoint of each", "--save_steps"),
    "--load_best_model_at_end False": ("--early_stopping_patience ends with the best model", "leave"),
    "--early_stopping_patience 0": ("must be at least 1",),
}.items())
def test_early_stopping_that_cannot_work_is_refused(flags, words, refuse):
    """U4: what --load_best_model_at_end needs, in a sentence."""
    more = "" if "patience" in flags else " --early_stopping_patience 2"
    refuse(f"--train_file {{train}} --validation_file {{train}} {flags}{more}", *words)


def test_early_stopping_without_validation_data_is_refused(refuse):
    """U4: nothing would be evaluated."""
    refuse("--train_file {train} --early_stopping_patience 2", "--early_stopping_patience", "validation data")


@pytest.mark.parametrize("batch", [1, 5, 13])
def test_the_evaluation_loss_does_not_depend_on_the_batch(batch, two_epochs, two_epochs_trained, tmp_path):
    """F10, B9, L3: the last batch may be short; the values are plain transformers', of the chunks that are used."""
    model = two_epochs_trained
    finish("--model_name_or_path", model, *two_epochs[2:], "--do_eval", "--output_dir", tmp_path / "out",
           "--per_device_eval_batch_size", batch)  # fmt: skip
    mine = results(tmp_path / "out", "eval")
    loss, bits = in_child(measured, model, two_epochs[5], 64, 13)
    assert mine["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert mine["perplexity"] == pytest.approx(math.exp(mine["eval_loss"]))
    assert mine["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


PROBE = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import main
seen = []
class Probe(torch.nn.Module):
    pass
original = main.make_trainer
def make_trainer(*parts):
    trainer = original(*parts)
    collate = trainer.data_collator
    def note(chunks):
        seen.extend(tuple(chunk["input_ids"].tolist()) for chunk in chunks)
        return collate(chunks)
    trainer.data_collator = note
    return trainer
main.make_trainer = make_trainer
main.main(main.parse_args(sys.argv[2:]), main.Signals())
print(json.dumps([hash(chunk) for chunk in seen]))
"""


@pytest.mark.slow
def test_each_epoch_sees_every_chunk_once_in_an_order_of_its_own(two_epochs, tmp_path):
    """F8, F23: other epochs and other seeds have other orders."""
    orders = []
    for seed in (1, 9):  # the sampler's seed is seed + epoch: neighbours share orders
        words = [ROOT, *two_epochs, "--eval_strategy", "no", "--seed", seed, "--output_dir", tmp_path / str(seed)]
        at = words.index("--validation_file")
        done = launch(sys.executable, "-c", PROBE, *words[:at], *words[at + 2 :])
        assert done.status == 0, done.err
        seen = json.loads(done.out.splitlines()[-1])
        assert len(seen) == 48
        orders += [seen[:24], seen[24:]]
    assert all(sorted(order) == sorted(orders[0]) and len(set(order)) == 24 for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.slow
def test_the_seed_decides_the_order(tiny, tmp_path, texts):
    """F23: same seed, same weights; another seed, another order."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*short_run(tiny, texts, tmp_path / name, "--max_steps", 3, "--seed", seed)).status == 0
    assert in_child(same_weights, tmp_path / "a", tmp_path / "b")
    assert not in_child(same_weights, tmp_path / "a", tmp_path / "c")
