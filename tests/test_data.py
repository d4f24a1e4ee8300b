"""What becomes of rows and tokens on their way from files to chunks."""

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from helpers import run, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import main


def prepare(tiny, tmp_path, *argv):
    """Prepare data in this process. Returns: (train, validation, tokenizer)."""
    common = ["--model_name_or_path", tiny, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    args = main.parse_args([str(text) for text in [*common, *argv]])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return *main.load_and_prepare_dataset(args, tokenizer, args.overwrite_cache), tokenizer


def expected_chunks(tokenizer, texts, length, truncate=True, eos=()):
    """The same chunks by the plainest code. Returns: (list of lists, tokens kept)."""
    kept = []
    for text in texts:
        if text and text.strip():
            ids = tokenizer(text)["input_ids"] + list(eos)
            kept += ids[:length] if truncate else ids
    return [kept[start : start + length] for start in range(0, len(kept) - length + 1, length)], len(kept)


ROWS = st.lists(st.one_of(st.none(), st.just(" \n"), st.text(st.characters(codec="utf-8"), max_size=60)), min_size=1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, length=st.integers(2, 40), truncate=st.booleans(), add_eos=st.booleans(), batch=st.integers(1, 300))
def test_every_token_is_in_one_chunk_in_order(tiny, tmp_path, rows, length, truncate, add_eos, batch):
    """B3, B4: file → map batches of any size → chunks equals the plainest code, over any rows."""
    main.TOKENIZE_BYTES = batch  # a few rows a batch
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--train_file", path, "--max_seq_length", length]
    flags += [] if truncate else ["--no_truncation"]
    flags += ["--add_eos"] if add_eos else []
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected, _ = expected_chunks(tokenizer, rows, length, truncate, [1] if add_eos else [])
    try:
        train, _, _ = prepare(tiny, tmp_path, *flags)
    except SystemExit as stop:
        assert stop.code == 2 and not expected  # too little for one chunk
        return
    finally:
        main.TOKENIZE_BYTES = 1_000_000
    assert train["input_ids"][:] == expected


TEXTS = st.lists(st.lists(st.integers(0, 2**18 - 1), max_size=50), max_size=40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, length=st.integers(1, 70), truncate=st.booleans(), cuts=st.lists(st.integers(0, 40)))
def test_packing_does_not_depend_on_batches(tmp_path, texts, length, truncate, cuts):
    """B4: floor(kept / length) chunks whatever the record batches and files; only one remainder is dropped."""
    borders = sorted({0, len(texts), *(cut for cut in cuts if cut < len(texts))})
    files = []
    for number, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        files.append(str(tmp_path / f"{number % 2}-{number}.arrow"))
        table = pa.table({"input_ids": pa.array(texts[start:end], pa.list_(pa.int32()))})
        with pa.OSFile(files[-1], "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    kept = [token for text in texts for token in (text[:length] if truncate else text)]
    chunks = [row["input_ids"] for row in main.group_texts(files, length, truncate)]
    assert len(chunks) == len(kept) // length
    assert np.concatenate([[], *chunks]).tolist() == kept[: len(chunks) * length]
    assert all(chunk.dtype == np.int32 and chunk.shape == (length,) for chunk in chunks)


def report_of(text, split="train"):
    """The numbers of the report of a split: rows, blank, truncated, cost, kept, chunks, length, dropped."""
    line = next(line for line in text.splitlines() if line.startswith(f"{split}: ") and "rows read" in line)
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def test_2600_rows_over_three_map_batches_lose_one_remainder(tiny, tmp_path):
    """B3, B4: the report's numbers add up and equal an independent count."""
    rows = [f"row {number} " + "word " * (number % 40) if number % 13 else "" for number in range(2600)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    output = tmp_path / "out"
    done = run("--model_name_or_path", tiny, "--train_file", path, "--output_dir", output, "--max_seq_length", 64,
               "--max_steps", 1, "--save_steps", 1)  # fmt: skip
    assert done.status == 0, done.err
    assert "2600/2600" in done.err  # the tokenizer's progress bar
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sizes = [len(tokenizer(row)["input_ids"]) for row in rows if row]
    kept = sum(min(size, 64) for size in sizes)
    over = [size - 64 for size in sizes if size > 64]
    assert report_of(done.out) == [2600, 200, len(over), sum(over), kept, kept // 64, 64, kept % 64]


def write_csv(path, rows):
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(rows)])
    return path


STORIES = [f'Story {number}, with a comma, a "quote",\nand a line break. ' + "héllo wörld " * 9 for number in range(24)]
LINES = [story.replace("\n", " ") for story in STORIES]
objects = "".join(json.dumps({"id": number, "text": story}) + "\n" for number, story in enumerate(STORIES))
FORMATS = {
    "array.json": lambda path: path.write_text(json.dumps([{"text": story} for story in STORIES], indent=1)),
    "lines.json": lambda path: path.write_text(objects),
    "train.jsonl": lambda path: path.write_text("\n" + objects.replace("\n", "\n\n")),
    "train.jsonl.gz": lambda path: path.write_bytes(gzip.compress(objects.encode())),
    "train.csv": lambda path: write_csv(path, STORIES),
    "train.txt": lambda path: path.write_text("\n".join(LINES) + "\n", encoding="utf-8"),
    "windows.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + write_csv(path, STORIES).read_bytes()),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_and_evaluates(tiny, tmp_path, name, bf16):
    """F4, F15, B2, B9, C7, C8: each file format, in float32 and with --bf16 on the CPU."""
    FORMATS[name](tmp_path / name)
    path, output = tmp_path / name, tmp_path / "out"
    done = run("--model_name_or_path", tiny, "--train_file", path, "--validation_file", path, "--text_column", "text",
               "--output_dir", output, "--max_seq_length", 64, "--max_steps", 1, *["--bf16"] * bf16)  # fmt: skip
    assert done.status == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = [line + "\n" for line in LINES] if name.endswith(".txt") else STORIES
    expected, kept = expected_chunks(tokenizer, texts, 64)
    assert report_of(done.out)[4:6] == [kept, len(expected)] == report_of(done.out, "validation")[4:6]
    assert ("bf16 autocast" in done.out) == bf16
    results = json.loads((output / "all_results.json").read_text())
    assert results["perplexity"] == pytest.approx(np.exp(results["eval_loss"]), rel=1e-6)


def test_text_reaches_the_tokenizer_unchanged(tiny, tmp_path):
    """B2: words that readers like to interpret (NA, null, dates, numbers in quotes) stay text, in every format."""
    odd = ["NA", "null", "None", "nan", "2020-01-01 00:00:00", "007", "true", "  spaces  ", "tab\there", "ünï 🙂"]
    rows = [f"{text} {text}" if number % 2 else text for number, text in enumerate(odd * 9)]
    write_csv(tmp_path / "a.csv", rows)
    write_jsonl(tmp_path / "b.jsonl", rows)
    (tmp_path / "c.txt").write_text("\n".join(rows), encoding="utf-8")
    for name in ("a.csv", "b.jsonl", "c.txt"):
        found = [row["text"] for row in main.read_texts([str(tmp_path / name)], "text")]
        assert [text.removesuffix("\n") for text in found] == rows


def test_several_files_and_a_glob_are_read_in_order(tiny, tmp_path):
    """F4: several files of mixed formats after one flag, and a quoted glob, in a repeatable order."""
    for number in (2, 1, 3):
        write_jsonl(tmp_path / f"part{number}.jsonl", [f"this is text number {number} " * 9])
    (tmp_path / "last.txt").write_text("this is the last line " * 9)
    train, _, tokenizer = prepare(tiny, tmp_path, "--train_file", tmp_path / "part*.jsonl", tmp_path / "last.txt",
                                  "--max_seq_length", 16, "--no_truncation")  # fmt: skip
    texts = [f"this is text number {number} " * 9 for number in (1, 2, 3)] + ["this is the last line " * 9]
    assert train["input_ids"][:] == expected_chunks(tokenizer, texts, 16, truncate=False)[0]


def test_only_int32_input_ids_are_stored(tiny, tmp_path, texts):
    """B4: no attention mask, no labels, four bytes a token."""
    train, _, _ = prepare(tiny, tmp_path, "--train_file", texts[0], "--max_seq_length", 64)
    assert train.column_names == ["input_ids"]
    assert train.features["input_ids"].feature.dtype == "int32"


def test_truncation_that_takes_much_is_said(tiny, tmp_path, texts, capsys):
    """B3: chapters cut to 64 tokens lose most of them; the note names the flag that keeps them."""
    for more, noted in (([], True), (["--no_truncation"], False)):
        prepare(tiny, tmp_path, "--train_file", texts[0], "--max_seq_length", 64, *more)
        said = capsys.readouterr().out
        assert bool(re.search(r"^note +truncation takes \d+% of the train.*--no_truncation", said, re.M)) == noted


def flags(tiny, texts, tmp_path, *more):
    return ["--model_name_or_path", tiny, "--train_file", texts[0], "--cache_dir", tmp_path / "cache",
            "--output_dir", tmp_path / "out", "--max_seq_length", 64, "--max_steps", 1, *more]  # fmt: skip


def test_a_second_run_reads_the_cache(tiny, tmp_path, texts):
    """B13: another process finds rows, tokens and chunks; a changed flag, length, file or tokenizer makes them anew."""
    work = ("Generating train_rows", "Tokenizing train", "Generating train_chunks")

    def done_again(*more, output):
        done = run(*flags(tiny, texts, tmp_path, *more), "--output_dir", tmp_path / output)
        assert done.status == 0, done.err
        return [name for name in work if name in done.err]

    assert done_again(output="a") == list(work)
    assert done_again(output="b") == []
    assert done_again("--max_seq_length", 32, output="c") == ["Generating train_chunks"]
    assert done_again("--no_truncation", output="d") == ["Generating train_chunks"]
    assert done_again("--add_eos", output="e") == list(work[1:])
    assert done_again("--overwrite_cache", output="f") == list(work)
    assert done_again(output="g") == []
    texts[0].write_text(texts[0].read_text().replace("the", "THE"))
    assert done_again(output="h") == list(work)


def test_several_tokenizing_processes_make_the_same_chunks(tiny, tmp_path):
    """B13: --preprocessing_num_workers changes speed only."""
    path = write_jsonl(tmp_path / "train.jsonl", [f"text number {number} " * (number % 7) for number in range(300)])
    common = ["--train_file", path, "--max_seq_length", 64]
    one, _, _ = prepare(tiny, tmp_path, *common)
    two, _, _ = prepare(tiny, tmp_path, *common, "--preprocessing_num_workers", 2, "--overwrite_cache")
    assert one["input_ids"][:] == two["input_ids"][:]


def test_limits_take_the_first_chunks_and_say_so(tiny, tmp_path, texts):
    """--max_train_samples and --max_eval_samples count chunks."""
    done = run(*flags(tiny, texts, tmp_path), "--validation_file", texts[1], "--no_truncation",
               "--max_train_samples", 9, "--max_eval_samples", 3)  # fmt: skip
    assert done.status == 0, done.err
    assert "train: only the first 9 of" in done.out and "validation: only the first 3 of" in done.out
    assert "steps    1 (1 epochs)" in done.out
