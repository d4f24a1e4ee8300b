"""Plain functions, classes and constants that more than one test file or fixture uses.

`run` forks this process, which has imported torch and transformers once, and runs main.py in the child: a second a
run instead of eight. `launch` starts a new interpreter, as a user does. Both return status, stdout and stderr.
"""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub import StubHub  # noqa: E402

GPU = bool(os.environ.get("TESTS_GPU"))  # set by bash tests/run.sh --gpu: no other test sees a GPU
FIRST = "TESTS_SCRATCH" not in os.environ  # False in a pytest that a test has started
SCRATCH = Path(os.environ.get("TESTS_SCRATCH") or tempfile.mkdtemp(prefix="trainer-tests-"))
HUB = StubHub(gated={"google/gemma-3-270m"}, tokens={"hf_good"}, unaccepted={"hf_stranger"}, narrow={"hf_narrow"})
HUB.__enter__()
for name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[name]  # a developer's own token or cache must not reach the tests
os.environ |= {
    "TESTS_SCRATCH": str(SCRATCH),  # processes that import this file share the folder
    "HF_ENDPOINT": HUB.endpoint,  # read when huggingface_hub is imported, below
    "HF_HOME": str(SCRATCH / "hf"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # tiny tensors are faster on one thread
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if GPU else "",
}

import datasets  # noqa: E402, F401
import pytest  # noqa: E402
import transformers  # noqa: E402
from transformers import Trainer  # noqa: E402, F401

transformers.Gemma3ForCausalLM  # noqa: B018  resolves the lazy import before the first fork

ACCELERATE = Path(sys.executable).parent / "accelerate"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # python and accelerate are those of the tests
GOOD, STRANGER, INVALID, NARROW = (
    {"HF_TOKEN": f"hf_{token}"} for token in ("good", "stranger", "revoked", "narrow"))  # fmt: skip
ROWS = ["The quick brown fox jumps over the lazy dog. " * 8] * 10  # about 100 tokens each
SHORT = ["--max_seq_length", 64, "--max_steps", 1, "--report_to", "none"]  # a run of a second

BEST = ["--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--greater_is_better", True]  # the first

# ── What the machine must have ───────────────────────────────────────────────────────────────────────────────────────

NEEDED = {  # needed beyond Python and pip, and the Debian package of each
    "cc": "gcc libc6-dev", "git": "git", "hostname": "hostname", "iconv": "libc-bin", "ip": "iproute2", "jq": "jq",
    "mount": "mount", "nsenter": "util-linux", "pgrep": "procps", "pkill": "procps", "prlimit": "util-linux",
    "ps": "procps", "setpriv": "util-linux", "unshare": "util-linux",
}  # fmt: skip
NAMESPACE = "unshare --user --map-root-user --net --mount --uts --fork --kill-child bash -c".split()


def need(*programs):
    """Skip the test, with the reason, where a program is missing or unshare is not permitted; fail it under CI=true."""
    for name in programs:
        if not shutil.which(name):
            missing(f"{name} is missing: apt-get install {NEEDED[name]}")
    if "unshare" in programs and (why := no_namespaces(os.environ["PATH"])):
        missing(f"namespaces are not permitted here: {why}")


def missing(reason):
    """End a test that cannot be made here: skipped on a user's machine, failed where CI is "true"."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@functools.cache
def no_namespaces(path):
    """Why a process may not have mounts and a network of its own, or "" if it may."""
    return subprocess.run([*NAMESPACE, "mount -t tmpfs none /tmp"], capture_output=True, text=True).stderr.strip()


# Root reads and writes everything, so cases about permissions run without the capabilities that let it.
CAPABILITIES = "-dac_override,-dac_read_search"
ORDINARY = ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"] if os.geteuid() == 0 else []

# ── Text, weights, logs ──────────────────────────────────────────────────────────────────────────────────────────────


def write_jsonl(path, rows):
    """Write one {"text": row} a line. Returns: path."""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def manual(*names):
    """Chapters of Python's manual, 3 to 20 kB each."""
    import pydoc_data.topics

    return [pydoc_data.topics.topics[name] for name in names]


def cases(table):
    """Turn {id: (value, word, …)} into pytest parameters (value, [word, …])."""
    return [pytest.param(value, words, id=name) for name, (value, *words) in table.items()]


def snapshot(folder):
    """{path: content} of all files but hidden ones."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def times(folder):
    """{path: time of the last change} of all files but hidden ones."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


def results(output, name="all"):
    """What a run has written into train_results.json, eval_results.json or all_results.json."""
    return json.loads((output / f"{name}_results.json").read_text())


def weights_of(folder):
    """Return {name: tensor} of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_weights(one, other):
    """Whether two saved models are equal bit for bit."""
    import torch

    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps(output):
    """The numbers of the checkpoints that are there, in order."""
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def logged(output):
    """The log history of the newest checkpoint."""
    return json.loads((output / f"checkpoint-{steps(output)[-1]}" / "trainer_state.json").read_text())["log_history"]


def losses(output):
    """The training losses in the log of the newest checkpoint."""
    return [row["loss"] for row in logged(output) if "loss" in row]


def events(folder):
    """{tag: [(step, value)]} of TensorBoard's event files, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


def chunks_of(model_dir, path, length, behind=()):
    """The chunks of a .jsonl file, untruncated, by the plainest code: each begins with BOS, its own or a text's.

    behind: ids that end each text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    left = [token for line in open(path) for token in [*tokenizer(json.loads(line)["text"])["input_ids"], *behind]]
    chunks = []
    while left:
        if left[0] != tokenizer.bos_token_id:
            left.insert(0, tokenizer.bos_token_id)
        chunks.append(left[:length])
        left = left[length:]
    return [chunk for chunk in chunks if len(chunk) == length]


def plain_loss(model_dir, chunks):
    """Mean loss of all tokens but BOS, in float32, with nothing but transformers and torch's cross-entropy."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor(chunks)
        labels = ids.masked_fill(ids == model.config.bos_token_id, -100)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).item()


