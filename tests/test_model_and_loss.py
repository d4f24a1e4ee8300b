"""Model and tokenizer from wherever they come, and the loss: ours against PyTorch's, in float64, on whole logits."""

import copy
import json
import re
import shutil
from ast import literal_eval
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    GOOD,
    INVALID,
    SHORT,
    STRANGER,
    cases,
    chunks_of,
    finish,
    in_child,
    logged,
    plain_loss,
    plain_user,
    results,
    short_run,
    weights_of,
    write_jsonl,
)
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as sdpa

import main

# ── From the hub and from directories ────────────────────────────────────────────────────────────────────────────────


def test_the_short_model_name_is_an_alias_of_the_published_one(hub, train, tmp_path):
    """F1: google/gemma-270m, the default, is fetched as google/gemma-3-270m, and one line says so."""
    hub.requests.clear()
    done = finish("--train_file", train, "--output_dir", tmp_path / "out", *SHORT, env=GOOD)
    assert [line for line in done.out.splitlines() if "google/gemma-270m" in line and "google/gemma-3-270m" in line]
    assert done.out.count("google/gemma-270m") == 1
    asked = " ".join(path for _, path in hub.requests)
    assert "google/gemma-3-270m/resolve" in asked and "google/gemma-270m" not in asked


HUB_MODELS = {  # case: (name, environment), words of the sentence
    "unknown": (("test/nowhere", {}), "test/nowhere", "no such name", "hf auth login"),
    "unknown, with a token": (("test/nowhere", GOOD), "test/nowhere", "no such name"),
    "gated without token": (("test/gated-model", {}), "gated", "{hub}/test/gated-model", "hf auth login"),
    "gated without accepted terms": (("test/gated-model", STRANGER), "gated", "accept", "{hub}/test/gated-model"),
    "gated with an invalid token": (("test/gated-model", INVALID), "refuses your token", "hf auth login"),
    "no config": (("test/no-config", {}), "test/no-config", "config.json"),
    "no weights": (("test/no-weights", {}), "test/no-weights", "model.safetensors"),
    "no tokenizer": (("test/no-tokenizer", {}), "test/no-tokenizer", "tokenizer.json"),
}


@pytest.mark.parametrize(("asked", "words"), cases(HUB_MODELS))
def test_a_model_that_the_hub_does_not_give_is_refused_with_the_next_step(asked, words, hub, refuse):
    """F1: unknown, gated, refused or incomplete models end with status 2 and say what to do."""
    words = ["--model_name_or_path", *(word.format(hub=hub.endpoint) for word in words)]
    refuse(f"--train_file {{train}} --model_name_or_path {asked[0]}", *words, env=asked[1])


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
    "without weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights (model.safetensors)"),
    "without tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "weights cut short": (cut_weights, "cannot be loaded", "incomplete"),
    "weights that are text": (lambda folder: (folder / "model.safetensors").write_text("oops"), "cannot be loaded"),
    "one weight missing": (drop_weight, "lacks", "layers.0.mlp.up_proj.weight"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json", "JSON"),
    "config of another size": (lambda folder: edit_config(folder, hidden_size=32), "model.embed_tokens.weight"),
    "unknown kind of model": (lambda folder: edit_config(folder, model_type="gemma99"), "gemma99"),
    "tokenizer that is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "words"), [
    ("model.safetensors", ["no permission for model.safetensors", "chmod +r"]), (".", ["no permission", "chmod +rx"])])
