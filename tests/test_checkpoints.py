"""Going on: which checkpoint is taken, what is verified, what is refused, what is kept and what is set aside."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import (
    BEST,
    ROOT,
    finish,
    in_child,
    logged,
    refused,
    results,
    run,
    same_weights,
    short_run,
    snapshot,
    steps,
    times,
    weights_of,
    write_jsonl,
)

# ── Verified ─────────────────────────────────────────────────────────────────────────────────────────────────────────


HARM = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
}


FILES = ["config.json", "manifest.json", "run.json", "model.safetensors", "optimizer.pt", "rng_state.pth",
         "scheduler.pt", "trainer_state.json"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_taken(name, harm, stopped):
    """B10: any file missing, empty, cut in half or with a flipped bit: a warning, nothing deleted, the same weights."""
    argv, output, whole = stopped
    files = {path.name for path in (output / "checkpoint-4").iterdir()}
    HARM[harm](output / "checkpoint-4" / name)
    done = finish(*argv)
    assert f"warning  {output}/checkpoint-4 is not used (" in done.out
    assert f"Going on from {output}/checkpoint-3, step 3 of 4." in done.out
    kept = {path.name for path in (output / "unused-checkpoint-4").iterdir()}
    assert kept == files - ({name} if harm == "missing" else set())
    assert in_child(same_weights, whole, output)


def test_a_checkpoint_of_another_program_is_set_aside(stopped):
    """B10: without a manifest nothing is trusted, also when it is the only one; chosen by hand it is refused."""
    argv, output, whole = stopped
    for path in output.glob("checkpoint-*/manifest.json"):
        path.unlink()
    chosen = run(*argv, "--resume_from_checkpoint", output / "checkpoint-4")
    assert chosen.status == 2 and "checkpoint-4 cannot be used" in chosen.err
    done = finish(*argv)
    assert done.out.count("is not used") == 4 and "Going on" not in done.out
    assert in_child(same_weights, whole, output) and len(list(output.glob("unused-checkpoint-*"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_the_best_checkpoint_is_verified_as_well(harm, best_published, tmp_path):
    """B10: with --load_best_model_at_end nothing is gone on from whose best checkpoint is damaged."""
    (argv, expected), output = best_published, tmp_path / "out"
    shutil.copytree(expected, output)
    for name in ("manifest.json", "model.safetensors"):
        (output / name).unlink()
    path = output / "checkpoint-2" / "model.safetensors"
    data = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = finish(*argv, "--output_dir", output)
    assert f"the best one, {output}/checkpoint-2, cannot be used" in done.out
    assert in_child(same_weights, expected, output)


def test_a_model_without_manifest_is_not_written_over(evaluated_flags, evaluated, tmp_path):
    """B10, B12: whoever made it."""
    output = tmp_path / "out"
    output.mkdir()
    shutil.copy(evaluated / "model.safetensors", output)
    done = run(*evaluated_flags, "--output_dir", output)
    assert done.status == 2 and "holds a model, which would be written over" in done.err
    assert (output / "model.safetensors").read_bytes() == (evaluated / "model.safetensors").read_bytes()


# ── Refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


SETTINGS = {  # flags → the words of the refusal
    "--learning_rate 2e-3": ("learning_rate is 0.002 instead of 0.001",),
    "--weight_decay 0.1": ("weight_decay is 0.1 instead of 0.01",),
    "--adam_beta1 0.8": ("adam_beta1 is 0.8 instead of 0.9",),
    "--per_device_train_batch_size 4": ("per_device_train_batch_size is 4 instead of 2",),
    "--gradient_accumulation_steps 2": ("gradient_accumulation_steps is 2 instead of 1",),
    "--max_seq_length 32": ("max_seq_length is 32 instead of 64",),
    "--seed 1": ("seed is 1 instead of 42",),
    "--max_steps 8": ("max_steps is 8 instead of 4", "--output_dir", "--model_name_or_path"),
    "--lr_scheduler_type cosine": ("lr_scheduler_type is 'cosine' instead of 'linear'",),
    "--bf16": ("bf16 is True instead of False",),
    "--add_eos": ("add_eos is True instead of False",),
    "--torch_compile True": ("torch_compile is {'backend': 'inductor', 'mode': None} instead of False",),
    "--max_train_samples 3": ("max_train_samples is 3 instead of None",),
}


@pytest.mark.parametrize("flags", SETTINGS)
def test_other_settings_are_refused_with_both_values(flags, stopped):
    """B10: in a stopped run and in a finished one; nothing is touched."""
    argv, output, whole = stopped
    for place in (output, whole):
        before = times(place)
        done = run(*argv, "--output_dir", place, *flags.split())
        assert done.status == 2 and "other settings" in done.err, done.err
        assert [words for words in SETTINGS[flags] if words not in done.err] == [], done.err
        assert times(place) == before


def test_what_chooses_the_best_model_is_one_of_the_settings(stopped, tmp_path):
    """B10, F24: the validation data and the moments of evaluation decide the weights once the best are loaded."""
    argv, _, _ = stopped
    text = write_jsonl(tmp_path / "validation.jsonl", ["The quick brown fox jumps over the lazy dog. " * 40])
    argv = [*argv, "--output_dir", tmp_path / "best", "--validation_file", text, "--eval_steps", 1,
            "--load_best_model_at_end", "--metric_for_best_model", "eval_loss"]  # fmt: skip
    finish(*argv)
    state = json.loads((tmp_path / "best" / "checkpoint-4" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "eval_loss" in row]
    assert state["best_global_step"] == min(rows, key=lambda row: row["eval_loss"])["step"]  # lower is better
    other = write_jsonl(tmp_path / "other.jsonl", ["Another text."])
    for more, words in {
        ("--max_eval_samples", 1): "max_eval_samples is 1 instead of None",
        ("--eval_steps", 2, "--save_steps", 2): "eval_steps is 2 instead of 1",
        ("--validation_file", other): "instead of ['validation.jsonl (",
    }.items():
        done = run(*argv, *more)
        assert done.status == 2 and words in done.err, done.err
    finish(*argv, "--logging_steps", 2)


def test_the_precision_of_the_launcher_counts_as_one_of_the_run(tiny, tmp_path, texts):
    """B14, B10: accelerate's --mixed_precision is in force without --bf16; a run goes on only with the same."""
    argv = short_run(tiny, texts, tmp_path / "out", "--max_steps", 1)
    assert "1 process, bf16 autocast" in finish(*argv, env={"ACCELERATE_MIXED_PRECISION": "bf16"}).out
    done = run(*argv)
    assert done.status == 2 and "autocast is 'no' instead of 'bf16'" in done.err, done.err


