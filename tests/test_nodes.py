"""The node scripts: two launchers on this machine, as two machines would start them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, in_child, launch, write_jsonl
from test_hub import ACCELERATE, free_port
from test_training import same_weights
from test_unkillable import wait_for

from tools import launch as launcher

PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


@pytest.fixture
def flags(tiny, tmp_path):
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    text = write_jsonl(tmp_path / "train.jsonl", [topics[name] for name in ("with", "while", "try")])
    return ["--model_name_or_path", tiny, "--train_file", text, "--max_seq_length", 64, "--no_truncation",
            "--cache_dir", tmp_path / "cache", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
            "--max_steps", 60, "--save_steps", 2, "--learning_rate", 1e-3, "--warmup_steps", 0,
            "--report_to", "none"]  # fmt: skip


def node(rank, flags, **settings):
    """Start run_node0.sh or run_node1.sh."""
    command = ["bash", ROOT / f"run_node{rank}.sh", *map(str, flags)]
    env = os.environ | {"PATH": PATH, "MAIN_NODE_IP": "127.0.0.1"} | {name: str(settings[name]) for name in settings}
    return subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True, start_new_session=True)


@pytest.mark.slow
def test_two_nodes_train_together_stop_together_and_go_on(flags, tmp_path):
    """S5 to S7, C5, N1 to N3, N5, B10: SIGTERM to either script saves on both; the same commands end the same."""

    def both(output):
        settings = {"MAIN_PORT": free_port(), "TOTAL_GPUS": 2, "OUTPUT_DIR": output}
        return [node(rank, flags, **settings) for rank in (0, 1)]

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
def test_a_single_process_takes_the_place_of_its_script(flags, tmp_path):
    """N5, B10: no launcher and no shell in between: SIGTERM ends it with 143."""
    output = tmp_path / "out"
    process = node(0, flags, NUM_MACHINES=1, TOTAL_GPUS=1, GPUS=0, OUTPUT_DIR=output)
    wait_for(output / "checkpoint-2", process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM at step" in process.communicate()[1] and process.returncode == 143


CONFIG = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: {}
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: {}
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, processes", [("MULTI_GPU", "2 processes"), ("MULTI_CPU", "1 process,")])
def test_a_file_of_accelerate_config_is_followed(flags, tmp_path, kind, processes):
    """C9: that of two GPUs trains in two processes on the CPU; that of two CPUs is for mpirun, and trains in one."""
    config = tmp_path / "default_config.yaml"
    config.write_text(CONFIG.format(kind, "true" if kind == "MULTI_CPU" else "false\ngpu_ids: 2,3"))
    words = [ACCELERATE, "launch", "--config_file", config, "--main_process_port", free_port(), ROOT / "main.py"]
    done = launch(*words, *flags, "--max_steps", 2, "--output_dir", tmp_path / "out")
    assert done.status == 0 and f"device   cpu, {processes}" in done.out, done
    assert done.out.count("Done: the model is in") == 1


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


@pytest.fixture
def three(monkeypatch):
    """What the machines 0, 1 and 2 know of each other: machine 0 is connected to both others."""
    monkeypatch.setattr(launcher, "MACHINES", 3)
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    watches = []
    for rank, links in enumerate([{key: pair[0] for key, pair in pairs.items()}, {0: pairs[1][1]}, {0: pairs[2][1]}]):
        monkeypatch.setattr(launcher, "RANK", rank)
        watches.append(launcher.Watch(links, 600))
    return watches


def end(watch, rank, monkeypatch, *how):
    """Let the part of a machine end. Returns: its exit status."""
    monkeypatch.setattr(launcher, "SELF", {"machine": rank, "name": f"node{rank}"})
    return watch.finish(*how)


def test_the_reason_of_one_machine_is_said_on_all_others(three, monkeypatch, capfd):
    """B10, C5: also on a third machine, which takes over a status after which MAX_RETRIES does not try again."""
    assert end(three[1], 1, monkeypatch, 2, "--train_file x: no such file", False) == 2
    assert end(three[0], 0, monkeypatch, 1, launcher.LOST, True) == 2
    assert end(three[2], 2, monkeypatch, 1, launcher.LOST, True) == 2
    assert capfd.readouterr().err == "launch.py: node1: --train_file x: no such file\n" * 2


def test_a_machine_that_is_lost_without_a_word_is_named(three, monkeypatch, capfd):
    """B10: kill -9 of a launcher or machine: the machine that sees the connection end tells the third one."""
    three[1].links[0].close()
    assert end(three[0], 0, monkeypatch, 134, launcher.LOST, True) == 134
    assert end(three[2], 2, monkeypatch, 1, launcher.LOST, True) == 1
    assert capfd.readouterr().err == "launch.py: the connection to machine 1 is lost\n" * 2


def test_silence_is_spoken_of_and_waited_for(three, monkeypatch, capfd):
    """B10: first after half a minute, then every 15 seconds; the end comes a minute after --ddp_timeout."""
    ended = []
    monkeypatch.setattr(launcher.signal, "pthread_kill", lambda *words: ended.append(words))
    began = time.monotonic()
    for second in range(0, 665, 5):
        monkeypatch.setattr(launcher.time, "monotonic", lambda now=began + second: now)
        if not three[0].given_up:
            three[0].check(began + second)
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("warning  nothing was heard of machine 1, machine 2 for 30 seconds: is it down, or the")
    assert said[0].endswith("the run waits for --ddp_timeout 600 seconds") and len(said) == 44, said
    assert said[-1] == "launch.py: nothing was heard of machine 1, machine 2 for 660 seconds, so the run ends"
    assert len(ended) == 1
