"""Models and data sets by name: from the hub, its cache and directories, and what is said when they are not there."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from helpers import ROOT, cases, launch, plain_user, refused, run, write_jsonl
from hub import write_wikitext

ROWS = ["The quick brown fox jumps over the lazy dog. " * 8] * 10
SHORT = ["--max_seq_length", 64, "--max_steps", 1, "--report_to", "none"]  # a run of a second
ACCELERATE = Path(sys.executable).parent / "accelerate"
C3 = "--dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 --output_dir ./outputs --bf16"
C4 = "--dataset_name wikitext --output_dir ./outputs --bf16 --gradient_checkpointing"
GOOD, STRANGER, INVALID = ({"HF_TOKEN": token} for token in ("hf_good", "hf_stranger", "hf_revoked"))


@pytest.fixture(scope="module", autouse=True)
def served(hub, tiny, tmp_path_factory):
    """Fill the stub hub: Gemma, wikitext, and repositories that are gated or lack something."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny, root / "gemma")
    config = json.loads((root / "gemma" / "config.json").read_text())
    (root / "gemma" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    models = {"google/gemma-3-270m": root / "gemma", "test/gated-model": tiny}
    for name, file in (("config", "config.json"), ("weights", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        models[f"test/no-{name}"] = shutil.copytree(tiny, root / f"no-{name}")
        (root / f"no-{name}" / file).unlink()
    hub.repos["models"] |= models

    wikitext = write_wikitext(root / "wikitext")
    hub.repos["datasets"] |= {name: wikitext for name in ("Salesforce/wikitext", "test/configs", "test/gated-data")}
    for name, file, content in (
        ("only-test", "test.jsonl", '{"text": "a"}\n'),
        ("no-text", "train.jsonl", '{"Text": "a", "id": 1}\n'),
        ("numbers", "train.jsonl", '{"text": 1}\n'),
        ("lists", "train.jsonl", '{"text": ["a"]}\n'),
        ("nulls", "train.jsonl", '{"text": null}\n'),
        ("blank", "train.jsonl", '{"text": "  "}\n'),
        ("broken", "train.jsonl", '{"text": "a"\n'),
    ):
        (root / name).mkdir()
        (root / name / file).write_text(content * 3)
        hub.repos["datasets"][f"test/{name}"] = root / name
    hub.gated |= {"test/gated-model", "test/gated-data"}


@pytest.fixture
def train(tmp_path):
    """A training file of 10 rows, about 100 tokens each."""
    return write_jsonl(tmp_path / "train.jsonl", ROWS)


def refuse(tmp_path, *flags, words, env=None, runner=run):
    """Run main.py into an output_dir with an earlier model; assert that it refuses and leaves the model as it is."""
    model = tmp_path / "earlier" / "pytorch_model.bin"
    model.parent.mkdir()
    model.write_bytes(b"weights of an earlier run")
    sentence = refused(runner(*flags, *SHORT, "--output_dir", model.parent, env=env), *words)
    assert model.read_bytes() == b"weights of an earlier run"
    return sentence


def read(out, name):
    return json.loads((out / name).read_text())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ── From the hub ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_short_model_name_is_an_alias_of_the_published_one(hub, train, tmp_path):
    """F1: google/gemma-270m, the default, is fetched as google/gemma-3-270m, and one line says so."""
    hub.requests.clear()
    done = run("--train_file", train, "--output_dir", tmp_path / "out", *SHORT, env=GOOD)
    assert done.status == 0, done.err
    assert [line for line in done.out.splitlines() if "google/gemma-270m" in line and "google/gemma-3-270m" in line]
    assert done.out.count("google/gemma-270m") == 1
    asked = " ".join(path for _, path in hub.requests)
    assert "google/gemma-3-270m/resolve" in asked and "google/gemma-270m" not in asked


def test_the_main_command_trains_evaluates_and_saves(tmp_path):
    """C3, B2, B9, B12: the command exactly as written, with wikitext as small as the stub hub's."""
    done = run(*C3.split(), env=GOOD, cwd=tmp_path)
    out = tmp_path / "outputs"
    assert done.status == 0, done.err
    assert "validation: 60 rows" in done.out
    metrics = read(out, "all_results.json")
    assert metrics["epoch"] == 3 and metrics["train_loss"] > 0
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert {"config.json", "model.safetensors", "tokenizer.json", "checkpoint-3"} <= set(os.listdir(out))
    assert list((out / "runs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext"])
def test_wikitext_without_a_configuration_is_the_small_raw_one(name, tiny, tmp_path):
    """C4: wikitext-2-raw-v1 is taken, and one line says so."""
    flags = ["--dataset_name", name, "--model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    done = run(*flags, *SHORT)
    assert done.status == 0, done.err
    assert len([line for line in done.out.splitlines() if "wikitext-2-raw-v1" in line]) == 1
    assert "train: 300 rows" in done.out


def test_a_chosen_configuration_is_taken_without_a_notice(tiny, tmp_path):
    """F3: --dataset_config_name decides."""
    flags = ["--dataset_name", "wikitext", "--dataset_config_name", "wikitext-103-raw-v1", "--model_name_or_path", tiny]
    done = run(*flags, "--output_dir", tmp_path / "out", *SHORT)
    assert done.status == 0, done.err
    assert "train: 600 rows" in done.out and "wikitext-2-raw-v1" not in done.out


@pytest.mark.slow
def test_the_accelerate_command_works(tmp_path):
    """C4: exactly as written; where there are no GPUs 2 and 3, accelerate starts one process, on the CPU."""
    command = [ACCELERATE, "launch", "--num_processes", 2, ROOT / "main.py", *C4.split()]
    done = launch(*command, env=GOOD | {"CUDA_VISIBLE_DEVICES": "2,3"}, cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.out.count("wikitext-2-raw-v1") == 1
    assert read(tmp_path / "outputs", "all_results.json")["perplexity"] > 1
    assert (tmp_path / "outputs" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_accelerate_command_trains_in_two_processes_on_the_cpu(tmp_path):
    """C4, B13: with --multi_gpu accelerate starts two processes also without GPUs; each thing is said once."""
    port = ["--multi_gpu", "--main_process_port", free_port()]
    command = [ACCELERATE, "launch", *port, "--num_processes", 2, ROOT / "main.py", *C4.split()]
    done = launch(*command, env=GOOD, cwd=tmp_path)
    assert done.status == 0, done.err
    for once in ("published as google/gemma-3-270m", "wikitext-2-raw-v1", "No GPU", "2 processes", "64 chunks", "Done"):
        assert done.out.count(once) == 1, once
    assert read(tmp_path / "outputs", "all_results.json")["perplexity"] > 1


@pytest.mark.slow
def test_a_second_run_works_offline_from_the_cache(hub, tmp_path):
    """F1, F3: what was downloaded once needs no network and no token any more."""
    home = {"HF_HOME": str(tmp_path / "home")}
    flags = ["--dataset_name", "wikitext", *SHORT]
    first = launch(*flags, "--output_dir", tmp_path / "first", env=home | GOOD)
    assert first.status == 0, first.err
    hub.requests.clear()
    second = launch(*flags, "--output_dir", tmp_path / "second", env=home | {"HF_HUB_OFFLINE": "1"})
    assert second.status == 0, second.err
    assert hub.requests == []
    losses = [read(tmp_path / name, "all_results.json")["eval_loss"] for name in ("first", "second")]
    assert losses[0] == losses[1]


# ── What the hub refuses ─────────────────────────────────────────────────────────────────────────────────────────────

MODELS = {  # case: (name, environment), words of the sentence
    "unknown": (("test/nowhere", {}), "test/nowhere", "no such name", "hf auth login"),
    "unknown, with a token": (("test/nowhere", GOOD), "test/nowhere", "no such name"),
    "gated without token": (("test/gated-model", {}), "gated", "{hub}/test/gated-model", "hf auth login"),
    "gated without accepted terms": (("test/gated-model", STRANGER), "gated", "accept", "{hub}/test/gated-model"),
    "gated with an invalid token": (("test/gated-model", INVALID), "refuses your token", "hf auth login"),
    "no config": (("test/no-config", {}), "test/no-config", "config.json"),
    "no weights": (("test/no-weights", {}), "test/no-weights", "model.safetensors"),
    "no tokenizer": (("test/no-tokenizer", {}), "test/no-tokenizer", "tokenizer.json"),
}
DATA = {  # case: (flags behind --dataset_name, environment), words of the sentence
    "unknown": (("test/nowhere", {}), "test/nowhere", "no such name", "{hub}/datasets/test/nowhere"),
    "unknown, with a token": (("test/nowhere", GOOD), "test/nowhere", "no such name"),
    "unknown, without an owner": (("nowhere", {}), "nowhere", "no such name"),
    "gated without token": (("test/gated-data", {}), "gated", "{hub}/datasets/test/gated-data", "hf auth login"),
    "gated without accepted terms": (
        ("test/gated-data --dataset_config_name wikitext-2-v1", STRANGER), "accept", "{hub}/datasets/test/gated-data"
    ),
    "gated with an invalid token": (("test/gated-data", INVALID), "refuses your token", "hf auth login"),
    "several configurations": (
        ("test/configs", {}), "--dataset_config_name", "'wikitext-103-raw-v1', 'wikitext-2-raw-v1', 'wikitext-2-v1'"
    ),
    "unknown configuration": (
        ("test/configs --dataset_config_name wikitext-3", {}), "wikitext-3", "wikitext-103-raw-v1", "wikitext-2-raw-v1"
    ),
    "only a test split": (("test/only-test", {}), "test/only-test", "no train split", "only test", "--train_file"),
    "nothing to evaluate on": (("test/no-text --do_eval", {}), "no validation split", "--validation_file"),
    "no such column": (("test/no-text", {}), "'text'", "mean 'Text'?", "columns: Text, id", "--text_column"),
    "column of numbers": (("test/numbers", {}), "split train", "'text' holds int64", "--text_column"),
    "column of lists": (("test/lists", {}), "split train", "'text' holds List", "--text_column"),
    "column of nulls": (("test/nulls", {}), "split train", "'text' holds null", "--text_column"),
    "blank rows": (("test/blank", {}), "train", "no text", "3 rows"),
    "broken file": (("test/broken", {}), "test/broken", "cannot be loaded", "JSON"),
}


@pytest.mark.parametrize(("asked", "words"), cases(MODELS))
def test_a_model_that_the_hub_does_not_give_is_refused_with_the_next_step(asked, words, hub, train, tmp_path):
    """F1: unknown, gated, refused or incomplete models end with status 2 and say what to do."""
    words = ["--model_name_or_path", *(word.format(hub=hub.endpoint) for word in words)]
    refuse(tmp_path, "--train_file", train, "--model_name_or_path", asked[0], words=words, env=asked[1])


@pytest.mark.parametrize(("asked", "words"), cases(DATA))
def test_data_that_the_hub_does_not_give_is_refused_with_the_next_step(asked, words, hub, tiny, tmp_path):
    """F3, F5, B2, B5: unknown, gated or unfit data sets end with status 2 and say what to do."""
    words = [word.format(hub=hub.endpoint) for word in words]
    flags = ["--model_name_or_path", tiny, "--dataset_name", *asked[0].split()]
    refuse(tmp_path, *flags, words=words, env=asked[1])


def test_a_gated_data_set_opens_with_a_good_token(tiny, tmp_path):
    """F3: the token of the environment reaches the hub."""
    flags = ["--dataset_name", "test/gated-data", "--dataset_config_name", "wikitext-2-v1"]
    done = run(*flags, "--model_name_or_path", tiny, "--output_dir", tmp_path / "out", *SHORT, env=GOOD)
    assert done.status == 0, done.err


@pytest.mark.parametrize(("flag", "way"), [
    ("--model_name_or_path", "offline"),
    ("--dataset_name", "offline"),
    ("--model_name_or_path", "dead endpoint"),
])
@pytest.mark.slow
def test_no_network_and_an_empty_cache_is_said_in_one_sentence(flag, way, tiny, train, tmp_path):
    """F1, F3: with HF_HUB_OFFLINE at once, with a dead network after the library's own tries."""
    env = {"HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_OFFLINE": "1"} if way == "offline" else {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    data = ["--train_file", train] if flag == "--model_name_or_path" else ["--dataset_name", "wikitext"]
    model = [] if flag == "--model_name_or_path" else ["--model_name_or_path", tiny]
    words = [flag, "not in the cache", "network", "local directory"]

    def last_line(*argv, env):
        done = launch(*argv, env=env)
        head, mark, tail = done.err.partition("main.py: error: ")
        assert "Traceback" not in head  # the library tells of its tries before
        done.err = mark + tail
        return done

    refuse(tmp_path, *data, *model, words=words, env=env, runner=last_line)


# ── From directories ─────────────────────────────────────────────────────────────────────────────────────────────────


def save_dict(folder):
    splits = {"train": ROWS, "validation": ROWS[:3], "test": ROWS[:1]}
    parts = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(folder)


def save_single(folder):
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(folder)


def write_lines(folder):
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "validation.jsonl", ROWS[:3])


def write_parquet(folder):
    folder.mkdir()
    for name, rows in (("train", ROWS), ("validation", ROWS[:3])):
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / f"{name}.parquet")


def write_test_only(folder):
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", ROWS)


def write_file(path):
    write_jsonl(path, ROWS)


@pytest.mark.parametrize("make", [save_dict, save_single, write_lines, write_parquet])
def test_a_data_set_directory_is_read(make, tiny, tmp_path):
    """F3: directories of save_to_disk, of JSON lines and of parquet files."""
    make(tmp_path / "data")
    flags = ["--dataset_name", tmp_path / "data", "--model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    done = run(*flags, *SHORT)
    assert done.status == 0, done.err
    assert "train: 10 rows" in done.out
    assert ("validation: 3 rows" in done.out) == (make is not save_single) == ("eval_loss" in done.out)


@pytest.mark.parametrize(("make", "words"), [
    (write_test_only, ["no train split", "only test", "--train_file"]),
    (Path.mkdir, ["data", "any data files"]),
    (write_file, ["data", "--train_file"]),
    (lambda folder: None, ["data", "no such"]),
], ids=["only a test split", "empty", "a file", "missing"])
def test_a_directory_that_is_no_training_data_is_refused(make, words, tiny, tmp_path):
    """F3, B2: a path that is no data set directory ends with status 2 and names what is there."""
    make(tmp_path / "data")
    flags = ["--dataset_name", tmp_path / "data", "--model_name_or_path", tiny]
    refuse(tmp_path, *flags, words=["--dataset_name", *words])


@pytest.mark.slow
@pytest.mark.parametrize("make", [save_dict, write_lines])
def test_a_read_only_directory_is_read_and_not_written_to(make, tiny, tmp_path):
    """F3: what is prepared goes to the cache, not beside the data."""
    make(tmp_path / "data")
    before = sorted(tmp_path.glob("data/**/*"))
    subprocess.run(["chmod", "-R", "a-w", tmp_path / "data"], check=True)
    flags = ["--dataset_name", tmp_path / "data", "--model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    done = plain_user(*flags, *SHORT)
    subprocess.run(["chmod", "-R", "u+w", tmp_path / "data"], check=True)
    assert done.status == 0, done.err
    assert sorted(tmp_path.glob("data/**/*")) == before
