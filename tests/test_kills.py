"""Stopped at any instant, by whatever, the same command ends with the weights of a run that was never stopped.

Kills at every change of a file, at random moments and in evaluations; signals; full, read-only and lost disks; one of
two ranks; launchers. Bit for bit, with curves and logs that show each step once. A table at the end counts the kills.
"""

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorboard.backend.event_processing.event_accumulator  # noqa: F401  once, not in each fork
from helpers import (
    ACCELERATE,
    KILL_TABLE,
    ROOT,
    events,
    finish,
    free_port,
    in_child,
    last_wins,
    logged,
    need,
    results,
    same_weights,
    steps,
    two_processes,
    wait_for,
)

# ── SIGKILL ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def differences(expected, output, spare):
    """In what two finished runs differ: weights, curves, logs, and the names of all files but the spare ones."""
    names = [{path.name for path in place.iterdir()} for place in (expected, output)]
    curves = [events(place / "runs") for place in (expected, output)]
    losses = [results(place)["train_loss"] for place in (expected, output)]
    known = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity", "eval_bits_per_byte")
    logs = [[{key: row[key] for key in ("step", *known) if key in row} for row in logged(place)]
            for place in (expected, output)]  # fmt: skip
    tags = [{f"train/{key.removeprefix('eval_')}", key.replace("eval_", "eval/")} for key in known]
    points = [{tag: curve.get(tag) for some in tags for tag in some} for curve in curves]
    wrong = {
        "files": (names[0] ^ names[1]) - spare,
        "weights": not same_weights(expected, output),
        "curves": {tag: (value, points[1][tag]) for tag, value in points[0].items() if value != points[1][tag]},
        "log_history": logs[0] != logs[1] and logs,
        "train_loss": abs(losses[0] - losses[1]) > 1e-6 and losses,
    }
    return {name: value for name, value in wrong.items() if value}


class Tally:
    """Counts the trials of one row of the table."""

    def __init__(self, name):
        self.name, self.kills, self.verdicts = name, 0, {"exact": 0, "crashed": 0, "wrong": 0}
        self.lock = threading.Lock()

    def judge(self, what, kills, done, expected, output, spare=frozenset()):
        """Judge a run by its last call and its directory, and remove that. kills: how many it has survived."""
        verdict, fault = "crashed", done["status"]
        if fault == 0:
            fault = in_child(differences, expected, output, spare)
            verdict = "wrong" if fault else "exact"
        if fault:
            print(self.name, what, fault, done["out"][-3000:], done["err"][-3000:])
        shutil.rmtree(output, ignore_errors=True)
        with self.lock:
            self.kills += kills
            self.verdicts[verdict] += 1
            KILL_TABLE[self.name] = (self.kills, *self.verdicts.values())

    def clean(self):
        return self.verdicts["exact"] > 0 and self.verdicts["crashed"] == self.verdicts["wrong"] == 0


def share(servers, plans, work):
    """Call work(server, plan) for each plan, two at a time, one on each server. Returns: the results, in order."""
    todo, done, lock = list(enumerate(plans)), {}, threading.Lock()

    def serve(server):
        while True:
            with lock:
                if not todo:
                    return
                number, plan = todo.pop(0)
            done[number] = work(server, plan)

    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(serve, servers))
    return [done[number] for number in range(len(plans))]


def survive(name, servers, argv, expected, folder, plans, spare=frozenset()):
    """Run once for each plan, with one kill after another, each (k, seconds), then to the end. Returns: (Tally, hits).

    Each call goes on from the newest checkpoint that is there. hits: of each plan, how many of its kills came in time.
    """
    tally = Tally(name)

    def work(server, plan):
        number, kills = plan
        output, hits = folder / f"run{number}", 0
        call = [*argv, "--output_dir", output]
        for k, seconds in [*kills, (0, None)]:
            there = steps(output)
            done = server.run(call, output, k, seconds)
            if there and done["status"] == 0 and "This run finished" not in done["out"]:
                assert f"Going on from {output}/checkpoint-{there[-1]}, step" in done["out"], done["out"]
            if done["status"] != -9:
                break
            hits += 1
        tally.judge(kills, hits, done, expected, output, spare)
        return hits

    return tally, share(servers, list(enumerate(plans)), work)


@pytest.mark.slow
def test_a_kill_at_any_change_of_a_file_costs_nothing(kill_servers, four_steps, changes, tmp_path):
    """B10: SIGKILL before each change of saving, rotating, the final save and the logs; of some again at random."""
    generator = random.Random(0)
    plans = [[(k, None)] + [(generator.randint(1, changes), None)] * (k % 4 == 0) for k in range(1, changes + 1)]
    tally, hits = survive("changes of files", kill_servers, *four_steps, tmp_path, plans)
    assert tally.clean(), tally.verdicts
    assert all(hits[:-5]), hits  # a thread writes the curves: a run may make a few changes fewer


