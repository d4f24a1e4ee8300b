"""Stopped at any instant, the same command ends with the weights of a run that was never stopped, bit for bit."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, SCRATCH, in_child, write_jsonl
from test_training import same_weights

KILLS = int(os.environ.get("KILLS", 520))  # at least so many by count, spread evenly over all changes
TABLE = {}


class Server:
    """A process with the killing library in it, which runs main.py in forks."""

    def __init__(self, library):
        command = [sys.executable, str(ROOT / "tests" / "kill_server.py")]
        self.process = subprocess.Popen(
            command, env=os.environ | {"LD_PRELOAD": str(library)}, stdin=-1, stdout=-1, stderr=-3, text=True
        )

    def run(self, argv, place, k=0, seconds=None):
        job = {"argv": [str(word) for word in argv], "place": str(place), "k": k, "seconds": seconds}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

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
    print("\n  kills at             kills  exact  crashed  wrong")
    for name, (kills, exact, crashed, wrong) in TABLE.items():
        print(f"  {name:20} {kills:5} {exact:6} {crashed:8} {wrong:6}")


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
    leftovers = [path for path in output.iterdir() if path.name.startswith((".staging", ".trash", "incomplete"))]
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
