"""What accompanies a finished model and carries it to a hub: the card, the notice, the upload and its refusals."""

import json
import logging
import os
import time
from argparse import Namespace
from contextlib import contextmanager

import pytest
import yaml
from helpers import HUB, SHORT, cases, finish, free_port, launch, refused, run, snapshot, times, two_processes
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import are_progress_bars_disabled, get_session

from tools import publish

TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
STEPS = ("whoami", "create", "check", "yaml", "preupload", "lfs", "put", "commit")
MODEL = {  # files of a finished model
    "config.json": b"{}", "model.safetensors": bytes(range(256)) * 400, "tokenizer.json": b'{"a": 1}',
    "README.md": b"---\nlicense: gemma\n---\n", "NOTICE": b"Notice\n", "all_results.json": b"{}\n",
}  # fmt: skip
REST = {  # files that never leave the machine
    ".lock": b"", "run.json": b"/home/me", "manifest.json": b"{}", "training_args.bin": b"hf_good",
    "trainer_state.json": b"{}", "checkpoint-1/optimizer.pt": b"state", "runs/events": b"curve",
}  # fmt: skip


# ── The card ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def facts(**changes):
    """What main.py tells of a run with defaults; flags and facts may be changed."""
    flags = {"model_name_or_path": "google/gemma-3-270m", "dataset_name": None, "dataset_config_name": None,
             "train_file": ["/home/me/secret/train.jsonl"], "validation_file": ["/home/me/secret/val.jsonl"],
             "validation_split_percentage": None, "text_column": "text", "sample_by": "document",
             "max_seq_length": 2048, "no_truncation": False, "add_eos": False, "max_train_samples": None,
             "max_eval_samples": None, "num_train_epochs": 3.0, "per_device_train_batch_size": 4,
             "gradient_accumulation_steps": 8, "learning_rate": 2e-5, "weight_decay": 0.01, "warmup_steps": 500.0,
             "seed": 42, "use_flash_attention": False, "ddp_comm_hook": None, "output_dir": "/home/me/secret/out",
             "given": ["--train_file"], "trainer_argv": []}  # fmt: skip
    known = {"model_type": "gemma3_text", "parameters": 268_098_176, "dtype": "bfloat16", "processes": 2,
             "device": "NVIDIA A40", "autocast": "bf16", "steps": 1200, "epochs": 3.0, "tokens": 78_643_200,
             "metrics": {"eval_loss": 2.0, "eval_perplexity": 7.38906, "eval_bits_per_byte": 0.81, "train_loss": 2.5},
             "versions": {"torch": "2.13.0", "transformers": "5.23.0"}}  # fmt: skip
    flags |= {name: value for name, value in changes.items() if name in flags}
    return known | {name: value for name, value in changes.items() if name in known} | {"args": Namespace(**flags)}


def header(texts):
    """The YAML of a card."""
    return yaml.safe_load(texts["README.md"].split("---\n")[1])


