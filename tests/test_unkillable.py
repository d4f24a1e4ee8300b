"""Stopped at any instant, the same command ends with the weights of a run that was never stopped, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ACCELERATE, ROOT, SCRATCH, free_port, in_child, launch, run, same_weights, write_jsonl  # noqa: I001

KILLS = int(os.environ.get("KILLS", 520))  # at least so many by count, spread evenly over all changes
from helpers import KILL_TABLE as TABLE  # noqa: E402


class Server:
    """A process with the killing library in it, which runs main.py in forks."""

    def __init__(self, library, *before):
        command = [*before, sys.executable, str(ROOT / "tests" / "kill_server.py")]
        env = os.environ | {"LD_PRELOAD": str(library)}
        self.process = subprocess.Popen(command, env=env, stdin=-1, stdout=-1, stderr=-3, text=True)

    def start(self, argv, place, k=0, seconds=None, number=signal.SIGKILL, env=None, limit=0):
        job = {"argv": [str(word) for word in argv], "place": str(place), "k": k, "seconds": seconds, "signal": number,
               "env": env, "limit": limit}  # fmt: skip
        print(json.dumps(job), file=self.process.stdin, flush=True)

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def run(self, *job, **named):
        self.start(*job, **named)
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def servers():
    """Two servers, for two cores."""
    library = SCRATCH / "kill_at.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/kill_at.c", "-ldl"], check=True)
    both = [Server(library), Server(library)]
    yield both
    for server in both:
        server.close()


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory, servers):
    """A run that is not stopped: 4 steps, a checkpoint every 2, one kept. Returns: (argv, output_dir, changes)."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("plain")
    topics = pydoc_data.topics.topics
    text = write_jsonl(folder / "train.jsonl", [topics[name] for name in ("with", "while", "try")])
    argv = ["--model_name_or_path", tiny, "--train_file", text, "--max_seq_length", 64, "--no_truncation",
            "--cache_dir", folder / "cache", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
            "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 1, "--warmup_steps", 0,
            "--learning_rate", 1e-3, "--logging_steps", 1]  # fmt: skip
    output = folder / "out"
    done = servers[0].run([*argv, "--output_dir", output], output)
    assert done["status"] == 0, done["err"]
    return argv, output, done["changes"]


def survive(server, plain, output, kills):
    """Run with one kill after another, each (k, seconds), then to the end. Returns: (kills that hit, verdict)."""
    argv, expected, _ = plain
    argv = [*argv, "--output_dir", output]
    hit = 0
    for k, seconds in kills:
        done = server.run(argv, output, k, seconds)
        if done["status"] == 0:
            break
        if done["status"] != -9:
            print(done["out"], done["err"])
            return hit, "crashed"
        hit += 1
    done = server.run(argv, output)
    if done["status"] != 0:
        print(kills, done["out"], done["err"])
        return hit, "crashed"
    results = json.loads((output / "all_results.json").read_text())
    same = in_child(same_weights, expected, output) and results["train_loss"] > 0
    leftovers = [path for path in output.iterdir() if path.name.startswith((".staging", ".trash", "unused"))]
    if not same or leftovers:
        print(kills, same, leftovers, done["out"], done["err"])
    shutil.rmtree(output)
    return hit, "exact" if same and not leftovers else "wrong"


def try_all(name, servers, plain, folder, plans):
    """Share plans, each a list of kills, between the servers, and fill a row of the table. Returns: the row."""
    counts = {"kills": 0, "exact": 0, "crashed": 0, "wrong": 0}
    todo, lock = list(enumerate(plans)), threading.Lock()

    def work(server):
        while True:
            with lock:
                if not todo:
                    return
                number, plan = todo.pop()
            hit, verdict = survive(server, plain, Path(folder) / f"run{number}", plan)
            with lock:
                counts["kills"] += hit
                counts[verdict] += 1

    workers = [threading.Thread(target=work, args=[server]) for server in servers]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    TABLE[name] = tuple(counts.values())
    return counts


