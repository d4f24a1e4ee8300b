"""Several processes: what they compare before they begin, and how all of them end when one does.

Each rank is started by hand as the only one of its machine, so that it can have flags, files and a main.py of its own.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    ACCELERATE,
    BEST,
    GOOD,
    ROOT,
    ROWS,
    free_port,
    last_wins,
    launch,
    logged,
    missing,
    results,
    run,
    two_processes,
    write_jsonl,
)


def place(rank, port, **other):
    """The environment that a launcher gives to one rank of two."""
    known = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (known | other).items() if value is not None}


def both(flags, one=(), prepare=(None, None), **other):
    """Run two ranks, rank 1 with further flags and environment, each after its own prepare(). Returns: both."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        zero = pool.submit(run, *flags, env=place(0, port), prepare=prepare[0])
        one = pool.submit(run, *flags, *one, env=place(1, port, **other), prepare=prepare[1])
        return zero.result(), one.result()


def mount(source, target):
    """Return a function that lets this process alone see `source` in the place of `target`."""

    def prepare():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) and libc.unshare(0x10020000):  # CLONE_NEWNS, for others than root with CLONE_NEWUSER
            os._exit(99)
        libc.mount(b"none", b"/", None, 0x44000, None)  # private, recursively
        if libc.mount(str(source).encode(), str(target).encode(), None, 0x1000, None):  # bind
            os._exit(99)

    return prepare


def errors(done):
    """The sentences that a rank ended with."""
    return [line for line in done.err.splitlines() if line.startswith("main.py: error:")]


def refused(ranks, *words, status=2):
    """All ranks ended with the status and with one sentence, which has all the words; nothing else went wrong."""
    for done in ranks:
        if done.status == 99:
            missing("mounts of one process alone are not permitted here")
        assert done.status == status, done.err
        assert len(errors(done)) == 1 and all(word in errors(done)[0] for word in words), done.err
        assert "Traceback" not in done.err, done.err


def test_ranks_with_other_flags_are_refused(rank_flags, tmp_path):
    """C6, N3: each difference is named, with both values, on both machines; the directory stays empty."""
    ranks = both(rank_flags, ["--max_steps", 3, "--add_eos", "--cache_dir", tmp_path / "own"])
    refused(ranks, "rank 1 on ", "--max_steps is 3 instead of 2", "--add_eos is True instead of False")
    assert "cache_dir" not in ranks[0].err and os.listdir(tmp_path / "out") == []


def test_ranks_with_another_main_py_are_refused(rank_flags, tmp_path):
    """C6, N3: both machines need the same trainer."""
    other = tmp_path / "main.py"
    other.write_text((ROOT / "main.py").read_text() + "\n")
    refused(both(rank_flags, prepare=(None, mount(other, ROOT / "main.py"))), "main.py is '")


@pytest.mark.slow
def test_another_number_of_processes_is_refused(rank_flags, tmp_path):
    """C6, N3: two launchers with different totals never meet; accelerate gives both the same total, and other parts."""
    began = time.time()
    ranks = both([*rank_flags, "--ddp_timeout", 5], WORLD_SIZE=3)
    refused([ranks[1]], "3 processes could not connect at 127.0.0.1:", "with --ddp_timeout 5", status=1)
    refused([ranks[0]], "2 processes could not connect at 127.0.0.1:", status=1)
    assert time.time() - began < 60 and not list(tmp_path.glob("out/*.safetensors")), ranks
    accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": 2}
    refused(both(rank_flags, **accelerate), "--num_processes", "'2' instead of None")


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 1], ids=["new", "used before"])
def test_an_output_dir_that_is_not_shared_is_refused(before, rank_flags, tmp_path):
    """B10, B13: the same name, another directory, also where each has been trained in before; nothing else is left."""
    for name in ("out", "own"):
        (tmp_path / name).mkdir()
        if before:
            (tmp_path / name / ".lock").write_text("process 1 on a machine\n")
    ranks = both(rank_flags, prepare=(None, mount(tmp_path / "own", tmp_path / "out")))
    refused(ranks, "storage that all machines share", str(tmp_path / "out"))
    assert "rank 1 on " in ranks[0].err
    assert os.listdir(tmp_path / "out") == os.listdir(tmp_path / "own") == [".lock"] * before


