"""Going on where it is not obvious from where: evaluations, best models, chosen checkpoints, other people's files."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ACCELERATE, ROOT, events, free_port, in_child, launch, run, same_weights, write_jsonl  # noqa: I001


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory):
    """12 steps, 6 an epoch, evaluated and saved every 2; the best model is published."""
    import pydoc_data.topics

    folder, topics = tmp_path_factory.mktemp("resume"), pydoc_data.topics.topics
    train = write_jsonl(folder / "train.jsonl", [topics[name] for name in ("with", "while", "try")])
    validation = write_jsonl(folder / "validation.jsonl", [topics[name] for name in ("if", "for")])
    return ["--model_name_or_path", tiny, "--train_file", train, "--validation_file", validation,
            "--max_seq_length", 64, "--no_truncation", "--cache_dir", folder / "cache", "--max_train_samples", 12,
            "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--num_train_epochs", 2,
            "--per_device_eval_batch_size", 1, "--eval_steps", 2, "--save_steps", 2, "--save_total_limit", 9,
            "--warmup_steps", 0, "--learning_rate", 1e-3, "--logging_steps", 2]  # fmt: skip


BEST = ["--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--greater_is_better", True]  # the first


def finish(*argv):
    done = run(*argv)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The output directory of a run that nothing has disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    finish(*flags, "--output_dir", output)
    return output


def evaluations(output):
    return events(output / "runs").get("eval/loss", [])


def history(output, step=None):
    folder = output / f"checkpoint-{step}" if step else output
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]


@pytest.fixture(scope="module")
def long(flags, tmp_path_factory):
    """The same with evaluations of a second or so, at steps 6 and 12. Returns: (argv, output_dir of a whole run)."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("long")
    text = write_jsonl(folder / "long.jsonl", [pydoc_data.topics.topics[name] for name in ("if", "for", "class") * 9])
    argv = [*flags, "--validation_file", text, "--eval_steps", 6]
    finish(*argv, "--output_dir", folder / "out")
    return argv, folder / "out"


