"""Bad input: one sentence, exit status 2, no traceback, and nothing of an earlier run written over."""

import gzip
import importlib.util
import json
import os
import re
import shutil
import sys

import pytest
from helpers import ROOT, launch, run, write_jsonl

# Root reads and writes everything, so cases about permissions run without the capabilities that let it.
CAPABILITIES = "-dac_override,-dac_read_search"
ORDINARY = ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"] if os.geteuid() == 0 else []
GOOD = "--train_file {train} "


def plain_user(*argv):
    """Run main.py in a new interpreter that file permissions bind, also when root runs the tests."""
    return launch(*ORDINARY, sys.executable, ROOT / "main.py", *argv)


def cases(table):
    """Turn {id: (value, word, …)} into pytest parameters (value, [word, …])."""
    return [pytest.param(value, words, id=name) for name, (value, *words) in table.items()]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def refused(done, *words, status=2):
    """Assert that a run ended in one sentence on standard error that holds all the words. Returns: the sentence."""
    assert done.status == status, done.out + done.err
    assert "Traceback" not in done.out + done.err, done.err
    assert done.err.count("main.py: error: ") == 1, done.err
    sentence, *rest = done.err.partition("main.py: error: ")[2].splitlines()
    assert not [line for line in rest if line.strip() and not re.search(r"(it|examples)/s", line)], done.err
    assert [word for word in words if word not in sentence] == [], sentence
    return sentence


@pytest.fixture
def train(tmp_path):
    """A training file of 10 rows, about 100 tokens each."""
    return write_jsonl(tmp_path / "train.jsonl", ["The quick brown fox jumps over the lazy dog. " * 8] * 10)


@pytest.fixture
def earlier(tmp_path):
    """An output_dir that already holds a model and a saved best checkpoint."""
    (tmp_path / "out" / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"weights of an earlier run")
    (tmp_path / "out" / "checkpoint-best" / "optimizer.pt").write_bytes(b"state of an earlier run")
    return tmp_path / "out"


@pytest.fixture
def refuse(tmp_path, train, tiny, earlier):
    """A function that runs main.py with flags and asserts that it ends in one sentence that holds all the words."""

    def refuse(flags, *words, status=2, runner=run):
        before = snapshot(earlier)
        base = "--model_name_or_path {tiny} --output_dir {tmp}/out --max_seq_length 64 "
        done = runner(*(base + flags).format(tmp=tmp_path, train=train, tiny=tiny).split())
        sentence = refused(done, *words, status=status)
        assert before.items() <= snapshot(earlier).items()
        return sentence

    return refuse