def model_dir(folder, card="", **config):
    """A directory with a card and a configuration, as a local model has them."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(card)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_card_tells_what_the_model_is_and_how_it_was_made():
    """U6: base, license, data, flags that matter, loss, perplexity, bits per byte, versions, use; no path."""
    texts = publish.card(facts(trainer_argv=["--optim", "adafactor", "--hub_token", "hf_secret", "--max_steps=-1"]))
    assert header(texts) == {
        "license": "gemma", "base_model": "google/gemma-3-270m", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation", "metrics": ["perplexity"],
        "tags": ["causal-lm", "fine-tuned"]}  # fmt: skip
    text = texts["README.md"]
    for words in ("268,098,176 parameters", "`google/gemma-3-270m`", "- `train.jsonl`", "- `val.jsonl`",
                  "| perplexity | 7.3891 |", "| bits per byte of text | 0.81 |", "| loss (nats a token) | 2 |",
                  "4 × 8 × 2 = 64 chunks = 131,072 tokens a step", "1,200, 3 epochs", "78,643,200",
                  "bf16 autocast; saved in bfloat16", "| `--learning_rate` | `2e-05` |", "| `--seed` | `42` |",
                  "| `--optim` | `adafactor` |", "| `--max_steps` | `-1` |", "`torch` `2.13.0`", "max_new_tokens",
                  'pipeline("text-generation"'):  # fmt: skip
        assert words in text, words
    assert "secret" not in text and "/home" not in text
    assert ModelCard(text).data.base_model == "google/gemma-3-270m"
    assert texts == publish.card(
        facts(trainer_argv=["--optim", "adafactor", "--hub_token", "hf_secret", "--max_steps=-1"]))  # fmt: skip


def test_the_notice_is_that_of_the_gemma_terms():
    """U6: the sentence alone on the first line, the modification, the restrictions; the same in the card."""
    texts = publish.card(facts())
    first, *rest = texts["NOTICE"].splitlines()
    assert first == TERMS
    policy = "ai.google.dev/gemma/prohibited_use_policy"
    for words in ("files were modified", "google/gemma-3-270m", "section 3.2", policy):
        assert words in " ".join(rest)
        assert words == "files were modified" or words in texts["README.md"]


def test_a_base_that_is_no_gemma_keeps_its_own_license(tmp_path):
    """Its card says which; else the header says nothing, and the text says whose applies. Gemma 4 has another one."""
    texts = publish.card(facts(model_name_or_path="openai-community/gpt2", model_type="gpt2", parameters=124))
    assert [*texts] == ["README.md"] and "license" not in header(texts)
    assert "license of the base model applies" in texts["README.md"] and "Gemma" not in texts["README.md"]
    own = model_dir(tmp_path / "mine", "---\nlicense: other\nlicense_name: 'x: \"y\"'\nlicense_link: LICENSE\n---\n")
    found = header(publish.card(facts(model_name_or_path=own, model_type="llama", parameters=1)))
    assert (found["license"], found["license_name"]) == ("other", 'x: "y"')
    assert "license_link" not in found and "base_model" not in found
    assert [*publish.card(facts(model_type="gemma4_text"))] == ["README.md"]
    assert [*publish.card(facts(model_type="gemma2"))] == ["README.md", "NOTICE"]


def test_a_local_base_is_named_as_far_as_it_is_known(tmp_path):
    """By its card, by name and size, by the hub's cache, by its configuration, or not at all: never by its path."""
    card = "---\nbase_model: google/gemma-3-270m-it\n---\n"
    for path, size, wanted in (
        (model_dir(tmp_path / "poems", card), 1, "google/gemma-3-270m-it"),
        (model_dir(tmp_path / "gemma-3-270m"), 268_098_176, "google/gemma-3-270m"),
        (model_dir(tmp_path / "a" / "gemma-3-270m"), 1, None),
        (model_dir(tmp_path / "models--google--gemma-3-1b-pt" / "snapshots" / "0a"), 1, "google/gemma-3-1b-pt"),
        (model_dir(tmp_path / "old", _name_or_path="google/gemma-3-270m"), 1, "google/gemma-3-270m"),
        (model_dir(tmp_path / "path", _name_or_path="outputs/gemma"), 1, None),
        (model_dir(tmp_path / "none", "---\nbase_model: [a/b, c/d]\n---\n"), 1, None),
        (model_dir(tmp_path / "broken", "---\n: {\n---\n"), 1, None),
    ):
        texts = publish.card(facts(model_name_or_path=path, parameters=size))
        assert header(texts).get("base_model") == wanted, path
        assert str(tmp_path) not in "".join(texts.values())
        assert (wanted or os.path.basename(path)) in texts["README.md"]


def test_data_of_a_hub_is_linked_and_a_local_one_named(tmp_path, monkeypatch):
    """wikitext has its full name and the configuration that main.py chooses."""
    texts = publish.card(facts(dataset_name="wikitext", train_file=[], validation_file=[]))
    assert header(texts)["datasets"] == ["Salesforce/wikitext"]
    assert "`wikitext-2-raw-v1`" in texts["README.md"] and "the validation split" in texts["README.md"]
    (tmp_path / "my data").mkdir()
    texts = publish.card(facts(dataset_name=str(tmp_path / "my data"), train_file=[], validation_file=[]))
    assert "datasets" not in header(texts) and "`my data`" in texts["README.md"]
    assert str(tmp_path) not in texts["README.md"]


