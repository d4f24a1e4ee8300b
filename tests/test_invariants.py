"""Numbers a user can trust: what must not change a training does not change it."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
from helpers import ACCELERATE, ROOT, free_port, in_child, launch, logged, run, same_weights, weights_of, write_jsonl  # noqa: I001

import main


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """Flags of a run of 2 epochs over 24 chunks, 4 chunks a step; its output_dir must be added."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("base")
    topics = pydoc_data.topics.topics
    train = write_jsonl(folder / "train.jsonl", [topics[name] for name in ("with", "while", "try", "class")])
    validation = write_jsonl(folder / "validation.jsonl", [topics["if"], topics["for"]])
    return ["--model_name_or_path", tiny, "--train_file", train, "--validation_file", validation,
            "--max_seq_length", 64, "--no_truncation", "--cache_dir", folder / "cache", "--max_train_samples", 24,
            "--max_eval_samples", 13, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
            "--num_train_epochs", 2, "--learning_rate", 1e-3, "--warmup_steps", 0, "--logging_steps", 1,
            "--report_to", "none"]  # fmt: skip


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """The output_dir of that run in one process."""
    output = tmp_path_factory.mktemp("one") / "out"
    done = run(*base, "--output_dir", output)
    assert done.status == 0, done.err
    return output


def losses(output):
    return [row["loss"] for row in logged(output) if "loss" in row]


def close_weights(one, other):
    """The largest difference of two models' weights, relative to the largest weight."""
    first, second = weights_of(one), weights_of(other)
    largest = max(value.abs().max().item() for value in first.values())
    return max((first[name] - second[name]).abs().max().item() for name in first) / largest


SAME = {  # the same chunks in a step, in other portions
    "accumulated": ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4],
    "checkpointed": ["--gradient_checkpointing"],
    "in two processes": ["--per_device_train_batch_size", 2],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_effective_batch_decides_the_training(name, base, one, tmp_path):
    """F9, F11, F16, B13: equal losses and final weights to 1e-4, however a batch of 4 is made up."""
    words = [*base, *SAME[name], "--output_dir", tmp_path / "out"]
    if name == "in two processes":
        start = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", free_port()]
        done = launch(*start, ROOT / "main.py", *words)
    else:
        done = run(*words)
    assert done.status == 0, done.err
    assert losses(tmp_path / "out") == pytest.approx(losses(one), rel=1e-4) and len(losses(one)) == 12
    assert in_child(close_weights, one, tmp_path / "out") < 1e-4
    mine, other = (json.loads((place / "eval_results.json").read_text()) for place in (tmp_path / "out", one))
    assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-4)  # 13 chunks: uneven over two processes


def test_a_logged_loss_is_the_mean_over_tokens(base, tmp_path):
    """F17: an epoch's last step, of two chunks instead of four, counts half; a stop in between changes nothing."""
    words = [*base, "--max_train_samples", 22, "--eval_strategy", "no"]
    for name, every in (("each", 1), ("all", 12)):
        done = run(*words, "--logging_steps", every, "--save_steps", 5, "--output_dir", tmp_path / name)
        assert done.status == 0, done.err
    each = losses(tmp_path / "each")
    assert len(each) == 12
    share = [2 if step % 6 == 5 else 4 for step in range(12)]  # chunks of each step
    parts = [range(5), range(5, 10), range(10, 12)]  # a line at each checkpoint and at the end
    means = [sum(each[step] * share[step] for step in part) / sum(share[step] for step in part) for part in parts]
    assert losses(tmp_path / "all") == pytest.approx(means, rel=1e-4)
    assert abs(means[1] / (sum(each[5:10]) / 5) - 1) > 1e-4  # the mean over steps is another number
    results = json.loads((tmp_path / "all" / "train_results.json").read_text())
    assert results["train_loss"] == pytest.approx(sum(map(float.__mul__, each, map(float, share))) / 44, rel=1e-4)
    again = [*words, "--logging_steps", 12, "--save_steps", 5, "--output_dir", tmp_path / "again"]
    done = run(*again, "--resume_from_checkpoint", tmp_path / "all" / "checkpoint-5")
    assert done.status == 0 and losses(tmp_path / "again") == losses(tmp_path / "all"), done.err


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(base, one, tmp_path):
    """F24: --torch_compile, whose graph ends at the chunked loss."""
    done = run(*base, "--torch_compile", "True", "--output_dir", tmp_path / "out")
    assert done.status == 0, done.err
    assert losses(tmp_path / "out") == pytest.approx(losses(one), rel=1e-3)
    assert in_child(close_weights, one, tmp_path / "out") < 1e-3


def test_looking_does_not_change_the_training(base, one, tmp_path):
    """F17 to F19: bit-equal weights whatever is logged, evaluated and saved."""
    done = run(*base, "--output_dir", tmp_path / "out", "--logging_steps", 5, "--eval_steps", 3, "--save_steps", 2)
    assert done.status == 0, done.err
    assert in_child(same_weights, one, tmp_path / "out")