@pytest.mark.slow
def test_a_kill_at_any_change_of_a_file_costs_nothing(servers, plain, tmp_path):
    """B10: SIGKILL before the changes of saving, rotating, the final save and the logs, again and again."""
    changes = plain[2]
    generator = random.Random(0)
    each = max(1, -(-KILLS * 10 // 9 // changes))  # kills in a row, as later ones may come too late
    plans = [[(k, None), *((generator.randint(1, changes), None) for _ in range(each - 1))]
             for k in range(1, changes + 1)]  # fmt: skip
    counts = try_all("changes of files", servers, plain, tmp_path, plans)
    assert (counts["crashed"], counts["wrong"]) == (0, 0) and counts["kills"] >= min(KILLS, changes), counts


@pytest.mark.slow
def test_kills_at_random_moments_cost_nothing(servers, plain, tmp_path):
    """B10: ten runs, each killed at random times until it has come to its end."""
    generator = random.Random(1)
    plans = [[(0, generator.uniform(0.1, 0.7)) for _ in range(12)] for _ in range(10)]
    counts = try_all("random moments", servers, plain, tmp_path, plans)
    assert (counts["crashed"], counts["wrong"]) == (0, 0) and counts["kills"] >= 10, counts


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_with_its_status_and_costs_nothing(servers, plain, tmp_path):
    """B10: SIGTERM and SIGINT, at any time: 143 or 130, a sentence, no traceback."""
    argv, expected, _ = plain
    seen = set()
    for number in range(24):
        output = tmp_path / str(number)
        which = (signal.SIGTERM, signal.SIGINT)[number % 2]
        done = servers[0].run([*argv, "--output_dir", output], output, seconds=0.1 + number / 25, number=which)
        assert done["status"] in (0, 128 + which) and "Traceback" not in done["err"], done["err"]
        if done["status"]:
            sentence = done["err"].partition("main.py: error: ")[2].splitlines()[0]
            assert f"stopped by {which.name}" in sentence and "the same command again goes on" in sentence
            saved = re.search(r"at step (\d) of 4; saved (\S+);", sentence)
            assert not saved or (output / f"checkpoint-{saved[1]}/manifest.json").exists()
            seen.add(bool(saved))
        again = servers[0].run([*argv, "--output_dir", output], output)
        assert again["status"] == 0, again["err"]
        assert in_child(same_weights, expected, output)
    assert seen == {True, False}


@pytest.fixture(scope="module")
def stepwise(plain, servers, tmp_path_factory):
    """A run with a checkpoint at each of its 4 steps. Returns: (argv, output_dir)."""
    output = tmp_path_factory.mktemp("stepwise") / "out"
    argv = [*plain[0], "--save_steps", 1, "--save_total_limit", 9]
    assert servers[0].run([*argv, "--output_dir", output], output)["status"] == 0
    return argv, output


@pytest.fixture
def stopped(stepwise, tmp_path):
    """A copy of that run as a kill after its last checkpoint leaves it. Returns: (argv, output_dir, the whole run)."""
    argv, whole = stepwise
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "manifest.json").unlink()
    (output / "model.safetensors").unlink()
    return [*argv, "--output_dir", output], output, whole


HARM = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
}
FILES = "config.json manifest.json run.json model.safetensors optimizer.pt rng_state.pth scheduler.pt".split()
FILES += ["trainer_state.json"]


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_taken(name, harm, stopped):
    """B10: any file missing, empty, cut in half or with a flipped bit: a warning, nothing deleted, the same weights."""
    argv, output, whole = stopped
    files = {path.name for path in (output / "checkpoint-4").iterdir()}
    HARM[harm](output / "checkpoint-4" / name)
    done = run(*argv)
    assert done.status == 0, done.err
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
    done = run(*argv)
    assert done.status == 0 and done.out.count("is not used") == 4 and "Going on" not in done.out
    assert in_child(same_weights, whole, output) and len(list(output.glob("unused-checkpoint-*"))) == 4


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
    "--max_train_samples 3": ("max_train_samples is 3 instead of None",),
}


