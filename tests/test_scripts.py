"""example_run.sh: each scenario trains on a model and text of the user's own, or stops with a sentence.

Then what README and docs say of it all.
"""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import PATH, ROOT, clean_environment, launch, need, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import main
from tools import flags
from tools.foreign_flags import FOREIGN

ALONE, UNMADE = "TRAIN_FILE is not: set both", "model/config.json is missing. Run `bash example_run.sh quickstart`"
LINK = ".venv is a link to /gone, which is gone: rm .venv"
SCENARIOS = {"single": ALONE, "multi": ALONE, "memory": ALONE, "evaluate": UNMADE, "quickstart": LINK}


@pytest.mark.parametrize(("name", "words"), SCENARIOS.items())
def test_a_scenario_that_cannot_work_stops_with_a_sentence(name, words, tmp_path):
    """S4: a validation file alone; a quickstart whose model is half made; a .venv that points nowhere."""
    shutil.copy(ROOT / "example_run.sh", tmp_path)
    write_jsonl(tmp_path / "v.jsonl", ["text"])
    (tmp_path / "quickstart" / "model").mkdir(parents=True)
    (tmp_path / ".venv").symlink_to("/gone")
    done = launch("bash", "example_run.sh", name, cwd=tmp_path, env={"VALIDATION_FILE": "v.jsonl"})
    assert done.status == 2 and done.err.startswith("example_run.sh: ") and words in done.err, done.err
    assert done.err.count("\n") == 1


def test_the_scenarios_are_listed_and_a_misspelt_one_is_named(tmp_path):
    """S4: no argument lists all of them."""
    listed = launch("bash", ROOT / "example_run.sh", cwd=tmp_path)
    names = re.findall(r"^  (\w+)  ", listed.out, re.M)
    known = "quickstart single multi memory custom resume evaluate generate gguf".split()
    assert listed.status == 0 and names == known
    wrong = launch("bash", ROOT / "example_run.sh", "cutsom", cwd=tmp_path)
    assert wrong.status == 2 and "cutsom" in wrong.err


@pytest.mark.slow
def test_scenarios_run_on_a_local_model(tiny, texts, tmp_path):
    """S4: single and memory, which set --bf16 themselves, custom with and without it, evaluate."""

    def scenario(name, model, output, *more):
        settings = {"MODEL": model, "VALIDATION_FILE": texts[1], "OUTPUT_DIR": tmp_path / output, "PATH": PATH}
        settings |= {"TRAIN_FILE": texts[0]} if name != "evaluate" else {}
        words = ["bash", ROOT / "example_run.sh", name, "--max_seq_length", 64, *more]
        done = launch(*words, cwd=tmp_path, env={key: str(value) for key, value in settings.items()})
        assert done.status == 0 and "main.py" in done.out, done.err
        return tmp_path / output

    for output, name, *more in (["a", "single"], ["b", "memory"], ["c", "custom", "--bf16"], ["d", "custom"]):
        assert (scenario(name, tiny, output, "--max_steps", 1, *more) / "model.safetensors").exists()
    assert (scenario("evaluate", tmp_path / "d", "e") / "eval_results.json").exists()


WRONG_CALLS = (
    ([], "generate.py: error: give a prompt"),
    (["a", "--model", "missing"], "there is no folder missing. Run `bash example_run.sh quickstart` first"),
    (["a", "--model", "empty"], "empty holds no finished model: config.json is missing."),
    (["a", "--temperature", "nan"], "--temperature: nan is not 0 or more"),
    (["a", "--top_p", "1.5"], "--top_p: 1.5 is not from 0 to 1"),
    (["a", "--max_new_tokens", "0"], "--max_new_tokens: 0 is not 1 or more"),
    ([b"\xff"], "the prompt is not UTF-8"),
)


