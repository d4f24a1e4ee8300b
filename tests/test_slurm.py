"""examples/slurm.sbatch on a Slurm cluster of two nodes: network namespaces with a cable, as in test_machines.py.

Its daemons are real. They and their jobs live in the sandbox of helpers.Hosts, and end with it; their files are in the
test's own folder. They want to drop groups if they run as root, which no user namespace permits: a second namespace
makes root the user daemon. Slurm is optional, as few machines have it: without it the test is skipped, also under CI.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import PATH, ROOT, last_wins, steps

WHERE = f"{PATH}:/usr/sbin"  # Debian keeps daemons in /usr/sbin
PROGRAMS = {"munged": "munge", "sbatch": "slurm-client", "slurmctld": "slurmctld", "slurmd": "slurmd"}
CONFIGURATION = """
ClusterName=test
SlurmctldHost=node0
SlurmUser=daemon
SlurmdUser=daemon
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
NodeName=node[0-1] CPUs=64 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""  # cred_expire: seconds, after which a job that is queued again may begin; 120 where nothing is said
INSIDE = 'hostname "$1"; cd "$2"; shift 2; exec unshare --user --map-user=1 --map-group=1 "$@"'  # 1: daemon


class Cluster:
    """munged and slurmctld on node 0, slurmd on both nodes."""

    def __init__(self, hosts):
        self.hosts, self.folder, self.daemons = hosts, hosts.folder, []
        folder = self.folder
        for name in ("state", "node0", "node1"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # "autodetect" wants /sys/fs/cgroup
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
        subprocess.run([*hosts.enter, "mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        options = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        self.daemon(0, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *options)
        self.until((folder / "munge.socket").exists)
        self.daemon(0, "slurmctld", "-D")
        for node in (0, 1):
            self.daemon(node, "slurmd", "-D")
        self.until(lambda: self.call("sinfo", "--noheader", "--format=%D %t").strip() == "2 idle")

    def on(self, node, *words, env=None, **streams):
        """Start a program on a node."""
        env = os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": WHERE} | (env or {})
        machine = f"ip netns exec n{node} unshare --pid --fork --kill-child --mount-proc --uts bash -c".split()
        command = [*self.hosts.enter, *machine, INSIDE, "init", f"node{node}", ROOT, *words]
        return subprocess.Popen(list(map(str, command)), env=env, text=True, **streams)

    def daemon(self, node, *words):
        with open(self.folder / f"{words[0]}{node}.log", "w") as log:
            self.daemons.append(self.on(node, *words, stdout=log, stderr=log))

    def call(self, *words, env=None):
        """Run a program on node 0. Returns: what it says."""
        return self.on(0, *words, env=env, stdout=-1, stderr=-2).communicate(timeout=60)[0]

    def until(self, condition, seconds=180):
        """Wait until a condition is met, while all daemons live."""
        end = time.time() + seconds
        while not condition():
            alive = all(daemon.poll() is None for daemon in self.daemons)
            assert alive and time.time() < end, [self.said(path) for path in self.folder.glob("*[.-][l0-9]*")]
            time.sleep(0.2)

    def said(self, path):
        """A log; the nodes write into that of a job at the same time, and cut each other's characters."""
        return path.read_text(errors="replace") if path.is_file() else ""

    def log(self, job):
        return self.said(self.folder / f"job-{job}")

    def submit(self, training, *more, output, nodes=2):
        """Submit the script with flags in its settings and more behind it, for no GPUs. Returns: the job's number."""
        script = (ROOT / "examples/slurm.sbatch").read_text().replace("\n#SBATCH --gpus", "\n##SBATCH --gpus")
        script = re.sub("(?m)^training=.*", lambda _: f"training=({shlex.join(map(str, training))})", script)
        (self.folder / "slurm.sbatch").write_text(script)
        own = [f"--output={self.folder}/job-%j", "--cpus-per-task=1", "--time=60", f"--nodes={nodes}"]
        said = self.call("sbatch", *own, self.folder / "slurm.sbatch", *more, env={"OUTPUT_DIR": str(output)})
        return re.fullmatch(r"Submitted batch job (\d+)\n", said)[1]

    def state(self, job):
        """The state of a job, its exit status, and how often it was queued again, as Slurm says."""
        said = self.call("scontrol", "--oneliner", "show", "job", job)
        return [re.search(rf"\b{name}=(\S+)", said)[1] for name in ("JobState", "ExitCode", "Restarts")]

    def end(self, job):
        """Wait for the end of a job. Returns: as state does."""
        self.until(lambda: self.state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.state(job)


@pytest.mark.slow
def test_a_slurm_job_saves_at_the_signal_queues_again_and_ends_with_the_weights_of_one_that_ran_through(
    launched_flags, hosts, tmp_path
):
    """Jobs that have finished, failed or been cancelled do not queue again; one node is enough."""
    for name, package in PROGRAMS.items():
        if not shutil.which(name, path=WHERE):
            pytest.skip(f"{name} is missing: apt-get install {package}")
    cluster, many = Cluster(hosts), ("--max_steps", 400)
    flags = last_wins([*launched_flags, "--save_steps", 20])
    at = flags.index("--max_steps")
    del flags[at : at + 2]

    whole = cluster.submit(flags, *many, output=tmp_path / "whole")
    assert cluster.end(whole) == ["COMPLETED", "0:0", "0"], cluster.log(whole)
    assert "device   cpu, 2 processes" in cluster.log(whole)

    cut = cluster.submit(flags, *many, output=tmp_path / "cut")
    cluster.until(lambda: steps(tmp_path / "cut"))
    cluster.call("scancel", "--signal=TERM", "--batch", cut)  # as Slurm does before the time limit
    cluster.until(lambda: cluster.state(cut)[2] == "1")
    assert max(steps(tmp_path / "cut")) < 400, cluster.log(cut)
    wrong = cluster.submit(flags, "--max_stepz", 400, output=tmp_path / "wrong", nodes=1)
    assert cluster.end(wrong) == ["FAILED", "2:0", "0"], cluster.log(wrong)
    assert cluster.end(cut) == ["COMPLETED", "0:0", "1"], cluster.log(cut)
    assert "Going on from" in cluster.log(cut)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other

    cancelled = cluster.submit(flags, "--max_steps", 9000, output=tmp_path / "cancelled", nodes=1)
    cluster.until(lambda: steps(tmp_path / "cancelled"))
    cluster.call("scancel", cancelled)
    assert cluster.end(cancelled)[::2] == ["CANCELLED", "0"], cluster.log(cancelled)


def test_shellcheck_finds_nothing_in_the_slurm_script():
    """Behind each line of it stands a comment."""
    command = [Path(sys.executable).with_name("shellcheck"), "--shell=bash", ROOT / "examples/slurm.sbatch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = (ROOT / "examples/slurm.sbatch").read_text().splitlines()
    free = ("", "fi", "done")
    assert [line for line in lines if line.strip() not in free and not re.search(r"^# |\s# \S|^#!", line)] == []
    assert max(map(len, lines)) <= 120