@pytest.mark.parametrize("flags", SETTINGS)
def test_other_settings_are_refused_with_both_values(flags, stopped):
    """B10: in a stopped run and in a finished one; nothing is touched."""
    argv, output, whole = stopped
    for place in (output, whole):
        before = {path: path.stat().st_mtime_ns for path in place.rglob("[!.]*") if path.is_file()}
        done = run(*argv, "--output_dir", place, *flags.split())
        assert done.status == 2 and "other settings" in done.err, done.err
        assert [words for words in SETTINGS[flags] if words not in done.err] == [], done.err
        assert {path: path.stat().st_mtime_ns for path in place.rglob("[!.]*") if path.is_file()} == before


def test_what_chooses_the_best_model_is_one_of_the_settings(stopped, tmp_path):
    """B10, F24: the validation data and the moments of evaluation decide the weights once the best are loaded."""
    argv, _, _ = stopped
    text = write_jsonl(tmp_path / "validation.jsonl", ["The quick brown fox jumps over the lazy dog. " * 40])
    argv = [*argv, "--output_dir", tmp_path / "best", "--validation_file", text, "--eval_steps", 1,
            "--load_best_model_at_end", "--metric_for_best_model", "eval_loss"]  # fmt: skip
    done = run(*argv)
    assert done.status == 0, done.err
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
    assert run(*argv, "--logging_steps", 2).status == 0


def test_another_config_of_the_same_weights_is_refused(stopped, tiny, tmp_path):
    """B10: a model directory whose config.json was edited in between is another model."""
    argv, _, _ = stopped
    shutil.copytree(tiny, tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 16}))
    done = run(*argv, "--model_name_or_path", tmp_path / "tiny")
    assert done.status == 2 and "settings: model is" in done.err and "train_data" not in done.err, done.err


def test_other_text_of_the_same_size_is_refused(stopped):
    """B10: the tokens decide, not the file's name or size."""
    argv, output, _ = stopped
    path = Path(argv[argv.index("--train_file") + 1])
    text = path.read_text()
    try:
        path.write_text(text.replace("with", "wyth"))
        done = run(*argv)
    finally:
        path.write_text(text)
    assert done.status == 2 and "settings: train_data is" in done.err, done.err


