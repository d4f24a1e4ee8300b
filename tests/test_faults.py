"""Faults beyond a kill of one process: ranks, full and read-only disks, signals among helper processes."""

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ACCELERATE, ROOT, SCRATCH, free_port, in_child, same_weights, write_jsonl  # noqa: I001
from test_unkillable import TABLE, Server, events, plain, servers, wait_for  # noqa: F401  two of them are fixtures


def whole(expected, output):
    """Whether two finished runs are the same: weights, curves, logs, and the names of all files."""
    names = [{path.name for path in place.iterdir()} for place in (expected, output)]
    curves = [events(place / "runs") for place in (expected, output)]
    losses = [json.loads((place / "all_results.json").read_text())["train_loss"] for place in (expected, output)]
    known = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity")
    logs = [[{key: row[key] for key in ("step", *known) if key in row} for row in history(place)]
            for place in (expected, output)]  # fmt: skip
    tags = [{f"train/{key.removeprefix('eval_')}", key.replace("eval_", "eval/")} for key in known]
    points = [{tag: curve.get(tag) for some in tags for tag in some} for curve in curves]
    wrong = {
        "files": names[0] ^ names[1],
        "weights": not same_weights(expected, output),
        "curves": {tag: (value, points[1][tag]) for tag, value in points[0].items() if value != points[1][tag]},
        "log_history": logs[0] != logs[1] and logs,
        "train_loss": abs(losses[0] - losses[1]) > 1e-6 and losses,
    }
    return {name: value for name, value in wrong.items() if value}


def history(output):
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


class Tally:
    """Counts the trials of one row of the table."""

    def __init__(self, name):
        self.name, self.kills, self.verdicts = name, 0, {"exact": 0, "crashed": 0, "wrong": 0}

    def judge(self, what, done, expected, output):
        """Judge a run by its last call and its directory, and remove that."""
        verdict, fault = "crashed", done["status"]
        if fault == 0:
            fault = in_child(whole, expected, output)
            verdict = "wrong" if fault else "exact"
        if fault:
            print(self.name, what, fault, done["out"][-3000:], done["err"][-3000:])
        shutil.rmtree(output, ignore_errors=True)
        self.verdicts[verdict] += 1
        TABLE[self.name] = (self.kills, *self.verdicts.values())

    def clean(self):
        return self.verdicts["exact"] > 0 and self.verdicts["crashed"] == self.verdicts["wrong"] == 0


@pytest.fixture(scope="module")
def best(plain, servers, tmp_path_factory):  # noqa: F811
    """An undisturbed run with evaluations, best model and one checkpoint kept. Returns: (argv, output_dir, changes)."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("best")
    text = write_jsonl(folder / "validation.jsonl", [pydoc_data.topics.topics["if"]])
    argv = [*plain[0], "--validation_file", text, "--eval_steps", 2, "--load_best_model_at_end", "--max_eval_samples",
            2, "--metric_for_best_model", "eval_loss", "--greater_is_better", True]  # fmt: skip  the first is "best"
    output = folder / "out"
    done = servers[0].run([*argv, "--output_dir", output], output)
    assert done["status"] == 0, done["err"]
    kept = sorted(path.name for path in output.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"] and history(output)
    return argv, output, done["changes"]


@pytest.mark.slow
def test_the_best_model_survives_kills(best, servers, tmp_path):  # noqa: F811
    """B9, B10: evaluations, the best checkpoint beside the newest, and the same curves, after kills at any change."""
    argv, expected, changes = best
    tally, generator = Tally("best model"), random.Random(2)
    spread = sorted({1 + number * changes // 40 for number in range(40)})
    for pair in zip(spread[::2], spread[1::2], strict=True):
        places = [tmp_path / str(k) for k in pair]
        calls = [[*argv, "--output_dir", place] for place in places]
        for kills in (pair, [generator.randint(1, changes) for _ in pair], (0, 0)):
            for server, call, place, k in zip(servers, calls, places, kills, strict=True):
                server.start(call, place, k)
            done = [server.answer() for server in servers]
            tally.kills += sum(answer["status"] == -9 for answer in done)
        for k, answer, place in zip(pair, done, places, strict=True):
            tally.judge(k, answer, expected, place)
    assert tally.clean(), tally.verdicts


@pytest.fixture(scope="module")
def two_ranks(plain, servers, tmp_path_factory):  # noqa: F811
    """A function that runs main.py on two ranks, with kills at (k of rank 0, k of rank 1). Returns: both answers."""

    def start(argv, place, kills=(0, 0)):
        env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank, server in enumerate(servers):
            mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            server.start([*argv, "--output_dir", place], place, kills[rank], env=mine, limit=60)
        first = select.select([server.process.stdout for server in servers], [], [])[0][0]
        number = int(first is servers[1].process.stdout)
        done = {number: servers[number].answer()}
        other = servers[1 - number].process
        if done[number]["status"]:  # a launcher would end the other rank: first so, then so
            for last in (signal.SIGTERM, signal.SIGKILL):
                if not select.select([other.stdout], [], [], 0.3 if last == signal.SIGTERM else 1)[0]:
                    subprocess.run(["pkill", f"-{last}", "-P", str(other.pid)], check=False)
        return [done[0], servers[1].answer()] if 0 in done else [servers[0].answer(), done[1]]

    output = tmp_path_factory.mktemp("ranks") / "out"
    done = start(plain[0], output)
    assert [answer["status"] for answer in done] == [0, 0], done
    return start, plain[0], output, [answer["changes"] for answer in done]


@pytest.mark.slow
def test_either_of_two_ranks_may_be_killed_at_any_change(two_ranks, tmp_path):
    """B10, B13: the launcher ends the other one, and both go on to the same weights."""
    start, argv, expected, changes = two_ranks
    tally = Tally("one of two ranks")
    for rank, count in ((0, 12), (1, 4)):
        for number in range(count):
            k = 1 + number * changes[rank] // count
            output = tmp_path / f"{rank}-{k}"
            done = start(argv, output, (k, 0) if rank == 0 else (0, k))
            statuses = [answer["status"] for answer in done]
            tally.kills += statuses[rank] == -9
            done = start(argv, output)
            tally.judge((rank, k, statuses), max(done, key=lambda answer: abs(answer["status"])), expected, output)
    assert tally.clean(), tally.verdicts


class Disk:
    """A tmpfs of any size, in the mount namespace of a server that runs main.py on it."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.server = Server(SCRATCH / "kill_at.so", "unshare", "--mount")
        assert self.server.run(["--help"], folder)["status"] == 0
        self.call("mount", "-t", "tmpfs", "none", folder)

    def call(self, *words):
        enter = ["nsenter", "--target", str(self.server.process.pid), "--mount"]
        return subprocess.run([*enter, *map(str, words)], check=True, stdout=-1, text=True).stdout

    def resize(self, options):
        self.call("mount", "-o", f"remount,{options}", self.folder)