def test_a_card_says_what_was_evaluated_or_that_nothing_was():
    """No validation data, a share of the texts, a part of them, and a file that was trained on, too."""
    texts = publish.card(facts(metrics={"train_loss": 2.5}, validation_file=[]))
    assert "was not evaluated" in texts["README.md"] and "metrics" not in header(texts)
    share = publish.card(facts(validation_file=[], validation_split_percentage=5.0, max_eval_samples=10))["README.md"]
    assert "first 10 chunks of 5 % of the texts" in share
    both = publish.card(facts(validation_file=["/home/me/secret/train.jsonl"]))["README.md"]
    assert "training data, too" in both
    assert "| perplexity | nan |" in publish.card(
        facts(metrics={"eval_loss": float("nan"), "eval_perplexity": float("nan")}))["README.md"]  # fmt: skip


HOSTILE = ['a"b', "a'b: c", "a\nb", "---\nlicense: mit\n---", "a|b", "a`b``c", "😀 ü", "a\u2028b", "a\udcffb", "# x",
           " ", "*"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_break_neither_header_nor_text(name, tmp_path):
    """Quotes, colons, line breaks, emoji, bytes that are no UTF-8: the header is the same, the text is UTF-8."""
    plain, odd = facts(), facts(train_file=[f"/x/{name}.txt"], validation_file=[f"/y/{name}.txt"], text_column=name,
                                given=["--text_column"], device=name, versions={name: name})  # fmt: skip
    texts = publish.card(odd)
    assert header(texts) == header(publish.card(plain))
    texts["README.md"].encode()
    assert len(texts["README.md"].splitlines()) == len(publish.card(plain)["README.md"].splitlines()) + 1
    folder = tmp_path / (name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") + "x")
    quoted = json.dumps(name.encode("utf-8", "replace").decode())
    local = model_dir(folder, f"---\nlicense: other\nlicense_name: {quoted}\n---\n")
    texts = publish.card(facts(model_name_or_path=local))
    assert header(texts)["license"] == "other" and "base_model" not in header(texts)
    for text in texts.values():
        text.encode()
    ModelCard(texts["README.md"])


# ── The upload, by its functions ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def pushing(monkeypatch, token="hf_good", **trouble):
    """The stub hub, empty, with trouble at steps of an upload; short limits. Gives the folder's names below it."""
    HUB.pushed, HUB.stored, HUB.roles, HUB.pace, HUB.storage, HUB.trouble = {}, {}, {}, 0, "", trouble
    monkeypatch.setattr(publish, "BEFORE", 1)
    monkeypatch.setattr(publish, "PATIENCE", 1)
    monkeypatch.setattr(publish, "PAUSES", (0.01, 0.02))
    monkeypatch.setenv("HF_TOKEN", token)
    del HUB.requests[:]
    try:
        yield HUB
    finally:
        HUB.trouble, HUB.pace, HUB.storage = {}, 0, ""


def finished(folder):
    """An output_dir with a finished model, and what else is in it."""
    for name, content in (MODEL | REST).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def steps_seen():
    """Methods and paths of the requests, without queries."""
    return [f"{method} {path.partition('?')[0]}" for method, path in HUB.requests]


def test_an_upload_is_one_commit_of_the_finished_model_alone(tmp_path, monkeypatch, capfd):
    """U7: exactly its files, bit for bit, the weights by LFS; nothing of the run; no bar and no warning."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch) as hub:
        assert publish.ready(None, None, None, folder) == ("", "")
        assert hub.pushed["tester/poems"] == {"files": {}, "private": False, "commits": []}
        url, fault = publish.upload(folder, None, None, None, None)
    assert (url, fault) == (f"{hub.endpoint}/tester/poems", "")
    assert hub.pushed["tester/poems"]["files"] == MODEL
    assert hub.pushed["tester/poems"]["commits"] == [sorted(MODEL)]
    assert sorted(hub.stored.values()) == sorted([MODEL["model.safetensors"], MODEL["tokenizer.json"]])
    assert capfd.readouterr() == ("", "")


def test_a_second_upload_sends_nothing(tmp_path, monkeypatch):
    """U7: the same files make no commit; a changed one alone makes the next."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch) as hub:
        first = publish.upload(folder, sorted(MODEL), "tester/x", None, None)
        del hub.requests[:]
        assert publish.upload(folder, sorted(MODEL), "tester/x", None, None) == first
        assert not [line for line in steps_seen() if line.startswith("PUT") or "commit" in line]
        (tmp_path / "poems" / "README.md").write_text("new")
        assert publish.upload(folder, sorted(MODEL), "tester/x", None, None) == first
    assert hub.pushed["tester/x"]["commits"] == [sorted(MODEL), ["README.md"]]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", [401, 403, 500, "hangs"])
def test_trouble_at_any_step_is_a_sentence_and_the_same_call_again_pushes(step, status, tmp_path, monkeypatch, capfd):
    """U7: the hub by its address, what it answered, where the model is; within seconds; then all is there."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch, **{step: status}) as hub:
        began = time.time()
        url, fault = publish.upload(folder, None, None, None, None)
        assert time.time() - began < 5
        assert url == "" and "\n" not in fault
        for words in (hub.endpoint, "did not answer for 1 seconds" if status == "hangs" else f"answered {status}",
                      f"whole in {folder}", "same command again"):  # fmt: skip
            assert words in fault, fault
        assert ("HF_TOKEN" in fault) == (status in (401, 403))
        assert hub.pushed.get("tester/poems", {}).get("commits", []) == []
        hub.trouble = {}
        assert publish.upload(folder, None, None, None, None)[1] == ""
        assert hub.pushed["tester/poems"]["files"] == MODEL
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("step", ["whoami", "create", "check"])
@pytest.mark.parametrize("status", [401, 403, 404, 500, 429, "hangs"])
def test_what_lasts_is_a_fault_before_the_training_and_what_may_pass_a_warning(step, status, tmp_path, monkeypatch):
    """401, 403, 404: a fault that says what to do. 500, 429, silence: a warning, within the limit."""
    with pushing(monkeypatch, **{step: status}) as hub:
        began = time.time()
        fault, warning = publish.ready("tester/x", None, None, str(tmp_path / "out"))
        assert time.time() - began < 2
    said = fault or warning
    assert bool(fault) == (status in (401, 403, 404)) and bool(fault) != bool(warning), said
    assert hub.endpoint in said and "\n" not in said
    assert ("did not answer for 1 seconds" if status == "hangs" else f"answered {status}") in said
    assert ("HF_TOKEN" in said) == (status in (401, 403)) and ("the training goes on" in said) == bool(warning)


def test_a_fault_of_a_moment_is_tried_again(tmp_path, monkeypatch):
    """A 500 that has passed by the second try costs seconds, no upload."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch, commit=500) as hub:
        monkeypatch.setattr(publish.time, "sleep", lambda seconds: seconds and hub.trouble.clear())
        assert publish.upload(folder, None, None, None, None)[1] == ""
    assert hub.pushed["tester/poems"]["files"] == MODEL


@pytest.mark.slow
def test_a_slow_upload_that_moves_is_not_cut_off(tmp_path, monkeypatch):
    """It takes three times as long as the limit, a megabyte at a time."""
    folder = finished(tmp_path / "poems")
    (tmp_path / "poems" / "model.safetensors").write_bytes(os.urandom(1 << 20) * 30)
    with pushing(monkeypatch) as hub:
        hub.pace = 0.2
        monkeypatch.setattr(publish, "PATIENCE", 2)  # seconds: several megabytes are on the way
        began = time.time()
        assert publish.upload(folder, None, None, None, None)[1] == ""
        assert time.time() - began > 2.5 * publish.PATIENCE


@pytest.mark.slow
def test_an_upload_that_stands_still_is_cut_off(tmp_path, monkeypatch):
    """The hub takes a megabyte and no more, while the connection stays open."""
    folder = finished(tmp_path / "poems")
    (tmp_path / "poems" / "model.safetensors").write_bytes(os.urandom(1 << 20) * 30)
    with pushing(monkeypatch) as hub:
        hub.pace = 5
        began = time.time()
        assert "did not answer for 1 seconds" in publish.upload(folder, ["model.safetensors"], None, None, None)[1]
        assert steps_seen()[-1].endswith("/objects/batch")  # the file behind it was never read to its end
        assert time.time() - began < 5


def test_a_storage_of_its_own_is_named(tmp_path, monkeypatch):
    """Large files go to another host, which a firewall may not let through."""
    folder = finished(tmp_path / "poems")
    monkeypatch.setenv("NO_PROXY", "*")
    with pushing(monkeypatch) as hub:
        hub.storage = f"http://127.0.0.2:{free_port()}"
        fault = publish.upload(folder, None, None, None, None)[1]
    assert f"{hub.endpoint}: its storage at 127.0.0.2 cannot be reached (Connection refused)" in fault


def test_a_hub_that_is_not_there_is_a_warning_and_then_a_fault(tmp_path, monkeypatch):
    """Connection refused, a host without an address, and the switch for working offline."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch):
        for address in (f"http://127.0.0.1:{free_port()}", "http://hub.invalid"):
            monkeypatch.setattr(constants, "ENDPOINT", address)
            monkeypatch.setattr(publish, "BEFORE", 15)
            fault, warning = publish.ready(None, None, None, folder)
            assert fault == "" and f"{address} cannot be reached (" in warning
            fault = publish.upload(folder, None, None, None, None)[1]
            assert f"{address} cannot be reached (" in fault and f"whole in {folder}" in fault
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set: unset it" in publish.ready(None, None, None, folder)[0]
        assert "HF_HUB_OFFLINE is set: unset it" in publish.upload(folder, None, None, None, None)[1]


def test_a_token_is_looked_for_and_never_shown(tmp_path, monkeypatch):
    """None, one that may only read, one with a line break, an unknown one: a sentence that says where to change it."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch, token="") as hub:
        for call in (publish.ready(None, None, None, folder)[0], publish.upload(folder, None, None, None, None)[1]):
            assert "hf auth login" in call
        assert hub.requests == []
        assert "--hub_token" in publish.ready(None, "hf_\nx", None, folder)[0]
        hub.roles["hf_good"] = "read"
        assert "may only read: give --hub_token" in publish.ready(None, "hf_good", None, folder)[0]
        assert hub.pushed == {}
        fault, _ = publish.ready(None, "hf_revoked", None, folder)
        assert "answered 401" in fault and "give --hub_token" in fault and "hf_revoked" not in fault
        hub.roles["hf_good"] = "fineGrained"
        assert publish.ready(None, "hf_good", None, folder) == ("", "")


def test_private_stays_private(tmp_path, monkeypatch):
    """A new repository is made private; one that is public is refused, before and after."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch) as hub:
        assert publish.upload(folder, None, "org/mine", None, True)[1] == ""
        assert hub.pushed["org/mine"]["private"] is True
        hub.pushed["org/mine"] = {"files": {}, "private": False, "commits": []}
        assert "org/mine is public" in publish.ready("org/mine", None, True, folder)[0]
        assert "org/mine is public" in publish.upload(folder, None, "org/mine", None, True)[1]
        assert hub.pushed["org/mine"]["files"] == {}


@pytest.mark.parametrize("name, words", cases({
    "of the flag": ("a b", "--hub_model_id a b cannot be"), "three parts": ("a/b/c", "--hub_model_id"),
    "a path": ("/tmp/x", "--hub_model_id"), "of the directory": (None, "name of --output_dir, für mich"),
}))  # fmt: skip
def test_a_name_that_no_hub_takes_is_a_fault_without_asking(name, words, tmp_path, monkeypatch):
    """It is the flag's, or that of the directory."""
    folder = finished(tmp_path / "für mich")
    with pushing(monkeypatch) as hub:
        for said in (publish.ready(name, None, None, folder)[0], publish.upload(folder, None, name, None, None)[1]):
            assert words[0] in said and "use letters, digits" in said and "\n" not in said
        assert hub.requests == []


def test_half_a_model_is_not_pushed(tmp_path, monkeypatch):
    """A file that is gone is named; the hub hears nothing."""
    folder = finished(tmp_path / "poems")
    with pushing(monkeypatch) as hub:
        fault = publish.upload(folder, ["config.json", "gone.json"], None, None, None)[1]
        assert "lacks gone.json" in fault and hub.requests == []


def test_an_upload_leaves_the_hubs_library_as_it_was(tmp_path, monkeypatch):
    """Downloads behind it have their own limits, bars and storage."""
    folder = finished(tmp_path / "poems")

    def state():
        return (logging.getLogger("huggingface_hub").level, constants.HF_HUB_DISABLE_XET, are_progress_bars_disabled(),
                get_session().send.__name__, get_session().timeout.read)  # fmt: skip

    before = state()
    for trouble in ({}, {"put": 403}):
        with pushing(monkeypatch, **trouble):
            publish.upload(folder, None, None, None, None)
        assert state() == before


# ── The upload, by the command line ──────────────────────────────────────────────────────────────────────────────────


class Once(dict):
    """Trouble that is over when it has been met."""

    def get(self, step):
        return self.pop(step, None)


def command(tiny, train, out, *more):
    """Flags of a run of a second that pushes."""
    return ["--model_name_or_path", tiny, "--train_file", train, "--output_dir", out, *SHORT, "--push_to_hub", *more]


def on_the_hub(name, out):
    """Assert that a repository has the finished model, bit for bit, and nothing else of the directory."""
    files = HUB.pushed[name]["files"]
    assert {*files} == {*publish.finished(str(out))}
    assert {"README.md", "NOTICE", "config.json", "model.safetensors", "tokenizer.json", "all_results.json"} <= {*files}
    assert files == {name: (out / name).read_bytes() for name in files}
    assert b"hf_good" not in b"".join(files.values()) and str(out.parent).encode() not in b"".join(files.values())


def test_a_run_pushes_its_model_once_at_the_end(tiny, train, tmp_path, monkeypatch):
    """U7, U6: the finished model, tokenizer, card and metrics; one commit; no token in any file of the run."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pushing(monkeypatch, token=""):
        more = ["--hub_token", "hf_good", "--hub_private_repo", "True", "--save_steps", 1]
        done = finish(*command(tiny, train, tmp_path / "poems", *more))
        assert f"{HUB.endpoint}/tester/poems" in done.out and "hf_good" not in done.out + done.err
        on_the_hub("tester/poems", tmp_path / "poems")
        assert HUB.pushed["tester/poems"]["private"] and len(HUB.pushed["tester/poems"]["commits"]) == 1
    assert (tmp_path / "poems" / "checkpoint-1").is_dir()
    assert not [path for path, content in snapshot(tmp_path / "poems").items() if b"hf_good" in content]


def test_a_run_pushes_to_the_repository_of_an_organization(tiny, train, tmp_path, monkeypatch):
    """--hub_model_id: its name, not that of the directory."""
    with pushing(monkeypatch):
        finish(*command(tiny, train, tmp_path / "für mich", "--hub_model_id", "org/poems"))
        on_the_hub("org/poems", tmp_path / "für mich")


@pytest.mark.parametrize("step, status", [("whoami", 401), ("create", 403), ("check", 403)])
def test_a_hub_that_refuses_ends_the_run_before_the_training(step, status, tiny, train, tmp_path, monkeypatch):
    """U7: exit status 2, the hub by its address; nothing is saved."""
    with pushing(monkeypatch, **{step: status}):
        done = run(*command(tiny, train, tmp_path / "out"))
    refused(done, HUB.endpoint, f"answered {status}", "HF_TOKEN")
    assert "model    " not in done.out and snapshot(tmp_path / "out") == {}


def test_a_hub_that_fails_before_the_training_is_asked_again_behind_it(tiny, train, tmp_path, monkeypatch):
    """U7: a 500 at the start is a warning; the model is pushed at the end."""
    with pushing(monkeypatch):
        HUB.trouble = Once(whoami=500)
        done = finish(*command(tiny, train, tmp_path / "out"))
        assert f"{HUB.endpoint} answered 500" in done.out + done.err and "the training goes on" in done.out + done.err
        on_the_hub("tester/out", tmp_path / "out")


@pytest.mark.slow
def test_a_hub_that_hangs_before_the_training_costs_seconds(tiny, train, tmp_path, monkeypatch):
    """U7: 20 of them, then the training goes on."""
    with pushing(monkeypatch):
        HUB.trouble = Once(whoami="hangs")
        began = time.time()
        done = finish(*command(tiny, train, tmp_path / "out"))
        assert "did not answer for 20 seconds" in done.out + done.err and time.time() - began < 60
        on_the_hub("tester/out", tmp_path / "out")


@pytest.mark.parametrize("status", [403, pytest.param(500, marks=pytest.mark.slow)])
def test_a_hub_that_fails_at_the_end_leaves_the_model_whole(status, tiny, train, tmp_path, monkeypatch):
    """U7: exit status 1, the hub by its address; the same command again pushes, and trains nothing."""
    words = command(tiny, train, tmp_path / "out")
    with pushing(monkeypatch, commit=status):
        sentence = refused(run(*words), HUB.endpoint, f"answered {status}", f"whole in {tmp_path / 'out'}", status=1)
        assert "same command again pushes" in sentence and HUB.pushed["tester/out"]["commits"] == []
        before = times(tmp_path / "out")
        HUB.trouble = {}
        done = finish(*words)
        assert "nothing is left to train" in done.out and times(tmp_path / "out") == before
        on_the_hub("tester/out", tmp_path / "out")
        finish(*words)
        assert len(HUB.pushed["tester/out"]["commits"]) == 1


@pytest.mark.slow
def test_two_processes_push_once_and_end_together(tiny, train, tmp_path, monkeypatch):
    """U7: one of them asks and pushes; a refusal at the start ends both."""
    with pushing(monkeypatch):
        done = launch(*two_processes(), *command(tiny, train, tmp_path / "out"))
        assert done.status == 0, done.out + done.err
        on_the_hub("tester/out", tmp_path / "out")
        assert len(HUB.pushed["tester/out"]["commits"]) == 1
        HUB.trouble = {"create": 403}
        done = launch(*two_processes(), *command(tiny, train, tmp_path / "other"))
        assert done.status and done.err.count("main.py: error: ") == 1 and "answered 403" in done.err


def test_a_card_of_the_user_stays(tiny, train, tmp_path):
    """U6: a README.md without our line is the user's, even one that speaks of fine-tuning: kept, with a note."""
    words = ["--model_name_or_path", tiny, "--train_file", train, *SHORT, "--output_dir"]
    pages = (("mine", "# My fine-tuned poet\n", True), ("ours", publish.MARKS["README.md"] + "\n", False))
    for name, text, kept in pages:
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
        done = finish(*words, tmp_path / name)
        page = (tmp_path / name / "README.md").read_text()
        note = f"note     {tmp_path / name}/README.md is not of main.py and stays: the model has no README.md"
        assert (note in done.out, page == text) == (kept, kept), done.out
        assert (publish.MARKS["README.md"] in page) != kept
        assert publish.MARKS["NOTICE"] in (tmp_path / name / "NOTICE").read_text()
    assert "nothing is left to train" in finish(*words, tmp_path / "mine").out
