"""Two machines and the scripts that launch them: network namespaces joined by a cable, or two launchers on this one.

The nodes run run_node0.sh and run_node1.sh as they are. What happened to them, and how long it took until both had
ended, is printed as a table at the end of the tests.
"""

import fcntl
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import (
    GOOD,
    MACHINE_TABLE,
    NAMESPACE,
    PATH,
    PATIENCE,
    ROOT,
    SAVE,
    SCRATCH,
    Hosts,
    finish,
    free_port,
    in_child,
    last_wins,
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


IPV6 = ("fd00:77::1", "fd00:77::2")
READY = '[ -z "$(ip -6 addr show tentative)" ]'  # Linux looks for twins of an address before it can be used


@pytest.mark.slow
def test_two_machines_without_ipv4_train_the_same(undisturbed, machine_flags, tmp_path):
    """C5, N1 to N3: over IPv6 alone; the sums of the gradients come over the cable, and the weights are equal."""
    hosts, output = Hosts(tmp_path, IPV6), tmp_path / "out"
    before = f"until {READY}; do sleep 0.1; done; ! hostname -I | grep -F ."
    nodes = hosts.both(*machine_flags, MAIN_NODE_IP=f"[{IPV6[0]}]", OUTPUT_DIR=output, before=before)
    assert [node.wait(120) for node in nodes] == [0, 0], [node.said() for node in nodes]
    hosts.close()
    assert in_child(same_weights, undisturbed, output)


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
    flags = last_wins([*machine_flags, "--ddp_timeout", 40])  # longer than a directory is looked for
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


MEETING = """
ip link set lo up
ip addr add fd00:77::1/64 dev lo nodad
mount --bind $0/hosts /etc/hosts
mount --bind $0/resolv.conf /etc/resolv.conf
mount --bind $0/nsswitch.conf /etc/nsswitch.conf
eval "$1"
bash "$2/multinode_train.sh" 0 >$0/zero 2>&1 &
TOTAL_GPUS=4 bash "$2/multinode_train.sh" 1 >$0/one 2>&1
echo $? >>$0/one
wait $!
echo $? >>$0/zero
kill $(jobs -p)
"""
NAMES = "127.0.0.1 node0 both\nfd00:77::1 node6 both\n10.77.0.9 elsewhere\nfd00:77::9 elsewhere6\n"


def meeting(folder, address, before="", lookups="files", **settings):
    """Two launchers on a machine of its own that differ in TOTAL_GPUS. Returns: the words of each, the seconds."""
    need("ip")
    (folder / "hosts").write_text(NAMES)
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    (folder / "nsswitch.conf").write_text(f"hosts: {lookups}\n")
    env = {"PATH": PATH, "MAIN_NODE_IP": address, "OUTPUT_DIR": folder, "TOTAL_GPUS": 2, "NODE_WAIT": 9} | settings
    began = time.time()
    launch(*NAMESPACE, MEETING, folder, before, ROOT, env={name: str(value) for name, value in env.items()})
    said = [(folder / name).read_text() for name in ("zero", "one")]
    assert all(words.endswith("\n2\n") and "Traceback" not in words for words in said), said
    return said, time.time() - began


@pytest.mark.slow
@pytest.mark.parametrize("address", ["::1", "[::1]", "fd00:77::1", "[fd00:77::1]", "FD00:77:0::1", "node6", "127.0.0.1",
                                     "127.0.0.5", "node0", "both"])  # fmt: skip
def test_every_form_of_an_address_of_this_machine_is_known_and_reached(address, tmp_path):
    """N1: IPv4, IPv6, in brackets or not, and names: the machines meet, and say with which address the other came."""
    said, seconds = meeting(tmp_path, address)
    here = "127.0.0.1" if address.startswith(("127", "node0")) else "(127.0.0.1|::1|fd00:77::1)"
    for words in said:
        assert re.search(f"launch.py: TOTAL_GPUS is 4 at {here} and 2 on the main machine: make them the same", words)
    assert seconds < 6


@pytest.mark.parametrize("address", ["nowhere", "nowhere.example.com", "10.0.0.300", "a..b", "fe80::1", "FE80::1%lo",
                                     "fd00:77::1%lo", "::", "0.0.0.0"])  # fmt: skip
def test_a_main_address_by_which_nobody_is_reached_is_said_at_once_by_both(address, tmp_path):
    """N1, N3: an unknown name, one that is no name, link-local addresses, those that mean any machine."""
    said, seconds = meeting(tmp_path, address)
    for words in said:
        assert f"MAIN_NODE_IP={address} " in words and " waiting: " not in words, words
        assert "set it on all machines to one of `hostname -I` of the main machine" in words, words
    assert seconds < 6


@pytest.mark.slow
@pytest.mark.parametrize("address, shown", [("elsewhere", "elsewhere"), ("elsewhere6", "elsewhere6"),
                                            ("fd00:77::9", "[fd00:77::9]")])  # fmt: skip
def test_an_address_of_another_machine_is_refused_by_the_main_one_alone(address, shown, tmp_path):
    """N1, N3: the other machine tries it until NODE_WAIT is over, as the main one may come up later."""
    (zero, one), _ = meeting(tmp_path, address, NODE_WAIT=3)
    assert f"MAIN_NODE_IP={address} is no address of this machine (Cannot assign requested address)" in zero, zero
    assert f"given up after NODE_WAIT=3 s: {shown}:29500 cannot be reached (" in one, one


NAME_SERVER = """
import socket, time
time.sleep({sleep})
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
while True:
    asked, who = server.recvfrom(512)
    found = {known} and asked[-3] == 1  # an IPv4 address
    head = bytes.fromhex("8180 0001 0001 0000 0000" if found else "8180 0001 0000 0000 0000" if {known} else
                         "8183 0001 0000 0000 0000")
    record = bytes.fromhex("c00c 0001 0001 0000003c 0004 7f000001")
    server.sendto(asked[:2] + head + asked[12:] + record * found, who)
"""


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_a_name_server_that_comes_late_is_waited_for_and_named(known, tmp_path):
    """N1, N3: no answer is no verdict; once it answers the name is used, or refused."""
    (tmp_path / "server.py").write_text(NAME_SERVER.format(sleep=4, known=known))
    said, seconds = meeting(tmp_path, "main.example", "python $0/server.py &", "dns", NODE_WAIT=30)
    for words in said:
        assert words.count("waiting: no name server answers for MAIN_NODE_IP=main.example (Temporary failure") == 1
        end = "TOTAL_GPUS is 4 at 127.0.0.1" if known else "MAIN_NODE_IP=main.example cannot be found"
        assert f"launch.py: {end}" in words, words
    assert 4 < seconds < 15


@pytest.mark.slow
def test_without_a_name_server_both_give_up_after_node_wait(tmp_path):
    """N1, N3: with the cause, and what needs no name server."""
    said, _ = meeting(tmp_path, "main.example", lookups="dns", NODE_WAIT=3)
    for words in said:
        assert "given up after NODE_WAIT=3 s: no name server answers for MAIN_NODE_IP=main.example" in words, words
        assert "an address needs none" in words, words


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
    nodes = hosts.both(*last_wins([*machine_flags, "--ddp_timeout", 600]), OUTPUT_DIR=tmp_path / "out")
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


def on_terminal(terminal):
    """Arguments for Popen: a session of its own, with a terminal if one is given."""
    take = None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    return {"stdin": terminal, "start_new_session": True, "preexec_fn": take}


def gone(pids, seconds):
    """Wait until processes have ended. Returns: those that have not."""
    until = time.time() + seconds
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.time() < until:
        time.sleep(0.1)
    return alive


def node(rank, flags, terminal=None, **settings):
    """Start run_node0.sh or run_node1.sh, on a terminal if one is given."""
    command = ["bash", ROOT / f"run_node{rank}.sh", *map(str, flags)]
    env = os.environ | {"PATH": PATH, "MAIN_NODE_IP": "127.0.0.1"} | {name: str(settings[name]) for name in settings}
    how = {"stdout": -1, "stderr": -1, "text": True} | on_terminal(terminal)
    return subprocess.Popen(command, env=env, **how)


@pytest.mark.slow
def test_two_nodes_train_together_stop_together_and_go_on(launched_flags, tmp_path):
    """S5 to S7, C5, N1 to N3, N5, B10: SIGTERM to either script saves on both; the same commands end the same."""

    def both(output, retries=0):
        settings = {"MAIN_PORT": free_port(), "TOTAL_GPUS": 2, "OUTPUT_DIR": output, "MAX_RETRIES": retries}
        return [node(rank, launched_flags, **settings) for rank in (0, 1)]

    whole = both(tmp_path / "whole")
    said = [process.communicate() for process in whole]
    assert [process.returncode for process in whole] == [0, 0], said
    assert "2 processes" in said[0][0] and "2 processes" not in said[1][0]
    for rank in (0, 1):
        output = tmp_path / f"stopped{rank}"
        nodes = both(output, retries=2 * rank)
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
@pytest.mark.parametrize("retries", [0, 2])
def test_ctrl_c_saves_on_both_and_kill_9_leaves_nothing(launched_flags, tmp_path, keyboard, retries):
    """B10: Ctrl-C in the terminal of a script stops once, on both machines, and kill -9 of the script ends the rest."""
    output = tmp_path / "out"

    def both(terminal=None):
        settings = {"MAIN_PORT": free_port(), "TOTAL_GPUS": 2, "OUTPUT_DIR": output, "MAX_RETRIES": retries}
        return node(0, launched_flags, terminal, **settings), node(1, launched_flags, **settings)

    nodes = both(keyboard[1])
    wait_for(output / "checkpoint-4", nodes[0])
    os.write(keyboard[0], b"\x03")
    said = [process.communicate() for process in nodes]
    assert [process.returncode for process in nodes] == [130, 130], said
    errors = said[0][1] + said[1][1]
    assert errors.count("Stopping: a checkpoint is saved") <= 2 and "joining in again" not in errors, said
    saved = re.search(r"stopped by SIGINT at step (\d+)", errors)
    assert steps(output)[-1] == int(saved[1]) < 60, said

    nodes = both()
    wait_for(output / f"checkpoint-{int(saved[1]) // 2 * 2 + 4}", nodes[0])
    below = [pid for process in nodes for pid in tree(process.pid)]
    assert len(below) == (6 if retries else 4), below
    nodes[0].kill()
    said = [process.communicate() for process in nodes]
    assert nodes[0].returncode == -9 and nodes[1].returncode > 0 and "Going on from" in said[0][0], said
    assert not gone(below, 30)


@pytest.mark.slow
def test_a_single_process_takes_the_place_of_its_script(launched_flags, tmp_path):
    """N5, B10: no launcher and no shell in between: SIGTERM ends it with 143."""
    output = tmp_path / "out"
    process = node(0, launched_flags, NUM_MACHINES=1, TOTAL_GPUS=1, GPUS=0, OUTPUT_DIR=output)
    wait_for(output / "checkpoint-2", process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM at step" in process.communicate()[1] and process.returncode == 143


def settings_of(script):
    """{name: default} of the settings of a script that are also environment variables."""
    return dict(re.findall(r"\b(\w+)=\$\{\1:-(.*?)\}", (ROOT / script).read_text()))


def test_the_scripts_and_the_readme_have_the_same_settings(tmp_path):
    """N1: three at the top of both scripts, which everything else takes from there, also when they are edited."""
    settings = settings_of("run_node0.sh")
    assert list(settings) == ["MAIN_NODE_IP", "GPUS", "TOTAL_GPUS"] and settings == settings_of("run_node1.sh")
    assert not settings.keys() & settings_of("multinode_train.sh").keys(), "a second default"
    clean, known = dict.fromkeys(settings, ""), settings | settings_of("multinode_train.sh")
    guide = launch("bash", ROOT / "multinode_train.sh", env=clean).out
    assert all(f"{name}={value}" in guide for name, value in known.items())
    checker = (ROOT / "verify_setup.sh").read_text()
    assert not [value for value in known.values() if len(value) > 3 and value in checker], "a second default"
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    assert all(name in pages for name in settings)
    assert set(re.findall(r"MAIN_NODE_IP=(192[.0-9]+)|main_process_ip (192[.0-9]+)", pages)) <= {
        (settings["MAIN_NODE_IP"], ""), ("", settings["MAIN_NODE_IP"])}  # fmt: skip
    for name in ("multinode_train.sh", "run_node0.sh", "run_node1.sh", "verify_setup.sh"):
        shutil.copy(ROOT / name, tmp_path)
    for rank in (0, 1):
        script = tmp_path / f"run_node{rank}.sh"
        script.write_text(script.read_text().replace("MAIN_NODE_IP:-", f"MAIN_NODE_IP:-{rank}"))
    (tmp_path / "tools").mkdir()
    for name in ("launch", "preflight"):
        (tmp_path / f"tools/{name}.py").write_text("import os; print(os.environ['MAIN_NODE_IP'])")
    calls = [(f"{script}.sh {rank}", rank) for script in ("multinode_train", "verify_setup") for rank in range(3)]
    for words, rank in ("run_node0.sh", 0), ("run_node1.sh", 1), *calls:
        command = ["bash", *f"{tmp_path}/{words}".split()]
        assert launch(*command, env=clean).out == f"{min(rank, 1)}{settings['MAIN_NODE_IP']}\n"
        assert launch(*command, env={"MAIN_NODE_IP": "x"}).out == "x\n"


def test_the_guide_is_printed_without_arguments():
    """N1, N4: with the settings as they are now."""
    guide = launch("bash", ROOT / "multinode_train.sh", env={"TOTAL_GPUS": "8", "MAX_RETRIES": "5"})
    assert guide.status == 0 and "3 machines × 2 GPUs" in guide.out and guide.err == ""
    assert "TOTAL_GPUS=8" in guide.out and "MAX_RETRIES=5" in guide.out and "--num_processes 8" in guide.out


NVIDIA_SMI = """#!/bin/sh
echo 'GPU 0: NVIDIA H100 (UUID: GPU-8d7d-1)
  MIG 1g.10gb Device 0: (UUID: MIG-5f5f-2)
GPU 1: NVIDIA H100 (UUID: GPU-9e7d-3)'
"""
WRONG = {  # rank, settings, words of the sentence; two GPUs are here
    "no rank": ("--bf16", {}, "the rank of this machine is a whole number such as 0, not '--bf16'"),
    "a rank too many": (2, {}, "rank 2 needs NUM_MACHINES=3 or more, on every machine"),
    "no machines": (0, {"NUM_MACHINES": 0}, "rank 0 needs NUM_MACHINES=1 or more"),
    "no number": (0, {"MAIN_PORT": "-1"}, "MAIN_PORT is a whole number such as 29500, not '-1'"),
    "uneven": (1, {"TOTAL_GPUS": 3}, "TOTAL_GPUS=3 cannot be shared evenly by NUM_MACHINES=2"),
    "no processes": (0, {"TOTAL_GPUS": 0}, "TOTAL_GPUS=0 cannot be shared evenly"),
    "a list with spaces": (0, {"GPUS": "0, 1"}, "GPUS is a list such as 2,3, not '0, 1'"),
    "a GPU that is missing": (0, {"GPUS": "1,2"}, "GPUS=1,2: no GPU 2 among the 2 here"),
    "a name that is missing": (0, {"GPUS": "0,GPU-7"}, "no GPU GPU-7 among the 2 here"),
    "fewer GPUs than processes": (0, {"GPUS": "1"}, "TOTAL_GPUS=4 over NUM_MACHINES=2 are 2 here: GPUS=1 lists fewer"),
    "one GPU twice": (0, {"GPUS": "1,1"}, "GPUS=1,1 lists fewer"),
    "no output": (0, {"OUTPUT_DIR": "/proc/no"}, "OUTPUT_DIR=/proc/no cannot be written: mount the shared storage"),
    "nothing": (0, {}, "given up after NODE_WAIT=0 s: rank 1 has not come to 127.0.0.1:"),
    "nothing, by names": (0, {"GPUS": "GPU-8d,MIG-5f5f-2"}, "given up after NODE_WAIT=0 s: rank 1 has not come"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_said_at_once(case, tmp_path):
    """N1, N2: in one sentence with status 2, before torch is loaded; MAX_RETRIES does not try again."""
    rank, settings, words = WRONG[case]
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{PATH}", "MAIN_NODE_IP": "127.0.0.1", "MAIN_PORT": free_port(), "GPUS": "0,1",
           "OUTPUT_DIR": tmp_path, "NODE_WAIT": 0, "MAX_RETRIES": 3} | settings  # fmt: skip
    began = time.time()
    done = launch("bash", ROOT / "multinode_train.sh", rank, env={name: str(value) for name, value in env.items()})
    assert done.status == 2 and done.out == "" and time.time() - began < 2
    assert done.err.startswith(f"launch.py: {words}") or words in done.err, done.err
    assert done.err.count("\n") == 1, done.err


def together(*nodes):
    """Wait for nodes of node(). Returns: status, stdout and stderr of each."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        said = [*pool.map(lambda process: process.communicate(timeout=60), nodes)]
    return [(process.returncode, *words) for process, words in zip(nodes, said, strict=True)]


def test_two_runs_on_one_port_end_in_a_sentence_each(tmp_path):
    """N1, N3: the port of a run that waits is taken; a machine of the other run is known by its OUTPUT_DIR."""
    one, other = ({"MAIN_PORT": free_port(), "TOTAL_GPUS": 2, "OUTPUT_DIR": tmp_path / "one", "NODE_WAIT": 30},
                  {"TOTAL_GPUS": 2, "OUTPUT_DIR": tmp_path / "other"})  # fmt: skip
    first = node(0, [], **one)
    while " waiting: rank 1 has not come" not in first.stderr.readline():
        assert first.poll() is None
    ((status, _, said),) = together(node(0, [], **one | other))
    assert status == 2 and f"MAIN_PORT={one['MAIN_PORT']} cannot be used here (Address already in use)" in said
    for status, _, said in together(first, node(1, [], **one | other)):
        words = f"OUTPUT_DIR is {tmp_path}/other at 127.0.0.1 and {tmp_path}/one on the main"
        assert status == 2 and words in said, said


@pytest.mark.parametrize("total", [1, 2])
def test_missing_packages_are_said_before_the_others_are_waited_for(total, tmp_path):
    """N1: a Python without packages: both scripts end in a fraction of a second, also the one that has no meeting."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    (tmp_path / "tools").mkdir()
    for name in ("multinode_train.sh", "run_node0.sh", "run_node1.sh", "tools/launch.py", "main.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    env = {"PATH": f"{tmp_path}/bare/bin:{PATH}", "OUTPUT_DIR": str(tmp_path), "TOTAL_GPUS": str(total),
           "NUM_MACHINES": str(total), "MAIN_NODE_IP": "127.0.0.1", "MAIN_PORT": str(free_port())}  # fmt: skip
    for rank in range(total):
        began = time.time()
        done = launch("bash", tmp_path / f"run_node{rank}.sh", env=env)
        assert done.status == 2 and done.out == "" and time.time() - began < 2, done
        assert done.err == (f"launch.py: {tmp_path}/bare/bin/python lacks torch, accelerate, transformers, datasets: "
                            "bash verify_setup.sh says how to install them\n")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("broken", [[0], [1], [0, 1]])
def test_a_torch_that_cannot_be_loaded_ends_both_machines_at_once(broken, no_torch, tmp_path):
    """N1, C5: half an installation, on one of them or on both: they meet once more, and each says it; no traceback."""
    settings = {"MAIN_PORT": free_port(), "TOTAL_GPUS": 2, "OUTPUT_DIR": tmp_path, "MAX_RETRIES": 2}
    nodes = [node(rank, [], **settings | (no_torch if rank in broken else {})) for rank in (0, 1)]
    both = "PyTorch or accelerate is broken (libcudart.so.13: cannot open shared object file): bash verify_setup.sh"
    main, other = ("broken" if rank in broken else "sound" for rank in (0, 1))
    for status, _, said in together(*nodes):
        assert status == 2 and "Traceback" not in said, said
        words = f"PyTorch is {other}.* at 127.0.0.1 and {main}.* on the main machine" if len(broken) == 1 else both
        assert re.search(words if len(broken) == 1 else re.escape(words), said), said


def launched(machines, port, folder):
    """What train() returns for a main machine whose port is taken behind the meeting."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    launcher.MACHINES, launcher.TOTAL, launcher.PORT, launcher.PLACE = machines, 2, port, f"127.0.0.1:{port}"
    return launcher.train(launcher.Watch({}, 9), ["--output_dir", str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("machines, address", [(2, "127.0.0.1"), (2, "127.0.0.2"), (1, "127.0.0.2")])
def test_a_port_that_is_taken_behind_the_meeting_ends_in_a_sentence(machines, address, tmp_path, capfd):
    """B10, N3: accelerate sees a program on localhost, torch's store one at any address; MAX_RETRIES tries again."""
    with socket.create_server((address, 0)) as server:
        status, words, lost = in_child(launched, machines, server.getsockname()[1], tmp_path)
    said = capfd.readouterr().err
    assert status == 1 and not lost and re.search("EADDRINUSE|another process is utilizing it", words), words
    assert f"launch.py: {words}" in said and "Traceback" not in said, said


TRY = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tools import launch
launch.MAX_RETRIES = 2
launch.keep_trying()
came = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: came.append(number))
print("try", os.getpid(), flush=True)
"""
WAIT = """
while not came:
    time.sleep(0.01)
time.sleep(0.5)
print(*map(int, came))
sys.exit(128 + came[0])
"""


def attempt(what, wait=True, **how):
    """Start a program that does something in each of its three tries, once the first one has begun."""
    process = subprocess.Popen([sys.executable, "-c", TRY + what], stdout=-1, stderr=-1, text=True, **how)
    return process, process.stdout.readline().split()[1]


@pytest.mark.parametrize("what, status, tries", [("sys.exit(1)", 1, 3), ("os.kill(os.getpid(), 9)", 137, 3),
                                                 ("pass", 0, 1), ("sys.exit(2)", 2, 1), ("sys.exit(130)", 130, 1),
                                                 ("sys.exit(143)", 143, 1)])  # fmt: skip
def test_a_loss_is_tried_again_and_an_end_is_not(what, status, tries):
    """B10: MAX_RETRIES=2; success, a wrong call and a stop on another machine are the end."""
    process, _ = attempt(what)
    out, err = process.communicate()
    assert process.returncode == status and out.count("try") == tries - 1, (out, err)
    assert err == "".join(f"launch.py: status {status}; joining in again, {number} of MAX_RETRIES=2\n"
                          for number in range(1, tries))  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_ends_the_tries(number):
    """B10: the launcher hears the signal that came; its status is that of the script."""
    process, _ = attempt(WAIT)
    process.send_signal(number)
    assert process.communicate() == (f"{int(number)}\n", "") and process.returncode == 128 + number


def test_every_signal_is_passed_on():
    """B10: a second Ctrl-C insists, as it does without MAX_RETRIES."""
    process, _ = attempt(WAIT)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.communicate()[0] == "2 2\n" and process.returncode == 130


@pytest.mark.parametrize("delay", [0, 0.0003, 0.001, 0.003, 0.01])
def test_a_signal_between_two_tries_is_not_lost(tmp_path, delay):
    """B10: it comes from a process that outlives the first try; the second one ends, and there is no third."""
    again = WAIT.replace("\n", "\n    ")
    what = (f"first = os.getppid()\ntry:\n    os.mkdir({str(tmp_path / 'tried')!r})\nexcept FileExistsError:{again}\n"
            f"if os.fork():\n    os._exit(1)\ntime.sleep({delay})\nos.kill(first, 15)\nos._exit(0)\n")  # fmt: skip
    process, _ = attempt(what)
    _, err = process.communicate(timeout=10)
    assert process.returncode in (1, 143) and err.count("joining in again") == (process.returncode == 143), err


def test_ctrl_c_in_a_terminal_reaches_the_launcher_once(keyboard):
    """B10: a terminal sends it to all processes of the script; the launcher is not among them."""
    process, _ = attempt(WAIT, **on_terminal(keyboard[1]))
    os.write(keyboard[0], b"\x03")
    assert process.communicate() == ("2\n", "") and process.returncode == 130


def test_nothing_is_left_after_kill_9_of_the_first_process():
    """B10: Linux sends its launcher a SIGTERM."""
    process, launched = attempt(WAIT)
    process.kill()
    assert process.communicate() == ("15\n", "") and process.returncode == -9
    assert not gone([int(launched)], 5)


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 3])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_while_the_others_are_waited_for_ends_the_script(tmp_path, retries, number, status):
    """B10: at once, also between two tries; nothing is left."""
    settings = {"MAIN_PORT": free_port(), "TOTAL_GPUS": 2, "OUTPUT_DIR": tmp_path, "MAX_RETRIES": retries}
    process = node(0, [], **settings)
    while " waiting: rank 1 has not come" not in process.stderr.readline():
        assert process.poll() is None
    below = [*tree(process.pid)]
    assert len(below) == (2 if retries else 1)
    process.send_signal(number)
    assert process.wait(5) == (status if retries or status < 0 else -number)
    assert not gone(below, 5)


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