@pytest.fixture
def disk(plain, tmp_path):  # noqa: F811
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.server.close()


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_point_costs_nothing(plain, disk, tmp_path):  # noqa: F811
    """B10: disks of many sizes: status 1, one sentence; what was saved is whole; with space, the same weights."""
    argv, expected, _ = plain
    output = disk.folder / "out"
    argv = [*argv, "--output_dir", output]
    short = [*argv[:-1], tmp_path / "short", "--max_steps", 2]  # one checkpoint: the final save may be what fills it
    assert disk.server.run(short, tmp_path / "short")["status"] == 0
    plans = [(argv, expected, size) for size in range(20, 2500, 400)]
    plans += [([*argv, "--max_steps", 2], tmp_path / "short", size) for size in range(1350, 1900, 90)]
    tally, faults, full = Tally("full disks"), [], set()
    for call, reference, size in plans:
        disk.resize(f"size={size}k")
        done = disk.server.run(call, output, limit=60)
        tally.kills += done["status"] != 0
        if done["status"]:
            sentence = done["err"].rpartition("main.py: error: ")[2]
            if done["status"] != 1 or "Traceback" in done["err"] or "space" not in sentence.lower():
                faults.append((size, done["status"], done["err"][-1500:]))
            last = "-2" if reference != expected else "-4"
            saved = disk.call("ls", output)
            full.add("cannot be written" in sentence and ("final" if f"checkpoint{last}" in saved else "checkpoint"))
        disk.resize("size=100m")
        done = disk.server.run(call, output)
        copy = tmp_path / "copy"
        disk.call("cp", "-r", output, copy)
        disk.call("rm", "-rf", output)
        tally.judge(size, done, reference, copy)
    assert faults == [] and tally.clean() and full == {"checkpoint", "final"}, (faults, tally.verdicts, full)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["read-only", "gone"])
def test_a_disk_that_becomes_read_only_or_loses_the_run(fault, plain, disk, tmp_path):  # noqa: F811
    """B10: during training: status 1 and a sentence; put right, the same command ends the same."""
    argv = [*plain[0], "--max_steps", 40]
    expected, output = tmp_path / "whole", disk.folder / "out"
    assert disk.server.run([*argv, "--output_dir", expected], expected)["status"] == 0
    argv += ["--output_dir", output]
    disk.server.start(argv, output, limit=60)
    inside = Path("/proc", str(disk.server.process.pid), "root", *output.parts[1:])
    while not (inside / "checkpoint-4").exists():
        time.sleep(0.01)
    if fault == "gone":
        disk.call("mv", output, disk.folder / "elsewhere")
    else:
        disk.call("mount", "--bind", output, output)
        disk.call("mount", "-o", "remount,bind,ro", output)
    done = disk.server.answer()
    assert done["status"] == 1 and "main.py: error: " in done["err"].splitlines()[-1], done["err"]
    if fault == "gone":
        disk.call("rm", "-rf", output)
        disk.call("mv", disk.folder / "elsewhere", output)
    else:
        disk.call("umount", output)
    again = disk.server.run(argv, output)
    assert again["status"] == 0, again["err"]
    disk.call("cp", "-r", output, tmp_path / "copy")
    assert in_child(same_weights, expected, tmp_path / "copy")