def test_a_missing_file_on_one_machine_ends_all(rank_flags, tmp_path):
    """B13: also before the processes are connected; the sentence of the one is read on the other."""
    began = time.time()
    ranks = both(rank_flags, ["--train_file", tmp_path / "none.jsonl"])
    refused(ranks, "no such file")
    assert "rank 1 on " in ranks[0].err and time.time() - began < 30


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_bad_data_on_one_machine_ends_all(rank_flags, tmp_path, rank):
    """B13: while the other one waits for the end of the preparation."""
    (tmp_path / "bad.jsonl").write_text('{"text": 1\n')
    began, bad = time.time(), mount(tmp_path / "bad.jsonl", tmp_path / "train.jsonl")
    ranks = both(rank_flags, prepare=(None, bad) if rank else (bad, None))
    refused(ranks, "train.jsonl, line 1: broken JSON")
    assert f"rank {rank} on " in ranks[1 - rank].err and time.time() - began < 30


def test_other_data_on_one_machine_is_refused(rank_flags, tmp_path):
    """B13: each machine may have its own copy of a file, but not another one."""
    other = mount(write_jsonl(tmp_path / "other.jsonl", ROWS[1:]), tmp_path / "train.jsonl")
    ranks = both(rank_flags, ["--cache_dir", tmp_path / "own"], prepare=(None, other))
    refused(ranks, "train_data is '", "instead of")


@pytest.mark.slow
@pytest.mark.parametrize("task", [[], ["--do_eval"]], ids=["training", "evaluation"])
def test_other_validation_data_on_one_machine_is_refused(rank_flags, tmp_path, task):
    """B13: the perplexity would be of both texts, or one machine would wait for batches that the other has not."""
    text = write_jsonl(tmp_path / "validation.jsonl", ROWS)
    other = mount(write_jsonl(tmp_path / "other.jsonl", ROWS[::-1] + ["Another one. " * 20]), text)
    more = ["--validation_file", text, *task]
    ranks = both([*rank_flags, *more], ["--cache_dir", tmp_path / "own"], prepare=(None, other))
    refused(ranks, "validation_data is '", "instead of")
    assert "train_data is" not in ranks[0].err


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_spoken_of_in_one_sentence(rank_flags, tmp_path, lost):
    """B10, B13: kill -9 in training; the other one ends at once with status 1 and no traceback."""
    port, rank_flags = free_port(), [*rank_flags, "--max_steps", 3000, "--save_steps", 5]
    command = [sys.executable, ROOT / "main.py", *rank_flags]
    ranks = [subprocess.Popen(last_wins(command), env=os.environ | place(rank, port), stdout=-3, stderr=-1,
                              text=True) for rank in (0, 1)]  # fmt: skip
    until = time.time() + 60
    while not list((tmp_path / "out").glob("checkpoint-*")):
        assert time.time() < until and not any(process.poll() for process in ranks)
        time.sleep(0.02)
    ranks[lost].kill()
    said = ranks[1 - lost].communicate(timeout=60)[1]
    ranks[lost].communicate()
    assert ranks[1 - lost].returncode == 1 and "Traceback" not in said, said
    assert said.count("main.py: error:") == 1 and "another process was lost or does not answer" in said, said


def test_several_processes_that_cannot_find_each_other_are_refused(rank_flags):
    """C6: they would train into one directory, each by itself."""
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        done = run(*rank_flags, env=place(0, free_port(), **{name: None}))
        refused([done], f"WORLD_SIZE is set, but not {name}", "accelerate launch")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_waited_for_as_long_as_asked(rank_flags, rank):
    """C6: --ddp_timeout holds from the beginning, also without a GPU."""
    began = time.time()
    done = run(*rank_flags, "--ddp_timeout", 3, env=place(rank, free_port()))
    refused([done], "2 processes could not connect at 127.0.0.1:", "--ddp_timeout 3", status=1)
    assert time.time() - began < 30


def test_a_failure_in_training_ends_all(rank_flags):
    """B10, B13: rank 0 cannot write its checkpoint and says why; rank 1, which waits for it, says that it was lost."""
    limit = (100_000, 100_000)  # bytes a file
    began = time.time()
    ranks = both(rank_flags, prepare=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), None))
    refused(ranks[:1], "File too large", status=1)
    refused(ranks[1:], "another process was lost or does not answer", "the same command again goes on", status=1)
    assert time.time() - began < 60


def test_two_ranks_train_and_evaluate(rank_flags, tmp_path):
    """B13: what is refused above is fine otherwise, also a second time, and without training."""
    for more in ([], [], ["--do_eval", "--validation_file", rank_flags[3], "--output_dir", tmp_path / "eval"]):
        ranks = both([*rank_flags, *more], more)
        assert [done.status for done in ranks] == [0, 0], ranks
    assert "Done" in ranks[0].out and ranks[1].out == ""
    assert not [done.err for done in ranks if "Warning" in done.err]