def test_a_model_that_may_not_be_read_is_called_that(closed, words, refuse, tiny, tmp_path):
    """F1: and not missing, as the library has it."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / closed).chmod(0)
    refuse("--train_file {train} --model_name_or_path {tmp}/model", f"{tmp_path}/model", *words, runner=plain_user)
    (tmp_path / "model" / closed).chmod(0o755)


def test_an_adapter_and_a_half_copied_model_are_named(refuse, tiny, tmp_path):
    """F1: an adapter alone; a pointer of Git LFS in the place of the weights; one of several files is missing."""
    shutil.copytree(tiny, tmp_path / "model")
    flags = "--train_file {train} --model_name_or_path {tmp}/model"
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    refuse(flags, "pointer of Git LFS in the place of model.safetensors", "git lfs pull")
    weights.unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(flags, "lacks 1 of its files of weights", "model-00002-of-00002.safetensors", "download it again")
    (tmp_path / "model" / "config.json").rename(tmp_path / "model" / "adapter_config.json")
    refuse(flags, "holds an adapter", "merge_and_unload")


@pytest.mark.parametrize(("spoil", "words"), cases(MODELS))
def test_bad_model_directory_is_refused_in_one_sentence_that_says_what_it_lacks(spoil, words, refuse, tiny, tmp_path):
    """F1: a model directory that is not whole is never trained from."""
    shutil.copytree(tiny, tmp_path / "model")
    spoil(tmp_path / "model")
    flags = "--train_file {train} --model_name_or_path {tmp}/model"
    refuse(flags, "--model_name_or_path", str(tmp_path / "model"), *words)


# ── As it is trained ─────────────────────────────────────────────────────────────────────────────────────────────────


def variant(tiny, folder, edit):
    """Copy the tiny model and edit it in a child. Returns: folder."""
    shutil.copytree(tiny, folder)
    in_child(edit, folder)
    return folder


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"]], ids=["plain", "gradient_checkpointing"])
def test_first_loss_equals_plain_transformers(tiny, tmp_path, texts, more):
    """L1, L2, B6, B14, F16: labels are the inputs but BOS, weights are float32; the first loss is the plain model's."""
    chunks = in_child(chunks_of, tiny, texts[0], 64)[:8]
    finish(*short_run(tiny, texts, tmp_path / "out", "--max_train_samples", 8, "--max_steps", 1, "--logging_steps", 1,
                      "--gradient_accumulation_steps", 2, *more))  # fmt: skip
    expected = in_child(plain_loss, tiny, chunks)
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_bf16_keeps_float32_weights(tiny_bf16, tmp_path, texts):
    """B14, L6: an update far below the resolution of the bfloat16 base is kept under --bf16, and in checkpoints."""
    finish(*short_run(tiny_bf16, texts, tmp_path / "out", "--max_steps", 1, "--bf16", "--warmup_steps", 0,
                      "--learning_rate", 1e-6))  # fmt: skip

    def change():
        before, after = weights_of(tiny_bf16), weights_of(tmp_path / "out" / "checkpoint-1")
        moved = [(after[name] - before[name].float()).abs().max().item() for name in after]
        return [{str(weight.dtype) for weight in some.values()} for some in (before, after)], min(moved), max(moved)

    dtypes, least, most = in_child(change)
    assert dtypes == [{"torch.bfloat16"}, {"torch.float32"}]
    assert 0 < least <= most < 2e-6  # bfloat16 steps are 4e-3 of a weight


def test_pad_falls_back_to_eos_and_eos_is_still_learnt(tiny, tmp_path, texts):
    """B7, L2, L5: a tokenizer without a pad token gets EOS for it; with --add_eos EOS is a label, BOS is none."""

    def without_pad(folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    model = variant(tiny, tmp_path / "model", without_pad)
    short = write_jsonl(tmp_path / "short.jsonl", [f"text {number}" for number in range(80)])
    finish("--model_name_or_path", model, "--train_file", short, "--output_dir", tmp_path / "out", "--add_eos",
           "--max_seq_length", 64, "--max_steps", 1, "--logging_steps", 1)  # fmt: skip
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"] == "<eos>"

    chunks = in_child(chunks_of, model, short, 64, [1])
    assert 2 <= len(chunks) <= 32 and min(chunk.count(1) for chunk in chunks) > 4  # one step sees them all
    expected = in_child(plain_loss, model, chunks)  # with BOS as a label it would be 2e-3 more
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_embeddings_grow_only_with_the_tokenizer(tiny, tmp_path, texts):
    """B8: tokens added to the tokenizer get rows, head and embedding stay tied; otherwise the size stays."""

    def add_tokens(folder):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<one>", "<two>"])
        tokenizer.save_pretrained(folder)

    grown = variant(tiny, tmp_path / "grown", add_tokens)
    for model, name in ((tiny, "same"), (grown, "more")):
        finish(*short_run(model, texts, tmp_path / name, "--max_steps", 1))

    def sizes(folder):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        return embedding.shape[0], model.config.vocab_size, embedding.data_ptr() == head.data_ptr()

    assert in_child(sizes, tmp_path / "same") == (384, 384, True)
    assert in_child(sizes, tmp_path / "more") == (386, 386, True)


def test_a_model_with_a_softcap_has_the_losses_of_plain_transformers(tiny, tmp_path, texts):
    """F17, B9: Gemma 2 caps its logits; the chunked loss does the same, in training and in evaluations."""

    def cap(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 0.2}))

    model = variant(tiny, tmp_path / "model", cap)
    done = finish(*short_run(model, texts, tmp_path / "out", "--max_train_samples", 8, "--max_steps", 1,
                             "--gradient_accumulation_steps", 2))  # fmt: skip
    assert "the chunked loss is not used" not in done.out
    losses = [in_child(plain_loss, place, chunks) for place, chunks in (
        (model, in_child(chunks_of, model, texts[0], 64)[:8]),
        (tiny, in_child(chunks_of, model, texts[0], 64)[:8]),
        (tmp_path / "out", in_child(chunks_of, model, texts[1], 64)))]  # fmt: skip
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[1] / losses[0] - 1) > 1e-3  # without the softcap it would be another number
    assert results(tmp_path / "out", "eval")["eval_loss"] == pytest.approx(losses[2], rel=1e-4)


