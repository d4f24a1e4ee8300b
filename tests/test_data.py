"""What becomes of rows and tokens on their way to chunks: from files, directories, the hub and the cache."""

import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    GOOD,
    INVALID,
    ORDINARY,
    ROOT,
    ROWS,
    SHORT,
    STRANGER,
    cases,
    finish,
    free_port,
    launch,
    manual,
    need,
    plain_user,
    refused,
    results,
    run,
    same_weights,
    write_jsonl,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import main

ALSO = "--train_file {train} "

# ── Rows, tokens, chunks ─────────────────────────────────────────────────────────────────────────────────────────────


def prepare(tiny, tmp_path, *argv):
    """Prepare data in this process. Returns: (train, validation, tokenizer)."""
    common = ["--model_name_or_path", tiny, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    args = main.parse_args([str(text) for text in [*common, *argv]])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return *main.load_and_prepare_dataset(args, tokenizer, args.overwrite_cache), tokenizer


def expected_chunks(tokenizer, texts, length, truncate=True, eos=()):
    """The same chunks by the plainest code, ~2 for BOS. Returns: (list of lists, tokens kept, BOS added, dropped)."""
    stream = []
    for text in texts:
        if text and text.strip():
            ids = tokenizer(text)["input_ids"] + list(eos)
            stream += [~2 if token == 2 else token for token in (ids[:length] if truncate else ids)]
    kept, added, chunks = len(stream), 0, []
    while stream:
        inside = stream[0] != ~2
        chunk = ([~2] if inside else []) + stream[: length - inside]
        if len(chunk) < length:
            break
        chunks.append(chunk)
        added += inside
        stream = stream[length - inside :]
    return chunks, kept, added, len(stream)


TABLES = st.lists(st.one_of(st.none(), st.just(" \n"), st.text(st.characters(codec="utf-8"), max_size=60)), min_size=1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TABLES, length=st.integers(2, 40), truncate=st.booleans(), add_eos=st.booleans(), batch=st.integers(1, 300))
def test_every_token_is_in_one_chunk_in_order(tiny, tmp_path, rows, length, truncate, add_eos, batch):
    """B3, B4, L1: file → map batches of any size → chunks equals the plainest code, over any rows."""
    main.TOKENIZE_BYTES = batch  # a few rows a batch
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--train_file", path, "--max_seq_length", length]
    flags += [] if truncate else ["--no_truncation"]
    flags += ["--add_eos"] if add_eos else []
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected, *_ = expected_chunks(tokenizer, rows, length, truncate, [1] if add_eos else [])
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
@given(texts=TEXTS, length=st.integers(2, 70), bos=st.booleans(), cuts=st.lists(st.integers(0, 40)),
       wanted=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), min_size=1))  # fmt: skip
