"""Two machines: network namespaces joined by a cable, each with processes, mounts and a host name of its own.

All of it lives in a sandbox whose first process ends when this one does, by whatever signal: nothing is left behind.
The nodes run run_node0.sh and run_node1.sh as they are. What happened to them, and how long it took until both had
ended, is printed as a table at the end of the tests.
"""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, in_child, run, write_jsonl
from test_training import same_weights, weights_of

pytestmark = pytest.mark.slow

SANDBOX = "unshare --user --map-root-user --net --mount --pid --fork --mount-proc --kill-child".split()
CABLE = """
set -e
mount -t tmpfs none /run
ip link add v0 type veth peer name v1
for n in 0 1; do
    ip netns add n$n
    ip link set v$n netns n$n
    ip -n n$n link set v$n name eth0
    ip -n n$n addr add 10.77.0.$((n + 1))/24 dev eth0
    ip -n n$n link set eth0 up
    ip -n n$n link set lo up
done
echo ready
exec cat
"""
MACHINE = """
echo $1 >/proc/sys/kernel/hostname
eval "$2"
shift 2
"$@"
status=$?
for _ in {1..150}; do
    left=(/proc/[0-9]*)
    ((${#left[@]} > 1)) || exit $status
    sleep 0.1
done
ps -ef
exit 99
"""  # its first process: a name, preparations, the script; it ends when no other process is left
TABLE = {}  # what happened: how it went
STEPS, SAVE, PATIENCE = 140, 5, 10


def tree(pid):
    """All processes below one, as {pid: words of the command}, the nearest first."""
    found, queue = {}, [pid]
    while queue:
        pid = queue.pop(0)
        try:
            queue += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:  # has ended
            continue
    return found