def save_other(kind, folder, tiny):
    """Save a model with a loss of its own and the tiny model's tokenizer. Returns: folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, MixtralConfig

    small = dict(vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, bos_token_id=2, eos_token_id=1, pad_token_id=0)  # fmt: skip
    config = {
        "scaled logits": lambda: GraniteConfig(**small, logits_scaling=0.1),
        "experts": lambda: MixtralConfig(**small, output_router_logits=True, router_aux_loss_coef=0.1),
    }[kind]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["scaled logits", "experts"])
def test_an_evaluation_of_a_model_with_a_loss_of_its_own_is_of_its_tokens_alone(kind, tiny, tmp_path, texts):
    """L3: cross entropy of its logits, without what its loss adds for experts, at any batch, the last one short."""
    model = in_child(save_other, kind, tmp_path / "model", tiny)
    chunks = in_child(chunks_of, model, texts[1], 64)
    expected = in_child(plain_loss, model, chunks)
    for batch in (1, 5):
        done = finish("--do_eval", "--model_name_or_path", model, "--validation_file", texts[1], "--no_truncation",
                      "--max_seq_length", 64, "--per_device_eval_batch_size", batch, "--output_dir", tmp_path / "out"
                      )  # fmt: skip
        assert "the chunked loss is not used" in done.out and len(chunks) % 5
        assert results(tmp_path / "out", "eval")["eval_loss"] == pytest.approx(expected, rel=1e-5)


# ── The chunked loss ─────────────────────────────────────────────────────────────────────────────────────────────────


WIDTH, WORDS = 16, 97


def inputs(tokens, dtype=torch.float32, ignored=()):
    torch.manual_seed(tokens)
    labels = torch.randint(WORDS, (tokens,))
    labels[list(ignored)] = -100
    return torch.randn(tokens, WIDTH, dtype=dtype), torch.randn(WORDS, WIDTH, dtype=dtype), labels


def chunked(hidden, weight, labels, scale=1, softcap=None):
    """Losses of all tokens and both gradients of their sum, times scale, by the chunked loss."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
    total, losses = main.ChunkedLoss.apply(hidden, weight, labels, softcap, True)
    assert torch.equal(total, losses.sum()) and not losses.requires_grad
    (total * scale).backward()
    return losses, hidden.grad, weight.grad