@pytest.mark.slow
def test_data_may_take_longer_than_the_timeout(rank_flags):
    """B13: --ddp_timeout does not end the process that waits for another one's preparation of the data."""
    port, rank_flags = free_port(), [*rank_flags, "--ddp_timeout", 10]
    command = [sys.executable, ROOT / "main.py", *rank_flags]
    ranks = [subprocess.Popen(last_wins(command), env=os.environ | place(rank, port, LOCAL_RANK=rank),
                              stdout=-3, stderr=-1, text=True) for rank in (0, 1)]  # fmt: skip
    seen = ""
    while "Generating" not in seen:
        seen += (more := ranks[0].stderr.read(1))
        assert more, seen
    ranks[0].send_signal(signal.SIGSTOP)
    time.sleep(15)
    ranks[0].send_signal(signal.SIGCONT)
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said


# ── Under accelerate ─────────────────────────────────────────────────────────────────────────────────────────────────

C4 = "--dataset_name wikitext --output_dir ./outputs --bf16 --gradient_checkpointing"


@pytest.mark.slow
def test_the_accelerate_command_works(hub, tmp_path):
    """C4: exactly as written; where there are no GPUs 2 and 3, accelerate starts one process, on the CPU."""
    command = [ACCELERATE, "launch", "--num_processes", 2, ROOT / "main.py", *C4.split()]
    done = launch(*command, env=GOOD | {"CUDA_VISIBLE_DEVICES": "2,3"}, cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.out.count("wikitext-2-raw-v1") == 1
    assert results(tmp_path / "outputs")["perplexity"] > 1
    assert (tmp_path / "outputs" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_accelerate_command_trains_in_two_processes_on_the_cpu(hub, tmp_path):
    """C4, B13: with --multi_gpu accelerate starts two processes also without GPUs; each thing is said once."""
    done = launch(*two_processes(), *C4.split(), env=GOOD, cwd=tmp_path)
    assert done.status == 0, done.err
    for once in ("published as google/gemma-3-270m", "wikitext-2-raw-v1", "No GPU", "2 processes", "64 chunks", "Done"):
        assert done.out.count(once) == 1, once
    assert results(tmp_path / "outputs")["perplexity"] > 1


@pytest.mark.slow
def test_bad_data_under_a_launcher_is_said_once(rank_flags, tmp_path):
    """B13, C9: one machine, two processes, one sentence, and no half minute of waiting."""
    (tmp_path / "train.jsonl").write_text('{"text": 1\n')
    words = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    began = time.time()
    done = launch(*words, "--mixed_precision", "no", ROOT / "main.py", *rank_flags)
    assert done.status and len(errors(done)) == 1 and "broken JSON" in errors(done)[0], done.err
    assert time.time() - began < 60


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
def test_a_file_of_accelerate_config_is_followed(launched_flags, tmp_path, kind, processes):
    """C9: that of two GPUs trains in two processes on the CPU; that of two CPUs is for mpirun, and trains in one."""
    config = tmp_path / "default_config.yaml"
    config.write_text(CONFIG.format(kind, "true" if kind == "MULTI_CPU" else "false\ngpu_ids: 2,3"))
    words = [ACCELERATE, "launch", "--config_file", config, "--main_process_port", free_port(), ROOT / "main.py"]
    done = launch(*words, *launched_flags, "--max_steps", 2, "--output_dir", tmp_path / "out")
    assert done.status == 0 and f"device   cpu, {processes}" in done.out, done
    assert done.out.count("Done: the model is in") == 1


@pytest.mark.slow
def test_two_processes_measure_the_best_model(evaluated_flags, tmp_path):
    """B9, B13: with --load_best_model_at_end all ranks load it, and the metrics are those of the published model."""
    output = tmp_path / "out"
    argv = [*evaluated_flags, *BEST, "--logging_steps", 5, "--output_dir", output]
    done = launch(*two_processes(), *argv)
    assert done.status == 0 and "Could not locate" not in done.err, done.err
    first = results(output)
    best = next(row["eval_loss"] for row in logged(output) if "eval_loss" in row and row["step"] == 2)
    assert first["eval_loss"] == pytest.approx(best, rel=1e-6)
    for name in ("manifest.json", "model.safetensors"):
        (output / name).unlink()
    done = launch(*two_processes(), *argv)
    assert done.status == 0, done.err
    for name in ("eval_loss", "train_loss"):
        assert results(output)[name] == pytest.approx(first[name], rel=1e-6)
