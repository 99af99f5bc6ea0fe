"""What users write on a command line: every mistake in it is one line, and status 2."""

import argparse
import os
import sys
import threading
from pathlib import Path

import pytest

from converters import cli
from experiments import (
    benchmark,
    decode,
    generate_data,
    h100_plan,
    paper,
    replay,
    round_cost,
    train_head,
    write_prompts,
)
from experiments.common import check_output, require_head, run_main
from jetspec_jax import JetSpecError, suites
from jetspec_jax.arguments import integer, number, one_line, seed, user_path, utf8
from jetspec_jax.files import write_text
from jetspec_jax.suites import read_prompts_jsonl, suite_messages
from jetspec_jax.training.prompts import Exclusion, check_source, collect_prompts
from tests.models import DATA, random_pair, tiny_target

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


RECORD = ["--out", "OUT", "--source", "word_problems=3"]
WRITE = ["--out", "OUT/p.jsonl", "--count", "3"]


@pytest.mark.parametrize(("main", "arguments", "reason"), [
    (decode.main, ["--seed", "-1"], "argument --seed: -1 is not from 0 to 4294967295"),
    (generate_data.main, [*RECORD, "--seed", "-1"], "argument --seed: -1 is not from 0 to 4294967295"),
    (generate_data.main, [*RECORD, "--seed", "8589934592"], "--seed: 8589934592 is not from 0 to 4294967295"),
    (benchmark.main, ["--suite", "gsm8k", "--out", "OUT", "--seed", "4294967296"], "--seed: 4294967296 is not"),
    (paper.main, ["gamma", "--dataset", "d", "--out", "OUT", "--seed", "-1"], "argument --seed: -1 is not"),
    (train_head.main, ["--dataset", "d", "--out", "OUT", "--steps", "9", "--seed", "-1"], "seed must be an integer"),
    # A wave's seed is 20 times the user's and up to 19 more: 20 * 214748363 + 19 = 2**32 - 17.
    (write_prompts.main, [*WRITE, "--seed", "214748364"], "argument --seed: 214748364 is not from 0 to 214748363"),
    (write_prompts.main, [*WRITE, "--seed", "-1"], "argument --seed: -1 is not from 0 to 214748363"),
    (benchmark.main, ["--suite", "gsm8k", "--out", "OUT", "--budgets", "16," + LONG], f"{LONG[:40]!r} is no whole"),
    (replay.main, ["--out", "OUT/o", "--budgets", "0"], "--budgets takes numbers like 16,64,256: 0 is not from 1 to"),
    (replay.main, ["--budgets", "16,1025"], "1025 is not from 1 to 1024"),
    (replay.main, ["--head", "nope"], "nope does not exist"), (replay.main, ["--model", "nope"], "nope does not exist"),
    (benchmark.main, ["--suite", "gsm8k", "--bidirectional-head", "nope"], "nope does not exist"),
    (train_head.main, ["--dataset", "d", "--out", "OUT", "--steps", "9", "--init", "nope"], "nope does not exist"),
    (train_head.main, ["--dataset", "d", "--out", "OUT", "--steps", "9", "--held-out", "-1"], "--held-out must be at"),
    (generate_data.main, [*RECORD, "--source", "coding=" + LONG], f"{LONG[:40]!r} is no whole number"),
    (generate_data.main, [*RECORD, "--source", "coding=999999999999"], "999999999999 is not from 1 to 10000000"),
    (generate_data.main, [*RECORD, "--source", "coding=0"], "0 is not from 1 to 10000000"),
    (generate_data.main, [*RECORD, "--source", "nope.jsonl=3"], "unknown source of prompts 'nope.jsonl'"),
    (generate_data.main, [*RECORD, "--source", "/=3"], "unknown source of prompts '/'"),
    (generate_data.main, [*RECORD, "--source", "=3"], "unknown source of prompts ''"),
    (generate_data.main, [*RECORD, "--source", "~no_such_user_here/x=3"], "write the path out"),
    (round_cost.main, ["--context", "-1"], "argument --context: -1 is not from 1 to 2147483647"),
    (round_cost.main, ["--context", "100000000000"], "argument --context: 100000000000 is not from 1"),
    (round_cost.main, ["--repeats", "0"], "--repeats must be at least 1, not 0"),
    (round_cost.main, ["--budget", "0"], "tree budget must be an integer from 1 to 1024, not 0"),
    (round_cost.main, ["--temperature", "-1"], "temperature must be"),
    (decode.main, ["--prompt-file", ""], "argument --prompt-file: an empty path names no file"),
    (generate_data.main, ["--out", "", "--source", "coding=3"], "argument --out: an empty path"),
    (h100_plan.main, ["--predict", ""], "argument --predict: an empty path")])