def exact(hidden, weight, labels, softcap=None):
    """The same with nothing but a matrix product and PyTorch's cross entropy: plain, whole, float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    losses = cross_entropy(logits, labels, reduction="none")
    losses.sum().backward()
    return losses.detach(), hidden.grad, weight.grad


def near(ours, theirs, error):
    """Within `error` of the largest value."""
    for mine, yours in zip(ours, theirs, strict=True):
        assert (mine.double() - yours).abs().max() <= error * yours.abs().max().clamp(min=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 8, 14, 31])
def test_losses_and_gradients_in_float32(small_chunks, tokens):
    """One row, odd sizes, a chunk larger than the input."""
    given = inputs(tokens)
    near(chunked(*given), exact(*given), 2e-6)


def test_gradients_are_scaled_by_what_comes_from_above(small_chunks):
    """The mean over accumulated batches, or a scaler's factor: the sum's gradients times a number."""
    given = inputs(20)
    losses, *gradients = exact(*given)
    near(chunked(*given, scale=0.125), (losses, *(0.125 * gradient for gradient in gradients)), 2e-6)


@pytest.mark.parametrize("ignored", [[0], [3, 9], range(7), range(20)])
def test_ignored_labels_cost_and_teach_nothing(small_chunks, ignored):
    """Some, a whole chunk, all."""
    hidden, weight, labels = inputs(20, ignored=ignored)
    losses, to_hidden, to_weight = chunked(hidden, weight, labels)
    near((losses, to_hidden, to_weight), exact(hidden, weight, labels), 2e-6)
    assert not losses[list(ignored)].any() and not to_hidden[list(ignored)].any()


@pytest.mark.parametrize("way", ["parts of the vocabulary", "whole", "compiled"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_both_paths_err_no_more_than_their_dtype(small_chunks, monkeypatch, dtype, error, softcap, way):
    """A CPU takes the vocabulary in parts; a GPU takes it whole, with a compiled softmax, and chunks of uneven length.

    The weights stay float32, products are made in autocast's dtype, sums and softmax in float32. Nothing is compiled
    anew for another number of tokens, in training or in evaluations."""
    if way != "parts of the vocabulary":
        monkeypatch.setattr(main, "VOCABULARY_PART", {})
    monkeypatch.setattr(main, "COMPILED", {})
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype.itemsize == 2):
        if way == "compiled":
            assert main.use_compiled_softmax(torch.randn(WORDS, WIDTH), softcap)
            assert list(main.COMPILED) == [("cpu", dtype)]
        with torch.compiler.set_stance("fail_on_recompile" if way == "compiled" else "default"):
            for tokens in (40, 31, 7):
                given = inputs(tokens, ignored=[3])
                ours = chunked(*given, softcap=softcap)
                _, seen = main.ChunkedLoss.apply(*given, softcap, False)  # as an evaluation does
                assert ours[0].dtype == ours[2].dtype == torch.float32 and torch.equal(seen, ours[0])
                near(ours, exact(*given, softcap=softcap), error)


def test_a_compiled_softmax_has_one_buffer():
    """What the compiler makes of it writes the gradients over the logits: it allocates columns alone."""
    from torch._inductor.utils import run_and_get_code

    words, rows = 4096, 64
    logits, targets = torch.randn(rows, words).bfloat16(), torch.arange(rows)[:, None]
    _, codes = run_and_get_code(torch.compile(main.softmax_gradients), logits, targets, None, True)
    sizes = [literal_eval(size) for code in codes for size in re.findall(r"= empty_strided\w*\((\(.*?\)), ", code)]
    assert sizes and set(sizes) == {(rows, 1)}


def test_a_softmax_that_compiles_wrongly_or_not_at_all_stays_uncompiled(monkeypatch, capsys):
    """A note, and nothing in COMPILED; full memory is no reason to go on, as the training would not fit either."""
    monkeypatch.setattr(main, "COMPILED", {})
    monkeypatch.setitem(main.LOGITS_BYTES, "cpu", 4 * 97 * 50)
    kernel = main.softmax_gradients

    def wrong(*given):
        label, slope = kernel(*given)
        return label * 1.1, slope

    def missing(*given):
        raise RuntimeError("no compiler\nwas found")

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for compiled, words in ((wrong, "changes the values"), (missing, "RuntimeError: no compiler was found")):
        monkeypatch.setattr(torch, "compile", lambda function, compiled=compiled: compiled)
        assert not main.use_compiled_softmax(torch.randn(97, 16), None)
        out = capsys.readouterr().out
        assert words in out and out.count("\n") == 1 and not main.COMPILED
    monkeypatch.setattr(torch, "compile", lambda function: full)
    with pytest.raises(torch.OutOfMemoryError):
        main.use_compiled_softmax(torch.randn(97, 16), None)


def test_a_head_in_float32_learns_in_float32_from_states_in_16_bits(small_chunks):
    """As behind a last norm in 16 bits: the sum over all chunks is not rounded on its way to the weight."""
    hidden, weight, labels = inputs(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        to_weight = chunked(hidden.bfloat16(), weight, labels)[2]
    assert to_weight.dtype == torch.float32 and not torch.equal(to_weight, to_weight.bfloat16().float())


def test_a_nearly_certain_token_keeps_its_gradient(small_chunks):
    """p - 1 is made from log p: in bfloat16, 1 - 0.999 would be 0."""
    hidden, weight = torch.eye(WIDTH)[:1] * 4, torch.zeros(WORDS, WIDTH)
    weight[5, 0] = 3.0
    given = hidden, weight, torch.tensor([5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = chunked(*given)
    near(ours, exact(*given), 1e-2)


def test_a_gradient_too_small_for_float16_is_kept(small_chunks):
    """Under float16 autocast, before GradScaler has scaled it: 96 words of probability 1.5e-8 each are unlearnt."""
    hidden, weight = torch.eye(WIDTH)[:1] * 4, torch.zeros(WORDS, WIDTH)
    weight[5, 0] = 4.5
    given = hidden, weight, torch.tensor([5])
    with torch.autocast("cpu", dtype=torch.float16):
        ours = chunked(*given)
    near([ours[2][6:]], [exact(*given)[2][6:]], 1e-2)


def test_a_bfloat16_model_is_summed_in_float32(small_chunks):
    """No autocast, weights in bfloat16: 3,000 tokens whose plain bfloat16 sum would be off by percents."""
    given = inputs(3000, torch.bfloat16)
    near(chunked(*given), exact(*given), 2e-2)
    assert abs(main.ChunkedLoss.apply(*given, None, False)[0] / exact(*given)[0].sum() - 1) < 1e-3


def batches(words):
    """Two batches of ids with padding (id 0) among them, and their labels, some and a whole row of them ignored."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        ids = torch.randint(words, (3, 24))
        ids[1, 3:9] = 0
        labels = ids.clone()
        labels[0, :5], labels[2] = -100, -100
        yield ids, labels


