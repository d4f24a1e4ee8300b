"""The command line: flags, defaults and paths; a slip ends in one sentence, status 2, and touches no earlier run."""

import importlib.util
import json
import re
import sys

import pytest
from helpers import (
    ROOT,
    ROWS,
    cases,
    finish,
    in_child,
    launch,
    plain_user,
    refused,
    run,
    short_run,
    write_jsonl,
)

import main
from tools.foreign_flags import FOREIGN

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
    "schedule with another's numbers": (
        GOOD + '--lr_scheduler_kwargs {{"bogus":1}}', "linear", "'bogus'", "leave it out"
    ),
    "schedule with a number in quotes": (
        GOOD + '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {{"min_lr":"1e-6"}}',
        "--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_kwargs", "without quotes",
    ),
    "schedule that takes no numbers": (
        GOOD + '--lr_scheduler_type constant --lr_scheduler_kwargs {{"power":2}}',
        "constant", "takes none", "leave them out",
    ),
    "schedule with a list": (GOOD + "--lr_scheduler_kwargs []", "--lr_scheduler_kwargs []", "no JSON object"),
    "schedule with half an object behind =": (
        GOOD + "--lr_scheduler_kwargs={{bad", "--lr_scheduler_kwargs {bad is no JSON object"
    ),
    "schedule with half an object": (
        GOOD + "--lr_scheduler_kwargs {{bad", "--lr_scheduler_kwargs {bad", "no JSON object"
    ),
    "optimizer's unknown number": (
        GOOD + "--optim_args bogus=1", "--optim_args bogus=1 changes nothing", "leave it out"
    ),
    "optimizer's number without a value": (GOOD + "--optim_args bogus", "--optim_args bogus cannot be used"),
    "optimizer's number that is none": (
        GOOD + "--optim sgd --optim_args momentum=x", "--optim sgd", "momentum=x", "'x'"
    ),
    "optimizer's number out of range": (GOOD + "--adam_beta1 1.5", "--optim adamw_torch", "1.5"),
    "Adam's number for another optimizer": (
        GOOD + "--optim sgd --adam_beta1 0.8", "--adam_beta1 changes nothing", "sgd"
    ),
    "Adafactor's number": (
        GOOD + "--optim adafactor --adam_epsilon 1e-9", "--adam_epsilon changes nothing", "adafactor"
    ),
    "layers for another optimizer": (GOOD + "--optim_target_modules x", "--optim_target_modules changes nothing"),
    "optimizer of a package": (GOOD + "--optim lomo", "--optim lomo cannot be used", "pip install lomo-optim"),
    "backend of a single process": (GOOD + "--ddp_backend gloo", "--ddp_backend", "several processes", "leave it out"),
    "offloading without a GPU": (
        GOOD + '--gradient_checkpointing --activation_checkpointing_kwargs {{"offload":true}}', "offload", "needs a GPU"
    ),
    "switch with a word": (GOOD + "--bf16=maybe", "--bf16", "'maybe'", "neither True nor False"),
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
    "length above the context": (GOOD + "--max_seq_length 513", "--max_seq_length 513", "at most 512"),
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
    "bf16 and fp16 as words": (GOOD + "--bf16 True --fp16=true", "--fp16", "not allowed with", "--bf16"),
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
    "flag of another trainer": (GOOD + "--block_size 64", "unknown flag --block_size: here it is --max_seq_length;"),
    "flag of another trainer with dashes": (
        GOOD + "--text-column-name x", "--text_column_name: here it is --text_column;"
    ),
    "flag of LitGPT": (
        GOOD + "--train.micro_batch_size 2", "micro_batch_size: here it is --per_device_train_batch_size"
    ),
    "flag of transformers 4": (GOOD + "--evaluation_strategy steps", "here it is --eval_strategy"),
    "flag that is not offered": (GOOD + "--lora_r 8", "unknown flag --lora_r: not offered: all weights are trained"),
    "flag that is not needed": (GOOD + "--packing", "unknown flag --packing: not needed: ", "leave it out"),
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