# ── Running main.py ──────────────────────────────────────────────────────────────────────────────────────────────────


def last_wins(argv):
    """Leave out a flag of main.py that a later one replaces, as it refuses one that is given twice. Returns: words."""
    words = [str(word) for word in argv]
    start = next((at for at, word in enumerate(words, 1) if word.endswith("main.py")), 0)  # behind a launcher's own
    parts = [words[:start]] if start else []
    for word in words[start:]:
        if word.startswith("--") or not parts:
            parts.append([word])
        else:
            parts[-1].append(word)
    names = [part[0].partition("=")[0].replace("-", "_") for part in parts]
    kept = [part for at, part in enumerate(parts) if names[at] not in names[at + 1 :]]
    return [word for part in kept for word in part]


def run(*argv, env=None, cwd=None, prepare=None, signals=(), repeated=False):
    """Run main.py in a fork of this process, after prepare() in it. Returns: status, out, err and pid.

    signals: pairs (seconds, number): what it gets so long after its start, or after it has set its own handlers.
    repeated: whether flags reach it as they are, also when they are given twice.
    """
    argv = argv if repeated else last_wins(argv)
    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = os.fork()
        if child == 0:
            status = 70
            try:
                for number, path in ((1, out), (2, err)):
                    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ.update(env or {})
                os.chdir(cwd or folder)
                if prepare:
                    prepare()
                status = run_as_script([str(text) for text in argv])
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
                end_loaders()
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        over = threading.Event()
        senders = [threading.Thread(target=send, args=(child, over, *plan)) for plan in signals]
        for sender in senders:
            sender.start()
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its number is not given away yet
        over.set()
        for sender in senders:
            sender.join()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return SimpleNamespace(status=status, out=out.read_text(), err=err.read_text(), pid=child)