def learn_alike(plain, model, items=None):
    """Accumulate two batches in both; losses and all gradients agree, also those of the tied embedding."""
    for one in (plain, model):
        one.train()
    for ids, labels in batches(model.config.vocab_size):
        losses = [one(input_ids=ids, labels=labels, num_items_in_batch=items)["loss"] for one in (plain, model)]
        assert torch.isclose(*losses, rtol=1e-5)
        for loss in losses:
            loss.backward()
    theirs = dict(plain.named_parameters())
    assert plain.get_input_embeddings().weight.grad.any()
    near([weight.grad for weight in model.parameters()],
         [theirs[name].grad.double() for name, _ in model.named_parameters()], 1e-4)  # fmt: skip


@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_as_with_its_own_loss(tiny_model, items, checkpointing, monkeypatch):
    """The tied embedding, every other weight, num_items_in_batch, two accumulated batches, gradient checkpointing."""
    monkeypatch.setitem(main.LOGITS_BYTES, "cpu", 13 * 4 * tiny_model.config.vocab_size)
    plain = copy.deepcopy(tiny_model)
    assert main.use_chunked_loss(tiny_model)
    for one in (plain, tiny_model):
        if checkpointing:
            one.activation_checkpointing_enable()
    learn_alike(plain, tiny_model, items)


def test_padding_is_learnt_by_the_head_and_not_by_the_table(tiny_model):
    """As in plain transformers, where the table has no gradient for row 0: only the head has one there."""
    ids = torch.tensor([[5, 6, 0, 0, 7, 8]])
    labels = torch.tensor([[5, 6, -100, -100, -100, 8]])
    gradients = []
    for chunked_loss in (False, True):
        one = copy.deepcopy(tiny_model)
        if chunked_loss:
            main.use_chunked_loss(one)
        one(input_ids=ids, labels=labels)["loss"].backward()
        gradients.append(one.get_input_embeddings().weight.grad[:9].double())
    near(gradients[1:], gradients[:1], 1e-5)
    assert gradients[0][5].abs().max() > 10 * gradients[0][0].abs().max()  # the head's part is the smaller one


