"""Damaged files of strangers: thousands of them, and that the fuzzer finds what it looks for."""

import os
import sys
import time
from functools import partial

import numpy as np
import pytest

from jetspec_jax import JetSpecError, checkpoint
from jetspec_jax.target import target_shapes
from tests import fuzz
from tests.models import random_params, tiny_target

# Mutations of each kind, and at how many places of the code they are refused at least.
COUNTS = {"config": (350, 15), "safetensors": (550, 15), "gguf": (750, 15), "tokenizer": (250, 5),
          "checkpoint": (120, 10)}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_refused_or_sound(kind):
    count, places = COUNTS[kind]
    report = fuzz.run(kind, seed=0, count=count)
    assert not report.failures, "\n".join([f"python -m tests.fuzz {kind} --first NUMBER --count 1", *report.failures])
    assert sum(report.outcomes.values()) == count
    assert 0.05 * count < report.outcomes["accepted"] < 0.7 * count  # neither all stopped at the door, nor all harmless
    assert len(report.places) >= places


def refuse(message):
    raise JetSpecError(message)


def leave(out):
    out.with_name("out.partial").mkdir()
    refuse("refused")


def wait():
    while True:
        time.sleep(1)


def fill():
    kept = []
    while True:
        kept.append(np.ones(2**21))  # 17 MB that are touched


# What a product might do with a damaged file, given where it should write, and what is told of it; None is no fault.
FAULTS = {
    "accepts": (lambda out: None, None),
    "divides": (lambda out: 1 / 0, "ZeroDivisionError at test_fuzz.py"),
    "exits": (lambda out: sys.exit(0), "SystemExit at test_fuzz.py"),
    "goes on": (lambda out: refuse("one\ntwo"), r"that is no short line of text: 'one\ntwo'"),
    "is silent": (lambda out: refuse(""), "that is no short line of text: ''"),
    "leaves": (leave, "left behind or took away: ['out.partial']"),
    "refuses": (lambda out: refuse("one line"), None),
    "shows": (lambda out: print("Traceback (most recent call last):", file=sys.stderr, flush=True),
              "a traceback on the screen"),
    "talks": (lambda out: refuse("x" * 3000), "that is no short line of text: 'xxx"),
    "writes": (lambda out: (out.parent / "writes" / "new").touch(), "left behind or took away: ['new']")}
ENDS = {  # of the process
    "crashes": (lambda out: os._exit(7), "the process ended with status 7"),
    "fills": (lambda out: fill(), "takes more than 900 MB"),
    "hangs": (lambda out: wait(), "takes more than 2 seconds")}


def make(bases, faults):
    for name in faults:
        (bases / name).mkdir(parents=True)
        (bases / name / "file.txt").write_text("sound")


def make_faults(bases):
    make(bases, FAULTS)


def use(source, out, rng):
    file = source / "file.txt"
    if not file.is_file() or file.stat().st_size != 5 or file.read_bytes() != b"sound":
        (FAULTS | ENDS)[source.name][0](out)


def make_one(name, bases):
    make(bases, [name])


def use_unguarded(source, out, rng):
    """A product that does not compare checksums."""
    checkpoint._compare = lambda *given: None
    fuzz._use_checkpoint(source, out, rng)


PLANTED = {"faults": fuzz.Kind(make_faults, ("file.txt",), use),
           "unguarded": fuzz.Kind(fuzz.KINDS["checkpoint"].make, (f"{checkpoint.ARRAYS}/*/[0-9]*",), use_unguarded),
           **{name: fuzz.Kind(partial(make_one, name), ("file.txt",), use) for name in ENDS}}


def planted(kind, seed, count, first=0, seconds=60):
    return fuzz.run(kind, seed, count, first, seconds, megabytes=900, kinds=PLANTED)


def assert_found(report, faults):
    names = [line.split(": ")[1] for line in report.failures]
    assert set(names) == {name for name, (_, told) in faults.items() if told}
    for name, line in zip(names, report.failures, strict=True):
        assert faults[name][1] in line


def test_planted_faults_are_found_as_what_they_are():
    report = planted("faults", seed=0, count=120)
    assert_found(report, FAULTS)
    assert sum(report.outcomes.values()) == 120
    last = report.failures[-1]
    assert planted("faults", seed=0, count=1, first=int(last.split(":")[0])).failures == [last]


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_its_process_is_found_too(name):
    report = planted(name, seed=0, count=1, seconds=2 if name == "hangs" else 60)
    assert_found(report, {name: ENDS[name]})
    assert report.outcomes == {"failed": 1}


def test_changed_arrays_that_are_accepted_are_found():
    """Where the checksums were not put right."""
    report = planted("unguarded", seed=0, count=30)
    assert report.failures
    for line in report.failures:
        assert "was changed, and nobody saw it" in line and "checksums put right" not in line


def test_a_checkpoint_is_the_same_wherever_and_whenever_it_is_made(tmp_path):
    """Else its mutations could not be made again."""
    one, other = tmp_path / "one" / "bases", tmp_path / "another" / "bases"
    for bases in (one, other):
        bases.mkdir(parents=True)
        fuzz.KINDS["checkpoint"].make(bases)
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(other) for file in other.rglob("*") if file.is_file())
    assert [file for file in files if (one / file).read_bytes() != (other / file).read_bytes()] == []


@pytest.mark.parametrize("change", [
    lambda params: {"params": {**params["params"], "embedding": params["params"]["embedding"].at[0, 0].set(np.nan)}},
    lambda params: {"params": {**params["params"], "embedding": params["params"]["embedding"][:-1]}},
    lambda params: {"params": {**params["params"], "embedding": params["params"]["embedding"].astype("bfloat16")}},
    lambda params: {"params": {name: value for name, value in params["params"].items() if name != "norm"}}])
def test_an_unsound_model_is_no_model(change):
    config = tiny_target(dtype="float32")
    params = random_params(target_shapes(config), np.random.default_rng(0))
    fuzz.check_model(config, params)
    with pytest.raises((AssertionError, ValueError)):
        fuzz.check_model(config, change(params))
