"""Fixtures and hooks; plain functions are in helpers.py. Where a new test goes:

test_command_line      what can be told before torch is imported: flags, paths, --help, defaults
test_data              rows, tokens and chunks: files, directories, data sets of the hub, the cache
test_model_and_loss    weights and tokenizer from wherever, the chunked loss, the lean norm, dtypes
test_checkpoints       going on: what is verified, refused, chosen, rotated; test_kills: whatever stops a run
test_training          numbers: losses, evaluations, logs, results, the plan; test_processes: several, on one machine
test_machines          two machines, and the scripts that launch them; test_preflight: verify_setup.sh
test_publishing        what goes with a finished model: card, notice, upload; test_slurm: a cluster of two nodes
test_scripts           example_run.sh; test_style: what the files look like; test_benchmarks: benchmarks/
test_real_weights      the real 270M model, as a user gets it
test_gpu               what only a GPU can tell; bash tests/run.sh --gpu runs it, no other call collects it

A run that several tests look at is a session fixture, here. A helper that two files need is in helpers.py. A test that
needs a program says need("ip"); one that takes more than a few seconds is marked slow.
"""

import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")

from helpers import (  # noqa: E402
    BEST,
    FIRST,
    GPU,
    HUB,
    KILL_TABLE,
    MACHINE_TABLE,
    PATIENCE,
    ROOT,
    ROWS,
    SAVE,
    SCRATCH,
    Disk,
    Hosts,
    Server,
    copy_of_the_repository,
    finish,
    in_child,
    manual,
    need,
    quickstart_in,
    refused,
    run,
    short_run,
    snapshot,
    steps,
    write_jsonl,
)

collect_ignore = [] if GPU else ["test_gpu.py"]
GPU_TABLE = ["| what | result | measured | seconds |", "|---|---|---|---|"]  # printed at the end of the tests


def pytest_sessionstart():
    if GPU:
        in_the_report("", "## Values and runs", "", *GPU_TABLE)


def in_the_report(*lines):
    """Append lines to $OUT/gpu.md, if OUT is set."""
    if os.environ.get("OUT"):
        with open(Path(os.environ["OUT"], "gpu.md"), "a", encoding="utf-8") as report:
            report.write("\n".join(lines) + "\n")


def pytest_runtest_logreport(report):
    """Make a row of a test of --gpu as soon as it has ended: what it measured, or why it failed or was skipped."""
    if not GPU or (report.passed and report.when != "call"):
        return
    words = report.nodeid.partition("::test_")[2].replace("_", " ")
    measured = "; ".join(f"{name} {value}" for name, value in report.user_properties)
    if report.skipped:
        measured = str(report.longrepr[2])
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        measured = " ".join((crash.message if crash else str(report.longrepr)).split())[:300]
    cells = [words, report.outcome, measured.replace("|", "/"), f"{report.duration:.1f}"]
    GPU_TABLE.append(f"| {' | '.join(cells)} |")
    in_the_report(GPU_TABLE[-1])


def pytest_keyboard_interrupt():
    if GPU:
        in_the_report("| Ctrl-C, or the time limit of tests/run.sh | cut off | the tests behind did not run | |")


def pytest_sessionfinish():
    HUB.__exit__(None, None, None)
    if FIRST:
        subprocess.run(["rm", "-rf", str(SCRATCH)], check=False)


def pytest_terminal_summary(terminalreporter):
    """Print how many kills the runs of test_kills.py survived, what a GPU said, how runs of test_machines.py ended."""
    if KILL_TABLE:
        terminalreporter.write_line("kills at             kills   runs  exact  crashed  wrong")
    for name, (kills, exact, crashed, wrong) in KILL_TABLE.items():
        runs = exact + crashed + wrong
        terminalreporter.write_line(f"{name:20} {kills:5} {runs:6} {exact:6} {crashed:8} {wrong:6}")
    for line in GPU_TABLE if GPU else ():
        terminalreporter.write_line(line)
    for case, result in MACHINE_TABLE.items():
        terminalreporter.write_line(f"{case:60} {result}")


