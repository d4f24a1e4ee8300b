"""Two machines and the scripts that launch them: network namespaces joined by a cable, or two launchers on this one.

The nodes run run_node0.sh and run_node1.sh as they are. What happened to them, and how long it took until both had
ended, is printed as a table at the end of the tests.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import (
    GOOD,
    MACHINE_TABLE,
    PATH,
    PATIENCE,
    ROOT,
    SAVE,
    SCRATCH,
    Hosts,
    finish,
    free_port,
    in_child,
    launch,
    missing,
    need,
    same_weights,
    steps,
    tree,
    wait_for,
    weights_of,
)

from tools import launch as launcher

# ── In network namespaces ────────────────────────────────────────────────────────────────────────────────────────────


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
    MACHINE_TABLE[case] = f"ended after {' and '.join(row)}"


@pytest.mark.slow
def test_two_machines_train_like_one_process_with_the_double_batch(undisturbed, machine_flags, tiny, tmp_path):
    """S5 to S7, C5, N1 to N3, N5, B13."""
    finish(*machine_flags, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one")

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


@functools.cache
def before_launches():
    """What becomes of each case: all at the same time, each in a sandbox of its own, as they only wait."""
    folder = SCRATCH / "before"
    folder.mkdir()
    with ThreadPoolExecutor(len(BEFORE)) as pool:
        return {case: pool.submit(before_launch, case, folder / str(n)) for n, case in enumerate(BEFORE)}


@pytest.mark.slow
@pytest.mark.parametrize("case", BEFORE)
def test_what_is_wrong_before_the_launch_is_said_without_loading_torch(case):
    """C5, N1 to N3: both nodes end within NODE_WAIT and the five seconds that a silent listener is given."""
    rows, words = before_launches()[case].result(), [word for word in BEFORE[case][2:4] if word]
    for (status, seconds, said), word in zip(rows, words, strict=True):
        assert status == 2 and word in said and "Traceback" not in said and seconds < 19, said
        assert said.count(" waiting: ") == (seconds > 9), said  # after two seconds, and then every ten
    MACHINE_TABLE[case] = f"ended after {' and '.join(f'{seconds:.1f} s' for _, seconds, _ in rows)}"


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


@pytest.mark.slow
@pytest.mark.parametrize("case", ["different flags", "storage that is not shared",
                                  "an error on node 1 before training"])  # fmt: skip
def test_what_is_wrong_on_one_machine_ends_both_with_its_sentence(hosts, machine_flags, tmp_path, case):
    """C5, C6, B13: status 2 on both, which MAX_RETRIES does not try again."""
    (tmp_path / "out").mkdir()
    flags = [*machine_flags, "--ddp_timeout", 40]  # longer than a directory is looked for
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


@pytest.mark.slow
def test_whatever_is_lost_in_training_both_end_and_the_next_run_goes_on(hosts, undisturbed, machine_flags, tmp_path):
    """B10, B13, C5: one run, disturbed again and again, with the weights of the undisturbed one in the end."""
    output = tmp_path / "out"
    output.mkdir()
    for case, (what, rank, *words) in KILLS.items():
        nodes = hosts.both(*machine_flags, OUTPUT_DIR=output, before=f"mount --bind {output} {output}")
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
    nodes = hosts.both(*machine_flags, OUTPUT_DIR=output)
    assert [node.wait(90) for node in nodes] == [0, 0], [node.said() for node in nodes]
    assert "Going on from" in nodes[0].said() and in_child(same_weights, undisturbed, output)


@pytest.mark.slow
def test_with_max_retries_a_lost_node_and_a_cut_cable_are_survived(hosts, undisturbed, machine_flags, tmp_path):
    """B10, C5: five seconds without a cable are waited out; after more, and after a kill, both begin again."""
    output = tmp_path / "out"
    settings = {"OUTPUT_DIR": output, "MAX_RETRIES": 4, "NODE_WAIT": 60}
    nodes = hosts.both(*machine_flags, **settings)
    progress(output, nodes[0])
    for seconds in (5, PATIENCE + 10):
        began = time.time()
        hosts.cable("down")
        time.sleep(seconds)
        hosts.cable("up")
        progress(output, nodes[0])
        again = [node.said().count("joining in again") for node in nodes]
        assert again == ([0, 0] if seconds == 5 else [1, 1]), [node.said() for node in nodes]
        MACHINE_TABLE[f"the cable is cut for {seconds} s, MAX_RETRIES"] = f"went on after {time.time() - began:.1f} s"
    for rank in (0, 1):
        began = time.time()
        os.kill(nodes[rank].find("node"), signal.SIGKILL)
        nodes[rank].wait(10)
        nodes[rank] = hosts.node(rank, *machine_flags, **settings)
        progress(output, nodes[0])
        MACHINE_TABLE[f"kill -9 of all of node {rank}, MAX_RETRIES"] = f"went on after {time.time() - began:.1f} s"
    assert [node.wait(90) for node in nodes] == [0, 0], [node.said() for node in nodes]
    assert in_child(same_weights, undisturbed, output)


@pytest.mark.slow
def test_a_cut_cable_is_spoken_of_within_a_minute_and_waited_for(hosts, undisturbed, machine_flags, tmp_path):
    """B10: both machines name the lost one long before --ddp_timeout, and go on when the cable is put back."""
    nodes = hosts.both(*machine_flags, "--ddp_timeout", 600, OUTPUT_DIR=tmp_path / "out")
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
    MACHINE_TABLE["the cable is cut, --ddp_timeout 600"] = f"said after {said:.0f} s; put back, both went on"


@pytest.mark.slow
def test_nothing_is_left_after_kill_9_of_the_tests(tmp_path):
    """The sandbox ends with the process that made it."""
    need("unshare", "nsenter", "ip", "mount")
    program = (f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
               "from pathlib import Path\nfrom helpers import Hosts\n"
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


C6 = ("accelerate launch --num_machines 2 --num_processes 4 --machine_rank {} --main_process_ip 192.168.1.100 "
      "--main_process_port 29500 --multi_gpu main.py --dataset_name wikitext "
      "--output_dir /shared/outputs/gemma-270m --bf16")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bash run_node{}.sh", C6], ids=["C5", "C6"])
def test_the_commands_for_two_machines_work(command, hub, tmp_path):
    """C5, C6: in two network namespaces with the README's addresses; four processes on the CPU, one /shared."""
    first = launch("--dataset_name", "wikitext", "--output_dir", tmp_path / "one", "--max_steps", 1, env=GOOD)
    assert first.status == 0, first.err  # the cache is filled: the namespaces reach no hub
    hosts = Hosts(tmp_path, ("192.168.1.100", "192.168.1.101"))
    (tmp_path / "shared").mkdir()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "2,3", "PATH": PATH}
    made = not Path("/shared").exists()
    if made and os.geteuid():
        missing("/shared is not there, and only root can make it")
    os.makedirs("/shared", exist_ok=True)
    try:
        nodes = []
        for rank in (0, 1):
            script = f"mount --bind {tmp_path}/shared /shared && cd {ROOT} && exec {command.format(rank)}"
            words = [*hosts.enter, *f"ip netns exec n{rank} unshare --mount bash -c".split(), script]
            nodes.append(subprocess.Popen(words, env=env, stdout=-1, stderr=-2, text=True))
        said = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        hosts.close()
        if made:
            shutil.rmtree("/shared")
    assert [node.returncode for node in nodes] == [0, 0], said
    assert ", 4 processes" in said[0] and "wikitext-2-raw-v1" in said[0], said
    assert (tmp_path / "shared/outputs/gemma-270m/model.safetensors").exists()