def send(child, over, seconds, number):
    """Send a signal to a child that is not over by then; SIGTERM and SIGINT once main.py has its handlers."""
    caught = Path("/proc", str(child), "status")  # SigCgt has bit n - 1 for signal n
    while number in (signal.SIGTERM, signal.SIGINT) and not over.wait(0.005):
        if int(re.search(r"SigCgt:\s*(\w+)", caught.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
            break
    if not over.wait(seconds):
        os.kill(child, number)


def end_loaders():
    """End data loaders as the interpreter does at its end, which os._exit leaves out."""
    if "multiprocessing.util" in sys.modules:
        sys.modules["multiprocessing.util"]._exit_function()


def run_as_script(argv):
    """Run main.py under the name __main__, as the interpreter would. Returns: the exit status it would have."""
    import runpy
    import traceback

    sys.argv = [str(ROOT / "main.py"), *argv]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def launch(*argv, env=None, cwd=ROOT, timeout=600):
    """Run a command as a user would, `python main.py …` unless it names another program. Returns: as run does."""
    command = [str(text) for text in argv]
    if command[0].startswith("-"):
        command = [sys.executable, str(ROOT / "main.py"), *command]
    command = last_wins(command)
    done = subprocess.run(
        command, env=os.environ | (env or {}), cwd=cwd, timeout=timeout, capture_output=True, text=True
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def short_run(tiny, texts, output, *more):
    """Flags of a short run on the tiny model: 12 steps or so an epoch."""
    return ["--model_name_or_path", tiny, "--train_file", texts[0], "--validation_file", texts[1],
            "--output_dir", output, "--no_truncation", "--max_seq_length", 64, "--learning_rate", 1e-3,
            "--warmup_steps", 2, *more]  # fmt: skip


def finish(*argv, **more):
    """Run main.py, which must end well. Returns: as run does."""
    done = run(*argv, **more)
    assert done.status == 0, done.out + done.err
    return done


def plain_user(*argv, env=None):
    """Run main.py in a new interpreter that file permissions bind, also when root runs the tests."""
    need(*ORDINARY[:1])
    return launch(*ORDINARY, sys.executable, ROOT / "main.py", *argv, env=env)


def refused(done, *words, status=2):
    """Assert that a run ended in one sentence on standard error that holds all the words. Returns: the sentence."""
    assert done.status == status, done.out + done.err
    assert "Traceback" not in done.out + done.err, done.err
    assert done.err.count("main.py: error: ") == 1, done.err
    sentence, *rest = done.err.partition("main.py: error: ")[2].splitlines()
    assert not [line for line in rest if line.strip() and not re.search(r"(it|examples)/s", line)], done.err
    assert [word for word in words if word not in sentence] == [], sentence
    return sentence


def in_child(function, *args):
    """Call function(*args) in a fork of this process, which itself never computes with torch. Returns: its result."""
    import pickle
    import traceback

    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        answer = Path(folder, "answer")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                answer.write_bytes(pickle.dumps(function(*args)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, f"{function.__name__} failed in the child with status {status}"
        return pickle.loads(answer.read_bytes())


# ── Several processes ────────────────────────────────────────────────────────────────────────────────────────────────


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_processes():
    """The words of accelerate that start main.py in two processes on the CPU."""
    return [ACCELERATE, "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", free_port(),
            ROOT / "main.py"]  # fmt: skip


def wait_for(path, process):
    """Wait until a file is there that a process makes."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


class Server:
    """A process with the killing library in it, which runs main.py in forks."""

    def __init__(self, library, *before):
        command = [*before, sys.executable, str(ROOT / "tests" / "kill_server.py")]
        env = os.environ | {"LD_PRELOAD": str(library)}
        self.process = subprocess.Popen(command, env=env, stdin=-1, stdout=-1, stderr=-3, text=True)

    def start(self, argv, place, k=0, seconds=None, number=signal.SIGKILL, env=None, limit=120, fork=0):
        job = {"argv": [str(word) for word in argv], "place": str(place), "k": k, "seconds": seconds, "signal": number,
               "env": env, "limit": limit, "fork": fork}  # fmt: skip
        print(json.dumps(job), file=self.process.stdin, flush=True)

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def run(self, *job, **named):
        self.start(*job, **named)
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Disk:
    """A tmpfs of any size, in the mount namespace of a server that runs main.py on it."""

    def __init__(self, folder, library):
        need("unshare", "nsenter", "mount")
        self.folder = folder
        folder.mkdir()
        self.server = Server(library, *"unshare --user --map-root-user --mount".split())
        assert self.server.run(["--help"], folder)["status"] == 0
        self.call("mount", "-t", "tmpfs", "none", folder)

    def call(self, *words):
        enter = f"nsenter --target {self.server.process.pid} --user --preserve-credentials --mount".split()
        return subprocess.run([*enter, *map(str, words)], check=True, stdout=-1, text=True).stdout

    def resize(self, options):
        self.call("mount", "-o", f"remount,{options}", self.folder)


KILL_TABLE = {}  # what was killed: (kills, exact, crashed, wrong), printed at the end of the tests

# ── Two machines ─────────────────────────────────────────────────────────────────────────────────────────────────────

# Network namespaces joined by a cable, each with processes, mounts and a host name of its own. All of it lives in a
# sandbox whose first process ends when that of the tests does, by whatever signal: nothing is left behind.
SANDBOX = "unshare --user --map-root-user --net --mount --pid --fork --mount-proc --kill-child".split()
CABLE = """
set -e
mount -t tmpfs none /run
ip link add v0 type veth peer name v1
for n in 0 1; do
    ip netns add n$n
    ip link set v$n netns n$n
    ip -n n$n link set v$n name eth0
    ip -n n$n addr add $1/24 dev eth0
    ip -n n$n link set eth0 up
    ip -n n$n link set lo up
    shift
done
echo ready
exec cat
"""  # its words are the addresses of node 0 and node 1
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
SAVE, PATIENCE = 5, 10  # steps between the checkpoints of their run, seconds of its --ddp_timeout
MACHINE_TABLE = {}  # what happened to two machines: how it went, printed at the end of the tests


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
        env = os.environ | {"MAIN_NODE_IP": hosts.addresses[0], "TOTAL_GPUS": "2", "OMP_NUM_THREADS": "1", "PATH": PATH}
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

    def __init__(self, folder, addresses=("10.77.0.1", "10.77.0.2")):
        need("unshare", "nsenter", "ip", "mount", "ps")
        self.folder, self.addresses, self.nodes = folder, addresses, []
        command = [*SANDBOX, "bash", "-c", CABLE, "cable", *addresses]
        self.keeper = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)
        assert self.keeper.stdout.readline() == "ready\n", self.keeper.communicate()[1]
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


# ── The quickstart ───────────────────────────────────────────────────────────────────────────────────────────────────


def clean_environment():
    """The environment of a user: none of the settings that this file makes for tiny models."""
    ours = ("HF_", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def copy_of_the_repository(folder):
    """Copy what is tracked, or would be, into a new folder. Returns: folder."""
    folder.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, stdout=-1)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def quickstart_in(folder):
    """Run the quickstart of a copy. Returns: its standard output."""
    command = ["bash", "example_run.sh", "quickstart"]
    done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