# ── Flags ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CALLS = {
    "no data": ("", "no data", "--dataset_name", "--train_file"),
    "data twice": (GOOD + "--dataset_name wikitext", "--dataset_name", "--train_file", "leave one out"),
    "data twice, validation": ("--dataset_name wikitext --validation_file {train}", "--validation_file", "exclude"),
    "validation without train": ("--validation_file {train}", "no data", "--train_file"),
    "do_eval without validation": (GOOD + "--do_eval", "no data", "--validation_file"),
    "best model without validation": (
        GOOD + "--load_best_model_at_end", "--load_best_model_at_end", "validation data", "--validation_file"
    ),
    "best model, saved when not evaluated": (
        GOOD + "--validation_file {train} --load_best_model_at_end --save_steps 3 --eval_steps 2",
        "--load_best_model_at_end", "--save_steps", "--eval_steps", "equal",
    ),
    "best model, saved at other times": (
        GOOD + "--validation_file {train} --load_best_model_at_end --save_strategy epoch",
        "--load_best_model_at_end", "strategy to match",
    ),
    "best model by nothing": (
        GOOD + "--validation_file {train} --metric_for_best_model bleu", "--metric_for_best_model", "'bleu'", "'loss'"
    ),
    "evaluation of nothing": (GOOD + "--eval_on_start", "--eval_on_start", "--validation_file"),
    "schedule by nothing": (GOOD + "--lr_scheduler_type reduce_lr_on_plateau", "follows the loss", "--validation_file"),
    "best checkpoint of nothing": (
        GOOD + "--save_strategy best --metric_for_best_model loss", "--save_strategy best", "--validation_file"
    ),
    "schedule without its numbers": (GOOD + "--lr_scheduler_type warmup_stable_decay", "num_decay_steps", "flag"),
    "switch that is not there": (GOOD + "--no_bf16", "'--no_bf16'", "leave it out"),
    "do_eval of a checkpoint": (
        "--validation_file {train} --do_eval --resume_from_checkpoint {tmp}/out/checkpoint-1",
        "--do_eval", "--model_name_or_path", "out/checkpoint-1",
    ),
    "sharded": (GOOD + "--fsdp full_shard", "--fsdp", "leave it out"),
    "sharded by DeepSpeed": (GOOD + "--deepspeed x.json", "--deepspeed", "leave it out"),
    "batch that shrinks": (GOOD + "--auto_find_batch_size", "--auto_find_batch_size", "effective batch"),
    "metrics of batches": (GOOD + "--batch_eval_metrics", "--batch_eval_metrics", "leave it out"),
    "evaluation in pieces": (GOOD + "--eval_do_concat_batches False", "--eval_do_concat_batches", "leave it out"),
    "no full batch": (
        GOOD + "--dataloader_drop_last", "--dataloader_drop_last", "leaves chunks out", "leave it out"
    ),
    "length 0": (GOOD + "--max_seq_length 0", "--max_seq_length", "at least 2"),
    "length negative": (GOOD + "--max_seq_length -8", "--max_seq_length", "-8", "at least 2"),
    "length no number": (GOOD + "--max_seq_length long", "--max_seq_length", "'long'", "whole number"),
    "length a fraction": (GOOD + "--max_seq_length 64.5", "--max_seq_length", "'64.5'", "whole number"),
    "length above the context": (GOOD + "--max_seq_length 513", "--max_seq_length 513", "context", "512"),
    "learning rate 0": (GOOD + "--learning_rate 0", "--learning_rate", "above 0"),
    "learning rate negative": (GOOD + "--learning_rate -2e-5", "--learning_rate"),
    "learning rate nan": (GOOD + "--learning_rate nan", "--learning_rate", "nan"),
    "learning rate inf": (GOOD + "--learning_rate inf", "--learning_rate", "inf"),
    "learning rate no number": (GOOD + "--learning_rate fast", "--learning_rate", "'fast'", "number"),
    "learning rate missing": (GOOD + "--learning_rate", "--learning_rate", "expected one argument"),
    "epochs 0": (GOOD + "--num_train_epochs 0", "--num_train_epochs", "above 0"),
    "epochs negative": (GOOD + "--num_train_epochs -3", "--num_train_epochs", "above 0"),
    "train batch 0": (GOOD + "--per_device_train_batch_size 0", "--per_device_train_batch_size", "at least 1"),
    "train batch a fraction": (GOOD + "--per_device_train_batch_size 2.5", "--per_device_train_batch_size", "'2.5'"),
    "eval batch 0": (GOOD + "--per_device_eval_batch_size 0", "--per_device_eval_batch_size", "at least 1"),
    "accumulation 0": (GOOD + "--gradient_accumulation_steps 0", "--gradient_accumulation_steps", "at least 1"),
    "warm-up negative": (GOOD + "--warmup_steps -1", "--warmup_steps", "at least 0"),
    "weight decay negative": (GOOD + "--weight_decay -0.1", "--weight_decay", "-0.1", "at least 0"),
    "save steps 0": (GOOD + "--save_steps 0", "--save_steps", "above 0"),
    "eval steps negative": (GOOD + "--eval_steps -5", "--eval_steps", "above 0"),
    "logging steps 0": (GOOD + "--logging_steps 0", "--logging_steps", "above 0"),
    "save limit 0": (GOOD + "--save_total_limit 0", "--save_total_limit", "at least 1"),
    "seed negative": (GOOD + "--seed -1", "--seed", "at least 0"),
    "seed of more than 32 bits": (GOOD + "--seed 4294967296", "--seed", "below 4,294,967,296"),
    "samples 0": (GOOD + "--max_train_samples 0", "--max_train_samples", "at least 1"),
    "bf16 and fp16": (GOOD + "--bf16 --fp16", "--fp16", "not allowed with", "--bf16"),
    "beginning anew": (GOOD + "--overwrite_output_dir", "--overwrite_output_dir", "would lose", "leave it out"),
    "other data after a stop": (GOOD + "--ignore_data_skip", "--ignore_data_skip", "other data", "leave it out"),
    "fp16 without GPU": (GOOD + "--fp16", "--fp16", "GPU", "--bf16"),
    "report to nowhere": (GOOD + "--report_to nowhere", "nowhere", "tensorboard", "wandb"),
    "report to a misspelt place": (GOOD + "--report_to tensorbord", "tensorbord is not supported", "tensorboard,"),
    "report to none and more": (GOOD + "--report_to tensorboard none", "none is not supported"),
    "misspelt flag": (GOOD + "--learnin_rate 1e-4", "--learnin_rate", "--learning_rate"),
    "misspelt flag with =": (GOOD + "--learnin_rate=1e-4", "--learnin_rate", "--learning_rate"),
    "misspelt flag with dashes": (GOOD + "--trian-file x", "--trian_file", "--train_file"),
    "misspelt flag of the Trainer": (GOOD + "--lr_schedular_type cosine", "--lr_schedular_type", "--lr_scheduler_type"),
    "shortened flag": (GOOD + "--learning 1e-4", "unknown flag --learning", "--learning_rate"),
    "shortened flag of the Trainer": (GOOD + "--max_st 2", "unknown flag --max_st", "--max_steps"),
    "unknown short flag": (GOOD + "-x", "-x"),
    "output over the model": (
        "--train_file {train} --output_dir {tiny}", "--output_dir", "the model to start from", "choose another"
    ),
    "stray word": (GOOD + "--bf16 stray", "'stray'", "belongs to no flag", "--train_file"),
    "stray word behind a Trainer flag": (GOOD + "--max_steps 2 stray", "'stray'", "belongs to no flag"),
    "max_steps no number": (GOOD + "--max_steps abc", "--max_steps", "'abc'"),
    "max_steps 0": (GOOD + "--max_steps 0", "--max_steps", "at least 1"),
    "max_steps negative": (GOOD + "--max_steps -5", "--max_steps", "at least 1"),
    "max_steps missing": (GOOD + "--max_steps", "--max_steps", "expected one argument"),
    "unknown scheduler": (GOOD + "--lr_scheduler_type nonsense", "--lr_scheduler_type", "'nonsense'", "'cosine'"),
    "unknown optimizer": (GOOD + "--optim nonsense", "--optim", "'nonsense'", "'adamw_torch'"),
    "optimizer not installed": (GOOD + "--optim adamw_8bit", "bitsandbytes", "install"),
    "Trainer switch neither on nor off": (GOOD + "--torch_compile maybe", "--torch_compile", "maybe"),
}
NOT_INSTALLED = {
    "flash_attn": ("--use_flash_attention", "--use_flash_attention", "flash-attn", "pip install flash-attn"),
    "wandb": ("--report_to wandb", "wandb to be installed", "pip install wandb"),
}