def test_another_config_of_the_same_weights_is_refused(stopped, tiny, tmp_path):
    """B10: a model directory whose config.json was edited in between is another model."""
    argv, _, _ = stopped
    shutil.copytree(tiny, tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 16}))
    done = run(*argv, "--model_name_or_path", tmp_path / "tiny")
    assert done.status == 2 and "settings: model is" in done.err and "train_data" not in done.err, done.err


def test_data_that_changed_since_is_refused_until_it_is_right_again(stopped):
    """B10: the tokens decide, not the file's name or size; no file is touched of a run that then goes on."""
    argv, output, whole = stopped
    path = Path(argv[argv.index("--train_file") + 1])
    text, before = path.read_text(), snapshot(output)
    changed = {text.replace("with", "wyth"): ["settings: train_data is"],  # as long as before
               text + "{\n": ["settings: train_file is ['train.jsonl", "--output_dir"]}  # fmt: skip
    try:
        for other, words in changed.items():
            path.write_text(other)
            refused(run(*argv), "other settings", *words)
    finally:
        path.write_text(text)
    assert snapshot(output) == before
    assert "Going on from" in finish(*argv).out and in_child(same_weights, whole, output)


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused(stopped):
    """B10: with host and process of the first; the lock of a dead one does not matter."""
    argv, output, _ = stopped
    code = "import sys, time, main; lock = main.lock_output_dir(sys.argv[1]); print('held', flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code, output], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    done = run(*argv)
    holder.kill(), holder.wait()
    assert done.status == 1 and f"is in use by process {holder.pid} on {os.uname().nodename}" in done.err
    finish(*argv)


