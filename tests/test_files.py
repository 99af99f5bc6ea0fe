"""Files of strangers: ordinary ones are read, all others are named and left alone."""

import json
import os

import pytest

from jetspec_jax import JetSpecError
from jetspec_jax.files import check_ordinary, local_path, parse_json, read_json, read_text


def test_what_is_there_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").write_text("x")
    assert local_path(tmp_path / "a") == local_path("~/a") == tmp_path / "a"


@pytest.mark.parametrize("name", ["absent", "a/b", "x" * 5000, "nul\0byte"])
def test_names_that_cannot_be_are_absent(tmp_path, name):
    (tmp_path / "a").write_text("x")
    assert local_path(f"{tmp_path}/{name}") is None
    assert local_path("") is None


def test_the_home_of_nobody():
    with pytest.raises(JetSpecError, match="~no_such_user_here/x"):
        local_path("~no_such_user_here/x")


def test_a_folder_that_may_not_be_searched(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "stat", refuse)
    with pytest.raises(JetSpecError, match=r"cannot read .*: Permission denied"):
        local_path(tmp_path / "secret")


def test_what_never_ends_is_not_opened(tmp_path, in_time):
    os.mkfifo(tmp_path / "config.json")
    for file in (tmp_path / "config.json", tmp_path, type(tmp_path)("/dev/zero")):
        with pytest.raises(JetSpecError, match=f"{file} is no ordinary file"):
            read_json(file)


def test_sizes_have_a_limit(tmp_path):
    with (tmp_path / "f").open("wb") as file:
        file.truncate(2_000_001)
    assert check_ordinary(tmp_path / "f", 2_000_001) == 2_000_001
    with pytest.raises(JetSpecError, match="has 2 MB, and no such file needs more"):
        check_ordinary(tmp_path / "f", 2_000_000)


@pytest.mark.parametrize(("text", "message"), [
    ("", "not valid JSON"), ("[1]", "should hold a JSON object, not list"), ("[" * 100_000, "nested too deeply"),
    ("[" * 65 + "]" * 65, "nested too deeply"),
    ('{"a": 1, "a": 1}', "'a' occurs twice"), ("{\"a\": " + "9" * 5000 + "}", "not valid JSON"), ("\ufeff", "JSON")])
def test_json_that_is_none(tmp_path, text, message):
    (tmp_path / "f.json").write_text(text, encoding="utf-8")
    with pytest.raises(JetSpecError, match=message):
        read_json(tmp_path / "f.json")


def test_json_is_read(tmp_path):
    value = {"a": [1, {"b": None}], "é": "\ud83d\ude00"}
    (tmp_path / "f.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "f.json") == {**value, "é": "😀"}
    assert parse_json(b"[1]") == [1]
    assert str(parse_json("[" * 64 + "]" * 64)) == "[" * 64 + "]" * 64


def test_text_with_and_without_a_mark(tmp_path):
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfHi\n")
    (tmp_path / "g").write_bytes("Hi\n\ufeff".encode())
    assert read_text(tmp_path / "f") == "Hi\n"
    assert read_text(tmp_path / "g") == "Hi\n\ufeff"
    (tmp_path / "h").write_bytes(b"caf\xe9")
    with pytest.raises(JetSpecError, match=r"not UTF-8 text .* at byte 3"):
        read_text(tmp_path / "h")