@pytest.mark.parametrize(("flags", "words"), cases(CALLS))
def test_wrong_call_is_refused_in_one_sentence_that_names_the_flag_and_the_remedy(flags, words, refuse):
    """F4, F6, F8 to F15, F17 to F24, B9: a wrong flag, value or combination ends with status 2."""
    refuse(flags, *words)


@pytest.mark.parametrize(("package", "case"), NOT_INSTALLED.items())
def test_missing_optional_package_is_named_with_its_install_command(package, case, refuse):
    """F2, F21: flash-attn and wandb are looked for before anything is loaded."""
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    refuse(GOOD + case[0], *case[1:])


def test_flash_attention_without_a_gpu_is_refused(refuse, tmp_path, monkeypatch):
    """F2: with the package there but no GPU, the sentence is about the GPU."""
    (tmp_path / "site" / "flash_attn").mkdir(parents=True)
    (tmp_path / "site" / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    refuse(GOOD + "--use_flash_attention", "--use_flash_attention", "GPU")


@pytest.mark.parametrize(("flags", "nearest"), [(["--help"], None), (["--learnin_rate", "1"], "--learning_rate")])
def test_help_and_a_misspelt_flag_answer_before_the_heavy_imports(flags, nearest):
    """B1: torch, transformers and datasets are imported only after the command line was read."""
    done = launch(sys.executable, "-X", "importtime", ROOT / "main.py", *flags)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.err, re.M))
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "accelerate", "numpy"}
    assert done.status == (2 if nearest else 0)
    assert nearest is None or nearest in done.err