@pytest.mark.slow
def test_no_helper_process_stays_behind(plain, servers, tmp_path):  # noqa: F811
    """B10: signals while two processes tokenize and two load: the status, no traceback, no orphan, same weights."""
    argv = [*plain[0], "--preprocessing_num_workers", 2, "--dataloader_num_workers", 2]
    expected = tmp_path / "whole"
    whole_run = servers[0].run([*argv, "--output_dir", expected], expected)
    assert whole_run["status"] == 0 and whole_run["orphans"] == [], whole_run
    for number in range(12):
        output = tmp_path / str(number)
        which = (signal.SIGTERM, signal.SIGINT)[number % 2]
        call = [*argv, "--output_dir", output, "--cache_dir", tmp_path / f"cache{number}"]
        done = servers[0].run(call, output, seconds=0.2 + number / 8, number=which, limit=60)
        assert done["status"] in (0, 128 + which), (number, done)
        assert "Traceback" not in done["err"] or "Exception ignored" in done["err"], (number, done)
        assert done["status"] or "main.py: error: stopped" not in done["err"], (number, done)
        assert done["orphans"] == [], (number, done)
        again = servers[1].run(call, output)
        assert again["status"] == 0, again["err"]
        assert in_child(same_weights, expected, output)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_data_loaders_at_work(number, plain, tmp_path):  # noqa: F811
    """B10: as from a batch system or a terminal: a checkpoint, the status, nobody left behind, no long wait."""
    output = tmp_path / "out"
    words = [sys.executable, ROOT / "main.py", *plain[0], "--max_steps", 400, "--dataloader_num_workers", 2]
    words = [str(word) for word in [*words, "--output_dir", output]]
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
def test_a_run_with_data_loaders_ends_with_them(flags, plain, tmp_path):  # noqa: F811
    """B10: well or with an error, on its own: nobody is left, and nothing waits."""
    words = [sys.executable, ROOT / "main.py", *plain[0], "--max_steps", 6, "--dataloader_num_workers", 2]
    words = [str(word) for word in [*words, *flags.split(), "--output_dir", tmp_path / "out"]]
    done = subprocess.run(words, capture_output=True, text=True, start_new_session=True, timeout=60, check=False)
    assert done.returncode == ("rate" in flags), done.stderr
    assert "Traceback" not in done.stderr and ("rate" not in flags or "no finite numbers" in done.stderr)


@pytest.mark.slow
def test_ctrl_c_reaches_launcher_and_ranks_at_once(plain, tmp_path):  # noqa: F811
    """B10, B13: a terminal sends SIGINT to the whole group, the launcher then SIGTERM: one checkpoint, no orphan."""
    output = tmp_path / "out"
    words = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    words += [ROOT / "main.py", *plain[0], "--max_steps", 400, "--report_to", "none", "--output_dir", output]
    words = [str(word) for word in words]
    process = subprocess.Popen(words, stdout=-3, stderr=-1, text=True, start_new_session=True)
    wait_for(output / "checkpoint-4", process)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode != 0 and not any(Path("/proc", rank).exists() for rank in ranks)
    assert "stopped by SIG" in said and "the same command again goes on" in said, said
    newest = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    assert f"saved {output}/checkpoint-{newest};" in said, said


@pytest.mark.slow
def test_the_time_of_all_calls_is_reported(plain, servers, tmp_path):  # noqa: F811
    """B12: train_runtime, steps and samples a second cover the whole run."""
    output = tmp_path / "out"
    argv = [*plain[0], "--output_dir", output, "--max_steps", 150, "--save_steps", 500]
    earlier = 0
    for seconds in (0.9, 1.0, 1.1, 1.2, 1.3):
        if servers[0].run(argv, output, seconds=seconds, number=signal.SIGTERM)["status"] == 0:
            break
        saved = [json.loads(path.read_text()) for path in output.glob("checkpoint-*/trainer_state.json")]
        earlier = max((state["log_history"][-1]["seconds"] for state in saved), default=0)
    else:
        assert servers[0].run(argv, output)["status"] == 0
    results = json.loads((output / "train_results.json").read_text())
    assert results["train_runtime"] >= earlier > 0  # equal when the last signal came after the last step
    assert results["train_steps_per_second"] * results["train_runtime"] == pytest.approx(150, rel=0.05)
