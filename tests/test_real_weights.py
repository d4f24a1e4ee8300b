"""The real Gemma 3 270M on real text: the quickstart in a fresh copy, and its weights against plain transformers."""

import json
import re
import shutil
import subprocess

import pytest
from helpers import clean_environment, quickstart_in

pytestmark = pytest.mark.slow


def python(folder, code, *argv):
    """Run Python code of a few lines in a new interpreter of the copy. Returns: what it printed, from JSON."""
    command = [folder / ".venv/bin/python", "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def trainer(folder, *argv):
    """Run main.py of the copy on the real model in float32. Returns: its all_results.json."""
    output = folder / "quickstart" / "check"
    shutil.rmtree(output, ignore_errors=True)
    command = [folder / ".venv/bin/python", "main.py", "--output_dir", output, "--cache_dir", "quickstart/cache", *argv]
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "all_results.json").read_text())


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, path, length, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokens = [token for line in open(path) for token in tokenizer(json.loads(line)["text"])["input_ids"][:length]]
chunks = [tokens[start : start + length] for start in range(0, length * count, length)]
losses = []
with torch.no_grad():
    for chunk in chunks:
        ids = torch.tensor([chunk])
        losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item())
print(json.dumps(sum(losses) / len(losses)))
"""


def test_the_quickstart_teaches_the_model(quickstart):
    """B9, B12, S4: perplexity of held-out chapters falls by 40 % at least; samples and places are printed."""
    folder, printed = quickstart
    before = json.loads((folder / "quickstart/base/all_results.json").read_text())["perplexity"]
    after = json.loads((folder / "quickstart/model/all_results.json").read_text())["perplexity"]
    assert after < 0.6 * before < 60
    judged = json.loads((folder / "quickstart/judged.json").read_text())
    first, last = (judged[when]["perplexity"] for when in ("before", "after"))
    assert last < 0.97 * first and f"{first:.1f} -> {last:.1f}" in printed
    assert all(re.search(rf"{when} +The with statement \S+", printed) for when in ("before", "after"))
    assert "quickstart/model" in printed and "tensorboard --logdir" in printed
    states = sorted((folder / "quickstart/model").glob("checkpoint-*/trainer_state.json"))
    losses = [row["loss"] for row in json.loads(states[-1].read_text())["log_history"] if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_second_quickstart_does_nothing_again(quickstart):
    """S4: nothing is installed, fetched, converted or trained; the report is printed again."""
    folder, first = quickstart
    files = [folder / ".venv/quickstart-installed", folder / "quickstart/gemma-3-270m/model.safetensors",
             folder / "quickstart/model/model.safetensors", folder / "quickstart/train.jsonl"]  # fmt: skip
    before = [file.stat().st_mtime_ns for file in files]
    again = quickstart_in(folder)
    assert "Installed already" in again and "This run finished" in again
    assert again.splitlines()[-8:] == first.splitlines()[-8:]
    assert [file.stat().st_mtime_ns for file in files] == before


def test_the_model_loads_and_generates_in_another_process(quickstart):
    """B12: with transformers alone."""
    folder, _ = quickstart
    code = """
import json
from transformers import pipeline
print(json.dumps(pipeline("text-generation", "quickstart/model")("The with", max_new_tokens=5)[0]["generated_text"]))
"""
    text = python(folder, code)
    assert text.startswith("The with") and len(text) > len("The with")


def test_perplexity_equals_plain_transformers(quickstart):
    """B9: on real weights, to 1e-3, in float32."""
    folder, _ = quickstart
    model, path = "quickstart/gemma-3-270m", "quickstart/validation.jsonl"
    mine = trainer(folder, "--do_eval", "--model_name_or_path", model, "--validation_file", path,
                   "--max_seq_length", 256, "--max_eval_samples", 6)  # fmt: skip
    expected = python(folder, PLAIN, model, path, 256, 6)
    assert mine["perplexity"] == pytest.approx(2.718281828459045**expected, rel=1e-3)


def test_the_reported_perplexity_is_that_of_whole_documents_behind_bos(quickstart):
    """L8: plain transformers' own loss of each chapter, weighted by its tokens, to 1 %, in float32 beside bfloat16."""
    folder, _ = quickstart
    code = """
import json, math, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("quickstart/gemma-3-270m")
model = AutoModelForCausalLM.from_pretrained("quickstart/gemma-3-270m", dtype=torch.float32).eval()
total, count = 0, 0
for line in open("quickstart/validation.jsonl"):
    ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    count += ids.shape[1] - 1
print(json.dumps(math.exp(total / count)))
"""
    judged = json.loads((folder / "quickstart/judged.json").read_text())
    assert judged["before"]["perplexity"] == pytest.approx(python(folder, code), rel=0.01)


def test_first_loss_equals_plain_transformers(quickstart):
    """B6, B14: the first step's loss on real weights is plain transformers' on the same chunks, to 1e-4 in float32."""
    folder, _ = quickstart
    model, path = "quickstart/gemma-3-270m", "quickstart/train.jsonl"
    mine = trainer(folder, "--model_name_or_path", model, "--train_file", path, "--max_seq_length", 256,
                   "--max_train_samples", 2, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
                   "--max_steps", 1, "--save_strategy", "no")  # fmt: skip
    assert mine["train_loss"] == pytest.approx(python(folder, PLAIN, model, path, 256, 2), rel=1e-4)


def test_the_tokenizer_begins_each_text_with_bos(quickstart):
    """B3: Gemma's BOS stands before each text, no EOS behind it, 262,144 ids."""
    folder, _ = quickstart
    code = """
import json
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("quickstart/gemma-3-270m")
print(json.dumps([tokenizer("hello")["input_ids"][0], tokenizer("hello")["input_ids"][-1], len(tokenizer)]))
"""
    first, last, size = python(folder, code)
    assert (first, size) == (2, 262144) and last != 1
