"""What users write on a command line: every mistake in it is one line, and status 2."""

import argparse
import os
import sys
import threading
from pathlib import Path

import pytest

from converters import cli
from experiments import benchmark, decode, generate_data, h100_plan, paper, round_cost, train_head, write_prompts
from experiments.common import check_output, require_head, run_main, write_text
from jetspec_jax import JetSpecError, suites
from jetspec_jax.arguments import integer, number, one_line, user_path, utf8
from jetspec_jax.suites import read_prompts_jsonl, suite_messages

LONG = "9" * 5000


def outcome(monkeypatch, capsys, main, *arguments):
    """(status, standard error) of a script."""
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("digits", ["9" * 400, LONG, "1e5", "x", "", "1.5"])
@pytest.mark.parametrize(("main", "options"), [
    (decode.main, ["--budget"]), (decode.main, ["--seed"]), (decode.main, ["--max-new-tokens"]),
    (benchmark.main, ["--suite", "gsm8k", "--limit"]),
    (generate_data.main, ["--out", "o", "--source", "s=1", "--seed"]),
    (h100_plan.main, ["--context"]), (paper.main, ["gamma", "--out", "o", "--steps"]), (round_cost.main, ["--repeats"]),
    (train_head.main, ["--dataset", "d", "--out", "o", "--steps", "9", "--layers"]),
    (write_prompts.main, ["--out", "o", "--count"])])
def test_whole_numbers_that_are_none(monkeypatch, capsys, main, options, digits):
    status, told = outcome(monkeypatch, capsys, main, *options, digits)
    assert status == 2
    assert told == (f"error: argument {options[-1]}: {digits[:40]!r} is no whole number of at most 18 digits (--help "
                    "lists all options)\n")


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
@pytest.mark.parametrize("digits", ["9" * 400, LONG, "inf", "nan", "x"])
def test_numbers_that_are_none(monkeypatch, capsys, option, digits):
    status, told = outcome(monkeypatch, capsys, decode.main, option, digits)
    assert (status, told.count("\n")) == (2, 1)
    assert f"argument {option}: {digits[:40]!r} is no finite number" in told


def test_values_that_are_read(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert (integer("-7"), integer("9" * 18), number("1e-3"), utf8("é")) == (-7, 10**18 - 1, 0.001, "é")
    assert (user_path("~/a"), user_path("b/~")) == (Path("/home/me/a"), Path("b/~"))
    assert decode.build_parser().parse_args(["--prompt-file", "~/a"]).prompt_file == Path("/home/me/a")
    with pytest.raises(argparse.ArgumentTypeError, match=r"~no_such_user_here/x: .*write the path out"):
        user_path("~no_such_user_here/x")
    assert one_line("a\nb\r\n\tc") == "a b c"


@pytest.mark.parametrize("options", [["--prompt", "Hi\udcff"], ["--system", "\udcff"], ["--chat-option", "a=\udcff"]])
def test_a_terminal_in_another_encoding(monkeypatch, capsys, options):
    status, told = outcome(monkeypatch, capsys, decode.main, *options)
    assert (status, told.count("\n")) == (2, 1)
    at = options[1].index("\udcff")
    assert f"argument {options[0]}: the terminal sent text that is not UTF-8, at character {at}" in told


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--bogus\nline"], "unrecognized arguments: --bogus line"), (["--draft", "magic"], "invalid choice: 'magic'"),
    (["--budget"], "expected one argument"), (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
    (["--model", "~no_such_user_here/x"], "write the path out"),
    (["--prompt-file", "~no_such_user_here/x"], "write the path out"), (["--prompt-file", "x" * 5000], "name too long"),
    (["--prompt-file", "/"], "cannot read /: Is a directory"), (["--chat-option", "a=" + LONG, "--no-chat-template"],
                                                                "cannot go with --no-chat-template")])