@pytest.mark.parametrize(("words", "sentence"), WRONG_CALLS)
def test_a_wrong_call_of_generate_is_one_sentence(words, sentence, tmp_path):
    """U8: status 2, before torch is loaded."""
    (tmp_path / "empty").mkdir()
    command = [sys.executable, ROOT / "examples/generate.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_generate_writes_what_transformers_does(tiny, tmp_path):
    """U8: greedily, from flags and from standard input; by chance the same for a seed; no noise; a closed pipe."""

    def generate(*words, **more):
        command = ["bash", ROOT / "example_run.sh", "generate", *map(str, words)]
        env = {"MODEL": str(tiny), "PATH": PATH} | clean_environment() | {"MODEL": str(tiny)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, **more)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split("\n\n", 1)[1]  # behind the command that it prints

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=9, do_sample=False)[0], skip_special_tokens=True)
    assert generate("the cat", "--max_new_tokens", 9).strip() == expected.strip() != "the cat"
    assert generate("--max_new_tokens", 9, input="the cat\n").strip() == expected.strip()
    chance = ["the cat", "--temperature", 2, "--top_k", 50]
    assert generate(*chance, "--seed", 1) == generate(*chance, "--seed", 1) != generate(*chance, "--seed", 2)
    two = generate("the cat", "a dog", "--max_new_tokens", 9)
    assert two.startswith(expected) and "\n\na dog" in two
    closed = f"bash {ROOT}/example_run.sh generate a --max_new_tokens 400 2>&1 | head -n 1"
    assert launch("bash", "-c", closed, cwd=tmp_path, env={"MODEL": str(tiny)}).out == "\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    (
        (["--model", "missing"], "there is no folder missing"),
        (["--model", "empty"], "empty holds no finished model"),
        (["--text", "none.jsonl"], "--text none.jsonl cannot be read (FileNotFoundError"),
        (["--text", "odd.jsonl"], "--text odd.jsonl cannot be read (KeyError: 'text')"),
        (["--outtype", "q4"], "invalid choice: 'q4'"),
        (["--text", "a.txt"], "the converter is not installed in this Python: call `bash example_run.sh gguf`"),
    ),
)
def test_a_wrong_call_of_the_converter_is_one_sentence(words, sentence, tiny, tmp_path):
    """U8: status 2, and no file is made. Its work is seen in test_real_weights.py: the tokenizer has to be Gemma's."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "odd.jsonl").write_text('{"other": 1}')
    command = [sys.executable, ROOT / "examples/to_gguf.py", "--model", tiny, "--outfile", "out.gguf", *words]
    done = launch(*command, cwd=tmp_path)
    assert done.status == 2 and sentence in done.err and "Traceback" not in done.err, done.err
    assert not list(tmp_path.glob("*gguf*"))


# ── README and docs ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_of_flags_is_that_of_the_parser():
    """F1 to F24: docs/flags.md says what `main.py --help` says; else run `python tools/flags.py > docs/flags.md`."""
    page = (ROOT / "docs/flags.md").read_text()
    assert page == flags.page(flags.help_text(), main.REFUSED, FOREIGN)
    options = {option for option in re.findall(r"^  (--\w+)", flags.help_text(), re.M)}
    assert options == set(re.findall(r"^\| `(--\w+)` \|[^|]*\|[^|]*\|$", page, re.M)) and len(options) == 46


def test_the_front_door_names_what_is_at_the_top_level_and_leads_nowhere_else():
    """S10: 9 to 12 kB; every file that is tracked at the top level is named, every link leads to a file."""
    readme = (ROOT / "README.md").read_text()
    assert 9_000 <= len(readme.encode()) <= 12_000
    need("git")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    for name in {path.partition("/")[0] for path in listed} - {".gitignore", "README.md"}:
        assert name in readme, name
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
    assert (ROOT / "docs/loss.png").stat().st_size < 100_000


@pytest.mark.slow
def test_the_tour_of_the_front_door_ends_with_a_model_that_writes(tiny, tmp_path):
    """S10, B12: its lines as they stand, in a copy, but for the model, which is tiny here."""
    tour = re.search(r"## From your text[^#]*?\n\n((?: {4}.*\n)+)", (ROOT / "README.md").read_text())[1]
    assert tour.count("quickstart/gemma-3-270m") == 2 and tour.startswith("    source .venv/bin/activate\n")
    linked = [ROOT / name for name in "main.py requirements.txt tools docs examples".split()]
    for path in [*linked, *ROOT.glob("*.sh")]:
        (tmp_path / path.name).symlink_to(path)
    lines = tour.replace("source .venv/bin/activate", f"set -e; export PATH={PATH}")
    lines = lines.replace("quickstart/gemma-3-270m", str(tiny)).replace("--max_seq_length 512", "--max_seq_length 64")
    done = launch("bash", "-c", lines, cwd=tmp_path)
    assert done.status == 0, done.err
    assert "0 failed: ready to train" in done.out and "Done: the model is in outputs/docs." in done.out
    assert "examples/generate.py --model outputs/docs" in done.out and "\nA checkpoint is" in done.out


def test_a_loss_curve_is_drawn_of_a_run_or_the_lack_of_one_said(finished, tmp_path):
    """S4: a picture of the losses in trainer_state.json, also of a checkpoint's."""
    output = finished[0]
    draw = [sys.executable, ROOT / "examples/loss_curve.py"]
    done = launch(*draw, output, tmp_path / "loss.png")
    assert done.status == 0 and re.search(r"loss.png: \d+ points", done.out), done.err
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.copytree(newest, tmp_path / "run" / newest.name)
    assert launch(*draw, tmp_path / "run", tmp_path / "two.png").status == 0
    odd = launch(*draw, output, tmp_path / "loss.txt")
    assert odd.status == 1 and "cannot be written" in odd.err and "Traceback" not in odd.err
    none = launch(*draw, tmp_path, tmp_path / "three.png")
    assert none.status == 1 and "holds no trainer_state.json" in none.err and "Traceback" not in none.err