def test_other_models_learn_as_with_their_own_loss():
    """A Gemma 3 whose head is a weight of its own, a tied GPT-2, a tied Llama with padding."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

    small = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 pad_token_id=0)  # fmt: skip
    gemma = dict(num_key_value_heads=1, head_dim=8, layer_types=["full_attention"], tie_word_embeddings=False)
    for config in (
        Gemma3TextConfig(**small, **gemma),
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        LlamaConfig(**small, tie_word_embeddings=True),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        plain = copy.deepcopy(model)
        assert main.use_chunked_loss(model)
        learn_alike(plain, model)


def test_evaluation_keeps_no_logits_and_no_gradients(tiny_model):
    """The losses of all tokens, and nothing to go backward through; logits still come without labels."""
    ids = torch.arange(40).view(2, 20)
    logits = tiny_model(input_ids=ids).logits
    main.use_chunked_loss(tiny_model)
    with torch.no_grad():
        result = tiny_model(input_ids=ids, labels=ids)
        assert torch.equal(tiny_model(input_ids=ids).logits, logits)
    assert set(result) == {"loss", "token_losses"} and not result["loss"].requires_grad
    wanted = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(result["token_losses"].flatten(), wanted, rtol=1e-5)


def test_a_batch_without_labels_teaches_nothing(tiny_model):
    """Its loss is 0, where the plain mean would be 0/0, which is no number."""
    main.use_chunked_loss(tiny_model)
    ids = torch.arange(20)[None]
    loss = tiny_model(input_ids=ids, labels=torch.full_like(ids, -100))["loss"]
    loss.backward()
    assert loss == 0 and not any(weight.grad.any() for weight in tiny_model.parameters())


def test_other_models_keep_their_own_loss():
    """GPT-2 has a plain head; Granite scales its logits; Phi's head has a bias; Mixtral's loss is its router's, too."""
    from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig, MixtralConfig, PhiConfig

    small = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    assert main.use_chunked_loss(gpt2)
    experts = MixtralConfig(**small, num_key_value_heads=1, output_router_logits=True, router_aux_loss_coef=1e-3)
    for config in (GraniteConfig(**small, logits_scaling=0.01), PhiConfig(**small), experts):
        other = AutoModelForCausalLM.from_config(config).eval()
        own = other.forward
        assert not main.use_chunked_loss(other) and other.forward == own


@pytest.mark.parametrize("cap", [0.2, 30.0])
def test_a_model_with_a_softcap_learns_as_with_its_own_loss(tiny_model, cap):
    """Gemma 2 has 30; at 0.2 the logits of the tiny model are bent."""
    tiny_model.config.final_logit_softcapping = cap
    plain = copy.deepcopy(tiny_model)
    assert main.use_chunked_loss(tiny_model)
    learn_alike(plain, tiny_model)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 4), (1,)])
def test_a_lean_norm_is_the_models_own(dtype, error, shape):
    """The same values to the last bit, the gradients of float64, and nothing kept but the input and a number a row."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    torch.manual_seed(0)
    norm = Gemma3RMSNorm(64)
    torch.nn.init.normal_(norm.weight, std=0.3)
    lean = copy.deepcopy(norm)
    x, slope = torch.randn(*shape, 64, dtype=dtype), torch.randn(*shape, 64, dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mine = main.LeanNorm.apply(one := x.clone().requires_grad_(), lean.weight, lean.eps)
    assert torch.equal(mine, norm(x)) and sum(t.numel() for t in kept) == x.numel() + 64 + x.numel() // 64
    mine.backward(slope)
    wide = copy.deepcopy(norm).double()
    two = x.double().requires_grad_()
    scale = torch.rsqrt(two.square().mean(-1, keepdim=True) + norm.eps)
    (two * scale * (1 + wide.weight)).backward(slope.double())
    near([one.grad, lean.weight.grad], [two.grad, wide.weight.grad], error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lean_norm_answers_in_the_dtype_of_the_products_behind_it(dtype):
    """Of float32 states: to the last bit what autocast would make of the model's own answer in the next layer."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    torch.manual_seed(0)
    norm, x = Gemma3RMSNorm(64), torch.randn(2, 5, 64)
    torch.nn.init.normal_(norm.weight, std=0.3)
    with torch.autocast("cpu", dtype=dtype):
        lean = main.LeanNorm.apply(x.requires_grad_(), norm.weight, norm.eps)
        assert lean.dtype == dtype and torch.equal(lean, norm(x).to(dtype))
    lean.sum().backward()
    assert x.grad.dtype == norm.weight.grad.dtype == torch.float32
    assert main.LeanNorm.apply(x, norm.weight, norm.eps).dtype == torch.float32


