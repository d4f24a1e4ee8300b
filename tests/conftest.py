"""Fixtures: a tiny Gemma 3, a stub hub on loopback, and two ways to run main.py as a real process.

`run` forks this process, which has imported torch and transformers once, and runs main.py in the child: a second a
run instead of eight. `launch` starts a new interpreter, as a user does. Both return status, stdout and stderr.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub import StubHub  # noqa: E402

SCRATCH = Path(tempfile.mkdtemp(prefix="trainer-tests-"))
HUB = StubHub(gated={"google/gemma-3-270m"}, tokens={"hf_good"}, unaccepted={"hf_stranger"}).__enter__()
for name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[name]  # a developer's own token or cache must not reach the tests
os.environ |= {
    "HF_ENDPOINT": HUB.endpoint,  # read when huggingface_hub is imported, below
    "HF_HOME": str(SCRATCH / "hf"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # tiny tensors are faster on one thread
    "CUDA_VISIBLE_DEVICES": "",
}

import datasets  # noqa: E402, F401
import pytest  # noqa: E402
import transformers  # noqa: E402
from transformers import Trainer  # noqa: E402, F401

transformers.Gemma3ForCausalLM  # noqa: B018  resolves the lazy import before the first fork


def pytest_sessionfinish():
    HUB.__exit__(None, None, None)
    subprocess.run(["rm", "-rf", str(SCRATCH)], check=False)


def pytest_terminal_summary(terminalreporter):
    """Print how many kills the runs of test_unkillable.py survived, and how those of test_hosts.py ended."""
    if table := getattr(sys.modules.get("test_unkillable"), "TABLE", None):
        terminalreporter.write_line("kills at             kills   runs  exact  crashed  wrong")
        for name, (kills, exact, crashed, wrong) in table.items():
            runs = exact + crashed + wrong
            terminalreporter.write_line(f"{name:20} {kills:5} {runs:6} {exact:6} {crashed:8} {wrong:6}")
    for case, result in getattr(sys.modules.get("test_hosts"), "TABLE", {}).items():
        terminalreporter.write_line(f"{case:60} {result}")


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
Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="session")
def tiny():
    """Directory of a Gemma 3 with 2 layers, hidden 64, 384 tokens, context 512, random bfloat16 weights."""
    folder = SCRATCH / "tiny"
    if not folder.exists():
        subprocess.run([sys.executable, "-c", MAKE_TINY, str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def hub():
    """The stub hub that HF_ENDPOINT names; its repositories can be added to while it runs."""
    return HUB


@pytest.fixture
def texts(tmp_path):
    """Paths of a train and a validation .jsonl with chapters of Python's manual, about 60 and 15 kB."""
    import pydoc_data.topics

    chapters = [pydoc_data.topics.topics[name] for name in ("with", "while", "try", "for", "class", "if", "lambda")]
    paths = []
    for name, rows in (("train", chapters[:5]), ("validation", chapters[5:])):
        paths.append(write_jsonl(tmp_path / f"{name}.jsonl", rows))
    return paths


def write_jsonl(path, rows):
    """Write one {"text": row} a line. Returns: path."""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*argv, env=None, cwd=None, prepare=None):
    """Run main.py in a fork of this process, after prepare() in it. Returns: status, stdout, stderr, both as text."""
    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = os.fork()
        if child == 0:
            status = 70
            try:
                for number, path in ((1, out), (2, err)):
                    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ.update(env or {})
                os.chdir(cwd or folder)
                if prepare:
                    prepare()
                status = run_as_script([str(text) for text in argv])
            finally:
                end_helpers()
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return SimpleNamespace(status=status, out=out.read_text(), err=err.read_text())


def end_helpers():
    """End data loaders and tokenizers as the interpreter does at its end, which os._exit leaves out."""
    for name in ("multiprocessing.util", "multiprocess.util"):
        if name in sys.modules:
            sys.modules[name]._exit_function()


def run_as_script(argv):
    """Run main.py under the name __main__, as the interpreter would. Returns: the exit status it would have."""
    import runpy
    import traceback

    sys.argv = [str(ROOT / "main.py"), *argv]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def launch(*argv, env=None, cwd=ROOT, timeout=600):
    """Run a command as a user would, `python main.py …` unless it names another program. Returns: as run does."""
    command = [str(text) for text in argv]
    if command[0].startswith("-"):
        command = [sys.executable, str(ROOT / "main.py"), *command]
    done = subprocess.run(
        command, env=os.environ | (env or {}), cwd=cwd, timeout=timeout, capture_output=True, text=True
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def in_child(function, *args):
    """Call function(*args) in a fork of this process, which itself never computes with torch. Returns: its result."""
    import pickle
    import traceback

    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        answer = Path(folder, "answer")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                answer.write_bytes(pickle.dumps(function(*args)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, f"{function.__name__} failed in the child with status {status}"
        return pickle.loads(answer.read_bytes())
