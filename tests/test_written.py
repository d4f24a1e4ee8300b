"""The commands for two machines exactly as they are written, with wikitext and Gemma as small as the stub hub's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_hosts
from conftest import ROOT, launch
from test_hub import GOOD, served  # noqa: F401  a fixture that fills the stub hub

C6 = ("accelerate launch --num_machines 2 --num_processes 4 --machine_rank {} --main_process_ip 192.168.1.100 "
      "--main_process_port 29500 --multi_gpu main.py --dataset_name wikitext "
      "--output_dir /shared/outputs/gemma-270m --bf16")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bash run_node{}.sh", C6], ids=["C5", "C6"])
def test_the_commands_for_two_machines_work(command, tmp_path, monkeypatch):
    """C5, C6: in two network namespaces with the README's addresses; four processes on the CPU, one /shared."""
    first = launch("--dataset_name", "wikitext", "--output_dir", tmp_path / "one", "--max_steps", 1, env=GOOD)
    assert first.status == 0, first.err  # the cache is filled: the namespaces reach no hub
    monkeypatch.setattr(test_hosts, "CABLE", test_hosts.CABLE.replace("10.77.0.$((n + 1))", "192.168.1.$((n + 100))"))
    hosts = test_hosts.Hosts(tmp_path)
    (tmp_path / "shared").mkdir()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "2,3",
                        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    made = not Path("/shared").exists()
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
