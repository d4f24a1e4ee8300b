"""verify_setup.sh, run as a process: what it says about machines that are ready, and about those that are not.

Most runs put a torch that cannot be imported in front of the real one: that is a check of its own, and saves seconds.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import (
    GOOD,
    INVALID,
    NAMESPACE,
    NARROW,
    ORDINARY,
    PATH,
    ROOT,
    STRANGER,
    cases,
    free_port,
    in_child,
    need,
    plain_user,
    refused,
    run,
)
from hub import StubHub

from tools import preflight

pytestmark = pytest.mark.usefixtures("hub")


def start(*argv, env=None, cwd=None, script=ROOT / "verify_setup.sh", before=(), **pipes):
    """Run the script behind the words of `before`. env: None as a value takes a variable away. Returns: the result."""
    names = ("MAIN_NODE_IP", "NUM_MACHINES", "GPUS", "TOTAL_GPUS", "OUTPUT_DIR", "MODEL", "GLOO_SOCKET_IFNAME")
    need(*before[:1])
    settings = {name: value for name, value in os.environ.items() if name not in names}
    settings |= {"PATH": PATH, "MAIN_PORT": str(free_port())} | (env or {})
    settings = {name: str(value) for name, value in settings.items() if value is not None}
    command = [*map(str, before), shutil.which("bash"), str(script), *map(str, argv)]
    pipes = pipes or {"capture_output": True}
    return subprocess.run(command, env=settings, cwd=cwd, text=True, timeout=60, check=False, **pipes)


def read(report):
    """Return {name of a check: [(status, found -> remedy)]} of a report, whose last line has to add up."""
    *lines, last = report.splitlines()
    checks = {}
    for line in lines:
        status, name, words = re.fullmatch(r"(PASS|WARN|FAIL)  (.{17}|\S{18,}) (\S.*)", line).groups()
        assert (" -> " in words) == (status != "PASS"), line
        checks.setdefault(name.strip(), []).append((status, words))
    count = [sum(status == row[0] for rows in checks.values() for row in rows) for status in ("PASS", "WARN", "FAIL")]
    advice = "mend what FAILs, then run this again" if count[2] else "ready to train"
    assert last == f"{count[0]} passed, {count[1]} warnings, {count[2]} failed: {advice}"
    return checks


def verify(*argv, **more):
    """Run it. Returns: status and seconds, and for each check its list of (status, found -> remedy)."""
    began = time.monotonic()
    done = start(*argv, **more)
    assert done.stderr == "", done.stderr
    checks = read(done.stdout)
    assert done.returncode == ("FAIL" in {row[0] for rows in checks.values() for row in rows})
    return SimpleNamespace(status=done.returncode, seconds=time.monotonic() - began, checks=checks)


def expect(done, name, status, *words):
    """Assert that the last line of check `name` has this status and these words."""
    assert name in done.checks, done.checks
    found = done.checks[name][-1]
    assert found[0] == status and [word for word in words if word not in found[1]] == [], found


# ── The whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_ready_machine_passes_and_nothing_is_left_behind(tmp_path):
    """C2, V1 to V6: every check has its line, none is FAIL, the status is 0; OUTPUT_DIR is not made."""
    done = start(env=GOOD, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert "\033" not in done.stdout and lines[-1].endswith(" 0 failed: ready to train")
    status = {name: rows[-1][0] for name, rows in read(done.stdout).items()}
    for name in ("Python", "PyTorch", "transformers", "datasets", "accelerate", "tensorboard", "output directory",
                 "main port", "addresses", "model access", "all-reduce"):  # fmt: skip
        assert status[name] == "PASS", done.stdout
    assert {status[name] for name in ("CUDA", "chosen GPUs")} == {"WARN"}
    assert {"disk space", "shared storage", "model cache"} < set(status)
    assert "2 processes with gloo agree" in done.stdout
    assert os.listdir(tmp_path) == []


def test_without_torch_the_other_checks_still_run(no_torch, tmp_path):
    """V1, V6: FAIL with the command that installs it, and the lines of all that needs no torch."""
    done = verify(env=no_torch | GOOD | {"OUTPUT_DIR": tmp_path})
    assert done.status == 1
    expect(done, "PyTorch", "FAIL", "libcudart.so.13", "install -r ", "requirements.txt")
    assert "all-reduce" not in done.checks
    for name in ("torch", "output directory", "main port", "model access"):
        expect(done, name, "PASS")


def test_without_python_there_is_one_line(tmp_path):
    """V1, V6: a bare machine is told what to install."""
    shutil.copy(ROOT / "verify_setup.sh", tmp_path)
    shutil.copy(ROOT / "run_node0.sh", tmp_path)
    shutil.copy(ROOT / "multinode_train.sh", tmp_path)
    for name in ("dirname", "grep"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = verify(env={"PATH": tmp_path}, script=tmp_path / "verify_setup.sh")
    assert list(done.checks) == ["Python"] and done.status == 1
    expect(done, "Python", "FAIL", "install Python 3.10")


@pytest.mark.parametrize("argv", [["--jason"], ["now"], ["-1"], ["--model"], ["--model="]])
def test_a_wrong_argument_is_one_sentence(argv):
    """V6: status 2, nothing is checked."""
    done = start(*argv)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("verify_setup.sh: ") and "--help" in done.stderr


SCRIPTS = ("verify_setup.sh", "multinode_train.sh", "run_node0.sh", "run_node1.sh", "tools/preflight.py", "main.py")


def edited(folder, **changes):
    """Copy the scripts to a folder, with changes {name of a setting: its line in run_node1.sh, multinode_train.sh}."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "requirements.txt", folder)
    for path in SCRIPTS:
        text = (ROOT / path).read_text()
        for name, line in changes.items():
            if path in ("run_node1.sh", "multinode_train.sh"):
                text = re.sub(rf"^(export )?{name}=.*", line, text, flags=re.M)
        (folder / path).write_text(text)
    return folder / "verify_setup.sh"


