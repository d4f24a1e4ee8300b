"""The real Gemma 3 270M on real text: the quickstart in a fresh copy, and its weights against plain transformers."""

import json
import math
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
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, path, length, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokens = [token for line in open(path) for token in tokenizer(json.loads(line)["text"])["input_ids"][:length]]
nats = predicted = size = 0
for _ in range(count):  # a chunk that begins inside a text gets a BOS; no BOS is predicted
    inside = tokens[0] != tokenizer.bos_token_id
    ids = torch.tensor([[tokenizer.bos_token_id] * inside + tokens[: length - inside]])
    tokens = tokens[length - inside :]
    labels = ids[0, 1:].masked_fill(ids[0, 1:] == tokenizer.bos_token_id, -100)
    with torch.no_grad():
        nats += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="sum").item()
    predicted += (labels != -100).sum().item()
    pieces = tokenizer.convert_ids_to_tokens(labels[labels != -100])
    size += sum(1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode()) for piece in pieces)
print(json.dumps([nats / predicted, nats / math.log(2) / size]))
"""


def test_the_quickstart_teaches_the_model(quickstart):
    """B9, B12, L8, S4: held-out chapters are read better, whole and in chunks; samples and places are printed."""
    folder, printed = quickstart
    before = json.loads((folder / "quickstart/base/all_results.json").read_text())
    after = json.loads((folder / "quickstart/model/all_results.json").read_text())
    assert after["perplexity"] < 0.95 * before["perplexity"] < 20
    assert after["bits_per_byte"] < 0.98 * before["bits_per_byte"] < 1.2
    judged = json.loads((folder / "quickstart/judged.json").read_text())
    for name, form, least in (("perplexity", ".2f", 0.97), ("bits_per_byte", ".4f", 0.99)):
        first, last = (judged[when][name] for when in ("before", "after"))
        assert last < least * first
        assert re.search(rf"{name.replace('_', ' ')} +{first:{form}} -> +{last:{form}}", printed)
    assert all(re.search(rf"{when} +The with statement \S+", printed) for when in ("before", "after"))
    assert "quickstart/model" in printed and "tensorboard --logdir" in printed
    states = sorted((folder / "quickstart/model").glob("checkpoint-*/trainer_state.json"))
    losses = [row["eval_loss"] for row in json.loads(states[-1].read_text())["log_history"] if "eval_loss" in row]
    assert len(losses) == 5 and losses[-1] < 0.97 * losses[0] and losses[2] < losses[0]


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


def test_the_model_writes_in_llama_cpp_too(quickstart, tmp_path):
    """U8: converted by llama.cpp's converter, read by llama.cpp: same tokens, log-probabilities within 0.05 nats."""
    folder, _ = quickstart

    def scenario(*words, **env):
        command = ["bash", "example_run.sh", *map(str, words)]
        return subprocess.run(command, cwd=folder, env=clean_environment() | env, capture_output=True, text=True)

    done = scenario("gguf")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens     200 of 200 are the same" in done.stdout and "It agrees with transformers." in done.stdout
    assert float(re.search(r"differ by ([\d.]+) nats on average", done.stdout)[1]) < 0.05
    written = scenario("generate", "The with statement", "--max_new_tokens", 12)
    assert written.returncode == 0 and "with statement" in written.stdout, written.stderr
    first = re.search(r"\n(The with statement\S* \S+ \S+ \S+)", written.stdout)[1]
    assert f"llama.cpp  {first}" in done.stdout
    model = folder / "quickstart/model.gguf"
    stamp = model.stat().st_mtime_ns

    other = tmp_path / "other"  # llama.cpp has no such attention: it scales by the size of a head
    shutil.copytree(folder / "quickstart/gemma-3-270m", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 64}))
    apart = scenario("gguf", "--outfile", model, "--max_tokens", 50, MODEL=str(other))
    assert apart.returncode == 1 and "is not the same, so" in apart.stderr
    assert model.stat().st_mtime_ns == stamp and "Installing" in done.stdout and "Installing" not in apart.stdout

    (other / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    odd = scenario("gguf", "--outfile", model, MODEL=str(other))
    assert odd.returncode == 1 and odd.stderr.startswith("to_gguf.py: error: ") and "was not converted" in odd.stderr
    assert model.stat().st_mtime_ns == stamp and [*model.parent.glob(".*.part")] == []


def test_perplexity_equals_plain_transformers(quickstart):
    """B9, L1, L2, L3: on real weights and the same chunks, to 1e-3, in float32; bits per byte, too."""
    folder, _ = quickstart
    model, path = "quickstart/gemma-3-270m", "quickstart/validation.jsonl"
    mine = trainer(folder, "--do_eval", "--model_name_or_path", model, "--validation_file", path,
                   "--max_seq_length", 256, "--max_eval_samples", 6)  # fmt: skip
    loss, bits = python(folder, PLAIN, model, path, 256, 6)
    assert mine["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert mine["bits_per_byte"] == pytest.approx(bits, rel=1e-3)


WHOLE = """
import json, math, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("quickstart/gemma-3-270m")
model = AutoModelForCausalLM.from_pretrained("quickstart/gemma-3-270m", dtype=torch.float32).eval()
total = count = size = 0
for line in open("quickstart/validation.jsonl"):
    text = json.loads(line)["text"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    count += ids.shape[1] - 1
    size += len(text.encode())
print(json.dumps([math.exp(total / count), total / math.log(2) / size]))
"""


def test_the_reported_perplexity_is_that_of_whole_documents_behind_bos(quickstart):
    """L8: plain transformers' own loss of each chapter, weighted by its tokens, to 1 %, in float32 beside bfloat16."""
    folder, printed = quickstart
    said = json.loads((folder / "quickstart/judged.json").read_text())["before"]
    perplexity, bits = python(folder, WHOLE)
    assert said["perplexity"] == pytest.approx(perplexity, rel=0.01)
    assert said["bits_per_byte"] == pytest.approx(bits, rel=0.01)


DOCUMENTS = """
import json, math, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("quickstart/gemma-3-270m")
model = AutoModelForCausalLM.from_pretrained("quickstart/gemma-3-270m", dtype=torch.float32).eval()
nats = size = 0
with open("quickstart/fitting.jsonl", "w") as out:
    for line in open("quickstart/validation.jsonl"):
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"][:255]
        text = tokenizer.decode(ids)
        if len(ids) == 255 and tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            out.write(json.dumps({"text": text}) + chr(10))
            whole = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                nats += model(whole, labels=whole).loss.item() * 255
            size += len(text.encode())
print(json.dumps(nats / math.log(2) / size))
"""


def test_documents_that_fill_a_chunk_are_evaluated_as_whole_documents(quickstart):
    """L3, L8: where each fits a chunk, main.py's bits per byte are those of whole documents behind BOS, to 1 %."""
    folder, _ = quickstart
    expected = python(folder, DOCUMENTS)
    mine = trainer(folder, "--do_eval", "--model_name_or_path", "quickstart/gemma-3-270m", "--validation_file",
                   "quickstart/fitting.jsonl", "--max_seq_length", 256)  # fmt: skip
    assert mine["bits_per_byte"] == pytest.approx(expected, rel=1e-2)


PIECES = """
import glob, json, sys, sysconfig
sys.path.insert(0, ".")
import main
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("quickstart/gemma-3-270m")
assert main.splits_at_lines(tokenizer)
import pydoc_data.topics
texts = [open(path).read() for path in sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:60]]
texts += [*pydoc_data.topics.topics.values(), "héllo\\n\\n\\n 🙂\\n\\tÄ\\n" * 999, (chr(10) * 40 + "verse ") * 99]
wrong = cut = 0
for text in texts:
    open("quickstart/piece.txt", "w").write(text)
    rows = [row["text"] for row in main.read_texts(["quickstart/piece.txt"], "text", "document", 200)]
    pieces = [token for row in tokenizer(rows, add_special_tokens=False)["input_ids"] for token in row]
    cut += len(rows) - 1
    wrong += "".join(rows) != text or pieces != tokenizer(text, add_special_tokens=False)["input_ids"]
print(json.dumps([wrong, cut]))
"""


def test_pieces_of_a_document_have_the_ids_of_the_whole(quickstart):
    """L4: Gemma's own tokenizer, on sources, chapters, umlauts and long blank stretches cut at thousands of places."""
    folder, _ = quickstart
    wrong, cut = python(folder, PIECES)
    assert wrong == 0 and cut > 5000


def test_first_loss_equals_plain_transformers(quickstart):
    """B6, B14: the first step's loss on real weights is plain transformers' on the same chunks, to 1e-4 in float32."""
    folder, _ = quickstart
    model, path = "quickstart/gemma-3-270m", "quickstart/train.jsonl"
    mine = trainer(folder, "--model_name_or_path", model, "--train_file", path, "--max_seq_length", 256,
                   "--max_train_samples", 2, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
                   "--max_steps", 1, "--save_strategy", "no")  # fmt: skip
    assert mine["train_loss"] == pytest.approx(python(folder, PLAIN, model, path, 256, 2)[0], rel=1e-4)


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