TWICE = {
    "a number": ("--seed 1 --seed 2", "--seed is given twice", "leave one out"),
    "a switch": ("--bf16 --bf16", "--bf16 is given twice"),
    "dashes and underscores": ("--learning-rate 1 --learning_rate=2", "--learning_rate is given twice"),
    "a flag of the Trainer": ("--max_steps 1 --max-steps=2", "--max_steps is given twice"),
    "on and off": ("--torch_compile --no_torch_compile", "torch_compile is given twice"),
}


@pytest.mark.parametrize(("flags", "words"), cases(TWICE))
def test_a_flag_that_is_given_twice_is_refused(flags, words, train, tmp_path):
    """F24: no value wins silently; only files may be given by several flags."""
    done = run("--train_file", train, "--output_dir", tmp_path / "x", *flags.split(), repeated=True)
    refused(done, *words)


@pytest.mark.parametrize("word", [
    "--load_best_model_at_end=False", "--load_best_model_at_end no", "--no_load_best_model_at_end"])
def test_a_switch_of_the_trainer_that_is_off_asks_for_nothing(word, train, tmp_path):
    """U9, B9: evaluations and checkpoints may then happen at other times."""
    words = ["--train_file", train, "--output_dir", tmp_path / "out", "--save_steps", 3, "--eval_steps", 2]
    assert main.parse_args([str(text) for text in [*words, *word.split()]]).save_steps == 3


def test_files_of_repeated_flags_are_all_read(tmp_path):
    """F4: --train_file a --train_file b trains on both, in this order; the same for validation."""
    a, b, c = (write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in "abc")
    words = ["--train_file", a, "--train_file", b, c, "--validation_file", a, f"--validation_file={c}"]
    args = main.parse_args([str(word) for word in [*words, "--output_dir", tmp_path / "out"]])
    assert (args.train_file, args.validation_file) == ([str(a), str(b), str(c)], [str(a), str(c)])


@pytest.mark.parametrize(("word", "value"), [
    ("--bf16", True), ("--bf16 True", True), ("--bf16=true", True), ("--bf16 False", False), ("--bf16=false", False)])
def test_a_switch_takes_true_and_false(word, value, train, tmp_path):
    """U9, F15: as other trainers write it; what stands behind it stays a flag."""
    words = [*word.split(), "--train_file", str(train), "--fp16=False", "--output_dir", str(tmp_path / "out")]
    args = main.parse_args(words)
    assert (args.bf16, args.fp16, args.train_file) == (value, False, [str(train)])


def test_answers_to_flags_of_other_trainers_name_only_flags_that_there_are():
    """U9: no key is a flag here, each flag in an answer is one, and none is refused."""
    parser_flags = set(re.findall(r"^  --(\w+)", run("--help", env={"COLUMNS": "200"}).out, re.M))
    known = parser_flags | set(main.trainer_flags())
    named = {flag for words in FOREIGN.values() for flag in re.findall(r"--(\w+)", words)}
    assert len(FOREIGN) > 200 and named and named <= known
    assert not {f"--{name}" for name in known} & {*FOREIGN} and not {f"--{name}" for name in named} & {*main.REFUSED}
    kinds = ("here it is --", "not offered: ", "not needed: ")
    assert [words for words in FOREIGN.values() if not words.startswith(kinds)] == []
    assert [words for words in FOREIGN.values() if ("leave it out" in words) != words.startswith(kinds[2])] == []


def test_a_value_that_the_optimizer_cannot_have_is_refused_before_the_data_is_read(refuse, tmp_path):
    """F24: nobody waits for the data first; this data is broken, which nobody sees."""
    (tmp_path / "broken.jsonl").write_text('{"text": 1\n')
    refuse("--train_file {tmp}/broken.jsonl --optim_args bogus=1", "--optim_args")
    refuse("--train_file {tmp}/broken.jsonl --max_steps 1", "broken JSON")