class Node:
    """A machine that runs its node script."""

    def __init__(self, hosts, rank, flags, before="", script=None, **settings):
        self.rank, self.began = rank, time.time()
        env = os.environ | {"MAIN_NODE_IP": "10.77.0.1", "TOTAL_GPUS": "2", "OMP_NUM_THREADS": "1",
                            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        machine = [*hosts.enter, *f"ip netns exec n{rank} unshare --pid --fork --kill-child --mount-proc --uts".split()]
        words = ["bash", "-c", MACHINE, "init", f"node{rank}", before]
        words += ["bash", ROOT / (script or f"run_node{rank}.sh"), *flags]
        self.log = hosts.folder / f"node{rank}-{self.began}"
        with open(self.log, "w") as log:
            env |= {name: str(value) for name, value in settings.items()}
            self.process = subprocess.Popen([*machine, *map(str, words)], env=env, stdout=log, stderr=log)

    def said(self):
        return self.log.read_text(errors="replace")

    def find(self, what):
        """The process id of its worker, its launcher, or its first process."""
        for pid, words in tree(self.process.pid).items():
            launcher = str(ROOT / "tools/launch.py") in words
            kind = "worker" if str(ROOT / "main.py") in words and not launcher else "launcher" if launcher else ""
            if kind == what or (what == "node" and words[0] == "bash"):
                return pid
        raise AssertionError(f"no {what}: {self.said()}")

    def wait(self, seconds):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {self.rank} has not ended: {self.said()}") from None


class Hosts:
    """The sandbox, with the cable in it."""

    def __init__(self, folder):
        self.folder, self.nodes = folder, []
        self.keeper = subprocess.Popen([*SANDBOX, "bash", "-c", CABLE], stdin=-1, stdout=-1, stderr=-1, text=True)
        if self.keeper.stdout.readline() != "ready\n":
            allowed = subprocess.run([*SANDBOX, "true"], capture_output=True, text=True)
            why = self.keeper.communicate()[1]
            pytest.skip(f"unshare is not permitted here: {allowed.stderr}") if allowed.returncode else pytest.fail(why)
        inside = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().strip()
        self.enter = f"nsenter --target {inside} --user --preserve-credentials --net --mount --pid".split()

    def node(self, rank, *flags, **settings):
        self.nodes.append(Node(self, rank, flags, **settings))
        return self.nodes[-1]

    def both(self, *flags, **settings):
        return [self.node(rank, *flags, **settings) for rank in (0, 1)]

    def cable(self, state):
        subprocess.run([*self.enter, *f"ip -n n1 link set eth0 {state}".split()], check=True)

    def on(self, node, command):
        """Run a command on the machine of a node, in whatever it has mounted."""
        where = f"nsenter --target {node.find('node')} --user --preserve-credentials --mount".split()
        subprocess.run([*where, "bash", "-c", command], check=True)

    def close(self):
        self.keeper.stdin.close()
        self.keeper.wait(10)
        for node in self.nodes:
            node.process.kill()
            node.process.wait()


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory):
    import pydoc_data.topics

    topics, folder = pydoc_data.topics.topics, tmp_path_factory.mktemp("data")
    text = write_jsonl(folder / "train.jsonl", [topics[name] for name in ("with", "while", "try", "for")])
    return ["--model_name_or_path", tiny, "--train_file", text, "--max_seq_length", 64, "--no_truncation",
            "--cache_dir", folder / "cache", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
            "--max_steps", STEPS, "--save_steps", SAVE, "--learning_rate", 1e-4, "--warmup_steps", 0,
            "--ddp_timeout", PATIENCE, "--report_to", "none", "--disable_tqdm", "True"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """The output directory of a run on two machines to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    hosts = Hosts(folder)
    began, nodes = time.time(), hosts.both(*flags, OUTPUT_DIR=folder / "out")
    assert [node.wait(120) for node in nodes] == [0, 0], [node.said() for node in nodes]
    assert ", 2 processes" in nodes[0].said() and ", 2 processes" not in nodes[1].said()
    TABLE["nothing"] = f"trained in {time.time() - began:.0f} s"
    hosts.close()
    return folder / "out"


def steps(output):
    """The numbers of the checkpoints that are there."""
    return [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]


def progress(output, node, more=SAVE):
    """Wait until there is a checkpoint that is so many steps further than the newest one now."""
    until, begin = time.time() + 60, max(steps(output), default=0)
    while max(steps(output), default=0) < begin + more:
        assert node.process.poll() is None and time.time() < until, node.said()
        time.sleep(0.02)


def ended(case, nodes, words, since, within):
    """Both nodes ended with an error in time, and said why. words: of each; None if it was killed itself."""
    row = []
    for node, word in zip(nodes, words, strict=True):
        status = node.wait(max(0.1, since + within - time.time()))
        row.append(f"{time.time() - since:.1f} s")
        assert status not in (0, 99), node.said()
        assert word is None or re.search(word, node.said()), node.said()
    TABLE[case] = f"ended after {' and '.join(row)}"


def test_two_machines_train_like_one_process_with_the_double_batch(undisturbed, flags, tiny, tmp_path):
    """S5 to S7, C5, N1 to N3, N5, B13."""
    done = run(*flags, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one")
    assert done.status == 0, done.err

    def distance():
        """How far the two are apart, as a part of how far they have come."""
        one, two, start = (weights_of(folder) for folder in (tmp_path / "one", undisturbed, tiny))
        apart, way = (sum((a[name].float() - two[name].float()).square().sum().item() for name in one)
                      for a in (one, start))  # fmt: skip
        return (apart / way) ** 0.5

    assert in_child(distance) < 0.02


LISTEN = "import socket, time; server = socket.create_server(('', 29500)); kept = server.accept(); time.sleep(99)"
TALK = LISTEN.replace("kept = server.accept()", "kept = server.accept()[0]; kept.sendall(b'SSH-2.0-x')")
MISSING, NOBODY = "given up after NODE_WAIT=11 s: rank 1 has not come to 10.77.0.1:29500", "cannot be reached ("
TOTALS = "TOTAL_GPUS is 4 at 10.77.0.2 and 2 on the main machine"
BEFORE = {  # settings of node 0 and of node 1 (None: not started), what each says, what node 0 runs besides
    "node 1 never starts": ({}, None, MISSING, None, ""),
    "node 0 never starts": (None, {}, None, NOBODY + "Connection refused)", ""),
    "node 1 has a wrong main address": ({}, {"MAIN_NODE_IP": "10.77.0.9"}, MISSING, "10.77.0.9:29500 " + NOBODY, ""),
    "node 0 has a wrong main address": ({"MAIN_NODE_IP": "10.77.0.9"}, {}, "is no address of this machine", NOBODY, ""),
    "no route to the main address": ({}, {"MAIN_NODE_IP": "10.9.9.9"}, MISSING, NOBODY + "Network is unreachable", ""),
    "the port is taken, silently": ({}, {}, "MAIN_PORT=29500 cannot be used", "something else than multinode", LISTEN),
    "the port is taken, by a talker": ({}, {}, "MAIN_PORT=29500 cannot be used", "something else than multinode", TALK),
    "different TOTAL_GPUS": ({}, {"TOTAL_GPUS": 4}, TOTALS, TOTALS, ""),
    "both with rank 0": ({}, {"script": "run_node0.sh"}, MISSING, "is no address of this machine", ""),
    "node 1 cannot write OUTPUT_DIR": ({}, {"OUTPUT_DIR": "/proc/no"}, MISSING, "OUTPUT_DIR=/proc/no cannot be", ""),
}


def before_launch(case, folder):
    """Run one of the cases above. Returns: the exit status, the seconds and the words of each node."""
    folder.mkdir()
    hosts, (zero, one, _, _, beside) = Hosts(folder), BEFORE[case]
    if beside:
        subprocess.Popen([*hosts.enter, "ip", "netns", "exec", "n0", sys.executable, "-c", beside])
        time.sleep(1)
    nodes = [hosts.node(rank, **{"NODE_WAIT": 11, "OUTPUT_DIR": folder / "out", **settings})
             for rank, settings in enumerate((zero, one)) if settings is not None]  # fmt: skip
    seconds = {}
    while len(seconds) < len(nodes):
        seconds |= {node: time.time() - node.began for node in nodes if node not in seconds and node.process.poll()}
        time.sleep(0.05)
    rows = [(node.process.returncode, seconds[node], node.said()) for node in nodes]
    hosts.close()
    return rows


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """What became of each case: all at the same time, each in a sandbox of its own, as they only wait."""
    folder = tmp_path_factory.mktemp("before")
    with ThreadPoolExecutor(len(BEFORE)) as pool:
        return {case: pool.submit(before_launch, case, folder / str(n)) for n, case in enumerate(BEFORE)}


@pytest.mark.parametrize("case", BEFORE)
def test_what_is_wrong_before_the_launch_is_said_without_loading_torch(before, case):
    """C5, N1 to N3: both nodes end within NODE_WAIT and the five seconds that a silent listener is given."""
    rows, words = before[case].result(), [word for word in BEFORE[case][2:4] if word]
    for (status, seconds, said), word in zip(rows, words, strict=True):
        assert status == 2 and word in said and "Traceback" not in said and seconds < 19, said
        assert said.count(" waiting: ") == (seconds > 9), said  # after two seconds, and then every ten
    TABLE[case] = f"ended after {' and '.join(f'{seconds:.1f} s' for _, seconds, _ in rows)}"


def spoil(case, flags, tmp_path):
    """Flags of node 1, what is done on its machine before, and the words of both nodes."""
    (tmp_path / "own").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": 1\n')
    text = flags[3]
    return {
        "different flags": ([*flags, "--seed", 7], "", "--seed is 7 instead of 42"),
        "storage that is not shared": (flags, f"mount --bind {tmp_path}/own {tmp_path}/out", "what rank 0 writes"),
        "an error on node 1 before training": (flags, f"mount --bind {tmp_path}/bad.jsonl {text}", "broken JSON"),
    }[case]


@pytest.mark.parametrize("case", ["different flags", "storage that is not shared",
                                  "an error on node 1 before training"])  # fmt: skip
def test_what_is_wrong_on_one_machine_ends_both_with_its_sentence(hosts, flags, tmp_path, case):
    """C5, C6, B13: status 2 on both, which MAX_RETRIES does not try again."""
    (tmp_path / "out").mkdir()
    flags = [*flags, "--ddp_timeout", 40]  # longer than a directory is looked for
    more, before, words = spoil(case, flags, tmp_path)
    settings = {"OUTPUT_DIR": tmp_path / "out", "MAX_RETRIES": 3}
    began = time.time()
    nodes = [hosts.node(0, *flags, **settings), hosts.node(1, *more, before=before, **settings)]
    ended(case, nodes, [words, words], began, within=60)
    assert [node.process.returncode for node in nodes] == [2, 2]
    for node in nodes:
        assert node.said().count("main.py: error:") == 1, node.said()
    assert "rank 1 on node1" in nodes[0].said()
    assert steps(tmp_path / "out") == [] and os.listdir(tmp_path / "own") == []


KILLED, GONE = r"launch.py: node{0}: rank {0} ended with signal 9", r"connection to machine {0} \(node{0}\) is lost"
ORPHAN, CUT = r"closed by peer|reset by peer|loss of a launcher", r"launch.py: nothing was heard of machine {0} "
KILLS = {  # what is killed, on which node; the words of node 0 and node 1
    "kill -9 of the worker on node 0": ("worker", 0, "rank 0 ended with signal 9", KILLED.format(0)),
    "kill -9 of the worker on node 1": ("worker", 1, KILLED.format(1), "rank 1 ended with signal 9"),
    "kill -9 of the launcher on node 0": ("launcher", 0, ORPHAN, GONE.format(0)),
    "kill -9 of the launcher on node 1": ("launcher", 1, GONE.format(1), ORPHAN),
    "kill -9 of all of node 0": ("node", 0, None, GONE.format(0)),
    "kill -9 of all of node 1": ("node", 1, GONE.format(1), None),
    "the cable is cut for good": ("cable", 1, CUT.format(1), CUT.format(0)),
    "the storage of node 1 is lost in training": ("storage", 1, "cannot be written", "cannot be written"),
}


def test_whatever_is_lost_in_training_both_end_and_the_next_run_goes_on(hosts, undisturbed, flags, tmp_path):
    """B10, B13, C5: one run, disturbed again and again, with the weights of the undisturbed one in the end."""
    output = tmp_path / "out"
    output.mkdir()
    for case, (what, rank, *words) in KILLS.items():
        nodes = hosts.both(*flags, OUTPUT_DIR=output, before=f"mount --bind {output} {output}")
        progress(output, nodes[0])
        since = time.time()
        if what == "cable":
            hosts.cable("down")
        elif what == "storage":
            hosts.on(nodes[1], f"mount -o remount,bind,ro {output}")
        else:
            os.kill(nodes[rank].find(what), signal.SIGKILL)
        ended(case, nodes, words, since, within=PATIENCE + 20 if what == "cable" else 30)
        assert not {143, 130, 2} & {node.process.returncode for node in nodes}, "MAX_RETRIES would not try again"
        hosts.cable("up")
    nodes = hosts.both(*flags, OUTPUT_DIR=output)
    assert [node.wait(90) for node in nodes] == [0, 0], [node.said() for node in nodes]
    assert "Going on from" in nodes[0].said() and in_child(same_weights, undisturbed, output)


def test_with_max_retries_a_run_survives_the_loss_of_a_node_and_of_the_cable(hosts, undisturbed, flags, tmp_path):
    """B10, C5: five seconds without a cable are waited out; after more, and after a kill, both begin again."""
    output = tmp_path / "out"
    settings = {"OUTPUT_DIR": output, "MAX_RETRIES": 4, "NODE_WAIT": 60}
    nodes = hosts.both(*flags, **settings)
    progress(output, nodes[0])
    for seconds in (5, PATIENCE + 10):
        began = time.time()
        hosts.cable("down")
        time.sleep(seconds)
        hosts.cable("up")
        progress(output, nodes[0])
        again = [node.said().count("joining in again") for node in nodes]
        assert again == ([0, 0] if seconds == 5 else [1, 1]), [node.said() for node in nodes]
        TABLE[f"the cable is cut for {seconds} s, MAX_RETRIES"] = f"went on after {time.time() - began:.1f} s"
    for rank in (0, 1):
        began = time.time()
        os.kill(nodes[rank].find("node"), signal.SIGKILL)
        nodes[rank].wait(10)
        nodes[rank] = hosts.node(rank, *flags, **settings)
        progress(output, nodes[0])
        TABLE[f"kill -9 of all of node {rank}, MAX_RETRIES"] = f"went on after {time.time() - began:.1f} s"
    assert [node.wait(90) for node in nodes] == [0, 0], [node.said() for node in nodes]
    assert in_child(same_weights, undisturbed, output)


def test_a_cut_cable_is_spoken_of_within_a_minute_and_waited_for(hosts, undisturbed, flags, tmp_path):
    """B10: both machines name the lost one long before --ddp_timeout, and go on when the cable is put back."""
    nodes = hosts.both(*flags, "--ddp_timeout", 600, OUTPUT_DIR=tmp_path / "out")
    progress(tmp_path / "out", nodes[0])
    began = time.time()
    hosts.cable("down")
    words = "warning  nothing was heard of machine {0} (node{0}) for"
    while not all(words.format(1 - node.rank) in node.said() for node in nodes):
        assert time.time() - began < 60, [node.said() for node in nodes]
        time.sleep(1)
    said = time.time() - began
    hosts.cable("up")
    assert [node.wait(120) for node in nodes] == [0, 0], [node.said() for node in nodes]
    assert in_child(same_weights, undisturbed, tmp_path / "out")
    TABLE["the cable is cut, --ddp_timeout 600"] = f"said after {said:.0f} s; put back, both went on"


def test_nothing_is_left_after_kill_9_of_the_tests(tmp_path, flags):
    """The sandbox ends with the process that made it."""
    program = (f"import sys; sys.path[:0] = {sys.path[:2]!r}\nfrom pathlib import Path\nfrom test_hosts import Hosts\n"
               f"hosts = Hosts(Path({str(tmp_path)!r})); hosts.node(0, OUTPUT_DIR={str(tmp_path / 'out')!r})\n"
               "print('up', flush=True)\nimport time; time.sleep(99)")  # fmt: skip
    one = subprocess.Popen([sys.executable, "-c", program], stdout=-1, text=True)
    assert one.stdout.readline() == "up\n"
    time.sleep(1)
    below = [pid for pid in tree(one.pid) if pid != one.pid]
    assert len(below) > 3
    one.kill()
    one.wait()
    until = time.time() + 10
    while alive := [pid for pid in below if Path(f"/proc/{pid}").exists()]:
        assert time.time() < until, alive
        time.sleep(0.1)