def test_the_settings_of_a_machine_are_those_of_its_scripts(no_torch, tmp_path):
    """V5, N1: `verify_setup.sh RANK` takes what was edited at the top of the scripts, with or without export."""
    port = free_port()
    script = edited(tmp_path, MAIN_NODE_IP='export MAIN_NODE_IP="127.0.0.1"  # ours', TOTAL_GPUS="TOTAL_GPUS=9",
                    MAIN_PORT=f"MAIN_PORT={port}", NUM_MACHINES="  NUM_MACHINES=3")  # fmt: skip
    env = no_torch | {"OUTPUT_DIR": tmp_path, "HF_HUB_OFFLINE": "1", "MAIN_PORT": None}
    done = verify("2", env=env, script=script)
    expect(done, "main node", "FAIL", "127.0.0.1 is this machine, which has rank 2", "correct MAIN_NODE_IP")
    expect(done, "launch settings", "PASS", "3 machines with 3 processes each")
    expect(verify("3", env=env, script=script), "launch settings", "FAIL", "rank 3 needs NUM_MACHINES=4")
    done = verify("0", env=env | {"MAIN_NODE_IP": "127.0.0.1", "TOTAL_GPUS": 6}, script=script)
    expect(done, "main port", "PASS", f"{port} is free")
    expect(done, "launch settings", "PASS", "3 machines with 2 processes each")