def test_help_shows_the_groups_the_flags_and_their_defaults():
    """B1, F1 to F24: every flag of the table stands in its group with its default."""
    done = run("--help", env={"COLUMNS": "200"})
    assert done.status == 0 and not done.err
    groups = {part.partition(":")[0]: part for part in re.split(r"\n\n(?=[a-z ]+:\n)", done.out)}
    wanted = {
        "model": {"model_name_or_path": "google/gemma-270m", "use_flash_attention": False},
        "data": {
            "dataset_name": None, "dataset_config_name": None, "train_file": None, "validation_file": None,
            "text_column": "text", "max_seq_length": 2048,
        },
        "training": {
            "num_train_epochs": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 8, "learning_rate": 2e-05, "weight_decay": 0.01, "warmup_steps": 500,
        },
        "memory": {"bf16": False, "fp16": False, "gradient_checkpointing": False},
        "logging and checkpoints": {
            "output_dir": "./outputs", "logging_steps": 10, "save_steps": 500, "eval_steps": 500,
            "save_total_limit": 3, "report_to": "tensorboard", "resume_from_checkpoint": None,
        },
        "misc": {"seed": 42},
    }
    for group, flags in wanted.items():
        for flag, default in flags.items():
            entry = re.search(rf"^  --{flag}\b.*(?:\n {{4,}}.*)*", groups[group], re.M)
            assert entry, f"{flag} is not in the group {group}"
            if default:  # off and none may go without saying
                shown = re.search(r"\(default: (.*)\)", entry[0])[1]
                assert str(default) in (shown, shown.strip("[]'")), flag
    assert "TrainingArguments" in done.out