def test_what_cannot_change_weights_may_change_and_takes_effect(stopped, tmp_path):
    """B10: other save and log steps, place, workers and limit; the weights stay the same."""
    argv, output, whole = stopped
    for number in (3, 4):
        shutil.rmtree(output / f"checkpoint-{number}")
    moved = tmp_path / "elsewhere"
    output.rename(moved)
    more = ["--output_dir", moved, "--save_steps", 2, "--save_total_limit", 2, "--logging_steps", 2,
            "--report_to", "none", "--dataloader_num_workers", 2]  # fmt: skip
    assert f"Going on from {moved}/checkpoint-2, step 2 of 4." in finish(*argv, *more).out
    assert steps(moved) == [2, 4]
    state = json.loads((moved / "checkpoint-4" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [1, 2, 4]
    assert in_child(same_weights, whole, moved)


# ── Going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--bf16"], ["--dataloader_num_workers", 2], ["--bf16", "--torch_compile", "True"]],
                         ids=["bf16", "workers", "compiled"])  # fmt: skip
def test_every_step_can_be_gone_on_from_bit_for_bit(four_steps, tmp_path, more):
    """B10: two epochs of three steps, two batches a step, the last batch partial."""
    argv = [*four_steps[0], "--max_steps", -1, "--num_train_epochs", 2, "--max_train_samples", 11, "--save_steps", 1,
            "--gradient_accumulation_steps", 2, "--save_total_limit", 9, *more]  # fmt: skip
    whole = tmp_path / "whole"
    finish(*argv, "--output_dir", whole)

    def go_on(step):
        chosen = whole / f"checkpoint-{step}"
        return finish(*argv, "--output_dir", tmp_path / str(step), "--resume_from_checkpoint", chosen)

    with ThreadPoolExecutor(2) as pool:
        for step, done in enumerate(pool.map(go_on, range(1, 6)), 1):
            assert f"step {step} of 6." in done.out and in_child(same_weights, whole, tmp_path / str(step)), step


def test_the_same_command_again_says_it_is_finished(finished):
    """B10: nothing is trained, nothing is written, exit status 0; the way to train further is named."""
    output, _, _, argv = finished
    before = times(output)
    done = finish(*argv)
    assert "This run finished at step" in done.out and "--model_name_or_path" in done.out
    assert times(output) == before


def test_a_missing_final_save_is_made_up(finished, tmp_path):
    """B12: stopped after the last checkpoint but before the final save, the same command writes the same model."""
    output, _, _, argv = finished
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    for name in ("train_results.json", "eval_results.json", "model.safetensors"):
        (copy / name).unlink()
    finish(*argv, "--output_dir", copy)
    assert in_child(same_weights, output, copy) and (copy / "train_results.json").exists()
    assert json.loads((copy / "config.json").read_text())["use_cache"] is True


def rounded_to_bfloat16(whole, output):
    """Whether a finished model is another one, rounded, and whether the other one has more digits."""
    import torch

    wide, narrow = weights_of(whole), weights_of(output)
    same = [torch.equal(wide[name].to(torch.bfloat16), narrow[name]) for name in wide]
    kept = [torch.equal(wide[name], narrow[name].float()) for name in wide]
    return wide.keys() == narrow.keys() and all(same), not all(kept)


def test_the_dtype_of_the_finished_model_is_free_until_it_is_there(stopped):
    """B10, L6: --save_dtype is no setting of the training; checkpoints hold all digits, whatever it was before."""
    argv, output, whole = stopped
    done = finish(*argv, "--save_dtype", "bfloat16")
    assert f"Going on from {output}/checkpoint-4, step 4 of 4." in done.out
    assert in_child(rounded_to_bfloat16, whole, output) == (True, True)
    assert in_child(same_weights, whole / "checkpoint-4", output / "checkpoint-4")


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_publishes_the_best_model(best_published, tmp_path):
    """B10, B12: also where the best is an old one; the metrics name the epoch."""
    (argv, expected), output = best_published, tmp_path / "out"
    shutil.copytree(expected, output)
    for name in ("manifest.json", "model.safetensors", "all_results.json"):
        (output / name).unlink()
    finish(*argv, "--output_dir", output)
    assert in_child(same_weights, expected, output)
    mine, other = results(output), results(expected)
    assert mine["epoch"] == other["epoch"] == 2 and mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_checkpoint_at_an_epochs_end_holds_its_evaluation(evaluated_flags, tmp_path):
    """B10: the schedule that waits for evaluations goes on as if there had been no stop."""
    plateau = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch", "--save_steps", 3,
               "--metric_for_best_model", "eval_loss",
               "--lr_scheduler_kwargs", '{"patience": 0, "threshold": 10, "factor": 0.1}']  # fmt: skip
    expected, output = tmp_path / "whole", tmp_path / "out"
    finish(*evaluated_flags, *plateau, "--output_dir", expected)
    rows = json.loads((expected / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in rows if "eval_loss" in row] == [6]
    finish(*evaluated_flags, *plateau, "--output_dir", output, "--resume_from_checkpoint", expected / "checkpoint-6")
    assert in_child(same_weights, expected, output)


# ── Chosen and kept ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chosen_checkpoint_is_left_behind_by_what_came_of_it(evaluated_flags, evaluated, tmp_path):
    """B10, F22: the same command again goes on from the newest checkpoint that it has made itself."""
    output = tmp_path / "out"
    argv = [*evaluated_flags, "--resume_from_checkpoint", evaluated / "checkpoint-4", "--output_dir", output]
    finish(*argv)
    for name in ("manifest.json", "model.safetensors", "checkpoint-12"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = finish(*argv)
    assert f"Going on from {output / 'checkpoint-10'}, step 10 of 12." in done.out
    assert in_child(same_weights, evaluated, output)
    assert "This run finished" in finish(*argv).out


def test_going_back_to_an_older_checkpoint(evaluated_flags, evaluated, tmp_path):
    """B10, F22: newer ones are set aside, not used, not deleted; refused for other settings, nothing is touched."""
    output = tmp_path / "out"
    shutil.copytree(evaluated, output)
    chosen = [*evaluated_flags, "--output_dir", output, "--resume_from_checkpoint", f"{output}/checkpoint-4/"]
    before = sorted(path.name for path in output.iterdir())
    done = run(*chosen, "--learning_rate", 1e-4)
    assert done.status == 2 and "learning_rate is 0.0001 instead of 0.001" in done.err
    assert sorted(path.name for path in output.iterdir()) == before
    done = finish(*chosen)
    assert f"Going on from {output / 'checkpoint-4'}, step 4 of 12." in done.out
    assert {f"unused-checkpoint-{step}" for step in (6, 8, 10, 12)} <= {path.name for path in output.iterdir()}
    assert in_child(same_weights, evaluated, output)
    assert "This run finished" in finish(*chosen).out


def test_old_checkpoints_go_and_the_newest_stay(finished):
    """B10, F20: save_total_limit newest are kept."""
    output, _, _, _ = finished
    kept = steps(output)
    assert len(kept) == 3 and kept[-1] == max(entry["step"] for entry in logged(output))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["out", "link"])
def test_the_chosen_checkpoint_and_its_best_one_outlive_the_limit(where, evaluated_flags, tmp_path):
    """B10, F20, F22: however --output_dir is written; the same command goes on from it as often as it is killed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    argv = [*evaluated_flags, *BEST, "--save_total_limit", 1, "--output_dir", where]
    finish(*argv, "--save_total_limit", 9, cwd=tmp_path)
    argv += ["--resume_from_checkpoint", f"{where}/checkpoint-4"]
    for _ in range(2):
        (tmp_path / "out" / "manifest.json").unlink()
        finish(*argv, cwd=tmp_path)
        assert steps(tmp_path / "out") == [2, 4, 12]


@pytest.mark.slow
def test_a_best_model_elsewhere_is_found_through_a_link(best_published, tmp_path):
    """B10, F22: --output_dir is a symbolic link, the best checkpoint lies beside the chosen one elsewhere."""
    (argv, expected), place = best_published, tmp_path / "data" / "deep" / "out"
    place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    argv = [*argv, "--resume_from_checkpoint", expected / "checkpoint-4", "--output_dir", tmp_path / "link"]
    finish(*argv)
    for name in ("manifest.json", "model.safetensors"):
        (place / name).unlink()
    done = finish(*argv)
    assert f"Going on from {tmp_path}/link/checkpoint-12, step 12 of 12." in done.out
    assert in_child(same_weights, expected, place)
