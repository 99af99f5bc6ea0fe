"""Tokenizers of strangers: nothing of theirs runs, nobody is asked, no other file is opened; damage is one line."""

import copy
import errno
import io
import json
import os
import pickle
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from converters import convert
from converters.tokenizer import load_tokenizer, save_tokenizer
from jetspec_jax import JetSpecError
from jetspec_jax.pair import Pair
from jetspec_jax.pretrained import _load_tokenizer
from jetspec_jax.text import TextStream
from tests.test_chat import tokenizer

OWN = {"AutoTokenizer": [None, "tokenization_own.Own"]}


@pytest.fixture
def folder(tmp_path):
    """A converted folder with a tokenizer, beside which stands a module that tells when it has run."""
    inner = tmp_path / "tokenizer"
    tokenizer("<s> $A").save_pretrained(inner)
    (inner / "tokenization_own.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n")
    (tmp_path / "jetspec.json").write_text("{}")
    return tmp_path


def change(folder, name="tokenizer_config.json", **settings):
    file = folder / "tokenizer" / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | settings))


@pytest.mark.parametrize(("settings", "config"), [
    ({"tokenizer_class": "Own", "auto_map": OWN}, {}),
    ({"tokenizer_class": "Own", "auto_map": OWN["AutoTokenizer"]}, {}),
    ({"tokenizer_class": None, "auto_map": OWN}, {}),
    ({"tokenizer_class": "OwnFast", "auto_map": OWN}, {"model_type": "qwen3"}),
    ({"tokenizer_class": "Own", "auto_map": OWN}, {"auto_map": {"AutoConfig": "tokenization_own.Own"}})])
def test_code_never_runs_and_nobody_is_asked(folder, monkeypatch, settings, config):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    change(folder, **settings)
    (folder / "tokenizer" / "config.json").write_text(json.dumps(config))
    for load in (lambda: _load_tokenizer(folder), lambda: load_tokenizer(folder / "tokenizer"),
                 lambda: save_tokenizer(folder / "tokenizer", folder / "copy")):
        with pytest.raises(JetSpecError, match=r"tokenizer_config.json: the tokenizer is code of its own \(Own\)"):
            load()
    assert sys.stdin.read() == "y\n" * 9
    assert not (folder / "RAN").exists()
    assert not (folder / "copy").exists()


@pytest.mark.parametrize("config", [{"auto_map": {"AutoConfig": "tokenization_own.Own"}},
                                    {"model_type": "own", "auto_map": {"AutoConfig": "tokenization_own.Own"}}])
def test_a_known_class_is_loaded_without_the_code_beside_it(folder, monkeypatch, config):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    change(folder, tokenizer_class="PreTrainedTokenizerFast", auto_map=OWN)
    (folder / "tokenizer" / "config.json").write_text(json.dumps(config))
    loaded = _load_tokenizer(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.name_or_path == str(folder / "tokenizer")
    assert loaded.decode(loaded("Hi")["input_ids"]) == "<s>Hi"
    assert not (folder / "RAN").exists()


def test_loading_makes_no_connection(folder, monkeypatch):
    def connect(*_):
        raise AssertionError("the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert _load_tokenizer(folder).bos_token == "<s>"
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(JetSpecError, match="cannot be loaded"):
        _load_tokenizer(folder)


def test_settings_that_name_other_files_stay_behind(folder):
    """transformers would open them; the third kind it takes from special_tokens_map.json."""
    secret = folder / "secret.json"
    secret.write_text('{"a": 0}')
    named = {"tokenizer_file": str(secret), "vocab_file": "/dev/zero", "merges_file": str(secret), "vocab": str(secret),
             "merges": [], "fast_tokenizer_files": ["../secret.json"], "init_inputs": [str(secret)],
             "name_or_path": "x", "sp_model_kwargs": {"model_file": str(secret), "alpha": 0.5},
             "special": [[{"vocab_file": str(secret), "x": 1}]]}
    change(folder, **named)
    change(folder, "special_tokens_map.json", tokenizer_file=str(secret), eos_token="</s>")
    assert len(_load_tokenizer(folder)) == 260
    save_tokenizer(folder / "tokenizer", folder / "copy")
    kept = json.loads((folder / "copy" / "tokenizer_config.json").read_text())
    assert kept.keys() & named.keys() == {"sp_model_kwargs", "special"}
    assert kept["sp_model_kwargs"] == {"alpha": 0.5}
    assert kept["special"] == [[{"x": 1}]]
    assert json.loads((folder / "copy" / "special_tokens_map.json").read_text()) == {"eos_token": "</s>"}
    assert {file.name for file in (folder / "copy").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CTRLTokenizer"])  # one of the Rust library, and one in Python
def test_nothing_of_a_loaded_tokenizer_leads_to_the_copy(tmp_path, name):
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "<unk>": 4}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    loaded = load_tokenizer(source)
    ids = loaded("ab")["input_ids"]
    for settings in (loaded.init_kwargs, vars(loaded)):
        paths = {value for value in settings.values() if isinstance(value, str) and os.sep in value}
        assert paths <= {str(source), str(source / "vocab.json"), str(source / "merges.txt")}
        assert settings["name_or_path"] == str(source)
    loaded.save_pretrained(copied)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), load_tokenizer(copied)):
        assert other("ab")["input_ids"] == ids