def test_flags_may_be_written_with_dashes(tiny, train, tmp_path):
    """F24: --learning-rate is --learning_rate, for our flags and for the Trainer's."""
    done = run(
        "--model-name-or-path", tiny, f"--train-file={train}", "--output-dir", tmp_path / "out", "--max-seq-length=64",
        "--learning-rate", "1e-4", "--warmup-steps=0", "--max-steps=1", "--lr-scheduler-type", "constant",
        "--logging-steps", "1", "--report-to", "none",
    )
    assert done.status == 0, done.err
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert (state["max_steps"], state["log_history"][0]["learning_rate"]) == (1, 1e-4)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ZIPPED = gzip.compress(lines(*[{"text": f"row {number}"} for number in range(1000)]).encode())
CONTENT = {  # case: (file name, content), words of the sentence
    "empty": (("bad.jsonl", ""), "bad.jsonl", "empty"),
    "unknown extension": (("bad.parquet", "PAR1"), "bad.parquet", "extension", ".json", ".csv", ".txt", ".gz"),
    "broken line": (("bad.jsonl", '{"text": "a"}\n{"text": "b"\n'), "bad.jsonl, line 2", "broken JSON", "one object a"),
    "broken array": (("bad.json", '[{"text": "a"},\n {"text": "b"},\n {"text": }]'), "bad.json, line 3", "broken JSON"),
    "open array": (("bad.json", '[{"text": "a"},\n'), "bad.json, line ", "broken JSON"),
    "nested too deeply": (("bad.json", "[" * 100_000), "bad.json", "broken JSON"),
    "bare string": (("bad.json", '"hello"'), "bad.json, line 1", '"hello"', "object", '{"text": '),
    "array of numbers": (("bad.json", '[{"text": "a"}, 2]'), "bad.json, item 2", "2 is no JSON object", '{"text": '),
    "strings a line": (("bad.jsonl", '{"text": "a"}\n"b"\n'), "bad.jsonl, line 2", '"b"', "object"),
    "gz cut short": (("bad.jsonl.gz", ZIPPED[:-30]), "bad.jsonl.gz", "cannot be read to its end"),
    "gz that is none": (("bad.txt.gz", "plain text\n"), "bad.txt.gz", "cannot be read", "gzip"),
    "csv with a value too many": (
        ("bad.csv", "id,text\n1,hello\n2,hello, world\n"), "bad.csv, line 3", "3 values", "has 2", "double quotes"
    ),
    "csv with a value too few": (("bad.csv", "id,text\n1,hello\n2\n"), "bad.csv, line 3", "1 value", "has 2"),
    "csv with an open quote": (("bad.csv", 'id,text\n1,"hello\n2,world\n'), "bad.csv", "broken CSV", "line"),
    "Latin-1": (("bad.txt", "plain\ncafé\n".encode("latin1")), "bad.txt", "not UTF-8", "byte 9", "0xe9", "iconv"),
    "UTF-16": (("bad.txt", "a line\n".encode("utf-16")), "bad.txt", "not UTF-8", "byte 0", "utf-16"),
    "UTF-16 without a mark": (
        ("bad.txt", "a line\nand another\n".encode("utf-16-le")), "bad.txt", "line 1", "NUL", "iconv -f utf-16le"
    ),
    "NUL in CSV": (("bad.csv", "text\nhello\nwor\0ld\n"), "bad.csv", "line 3", "NUL"),
    "no such column in json": (
        ("bad.jsonl", lines({"Text": "a", "id": 1})), "bad.jsonl, line 1", "'text'", "mean 'Text'?",
        "columns: Text, id", "--text_column",
    ),
    "column gone half-way": (("bad.jsonl", lines({"text": "a"}, {"body": "b"})), "bad.jsonl, line 2", "columns: body"),
    "no such column in csv": (
        ("bad.csv", "id,txt\n1,hello\n"), "bad.csv, line 1", "'text'", "mean 'txt'?", "columns: id, txt",
        "--text_column",
    ),
    "json column of numbers": (("bad.jsonl", lines({"text": 5})), "line 1", "'text'", "holds 5", "--text_column"),
    "json column of lists": (("bad.json", '[{"text": ["a"]}]'), "item 1", "'text'", 'holds ["a"]', "--text_column"),
    "json column of nulls": (("bad.jsonl", lines({"text": None}, {"text": None})), "train", "no text", "2 rows"),
    "lone surrogate": (("bad.jsonl", lines({"text": "a"}, {"text": "b \ud83d"})), "line 2", r"\ud800 to \udfff"),
    "blank rows only": (("bad.txt", "\n   \n\t\n"), "train", "no text", "3 rows", "blank"),
    "csv without rows": (("bad.csv", "text\n"), "no rows"),
    "empty array": (("bad.json", "[]"), "no rows"),
    "line breaks only": (("bad.jsonl", "\n\n"), "no rows"),
}
PATHS = {
    "file missing": ("--train_file {tmp}/trian.jsonl", "--train_file", "trian.jsonl", "no such file", "/train.jsonl'?"),
    "validation file missing": (GOOD + "--validation_file {tmp}/val.txt", "--validation_file", "val.txt", "no such"),
    "glob without a match": ("--train_file {tmp}/*.csv", "--train_file", "*.csv", "no such file"),
    "file is a directory": ("--train_file {tmp}", "--train_file", "is a directory", "--dataset_name"),
    "output_dir is a file": (GOOD + "--output_dir {train}", "--output_dir", "train.jsonl", "file", "choose"),
    "output_dir below a file": (GOOD + "--output_dir {train}/out", "--output_dir", "Not a directory", "choose"),
    "model missing": (GOOD + "--model_name_or_path {tmp}/none", "--model_name_or_path", "none", "no such directory"),
    "model missing, relative": (GOOD + "--model_name_or_path ./none", "--model_name_or_path", "no such directory"),
    "model is a file": (GOOD + "--model_name_or_path {train}", "--model_name_or_path", "train.jsonl", "directory"),
    "resume from nothing": (GOOD + "--resume_from_checkpoint {tmp}/none", "--resume_from_checkpoint", "none"),
    "resume from no checkpoint": (
        GOOD + "--resume_from_checkpoint {tiny}", "--resume_from_checkpoint", "cannot be used", "manifest.json"
    ),
}


@pytest.mark.parametrize(("file", "words"), cases(CONTENT))
def test_bad_file_is_refused_in_one_sentence_that_says_where(file, words, refuse, tmp_path):
    """F4, F5, B2, B5: what is wrong in a file is named with file, line, item, byte or column."""
    name, content = file
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(f"--train_file {{tmp}}/{name}", *words)


def test_bad_validation_file_is_named(refuse, tmp_path):
    """B9: the validation data is held to the same rules."""
    (tmp_path / "val.txt").write_text("\n\n")
    refuse(GOOD + "--validation_file {tmp}/val.txt", "validation", "2 rows", "blank")