def test_a_wrong_option_is_one_line(monkeypatch, capsys, arguments, reason):
    status, told = outcome(monkeypatch, capsys, decode.main, *arguments)
    assert (status, told.count("\n")) == (2, 1)
    assert reason in told


@pytest.mark.parametrize(("arguments", "reason"), [
    (["magic"], "invalid choice"), (["target", "a"], "required: OUT"), (["target", "x" * 5000, "o"], "does not exist"),
    (["target", "~no_such_user_here/x", "o"], "write the path out"), (["head", "a\nb", "o"], "a b does not exist"),
    (["target", "SOURCE", "x" * 5000], "File name too long"), (["target", "SOURCE", "FILE/under"], "file: File exists"),
    (["target", "SOURCE", "FILE"], "exists")])
def test_convert_ends_in_one_line(tmp_path, capsys, arguments, reason):
    (tmp_path / "file").write_text("x")
    known = {"SOURCE": str(Path(__file__).parent / "data" / "dense" / "target"), "FILE": str(tmp_path / "file")}
    for name, path in known.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert reason in told
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def pipe(tmp_path, content):
    """A named pipe that somebody writes into."""
    file = tmp_path / "pipe"
    os.mkfifo(file)
    threading.Thread(target=lambda: file.write_bytes(content), daemon=True).start()
    return file


def prompts_of(file):
    return decode.read_prompts(decode.build_parser().parse_args(["--prompt-file", str(file)]))


def test_prompts_from_a_pipe_and_with_a_mark(tmp_path):
    assert prompts_of(pipe(tmp_path, b"\xef\xbb\xbfHi\n\nWhy?\n")) == ["Hi", "Why?"]
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "Hi"}\n')
    assert prompts_of(file) == read_prompts_jsonl(file) == suite_messages(str(file), tmp_path) == ["Hi"]


@pytest.mark.parametrize("content", ['{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "[" * 100_000, LONG,
                                     f'{{"prompt": {LONG}}}', '{"prompt": "a", "prompt": "b"}'],
                         ids=["nested", "open", "digits", "number", "twice"])
def test_lines_that_are_no_prompts(tmp_path, content):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Hi"}\n' + content)
    for read in (prompts_of, read_prompts_jsonl):
        with pytest.raises(JetSpecError, match=r"p\.jsonl, line 2: expected"):
            read(file)


def test_prompts_without_end(monkeypatch):
    monkeypatch.setattr(suites, "MAX_PROMPTS", 1000)
    for read in (prompts_of, read_prompts_jsonl):
        with pytest.raises(JetSpecError, match="/dev/zero holds more than"):
            read(Path("/dev/zero"))


def test_prompts_that_are_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(JetSpecError, match=r"p\.txt is not UTF-8 text .* at byte 3"):
        prompts_of(tmp_path / "p.txt")


@pytest.mark.parametrize("prompt", ["9" * 400, LONG, "1 x", " "])
def test_token_ids_that_are_none(prompt):
    pair = argparse.Namespace(tokenizer=None)
    with pytest.raises(JetSpecError, match="no tokenizer") as refused:
        decode.as_prompt(pair, prompt, argparse.Namespace())
    assert len(str(refused.value)) < 250


def test_what_may_not_be_searched(monkeypatch, tmp_path):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    for ask in (lambda: require_head(argparse.Namespace(model="locked/x", head=None)),
                lambda: suite_messages("locked/x", tmp_path)):
        with pytest.raises(JetSpecError, match="cannot read locked/x: Permission denied"):
            ask()


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a" / ("x" * 255), "é")
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "a").iterdir()] == [("x" * 255, b"\xc3\xa9")]
    (tmp_path / "b" / "folder").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "b" / "folder", "x")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "b" / "file", "\udcff")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["file", "file/under", "x" * 5000])
def test_folders_for_results(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(JetSpecError, match="cannot be a folder for results") as refused:
        check_output(tmp_path / name)
    assert len(str(refused.value)) < 400