# ── On this machine ──────────────────────────────────────────────────────────────────────────────────────────────────


def node(rank, flags, **settings):
    """Start run_node0.sh or run_node1.sh."""
    command = ["bash", ROOT / f"run_node{rank}.sh", *map(str, flags)]
    env = os.environ | {"PATH": PATH, "MAIN_NODE_IP": "127.0.0.1"} | {name: str(settings[name]) for name in settings}
    return subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True, start_new_session=True)


@pytest.mark.slow
def test_two_nodes_train_together_stop_together_and_go_on(launched_flags, tmp_path):
    """S5 to S7, C5, N1 to N3, N5, B10: SIGTERM to either script saves on both; the same commands end the same."""

    def both(output):
        settings = {"MAIN_PORT": free_port(), "TOTAL_GPUS": 2, "OUTPUT_DIR": output}
        return [node(rank, launched_flags, **settings) for rank in (0, 1)]

    whole = both(tmp_path / "whole")
    said = [process.communicate() for process in whole]
    assert [process.returncode for process in whole] == [0, 0], said
    assert "2 processes" in said[0][0] and "2 processes" not in said[1][0]
    for rank in (0, 1):
        output = tmp_path / f"stopped{rank}"
        nodes = both(output)
        wait_for(output / "checkpoint-4", nodes[rank])
        nodes[rank].send_signal(signal.SIGTERM)
        said = [process.communicate() for process in nodes]
        assert all(process.returncode for process in nodes)
        assert "stopped by SIGTERM at step" in said[0][1] + said[1][1], said
        again = both(output)
        said = [process.communicate() for process in again]
        assert [process.returncode for process in again] == [0, 0] and "Going on from" in said[0][0], said
        assert in_child(same_weights, tmp_path / "whole", output)