@pytest.mark.parametrize(("flags", "words"), cases(PATHS))
def test_bad_path_is_refused_in_one_sentence_that_names_it(flags, words, refuse):
    """F1, F4, F7, F22: paths are checked before anything is loaded."""
    refuse(flags, *words)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_too_little_text_names_a_length_that_works(split, refuse, tiny, train, tmp_path):
    """B4: with less text than one chunk, the sentence gives the number of tokens, and that --max_seq_length trains."""
    few = tmp_path / "few.txt"
    few.write_text("A handful of words.\nAnd a second line.\n")
    flags = "--train_file {tmp}/few.txt" if split == "train" else GOOD + "--validation_file {tmp}/few.txt"
    sentence = refuse(flags, split, "--max_seq_length", "one chunk of 64")
    tokens, length = re.search(r"(\d+) tokens.*--max_seq_length \D*(\d+)", sentence).groups()
    assert tokens == length
    flags = [*flags.format(tmp=tmp_path, train=train).split(), "--model_name_or_path", tiny, "--report_to", "none"]
    done = run(*flags, "--output_dir", tmp_path / "new", "--max_steps", 1, "--max_seq_length", length)
    assert done.status == 0, done.err


def test_a_file_without_read_permission_is_refused(refuse, train):
    """F4: a file that belongs to somebody else."""
    train.chmod(0)
    refuse(GOOD, "--train_file", "train.jsonl", "no permission to read", runner=plain_user)


@pytest.mark.parametrize("below", ["", "/new"])
def test_an_output_dir_without_write_permission_is_refused(below, refuse, tmp_path):
    """F7: found at the start, not at the first checkpoint."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    flags = GOOD + "--output_dir {tmp}/locked" + below
    refuse(flags, "--output_dir", "locked", "ermission", "choose", runner=plain_user)


def test_data_that_changed_since_leaves_the_checkpoint_to_go_on_from(refuse, tiny, train, tmp_path):
    """B10: a refusal touches no file of an interrupted run, which goes on once its data is right again."""
    out, text = tmp_path / "interrupted", train.read_text()
    flags = f"{GOOD} --output_dir {{tmp}}/interrupted --max_steps 2 --save_steps 1 --report_to none"
    base = f"--model_name_or_path {tiny} --max_seq_length 64 {flags}".format(train=train, tmp=tmp_path).split()
    assert run(*base).status == 0
    shutil.rmtree(out / "checkpoint-2")
    (out / "manifest.json").unlink()
    before = snapshot(out)
    train.write_text(text + "{\n")
    refuse(flags, "train.jsonl", "other settings", "--output_dir")
    assert before.items() <= snapshot(out).items()
    train.write_text(text)
    assert run(*base).status == 0
    assert before.keys() | {(out / "checkpoint-2" / "trainer_state.json").relative_to(out)} <= snapshot(out).keys()


# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MODELS = {  # case: what is done to a good model, words of the sentence
    "without config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "without weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "without tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "weights cut short": (cut_weights, "cannot be loaded", "incomplete"),
    "weights that are text": (lambda folder: (folder / "model.safetensors").write_text("oops"), "cannot be loaded"),
    "one weight missing": (drop_weight, "lacks", "layers.0.mlp.up_proj.weight"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json", "JSON"),
    "config of another size": (lambda folder: edit_config(folder, hidden_size=32), "model.embed_tokens.weight"),
    "unknown kind of model": (lambda folder: edit_config(folder, model_type="gemma99"), "gemma99"),
    "tokenizer that is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.parametrize(("spoil", "words"), cases(MODELS))
def test_bad_model_directory_is_refused_in_one_sentence_that_says_what_it_lacks(spoil, words, refuse, tiny, tmp_path):
    """F1: a model directory that is not whole is never trained from."""
    shutil.copytree(tiny, tmp_path / "model")
    spoil(tmp_path / "model")
    flags = GOOD + "--model_name_or_path {tmp}/model"
    refuse(flags, "--model_name_or_path", str(tmp_path / "model"), *words)


# ── Scenarios ────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_out_of_memory_ends_with_status_1_and_the_four_remedies_in_order(refuse, tmp_path):
    """F9, README: a batch that does not fit the process's address space fails in its first step."""
    rows = ["The quick brown fox jumps over the lazy dog. " * 1000] * 35
    write_jsonl(tmp_path / "much.jsonl", rows)
    flags = (
        "--train_file {tmp}/much.jsonl --max_seq_length 512 --no_truncation --per_device_train_batch_size 2048 "
        "--max_steps 1 --report_to none"
    )

    def little_memory(*argv):
        return launch("prlimit", f"--as={4 * 2**30}", sys.executable, ROOT / "main.py", *argv)

    sentence = refuse(flags, "out of memory", status=1, runner=little_memory)
    remedies = ["--bf16", "--per_device_train_batch_size", "--gradient_checkpointing", "--max_seq_length"]
    assert sorted(remedies, key=sentence.index) == remedies