def test_a_working_directory_that_was_removed_is_named(train, tmp_path):
    """F7: instead of a traceback."""
    (tmp_path / "gone").mkdir()
    script = 'cd "$1" && rmdir "$1" && exec "$2" "$3" --train_file "$4"'
    done = launch("bash", "-c", script, "-", tmp_path / "gone", sys.executable, ROOT / "main.py", train)
    refused(done, "current directory was removed")


def test_fp16_that_accelerate_asks_for_is_refused_on_the_cpu(refuse):
    """F15, C9: as --fp16 is, instead of training in float32 under its name."""
    refuse(GOOD, "--mixed_precision fp16", "GPU", "--bf16", env={"ACCELERATE_MIXED_PRECISION": "fp16"})


@pytest.mark.slow
def test_main_py_works_without_its_tools(tiny, train, tmp_path):
    """S1: a copy of main.py alone trains, and still ends in a sentence."""
    (tmp_path / "main.py").write_text((ROOT / "main.py").read_text())
    words = [sys.executable, tmp_path / "main.py", "--model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    done = launch(*words, "--train_file", train, "--max_seq_length", 64, "--max_steps", 1, "--report_to", "none")
    assert done.status == 0 and "Done: the model is in" in done.out, done.err
    refused(launch(*words, "--train_file", train, "--block_size", 64), "unknown flag --block_size")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 and more\n")
    bad = launch(*words, "--train_file", tmp_path / "bad.txt", "--max_seq_length", 64, "--output_dir", tmp_path / "new")
    refused(bad, "bad.txt is not UTF-8: byte 3 is 0xe9")


# ── A file of flags ──────────────────────────────────────────────────────────────────────────────────────────────────


def configured(tmp_path, text, *words):
    """parse_args() with a file of flags. Returns: Namespace."""
    (tmp_path / "run.yaml").write_text(text)
    return main.parse_args([str(word) for word in ["--config", tmp_path / "run.yaml", *words]])


def test_a_file_of_flags_is_as_good_as_the_command_line(train, tmp_path, capsys):
    """U2: numbers, lists, switches, nested values and hyphens; the Trainer's flags, too."""
    text = f"""# a comment
train_file: [{train}, "{train}"]
output-dir: {tmp_path}/out
learning_rate: 1e-4
max_steps: 010
bf16: true
no_truncation: False
sample_prompt:
  - "yes: no"
  - 1:30
  - --dash
report_to: [none]
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {{min_lr: 1e-6}}
"""
    mine = vars(configured(tmp_path, text))
    words = ["--train_file", train, train, "--output_dir", tmp_path / "out", "--learning_rate", "1e-4",
             "--max_steps=010", "--bf16", "--no_truncation", "False", "--sample_prompt", "yes: no", "1:30",
             "--sample_prompt=--dash", "--report_to", "none",
             "--lr_scheduler_type=cosine_with_min_lr", '--lr_scheduler_kwargs={"min_lr": 1e-06}']  # fmt: skip
    theirs = vars(main.parse_args([str(word) for word in words]))
    assert {key for key in mine if mine[key] != theirs[key]} == {"config", "given"}
    assert "run.yaml: 10 flags" in capsys.readouterr().out.splitlines()[0]


def test_the_command_line_wins_over_the_file_and_says_so(train, tmp_path, capsys):
    """U2: a flag of both is that of the command line, however it is spelled; the others are those of the file."""
    text = f"train_file: {train}\nseed: 1\nmax_steps: 7\nbf16: true\nlearning_rate: 1\n"
    words = ["--seed=2", "--learning-rate", "3", "--output_dir", tmp_path / "out", "--bf16", "False"]
    args = configured(tmp_path, text, *words)
    assert (args.seed, args.learning_rate, args.bf16) == (2, 3, False) and args.trainer_argv == ["--max_steps=7"]
    assert "5 flags; the command line replaces seed, bf16, learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, words",
    cases({
        "a misspelt flag": ("learnin_rate: 1", "run.yaml: unknown flag learnin_rate", "learning_rate"),
        "another trainer's": ("micro_batch_size: 1", "run.yaml: unknown flag micro_batch_size", "--per_device_train"),
        "a bad value": ("learning_rate: fast", "run.yaml: argument --learning_rate: invalid number value: 'fast'"),
        "a bad choice": ("save_dtype: int8", "run.yaml: argument --save_dtype", "bfloat16"),
        "twice": ("seed: 1\nmax_steps: 2\nseed: 1", "run.yaml, line 3: seed stands there twice"),
        "twice, otherwise written": ("max-steps: 1\nmax_steps: 1", "run.yaml, line 2: max_steps stands there twice"),
        "no value": ("seed:", "run.yaml: seed has no value"),
        "a section": ("training:\n  seed: 1", "run.yaml: unknown flag training"),
        "a section of a flag": ("seed:\n  a: 1", "run.yaml: seed is a section"),
        "empty": ("", "run.yaml: it holds no mapping of flags", "learning_rate: 1e-5"),
        "a list": ("- seed", "run.yaml: it holds no mapping of flags"),
        "two values for one": ("seed: [1, 2]", "run.yaml: seed takes one value: write no list"),
        "no YAML": ("seed: [1", "run.yaml is no YAML file", "line 1"),
        "no UTF-8": (b"seed: \xff", "run.yaml is no YAML file"),
        "a file in the file": ("config: b.yaml", "run.yaml: config stands in the file itself"),
        "a promise that it would break": ("fsdp: full_shard", "--fsdp makes checkpoints that no run can go on from"),
        "an object of Python": ("seed: !!python/object/apply:os.system [ls]", "run.yaml: argument --seed: invalid"),
        "missing": (None, "run.yaml cannot be read (No such file or directory)"),
    }),
)
def test_a_faulty_file_of_flags_is_refused_by_its_name(text, words, refuse, tmp_path):
    """U2: in a sentence with the file, the line or the flag, before torch is imported; no code in it is executed."""
    if text is not None:
        (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse("--train_file {train} --config {tmp}/run.yaml", *words)


def test_flags_of_a_file_that_the_command_line_contradicts_are_refused_by_its_name(refuse, tmp_path):
    """U2: F15 holds across both."""
    (tmp_path / "run.yaml").write_text("bf16: true\n")
    refuse("--train_file {train} --fp16 --config {tmp}/run.yaml", "run.yaml", "--bf16", "--fp16")


# ── The terminal ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 8])
def test_a_reader_who_has_read_enough_ends_the_run_quietly(lines, tiny, train, tmp_path):
    """`main.py … | head`: status 141, as a shell has it for SIGPIPE, and no word on disks or pipes."""
    words = [sys.executable, ROOT / "main.py", "--model_name_or_path", tiny, "--train_file", train, "--max_steps", "9",
             "--output_dir", tmp_path / "out", "--max_seq_length", 64, "--logging_steps", 1, "--disable_tqdm", True]
    script = f'"$@" | head -n {lines}; exit "${{PIPESTATUS[0]}}"'
    done = launch("bash", "-c", script, "-", *words)
    assert done.status == 141 and done.out.count("\n") == lines, done
    assert not re.search("rror|Traceback|pipe", done.err, re.I), done.err


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii_gets_ascii(tiny, tmp_path):
    """Paths with other letters are escaped, on stdout and in a sentence; nothing breaks."""
    text = write_jsonl(tmp_path / "täxt.jsonl", ROWS)
    env = {"PYTHONIOENCODING": "ascii"}
    words = ["--model_name_or_path", tiny, "--output_dir", tmp_path / "öut", "--max_seq_length", 64, "--max_steps", 1]
    done = launch(*words, "--train_file", text, env=env)
    assert done.status == 0 and done.out.isascii() and r"\xf6ut" in done.out, done.out + done.err
    sentence = refused(launch(*words, "--train_file", tmp_path / "täx.jsonl", env=env), "no such file")
    assert sentence.isascii() and r"t\xe4x.jsonl" in sentence


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
    "directory without text": ("--train_file {tmp}/out", "--train_file", "no files of the kinds", "left out: ", ".pt"),
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
