"""The node scripts: two launchers on this machine, as two machines would start them."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, in_child, launch, write_jsonl
from test_hub import ACCELERATE, free_port
from test_training import same_weights
from test_unkillable import wait_for

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