def put_together(folder, place, model=None, **settings):
    """Let main.py put model and Trainer together. Returns: the Trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = TrainingArguments(str(place), use_cpu=True, report_to=[], per_device_train_batch_size=2)
    run = SimpleNamespace(settings={"torch_compile": False, "ddp_comm_hook": None} | settings)
    chunks = Dataset.from_dict({"input_ids": [list(range(2, 42))] * 3})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return main.make_trainer(model, tokenizer, args, chunks, None, run, main.Resume())


def logits_before_and_after(folder, place):
    """Returns: whether the logits of a model are the same once its norms are lean, whether they are."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    before = model(input_ids=ids).logits
    put_together(folder, place, model)
    after = model(input_ids=ids).logits
    return torch.equal(after, before), after.grad_fn is not None, str(model.model.norm(after[..., :64]).grad_fn)


def test_all_norms_of_the_model_are_lean_and_give_the_same_logits(tiny, tmp_path):
    """To the last bit, without autocast."""
    same, learns, kind = in_child(logits_before_and_after, tiny, tmp_path)
    assert same and learns and "LeanNorm" in kind


# ── Windowed attention and compiled layers ───────────────────────────────────────────────────────────────────────────


def attention_on_a_cpu(more=0):
    """torch's varlen_attn as its documentation says, by sdpa and a mask; more: tokens that the window is too long."""

    def varlen(q, k, v, starts, starts_k, most, most_k, *, scale, window_size, enable_gqa):
        assert torch.equal(starts, starts_k) and starts.dtype == torch.int32 and starts[-1] == len(q) == len(k)
        q, k, v = (x.unflatten(0, (-1, most)).transpose(1, 2) for x in (q, k, v))
        at, back = torch.arange(most), most if window_size[0] < 0 else window_size[0] + more
        mask = (at[:, None] >= at) & (at[:, None] - at <= back)
        return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa).transpose(1, 2).flatten(0, 1)

    return varlen