class Call:
    """The same command once more, as a process of its own that writes into a log."""

    def __init__(self, argv, output):
        self.output, self.log = output, output.parent / f"{output.name}.log"
        words = [str(word) for word in [sys.executable, ROOT / "main.py", *argv, "--output_dir", output]]
        self.process = subprocess.Popen(words, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def wait_for(self, seen):
        """Wait until seen(events so far, text of the log) is true."""
        while not seen(events(self.output / "runs") if (self.output / "runs").exists() else {}, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def wait_for_evaluation(self, step):
        """Wait until it evaluates behind a step: the line of the step is there, the value is not."""
        self.wait_for(lambda seen, _: step in dict(seen.get("train/loss", [])))
        assert step not in dict(events(self.output / "runs").get("eval/loss", []))

    def ended(self):
        """Wait for its end. Returns: (status, its one sentence)."""
        status, said = self.process.wait(), self.log.read_text()
        assert "Traceback" not in said and said.count("main.py: error: ") == 1, said
        return status, said.partition("main.py: error: ")[2]


@pytest.mark.slow
def test_a_signal_in_an_evaluation_waits_for_its_end(long, tmp_path):
    """B9, B10: 143 behind the next step, or the last; the evaluation is whole, and once in log and curve."""
    argv, expected = long
    output = tmp_path / "out"
    for step, words in ((6, f"at step 7 of 12; saved {output}/checkpoint-7;"), (12, "SIGTERM after the last step;")):
        call = Call(argv, output)
        call.wait_for_evaluation(step)
        call.process.send_signal(signal.SIGTERM)
        status, sentence = call.ended()
        assert status == 143 and words in sentence and "the same command again goes on" in sentence, sentence
        assert "Stopping: a checkpoint is saved" in call.log.read_text() and not (output / "manifest.json").exists()
        assert evaluations(output) == [point for point in evaluations(expected) if point[0] <= step]
    finish(*argv, "--output_dir", output)
    assert in_child(same_weights, expected, output)
    assert evaluations(output) == evaluations(expected) and history(output) == history(expected)


@pytest.mark.slow
def test_a_second_signal_in_an_evaluation_ends_it_at_once(long, tmp_path):
    """B10: 3 seconds after the first one, which the evaluation has not let through; nothing is lost but its time."""
    argv, expected = long
    output = tmp_path / "out"
    call = Call(argv, output)
    call.wait_for_evaluation(6)
    call.process.send_signal(signal.SIGTERM)
    call.wait_for(lambda _, said: "Stopping: a checkpoint is saved" in said)
    call.process.send_signal(signal.SIGSTOP)  # three seconds pass, the evaluation does not
    time.sleep(3.2)
    call.process.send_signal(signal.SIGTERM)
    call.process.send_signal(signal.SIGCONT)
    status, sentence = call.ended()
    assert status == 143 and sentence.startswith("stopped by SIGTERM; the same command again goes on"), sentence
    assert not (output / "checkpoint-6").exists() and evaluations(output) == []
    finish(*argv, "--output_dir", output)
    assert in_child(same_weights, expected, output)
    assert evaluations(output) == evaluations(expected) and history(output) == history(expected)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_the_best_checkpoint_is_verified_as_well(harm, flags, tmp_path):
    """B10: with --load_best_model_at_end nothing is gone on from whose best checkpoint is damaged."""
    expected, output = tmp_path / "whole", tmp_path / "out"
    finish(*flags, *BEST, "--output_dir", expected)
    shutil.copytree(expected, output)
    for name in ("manifest.json", "model.safetensors"):
        (output / name).unlink()
    path = output / "checkpoint-2" / "model.safetensors"
    data = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = finish(*flags, *BEST, "--output_dir", output)
    assert f"the best one, {output}/checkpoint-2, cannot be used" in done.out
    assert in_child(same_weights, expected, output)


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_publishes_the_best_model(flags, tmp_path):
    """B10, B12: also where the best is an old one; the metrics name the epoch."""
    expected, output = tmp_path / "whole", tmp_path / "out"
    finish(*flags, *BEST, "--output_dir", expected)
    shutil.copytree(expected, output)
    for name in ("manifest.json", "model.safetensors", "all_results.json"):
        (output / name).unlink()
    finish(*flags, *BEST, "--output_dir", output)
    assert in_child(same_weights, expected, output)
    mine, other = (json.loads((place / "all_results.json").read_text()) for place in (output, expected))
    assert mine["epoch"] == other["epoch"] == 2 and mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_checkpoint_at_an_epochs_end_holds_its_evaluation(flags, tmp_path):
    """B10: the schedule that waits for evaluations goes on as if there had been no stop."""
    plateau = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch", "--save_steps", 3,
               "--metric_for_best_model", "eval_loss",
               "--lr_scheduler_kwargs", '{"patience": 0, "threshold": 10, "factor": 0.1}']  # fmt: skip
    expected, output = tmp_path / "whole", tmp_path / "out"
    finish(*flags, *plateau, "--output_dir", expected)
    assert [step for step, _ in history(expected, 6)] == [6]
    finish(*flags, *plateau, "--output_dir", output, "--resume_from_checkpoint", expected / "checkpoint-6")
    assert in_child(same_weights, expected, output)


def test_a_chosen_checkpoint_is_left_behind_by_what_came_of_it(flags, whole, tmp_path):
    """B10, F22: the same command again goes on from the newest checkpoint that it has made itself."""
    output = tmp_path / "out"
    argv = [*flags, "--resume_from_checkpoint", whole / "checkpoint-4", "--output_dir", output]
    finish(*argv)
    for name in ("manifest.json", "model.safetensors", "checkpoint-12"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = finish(*argv)
    assert f"Going on from {output / 'checkpoint-10'}, step 10 of 12." in done.out
    assert in_child(same_weights, whole, output)
    assert "This run finished" in finish(*argv).out


def test_a_model_without_manifest_is_not_written_over(flags, whole, tmp_path):
    """B10, B12: whoever made it."""
    output = tmp_path / "out"
    output.mkdir()
    shutil.copy(whole / "model.safetensors", output)
    done = run(*flags, "--output_dir", output)
    assert done.status == 2 and "holds a model, which would be written over" in done.err
    assert (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_signal_in_the_evaluation_before_the_first_step(long, tmp_path):
    """B9, B10, F24: --eval_on_start is whole and made once; the run ends behind its first step and goes on from it."""
    argv, expected = long
    output = tmp_path / "out"
    argv = [*argv, "--eval_on_start"]
    call = Call(argv, output)
    call.wait_for(lambda _, said: "0/12 [" in said and said.count("it/s]") > 1)  # a second bar moves: evaluation
    call.process.send_signal(signal.SIGTERM)
    status, sentence = call.ended()
    assert status == 143 and f"at step 1 of 12; saved {output}/checkpoint-1;" in sentence, sentence
    assert [step for step, _ in evaluations(output)] == [0]
    finish(*argv, "--output_dir", output)
    assert in_child(same_weights, expected, output)
    assert [step for step, _ in evaluations(output)] == [0, 6, 12] and evaluations(output)[1:] == evaluations(expected)


def test_going_back_to_an_older_checkpoint(flags, whole, tmp_path):
    """B10, F22: newer ones are set aside, not used and not deleted; refused for other settings, nothing is touched."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    chosen = ["--output_dir", output, "--resume_from_checkpoint", output / "checkpoint-4"]
    before = sorted(path.name for path in output.iterdir())
    done = run(*flags, *chosen, "--learning_rate", 1e-4)
    assert done.status == 2 and "learning_rate is 0.0001 instead of 0.001" in done.err
    assert sorted(path.name for path in output.iterdir()) == before
    done = finish(*flags, *chosen)
    assert f"Going on from {output / 'checkpoint-4'}, step 4 of 12." in done.out
    assert {f"unused-checkpoint-{step}" for step in (6, 8, 10, 12)} <= {path.name for path in output.iterdir()}
    assert in_child(same_weights, whole, output)
    assert "This run finished" in finish(*flags, *chosen).out


@pytest.mark.slow
def test_a_kill_in_an_evaluation_shows_it_once(long, tmp_path):
    """B10, B11: kill -9 in it, SIGTERM when the next call makes it again, kill -9 behind that: each point once."""
    argv, expected = long
    output = tmp_path / "out"
    for step, number in ((6, signal.SIGKILL), (6, signal.SIGTERM), (12, signal.SIGKILL)):
        call = Call(argv, output)
        call.wait_for_evaluation(step)
        call.process.send_signal(number)
        call.process.wait()
    finish(*argv, "--output_dir", output)
    assert evaluations(output) == evaluations(expected) and history(output) == history(expected)
    assert events(output / "runs")["train/loss"] == events(expected / "runs")["train/loss"]
    assert in_child(same_weights, expected, output)


@pytest.mark.parametrize("where", ["out", "link"])
def test_the_chosen_checkpoint_and_its_best_one_outlive_the_limit(where, flags, tmp_path):
    """B10, F20, F22: however --output_dir is written; the same command goes on from it as often as it is killed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    argv = [*flags, *BEST, "--save_total_limit", 1, "--output_dir", where]
    done = run(*argv, "--save_total_limit", 9, cwd=tmp_path)
    assert done.status == 0, done.err
    argv += ["--resume_from_checkpoint", f"{where}/checkpoint-4"]
    for _ in range(2):
        (tmp_path / "out" / "manifest.json").unlink()
        done = run(*argv, cwd=tmp_path)
        assert done.status == 0, done.err
        kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
        assert kept == {"checkpoint-2", "checkpoint-4", "checkpoint-12"}, kept


@pytest.mark.slow
def test_two_processes_measure_the_best_model(flags, tmp_path):
    """B9, B13: with --load_best_model_at_end all ranks load it, and the metrics are those of the published model."""
    output = tmp_path / "out"
    start = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", free_port()]
    done = launch(*start, ROOT / "main.py", *flags, *BEST, "--logging_steps", 5, "--output_dir", output)
    assert done.status == 0 and "Could not locate" not in done.err, done.err
    results = json.loads((output / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(dict(history(output))[2], rel=1e-6)
    for name in ("manifest.json", "model.safetensors"):
        (output / name).unlink()
    start[-1] = free_port()
    done = launch(*start, ROOT / "main.py", *flags, *BEST, "--logging_steps", 5, "--output_dir", output)
    again = json.loads((output / "all_results.json").read_text())
    assert done.status == 0, done.err
    for name in ("eval_loss", "train_loss"):
        assert again[name] == pytest.approx(results[name], rel=1e-6)


def test_the_last_part_of_an_epoch_is_logged_as_well(flags, tmp_path):
    """F17, F24: --logging_strategy epoch, one and a third of it."""
    finish(*flags, "--logging_strategy", "epoch", "--max_steps", 8, "--output_dir", tmp_path / "out")
    steps = [step for step, _ in events(tmp_path / "out" / "runs")["train/loss"]]
    assert steps == [2, 4, 6, 8]  # a checkpoint every 2 steps, each with its line


@pytest.mark.slow
def test_a_best_model_elsewhere_is_found_through_a_link(flags, tmp_path):
    """B10, F22: --output_dir is a symbolic link, the best checkpoint lies beside the chosen one elsewhere."""
    expected, place = tmp_path / "whole", tmp_path / "data" / "deep" / "out"
    finish(*flags, *BEST, "--output_dir", expected)
    place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    argv = [*flags, *BEST, "--resume_from_checkpoint", expected / "checkpoint-4", "--output_dir", tmp_path / "link"]
    finish(*argv)
    for name in ("manifest.json", "model.safetensors"):
        (place / name).unlink()
    done = finish(*argv)
    assert f"Going on from {tmp_path}/link/checkpoint-12, step 12 of 12." in done.out
    assert in_child(same_weights, expected, place)