@pytest.mark.slow
def test_kills_at_random_moments_cost_nothing(kill_servers, four_steps, tmp_path):
    """B10: ten runs, each killed at random times until it has come to its end."""
    generator = random.Random(1)
    plans = [[(0, generator.uniform(0.1, 0.7)) for _ in range(12)] for _ in range(10)]
    tally, _ = survive("random moments", kill_servers, *four_steps, tmp_path, plans)
    assert tally.clean() and tally.kills >= 10, tally.verdicts


@pytest.mark.slow
def test_the_best_model_survives_kills(best_of_few, kill_servers, tmp_path):
    """B9, B10: evaluations, the best checkpoint beside the newest, and the same curves, after kills at any change."""
    argv, expected, changes = best_of_few
    generator = random.Random(2)
    spread = sorted({1 + number * changes // 40 for number in range(40)})
    plans = [[(k, None), (generator.randint(1, changes), None)] for k in spread]
    tally, _ = survive("best model", kill_servers, argv, expected, tmp_path, plans)
    assert tally.clean(), tally.verdicts


def on_two_ranks(servers, argv, place, kills=(0, 0)):
    """Run main.py on two ranks, with kills at (k of rank 0, k of rank 1). Returns: the answers of both."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank, server in enumerate(servers):
        mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        server.start([*argv, "--output_dir", place], place, kills[rank], env=mine)
    first = select.select([server.process.stdout for server in servers], [], [])[0][0]
    number = int(first is servers[1].process.stdout)
    done = {number: servers[number].answer()}
    other = servers[1 - number].process
    if done[number]["status"]:  # a launcher would end the other rank: first so, then so
        for last in (signal.SIGTERM, signal.SIGKILL):
            if not select.select([other.stdout], [], [], 0.3 if last == signal.SIGTERM else 1)[0]:
                subprocess.run(["pkill", f"-{last}", "-P", str(other.pid)], check=False)
    return [done[0], servers[1].answer()] if 0 in done else [servers[0].answer(), done[1]]


@pytest.mark.slow
def test_either_of_two_ranks_may_be_killed_at_any_change(kill_servers, four_steps, tmp_path):
    """B10, B13: the launcher ends the other one, and both go on to the same weights."""
    need("pkill")
    argv, expected = four_steps[0], tmp_path / "undisturbed"
    done = on_two_ranks(kill_servers, argv, expected)
    assert [answer["status"] for answer in done] == [0, 0], done
    changes = [answer["changes"] for answer in done]
    tally = Tally("one of two ranks")
    for rank, count in ((0, 12), (1, 4)):
        for number in range(count):
            k = 1 + number * changes[rank] // count
            output = tmp_path / f"{rank}-{k}"
            done = on_two_ranks(kill_servers, argv, output, (k, 0) if rank == 0 else (0, k))
            statuses = [answer["status"] for answer in done]
            done = on_two_ranks(kill_servers, argv, output)
            worst = max(done, key=lambda answer: abs(answer["status"]))
            tally.judge((rank, k, statuses), statuses[rank] == -9, worst, expected, output)
    assert tally.clean(), tally.verdicts


@pytest.mark.slow
def test_the_logs_of_a_killed_run_join_up(every_step_saved, kill_servers, four_steps, tmp_path):
    """B11: TensorBoard and trainer_state.json show each step once, and train_loss is that of all steps."""
    output, (_, whole) = tmp_path / "out", every_step_saved
    argv = [*four_steps[0], "--save_steps", 3, "--output_dir", output]
    for seconds in (0.9, 0.95, 1.0, 1.05):  # some come after step 1 and before the checkpoint of step 3
        kill_servers[0].run(argv, output, seconds=seconds)
    assert kill_servers[0].run(argv, output)["status"] == 0
    expected = events(whole / "runs")["train/loss"]
    assert events(output / "runs")["train/loss"] == expected and [step for step, _ in expected] == [1, 2, 3, 4]
    assert [row["step"] for row in logged(output) if "loss" in row] == [1, 2, 3, 4]
    assert results(output, "train")["train_loss"] == pytest.approx(results(whole, "train")["train_loss"], rel=1e-6)


# ── Signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_with_its_status_and_costs_nothing(kill_servers, four_steps, tmp_path):
    """B10: SIGTERM and SIGINT, at any time: 143 or 130, a sentence, no traceback."""
    argv, expected = [*four_steps[0], "--max_steps", 60, "--save_steps", 20], tmp_path / "whole"
    began = time.time()
    assert kill_servers[0].run([*argv, "--output_dir", expected], expected)["status"] == 0
    moment = (time.time() - began) / 24

    def work(server, number):
        output = tmp_path / str(number)
        which = (signal.SIGTERM, signal.SIGINT)[number % 2]
        done = server.run([*argv, "--output_dir", output], output, seconds=number * moment, number=which)
        assert done["status"] in (0, 128 + which) and "Traceback" not in done["err"], done["err"]
        saved = None
        if done["status"]:
            sentence = done["err"].partition("main.py: error: ")[2]
            assert f"stopped by {which.name}" in sentence and "the same command again goes on" in sentence
            saved = re.search(r"at step (\d+) of 60; saved (\S+);", sentence)
            assert not saved or (output / f"checkpoint-{saved[1]}/manifest.json").exists()
        again = server.run([*argv, "--output_dir", output], output)
        assert again["status"] == 0, again["err"]
        assert in_child(same_weights, expected, output)
        return "whole" if done["status"] == 0 else bool(saved)

    assert {True, False} <= set(share(kill_servers, range(24), work)) <= {True, False, "whole"}


@pytest.mark.slow
def test_no_data_loader_stays_behind(kill_servers, best_of_few, tmp_path):
    """B10: signals and kills while two processes load, in training and evaluations: no traceback, no orphan."""
    argv, expected = [*best_of_few[0], "--dataloader_num_workers", 2], tmp_path / "whole"
    began = time.time()
    whole = kill_servers[0].run([*argv, "--output_dir", expected], expected)
    assert whole["status"] == 0 and whole["orphans"] == [], whole
    moment = (time.time() - began) / 30

    def work(server, number):
        output = tmp_path / str(number)
        which = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[number % 3]
        call = [*argv, "--output_dir", output]
        done = server.run(call, output, seconds=number * moment, number=which)
        assert done["status"] in ((0, -which) if which == signal.SIGKILL else (0, 128 + which)), (number, done)
        assert "Traceback" not in done["err"], (number, done)
        assert (done["status"] > 0) == ("main.py: error: stopped by" in done["err"]), (number, done)
        assert done["orphans"] == [], (number, done)
        again = server.run(call, output)
        assert again["status"] == 0, again["err"]
        assert in_child(same_weights, expected, output)

    share(kill_servers, range(30), work)


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_fork_is_not_lost(kill_servers, best_of_few, tmp_path):
    """B10: a data loader is just made, for the training or the evaluation behind it: the sentence, nobody is left."""
    argv = [*best_of_few[0], "--eval_steps", 100, "--save_steps", 100, "--dataloader_num_workers", 2]

    def work(server, number):
        output = tmp_path / str(number)
        done = server.run([*argv, "--output_dir", output], output, number=signal.SIGTERM, fork=number)
        assert done["status"] == 128 + signal.SIGTERM and "Traceback" not in done["err"], (number, done)
        assert done["orphans"] == [], (number, done)
        return re.search(r"stopped by SIGTERM( at step \d of 4)?", done["err"])[1]

    assert share(kill_servers, range(1, 5), work) == [" at step 1 of 4", " at step 1 of 4", None, None]


AT_THE_END = """
import atexit, os, runpy, signal, sys
atexit.register(lambda: print("the last word", flush=True))
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_signal_while_python_ends_kills_it_and_says_nothing(four_steps, tmp_path):
    """B10: a second Ctrl-C, or a launcher's SIGTERM, behind the last line: no traceback, no other signal's status."""
    words = [sys.executable, "-c", AT_THE_END, ROOT / "main.py", *four_steps[0], "--output_dir", tmp_path / "out"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM and "Done: the model is in" in done.stdout.splitlines()[-1], done
    assert "Traceback" not in done.stderr and "main.py: error" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_data_loaders_at_work(number, four_steps, tmp_path):
    """B10: as from a batch system or a terminal: a checkpoint, the status, nobody left behind, no long wait."""
    need("pgrep")
    output = tmp_path / "out"
    words = [sys.executable, ROOT / "main.py", *four_steps[0], "--max_steps", 400, "--dataloader_num_workers", 2]
    words = last_wins([*words, "--output_dir", output])
    process = subprocess.Popen(words, stdout=-3, stderr=-1, text=True, start_new_session=True)
    wait_for(output / "checkpoint-4", process)
    start = time.time()
    os.killpg(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode == 128 + number and "Traceback" not in said, said
    assert time.time() - start < 5 and subprocess.run(["pgrep", "-g", str(process.pid)], check=False).returncode == 1
    assert (output / re.search(r"saved \S+/(checkpoint-\d+);", said)[1] / "manifest.json").exists(), said


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--dataloader_persistent_workers True", "--learning_rate 1e30"])
def test_a_run_with_data_loaders_ends_with_them(flags, four_steps, tmp_path):
    """B10: well or with an error, on its own: nobody is left, and nothing waits."""
    words = [sys.executable, ROOT / "main.py", *four_steps[0], "--max_steps", 6, "--dataloader_num_workers", 2]
    words = last_wins([*words, *flags.split(), "--output_dir", tmp_path / "out"])
    done = subprocess.run(words, capture_output=True, text=True, start_new_session=True, timeout=60, check=False)
    assert done.returncode == ("rate" in flags), done.stderr
    assert "Traceback" not in done.stderr and ("rate" not in flags or "no finite numbers" in done.stderr)


@pytest.mark.slow
def test_the_time_of_all_calls_is_reported(kill_servers, four_steps, tmp_path):
    """B12: train_runtime, steps and samples a second cover the whole run."""
    need("pkill")
    output = tmp_path / "out"
    argv = [*four_steps[0], "--output_dir", output, "--max_steps", 300, "--save_steps", 5]
    server, earlier = kill_servers[0], 0
    for step in (5, 60, 120):
        server.start(argv, output)
        while not any(number >= step for number in steps(output)):
            assert not select.select([server.process.stdout], [], [], 0.01)[0], server.answer()
        subprocess.run(["pkill", "-TERM", "-P", str(server.process.pid)], check=True)
        assert server.answer()["status"] == 128 + signal.SIGTERM
        before, earlier = earlier, logged(output)[-1]["seconds"]
        assert earlier > before
    assert server.run(argv, output)["status"] == 0
    speed = results(output, "train")
    assert speed["train_runtime"] > earlier
    assert speed["train_steps_per_second"] * speed["train_runtime"] == pytest.approx(300, rel=0.05)


# ── In an evaluation ─────────────────────────────────────────────────────────────────────────────────────────────────


def evaluations(output):
    return events(output / "runs").get("eval/loss", [])


def history(output):
    rows = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]


class Call:
    """The same command once more, as a process of its own that writes into a log."""

    def __init__(self, argv, output):
        self.output, self.log = output, output.parent / f"{output.name}.log"
        words = last_wins([sys.executable, ROOT / "main.py", *argv, "--output_dir", output])
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
def test_a_signal_in_an_evaluation_waits_for_its_end(long_evaluations, tmp_path):
    """B9, B10: 143 behind the next step, or the last; the evaluation is whole, and once in log and curve."""
    argv, expected = long_evaluations
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
def test_a_second_signal_in_an_evaluation_ends_it_at_once(long_evaluations, tmp_path):
    """B10: 3 seconds after the first one, which the evaluation has not let through; nothing is lost but its time."""
    argv, expected = long_evaluations
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
def test_a_signal_in_the_evaluation_before_the_first_step(long_evaluations, tmp_path):
    """B9, B10, F24: --eval_on_start is whole and made once; the run ends behind its first step and goes on from it."""
    argv, expected = long_evaluations
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


@pytest.mark.slow
def test_a_kill_in_an_evaluation_shows_it_once(long_evaluations, tmp_path):
    """B10, B11: kill -9 in it, SIGTERM when the next call makes it again, kill -9 behind that: each point once."""
    argv, expected = long_evaluations
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


# ── Disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_point_costs_nothing(four_steps, disk, tmp_path):
    """B10: disks of many sizes: status 1, one sentence; what was saved is whole; with space, the same weights."""
    argv, expected = four_steps
    output = disk.folder / "out"
    argv = [*argv, "--output_dir", output]
    short = [*argv[:-1], tmp_path / "short", "--max_steps", 2]  # one checkpoint: the final save may be what fills it
    assert disk.server.run(short, tmp_path / "short")["status"] == 0
    plans = [(argv, expected, size) for size in range(20, 2500, 400)]
    plans += [([*argv, "--max_steps", 2], tmp_path / "short", size) for size in range(1350, 1900, 90)]
    tally, faults, full, went_on = Tally("full disks"), [], set(), 0
    for call, reference, size in plans:
        disk.resize(f"size={size}k")
        first = disk.server.run(call, output)
        saved = re.findall(r"^checkpoint-(\d+)$", disk.call("ls", output), re.M)
        if first["status"]:
            sentence = first["err"].rpartition("main.py: error: ")[2]
            words = "GB are free" if "cannot be written" in sentence else "space"
            if first["status"] != 1 or "Traceback" in first["err"] or words not in sentence:
                faults.append((size, first["status"], first["err"][-1500:]))
            last = "2" if reference != expected else "4"
            full.add("cannot be written" in sentence and ("final" if last in saved else "checkpoint"))
        disk.resize("size=100m")
        done = disk.server.run(call, output)
        if first["status"] and saved:
            assert f"Going on from {output}/checkpoint-{max(saved)}, step" in done["out"], done["out"]
            went_on += 1
        assert "not used" not in done["out"], done["out"]
        copy = tmp_path / "copy"
        disk.call("cp", "-r", output, copy)
        disk.call("rm", "-rf", output)
        tally.judge(size, first["status"] != 0, done, reference, copy)
    assert faults == [] and tally.clean() and full == {"checkpoint", "final"}, (faults, tally.verdicts, full)
    assert went_on


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["read-only", "gone"])
def test_a_disk_that_becomes_read_only_or_loses_the_run(fault, four_steps, disk, tmp_path):
    """B10: during training: status 1 and a sentence; put right, the same command ends the same."""
    argv = [*four_steps[0], "--max_steps", 40]
    expected, output = tmp_path / "whole", disk.folder / "out"
    assert disk.server.run([*argv, "--output_dir", expected], expected)["status"] == 0
    argv += ["--output_dir", output]
    disk.server.start(argv, output)
    inside = Path("/proc", str(disk.server.process.pid), "root", *output.parts[1:])
    while not (inside / "checkpoint-4").exists():
        time.sleep(0.01)
    if fault == "gone":
        disk.call("mv", output, disk.folder / "elsewhere")
    else:
        disk.call("mount", "--bind", output, output)
        disk.call("mount", "-o", "remount,bind,ro", output)
    done = disk.server.answer()
    assert done["status"] == 1 and "main.py: error: " in done["err"].rstrip().splitlines()[-1], done["err"]
    if fault == "gone":
        disk.call("rm", "-rf", output)
        disk.call("mv", disk.folder / "elsewhere", output)
    else:
        disk.call("umount", output)
    again = disk.server.run(argv, output)
    assert again["status"] == 0, again["err"]
    disk.call("cp", "-r", output, tmp_path / "copy")
    assert in_child(same_weights, expected, tmp_path / "copy")


# ── Launchers ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_ctrl_c_reaches_launcher_and_ranks_at_once(four_steps, tmp_path):
    """B10, B13: a terminal sends SIGINT to the whole group, the launcher then SIGTERM: one checkpoint, no orphan."""
    need("pgrep")
    output = tmp_path / "out"
    words = [*two_processes(), *four_steps[0], "--max_steps", 400, "--report_to", "none", "--output_dir", output]
    process = subprocess.Popen(last_wins(words), stdout=-3, stderr=-1, text=True, start_new_session=True)
    wait_for(output / "checkpoint-4", process)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode != 0 and not any(Path("/proc", rank).exists() for rank in ranks)
    assert "stopped by SIG" in said and "the same command again goes on" in said, said
    assert f"saved {output}/checkpoint-{steps(output)[-1]};" in said, said


@pytest.mark.slow
def test_two_ranks_go_on_together(four_steps, tmp_path):
    """B10, B13: whichever process is stopped, all stop, nobody stays behind, and the same command ends the same."""
    need("pgrep")
    argv = [*four_steps[0], "--max_steps", 60, "--save_total_limit", 2, "--report_to", "none"]

    def start(output):
        words = last_wins([*two_processes(), *argv, "--output_dir", output])
        return subprocess.Popen(words, stdout=-1, stderr=-1, text=True)

    whole = start(tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    for how in ("kill -9 of a rank", "SIGTERM to the launcher"):
        output = tmp_path / how
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
def test_a_launcher_of_one_process_takes_it_along(four_steps, tmp_path):
    """B10, B13: accelerate's launcher for one process does not pass SIGTERM on; the trainer notices its end."""
    need("pgrep")
    output = tmp_path / "out"
    words = [ACCELERATE, "launch", "--num_processes", "1", ROOT / "main.py", *four_steps[0], "--max_steps", 300]
    words += ["--output_dir", output]
    process = subprocess.Popen(last_wins(words), stdout=-3, stderr=-1, text=True)
    wait_for(output / "checkpoint-2", process)
    trainer = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0]
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    for _ in range(600):
        if not Path("/proc", trainer).exists():
            break
        time.sleep(0.1)
    assert not Path("/proc", trainer).exists() and "stopped by the loss of a launcher at step" in said
