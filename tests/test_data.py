"""What becomes of rows and tokens on their way to chunks: from files, directories, the hub and the cache."""

import gzip
import json
import re
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from helpers import (
    GOOD,
    INVALID,
    ROWS,
    SHORT,
    STRANGER,
    cases,
    finish,
    free_port,
    launch,
    manual,
    plain_user,
    results,
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
@given(texts=TEXTS, length=st.integers(2, 70), truncate=st.booleans(), bos=st.booleans(),
       cuts=st.lists(st.integers(0, 40)))  # fmt: skip
def test_packing_does_not_depend_on_batches(tmp_path, texts, length, truncate, bos, cuts):
    """B4, L1: whatever the record batches and files, each id is in one chunk in order, or in the one remainder; a chunk
    begins with BOS, its own or one that was added, or with none where the tokenizer has none."""
    texts = [[~2, *ids] if bos else ids for ids in texts]
    cut = [main.CUT * (number % 3 > 0) for number in range(len(texts))]
    borders = sorted({0, len(texts), *(cut for cut in cuts if cut < len(texts))})
    files = []
    for number, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        files.append(str(tmp_path / f"{number % 2}-{number}.arrow"))
        columns = {
            "input_ids": pa.array(texts[start:end], pa.list_(pa.int32())),
            "_marks": pa.array(cut[start:end], pa.int8()),
        }
        table = pa.table(columns)
        with pa.OSFile(files[-1], "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    pairs = zip(texts, cut, strict=True)
    kept = [token for text, cut in pairs for token in (text[:length] if truncate and cut else text)]
    made = list(main.group_texts(files, length, main.CUT * truncate, [~2] * bos))
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


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ZIPPED = gzip.compress(lines(*[{"text": f"row {number}"} for number in range(1000)]).encode())
CONTENT = {  # case: (file name, content), words of the sentence
    "empty": (("bad.jsonl", ""), "bad.jsonl", "empty"),
    "unknown ending": (("bad.log", "text"), "bad.log", "none of the known endings", ".json", ".csv", ".txt", ".gz", "cp "),
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
        ("bad.csv", "id,text\n1,hello\n2,hello, world\n"),
        "bad.csv, line 3",
        "3 values",
        "has 2",
        "double quotes",
    ),
    "csv with a value too few": (("bad.csv", "id,text\n1,hello\n2\n"), "bad.csv, line 3", "1 value", "has 2"),
    "csv with an open quote": (("bad.csv", 'id,text\n1,"hello\n2,world\n'), "bad.csv", "broken CSV", "line"),
    "Latin-1": (("bad.txt", "plain\ncafé\n".encode("latin1")), "bad.txt", "not UTF-8", "byte 9", "0xe9", "iconv"),
    "UTF-16": (("bad.txt", "a line\n".encode("utf-16")), "bad.txt", "is UTF-16-LE", "iconv -f utf-16-le -t utf-8"),
    "UTF-16 without a mark": (
        ("bad.txt", "a line\nand another\n".encode("utf-16-le")),
        "bad.txt",
        "is UTF-16-LE",
        "iconv -f utf-16-le",
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