@pytest.mark.parametrize("batch", [1, 5, 13])
def test_the_evaluation_loss_does_not_depend_on_the_batch(batch, base, one, tmp_path):
    """F10, B9: the last batch may be short; the value is plain transformers' on the saved model."""
    done = run("--model_name_or_path", one, *base[2:], "--do_eval", "--output_dir", tmp_path / "out",
               "--per_device_eval_batch_size", batch)  # fmt: skip
    assert done.status == 0, done.err
    measured = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert measured["eval_loss"] == pytest.approx(in_child(independent_loss, one, base[5], 64, 13), rel=1e-4)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["eval_loss"]))


def independent_loss(model_dir, path, length, count):
    """Mean next-token loss over the first chunks of a file, by plain transformers and torch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir).eval()
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    tokens = [token for row in rows for token in tokenizer(row)["input_ids"]]
    chunks = torch.tensor([tokens[start : start + length] for start in range(0, length * count, length)])
    with torch.no_grad():
        logits = model(chunks).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), chunks[:, 1:].reshape(-1)).item()


PROBE = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import main
seen = []
class Probe(torch.nn.Module):
    pass
original = main.make_trainer
def make_trainer(*parts):
    trainer = original(*parts)
    collate = trainer.data_collator
    def note(chunks):
        seen.extend(tuple(chunk["input_ids"].tolist()) for chunk in chunks)
        return collate(chunks)
    trainer.data_collator = note
    return trainer
main.make_trainer = make_trainer
main.main(main.parse_args(sys.argv[2:]), main.Signals())
print(json.dumps([hash(chunk) for chunk in seen]))
"""


@pytest.mark.slow
def test_each_epoch_sees_every_chunk_once_in_an_order_of_its_own(base, tmp_path):
    """F8, F23: other epochs and other seeds have other orders."""
    orders = []
    for seed in (1, 9):  # the sampler's seed is seed + epoch: neighbours share orders
        words = [ROOT, *base, "--eval_strategy", "no", "--seed", seed, "--output_dir", tmp_path / str(seed)]
        at = words.index("--validation_file")
        done = launch(sys.executable, "-c", PROBE, *words[:at], *words[at + 2 :])
        assert done.status == 0, done.err
        seen = json.loads(done.out.splitlines()[-1])
        assert len(seen) == 48
        orders += [seen[:24], seen[24:]]
    assert all(sorted(order) == sorted(orders[0]) and len(set(order)) == 24 for order in orders)
    assert len({tuple(order) for order in orders}) == 4


ODD = {  # flags → words of the note
    "--warmup_steps 500": ("shorter than its warm-up: it reaches 0.4%", "--warmup_steps, to 0 for example"),
    "--warmup_steps 500 --max_steps 1": ("it reaches 0.0% of the learning rate", "--warmup_steps, to 0"),
    "--gradient_accumulation_steps 8": ("all 24 chunks make less than one step of 32", "to 6 for a full one"),
}


@pytest.mark.parametrize("flags", ODD)
def test_an_odd_plan_is_said_before_the_first_step(flags, base, tmp_path):
    """F11, F14: a note, and the run goes on."""
    done = run(*base, "--max_steps", 3, *flags.split(), "--output_dir", tmp_path / "out")
    assert done.status == 0, done.err
    notes = " ".join(re.findall(r"^note +(.*)$", done.out.partition("'loss'")[0], re.M))
    assert [word for word in ODD[flags] if word not in notes] == [], done.out


@pytest.mark.parametrize("flags", ["", "--lr_scheduler_type constant --warmup_steps 500"], ids=["linear", "constant"])
def test_an_ordinary_plan_has_no_notes(flags, base, tmp_path):
    """F14: nothing to say about a plan that fits; a constant rate has no warm-up."""
    done = run(*base, "--output_dir", tmp_path / "out", "--max_steps", 3, *flags.split())
    assert done.status == 0 and "\nnote " not in done.out and "warm-up 0 steps" in done.out


NAMES = {"NVIDIA A40": 149.7, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
         "NVIDIA GH200 480GB": 989, "NVIDIA L40S": 362, "NVIDIA GeForce RTX 4090": 165, "NVIDIA RTX A4000": 0,
         "NVIDIA RTX A1000": 0, "NVIDIA L40": 0}  # fmt: skip


def test_a_peak_is_that_of_the_device_of_exactly_this_name():
    """F17: MFU is measured against the maker's number; an unlisted device with a similar name has none."""

    def peaks():
        import torch

        told = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16", world_size=2)
        found = {}
        for name in NAMES:
            torch.cuda.get_device_name = lambda device, name=name: name  # no such device is here
            found[name] = main.peak_flops(told)
        return found

    assert in_child(peaks) == {name: pytest.approx(2e12 * peak) for name, peak in NAMES.items()}