def test_a_setting_that_is_no_setting_any_more_is_one_sentence(tmp_path):
    """V6: spaces around =, or a line that was removed."""
    done = start("1", script=edited(tmp_path, GPUS="export GPUS = 0,1"))
    assert done.returncode == 2 and done.stdout == "" and "GPUS" in done.stderr, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number, tmp_path):
    """V6: neither files nor processes, while main.py and the workers are at work."""
    need("pgrep")
    env = {"TMPDIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path), "PATH": PATH, "MODEL": str(tmp_path), "HOME": "/"}
    command = ["bash", ROOT / "verify_setup.sh"]
    process = subprocess.Popen(command, env=env, stdout=-1, text=True, start_new_session=True)
    for line in process.stdout:
        if " requirements.txt " in line:  # of the first package: the slow checks have begun
            break
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number and list(tmp_path.iterdir()) == []
    assert subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout == ""


# ── Packages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_versions_are_compared_with_requirements(no_torch, tmp_path):
    """V3: older or missing is FAIL, newer is WARN, each with the pip command; comments are no requirements."""
    (tmp_path / "tools").mkdir()
    for name in ("verify_setup.sh", "multinode_train.sh", "run_node0.sh", "tools/preflight.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    wanted = ["transformers~=99.1.0  # soon", "datasets==1.0", "no-such-package-here==1", "# accelerate==0", "torch>=1"]
    (tmp_path / "requirements.txt").write_text("\n".join(wanted))
    done = verify(env=no_torch, script=tmp_path / "verify_setup.sh")
    command = f"pip install -r {tmp_path}/requirements.txt"
    expect(done, "transformers", "FAIL", "older", "~=99.1.0", command)
    expect(done, "datasets", "WARN", "newer", "==1.0", command)
    expect(done, "packages", "FAIL", "not installed: no-such-package-here==1 -> ", command)
    expect(done, "torch", "PASS")
    assert "accelerate" not in done.checks


def test_on_a_fresh_machine_all_missing_packages_are_one_line_with_the_command_once(tmp_path):
    """V3, V6: a Python without packages; the other lines are still there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    done = verify(env={"OUTPUT_DIR": tmp_path}, script=edited(tmp_path))
    names = re.findall(r"^[a-z]\S*", (ROOT / "requirements.txt").read_text(), re.M)
    assert len(names) == 5 and done.status == 1
    expect(done, "packages", "FAIL", f"not installed: {', '.join(names)} -> {tmp_path}/.venv/bin/python -m pip install")
    expect(done, "PyTorch", "FAIL", "No module named 'torch' -> see the line packages")
    assert str(done.checks).count("pip install") == 1
    assert not {re.split("[=~]", name)[0] for name in names} & {*done.checks}
    for name in ("Python", "output directory", "main port", "addresses"):
        expect(done, name, "PASS")


# ── GPUs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

FAKE_GPUS = """
import torch, types
cuda, device, join = torch.cuda, torch.device, torch.distributed.init_process_group
cuda.is_available, cuda.device_count, torch.version.cuda = lambda: True, lambda: 2, "13.0"
cuda.get_device_properties = lambda index: types.SimpleNamespace(name="NVIDIA A40", total_memory=48_000_000_000)
cuda.mem_get_info = lambda place: (MEMORY, 48_000_000_000)
cuda.get_device_capability = lambda place: CAPABILITY
torch.device = lambda kind, index=0: device("cpu")
torch.distributed.init_process_group = lambda backend, **more: join("gloo", **more)
"""


def gpus(tmp_path, memory=40_000_000_000, capability=(8, 6), **settings):
    """Run it on a machine whose two A40 compute on the CPU."""
    fake = FAKE_GPUS.replace("MEMORY", str(memory)).replace("CAPABILITY", str(capability))
    (tmp_path / "sitecustomize.py").write_text(fake)
    env = {"PYTHONPATH": tmp_path, "OUTPUT_DIR": tmp_path, "CUDA_VISIBLE_DEVICES": None, "HF_HUB_OFFLINE": "1"}
    return verify(env=env | settings)


@pytest.mark.slow
def test_gpus_that_are_there_are_tried(tmp_path):
    """V1, V2: names, a matrix product on each, free memory, bf16, and a sum over them; TOTAL_GPUS must fit."""
    done = gpus(tmp_path, GPUS="0,1", NUM_MACHINES=2, TOTAL_GPUS=6, MAIN_NODE_IP="127.0.0.1")
    expect(done, "CUDA", "PASS", "13.0")
    expect(done, "GPUs", "PASS", "0: NVIDIA A40 (48 GB), 1: NVIDIA A40 (48 GB)")
    expect(done, "chosen GPUs", "PASS", "0, 1: each multiplied a matrix")
    expect(done, "GPU memory", "PASS", "1: 40.0 of 48.0 GB free")
    expect(done, "bf16", "PASS")
    expect(done, "all-reduce", "PASS", "2 processes with nccl")
    expect(done, "launch settings", "FAIL", "3 processes here for 2 GPUs", "export TOTAL_GPUS=4")


@pytest.mark.slow
def test_gpus_that_are_not_there_fail(tmp_path):
    """V2: the missing ones are named; those that are there are tried, and found to be full and old."""
    done = gpus(tmp_path, memory=3_000_000_000, capability=(7, 0), GPUS="0,7")
    (missing, tried) = done.checks["chosen GPUs"]
    assert missing[0] == "FAIL" and "no GPU 7 among the 2 here" in missing[1] and "GPUS=0,1" in missing[1]
    assert tried[0] == "PASS" and tried[1].startswith("0: each")
    expect(done, "GPU memory", "FAIL", "3.0 of 48.0 GB")
    expect(done, "bf16", "WARN", "--fp16")


@pytest.mark.slow
def test_the_default_choice_of_gpus_is_no_wish(tmp_path):
    """V2: without GPUS a machine that lacks 2 and 3 gets a WARN, and the ones it has are tried."""
    done = gpus(tmp_path)
    missing, tried = done.checks["chosen GPUs"]
    assert missing[0] == "WARN" and "no GPU 2, 3" in missing[1] and "export GPUS=0,1" in missing[1]
    assert tried[0] == "PASS" and tried[1].startswith("0, 1: each")


@pytest.mark.slow
def test_a_gpu_that_cannot_compute_fails(tmp_path):
    """V2, V6: its own error is shown; a list that is none is refused."""
    fake = FAKE_GPUS.replace('torch.device = lambda kind, index=0: device("cpu")\n', "")
    assert fake != FAKE_GPUS
    (tmp_path / "sitecustomize.py").write_text(fake)
    env = {"PYTHONPATH": tmp_path, "OUTPUT_DIR": tmp_path, "CUDA_VISIBLE_DEVICES": None, "HF_HUB_OFFLINE": "1"}
    if subprocess.run([sys.executable, "-c", "import torch; assert not torch.version.cuda"], check=False).returncode:
        pytest.skip("this build of torch may find a real GPU")
    done = verify(env=env | {"GPUS": "1"})
    expect(done, "chosen GPUs", "FAIL", "1: ", "not compiled with CUDA")
    expect(done, "all-reduce", "FAIL")
    expect(verify(env=env | {"GPUS": "0, 1"}), "chosen GPUs", "FAIL", "'0, 1'", "export GPUS=0,1")


@pytest.mark.slow
def test_a_build_of_torch_that_cannot_use_the_gpus_fails(tmp_path):
    """V1: the commonest fault of an installation; driver and build are both named."""
    if subprocess.run([sys.executable, "-c", "import torch; assert not torch.version.cuda"], check=False).returncode:
        pytest.skip("this build of torch may find a real GPU")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 550.54.15\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{PATH}", "OUTPUT_DIR": tmp_path, "CUDA_VISIBLE_DEVICES": None, "HF_HUB_OFFLINE": "1"}
    expect(verify(env=env), "CUDA", "FAIL", "built without CUDA", "driver is 550.54.15", "pytorch.org")


@pytest.mark.slow
def test_an_all_reduce_that_cannot_work_fails(tmp_path):
    """V5, V6: a network interface that is not there stops gloo, and the check says so in seconds."""
    done = verify(env={"GLOO_SOCKET_IFNAME": "wlan7", "OUTPUT_DIR": tmp_path, "HF_HUB_OFFLINE": "1"})
    expect(done, "all-reduce", "FAIL", "2 processes with gloo", "export GLOO_SOCKET_IFNAME=")
    assert done.seconds < 30


# ── Output directory ─────────────────────────────────────────────────────────────────────────────────────────────────

PLACES = {  # case: (shell commands that make "$0", before the script runs), words of the line
    "full": (("mount -t tmpfs -o size=1m none $0; head -c 2m /dev/zero >$0/x 2>/dev/null"), "No space left", "make sp"),
    "read-only": (("mount -t tmpfs -o ro none $0"), "Read-only file system"),
    "a file": ("rmdir $0; touch $0", "Not a directory"),
    "under a file": ("rmdir $0; touch $0; OUTPUT_DIR=$0/outputs", "Not a directory"),
    "a dangling link": ("rmdir $0; ln -s /nowhere/at/all $0", "No such file"),
}


@pytest.mark.parametrize(("make", "words"), cases(PLACES))
def test_an_output_directory_that_cannot_be_written_to_fails(make, words, no_torch, tiny, tmp_path):
    """V6: full, read-only, gone or no directory: tried, with the remedy."""
    (tmp_path / "out").mkdir()
    env = no_torch | {"OUTPUT_DIR": tmp_path / "out", "MODEL": tiny}
    done = start(env=env, before=[*NAMESPACE, f'{make}; exec "$@"', tmp_path / "out"])
    (status, found), = read(done.stdout)["output directory"]
    assert status == "FAIL" and all(word in found for word in (*words, "export OUTPUT_DIR=")), found
    assert done.returncode == 1 and "disk space" not in done.stdout


@pytest.mark.parametrize("again", [pytest.param("", marks=pytest.mark.slow), "mkdir $0"])
def test_a_current_directory_that_was_removed_fails(again, no_torch, tmp_path):
    """V6: also when it was made anew: the shell is still in the old one, where PyTorch's libraries do not load."""
    (tmp_path / "out").mkdir()
    env = no_torch | {"PYTHONPATH": None, "HF_HUB_OFFLINE": "1"} if not again else no_torch
    script = f'cd $0; rmdir $0; {again or ":"}; exec "$@" 2>$0.err'
    done = verify(env=env, before=[*NAMESPACE, script, tmp_path / "out"])
    expect(done, "output directory", "FAIL", f"{tmp_path}/out is gone", "cd to")
    expect(done, "PyTorch", "FAIL" if again else "PASS")


def test_a_directory_of_somebody_else_fails(no_torch, tiny, tmp_path):
    """V6: permissions count, also when root runs the tests; the remedy makes it one's own."""
    (tmp_path / "out").mkdir(mode=0o555)
    env = no_torch | {"OUTPUT_DIR": tmp_path / "out" / "run", "MODEL": tiny}
    done = verify(env=env, before=ORDINARY)
    expect(done, "output directory", "FAIL", "Permission denied", f"sudo chown $USER {tmp_path}/out/run", "OUTPUT_DIR=")


def test_little_space_is_said_before_it_runs_out(no_torch, tiny, tmp_path):
    """V6: less than a checkpoint is FAIL, less than four is WARN; nothing stays in the directory."""
    env = no_torch | {"OUTPUT_DIR": tmp_path, "MODEL": tiny}
    for size, status in (("2g", "FAIL"), ("5g", "WARN"), ("13g", "PASS")):
        script = f'mount -t tmpfs -o size={size} none "$0"; "$@"; status=$?; ls -A "$0" >&2; exit $status'
        done = verify(env=env, before=[*NAMESPACE, script, tmp_path])
        expect(done, "output directory", "PASS")
        expect(done, "disk space", status, "12.8 GB", "--save_total_limit 1" if status != "PASS" else "")


def test_several_machines_need_shared_storage(no_torch, tiny, tmp_path):
    """V6, N1: a local file system is WARN for several machines, PASS for one; a network file system is PASS."""
    env = no_torch | {"OUTPUT_DIR": tmp_path, "MODEL": tiny, "MAIN_NODE_IP": "127.0.0.1"}
    expect(verify(env=env), "shared storage", "WARN", str(tmp_path), "NFS")
    expect(verify(env=env | {"NUM_MACHINES": 1}), "shared storage", "PASS")
    (tmp_path / "df").write_text("#!/bin/sh\necho Type\necho nfs4\n")
    (tmp_path / "df").chmod(0o755)
    expect(verify(env=env | {"PATH": f"{tmp_path}:{PATH}"}), "shared storage", "PASS", "nfs4")


# ── Network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_that_is_taken_is_named(no_torch, tiny, tmp_path):
    """V5: FAIL on the main node of several machines, WARN on a single one."""
    env = no_torch | {"OUTPUT_DIR": tmp_path, "MODEL": tiny}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        several = verify(env=env | {"MAIN_NODE_IP": "127.0.0.1", "MAIN_PORT": port})
        one = verify(env=env | {"MAIN_PORT": port})
    expect(several, "main port", "FAIL", f"{port} cannot be used here: Address already in use", "ss -ltnp", "on every")
    expect(several, "main node", "WARN", "loopback")
    expect(one, "main port", "WARN", "--main_process_port")
    expect(verify(env=env | {"MAIN_NODE_IP": "127.0.0.1", "MAIN_PORT": port}), "main port", "PASS", "free")


@pytest.mark.slow
def test_another_main_node_is_knocked_at(no_torch, tiny, tmp_path):
    """V5: two hosts in network namespaces: one that listens, one that does not yet, and one that is not there."""
    need("ip", "nsenter")
    script = """
        ip link set lo up
        unshare --net sleep 60 & other="nsenter --net --target $!"
        until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.02; done
        ip link add eth0 type veth peer name peer netns $!
        ip addr add 10.77.0.1/24 dev eth0; ip addr add fd00:77::1/64 dev eth0 nodad; ip link set eth0 up
        $other ip addr add 10.77.0.2/24 dev peer; $other ip addr add fd00:77::2/64 dev peer nodad
        $other ip link set peer up
        $other python -m http.server --bind :: 29511 >/dev/null 2>&1 &
        until (: </dev/tcp/10.77.0.2/29511) 2>/dev/null; do sleep 0.1; done
        for where in 10.77.0.1:29511 10.77.0.2:29511 10.77.0.2:29512 10.77.0.3:29511 nowhere.invalid:1 \\
            fd00:77::1:29511 [fd00:77::1]:29511 fd00:77::2:29511 [fd00:77::2]:29512 fd00:77::3:29511 ::1:29511 \\
            fe80::1%eth0:1 0.0.0.0:1; do
            MAIN_NODE_IP=${where%:*} MAIN_PORT=${where##*:} "$@" >"$0/$where"
        done
        kill $(jobs -p)
    """
    env = no_torch | {"OUTPUT_DIR": tmp_path, "MODEL": tiny}
    start(env=env, before=[*NAMESPACE, script, tmp_path])
    wanted = {
        "10.77.0.1:29511": ("main port", "PASS", "free"),
        "10.77.0.2:29511": ("main node", "PASS", "answers"),
        "10.77.0.2:29512": ("main node", "PASS", "nothing listens on port 29512 yet"),
        "10.77.0.3:29511": ("main node", "FAIL", "not reachable"),
        "nowhere.invalid:1": ("main node", "FAIL", "cannot be resolved"),
        "fd00:77::1:29511": ("main node", "PASS", "fd00:77::1 is this machine"),
        "[fd00:77::1]:29511": ("main port", "PASS", "free"),
        "fd00:77::2:29511": ("main node", "PASS", "answers"),
        "[fd00:77::2]:29512": ("main node", "PASS", "nothing listens on port 29512 yet"),
        "fd00:77::3:29511": ("main node", "FAIL", "not reachable"),
        "::1:29511": ("main node", "WARN", "::1 is loopback"),
        "fe80::1%eth0:1": ("main node", "FAIL", "torch reaches no other machine"),
        "0.0.0.0:1": ("main node", "FAIL", "torch reaches no other machine"),
    }
    here = ("10.77.0.1:29511", "fd00:77::1:29511", "[fd00:77::1]:29511", "::1:29511")
    for where, (name, status, words) in wanted.items():
        rows = read((tmp_path / where).read_text())
        assert rows[name][-1][0] == status and words in rows[name][-1][1], rows[name]
        assert ("main port" in rows) == (where in here)
        assert "eth0 10.77.0.1, eth0 fd00:77::1" in rows["addresses"][0][1]


SETTINGS = {  # case: settings, (check, words)
    "no number of machines": ({"NUM_MACHINES": "two"}, "launch settings", "NUM_MACHINES=two"),
    "no port": ({"MAIN_PORT": "http"}, "main port", "MAIN_PORT=http"),
    "port out of range": ({"MAIN_PORT": "70000"}, "main port", "MAIN_PORT=70000"),
    "uneven": ({"NUM_MACHINES": 2, "TOTAL_GPUS": 3}, "launch settings", "TOTAL_GPUS=3"),
}


@pytest.mark.parametrize(("settings", "words"), cases(SETTINGS))
def test_settings_that_do_not_fit_fail(settings, words, no_torch, tiny, tmp_path):
    """N1, N2: what multinode_train.sh would refuse, or accelerate would take wrongly."""
    env = no_torch | {"OUTPUT_DIR": tmp_path, "MODEL": tiny, "MAIN_NODE_IP": "127.0.0.1"} | settings
    expect(verify(env=env), words[0], "FAIL", *words[1:])


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TERMS = "{hub}/google/gemma-3-270m"
HUB = {  # case: (settings), status and words of the line "model access"
    "good token": (GOOD, "PASS", "to your token"),
    "no token": ({}, "FAIL", "not logged in", TERMS, "hf auth login"),
    "terms not accepted": (STRANGER, "FAIL", "terms", "not accepted", TERMS),
    "token without the right": (NARROW, "FAIL", "no access to gated", "/settings/tokens"),
    "revoked token": (INVALID, "FAIL", "refuses your token", "HF_TOKEN", "hf auth login"),
    "published name": (GOOD | {"MODEL": "google/gemma-3-270m"}, "PASS", "google/gemma-3-270m"),
    "unknown name": (GOOD | {"MODEL": "test/nowhere"}, "FAIL", "knows no test/nowhere"),
    "unknown name, no token": ({"MODEL": "test/nowhere"}, "FAIL", "knows no test/nowhere", "hf auth login"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "FAIL", "HF_HUB_OFFLINE", "cache lacks", "unset HF_HUB_OFFLINE"),
    "offline with a token": (GOOD | {"HF_HUB_OFFLINE": "1"}, "FAIL", "HF_HUB_OFFLINE", "cache lacks"),
}


@pytest.mark.parametrize(("settings", "words"), cases(HUB))
def test_the_missing_step_to_the_model_is_named(settings, words, hub, no_torch, tmp_path):
    """V4, F1: each state of account and token has its own line and remedy; the short name is an alias."""
    env = {"OUTPUT_DIR": tmp_path, "HF_HOME": tmp_path / "home"} | no_torch | settings
    done = verify(env=env)
    expect(done, "model access", words[0], *(word.format(hub=hub.endpoint) for word in words[1:]))
    expect(done, "model cache", "PASS", "not yet")


def test_a_model_in_the_cache_needs_no_hub(hub, no_torch, tmp_path):
    """V4: offline it is enough and nothing is asked; where the hub says no, HF_HUB_OFFLINE is the remedy."""
    import huggingface_hub

    huggingface_hub.snapshot_download("google/gemma-3-270m", cache_dir=tmp_path / "hub", token="hf_good")
    env = no_torch | {"OUTPUT_DIR": tmp_path, "HF_HOME": tmp_path}
    hub.requests.clear()
    offline = verify(env=env | {"HF_HUB_OFFLINE": "1"})
    assert hub.requests == []
    expect(offline, "model cache", "PASS", f"google/gemma-3-270m is in {tmp_path}/hub")
    expect(offline, "model access", "PASS", "the cache is used")
    expect(verify(env=env), "model access", "WARN", "not logged in", "copy in the cache", "export HF_HUB_OFFLINE=1")
    assert hub.requests


def spoil(case, tiny, folder):
    """Make the model of a case below in a folder. Returns: its directory, or the name of what is not there."""
    if case == "not there":
        return "/nowhere"
    shutil.copytree(tiny, folder)
    if case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "an adapter without its base":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif case == "an adapter beside its base":
        (folder / "adapter_config.json").write_text("{}")
    elif case == "half of the weights":
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    elif case != "sound":
        in_child(save_model, case, folder)
    return folder


def save_model(case, folder):
    """Save a small random model of another kind in place of the weights and config.json of a folder."""
    import transformers

    size = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"a BERT": "Bert", "no sdpa": "Bloom", "a head of its own": "Phi", "a softcap": "Gemma2", "a T5": "T5",
             "experts": "Mixtral"}  # fmt: skip
    if case == "a shard is missing":
        transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
        (folder / "model.safetensors").unlink()
        (folder / "model-00002-of-00002.safetensors").unlink()
        return
    more = {"a softcap": {"num_key_value_heads": 1, "head_dim": 16},
            "experts": {"num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True}}.get(case, {})
    config = getattr(transformers, f"{names[case]}Config")(**size, **more)
    kind = {"a BERT": "BertForMaskedLM", "a T5": "T5ForConditionalGeneration"}.get(case, f"{names[case]}ForCausalLM")
    getattr(transformers, kind)(config).save_pretrained(folder)


DIRECTORIES = {  # case: status and words of the line "model"
    "sound": ("PASS", "parameters in float32, sdpa attention"),
    "no sdpa": ("PASS", "eager attention"),
    "a head of its own": ("WARN", "the chunked loss is not used", "holds all logits"),
    "a softcap": ("PASS", "eager attention"),
    "experts": ("WARN", "the chunked loss is not used", "a part for its experts"),
    "half of the weights": ("FAIL", "cannot be loaded; if damaged, download or save it anew", "incomplete metadata"),
    "not there": ("FAIL", "/nowhere: no such directory"),
    "no tokenizer": ("FAIL", "tokenizer.json"),
    "a shard is missing": ("FAIL", "model-00002-of-00002.safetensors"),
    "a T5": ("FAIL", "is a T5, which predicts no next token"),
    "a BERT": ("FAIL", "its tokens see those behind them"),
    "an adapter without its base": ("FAIL", "holds an adapter", "merge_and_unload"),
    "an adapter beside its base": ("FAIL", "holds an adapter", "merge_and_unload"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "words"), [pytest.param(case, DIRECTORIES[case], id=case) for case in DIRECTORIES])
def test_the_verdict_on_a_model_is_that_of_main_py(case, words, hub, tiny, tmp_path):
    """V4, F1: the line quotes what main.py says of the same directory, and no file of it changes; no hub is asked."""
    model = spoil(case, tiny, tmp_path / "model")
    files = {path.name: path.read_bytes() for path in tmp_path.glob("model/*")}
    hub.requests.clear()
    (finding,) = preflight.model_verdict(str(model), preflight.start_trial(str(model), made(tmp_path / "try")), 60)
    assert finding.status == words[0] and all(word in finding.found for word in words[1:]), finding
    assert hub.requests == [] and files == {path.name: path.read_bytes() for path in tmp_path.glob("model/*")}
    flags = ["--do_eval", "--validation_file", tmp_path / "try/text.txt", "--max_seq_length", 8, "--no_truncation"]
    done = run(*flags, "--model_name_or_path", model, "--output_dir", tmp_path / "out", "--report_to", "none")
    assert (done.status == 2) == (words[0] == "FAIL"), done.err
    assert done.err.partition("main.py: error: ")[2].strip() in finding.found


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_that_may_not_be_read_fails_for_a_plain_user(file, tiny, tmp_path):
    """V4, F1: permissions count, also when root runs the tests; main.py says the same."""
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / file).chmod(0)
    done = verify("--model", model, env={"OUTPUT_DIR": tmp_path}, before=ORDINARY)
    expect(done, "model", "FAIL", f"{model} cannot be read: no permission for {file}", "chmod +r")
    said = plain_user("--model_name_or_path", model, "--train_file", ROOT / "README.md",
                      "--max_seq_length", 64, "--output_dir", tmp_path / "out")  # fmt: skip
    assert refused(said, f"no permission for {file}") in done.checks["model"][0][1]


def made(folder):
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_a_model_given_as_a_flag_wins_over_the_environment(tiny, tmp_path):
    """V4, V6: --model DIR, in the whole report; a directory needs no hub."""
    done = verify("--model", tiny, env={"OUTPUT_DIR": tmp_path, "MODEL": "/nowhere"})
    expect(done, "model", "PASS", str(tiny))
    assert done.status == 0 and "model access" not in done.checks


def test_without_a_network_it_takes_seconds(tmp_path):
    """V4 to V6: no route, no names: one FAIL for the model, nothing hangs, a single machine needs no network."""
    need("ip")
    script = 'ip link set lo up; exec "$@"'
    env = {"OUTPUT_DIR": tmp_path, "HF_HOME": tmp_path / "home", "HF_ENDPOINT": None}
    done = verify(env=env, before=[*NAMESPACE, script, "sh"])
    assert done.seconds < 30
    expect(done, "model access", "FAIL", "no answer from https://huggingface.co", "--model DIR")
    expect(done, "addresses", "PASS", "none but loopback")
    assert [name for name, rows in done.checks.items() if rows[-1][0] == "FAIL"] == ["model access"], done.checks


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(no_torch, tmp_path):
    """V4, V6: a server that takes the connection and stays silent costs seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = verify(env=no_torch | {"OUTPUT_DIR": tmp_path, "HF_HOME": tmp_path / "home", "HF_ENDPOINT": endpoint})
    expect(done, "model access", "FAIL", f"no answer from {endpoint}")
    assert done.seconds < 15


def test_a_hub_with_another_answer_is_quoted(no_torch, tmp_path):
    """V4: another hub than Hugging Face's may know nothing, and its page is the one that is named."""
    with StubHub() as other:
        env = {"OUTPUT_DIR": tmp_path, "HF_HOME": tmp_path / "home", "HF_ENDPOINT": other.endpoint}
        done = verify(env=no_torch | GOOD | env)
    expect(done, "model access", "FAIL", "refuses your token", f"{other.endpoint}/settings/tokens")
