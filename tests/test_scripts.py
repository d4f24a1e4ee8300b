"""example_run.sh: each scenario trains on a model and text of the user's own, or stops with a sentence."""

import re
import shutil

import pytest
from helpers import PATH, ROOT, launch, write_jsonl

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
    assert listed.status == 0 and names == "quickstart single multi memory custom resume evaluate".split()
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