@pytest.mark.parametrize("full", ["folder", "file"])
def test_no_room_for_the_copy(folder, monkeypatch, full):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if full == "folder":
        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    else:
        monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(JetSpecError) as refused:
        _load_tokenizer(folder)
    assert str(refused.value) == (f"cannot copy the tokenizer of {folder / 'tokenizer'} into TMPDIR: No space left on "
                                  "device")


def test_the_model_names_the_class_where_the_tokenizer_does_not(folder):
    change(folder, tokenizer_class=None)
    (folder / "tokenizer" / "config.json").write_text(json.dumps(
        {"model_type": "qwen3", "tokenizer_class": "PreTrainedTokenizerFast", "hidden_size": 3}))
    save_tokenizer(folder / "tokenizer", folder / "copy")
    assert json.loads((folder / "copy" / "config.json").read_text()) == {
        "model_type": "qwen3", "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                  "additional_chat_templates/rag.jinja"])
def test_only_ordinary_files_of_a_fitting_size_are_read(folder, name):
    file = folder / "tokenizer" / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    with file.open("wb") as opened:
        opened.truncate(2**28 + 1)
    with pytest.raises(JetSpecError, match=f"{name} has 268 MB"):
        _load_tokenizer(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(JetSpecError, match=f"{name} is no ordinary file"):
        _load_tokenizer(folder)


def test_a_folder_of_templates_that_may_not_be_listed(folder, monkeypatch):
    (folder / "tokenizer" / "additional_chat_templates").mkdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(JetSpecError, match=r"cannot read .*additional_chat_templates: Permission denied"):
        _load_tokenizer(folder)


@pytest.mark.parametrize("settings", [{"tokenizer_class": "AutoConfig"}, {"tokenizer_class": "pipeline"},
                                      {"tokenizer_class": "PreTrainedConfig"}, {"added_tokens_decoder": {"x": 1}}])
def test_damage_is_one_line_that_names_the_users_folder(folder, settings):
    change(folder, **settings)
    (folder / "tokenizer" / "config.json").write_text('{"model_type": "own"}')
    with pytest.raises(JetSpecError, match=rf"^the tokenizer in {folder}/tokenizer cannot be loaded: ") as refused:
        _load_tokenizer(folder)
    assert "\n" not in str(refused.value)
    assert str(refused.value).count("/tmp") == str(folder).count("/tmp") * str(refused.value).count(str(folder))


@pytest.mark.parametrize(("part", "value", "reason"), [
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "cannot be loaded: Precompiled"),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                        "pair": [], "special_tokens": {}}, "."),
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "cannot encode this text: chunk size"),
    ("model", {"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0}}, r"cannot encode this text: WordLevel error")])
def test_a_library_that_panics_is_one_line_too(folder, part, value, reason, capfd):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    with pytest.raises(JetSpecError, match=reason):
        Pair(None, None, None, _load_tokenizer(folder)).encode("Hi")
    capfd.readouterr()  # the library's own words


@pytest.mark.parametrize("wrong", [RuntimeError, type("PanicException", (BaseException,), {})])
def test_an_answer_that_cannot_be_decoded(wrong):
    class Damaged:
        def decode(self, ids, **_):
            raise wrong("index out of bounds\nand more")

    with pytest.raises(JetSpecError, match=r"cannot decode its tokens: index out of bounds$"):
        TextStream(Damaged()).add([1, 2], True)


@pytest.mark.parametrize("wrong", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_is_no_damage(wrong):
    class Interrupted:
        def decode(self, ids, **_):
            raise wrong

    with pytest.raises(wrong):
        TextStream(Interrupted()).add([1, 2], True)


@pytest.mark.parametrize(("source", "reason"), [
    ("x" * 5000, "x{200} does not exist"), ("~no_such_user_here/x", "~no_such_user_here/x: .* write the path out")])
def test_names_of_sources(source, reason):
    with pytest.raises(JetSpecError, match=reason) as refused:
        convert.resolve_source(source)
    assert len(str(refused.value)) < 400


def test_a_source_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert convert.resolve_source(f"~/{folder.name}") == folder
