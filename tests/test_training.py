"""From chunks to a finished model: defaults, precision, evaluation, results, going on."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, in_child, launch, run

import main


def command(tiny, texts, output, *more):
    """A short run on the tiny model: 12 steps or so an epoch."""
    return ["--model_name_or_path", tiny, "--train_file", texts[0], "--validation_file", texts[1],
            "--output_dir", output, "--no_truncation", "--max_seq_length", 64, "--learning_rate", 1e-3,
            "--warmup_steps", 2, *more]  # fmt: skip


def weights_of(folder):
    """Return {name: tensor} of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_weights(one, other):
    """Whether two saved models are equal bit for bit."""
    import torch

    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def plain_loss(model_dir, chunks):
    """Mean next-token loss over chunks, in float32, with nothing but transformers and torch's cross-entropy."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor(chunks)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()


def chunks_of(model_dir, path, length):
    """The chunks of a .jsonl file, untruncated, by the plainest code."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = [token for line in open(path) for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


def logged(output):
    """The log history of the newest checkpoint."""
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


def test_defaults_are_those_of_the_table(tiny, tmp_path, texts):
    """F1 to F23: every default, on the command line and as the Trainer got it."""
    args = main.parse_args(["--train_file", str(texts[0]), "--output_dir", str(tmp_path / "x")])
    table = {
        "model_name_or_path": "google/gemma-3-270m", "use_flash_attention": False, "dataset_name": None,
        "dataset_config_name": None, "validation_file": [], "text_column": "text", "max_seq_length": 2048,
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 8, "learning_rate": 2e-5, "weight_decay": 0.01, "warmup_steps": 500,
        "bf16": False, "fp16": False, "gradient_checkpointing": False, "logging_steps": 10, "save_steps": 500,
        "eval_steps": 500, "save_total_limit": 3, "report_to": ["tensorboard"], "resume_from_checkpoint": None,
        "seed": 42,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in table} == table
    assert "default: ./outputs" in " ".join(run("--help").out.split())

    output = tmp_path / "out"
    done = run("--model_name_or_path", tiny, "--train_file", texts[0], "--output_dir", output, "--max_seq_length", 64,
               "--max_steps", 1, "--lr_scheduler_type", "cosine", "--adam-beta2", 0.95)  # fmt: skip
    assert done.status == 0, done.err

    def trainers():
        import torch

        return torch.load(output / "training_args.bin", weights_only=False).to_dict()

    theirs = in_child(trainers)
    common = set(table) & set(theirs) - {"resume_from_checkpoint"}
    assert len(common) >= 13 and {name: theirs[name] for name in common} == {name: table[name] for name in common}
    assert (theirs["max_steps"], theirs["lr_scheduler_type"], theirs["adam_beta2"]) == (1, "cosine", 0.95)  # F24


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run of 3 epochs with validation every 5 steps. Returns: (output_dir, done, texts, argv)."""
    import pydoc_data.topics

    from helpers import write_jsonl

    folder = tmp_path_factory.mktemp("finished")
    topics = pydoc_data.topics.topics
    texts = [write_jsonl(folder / "train.jsonl", [topics[name] for name in ("with", "while", "try", "class")]),
             write_jsonl(folder / "validation.jsonl", [topics["if"], topics["for"]])]  # fmt: skip
    argv = command(tiny, texts, folder / "out", "--logging_steps", 1, "--save_steps", 4, "--eval_steps", 5)
    return folder / "out", run(*argv), texts, argv


def test_the_banner_says_what_will_happen(finished):
    """F11, F16, B1: model, device, data, effective batch, steps and place, before the first step."""
    output, done, texts, _ = finished
    assert done.status == 0, done.err
    chunks = int(re.search(r"= (\d+) chunks of 64", done.out)[1])
    steps = math.ceil(3 * math.ceil(math.ceil(chunks / 4) / 8))
    for words in (
        "No GPU found: training on the CPU.",
        "99,008 parameters in float32, sdpa attention",
        "device   cpu, 1 process",
        "4 per device × 8 accumulation × 1 = 32 chunks = 2,048 tokens a step",
        f"steps    {steps} (3 epochs), learning rate 0.001, warm-up 2 steps",
        f"output   {output}",
    ):
        assert words in done.out
    assert json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())["max_steps"] == steps


def test_results_are_written_as_json(finished):
    """B9, B12: train, eval and all results; the perplexity is exp of the loss, in every evaluation."""
    output, _, _, _ = finished
    names = ("train_results.json", "eval_results.json", "all_results.json")
    train, evaluation, everything = (json.loads((output / name).read_text()) for name in names)
    assert everything == train | evaluation
    assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]))
    during = [entry for entry in logged(output) if "eval_loss" in entry]
    assert during and all(entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"])) for entry in during)


def test_evaluation_equals_plain_transformers(finished):
    """B9: the reported validation loss is what transformers and torch compute on the saved model."""
    output, _, texts, _ = finished
    expected = in_child(lambda: plain_loss(output, chunks_of(output, texts[1], 64)))
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_model_learns_and_loads(finished):
    """B12: the loss falls; model and tokenizer load from output_dir with transformers, and generate."""
    output, _, _, _ = finished
    losses = [entry["loss"] for entry in logged(output) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1

    def generate():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(output)
        model = AutoModelForCausalLM.from_pretrained(output)
        ids = model.generate(**tokenizer("The with", return_tensors="pt"), max_new_tokens=8, do_sample=False)
        return str(model.dtype), model.config.use_cache, len(ids[0]) - len(tokenizer("The with")["input_ids"])

    dtype, use_cache, new = in_child(generate)
    assert dtype == "torch.float32" and use_cache is True and 1 <= new <= 8


def test_tensorboard_has_the_curves(finished):
    """B11: loss, learning rate and validation loss are in output_dir/runs."""
    output, _, _, _ = finished

    def tags():
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = set()
        for file in (output / "runs").glob("events*"):
            found |= set(EventAccumulator(str(file)).Reload().Tags()["scalars"])
        return found

    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/perplexity"} <= in_child(tags)


def test_old_checkpoints_go_and_the_newest_stay(finished, tmp_path, tiny):
    """B10, F20: save_total_limit newest are kept."""
    output, done, texts, _ = finished
    steps = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    assert len(steps) == 3 and steps[-1] == max(entry["step"] for entry in logged(output))


def test_the_same_command_again_says_it_is_finished(finished):
    """B10: nothing is trained, nothing is written, exit status 0; the way to train further is named."""
    output, _, _, argv = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("[!.]*") if path.is_file()}
    done = run(*argv)
    assert done.status == 0 and "This run finished at step" in done.out and "--model_name_or_path" in done.out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("[!.]*") if path.is_file()} == before


def test_a_missing_final_save_is_made_up(finished, tmp_path):
    """B12: stopped after the last checkpoint but before the final save, the same command writes the same model."""
    output, _, _, argv = finished
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    for name in ("train_results.json", "eval_results.json", "model.safetensors"):
        (copy / name).unlink()
    done = run(*argv, "--output_dir", copy)
    assert done.status == 0, done.err
    assert in_child(same_weights, output, copy) and (copy / "train_results.json").exists()
    assert json.loads((copy / "config.json").read_text())["use_cache"] is True


def test_do_eval_alone_only_evaluates(finished, tmp_path):
    """B9: the base model's or a finished model's perplexity without training; no training data is needed."""
    output, _, texts, _ = finished
    done = run("--do_eval", "--model_name_or_path", output, "--validation_file", texts[1], "--no_truncation",
               "--max_seq_length", 64, "--output_dir", tmp_path / "eval")  # fmt: skip
    assert done.status == 0, done.err
    again = json.loads((tmp_path / "eval" / "eval_results.json").read_text())
    first = json.loads((output / "eval_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert not list((tmp_path / "eval").glob("*.safetensors")) and not list((tmp_path / "eval").glob("checkpoint*"))


def test_do_eval_alone_leaves_a_training_run_alone(finished):
    """B12: the results of a training run are not replaced by those of an evaluation."""
    output, _, texts, _ = finished
    before = (output / "all_results.json").read_text()
    done = run("--do_eval", "--model_name_or_path", output, "--validation_file", texts[1], "--output_dir", output)
    assert done.status == 2 and "choose another for --do_eval" in done.err, done.err
    assert (output / "all_results.json").read_text() == before


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(finished, tmp_path):
    """B10: killed after a checkpoint, the same command goes on from it and ends with the undisturbed run's weights."""
    output, _, _, argv = finished
    place = tmp_path / "out"
    full = [sys.executable, str(ROOT / "main.py"), *map(str, argv), "--output_dir", str(place)]
    child = subprocess.Popen(full, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (place / "checkpoint-4" / "trainer_state.json").exists():
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (place / "model.safetensors").exists()
    (place / "checkpoint-8").exists() and shutil.rmtree(place / "checkpoint-8")  # perhaps half written
    done = run(*argv, "--output_dir", place)
    assert done.status == 0, done.err
    assert f"Going on from {place / 'checkpoint-4'}, step 4 of" in done.out
    assert in_child(same_weights, output, place)


def test_a_chosen_checkpoint_overrides_the_newest(finished, tmp_path):
    """F22: --resume_from_checkpoint."""
    output, _, _, argv = finished
    steps = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    done = run(*argv, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", f"{steps[0]}/")
    assert done.status == 0 and f"Going on from {steps[0]}, step" in done.out
    assert in_child(same_weights, output, tmp_path / "out")


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"]], ids=["plain", "gradient_checkpointing"])
def test_first_loss_equals_plain_transformers(tiny, tmp_path, texts, more):
    """B6, B14, F16: labels are the inputs, weights are float32; the first step's loss is the plain model's."""
    chunks = in_child(chunks_of, tiny, texts[0], 64)[:8]
    done = run(*command(tiny, texts, tmp_path / "out", "--max_train_samples", 8, "--max_steps", 1, "--logging_steps", 1,
                        "--gradient_accumulation_steps", 2, *more))  # fmt: skip
    assert done.status == 0, done.err
    expected = in_child(plain_loss, tiny, chunks)
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_bf16_keeps_float32_weights(tiny, tmp_path, texts):
    """B14: with --bf16 an update far below bfloat16's resolution is kept."""
    done = run(*command(tiny, texts, tmp_path / "out", "--max_steps", 1, "--bf16", "--warmup_steps", 0,
                        "--learning_rate", 1e-6))  # fmt: skip
    assert done.status == 0, done.err

    def change():
        before, after = weights_of(tiny), weights_of(tmp_path / "out")
        moved = [(after[name] - before[name].float()).abs().max().item() for name in after]
        return {str(weight.dtype) for weight in after.values()}, min(moved), max(moved)

    dtypes, least, most = in_child(change)
    assert dtypes == {"torch.float32"} and 0 < least <= most < 2e-6  # bfloat16 steps are 4e-3 of a weight


def test_the_precision_of_the_launcher_counts_as_one_of_the_run(tiny, tmp_path, texts):
    """B14, B10: accelerate's --mixed_precision is in force without --bf16; a run goes on only with the same."""
    argv = command(tiny, texts, tmp_path / "out", "--max_steps", 1)
    done = run(*argv, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert done.status == 0 and "1 process, bf16 autocast" in done.out, done.err
    done = run(*argv)
    assert done.status == 2 and "autocast is 'no' instead of 'bf16'" in done.err, done.err


def variant(tiny, folder, edit):
    """Copy the tiny model and edit it in a child. Returns: folder."""
    shutil.copytree(tiny, folder)
    in_child(edit, folder)
    return folder


def test_pad_falls_back_to_eos_and_eos_is_still_learnt(tiny, tmp_path, texts):
    """B7, B6: a tokenizer without a pad token gets EOS for it; with --add_eos the EOS tokens stay in the labels."""

    def without_pad(folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    model = variant(tiny, tmp_path / "model", without_pad)
    short = tmp_path / "short.jsonl"
    short.write_text(''.join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(80)))
    done = run("--model_name_or_path", model, "--train_file", short, "--output_dir", tmp_path / "out", "--add_eos",
               "--max_seq_length", 64, "--max_steps", 1, "--logging_steps", 1)  # fmt: skip
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"] == "<eos>"

    def expected():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = [t for number in range(80) for t in [*tokenizer(f"text {number}")["input_ids"], 1]]
        chunks = [tokens[start : start + 64] for start in range(0, len(tokens) - 63, 64)]
        return plain_loss(model, chunks), len(chunks)

    loss, chunks = in_child(expected)
    assert 2 <= chunks <= 32  # one step sees them all
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_embeddings_grow_only_with_the_tokenizer(tiny, tmp_path, texts):
    """B8: tokens added to the tokenizer get rows, head and embedding stay tied; otherwise the size stays."""

    def add_tokens(folder):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<one>", "<two>"])
        tokenizer.save_pretrained(folder)

    grown = variant(tiny, tmp_path / "grown", add_tokens)
    for model, name in ((tiny, "same"), (grown, "more")):
        done = run(*command(model, texts, tmp_path / name, "--max_steps", 1))
        assert done.status == 0, done.err

    def sizes(folder):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        return embedding.shape[0], model.config.vocab_size, embedding.data_ptr() == head.data_ptr()

    assert in_child(sizes, tmp_path / "same") == (384, 384, True)
    assert in_child(sizes, tmp_path / "more") == (386, 386, True)


def test_no_validation_data_no_evaluation(tiny, tmp_path, texts):
    """B9, F19, F21: without validation data nothing is evaluated; --report_to none writes no curves."""
    done = run("--model_name_or_path", tiny, "--train_file", texts[0], "--output_dir", tmp_path / "out",
               "--max_seq_length", 64, "--max_steps", 2, "--eval_steps", 1, "--report_to", "none")  # fmt: skip
    assert done.status == 0, done.err
    assert "eval_loss" not in done.out and not (tmp_path / "out" / "eval_results.json").exists()
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize("every", [[], ["--logging_steps", 3]], ids=["shorter than it", "cut short"])
def test_the_last_steps_are_logged_as_well(every, tiny, tmp_path, texts):
    """F17: --logging_steps may be more than all steps, or no divisor of them; the last line is a mean of the rest."""
    output, each = tmp_path / "out", tmp_path / "each"
    for place, more in ((output, every), (each, ["--logging_steps", 1])):
        done = run(*command(tiny, texts, place, "--max_steps", 5, *more))
        assert done.status == 0, done.err
        assert re.search(r"'loss': .*'epoch'", done.out), done.out
    rows, single = ([row for row in logged(place) if "loss" in row] for place in (output, each))
    ends = [3, 5] if every else [5]
    assert [row["step"] for row in rows] == ends and [row["step"] for row in single] == [1, 2, 3, 4, 5]
    seen = [0, *(row["tokens_seen"] for row in single)]  # the last step of an epoch has fewer
    sums = [row["loss"] * (seen[step + 1] - seen[step]) for step, row in enumerate(single)]
    means = [sum(sums[a:b]) / (seen[b] - seen[a]) for a, b in zip([0, *ends], ends, strict=False)]
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-5)


def test_a_model_with_a_softcap_trains_with_its_own_loss(tiny, tmp_path, texts):
    """F17, B9: as Gemma 2's; it is said, and both losses are those of plain transformers."""

    def cap(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 0.2}))

    model = variant(tiny, tmp_path / "model", cap)
    done = run(*command(model, texts, tmp_path / "out", "--max_train_samples", 8, "--max_steps", 1,
                        "--gradient_accumulation_steps", 2))  # fmt: skip
    assert done.status == 0 and "its own loss is used, which holds all logits" in done.out, done.err
    losses = [in_child(plain_loss, place, chunks) for place, chunks in (
        (model, in_child(chunks_of, model, texts[0], 64)[:8]),
        (tiny, in_child(chunks_of, model, texts[0], 64)[:8]),
        (tmp_path / "out", in_child(chunks_of, model, texts[1], 64)))]  # fmt: skip
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[1] / losses[0] - 1) > 1e-3  # without the softcap it would be another number
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(losses[2], rel=1e-4)


