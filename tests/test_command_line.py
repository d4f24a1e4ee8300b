"""The command line: flags, defaults and paths; a slip ends in one sentence, status 2, and touches no earlier run."""

import importlib.util
import json
import re
import sys

import pytest
from helpers import ROOT, cases, finish, in_child, launch, plain_user, run, short_run

import main

GOOD = "--train_file {train} "


# ── Wrong calls ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
    "schedule without its numbers": (
        GOOD + "--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_type warmup_stable_decay", "num_decay_steps"
    ),
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
    "rounded gradients without GPU": (GOOD + "--ddp_comm_hook bf16", "--ddp_comm_hook", "GPU", "leave them out"),
    "unknown mode of torch": (GOOD + "--torch_compile_mode fast", "--torch_compile_mode fast: known are default"),
    "unknown compiler": (GOOD + "--torch_compile_backend fast", "--torch_compile_backend fast: known are ", "inductor"),
    "CUDA graphs": (GOOD + "--torch_compile_mode reduce-overhead", "CUDA graphs", "max-autotune-no-cudagraphs"),
    "unknown hook": (GOOD + "--ddp_comm_hook fp8", "--ddp_comm_hook", "fp8", "bf16"),
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
    "stray word behind a switch": (GOOD + "--bf16 stray", "--bf16", "'stray'", "neither True nor False"),
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


@pytest.mark.parametrize(("name", "release", "words"), [
    ("flash_attn", "2.8.3", "need a GPU"), ("flash_attn_4", "4.0.0b36", "needs flash-attn 2: pip install flash-attn")])
def test_flash_attention_without_a_gpu_or_of_another_version_is_refused(name, release, words, refuse, tmp_path,
                                                                            monkeypatch):  # fmt: skip
    """F2: with version 2 there but no GPU, the sentence is about the GPU; flash-attn-4's module has its name."""
    site = tmp_path / "site"
    for folder in (site / "flash_attn", site / f"{name}-{release}.dist-info"):
        folder.mkdir(parents=True)
    (site / "flash_attn" / "__init__.py").touch()
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
    (site / f"{name}-{release}.dist-info" / "METADATA").write_text(about)
    monkeypatch.syspath_prepend(site)
    refuse(GOOD + "--use_flash_attention", "--use_flash_attention", words)


# ── Help and defaults ────────────────────────────────────────────────────────────────────────────────────────────────


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

    output = tmp_path / "out"
    finish("--model_name_or_path", tiny, "--train_file", texts[0], "--output_dir", output, "--max_seq_length", 64,
           "--max_steps", 1, "--lr_scheduler_type", "cosine", "--adam-beta2", 0.95)  # fmt: skip

    def trainers():
        import torch

        return torch.load(output / "training_args.bin", weights_only=False).to_dict()

    theirs = in_child(trainers)
    common = set(table) & set(theirs) - {"resume_from_checkpoint"}
    assert len(common) >= 13 and {name: theirs[name] for name in common} == {name: table[name] for name in common}
    assert (theirs["max_steps"], theirs["lr_scheduler_type"], theirs["adam_beta2"]) == (1, "cosine", 0.95)  # F24


def test_flags_may_be_written_with_dashes(tiny, train, tmp_path):
    """F24: --learning-rate is --learning_rate, for our flags and for the Trainer's."""
    finish(
        "--model-name-or-path", tiny, f"--train-file={train}", "--output-dir", tmp_path / "out", "--max-seq-length=64",
        "--learning-rate", "1e-4", "--warmup-steps=0", "--max-steps=1", "--lr-scheduler-type", "constant",
        "--logging-steps", "1", "--report-to", "none",
    )
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert (state["max_steps"], state["log_history"][0]["learning_rate"]) == (1, 1e-4)


def test_the_script_runs_as_a_user_starts_it(tiny, tmp_path, texts):
    """C7: a new interpreter, another working directory, a relative output directory."""
    done = launch(*short_run(tiny, texts, "./outputs", "--max_steps", 1), cwd=tmp_path)
    assert done.status == 0, done.err
    assert (tmp_path / "outputs" / "model.safetensors").exists() and "Traceback" not in done.err


# ── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


PATHS = {
    "file missing": ("--train_file {tmp}/trian.jsonl", "--train_file", "trian.jsonl", "no such file", "/train.jsonl'?"),
    "validation file missing": (GOOD + "--validation_file {tmp}/val.txt", "--validation_file", "val.txt", "no such"),
    "glob without a match": ("--train_file {tmp}/*.csv", "--train_file", "*.csv", "no such file"),
    "directory without text": ("--train_file {tmp}/out", "--train_file", "no files of the kinds", "left out", "optimizer.pt"),
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


@pytest.mark.parametrize(("flags", "words"), cases(PATHS))
def test_bad_path_is_refused_in_one_sentence_that_names_it(flags, words, refuse):
    """F1, F4, F7, F22: paths are checked before anything is loaded."""
    refuse(flags, *words)


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