def test_what_cannot_change_weights_may_change_and_takes_effect(stopped, tmp_path):
    """B10: other save and log steps, place, workers and limit; the weights stay the same."""
    argv, output, whole = stopped
    for number in (3, 4):
        shutil.rmtree(output / f"checkpoint-{number}")
    moved = tmp_path / "elsewhere"
    output.rename(moved)
    more = ["--output_dir", moved, "--save_steps", 2, "--save_total_limit", 2, "--logging_steps", 2,
            "--report_to", "none", "--dataloader_num_workers", 2]  # fmt: skip
    done = run(*argv, *more)
    assert done.status == 0 and f"Going on from {moved}/checkpoint-2, step 2 of 4." in done.out, done.err
    assert sorted(path.name for path in moved.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    state = json.loads((moved / "checkpoint-4" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [1, 2, 4]
    assert in_child(same_weights, whole, moved)


def test_a_second_run_in_the_same_directory_is_refused(stopped):
    """B10: with host and process of the first; the lock of a dead one does not matter."""
    argv, output, _ = stopped
    code = "import sys, time, main; lock = main.lock_output_dir(sys.argv[1]); print('held', flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code, output], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    done = run(*argv)
    holder.kill(), holder.wait()
    assert done.status == 1 and f"is in use by process {holder.pid} on {os.uname().nodename}" in done.err
    assert run(*argv).status == 0


def events(folder):
    """{tag: [(step, value)]} of TensorBoard's event files, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


def test_the_logs_of_a_killed_run_join_up(stepwise, servers, plain, tmp_path):
    """B11: TensorBoard and trainer_state.json show each step once, and train_loss is that of all steps."""
    output = tmp_path / "out"
    argv = [*plain[0], "--save_steps", 3, "--output_dir", output]
    for seconds in (0.9, 0.95, 1.0, 1.05):  # some come after step 1 and before the checkpoint of step 3
        servers[0].run(argv, output, seconds=seconds)
    assert servers[0].run(argv, output)["status"] == 0
    expected = events(stepwise[1] / "runs")["train/loss"]
    assert events(output / "runs")["train/loss"] == expected and [step for step, _ in expected] == [1, 2, 3, 4]
    history = json.loads((output / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4]
    mine, whole = (json.loads((place / "train_results.json").read_text()) for place in (output, stepwise[1]))
    assert mine["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--bf16"], ["--dataloader_num_workers", 2]], ids=["bf16", "workers"])
def test_every_step_can_be_gone_on_from_bit_for_bit(plain, servers, tmp_path, more):
    """B10: two epochs of three steps, two batches a step, the last batch partial."""
    argv = [*plain[0], "--max_steps", -1, "--num_train_epochs", 2, "--max_train_samples", 11, "--save_steps", 1,
            "--gradient_accumulation_steps", 2, "--save_total_limit", 9, *more]  # fmt: skip
    whole = tmp_path / "whole"
    assert servers[0].run([*argv, "--output_dir", whole], whole)["status"] == 0
    for step in range(1, 6):
        output = tmp_path / str(step)
        done = run(*argv, "--output_dir", output, "--resume_from_checkpoint", whole / f"checkpoint-{step}")
        assert done.status == 0 and f"step {step} of 6." in done.out, done.err
        assert in_child(same_weights, whole, output), step


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_goes_on_when_there_is_space(plain, stepwise, tmp_path):
    """B10: a small tmpfs in a mount namespace of its own: status 1, space needed and free, then the same weights."""
    argv = [str(word) for word in [*stepwise[0], "--output_dir", tmp_path / "disk" / "out"]]
    (tmp_path / "disk").mkdir()
    script = """
        mount -t tmpfs -o size=3m none "$0"
        "$@" 2>"$0.err"; echo "status $?"; ls "$0"/out | grep checkpoint
        mount -o remount,size=100m "$0"
        "$@" || exit; cp -r "$0"/out "$0.out"
    """
    command = ["unshare", "--mount", "sh", "-c", script, tmp_path / "disk", sys.executable, ROOT / "main.py", *argv]
    done = launch(*command)
    assert done.status == 0, done.out + done.err
    error = (tmp_path / "disk.err").read_text()
    assert "status 1" in done.out and "cannot be written" in error and "GB are free" in error, error
    assert "checkpoint-1\n" in done.out and "Going on from" in done.out and "not used" not in done.out
    assert in_child(same_weights, stepwise[1], tmp_path / "disk.out")


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9 of a rank", "SIGTERM to the launcher"])
def test_two_ranks_go_on_together(plain, tmp_path, how):
    """B10, B13: whichever process is stopped, all stop, nobody stays behind, and the same command ends the same."""
    argv = [str(word) for word in [*plain[0], "--max_steps", 60, "--save_total_limit", 2, "--report_to", "none"]]

    def start(output):
        words = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
        words += [ROOT / "main.py", *argv, "--output_dir", output]
        return subprocess.Popen(words, stdout=-1, stderr=-1, text=True)

    whole = start(tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    output = tmp_path / "out"
    first = start(output)
    wait_for(output / "checkpoint-4", first)
    ranks = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    if how.startswith("kill"):
        os.kill(int(ranks[1]), signal.SIGKILL)
    else:
        first.send_signal(signal.SIGTERM)
    said = first.communicate()
    assert first.returncode != 0 and not any(Path("/proc", rank).exists() for rank in ranks)
    if how.startswith("SIGTERM"):
        assert "stopped by SIGTERM at step" in said[1], said[1]
    again = start(output)
    assert "Going on from" in again.communicate()[0] and again.returncode == 0
    assert in_child(same_weights, tmp_path / "whole", output)


@pytest.mark.slow
def test_a_launcher_of_one_process_takes_it_along(plain, tmp_path):
    """B10, B13: accelerate's launcher for one process does not pass SIGTERM on; the trainer notices its end."""
    output = tmp_path / "out"
    words = [ACCELERATE, "launch", "--num_processes", "1", ROOT / "main.py", *plain[0], "--max_steps", 300]
    words += ["--output_dir", output]
    process = subprocess.Popen([str(word) for word in words], stdout=-3, stderr=-1, text=True)
    wait_for(output / "checkpoint-2", process)
    trainer = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0]
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    for _ in range(600):
        if not Path("/proc", trainer).exists():
            break
        time.sleep(0.1)
    assert not Path("/proc", trainer).exists() and "stopped by the loss of a launcher at step" in said