# ── A model, a hub, texts ────────────────────────────────────────────────────────────────────────────────────────────

MAKE_TINY = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast
import pydoc_data.topics
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
special = ["<pad>", "<eos>", "<bos>", "<unk>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
bpe.train_from_iterator([pydoc_data.topics.topics["with"]], trainer)
bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
names = dict(zip(["pad_token", "eos_token", "bos_token", "unk_token"], special))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
torch.manual_seed(0)
config = Gemma3TextConfig(
    vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, intermediate_size=128, sliding_window=32, max_position_embeddings=512,
    layer_types=["sliding_attention", "full_attention"], bos_token_id=2, eos_token_id=1, pad_token_id=0,
)
Gemma3ForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="session")
def tiny():
    """Directory of a Gemma 3 with 2 layers, hidden 64, 384 tokens, context 512, random float32 weights.

    What is trained from it is saved in float32, too, so that finished models can be compared to the last bit.
    """
    folder = SCRATCH / "tiny"
    if not folder.exists():
        subprocess.run([sys.executable, "-c", MAKE_TINY, str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def tiny_bf16(tiny):
    """Directory of the same model in bfloat16, as Gemma is published."""
    folder = SCRATCH / "tiny-bf16"

    def convert():
        import torch
        from transformers import AutoModelForCausalLM

        shutil.copytree(tiny, folder)
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(folder)

    if not folder.exists():
        in_child(convert)
    return folder


@pytest.fixture
def tiny_model(tiny):
    """That model, loaded in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


@pytest.fixture(scope="session")
def hub(tiny, tmp_path_factory):
    """The stub hub that HF_ENDPOINT names: Gemma, wikitext, and repositories that are gated or lack something."""
    from hub import write_wikitext

    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny, root / "gemma")
    config = json.loads((root / "gemma" / "config.json").read_text())
    (root / "gemma" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    models = {"google/gemma-3-270m": root / "gemma", "test/gated-model": tiny}
    for name, file in (("config", "config.json"), ("weights", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        models[f"test/no-{name}"] = shutil.copytree(tiny, root / f"no-{name}")
        (root / f"no-{name}" / file).unlink()
    HUB.repos["models"] |= models

    wikitext = write_wikitext(root / "wikitext")
    HUB.repos["datasets"] |= {name: wikitext for name in ("Salesforce/wikitext", "test/configs", "test/gated-data")}
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
        HUB.repos["datasets"][f"test/{name}"] = root / name
    HUB.gated |= {"test/gated-model", "test/gated-data"}
    return HUB


@pytest.fixture
def texts(tmp_path):
    """Paths of a train and a validation .jsonl with chapters of Python's manual, about 60 and 15 kB."""
    return [write_jsonl(tmp_path / "train.jsonl", manual("with", "while", "try", "for", "class")),
            write_jsonl(tmp_path / "validation.jsonl", manual("if", "lambda"))]  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """A training file of 10 rows, about 100 tokens each."""
    return write_jsonl(tmp_path / "train.jsonl", ROWS)


@pytest.fixture
def refuse(tmp_path, train, tiny):
    """A function that runs main.py with flags and asserts that it ends in one sentence that holds all the words.

    Its output_dir already holds a model and a saved best checkpoint, which must not be touched.
    """
    earlier = tmp_path / "out"
    (earlier / "checkpoint-best").mkdir(parents=True)
    (earlier / "pytorch_model.bin").write_bytes(b"weights of an earlier run")
    (earlier / "checkpoint-best" / "optimizer.pt").write_bytes(b"state of an earlier run")

    def refuse(flags, *words, status=2, runner=run, **more):
        before = snapshot(earlier)
        base = "--model_name_or_path {tiny} --output_dir {tmp}/out --max_seq_length 64 "
        done = runner(*(base + flags).format(tmp=tmp_path, train=train, tiny=tiny).split(), **more)
        sentence = refused(done, *words, status=status)
        assert before.items() <= snapshot(earlier).items()
        return sentence

    return refuse


@pytest.fixture
def small_chunks(monkeypatch):
    """A loss of at most 7 tokens at a time, 3 in the softmax, 40 words: all tests have several uneven chunks, parts."""
    import main

    monkeypatch.setitem(main.LOGITS_BYTES, "cpu", 7 * 4 * 97 + 1)
    monkeypatch.setitem(main.SOFTMAX_ROWS, "cpu", 3)
    monkeypatch.setitem(main.VOCABULARY_PART, "cpu", 40)


@pytest.fixture
def own_norms(monkeypatch):
    """Give Gemma's norms and main.COMPILED back after a test in which main.py has put a model together."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    import main

    monkeypatch.setattr(Gemma3RMSNorm, "forward", Gemma3RMSNorm.forward)
    monkeypatch.setattr(main, "COMPILED", {})


# ── Runs to look at, and to go on from ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A finished run of 3 epochs with validation every 5 steps. Returns: (output_dir, done, texts, argv)."""
    folder = tmp_path_factory.mktemp("finished")
    texts = [write_jsonl(folder / "train.jsonl", manual("with", "while", "try", "class")),
             write_jsonl(folder / "validation.jsonl", manual("if", "for"))]  # fmt: skip
    argv = short_run(tiny, texts, folder / "out", "--logging_steps", 1, "--save_steps", 4, "--eval_steps", 5)
    return folder / "out", finish(*argv), texts, argv


@pytest.fixture(scope="session")
def two_epochs(tiny, tmp_path_factory):
    """Flags of a run of 2 epochs over 24 chunks, 4 chunks a step; its output_dir must be added."""
    folder = tmp_path_factory.mktemp("two-epochs")
    train = write_jsonl(folder / "train.jsonl", manual("with", "while", "try", "class"))
    validation = write_jsonl(folder / "validation.jsonl", manual("if", "for"))
    return ["--model_name_or_path", tiny, "--train_file", train, "--validation_file", validation,
            "--max_seq_length", 64, "--no_truncation", "--cache_dir", folder / "cache", "--max_train_samples", 24,
            "--max_eval_samples", 13, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
            "--num_train_epochs", 2, "--learning_rate", 1e-3, "--warmup_steps", 0, "--logging_steps", 1,
            "--report_to", "none"]  # fmt: skip


@pytest.fixture(scope="session")
def two_epochs_trained(two_epochs, tmp_path_factory):
    """The output_dir of that run in one process."""
    output = tmp_path_factory.mktemp("two-epochs-trained") / "out"
    finish(*two_epochs, "--output_dir", output)
    return output


@pytest.fixture(scope="session")
def early(two_epochs, tmp_path_factory):
    """A run whose rate is so high that evaluations get worse, and end it. Returns: (argv, output_dir, done)."""
    argv = [*two_epochs, "--learning_rate", 0.05, "--lr_scheduler_type", "constant", "--num_train_epochs", 5,
            "--eval_steps", 1, "--save_steps", 1, "--early_stopping_patience", 2, "--save_total_limit", 2]  # fmt: skip
    output = tmp_path_factory.mktemp("early") / "out"
    return argv, output, finish(*argv, "--output_dir", output)


@pytest.fixture(scope="session")
def four_steps(tiny, tmp_path_factory):
    """A run that is not stopped: 4 steps, a checkpoint every 2, one kept. Returns: (argv, output_dir)."""
    folder = tmp_path_factory.mktemp("four-steps")
    text = write_jsonl(folder / "train.jsonl", manual("with", "while", "try"))
    argv = ["--model_name_or_path", tiny, "--train_file", text, "--max_seq_length", 64, "--no_truncation",
            "--cache_dir", folder / "cache", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
            "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 1, "--warmup_steps", 0,
            "--learning_rate", 1e-3, "--logging_steps", 1]  # fmt: skip
    finish(*argv, "--output_dir", folder / "out")
    return argv, folder / "out"


@pytest.fixture(scope="session")
def every_step_saved(four_steps, tmp_path_factory):
    """The same with a checkpoint at each of its 4 steps. Returns: (argv, output_dir)."""
    output = tmp_path_factory.mktemp("every-step-saved") / "out"
    argv = [*four_steps[0], "--save_steps", 1, "--save_total_limit", 9]
    finish(*argv, "--output_dir", output)
    return argv, output


@pytest.fixture
def stopped(every_step_saved, tmp_path):
    """A copy of that run as a kill after its last checkpoint leaves it. Returns: (argv, output_dir, the whole run)."""
    argv, whole = every_step_saved
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "manifest.json").unlink()
    (output / "model.safetensors").unlink()
    return [*argv, "--output_dir", output], output, whole


@pytest.fixture(scope="session")
def evaluated_flags(tiny, tmp_path_factory):
    """12 steps, 6 an epoch, evaluated and saved every 2."""
    folder = tmp_path_factory.mktemp("evaluated")
    train = write_jsonl(folder / "train.jsonl", manual("with", "while", "try"))
    validation = write_jsonl(folder / "validation.jsonl", manual("if", "for"))
    return ["--model_name_or_path", tiny, "--train_file", train, "--validation_file", validation,
            "--max_seq_length", 64, "--no_truncation", "--cache_dir", folder / "cache", "--max_train_samples", 12,
            "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--num_train_epochs", 2,
            "--per_device_eval_batch_size", 1, "--eval_steps", 2, "--save_steps", 2, "--save_total_limit", 9,
            "--warmup_steps", 0, "--learning_rate", 1e-3, "--logging_steps", 2]  # fmt: skip


@pytest.fixture(scope="session")
def evaluated(evaluated_flags, tmp_path_factory):
    """The output directory of that run, which nothing has disturbed."""
    output = tmp_path_factory.mktemp("evaluated-run") / "out"
    finish(*evaluated_flags, "--output_dir", output)
    return output


@pytest.fixture(scope="session")
def best_published(evaluated_flags, tmp_path_factory):
    """The same, but the best model is published, that of step 2. Returns: (argv, output_dir)."""
    output = tmp_path_factory.mktemp("best-published") / "out"
    argv = [*evaluated_flags, *BEST]
    finish(*argv, "--output_dir", output)
    return argv, output


@pytest.fixture(scope="session")
def long_evaluations(evaluated_flags, tmp_path_factory):
    """The same with evaluations of a second or so, at steps 6 and 12. Returns: (argv, output_dir of a whole run)."""
    folder = tmp_path_factory.mktemp("long-evaluations")
    text = write_jsonl(folder / "long.jsonl", manual(*("if", "for", "class") * 9))
    argv = [*evaluated_flags, "--validation_file", text, "--eval_steps", 6]
    finish(*argv, "--output_dir", folder / "out")
    return argv, folder / "out"


# ── Kills and disks ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def kill_library():
    """The library that kills a process at its k-th change of a file."""
    need("cc")
    library = SCRATCH / "kill_at.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/kill_at.c", "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def kill_servers(kill_library):
    """Two servers, for two cores, that run main.py with the library in it."""
    both = [Server(kill_library), Server(kill_library)]
    yield both
    for server in both:
        server.close()


@pytest.fixture(scope="session")
def changes(four_steps, kill_servers, tmp_path_factory):
    """How many changes of files the run of four steps makes: the kills that there are."""
    output = tmp_path_factory.mktemp("changes") / "out"
    done = kill_servers[0].run([*four_steps[0], "--output_dir", output], output)
    assert done["status"] == 0, done["err"]
    return done["changes"]


@pytest.fixture(scope="session")
def best_of_few(four_steps, kill_servers, tmp_path_factory):
    """The run of four steps with evaluations, best model, one checkpoint kept. Returns: (argv, output_dir, changes)."""
    folder = tmp_path_factory.mktemp("best-of-few")
    text = write_jsonl(folder / "validation.jsonl", manual("if"))
    argv = [*four_steps[0], "--validation_file", text, "--eval_steps", 2, "--max_eval_samples", 2, *BEST]
    output = folder / "out"
    done = kill_servers[0].run([*argv, "--output_dir", output], output)
    assert done["status"] == 0, done["err"]
    assert steps(output) == [2, 4]
    return argv, output, done["changes"]


@pytest.fixture
def disk(kill_library, tmp_path):
    """A tmpfs of any size on which main.py can run."""
    disk = Disk(tmp_path / "disk", kill_library)
    yield disk
    disk.server.close()


# ── Several processes, several machines ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def rank_flags(tiny, train, tmp_path):
    """Flags of a run of two steps, for ranks that are started by hand."""
    return ["--model_name_or_path", tiny, "--train_file", train, "--max_seq_length", 64, "--max_steps", 2,
            "--gradient_accumulation_steps", 1, "--report_to", "none", "--cache_dir", tmp_path / "cache",
            "--output_dir", tmp_path / "out"]  # fmt: skip


@pytest.fixture
def launched_flags(tiny, tmp_path):
    """Flags of a run of 60 steps with a checkpoint every 2, for launchers on this machine."""
    text = write_jsonl(tmp_path / "train.jsonl", manual("with", "while", "try"))
    return ["--model_name_or_path", tiny, "--train_file", text, "--max_seq_length", 64, "--no_truncation",
            "--cache_dir", tmp_path / "cache", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
            "--max_steps", 60, "--save_steps", 2, "--learning_rate", 1e-3, "--warmup_steps", 0,
            "--report_to", "none"]  # fmt: skip


@pytest.fixture(scope="session")
def machine_flags(tiny, tmp_path_factory):
    """Flags of a run of 140 steps, for two machines."""
    folder = tmp_path_factory.mktemp("machines")
    text = write_jsonl(folder / "train.jsonl", manual("with", "while", "try", "for"))
    return ["--model_name_or_path", tiny, "--train_file", text, "--max_seq_length", 64, "--no_truncation",
            "--cache_dir", folder / "cache", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
            "--max_steps", 140, "--save_steps", SAVE, "--learning_rate", 1e-4, "--warmup_steps", 0,
            "--ddp_timeout", PATIENCE, "--report_to", "none", "--disable_tqdm", "True"]  # fmt: skip


@pytest.fixture
def hosts(tmp_path):
    """Two machines in network namespaces, joined by a cable."""
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


@pytest.fixture(scope="session")
def undisturbed(machine_flags, tmp_path_factory):
    """The output directory of a run on two machines to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    hosts = Hosts(folder)
    began, nodes = time.time(), hosts.both(*machine_flags, OUTPUT_DIR=folder / "out")
    assert [node.wait(120) for node in nodes] == [0, 0], [node.said() for node in nodes]
    assert ", 2 processes" in nodes[0].said() and ", 2 processes" not in nodes[1].said()
    MACHINE_TABLE["nothing"] = f"trained in {time.time() - began:.0f} s"
    hosts.close()
    return folder / "out"


@pytest.fixture
def keyboard():
    """A terminal as its user has it, where Ctrl-C can be typed, and as a program has it."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def three_watches(monkeypatch):
    """What the machines 0, 1 and 2 know of each other: machine 0 is connected to both others."""
    from tools import launch as launcher

    monkeypatch.setattr(launcher, "MACHINES", 3)
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    watches = []
    for rank, links in enumerate([{key: pair[0] for key, pair in pairs.items()}, {0: pairs[1][1]}, {0: pairs[2][1]}]):
        monkeypatch.setattr(launcher, "RANK", rank)
        watches.append(launcher.Watch(links, 600))
    return watches


@pytest.fixture(scope="session")
def no_torch(tmp_path_factory):
    """Settings under which torch cannot be imported: a check of its own for verify_setup.sh, and seconds less."""
    folder = tmp_path_factory.mktemp("no-torch")
    (folder / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def quickstart():
    """A copy of the tracked files in which `bash example_run.sh quickstart` ran. Returns: (folder, what it printed)."""
    need("git")
    folder = copy_of_the_repository(Path(SCRATCH, "a fresh copy"))
    return folder, quickstart_in(folder)