@pytest.mark.parametrize("window", [16, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_of_the_attention_finds_a_window_that_is_wrong_by_one_token(tiny_model, monkeypatch, dtype, window):
    """Values and gradients at window + 128 tokens, sliding and full; what is right passes, what is wrong is named."""
    config = copy.deepcopy(tiny_model.config)
    config.sliding_window = window
    for more, verdict in ((0, ""), (1, "differs from sdpa by"), (-1, "differs from sdpa by")):
        monkeypatch.setattr(main, "varlen_attn", attention_on_a_cpu(more))
        why = main.ask("trials.attention", main.windowed_attention, config, torch.device("cpu"), dtype)
        assert verdict in why and bool(why) == bool(more)


def test_windowed_attention_gives_what_sdpa_gives_in_the_model(tiny_model, monkeypatch):
    """Two chunks, longer than the window, both kinds of layers; no mask is made, and none is needed."""
    import transformers

    monkeypatch.setattr(main, "varlen_attn", attention_on_a_cpu())
    ids = torch.randint(4, 380, (2, 50), generator=torch.Generator().manual_seed(0))
    tiny_model.eval()
    wanted = tiny_model(input_ids=ids).logits
    transformers.AttentionInterface.register("windowed", main.windowed_attention)
    tiny_model.set_attn_implementation("windowed")
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", None)  # would fail if it were called
    assert torch.allclose(tiny_model(input_ids=ids).logits, wanted, atol=1e-5)
    tiny_model.config.sliding_window = 8  # is not looked at again
    assert "windowed" not in tiny_model.config.to_json_string()


def test_a_cpu_keeps_sdpa_without_a_note(tiny_model, capsys):
    """There is no kernel for it to try."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        main.use_windowed_attention(tiny_model)
    assert tiny_model.config._attn_implementation == "sdpa" and not capsys.readouterr().out


def graphs_of_layers(depth, folder):
    """Trace the layers of a model of some depth with windowed attention, forward and backward, with fake tensors.

    Returns: graphs, graph breaks, frames that were captured whole, and the shape of a gradient."""
    import transformers
    from torch._dynamo.utils import counters
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = transformers.AutoConfig.from_pretrained(folder)
    config.use_cache = False  # as the Trainer sets it
    config.num_hidden_layers, config.layer_types = depth, ["sliding_attention", "full_attention"] * (depth // 2)
    transformers.AttentionInterface.register("windowed", main.windowed_attention)
    torch._dynamo.reset()
    counters.clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.set_attn_implementation("windowed")
        main.use_lean_norms(model)
        options = {"backend": "aot_eager", "fullgraph": True}
        plan = SimpleNamespace(activation_checkpointing=False)
        assert main.ask("trials.layers", model, plan, True, 2, 40, options) == ""
    stats = counters["stats"]["unique_graphs"], dict(counters["graph_break"]), counters["aot_autograd"]["ok"]
    return stats


@pytest.mark.parametrize("depth", [2, 6])
def test_layers_are_two_graphs_whatever_their_number(tiny, depth):
    """A layer with torch's windowed attention is captured without a break, forward and backward, once a kind."""
    assert in_child(graphs_of_layers, depth, tiny) == (2, {}, 2)


def layers_that_do_not_compile(folder, place):
    """Returns: what was said, whether the Trainer takes the layers as compiled, whether they still are."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        trainer = put_together(folder, place, torch_compile={"backend": "no_such_backend", "mode": None})
    layers = trainer.model.base_model.layers
    return said.getvalue(), trainer.compiled, [layer._compiled_call_impl for layer in layers]


def test_layers_that_cannot_be_compiled_stay_as_they_are_with_a_note(tiny, tmp_path):
    """As where a compiler is missing."""
    said, compiled, left = in_child(layers_that_do_not_compile, tiny, tmp_path)
    assert "torch.compile is not used" in said and "no_such_backend" in said and said.count("\n") == 2
    assert not compiled and left == [None] * len(left)


def graphs_in_a_run(folder, place):
    """Returns: the graphs after the trial, after batches of other shapes, and the batches that found none."""
    from torch._dynamo.utils import counters

    counters.clear()
    trainer = put_together(folder, place, torch_compile={"backend": "aot_eager", "mode": None})
    graphs, alone = [counters["stats"]["unique_graphs"]], []

    def step(batch):
        ids = torch.arange(2, 42).repeat(batch, 1)
        with trainer.accelerator.autocast():
            return trainer.model(input_ids=ids, labels=ids)["loss"]

    for batch in (2, 1, 2):
        step(batch).backward()
        graphs.append(counters["stats"]["unique_graphs"])
        with torch.compiler.set_stance("fail_on_recompile"):
            try:
                step(batch)
            except RuntimeError:
                alone.append(batch)
    with torch.no_grad():
        step(2)
    return graphs + [counters["stats"]["unique_graphs"]], alone


def test_a_short_batch_and_an_evaluation_compile_nothing(tiny, tmp_path):
    """The trial makes two graphs, which whole batches find; for a shorter one there is no pause in the run."""
    assert in_child(graphs_in_a_run, tiny, tmp_path) == ([2, 2, 2, 2, 2], [1])


def ways_of_gradients(folder, place):
    """Returns: what DistributedDataParallel is given without and with --ddp_comm_hook bf16."""
    handlers = [put_together(folder, place, ddp_comm_hook=hook).accelerator.ddp_handler for hook in (None, "bf16")]
    hooks = []
    for handler in handlers:
        ddp = type("", (), {"register_comm_hook": lambda self, state, hook: hooks.append(hook.__name__)})()
        handler.register_comm_hook(ddp)
    return [handler.gradient_as_bucket_view for handler in handlers], hooks


def test_gradients_live_in_the_buckets_and_travel_as_asked(tiny, tmp_path):
    """F24: --ddp_comm_hook is off by default; bf16 is torch's own hook, by accelerate's name for it."""
    assert in_child(ways_of_gradients, tiny, tmp_path) == ([True, True], ["bf16_compress_hook"])