def test_a_value_out_of_range_costs_nothing(monkeypatch, capsys, tmp_path, main, arguments, reason):
    """It is told before a model or a suite is asked for, and before anything is written."""
    def refuse(*_, **__):
        raise AssertionError("loaded")

    for module in (benchmark, decode, generate_data, replay, round_cost, write_prompts):
        for name in ("load", "suite_messages", "suite_exclusion"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    monkeypatch.setattr(train_head, "load_pretrained", refuse)
    status, told = outcome(monkeypatch, capsys, main, *(a.replace("OUT", str(tmp_path)) for a in arguments))
    assert (status, told.count("\n")) == (2, 1)
    assert reason in told
    assert len(told) < 400
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == []


def test_a_context_beyond_the_targets(monkeypatch, capsys):
    monkeypatch.setattr(round_cost, "load", lambda *_, **__: random_pair(0, tiny_target(max_positions=50)))
    status, told = outcome(monkeypatch, capsys, round_cost.main, "--context", "50")
    assert (status, told) == (2, "error: --context 50 is not below the target's context limit of 50\n")


def test_sources_from_the_home_folder_and_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(suites, "MAX_PROMPTS", 1000)
    (tmp_path / "f.jsonl").write_text('{"prompt": "Hi"}\n')
    assert check_source("~/f.jsonl") == tmp_path / "f.jsonl"
    taken = ({"~/f.jsonl": 1}, tmp_path, 0, Exclusion([]), lambda text: True)
    assert collect_prompts(*taken) == ["Hi"]
    with pytest.raises(JetSpecError, match="/dev/zero holds more than"):
        collect_prompts({"/dev/zero": 3}, *taken[1:])


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
@pytest.mark.parametrize("digits", ["9" * 400, LONG, "inf", "nan", "x"])
def test_numbers_that_are_none(monkeypatch, capsys, option, digits):
    status, told = outcome(monkeypatch, capsys, decode.main, option, digits)
    assert (status, told.count("\n")) == (2, 1)
    assert f"argument {option}: {digits[:40]!r} is no finite number" in told


def test_values_that_are_read(monkeypatch):
    monkeypatch.setenv("HOME", "/home-of-me")
    assert (integer("-7"), integer("9" * 18), number("1e-3"), utf8("é")) == (-7, 10**18 - 1, 0.001, "é")
    assert (seed("0"), seed("4294967295")) == (0, 2**32 - 1)
    assert write_prompts.build_parser().parse_args([*WRITE, "--seed", "214748363"]).seed == 214748363
    assert benchmark.parse_budgets("64, 16,64,1024") == [16, 64, 1024]
    assert (user_path("~/a"), user_path("b/~")) == (Path("/home-of-me/a"), Path("b/~"))
    assert decode.build_parser().parse_args(["--prompt-file", "~/a"]).prompt_file == Path("/home-of-me/a")
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
    (["target", "SOURCE", "FILE"], "exists"), (["target", "SOURCE", ""], "argument OUT: an empty path"),
    (["target", "CONVERTED", "o"], "is converted already (it has a jetspec.json)"),
    (["head", "CONVERTED", "o"], "is converted already (it has a jetspec.json)"),
    (["export-head", "HEAD", "o"], "is in the released format already (it has a config.json)")])
def test_convert_ends_in_one_line(tmp_path, tmp_path_factory, capsys, arguments, reason):
    (tmp_path / "file").write_text("x")
    converted = tmp_path_factory.mktemp("converted")
    (converted / "jetspec.json").write_text("{}")
    known = {"SOURCE": str(DATA / "dense" / "target"), "FILE": str(tmp_path / "file"), "CONVERTED": str(converted),
             "HEAD": str(DATA / "dense" / "head")}
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