@pytest.mark.slow
def test_a_single_process_takes_the_place_of_its_script(launched_flags, tmp_path):
    """N5, B10: no launcher and no shell in between: SIGTERM ends it with 143."""
    output = tmp_path / "out"
    process = node(0, launched_flags, NUM_MACHINES=1, TOTAL_GPUS=1, GPUS=0, OUTPUT_DIR=output)
    wait_for(output / "checkpoint-2", process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM at step" in process.communicate()[1] and process.returncode == 143


def test_wrong_settings_and_the_guide_are_said():
    """N1, N4: ranks and totals that do not fit end with status 2; no argument prints the guide."""
    guide = launch("bash", ROOT / "multinode_train.sh", env={"TOTAL_GPUS": "8"})
    assert guide.status == 0 and "TOTAL_GPUS=8" in guide.out and "3 machines × 2 GPUs" in guide.out
    for words, env in ((["multinode_train.sh", "x"], {}), (["multinode_train.sh", "2"], {}),
                       (["run_node1.sh"], {"TOTAL_GPUS": "3"})):  # fmt: skip
        done = launch("bash", ROOT / words[0], *words[1:], env=env)
        assert done.status == 2 and done.err.startswith("multinode_train.sh: ") and done.out == ""


@pytest.mark.parametrize("words, seconds", [([], 600), (["--ddp_timeout", "10"], 10), (["--ddp-timeout=7"], 7),
                                            (["--ddp_timeout=9", "main.py", "--ddp-timeout", "8", "--bf16"], 8),
                                            (["--ddp_timeout"], 600), (["--ddp_timeout", "x"], 600)])  # fmt: skip
def test_the_launcher_reads_ddp_timeout_as_main_py_does(words, seconds):
    """B10: both forms, dashes, the last one counts; main.py complains of a wrong value."""
    assert launcher.ddp_timeout(words) == seconds


def end(watch, rank, monkeypatch, *how):
    """Let the part of a machine end. Returns: its exit status."""
    monkeypatch.setattr(launcher, "SELF", {"machine": rank, "name": f"node{rank}"})
    return watch.finish(*how)


def test_the_reason_of_one_machine_is_said_on_all_others(three_watches, monkeypatch, capfd):
    """B10, C5: also on a third machine, which takes over a status after which MAX_RETRIES does not try again."""
    assert end(three_watches[1], 1, monkeypatch, 2, "--train_file x: no such file", False) == 2
    assert end(three_watches[0], 0, monkeypatch, 1, launcher.LOST, True) == 2
    assert end(three_watches[2], 2, monkeypatch, 1, launcher.LOST, True) == 2
    assert capfd.readouterr().err == "launch.py: node1: --train_file x: no such file\n" * 2


def test_a_machine_that_is_lost_without_a_word_is_named(three_watches, monkeypatch, capfd):
    """B10: kill -9 of a launcher or machine: the machine that sees the connection end tells the third one."""
    three_watches[1].links[0].close()
    assert end(three_watches[0], 0, monkeypatch, 134, launcher.LOST, True) == 134
    assert end(three_watches[2], 2, monkeypatch, 1, launcher.LOST, True) == 1
    assert capfd.readouterr().err == "launch.py: the connection to machine 1 is lost\n" * 2


def test_silence_is_spoken_of_and_waited_for(three_watches, monkeypatch, capfd):
    """B10: first after half a minute, then every 15 seconds; the end comes a minute after --ddp_timeout."""
    ended = []
    monkeypatch.setattr(launcher.signal, "pthread_kill", lambda *words: ended.append(words))
    began = time.monotonic()
    for second in range(0, 665, 5):
        monkeypatch.setattr(launcher.time, "monotonic", lambda now=began + second: now)
        if not three_watches[0].given_up:
            three_watches[0].check(began + second)
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("warning  nothing was heard of machine 1, machine 2 for 30 seconds: is it down, or the")
    assert said[0].endswith("the run waits for --ddp_timeout 600 seconds") and len(said) == 44, said
    assert said[-1] == "launch.py: nothing was heard of machine 1, machine 2 for 660 seconds, so the run ends"
    assert len(ended) == 1