def test_packing_does_not_depend_on_batches(tmp_path, texts, length, bos, cuts, wanted):
    """B4, L1, U3: whatever the record batches and files, each wanted id is in one chunk in order, or in the one
    remainder; a chunk begins with BOS, its own or one that was added, or with none where the tokenizer has none."""
    texts = [[~2, *ids] if bos else ids for ids in texts]
    first, end = np.array([wanted[number % len(wanted)] for number in range(len(texts))], np.int32).reshape(-1, 2).T
    borders = sorted({0, len(texts), *(cut for cut in cuts if cut < len(texts))})
    files = []
    for number, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        files.append(str(tmp_path / f"{number % 2}-{number}.arrow"))
        columns = {
            "input_ids": pa.array(texts[start:stop], pa.list_(pa.int32())),
            "_marks": pa.array([main.TEXT] * (stop - start), pa.int8()),
        }
        table = pa.table(columns)
        with pa.OSFile(files[-1], "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    rows = zip(texts, first, end, strict=True)
    kept = [token for text, begin, stop in rows for token in text[begin:stop]]
    made = list(main.group_texts(files, length, first, end, [~2] * bos))
    chunks = [row["input_ids"] for row in made]
    assert all(chunk.dtype == np.int32 and chunk.shape == (length,) for chunk in chunks)
    back = [token for row in made for token in row["input_ids"].tolist()[row["added"] :]]
    assert back == kept[: len(back)]
    assert len(kept) - len(back) < length  # at its first id, which may need a BOS, the rest fills no chunk
    assert not bos or all(chunk[0] == ~2 for chunk in chunks)
    assert not any(row["added"] and row["input_ids"][1] == ~2 for row in made)  # never two


def report_of(text, split="train"):
    """The numbers of the report of a split: rows, blank, truncated, cost, kept, BOS, chunks, length, dropped."""
    line = next(line for line in text.splitlines() if line.startswith(f"{split}: ") and "rows read" in line)
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def test_2600_rows_over_three_map_batches_lose_one_remainder(tiny, tmp_path):
    """B3, B4: the report's numbers add up and equal an independent count."""
    rows = [f"row {number} " + "word " * (number % 40) if number % 13 else "" for number in range(2600)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    output = tmp_path / "out"
    done = finish("--model_name_or_path", tiny, "--train_file", path, "--output_dir", output, *SHORT)
    assert "2600/2600" in done.err  # the tokenizer's progress bar
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sizes = [len(tokenizer(row)["input_ids"]) for row in rows if row]
    over = [size - 64 for size in sizes if size > 64]
    chunks, kept, added, dropped = expected_chunks(tokenizer, rows, 64)
    assert kept + added == len(chunks) * 64 + dropped
    assert report_of(done.out) == [2600, 200, len(over), sum(over), kept, added, len(chunks), 64, dropped]


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


def test_limits_take_the_first_chunks_and_say_so(tiny, tmp_path, texts):
    """--max_train_samples and --max_eval_samples count chunks."""
    done = finish(*flags(tiny, texts, tmp_path), "--validation_file", texts[1], "--no_truncation",
                  "--max_train_samples", 9, "--max_eval_samples", 3)  # fmt: skip
    assert "train: only the first 9 of" in done.out and "validation: only the first 3 of" in done.out
    assert "steps    1 (1 epochs)" in done.out


@pytest.mark.parametrize("split", ["train", "validation"])
def test_too_little_text_names_a_length_that_works(split, refuse, tiny, train, tmp_path):
    """B4: with less text than one chunk, the sentence gives the number of tokens, and that --max_seq_length trains."""
    few = tmp_path / "few.txt"
    few.write_text("A handful of words.\nAnd a second line.\n")
    flags = "--train_file {tmp}/few.txt" if split == "train" else ALSO + "--validation_file {tmp}/few.txt"
    sentence = refuse(flags, split, "--max_seq_length", "one chunk of 64")
    tokens, few, length = re.search(r"(\d+) tokens, (\d+) too few.*--max_seq_length \D*(\d+)", sentence).groups()
    assert tokens == length and int(tokens) + int(few) == 64
    flags = [*flags.format(tmp=tmp_path, train=train).split(), "--model_name_or_path", tiny, "--report_to", "none"]
    finish(*flags, "--output_dir", tmp_path / "new", "--max_steps", 1, "--max_seq_length", length)


# ── The cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


def flags(tiny, texts, tmp_path, *more):
    return ["--model_name_or_path", tiny, "--train_file", texts[0], "--cache_dir", tmp_path / "cache",
            "--output_dir", tmp_path / "out", "--max_seq_length", 64, "--max_steps", 1, *more]  # fmt: skip


@pytest.mark.slow
def test_a_second_run_reads_the_cache(tiny, tmp_path, texts):
    """B13: another process finds rows, tokens and chunks; a changed flag, length, file or tokenizer makes them anew."""
    work = ("Generating train_rows", "Tokenizing train", "Generating train_chunks")

    def done_again(*more, output):
        done = finish(*flags(tiny, texts, tmp_path, *more), "--output_dir", tmp_path / output)
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


def test_several_tokenizing_threads_make_the_same_chunks(tiny, tmp_path):
    """B13: --preprocessing_num_workers, the threads of the tokenizer, changes speed only."""
    path = write_jsonl(tmp_path / "train.jsonl", [f"text number {number} " * (number % 7) for number in range(300)])
    common = ["--train_file", path, "--max_seq_length", 64]
    one, _, _ = prepare(tiny, tmp_path, *common)
    two, _, _ = prepare(tiny, tmp_path, *common, "--preprocessing_num_workers", 2, "--overwrite_cache")
    assert one["input_ids"][:] == two["input_ids"][:]


UNWRITABLE = {  # case: (flags, settings of the environment; {locked} is a directory without write permission)
    "--cache_dir": ("--cache_dir {locked}/new", ""),
    "HF_DATASETS_CACHE": ("", "HF_DATASETS_CACHE={locked}/new"),
    "HF_HOME": ("", "HF_HOME={locked}"),
    "XDG_CACHE_HOME": ("", "XDG_CACHE_HOME={locked}"),
    "HOME": ("", "HOME={locked}"),
}


@pytest.mark.parametrize(("flags", "settings"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_cache_that_cannot_be_written_is_named_before_any_work(flags, settings, refuse, tmp_path):
    """B2, B13: given by a flag, by datasets' own variables, or as the default below HOME; no hub has been asked yet."""
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    flags, settings = flags.format(locked=locked), settings.format(locked=locked)

    def in_a_bare_environment(*argv):
        need(*ORDINARY[:1])
        bare = ["env", "-u", "HF_HOME", "-u", "XDG_CACHE_HOME", *settings.split()]
        return launch(*bare, *ORDINARY, sys.executable, ROOT / "main.py", *argv)

    refuse(ALSO + f"--model_name_or_path test/nowhere {flags}", f"--cache_dir {locked}", "no files can be written",
           "Permission denied", "choose another", runner=in_a_bare_environment)  # fmt: skip


@pytest.mark.slow
def test_a_disk_that_is_full_under_the_cache_ends_in_one_sentence(tiny, texts, disk, tmp_path):
    """B2, B13: without a byte left, and full at any point: status 1, a sentence that names --cache_dir; with space the
    same call goes on to the same weights."""
    argv = ["--model_name_or_path", tiny, "--train_file", texts[0], "--no_truncation", *SHORT]
    finish(*argv, "--cache_dir", tmp_path / "elsewhere", "--output_dir", tmp_path / "whole")
    cache, reached = disk.folder / "cache", set()
    disk.resize("size=32k")
    disk.call("fallocate", "-l", "32k", disk.folder / "other")
    for size in range(32, 400, 8):
        job = [*argv, "--cache_dir", cache, "--output_dir", tmp_path / "out"]
        done = SimpleNamespace(**disk.server.run(job, tmp_path / "out"))
        if done.status == 0:
            break
        refused(done, f"--cache_dir {cache}", "space", status=1)
        reached |= {work for work in ("train_rows", "Tokenizing", "train_chunks") if work in done.err}
        disk.call("find", cache, "-name", "tmp*", "-delete")  # datasets leaves its half file there
        disk.resize(f"size={size + 8}k")
    assert reached == {"train_rows", "Tokenizing", "train_chunks"}
    assert same_weights(tmp_path / "whole", tmp_path / "out")


PREPARED = {  # what is damaged, below --cache_dir
    "rows": "generator/train_rows-*/*/*.arrow",
    "tokens": "tokenized-*.arrow",
    "chunks": "generator/train_chunks-*/*/*.arrow",
    "facts about chunks": "generator/train_chunks-*/*/dataset_info.json",
    "facts about rows": "generator/train_rows-*/*/dataset_info.json",
}
DAMAGES = {"short": slice(100), "cut": slice(-100), "without its end": slice(-8), "emptied": slice(0)}  # what is left


@pytest.mark.slow
def test_a_damaged_cache_is_made_anew_and_trains_the_same(tiny, texts, tmp_path):
    """B2, B13: whichever prepared file is cut short or empty, a note says so once, and the weights are those of a fresh
    cache; the call after that finds a whole cache."""
    cache, faults = tmp_path / "cache", {}
    argv = ["--model_name_or_path", tiny, "--train_file", texts[0], "--no_truncation", *SHORT, "--cache_dir", cache]
    assert "is damaged" not in finish(*argv, "--output_dir", tmp_path / "fresh").out
    for name, pattern in PREPARED.items():
        for damage, part in DAMAGES.items():
            path = max(cache.glob(pattern), key=lambda path: path.stat().st_mtime_ns)  # the one in use
            path.write_bytes(path.read_bytes()[part])
            output = tmp_path / f"{name}, {damage}"
            done = run(*argv, "--output_dir", output)
            if done.status or not same_weights(tmp_path / "fresh", output):
                faults[name, damage] = done.err[-500:]
                shutil.rmtree(cache)
                finish(*argv, "--output_dir", tmp_path / f"after {name}, {damage}")
            elif done.out.count(f"note     data in {cache} is damaged") != 1:
                faults[name, damage] = done.out
    assert faults == {}
    assert "is damaged" not in finish(*argv, "--output_dir", tmp_path / "again").out


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize("name, bf16", [*((name, number % 2 > 0) for number, name in enumerate(FORMATS)),
                                        ("train.jsonl", True), ("train.csv", True)])  # fmt: skip
def test_every_format_trains_and_evaluates(tiny, tmp_path, name, bf16):
    """F4, F15, B2, B9, C7, C8: each file format, and both precisions on the CPU."""
    FORMATS[name](tmp_path / name)
    path, output = tmp_path / name, tmp_path / "out"
    done = finish(
        "--model_name_or_path",
        tiny,
        "--train_file",
        path,
        "--validation_file",
        path,
        "--text_column",
        "text",
        "--output_dir",
        output,
        "--max_seq_length",
        64,
        "--max_steps",
        1,
        *["--bf16"] * bf16,
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    document = name.endswith(".txt")  # one text, never cut
    texts = ["\n".join(LINES) + "\n"] if document else STORIES
    expected, kept, added, dropped = expected_chunks(tokenizer, texts, 64, truncate=not document)
    numbers = [kept, added, len(expected), 64, dropped]
    assert report_of(done.out)[4:] == numbers == report_of(done.out, "validation")[4:]
    assert ("bf16 autocast" in done.out) == bf16
    numbers = results(output)
    assert numbers["perplexity"] == pytest.approx(np.exp(numbers["eval_loss"]), rel=1e-6)


def test_text_reaches_the_tokenizer_unchanged(tiny, tmp_path):
    """B2: words that readers like to interpret (NA, null, dates, numbers in quotes) stay text, in every format."""
    odd = ["NA", "null", "None", "nan", "2020-01-01 00:00:00", "007", "true", "  spaces  ", "tab\there", "ünï 🙂"]
    rows = [f"{text} {text}" if number % 2 else text for number, text in enumerate(odd * 9)]
    write_csv(tmp_path / "a.csv", rows)
    write_jsonl(tmp_path / "b.jsonl", rows)
    (tmp_path / "c.txt").write_text("\n".join(rows), encoding="utf-8")
    for name in ("a.csv", "b.jsonl", "c.txt"):
        found = [row["text"] for row in main.read_texts([str(tmp_path / name)], "text", "line", 0)]
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


# ── Documents, paragraphs, lines ─────────────────────────────────────────────────────────────────────────────────────

POEM = "Roses\n  are red,\n\n\nviolets\n \t\nare blue.\n\n\n\nThe end, without a line break"
BLOCKS = ["Roses\n  are red,\n", "violets\n", "are blue.\n", "The end, without a line break"]


def rows_of(folder, text, sample_by, size=10**9):
    """The rows that a .txt file of this text becomes: (text, marks) pairs."""
    path = folder / "some.txt"
    path.write_text(text)
    return [(row["text"], row["_marks"]) for row in main.read_texts([str(path)], "text", sample_by, size)]


def test_a_txt_file_is_one_document_unless_lines_or_paragraphs_are_asked_for(tmp_path):
    """L4: every character of a document is kept; paragraphs are blocks between blank lines; a line keeps its break."""
    assert rows_of(tmp_path, POEM, "document") == [(POEM, main.BEGINS + main.ENDS)]
    assert rows_of(tmp_path, POEM, "paragraph") == [(block, main.TEXT) for block in BLOCKS]
    assert rows_of(tmp_path, POEM, "line") == [(line, main.TEXT) for line in POEM.splitlines(keepends=True)]


@pytest.mark.parametrize("size", [0, 7, 12, 30])
def test_a_document_in_pieces_is_cut_before_lines_that_are_not_blank(tmp_path, size):
    """L4: the pieces put together are the document; the first begins it, the last ends it; none may be cut."""
    rows = rows_of(tmp_path, POEM, "document", size)
    assert "".join(text for text, _ in rows) == POEM
    assert len(rows) > 1 and [part for _, part in rows] == [main.BEGINS, *[0] * (len(rows) - 2), main.ENDS]
    assert not any(text.partition("\n")[0].isspace() or text[0] == "\n" for text, _ in rows)
    assert all(len(text.splitlines()[0]) <= size or len(text) > size for text, _ in rows[:-1])


def test_a_document_is_the_same_with_windows_line_ends_and_in_gzip(tiny, tmp_path):
    """L4, B2: .txt, .txt.gz and \\r\\n make the same chunks: those of the whole text, longer than a chunk, not cut."""
    text = (POEM + "\n") * 9
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_bytes(text.replace("\n", "\r\n").encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text.encode()))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected, *_ = expected_chunks(tokenizer, [text], 16, truncate=False)
    assert len(expected) > 9
    for name in ("a.txt", "b.txt", "c.txt.gz"):
        train, _, _ = prepare(tiny, tmp_path, "--train_file", tmp_path / name, "--max_seq_length", 16)
        assert train["input_ids"][:] == expected


def line_tokenizer(tiny, folder, kept_apart):
    """Save a tokenizer of Gemma's kind, for which line breaks are kept apart from other letters or are not."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    apart = pre_tokenizers.Split(Regex("\n+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([apart] * kept_apart + [pre_tokenizers.Split("▁", "merged_with_next")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [*manual("with", "try"), "the\nthe\n" * 1000]  # to be joined to "\nthe"
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=384 - 256, special_tokens=special))
    bpe.add_tokens(bytes_)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = dict(zip(["pad_token", "eos_token", "bos_token", "unk_token"], special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_documents_are_cut_into_pieces_only_where_that_changes_no_id(tiny, tmp_path, monkeypatch):
    """L4, L5: in pieces a document has the ids of the whole, one BOS, one EOS; a tokenizer that joins line breaks to
    letters gets it whole."""
    text = "\n".join(manual("with", "if"))
    (tmp_path / "manual.txt").write_text(text)
    monkeypatch.setattr(main, "PIECE", 50)
    for kept_apart in (True, False):
        tokenizer = line_tokenizer(tiny, tmp_path / f"tokenizer-{kept_apart}", kept_apart)
        assert main.splits_at_lines(tokenizer) == kept_apart
        flags = ["--train_file", tmp_path / "manual.txt", "--max_seq_length", 64, "--add_eos"]
        flags += ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--model_name_or_path", tiny]
        made, _ = main.load_and_prepare_dataset(main.parse_args([str(word) for word in flags]), tokenizer)
        expected, *_ = expected_chunks(tokenizer, [text], 64, truncate=False, eos=[1])
        assert made["input_ids"][:] == expected


@pytest.mark.parametrize(("flags", "words"), [
    (ALSO + "--sample_by line", ["--sample_by", ".txt", "leave it out"]),
    ("--dataset_name {tmp} --sample_by paragraph", ["--sample_by", ".txt", "leave it out"]),
    ("--train_file {tmp}/a.txt --sample_by word", ["--sample_by", "'word'", "document", "paragraph", "line"]),
])  # fmt: skip
def test_sample_by_is_for_txt_files(flags, words, refuse, tmp_path):
    """L4: with other formats, where it would do nothing, and with an unknown value it is refused."""
    (tmp_path / "a.txt").write_text("text\n")
    refuse(flags, *words)


@pytest.mark.parametrize("flag", ["--train_file", "--dataset_name"])
def test_sample_by_needs_documents_in_a_folder(flag, tiny, tmp_path):
    """L4: a folder of rows is refused; once there is a .md among them it is cut as asked, and the rows are not."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["row one\n\nof several lines " * 3])
    common = [flag, folder, "--max_seq_length", 4, "--no_truncation", "--sample_by"]
    sentence = last_word(prepare, tiny, tmp_path, *common, "paragraph")
    assert "--sample_by" in sentence and ".txt" in sentence and ".md" in sentence and "leave it out" in sentence
    (folder / "b.md").write_text(POEM)
    for sample_by, parts in (("document", [POEM]), ("paragraph", BLOCKS), ("line", POEM.splitlines(keepends=True))):
        train, _, tokenizer = prepare(tiny, tmp_path, *common, sample_by)
        texts = ["row one\n\nof several lines " * 3, *parts]
        assert train["input_ids"][:] == expected_chunks(tokenizer, texts, 4, truncate=False)[0]


# ── BOS, EOS, control words ──────────────────────────────────────────────────────────────────────────────────────────


def test_control_words_in_texts_become_their_tokens_and_none_is_doubled(tiny, tmp_path, capsys):
    """L2, L7: a text's own <bos> and <eos> are counted and get no second one; <bos> is never learnt."""
    rows = ["<bos>one", "two<eos>", "<bos>three<eos>", "four <bos> five", "six", "<eos>seven"]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    common = ["--train_file", path, "--max_seq_length", 8, "--no_truncation"]
    for flags, ends in (([], 0), (["--add_eos"], 2)):
        train, _, tokenizer = prepare(tiny, tmp_path, *common, *flags)
        noted = re.search(r"note +(\d+) train texts have a BOS, (\d+) an EOS", capsys.readouterr().out)
        assert [int(number) for number in noted.groups()] == [2, ends]
        words = ("one", "two", "three", "four ", " five", "six", "seven")
        one, two, three, four, five, six, seven = tokenizer([*words], add_special_tokens=False)["input_ids"]
        eos = [1] * len(flags)
        stream = [~2, *one, *eos, ~2, *two, 1, ~2, *three, 1, ~2, *four, ~2, *five, *eos, ~2, *six, *eos, ~2, 1, *seven]
        made = []
        for chunk in train["input_ids"][:]:
            made += chunk[chunk[0] == ~2 and made != [] and stream[len(made)] != ~2 :]
        assert len(train) >= 3 and made == stream[: len(made)] and len(stream) - len(made) < 8


def test_texts_without_control_words_get_no_note(tiny, tmp_path, texts, capsys):
    """L7: the note is for texts that bring their own."""
    prepare(tiny, tmp_path, "--train_file", texts[0], "--max_seq_length", 64)
    assert "none gets two" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, end", [([], "without"), (["--add_eos"], "with")])
def test_the_plan_says_how_texts_begin_and_end(tiny, train, tmp_path, flags, end):
    """L5: nobody trains a model that never stops without knowing."""
    done = finish("--model_name_or_path", tiny, "--train_file", train, "--output_dir", tmp_path / "out", *SHORT, *flags)
    assert f"texts begin with BOS, end {end} EOS" in done.out


def test_bytes_are_those_of_the_predicted_text_also_where_a_character_is_cut(tiny, tmp_path):
    """L3: rare characters are several tokens, one for each byte of them, which may be in two chunks or cut away."""
    rows = ["🙂 ünï 🙂", "plain", "<bos>x<eos> ✓"] * 9
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for folder in (tiny, tmp_path / "gemma-like"):
        tokenizer = AutoTokenizer.from_pretrained(tiny) if folder == tiny else line_tokenizer(tiny, folder, True)
        for length in (3, 5, 8):
            flags = ["--train_file", path, "--max_seq_length", length, "--model_name_or_path", tiny, "--output_dir",
                     tmp_path / "out", "--cache_dir", tmp_path / "cache"]  # fmt: skip
            train, _ = main.load_and_prepare_dataset(main.parse_args([str(word) for word in flags]), tokenizer)
            size = 0
            for chunk in train["input_ids"][:]:
                for token in tokenizer.convert_ids_to_tokens([token for token in chunk if token > 3]):
                    if folder == tiny:  # each of its letters is a byte
                        size += len(token)
                    else:
                        size += 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())
            assert main.text_bytes(train, tokenizer) == size > 0


def test_a_tokenizer_without_bos_makes_chunks_without_bos(tiny, tmp_path):
    """L1: BOS is put only where the tokenizer itself begins a text with it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = None
    flags = ["--train_file", write_jsonl(tmp_path / "a.jsonl", ROWS), "--max_seq_length", 32, "--no_truncation"]
    flags += ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--model_name_or_path", tiny]
    made, _ = main.load_and_prepare_dataset(main.parse_args([str(word) for word in flags]), tokenizer)
    kept = [token for row in ROWS for token in tokenizer(row)["input_ids"]]
    assert 2 not in kept and made["input_ids"][:] == [kept[at : at + 32] for at in range(0, len(kept) - 31, 32)]


def test_add_eos_with_a_tokenizer_without_eos_is_refused(refuse, tiny, tmp_path):
    """L5: nothing would end a text; without the flag the model trains."""
    shutil.copytree(tiny, tmp_path / "no-eos")
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "no-eos" / "tokenizer_config.json").write_text(json.dumps(settings))
    refuse(ALSO + "--model_name_or_path {tmp}/no-eos --add_eos", "--add_eos", "no EOS", "leave it out")
    finish("--model_name_or_path", tmp_path / "no-eos", "--train_file", tmp_path / "train.jsonl", *SHORT,
           "--output_dir", tmp_path / "new")  # fmt: skip


# ── Files that are refused ───────────────────────────────────────────────────────────────────────────────────────────


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ZIPPED = gzip.compress(lines(*[{"text": f"row {number}"} for number in range(1000)]).encode())
CONTENT = {  # case: (file name, content), words of the sentence
    "empty": (("bad.jsonl", ""), "bad.jsonl", "empty"),
    "unknown ending": (("bad.log", "text"), "bad.log", "none of the known endings .txt .md .json", ".gz", "cp "),
    "broken line": (("bad.jsonl", '{"text": "a"}\n{"text": "b"\n'), "bad.jsonl, line 2", "broken JSON", "one object a"),
    "broken array": (("bad.json", '[{"text": "a"},\n {"text": "b"},\n {"text": }]'), "bad.json, line 3", "broken JSON"),
    "open array": (("bad.json", '[{"text": "a"},\n'), "bad.json, line ", "broken JSON"),
    "nested too deeply": (("bad.json", "[" * 100_000), "bad.json", "broken JSON"),
    "bare string": (("bad.json", '"hello"'), "bad.json, line 1", '"hello"', "object", '{"text": '),
    "array of numbers": (("bad.json", '[{"text": "a"}, 2]'), "bad.json, item 2", "2 is no JSON object", '{"text": '),
    "strings a line": (("bad.jsonl", '{"text": "a"}\n"b"\n'), "bad.jsonl, line 2", '"b"', "object"),
    "gz cut short": (("bad.jsonl.gz", ZIPPED[:-30]), "bad.jsonl.gz", "cannot be read to its end"),
    "gz that is none": (("bad.txt.gz", "plain text\n"), "bad.txt.gz", "no gzip data", "take .gz off its name"),
    "csv with a value too many": (
        ("bad.csv", "id,text\n1,hello\n2,hello, world\n"),
        "bad.csv, line 3",
        "3 values",
        "has 2",
        "double quotes",
    ),
    "csv with a value too few": (("bad.csv", "id,text\n1,hello\n2\n"), "bad.csv, line 3", "1 value", "has 2"),
    "csv with an open quote": (("bad.csv", 'id,text\n1,"hello\n2,world\n'), "bad.csv", "broken CSV", "line"),
    "Latin-1": (("bad.txt", "plain\ncafé\n".encode("latin1")), "bad.txt", "not UTF-8", "byte 9", "0xe9", "iconv"),
    "Latin-1 at the end": (("bad.txt", "plain café".encode("latin1")), "byte 9 is 0xe9", "find out its encoding"),
    "UTF-8 cut in a letter": (("bad.txt", "ünï café".encode()[:-1]), "byte 9 is 0xc3", "ends within a letter"),
    "UTF-16": (("bad.txt", "a line\n".encode("utf-16")), "bad.txt", "is UTF-16", "iconv -f "),
    "UTF-16 without a mark": (
        ("bad.txt", "a line\nand another\n".encode("utf-16-le")),
        "bad.txt",
        "is UTF-16",
        "iconv -f ",
    ),
    "NUL in CSV": (("bad.csv", "text\nhello\nwor\0ld\n"), "bad.csv", "line 3", "NUL"),
    "no such column in json": (
        ("bad.jsonl", lines({"Text": "a", "id": 1})),
        "bad.jsonl, line 1",
        "'text'",
        "mean 'Text'?",
        "columns: Text, id",
        "--text_column",
    ),
    "column gone half-way": (("bad.jsonl", lines({"text": "a"}, {"body": "b"})), "bad.jsonl, line 2", "columns: body"),
    "no such column in csv": (
        ("bad.csv", "id,txt\n1,hello\n"),
        "bad.csv, line 1",
        "'text'",
        "mean 'txt'?",
        "columns: id, txt",
        "--text_column",
    ),
    "json column of numbers": (("bad.jsonl", lines({"text": 5})), "line 1", "'text'", "holds 5", "--text_column"),
    "json column of lists": (("bad.json", '[{"text": ["a"]}]'), "item 1", "'text'", 'holds ["a"]', "--text_column"),
    "json column of nulls": (("bad.jsonl", lines({"text": None}, {"text": None})), "train", "no text", "2 rows"),
    "lone surrogate": (("bad.jsonl", lines({"text": "a"}, {"text": "b \ud83d"})), "line 2", r"\ud800 to \udfff"),
    "blank rows only": (("bad.txt", "\n   \n\t\n"), "train", "no text", "1 rows", "blank"),
    "csv without rows": (("bad.csv", "text\n"), "no rows"),
    "empty array": (("bad.json", "[]"), "no rows"),
    "line breaks only": (("bad.jsonl", "\n\n"), "no rows"),
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
    refuse(ALSO + "--validation_file {tmp}/val.txt --sample_by line", "validation", "2 rows", "blank")


# ── Kinds of files, encodings ────────────────────────────────────────────────────────────────────────────────────────


def read(*paths, column="text", sample_by="document"):
    """The texts that files and folders become, as main.py finds and reads them."""
    files = main.expand_files("--train_file", [str(path) for path in paths])
    return [row["text"] for row in main.read_texts(files, column, sample_by, 10**9)]


def last_word(function, *args, **named):
    """The sentence in which main.py ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **named)
    assert stop.value.code == 2 and "\n" not in stop.value.sentence
    return stop.value.sentence


def follow(sentence, folder):
    """Do what a sentence says, by bash in a folder. Returns: the path of what is made."""
    found = re.search(r"(?:with|:) ((?:cp|iconv|jq|mv|tr|zcat) .*?)(?:, and give (.*))?$", sentence)
    command, told = found.groups()
    new = shlex.split(command)[-1]
    assert told is None or shlex.split(told)[0].rstrip(";") == new
    need(*{"iconv", "jq"} & {*shlex.split(command)})
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, (command, done.stderr)
    return folder / new


def archive(name, content):
    """A tar archive with one file in it."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO(content))
    return made.getvalue()


def zipped(name, content):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, content)
    return made.getvalue()


def parquet(table, **how):
    """A parquet file of {column: values}, in memory."""
    made = io.BytesIO()
    pq.write_table(pa.table(table), made, **how)
    return made.getvalue()


KINDS = {  # case: (file name, its bytes), words of the sentence
    "gzip named .jsonl": (("a.jsonl", ZIPPED), "is gzip data", "a.jsonl.gz"),
    "gzip named .txt": (("a.txt", gzip.compress(b"A line.\n")), "is gzip data", "a.txt.gz"),
    "gzip in gzip": (("a.txt.gz", gzip.compress(gzip.compress(b"A line.\n"))), "is gzipped twice", "zcat"),
    "tar in gzip": (("a.tgz", gzip.compress(b"a".ljust(257, b"\0") + b"ustar")), "packed tar archive", "tar -xzf"),
    "Arrow stream": (("a.txt", b"\xff\xff\xff\xff\x10\0\0\0"), "is an Arrow stream", "--dataset_name"),
    "ISO-2022-JP": (("a.txt", "日本語\n".encode("iso2022_jp")), "is ISO-2022-JP", "iconv -f ISO-2022-JP"),
    "zip": (("a.jsonl", zipped("a.txt", "text")), "is a zip archive", "unpack it"),
    "PDF in ASCII": (("a.txt", b"%PDF-1.5\n1 0 obj\n<<>>\nendobj\n"), "is a PDF", "text out"),
    "PDF": (("a.txt", b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\n"), "is a PDF", "text out"),
    "PDF in .gz": (("a.txt.gz", gzip.compress(b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n")), "is a PDF", "text out"),
    "tar": (("a.txt", archive("a.txt", b"")), "is a tar archive", "tar -xf", "folder"),
    "tar in .gz": (("a.txt.gz", gzip.compress(archive("a.txt", b""))), "is a tar archive", "tar -xf", "folder"),
    "tar.gz by its own name": (("a.tar.gz", gzip.compress(archive("a", b""))), "is a tar archive", "tar -xf"),
    "zstd": (("a.jsonl", b"(\xb5/\xfd\x04\0"), "is zstd data", "zstd -d"),
    "bzip2": (("a.csv", b"BZh91AY&SY"), "is bzip2 data", "bzip2 -dc"),
    "xz": (("a.csv", b"\xfd7zXZ\0"), "is xz data", "xz -dc"),
    "parquet named .csv": (("a.csv", parquet({"text": ["a"]})), "is a parquet file", "the ending .parquet"),
    "parquet in .gz": (("a.parquet.gz", gzip.compress(parquet({"text": ["a"]}))), "is a parquet file", "gunzip"),
    "CSV named .parquet": (("a.parquet", b"id,text\n1,hello\n"), "is no parquet file", "the ending of what it holds"),
    "Arrow named .json": (("a.json", b"ARROW1\0\0"), "is an Arrow file"),
    "picture": (("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "is a picture", "leave it out"),
    "program": (("a.txt", b"\x7fELF\x02\x01\x01\0"), "is a program", "leave it out"),
    "database": (("a.csv", b"SQLite format 3\0"), "is a database", "sqlite3 -csv"),
    "pointer of Git LFS": (("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "page of the web": (("a.html", b"<html>text</html>"), "none of the known endings", "get the text out"),
    "empty": (("a.txt", b""), "is empty", "how it was made"),
}


@pytest.mark.parametrize(("file", "words"), cases(KINDS))
def test_a_file_of_another_kind_is_named_by_its_bytes(file, words, tmp_path):
    """F4, B2: whatever its name, before it is read as text."""
    path = tmp_path / file[0]
    path.write_bytes(file[1])
    sentence = last_word(main.expand_files, "--train_file", [str(path)])
    assert sentence.startswith(f"--train_file {path} ") and not [word for word in words if word not in sentence]


@pytest.mark.parametrize("name", ["a.jsonl", "user's own.txt"])
def test_gzip_under_another_name_is_read_once_it_is_renamed_as_told(name, tmp_path):
    """F4, B2: the command can be pasted, and leads to the text."""
    text = lines({"text": "one"}, {"text": "two"})
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    new = follow(last_word(read, path), tmp_path)
    assert not path.exists() and read(new) == (["one", "two"] if name == "a.jsonl" else [text])


def test_what_is_gzipped_twice_is_read_once_it_is_unpacked_as_told(tmp_path):
    """F4, B2: the command can be pasted, and leads to the text."""
    path = tmp_path / "user's own.txt.gz"
    path.write_bytes(gzip.compress(gzip.compress(b"one\n")))
    assert read(follow(last_word(read, path), tmp_path / "new")) == ["one\n"]


def test_parquet_under_another_name_is_read_once_it_is_renamed_as_told(tmp_path):
    """F4, B2: the advice leads to the text."""
    path = tmp_path / "rows.csv"
    path.write_bytes(parquet({"text": ["one", "two"]}))
    ending = re.search(r"give its name the ending (\S+)$", last_word(read, path))[1]
    path.rename(f"{path}{ending}")
    assert read(f"{path}{ending}") == ["one", "two"]


@pytest.mark.parametrize("name", ["notes.log", "my user's notes", "x.TEX", "notes.log.gz", "rows.ndjson", "part-0.gz"])
def test_text_of_an_unknown_ending_is_read_once_it_is_copied_as_told(name, tmp_path):
    """F4, B2: the command can be pasted, also with spaces and quotes in the name; rows of JSON stay rows."""
    path = tmp_path / name
    content = '{"text": "one"}\n{"text": "two"}\n' if name[0] in "rp" else "one\ntwo\n"
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    assert read(follow(last_word(read, path), tmp_path)) == (["one", "two"] if name[0] in "rp" else [content])


ENGLISH = "It's a line of text.\nAnd another one, with a café in it.\n" * 200
RUSSIAN = "Это строка текста.\nИ ещё одна.\n" * 200
CHINESE = "这是一个中文的文本文件,用来训练模型。\n第二行也是。\n" * 200
ONE_LINE = "これは日本語の文です。" * 200 + "\n"  # neither a space nor a comma in it
WIDE = [(code, language, mark) for code in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
        for language, mark in ((ENGLISH, ""), (ENGLISH, "\ufeff"), (RUSSIAN, ""), (RUSSIAN, "\ufeff"),
                               (CHINESE, "\ufeff"), (ONE_LINE, "\ufeff"))]  # fmt: skip
LANGUAGES = {ENGLISH: "English", RUSSIAN: "Russian", CHINESE: "Chinese", ONE_LINE: "Japanese in one line"}


@pytest.mark.parametrize(
    ("code", "text", "mark"),
    [pytest.param(*case, id=f"{case[0]}, {LANGUAGES[case[1]]}{', marked' * bool(case[2])}") for case in WIDE],
)
def test_text_of_two_or_four_bytes_a_letter_is_named_and_converted_by_what_is_told(code, text, mark, tmp_path):
    """F4, B2: UTF-16 and UTF-32, as Windows writes them or without a mark; the command gives back the text."""
    path = tmp_path / "user's own text.txt"
    path.write_bytes((mark + text).encode(code))
    sentence = last_word(read, path)
    assert sentence.startswith(f"--train_file {path} is UTF-{code[4:6]}")
    assert read(follow(sentence, tmp_path / "new")) == [text]


def test_the_command_for_a_gzipped_file_unpacks_it(tmp_path):
    """F4, B2: iconv does not."""
    path = tmp_path / "two columns.csv.gz"
    path.write_bytes(gzip.compress("id,text\n1,naïve\n2,straße\n".encode("utf-16")))
    assert read(follow(last_word(read, path), tmp_path / "new")) == ["naïve", "straße"]


WESTERN = {  # case: the line, and what of it is shown
    "quotes": ("It’s the user’s own “quoted” text", "It’s the user’s own"),
    "dashes": ("a dash – or two — and so on…", "a dash – or two — and so"),
    "euro": ("it costs 5 €", "it costs 5 €"),
    "French": ("Où est l’été, « déjà » ?", "Où est l’été"),
}


@pytest.mark.parametrize(("line", "shown"), WESTERN.values(), ids=WESTERN)
def test_windows_1252_is_named_with_an_excerpt_and_converted_by_what_is_told(line, shown, tmp_path):
    """F4, B2: the reader of the sentence judges by words of the file, deep inside of it."""
    text = "plain\n" * 5000 + line + "\nplain\n"
    path = tmp_path / "user's own text.txt"
    path.write_bytes(text.encode("cp1252"))
    sentence = last_word(read, path)
    assert f"{path} is not UTF-8: " in sentence and "Windows-1252" in sentence and shown in sentence
    assert "if not, find out its encoding" in sentence
    assert read(follow(sentence, tmp_path / "new")) == [text]


OTHERS = {  # encodings that cannot be told apart by looking: a text in each
    "latin-1": "Une façon de dire l'été\n",
    "gbk": CHINESE,
    "big5": "這是一個中文的文字檔。\n",
    "shift-jis": "これは日本語のテキストです。カタカナも。\n",
    "euc-jp": "これは日本語のテキストです。\n",
    "euc-kr": "이것은 한국어 텍스트입니다.\n",
    "cp1251": "«Привет», – сказал он, – и ушёл…\n",
    "koi8-r": RUSSIAN,
    "cp1253": "Αυτό είναι – ένα κείμενο\n",
}


@pytest.mark.parametrize("code", OTHERS)
def test_other_encodings_are_not_guessed(code, tmp_path):
    """F4, B2: a wrong guess would train on junk; the sentence names the byte, and says that it has to be found out."""
    content = b"plain\n" * 5000 + OTHERS[code].encode(code)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    sentence = last_word(read, path)
    at = next(number for number, byte in enumerate(content) if byte > 127)
    assert f"{path} is not UTF-8: byte {at} is 0x{content[at]:02x}; find out its encoding" in sentence
    assert not re.search(r"1252|latin|8859", sentence.replace(str(path), ""), re.I)
    told = sentence.replace("ENCODING", code.replace("latin-1", "iso8859-1"))  # by whoever has found it out
    assert read(follow(told, tmp_path / "new")) == ["plain\n" * 5000 + OTHERS[code]]


@pytest.mark.parametrize(("name", "content", "line", "column"), [
    ("a.txt", b"one\ntwo \0 three\n", 2, 5),
    ("a.csv", b"id,text\n1,a\n2,bad \0 byte\n", 3, 7),
    ("a.jsonl", '{"text": "ünï"}\n{"text": "ünï\0"}\n'.encode(), 2, 14),
    ("a.txt.gz", gzip.compress(b"plain\n" * 5000 + b"\0\n"), 5001, 1),
], ids=["txt", "csv", "jsonl", "gz"])  # fmt: skip
def test_a_nul_in_utf8_is_named_with_line_and_column(name, content, line, column, tmp_path):
    """F4, B2: a stray one makes no UTF-16 of a file."""
    (tmp_path / name).write_bytes(content)
    sentence = last_word(read, tmp_path / name)
    assert f"{name}, line {line}, column {column}: a NUL" in sentence
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode().replace("\0", "")
    clean = tmp_path / f"clean-{name.removesuffix('.gz')}"
    clean.write_text(text, encoding="utf-8")
    assert read(follow(sentence, tmp_path / "new")) == read(clean)


ODD = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\x1dh\x1ei"  # str.splitlines() cuts at each of them
ENDS = {  # case: (file name, bytes, --sample_by), texts
    "marks inside a .txt": (("a.txt", b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", "document"), ["one\ntwo\n"]),
    "marks inside a .jsonl": (
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', "document"), ["a", "b"],
    ),
    "marks inside a .csv": (("a.csv", b"\xef\xbb\xbfid,text\n1,a\n\xef\xbb\xbf2,b\n", "document"), ["a", "b"]),
    "two marks before an array": (("a.json", b'\xef\xbb\xbf\xef\xbb\xbf[{"text": "a"}]', "document"), ["a"]),
    "CR alone, .txt": (("a.txt", b"one\rtwo\r", "line"), ["one\n", "two\n"]),
    "CR alone, .csv": (("a.csv", b"id,text\r1,a\r2,b\r", "document"), ["a", "b"]),
    "CR alone, .jsonl": (("a.jsonl", b'{"text": "a"}\r{"text": "b\\r\\n"}\r', "document"), ["a", "b\r\n"]),
    "mixed, .txt": (("a.txt", b"one\r\n\r\ntwo\rthree\nfour", "document"), ["one\n\ntwo\nthree\nfour"]),
    "mixed, in quotes": (("a.csv", b'id,text\r\n1,"a\r\nb"\n2,"c\nd"\r', "document"), ["a\nb", "c\nd"]),
    "odd, .txt": (("a.txt", f"{ODD}\n{ODD}".encode(), "line"), [ODD + "\n", ODD]),
    "odd, .md": (("a.md", f"{ODD}\n\n{ODD}".encode(), "paragraph"), [ODD + "\n", ODD]),
    "odd, .csv": (("a.csv", f"id,text\n1,{ODD}\n2,b\n".encode(), "document"), [ODD, "b"]),
    "odd, .tsv": (("a.tsv", f"id\ttext\n1\t{ODD}\n2\tb\n".encode(), "document"), [ODD, "b"]),
    "odd, .jsonl": (("a.jsonl", '{"text": "a\u2028b\x85c\u2029d"}\n{"text": "e"}'.encode(), "document"),
                    ["a\u2028b\x85c\u2029d", "e"]),
}  # fmt: skip


@pytest.mark.parametrize(("file", "texts"), ENDS.values(), ids=ENDS)
def test_lines_end_at_line_breaks_alone_and_marks_vanish(file, texts, tmp_path):
    """F4, L4, B2: \\n, \\r and \\r\\n end a line, form feeds and separators of Unicode do not; cat leaves byte order
    marks inside files."""
    name, content, sample_by = file
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, sample_by=sample_by) == texts


# ── Columns and rows ─────────────────────────────────────────────────────────────────────────────────────────────────

SEPARATED = {  # case: (file name, content), texts, the separator that a note names
    "semicolon": (("a.csv", "id;text\n1;a, b\n2;c\td | e\n"), ["a, b", "c\td | e"], "';'"),
    "tab": (("a.csv", "id\ttext\n1\ta, b; c | d\n"), ["a, b; c | d"], r"'\t'"),
    "bar": (("a.csv", "id|text\n1|a, b; c\td\n"), ["a, b; c\td"], "'|'"),
    "comma": (("a.csv", "id,text\n1,a; b\tc | d\n"), ["a; b\tc | d"], ""),
    "quoted": (("a.csv", '"id";"text"\n1;"a; ""b"",\nc"\n'), ['a; "b",\nc'], "';'"),
    "other columns hold commas": (("a.csv", "name, first;text\nA, B;c\n"), ["c"], "';'"),
    "a comma in a name": (("a.csv", "id;a, b, c;text\n1;x;y\n"), ["y"], "';'"),
    "tsv": (("a.tsv", "id\ttext\n1\ta, b; c | d\n"), ["a, b; c | d"], ""),
    "tsv in .gz": (("a.tsv.gz", "id\ttext\n1\ta, b\n"), ["a, b"], ""),
    "one column": (("a.csv", "text\nhello; world | of\ttabs\n\nwith a blank row\n"),
                   ["hello; world | of\ttabs", "", "with a blank row"], ""),
    "one column, quoted": (("a.csv", 'text\n"a, b"\n'), ["a, b"], ""),
    "one column of a tsv": (("a.tsv", "text\nhello, world; and | all\n"), ["hello, world; and | all"], ""),
}  # fmt: skip


@pytest.mark.parametrize(("file", "texts", "noted"), SEPARATED.values(), ids=SEPARATED)
def test_the_separator_is_seen_in_the_header_and_named(file, texts, noted, tmp_path, capsys):
    """F4, F5, B2: comma, semicolon, tab or bar; texts may hold the others; a note names one that is no comma."""
    path = tmp_path / file[0]
    path.write_bytes(gzip.compress(file[1].encode()) if path.suffix == ".gz" else file[1].encode())
    assert read(path) == texts
    notes = f"note     {path}: columns are separated by {noted}\n" if noted else ""
    assert capsys.readouterr().out == notes


@pytest.mark.parametrize(("name", "header"), [
    ("a.csv", "id;body"), ("a.csv", "id\tbody"), ("a.csv", "id|body"), ("a.csv", "id,body"), ("a.tsv", "id\tbody"),
])  # fmt: skip
def test_a_missing_column_names_the_columns_as_they_are_split(name, header, tmp_path):
    """F5, B5: not one column "id;body", which could then be asked for."""
    (tmp_path / name).write_text(f"{header}\n{header}\n")
    sentence = last_word(read, tmp_path / name)
    assert "line 1: no column 'text'" in sentence and "columns: id, body;" in sentence
    assert read(tmp_path / name, column="body") == ["body"]


def chat(*turns):
    return "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in turns)


TALK = [("user", "What's “this”?"), ("model", 'A "test".\n\nOf quotes.')]
SHAPES = {  # what people have: (rows, the texts that are to come of them)
    "messages": (
        [{"id": 1, "messages": [{"role": "user", "content": TALK[0][1]}, {"role": "assistant", "content": TALK[1][1]}]},
         {"id": 2, "messages": [{"role": "assistant", "content": "Hi."}]}],
        [chat(*TALK), chat(("model", "Hi."))],
    ),
    "conversations": (
        [{"conversations": [{"from": "human", "value": TALK[0][1]}, {"from": "gpt", "value": TALK[1][1]}]}] * 2,
        [chat(*TALK)] * 2,
    ),
    "prompt and completion": ([{"prompt": "a 'b'", "completion": "ü\nc"}] * 2, ["a 'b'\nü\nc"] * 2),
    "instruction, input and output": (
        [{"instruction": "Add.", "input": "1 + 1", "output": "2"},
         {"instruction": "Go.", "input": "é", "output": "No."}],
        ["Add.\n1 + 1\n2", "Go.\né\nNo."],
    ),
    "nested rows": ([{"version": "0.1", "data": [{"text": "one"}, {"text": "two\n“2”"}]}] * 2, ["one", "two\n“2”"] * 2),
    "nested rows with an odd name": ([{"all the user's \"rows\"": [{"text": "one"}]}] * 2, ["one"] * 2),
}  # fmt: skip
LAYOUTS = {  # how they have written it: the file's ending, and its content
    "a line each": (".jsonl", lambda rows: lines(*rows)),
    "an array": (".json", lambda rows: json.dumps(rows, ensure_ascii=False)),
    "an indented array": (".json", lambda rows: json.dumps(rows, indent=2)),
    "one indented after the other": (".json", lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows)),
    "marked": (".jsonl", lambda rows: "\ufeff" + lines(*rows)),
    "in .gz": (".jsonl.gz", lambda rows: lines(*rows)),
    "indented, in .gz": (".JSON.GZ", lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows)),
}


def write_layout(layout, rows, folder):
    ending, content = LAYOUTS[layout]
    path = folder / f"user's own rows{ending}"
    content = content(rows).encode()
    path.write_bytes(gzip.compress(content) if ending.lower().endswith(".gz") else content)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_conversations_and_nested_rows_become_texts_by_what_is_told(shape, layout, tmp_path):
    """F5, B2, B5: the command for jq gives a file that is read, with all that was said, and by whom."""
    rows, texts = SHAPES[shape]
    path = write_layout(layout, rows, tmp_path)
    sentence = last_word(read, path)
    assert str(path) in sentence.partition(": ")[0]
    assert read(follow(sentence, tmp_path / "new")) == texts


@pytest.mark.parametrize("layout", ["one indented after the other", "indented, in .gz"])
def test_objects_that_span_lines_become_lines_by_what_is_told(layout, tmp_path):
    """F5, B2: text and all, where the column is there."""
    path = write_layout(layout, [{"text": "one"}, {"text": "two\n“2”"}], tmp_path)
    sentence = last_word(read, path)
    assert "line 1: broken JSON" in sentence
    assert read(follow(sentence, tmp_path / "new")) == ["one", "two\n“2”"]


@pytest.mark.parametrize("shape", ["messages", "prompt and completion"])
def test_nested_conversations_take_two_commands_in_one_folder(shape, tmp_path):
    """F5, B2: the second does not write into the file that it reads."""
    rows, texts = SHAPES[shape]
    path = write_layout("an indented array", {"data": rows}, tmp_path)
    between = follow(last_word(read, path), tmp_path)
    assert read(follow(last_word(read, between), tmp_path)) == texts


ODD_SHAPES = {  # rows that no command can be given for, words of the sentence
    "messages in parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages hold questions"),
    "a prompt of messages": ({"prompt": [{"content": 1}], "completion": "b"}, "prompt and completion hold questions"),
    "an empty list": ({"data": []}, "columns: data; choose one with --text_column"),
    "a list of strings": ({"data": ["a"]}, "columns: data; choose one with --text_column"),
}


@pytest.mark.parametrize(("row", "words"), ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_no_command_is_told_where_none_would_do(row, words, tmp_path):
    """F5, B5: rather no command than one that loses text."""
    sentence = last_word(read, write_layout("a line each", [row], tmp_path))
    assert words in sentence and "jq" not in sentence


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_all_rows_of_a_parquet_file_are_read_in_order(kind, tmp_path):
    """F4, B2: over row groups and batches, of each kind of text; null is a blank row; other columns do not matter."""
    texts = [None if number % 99 == 7 else f"NA {number}\nline two" for number in range(2500)]
    table = {"id": range(2500), "text": pa.array(texts, pa.string()).cast(kind), "more": [["x"]] * 2500}
    (tmp_path / "A.Parquet").write_bytes(parquet(table, row_group_size=700))
    assert read(tmp_path / "A.Parquet") == texts


def test_blank_rows_of_a_parquet_file_are_counted(tiny, tmp_path, capsys):
    """B2, B3: null, "" and spaces are rows that are skipped."""
    (tmp_path / "a.parquet").write_bytes(parquet({"text": [None, "", "  ", *ROWS]}))
    prepare(tiny, tmp_path, "--train_file", tmp_path / "a.parquet", "--max_seq_length", 64)
    assert report_of(capsys.readouterr().out)[:2] == [13, 3]


def test_a_parquet_file_is_read_a_batch_at_a_time(tmp_path):
    """B2: rows come before a later row group, which is damaged, is looked at; then the file is named."""
    content = bytearray(parquet({"text": [f"{number} " * 9 for number in range(3000)]}, row_group_size=1000,
                                compression="NONE", use_dictionary=False))  # fmt: skip
    middle = content.index(b"2500 2500")
    content[middle - 9000 : middle + 9000] = b"\xff" * 18000
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    rows = main.read_texts([str(path)], "text", "document", 1)
    assert [next(rows)["text"] for _ in range(2000)] == [f"{number} " * 9 for number in range(2000)]
    assert f"{path} cannot be read to its end" in last_word(list, rows)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.txt", "one\nnaïve café".encode()[:-1], ["byte 14 is 0xc3", "cut short"]),
    ("a.csv", b"id,text,text\n1,a,b\n", ["line 1", "two columns 'text'"]),
    ("a.tsv", b'id\ttext\n1\t"Quoted\n2\tb\n3\t"c"\n', ["a.tsv, line"]),
    ("a.csv", b'id,text\n1,a "b" c\n2,"d" e\n', ["line 3", "broken CSV"]),
    ("a.csv", b"id:text\n1:a\n", ["columns: id:text", "':'"]),
], ids=["half a letter", "two columns of a name", "open quote in tabs", "text behind a quote", "colons"])  # fmt: skip
def test_a_table_or_text_that_would_lose_something_is_refused(name, content, words, tmp_path):
    """F4, F5, B2: rather than to guess, or to lose rows silently."""
    (tmp_path / name).write_bytes(content)
    sentence = last_word(read, tmp_path / name)
    assert str(tmp_path / name) in sentence and [word for word in words if word not in sentence] == []


BAD_PARQUET = {  # case: bytes of the file, words of the sentence
    "wrong column": (parquet({"Text": ["a"], "id": [1]}), "no column 'text'", "mean 'Text'?", "columns: Text, id"),
    "numbers": (parquet({"text": [None, 5]}), "row 2", "column 'text' holds 5", "--text_column"),
    "lists": (parquet({"text": [["a"]]}), "row 1", "column 'text' holds [", "--text_column"),
    "bytes": (parquet({"text": [b"a"]}), "row 1", "column 'text' holds ", "--text_column"),
    "conversations": (parquet({"messages": [[{"role": "user", "content": "a"}]]}), "messages hold questions", "'text'"),
    "cut at its end": (parquet({"text": ["a"] * 99})[:-20], "cannot be read to its end"),
    "cut after its first bytes": (b"PAR1\x15", "cannot be read to its end"),
    "zero rows": (parquet({"text": pa.array([], pa.string())}), "no rows"),
    "text that is no UTF-8": (parquet({"text": pa.array([b"caf\xe9"]).view(pa.string())}), "a.parquet"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), cases(BAD_PARQUET))
def test_a_bad_parquet_file_is_refused_in_one_sentence(content, words, tmp_path):
    """F4, F5, B2, B5: what is wrong, and where."""
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    sentence = last_word(read, path)
    assert str(path) in sentence and [word for word in words if word not in sentence] == []


# ── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parsed(tiny, tmp_path, *argv):
    """The command line as main.py takes it, with a model and places to write."""
    common = ["--model_name_or_path", tiny, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    return main.parse_args([str(word) for word in [*common, *argv]])


def test_a_file_that_is_given_twice_is_noted_and_counts_twice(tiny, tmp_path, train, capsys):
    """F4, B2: by name and by glob, by a link, by its folder; each of two flags adds its files."""
    other = write_jsonl(tmp_path / "other.jsonl", ["other"])
    (tmp_path / "link.jsonl").symlink_to(train)
    for more in ([tmp_path / "t*.jsonl"], [tmp_path / "link.jsonl"], ["--train_file", train]):
        args = parsed(tiny, tmp_path, "--train_file", train, other, *more)
        assert len(args.train_file) == 3
        notes = re.findall(r"^note .*", capsys.readouterr().out, re.M)
        assert notes == [f"note     {train} is given twice, and counts twice"]
    parsed(tiny, tmp_path, "--train_file", train, "--train_file", other)
    assert "note" not in capsys.readouterr().out


def test_a_file_that_is_training_and_validation_data_is_noted(tiny, tmp_path, texts, capsys):
    """F4, B9: also where a glob or a folder brings it about."""
    train, validation = texts
    for path in (tmp_path / "*.jsonl", tmp_path, validation):
        parsed(tiny, tmp_path, "--train_file", path, "--validation_file", validation)
        notes = re.findall(r"^note .*", capsys.readouterr().out, re.M)
        assert len(notes) == 1 and f"{validation} is training and validation data" in notes[0]
    parsed(tiny, tmp_path, "--train_file", train, "--validation_file", validation)
    assert "note" not in capsys.readouterr().out


def broken_link(path):
    path.symlink_to(path.parent / "moved.txt")


STRANGE = {  # case: what makes a.txt, words of the sentence
    "broken link": (broken_link, "is a link to", "moved.txt", "not there"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be read", "symbolic links"),
    "pipe": (os.mkfifo, "is a pipe", "write its content into a file first"),
    "empty file": (Path.touch, "is empty", "how it was made"),
}


@pytest.mark.parametrize(("make", "words"), cases(STRANGE))
@pytest.mark.parametrize("given", ["a.txt", "", "*.txt"], ids=["by name", "by folder", "by glob"])
def test_what_is_no_readable_file_gets_a_true_sentence(make, words, given, tmp_path):
    """F4: however it is given; no word of permissions, and nothing waits for a pipe."""
    make(tmp_path / "a.txt")
    sentence = last_word(main.expand_files, "--validation_file", [str(tmp_path / given)])
    assert sentence.startswith(f"--validation_file {tmp_path}/a.txt ") and "permission" not in sentence
    assert [word for word in words if word not in sentence] == []


def test_a_pipe_of_the_shell_is_no_file(tmp_path):
    """F4: <(zcat …) can be read only once."""
    ends = os.pipe()
    sentence = last_word(main.expand_files, "--train_file", [f"/dev/fd/{ends[0]}"])
    [os.close(end) for end in ends]
    assert f"--train_file /dev/fd/{ends[0]} is a pipe" in sentence


def test_a_file_in_a_folder_without_read_permission_is_refused(refuse, tmp_path):
    """F4: rather than left out."""
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "folder" / name).write_text("text\n" * 99)
    (tmp_path / "folder" / "b.txt").chmod(0)
    refuse("--train_file {tmp}/folder", "--train_file", "folder/b.txt", "no permission to read", runner=plain_user)


# ── Directories ──────────────────────────────────────────────────────────────────────────────────────────────────────


def save_dict(folder):
    splits = {"train": ROWS, "validation": ROWS[:3], "test": ROWS[:1]}
    parts = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(folder)


def save_single(folder):
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(folder)


def write_lines(folder):
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "validation.jsonl", ROWS[:3])


def write_parquet(folder):
    folder.mkdir()
    for name, rows in (("train", ROWS), ("validation", ROWS[:3])):
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / f"{name}.parquet")


def write_test_only(folder):
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", ROWS)


def write_file(path):
    write_jsonl(path, ROWS)


@pytest.mark.parametrize("make", [save_dict, save_single, write_lines, write_parquet])
def test_a_data_set_directory_is_read(make, tiny, tmp_path):
    """F3: directories of save_to_disk, of JSON lines and of parquet files."""
    make(tmp_path / "data")
    flags = ["--dataset_name", tmp_path / "data", "--model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    done = finish(*flags, *SHORT)
    assert "train: 10 rows" in done.out
    assert ("validation: 3 rows" in done.out) == (make is not save_single) == ("eval_loss" in done.out)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (write_test_only, ["no train split", "only test", "--train_file"]),
        (Path.mkdir, ["data", "any data files"]),
        (write_file, ["data", "--train_file"]),
        (lambda folder: None, ["data", "no such"]),
    ],
    ids=["only a test split", "empty", "a file", "missing"],
)
def test_a_directory_that_is_no_training_data_is_refused(make, words, refuse, tmp_path):
    """F3, B2: a path that is no data set directory ends with status 2 and names what is there."""
    make(tmp_path / "data")
    refuse("--dataset_name {tmp}/data", "--dataset_name", *words)


@pytest.mark.slow
@pytest.mark.parametrize("make", [save_dict, write_lines])
def test_a_read_only_directory_is_read_and_not_written_to(make, tiny, tmp_path):
    """F3: what is prepared goes to the cache, not beside the data."""
    make(tmp_path / "data")
    before = sorted(tmp_path.glob("data/**/*"))
    subprocess.run(["chmod", "-R", "a-w", tmp_path / "data"], check=True)
    flags = ["--dataset_name", tmp_path / "data", "--model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    done = plain_user(*flags, *SHORT)
    subprocess.run(["chmod", "-R", "u+w", tmp_path / "data"], check=True)
    assert done.status == 0, done.err
    assert sorted(tmp_path.glob("data/**/*")) == before


MIXED = {  # name: content, texts; None: left out
    "a.txt": ("one\n\n  two\n", ["one\n\n  two\n"]),
    "B.MD": ("# Title\n\n\ntext", ["# Title\n\n\ntext"]),
    "c.jsonl": ('{"text": "NA"}\n{"text": "line\\n\\nbreaks "}\n', ["NA", "line\n\nbreaks "]),
    "sub/d.csv": ("id,text\n1,null\n2,\n3,nan\n", ["null", "", "nan"]),
    "sub/deep/e.json": ('[{"text": "None"}]', ["None"]),
    "sub/deep/f.tsv": ("text\tid\n007\t1\n", ["007"]),
    "g.txt.gz": (gzip.compress(b"packed\n"), ["packed\n"]),
    "h.parquet": (parquet({"text": ["true", None]}), ["true", None]),
    "notes.log": ("left out", None),
    "LICENSE": ("left out", None),
    ".hidden.txt": ("left out", None),
    "sub/.git/config.txt": ("left out", None),
}


def write_files(folder, files):
    """Write {name: content}, or {name: (content, …)}, the last name first. Returns: folder."""
    for name in sorted(files, reverse=True):
        content = files[name][0] if isinstance(files[name], tuple) else files[name]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def left_out(said):
    """The paths that a line of main.py names as left out, and how many files it says are read."""
    read, paths = re.search(r": ([\d,]+) of [\d,]+ files are read(?:; left out: (.*))?$", said, re.M).groups()
    return {Path(path) for path in (paths or "").split(", ") if path}, int(read)


@pytest.mark.parametrize("end", ["", "/", "/sub/..", "[x]"])
def test_a_folder_is_read_as_its_files_are(end, tmp_path, capsys):
    """F4, L4, B2: all known kinds, at any depth, in the order of their names, by the same readers; what is left out is
    named."""
    folder = write_files(tmp_path / f"folder{end * (end == '[x]')}", MIXED)
    given = f"{folder}{end * (end != '[x]')}"
    names = sorted(name for name, (_, texts) in MIXED.items() if texts is not None)
    expected = [text for name in names for text in MIXED[name][1]]
    assert read(given) == expected
    rest = {folder.resolve() / name for name in {*MIXED} - {*names}}
    named, number = left_out(capsys.readouterr().out)
    assert ({path.resolve() for path in named}, number) == (rest, len(names))
    assert read(*(folder / name for name in names)) == expected
    assert capsys.readouterr().out == ""


def test_a_folder_has_the_same_order_on_every_disk(tmp_path):
    """F4, B13: directories list their files in whatever order."""
    names = [f"{number:02}.txt" for number in range(30)]
    write_files(tmp_path, {name: name for name in names})
    write_files(tmp_path, {"00/z.txt": "00/z.txt"})
    assert read(tmp_path) == ["00.txt", "00/z.txt", *names[1:]]


def test_many_files_that_are_left_out_are_not_all_named(tmp_path, capsys):
    """F4: nine, and more."""
    write_files(tmp_path, {"a.txt": "a"} | {f"{number:03}.log": "b" for number in range(100)})
    assert read(tmp_path) == ["a"]
    said = capsys.readouterr().out
    assert "1 of 101 files are read" in said and said.count(".log") == 9 and said.endswith(" and more\n")


def test_files_behind_links_are_read_once(tmp_path):
    """F4: folders and files may be links; a link back up is no second text."""
    write_files(tmp_path / "elsewhere", {"b.txt": "b", "c.txt": "c"})
    folder = write_files(tmp_path / "folder", {"a.txt": "a"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert read(folder) == ["a", "b", "c"]
    (folder / "back").symlink_to(folder)
    assert read(folder) == ["a", "b", "c"]


@pytest.mark.parametrize(("flag", "files", "words"), [
    ("--train_file", {"a.log": "x", ".b.txt": "y"}, [".txt .md .json .jsonl .csv .tsv .parquet", "a.log", ".b.txt"]),
    ("--dataset_name", {"a.log": "x", ".b.txt": "y"}, [".txt .md .json .jsonl .csv .tsv .parquet", "a.log", ".b.txt"]),
    ("--train_file", {}, [".txt .md .json .jsonl .csv .tsv .parquet"]),
    ("--dataset_name", {}, ["any data files"]),
])  # fmt: skip
def test_a_folder_without_known_files_is_refused(flag, files, words, tiny, tmp_path):
    """F3, F4, B2: the sentence names the kinds, or that there is nothing."""
    (tmp_path / "folder").mkdir()
    write_files(tmp_path / "folder", files)
    sentence = last_word(prepare, tiny, tmp_path, flag, tmp_path / "folder")
    assert sentence.startswith(f"{flag} {tmp_path}/folder ")
    assert [word for word in words if word not in sentence] == []


def chunks_from(tiny, tmp_path, *argv):
    """(chunks for training, chunks for validation) that flags bring about."""
    train, validation, _ = prepare(tiny, tmp_path, *argv, "--max_seq_length", 4, "--no_truncation")
    return [split and split["input_ids"][:] for split in (train, validation)]


def test_a_data_set_directory_of_files_is_read_as_training_files_are(tiny, tmp_path, capsys):
    """F3, F4, L4, B2: the same texts, so the same chunks: nothing becomes blank, no line break is lost."""
    folder = write_files(tmp_path / "folder", MIXED)
    expected = chunks_from(tiny, tmp_path, "--train_file", folder)
    reports = report_of(capsys.readouterr().out)
    assert chunks_from(tiny, tmp_path, "--dataset_name", folder) == expected
    said = capsys.readouterr().out
    assert report_of(said) == reports
    assert left_out(said) == ({folder / name for name, (_, texts) in MIXED.items() if texts is None}, 8)


@pytest.mark.parametrize("names", [
    ("train.jsonl", "validation.txt", "test.csv"),
    ("train/a.md", "valid/b.md", "test/c.md"),
    ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
    ("my_train_1.TXT.gz", "my_val_1.parquet", "my_eval_1.txt"),
])  # fmt: skip
def test_names_in_a_data_set_directory_tell_the_splits(names, tiny, tmp_path, capsys):
    """F3, B2: as for datasets itself; the test split and the card are left out, which is said."""
    rows = ["to train on " * 9, "to validate with " * 9, "never seen"]
    content = {
        ".jsonl": lambda row: lines({"text": row}), ".csv": lambda row: f"text\n{row}\n", ".txt": str, ".md": str,
        ".gz": lambda row: gzip.compress(row.encode()), ".parquet": lambda row: parquet({"text": [row]}),
    }  # fmt: skip
    files = {name: content[Path(name).suffix](row) for name, row in zip(names, rows, strict=True)}
    folder = write_files(tmp_path / "folder", files | {"README.md": "# A card\n\nwithout a loading configuration"})
    made = chunks_from(tiny, tmp_path, "--dataset_name", folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert made == [expected_chunks(tokenizer, [row], 4, truncate=False)[0] for row in rows[:2]]
    assert left_out(capsys.readouterr().out) == ({folder / names[2], folder / "README.md"}, 2)


def test_the_configuration_in_a_card_is_left_to_datasets(tiny, tmp_path, capsys):
    """F3: README.md with `configs:` says which files are which split."""
    card = """---
configs:
- config_name: first
  data_files:
  - {split: train, path: x/*.jsonl}
  - {split: validation, path: train.jsonl}
- config_name: second
  data_files: other.jsonl
---
"""
    files = {"x/1.jsonl": lines({"text": "to train on " * 9}), "train.jsonl": lines({"text": "to validate " * 9}),
             "other.jsonl": lines({"text": "another one " * 9}), "README.md": card}  # fmt: skip
    folder = write_files(tmp_path / "folder", files)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    flags = ["--dataset_name", folder, "--dataset_config_name", "first"]
    rows = ["to train on " * 9, "to validate " * 9]
    expected = [expected_chunks(tokenizer, [row], 4, truncate=False)[0] for row in rows]
    assert chunks_from(tiny, tmp_path, *flags) == expected
    assert "files are read" not in capsys.readouterr().out
    sentence = last_word(prepare, tiny, tmp_path, "--dataset_name", folder)
    assert "--dataset_config_name" in sentence and "first" in sentence and "second" in sentence


def test_a_configuration_of_a_folder_that_has_none_is_refused(tiny, tmp_path):
    """F3: it would do nothing."""
    folder = write_files(tmp_path / "folder", {"train.txt": "text"})
    sentence = last_word(prepare, tiny, tmp_path, "--dataset_name", folder, "--dataset_config_name", "en")
    assert "--dataset_config_name en" in sentence and "leave it out" in sentence


def test_a_card_in_another_encoding_is_no_obstacle(tiny, tmp_path):
    """F3: README.md is no data."""
    folder = write_files(tmp_path / "folder", {"train.txt": "text " * 9, "README.md": "café".encode("latin1")})
    assert chunks_from(tiny, tmp_path, "--dataset_name", folder)[0]


def test_a_training_split_of_unknown_files_alone_is_refused(tiny, tmp_path):
    """F3, B2: that there is a validation split is not enough."""
    folder = write_files(tmp_path / "folder", {"train.log": "text", "validation.txt": "text " * 99})
    sentence = last_word(chunks_from, tiny, tmp_path, "--dataset_name", folder)
    assert f"--dataset_name {folder}" in sentence and "train" in sentence and ".txt .md .json" in sentence


def test_a_saved_data_set_is_no_folder_of_files(tmp_path):
    """F3, F4: its .json files are no data; the sentence says which flag takes it."""
    save_dict(tmp_path / "saved")
    assert "--dataset_name" in last_word(read, tmp_path / "saved")


def test_a_folder_below_without_read_permission_is_refused(refuse, tmp_path):
    """F4: rather than left out."""
    folder = write_files(tmp_path / "folder", {"a.txt": "text " * 99, "sub/b.txt": "text " * 99})
    (folder / "sub").chmod(0)
    refuse("--train_file {tmp}/folder", "--train_file", "folder/sub", "cannot be read", runner=plain_user)
    (folder / "sub").chmod(0o755)


def test_a_folder_whose_name_has_letters_of_a_pattern_is_read(tiny, tmp_path):
    """F3, F4: a name is a name, also with brackets, a star and a space."""
    folder = write_files(tmp_path / "we[i]rd * ?", {"a.txt": "some text " * 99})
    expected = chunks_from(tiny, tmp_path, "--train_file", folder)[0]
    assert expected and chunks_from(tiny, tmp_path, "--dataset_name", folder)[0] == expected


def test_a_bad_file_in_a_data_set_directory_is_named(tiny, tmp_path):
    """F3, B2: by its bytes, as a training file is; by its line."""
    folder = write_files(tmp_path / "folder", {"train.txt": b"%PDF-1.5\n", "test.txt": ""})
    assert f"--dataset_name {folder}/train.txt is a PDF" in last_word(prepare, tiny, tmp_path, "--dataset_name", folder)
    folder = write_files(tmp_path / "other", {"train.jsonl": '{"text": "a"}\n{"text": \n'})
    assert f"{folder}/train.jsonl, line 2: broken JSON" in last_word(prepare, tiny, tmp_path, "--dataset_name", folder)


# ── The hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext"])
def test_wikitext_without_a_configuration_is_the_small_raw_one(name, hub, tiny, tmp_path):
    """C4: wikitext-2-raw-v1 is taken, and one line says so."""
    flags = ["--dataset_name", name, "--model_name_or_path", tiny, "--output_dir", tmp_path / "out"]
    done = finish(*flags, *SHORT)
    assert len([line for line in done.out.splitlines() if "wikitext-2-raw-v1" in line]) == 1
    assert "train: 300 rows" in done.out


def test_a_chosen_configuration_is_taken_without_a_notice(hub, tiny, tmp_path):
    """F3: --dataset_config_name decides."""
    flags = ["--dataset_name", "wikitext", "--dataset_config_name", "wikitext-103-raw-v1", "--model_name_or_path", tiny]
    done = finish(*flags, "--output_dir", tmp_path / "out", *SHORT)
    assert "train: 600 rows" in done.out and "wikitext-2-raw-v1" not in done.out


DATA = {  # case: (flags behind --dataset_name, environment), words of the sentence
    "unknown": (("test/nowhere", {}), "test/nowhere", "no such name", "{hub}/datasets/test/nowhere"),
    "unknown, with a token": (("test/nowhere", GOOD), "test/nowhere", "no such name"),
    "unknown, without an owner": (("nowhere", {}), "nowhere", "no such name"),
    "gated without token": (("test/gated-data", {}), "gated", "{hub}/datasets/test/gated-data", "hf auth login"),
    "gated without accepted terms": (
        ("test/gated-data --dataset_config_name wikitext-2-v1", STRANGER),
        "accept",
        "{hub}/datasets/test/gated-data",
    ),
    "gated with an invalid token": (("test/gated-data", INVALID), "refuses your token", "hf auth login"),
    "several configurations": (
        ("test/configs", {}),
        "--dataset_config_name",
        "'wikitext-103-raw-v1', 'wikitext-2-raw-v1', 'wikitext-2-v1'",
    ),
    "unknown configuration": (
        ("test/configs --dataset_config_name wikitext-3", {}),
        "wikitext-3",
        "wikitext-103-raw-v1",
        "wikitext-2-raw-v1",
    ),
    "only a test split": (("test/only-test", {}), "test/only-test", "no train split", "only test", "--train_file"),
    "nothing to evaluate on": (("test/no-text --do_eval", {}), "no validation split", "--validation_file"),
    "no such column": (("test/no-text", {}), "'text'", "mean 'Text'?", "columns: Text, id", "--text_column"),
    "column of numbers": (("test/numbers", {}), "split train", "'text' holds int64", "--text_column"),
    "column of lists": (("test/lists", {}), "split train", "'text' holds List", "--text_column"),
    "column of nulls": (("test/nulls", {}), "split train", "'text' holds null", "--text_column"),
    "blank rows": (("test/blank", {}), "train", "no text", "3 rows"),
    "broken file": (("test/broken", {}), "test/broken", "cannot be loaded", "JSON"),
}


@pytest.mark.parametrize(("asked", "words"), cases(DATA))
def test_data_that_the_hub_does_not_give_is_refused_with_the_next_step(asked, words, hub, refuse):
    """F3, F5, B2, B5: unknown, gated or unfit data sets end with status 2 and say what to do."""
    refuse(f"--dataset_name {asked[0]}", *(word.format(hub=hub.endpoint) for word in words), env=asked[1])


def test_a_gated_data_set_opens_with_a_good_token(hub, tiny, tmp_path):
    """F3: the token of the environment reaches the hub."""
    flags = ["--dataset_name", "test/gated-data", "--dataset_config_name", "wikitext-2-v1"]
    finish(*flags, "--model_name_or_path", tiny, "--output_dir", tmp_path / "out", *SHORT, env=GOOD)


@pytest.mark.slow
def test_a_second_run_works_offline_from_the_cache(hub, tmp_path):
    """F1, F3: what was downloaded once needs no network and no token any more."""
    home = {"HF_HOME": str(tmp_path / "home")}
    flags = ["--dataset_name", "wikitext", *SHORT]
    first = launch(*flags, "--output_dir", tmp_path / "first", env=home | GOOD)
    assert first.status == 0, first.err
    hub.requests.clear()
    second = launch(*flags, "--output_dir", tmp_path / "second", env=home | {"HF_HUB_OFFLINE": "1"})
    assert second.status == 0, second.err
    assert hub.requests == []
    assert results(tmp_path / "first")["eval_loss"] == results(tmp_path / "second")["eval_loss"]


@pytest.mark.parametrize(
    ("flag", "way"),
    [
        ("--model_name_or_path", "offline"),
        ("--dataset_name", "offline"),
        ("--model_name_or_path", "dead endpoint"),
    ],
)
@pytest.mark.slow
def test_no_network_and_an_empty_cache_is_said_in_one_sentence(flag, way, hub, refuse, tmp_path):
    """F1, F3: with HF_HUB_OFFLINE at once, with a dead network after the library's own tries."""
    env = {"HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_OFFLINE": "1"} if way == "offline" else {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    flags = ALSO + "--model_name_or_path google/gemma-270m" if "model" in flag else "--dataset_name wikitext"

    def last_line(*argv, env):
        done = launch(*argv, env=env)
        head, mark, tail = done.err.partition("main.py: error: ")
        assert "Traceback" not in head  # the library tells of its tries before
        done.err = mark + tail
        return done

    refuse(flags, flag, "not in the cache", "network", "local directory", env=env, runner=last_line)


# ── A part is held out ───────────────────────────────────────────────────────────────────────────────────────────────


def names_in(tokenizer, data):
    """The names "00x" to "99x" of which the texts in chunks consist."""
    return {name for chunk in data["input_ids"][:]
            for name in re.findall(r"(?<!\d)\d\dx", tokenizer.decode([max(token, ~token) for token in chunk]))}


@pytest.mark.parametrize("percent, wanted", [(5, 5), (12.5, 12), (0.1, 1), (60, 60)])
def test_a_share_of_the_texts_is_held_out(percent, wanted, tiny, tmp_path, capsys):
    """U3: so many of 100 texts, each in one part only, the same in each call; all tokens are accounted for."""
    rows = [f"{number:02}x" * 20 for number in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    words = ["--train_file", path, "--max_seq_length", 8, "--validation_split_percentage", percent, "--no_truncation"]
    train, validation, tokenizer = prepare(tiny, tmp_path, *words)
    out = capsys.readouterr().out
    held, kept = re.search(r"train: .*?([\d,]+) tokens held out, ([\d,]+) tokens kept", out).groups()
    whole = sum(len(ids) for ids in tokenizer(rows)["input_ids"])
    assert int(held.replace(",", "")) + int(kept.replace(",", "")) == whole
    assert f"validation: held out of the training data, {held} tokens kept" in out
    learnt, kept_back = names_in(tokenizer, train), names_in(tokenizer, validation)
    assert len(kept_back) == wanted and len(learnt) == 100 - wanted and not learnt & kept_back
    again = prepare(tiny, tmp_path, *words, "--overwrite_cache")
    assert [data["input_ids"][:] for data in again[:2]] == [data["input_ids"][:] for data in (train, validation)]


def held_out(tiny, tmp_path, path, *more):
    """Sets of the texts (words of one letter each) of both parts, by rows that fill a chunk of 8 each."""
    train, validation, tokenizer = prepare(tiny, tmp_path, "--train_file", path, "--max_seq_length", 8, *more)
    return [tokenizer.batch_decode([[max(token, ~token) for token in chunk] for chunk in data["input_ids"][:]])
            for data in (train, validation)]  # fmt: skip


def test_the_seed_chooses_what_is_held_out_and_equal_texts_stay_together(tiny, tmp_path):
    """U3: no text is in both parts, though each is in the file four times, the copies far from each other."""
    rows = [f"{letter}{number}-{letter}{number} and so on and on" for letter in "abcdefgh" for number in range(5)] * 4
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    parts = {}
    for seed in (1, 2, 3):
        train, validation = held_out(tiny, tmp_path, path, "--validation_split_percentage", 20, "--seed", seed)
        assert len(train) == 128 and len(validation) == 32 and len(set(validation)) == 8
        assert not {*train} & {*validation}
        parts[seed] = {*validation}
    assert parts[1] != parts[2] != parts[3] != parts[1]


def test_texts_that_differ_only_behind_the_cut_stay_together(tiny, tmp_path):
    """U3: truncation makes them the same chunk, which would be trained on and evaluated."""
    rows = [f"{number:02}{number:02}{number:02}{number:02} " + tail * 9 for number in range(40) for tail in "xy"]
    train, validation = held_out(tiny, tmp_path, write_jsonl(tmp_path / "a.jsonl", rows),
                                 "--validation_split_percentage", 25)  # fmt: skip
    assert len(validation) == 20 and len(train) == 60 and not {*train} & {*validation}


@pytest.mark.parametrize("percent", [10, 33.3, 90])
def test_of_a_single_document_the_end_is_held_out(percent, tiny, tmp_path):
    """U3: to the token; a document of several pieces, and of one; nothing is lost between the parts."""
    for size in (300, 40_000):
        text = "".join(f"line {number} of a document\n" for number in range(size // 10))[:size]
        (tmp_path / f"{size}.txt").write_text(text)
        words = ["--train_file", tmp_path / f"{size}.txt", "--max_seq_length", 2]
        *parts, tokenizer = prepare(tiny, tmp_path, *words, "--validation_split_percentage", percent)
        ids = tokenizer(text)["input_ids"]
        first, last = ([chunk[1] for chunk in data["input_ids"][:]] for data in parts)  # BOS + one token each
        assert first + last == ids[1:]
        assert len(first) + 1 == round(len(ids) * (1 - percent / 100))


@pytest.mark.parametrize(
    "flags, words",
    cases({
        "100 percent": ("--train_file {train} --validation_split_percentage 100", "leaves nothing to train on", "5"),
        "0 percent": ("--train_file {train} --validation_split_percentage 0", "must be above 0"),
        "a file, too": (
            "--train_file {train} --validation_file {train} --validation_split_percentage 5",
            "--validation_split_percentage and --validation_file exclude each other",
        ),
        "copies of one text": ("--train_file {train} --validation_split_percentage 5", "too few different texts"),
        "no training": (
            "--do_eval --validation_file {train} --validation_split_percentage 5", "is for a training", "--do_eval",
        ),
    }),
)
def test_a_share_that_cannot_be_held_out_is_refused(flags, words, refuse):
    """U3: in a sentence with the flag."""
    refuse(flags.replace("--do_eval", "--output_dir {tmp}/eval --do_eval"), *words)


def test_a_data_set_with_a_validation_split_needs_no_other(tiny, tmp_path, refuse):
    """U3: two kinds of validation data would be one too many."""
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "set" / f"{split}.jsonl", ROWS)
    refuse("--dataset_name {tmp}/set --validation_split_percentage 5", "validation split of its own", "leave")