def test_a_run_shorter_than_its_warm_up_gets_a_notice(tiny, tmp_path, texts):
    """F14: the default of 500 steps on a short run."""
    argv = command(tiny, texts, tmp_path / "out", "--max_steps", 5)
    done = run(*argv, "--warmup_steps", 500)
    assert done.status == 0 and "shorter than its warm-up: it reaches 0.8%" in done.out
    assert "shorter than its warm-up" not in run(*argv, "--output_dir", tmp_path / "other").out


def test_the_seed_decides_the_order(tiny, tmp_path, texts):
    """F23: same seed, same weights; another seed, another order."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*command(tiny, texts, tmp_path / name, "--max_steps", 3, "--seed", seed)).status == 0
    assert in_child(same_weights, tmp_path / "a", tmp_path / "b")
    assert not in_child(same_weights, tmp_path / "a", tmp_path / "c")


def test_the_script_runs_as_a_user_starts_it(tiny, tmp_path, texts):
    """C7: a new interpreter, another working directory, a relative output directory."""
    done = launch(*command(tiny, texts, "./outputs", "--max_steps", 1), cwd=tmp_path)
    assert done.status == 0, done.err
    assert (tmp_path / "outputs" / "model.safetensors").exists() and "Traceback" not in done.err


def test_a_loss_that_is_no_number_stops_the_run_before_anything_is_saved(tiny, tmp_path, texts):
    """B10: the sentence names the step; no checkpoint and no model is left."""
    done = run(*command(tiny, texts, tmp_path / "out", "--learning_rate", 1e38, "--save_steps", 1, "--warmup_steps", 0))
    assert done.status == 1 and "no finite numbers at step 1" in done.err and "Traceback" not in done.err, done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock", ".staging", "runs"}


def test_the_log_line_tells_speed_memory_and_time_left(finished):
    """F17: tokens seen are those of the steps made so far; time left runs out."""
    output, _, _, _ = finished
    rows = [row for row in logged(output) if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 < row["peak_memory_gb"] < 24 for row in rows)
    seen = [row["tokens_seen"] for row in rows]
    chunks = int(re.search(r"= (\d+) chunks of 64", finished[1].out)[1])
    an_epoch = [min(32 * step, chunks) for step in range(1, math.ceil(chunks / 32) + 1)]  # the last step is short
    assert seen == [64 * (epoch * chunks + part) for epoch in range(3) for part in an_epoch]
    assert rows[-1]["minutes_left"] == 0
    assert {path.name.split(".")[0] for path in (output / "runs").iterdir()} == {"events"}  # no folder: one curve
