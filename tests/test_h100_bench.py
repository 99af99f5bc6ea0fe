"""The measurements for an H100, on a CPU: how the run is driven, and that what it reports can be wrong."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import h100_bench
from experiments.h100_steps import launches, loops, report, rows
from experiments.h100_steps.bench import Bench
from experiments.h100_steps.ledger import LIMITS, Ledger
from jetspec_jax import JetSpecError
from tests.test_scripts import ROOT, run

BENCH = "experiments/h100_bench.py"


def test_some_steps_on_a_tiny_model(tmp_path):
    """A JSON each, one page for all, and a second run adds to the first. (CI runs every step: make gpu ARGS=--tiny.)"""
    done = run(BENCH, "--out", tmp_path, "--tiny", "--steps", "machine", "rounds")
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "rounds.json").read_text())
    assert [(row["budget"], row["context"]) for row in measured] == [(b, c) for b in (1, 8, 4) for c in (64, 32)]
    assert all(row["floor_ms"] > 0 for row in measured)
    assert run(BENCH, "--out", tmp_path, "--tiny", "--steps", "trees").returncode == 0
    assert {name: row["state"] for name, row in Ledger(tmp_path).rows.items()} == {
        "machine": "done", "rounds": "done", "trees": "done"}
    page = (tmp_path / "results.md").read_text()
    assert "## Rounds" in page and "## Growing a tree" in page
    assert "== rounds" in (tmp_path / "log.txt").read_text()


def test_killed_in_the_middle(tmp_path):
    """What was done is there and whole; what was running says so."""
    command = [sys.executable, BENCH, "--out", tmp_path, "--tiny", "--steps", "machine", "rounds", "batch", "products"]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        until = time.monotonic() + 240
        while not (tmp_path / "rounds.json").exists() and time.monotonic() < until:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    assert json.loads((tmp_path / "rounds.json").read_text())
    assert json.loads((tmp_path / "machine.json").read_text())["backend"] == "cpu"
    states = {name: row["state"] for name, row in Ledger(tmp_path).rows.items()}
    assert states["machine"] == "done"
    assert states["products"] == "not reached"
    assert not (tmp_path / "products.json").exists()


def drive(tmp_path, monkeypatch, ends, steps, minutes=9.0):
    """Runs the driver over processes that end as `ends` tells: by step, a list of (state, error), one per attempt."""
    seen = []

    def process(names, args, host_loop, deadline, log):
        for name in names:
            seen.append((name, host_loop))
            state, error = ends[name].pop(0) if ends.get(name) else ("done", None)
            if state == "not reached":  # it was gone before it said anything
                return
            log.write(f"== {name}\n{error}\n")
            log.flush()
            Ledger(tmp_path).write(name, state=state, host_loop=host_loop, **({"error": error} if error else {}))
            if state != "done":
                return

    monkeypatch.setattr(h100_bench, "run_process", process)
    args = argparse.Namespace(out=tmp_path, minutes=minutes, host_loop=False, tiny=True, weights=None)
    with (tmp_path / "log.txt").open("a") as log:
        h100_bench.run_steps(steps, args, log)
    return seen, {name: row["state"] for name, row in Ledger(tmp_path).rows.items()}


def test_a_failed_step_does_not_end_the_run(tmp_path, monkeypatch):
    seen, states = drive(tmp_path, monkeypatch, {"correct": [("failed", "AssertionError")]},
                         ["machine", "correct", "rounds", "peer", "kernels"])
    assert seen == [(name, False) for name in ("machine", "correct", "rounds", "peer", "kernels")]
    assert states == {"machine": "done", "correct": "failed", "rounds": "done", "peer": "done", "kernels": "done"}


@pytest.mark.parametrize("first", [("running", "Segmentation fault"), ("failed", "JaxRuntimeError")])
def test_a_loop_that_crashes_is_tried_with_the_hosts(tmp_path, monkeypatch, first):
    """And stays with it while that works."""
    seen, states = drive(tmp_path, monkeypatch, {"rounds": [first]}, ["rounds", "batch"])
    assert seen == [("rounds", False), ("rounds", True), ("batch", True)]
    assert states == {"rounds": "done", "batch": "done"}


def test_what_fails_both_ways_is_left(tmp_path, monkeypatch):
    ends = {"rounds": [("failed", "JaxRuntimeError")] * 2}
    seen, states = drive(tmp_path, monkeypatch, ends, ["rounds", "batch"])
    assert seen == [("rounds", False), ("rounds", True), ("batch", False)]
    assert states == {"rounds": "failed", "batch": "done"}


def test_a_process_that_is_gone_leaves_its_last_words(tmp_path, monkeypatch):
    """A step at its limit is no crash: the host's loop would not help."""
    seen, _ = drive(tmp_path, monkeypatch, {"rounds": [("running", "Timeout (0:03:20)!")]}, ["rounds", "trees"])
    assert seen == [("rounds", False), ("trees", False)]
    row = Ledger(tmp_path).rows["rounds"]
    assert (row["state"], row["error"]) == ("died", "cut off")
    assert "== rounds" in row["message"]


def test_a_process_that_says_nothing_costs_one_step(tmp_path, monkeypatch):
    seen, states = drive(tmp_path, monkeypatch, {"correct": [("not reached", None)]}, ["correct", "trees"])
    assert seen == [("correct", False), ("trees", False)]
    assert states == {"correct": "died", "trees": "done"}


def test_what_an_earlier_run_found_does_not_pass_as_new(tmp_path, monkeypatch):
    Bench(tmp_path).save("rounds", [])
    Bench(tmp_path).save("trees", [])
    drive(tmp_path, monkeypatch, {}, ["rounds"])
    assert not (tmp_path / "rounds.json").exists()
    assert (tmp_path / "trees.json").exists()


def test_an_interrupted_run_ends_at_once(tmp_path):
    """The terminal sends Ctrl-C to the whole group; the clock of --minutes does not keep the process alive."""
    command = [sys.executable, BENCH, "--out", str(tmp_path), "--tiny", "--steps", "rounds", "batch"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, start_new_session=True) as process:
        while "== rounds" not in process.stdout.readline():
            pass
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130


def test_when_time_is_up_nothing_more_begins(tmp_path, monkeypatch):
    seen, states = drive(tmp_path, monkeypatch, {}, ["machine", "rounds"], minutes=0.0)
    assert (seen, states) == ([], {"machine": "not reached", "rounds": "not reached"})


@pytest.mark.parametrize(("arguments", "told"), [
    ((), "one of the arguments --all --steps"), (("--steps", "nothing"), "invalid choice"),
    (("--all", "--tiny", "--weights", "missing"), "--weights missing"),
    (("--all", "--tiny", "--weights", "README.md"), "README.md is no GGUF file"),
    (("--all", "--tiny", "--weights", "docs"), "docs holds 0 GGUF files"),
    (("--all", "--tiny", "--minutes", "0"), "--minutes"), (("--all", "--tiny", "--minutes", "nan"), "--minutes"),
    (("--all", "--tiny", "--minutes", "inf"), "--minutes"), (("--all",), "no NVIDIA GPU")])
def test_mistakes_are_told_and_nothing_is_written(tmp_path, arguments, told):
    done = run(BENCH, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


class Clock:
    """Advances as told; stands in for `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_a_launch_is_timed_by_difference(monkeypatch):
    """Every call costs 5 s beside, a first run 100 more, and a turn of two launches 0.5 s: a launch takes 0.25 s."""
    clock, runs = Clock(), []

    def program(operands, turns):
        clock.now += 5 + 0.5 * int(turns) + (100 if not runs else 0)
        runs.append(int(turns))
        return turns

    monkeypatch.setattr(launches, "time", clock)
    monkeypatch.setattr(launches.Timing, "launches", 2)
    timing = launches.Timing({}, None, [], lambda i: [], 1)
    sizes = SimpleNamespace(turns=(2, 6), warm=1, repeats=3)
    assert launches._time(program, timing, SimpleNamespace(sizes=sizes)) == pytest.approx(0.25e6)
    assert runs == [2, 6] * 4


@pytest.mark.parametrize(("bytes_read", "expected"), [(1, 24), (17e6, 12), (201e6, 2), (1.2e9, 2)])
def test_operands_leave_the_cache_before_they_come_again(bytes_read, expected):
    timing = launches.Timing({}, None, [], lambda i: [], bytes_read)
    assert timing.launches == expected


def test_rounds_are_rewound_and_none_ends_early(tmp_path):
    """The context does not grow from run to run."""
    bench = Bench(tmp_path, tiny=True)
    (loop,) = loops.compile_loops([bench.setup_at(4, 64)], 256, bench, {})
    found, state = loops.time_loop(loop, bench, loops.filled_state(loop, bench), 64)
    assert found["accepted"] >= 1
    assert state.rounds.tolist() == [2]
    assert 65 < int(state.length[0]) <= 65 + 2 * loop.decoder.drafter.max_path


def test_rows_in_other_company_are_compared_bit_by_bit():
    """A result that depends on how many rows there are is found, and the same zero with another sign."""
    x = jnp.arange(24, dtype=jnp.float32).reshape(8, 3)
    orders = rows.orders(8, (1, 4, 8), np.random.default_rng(0))
    pick = lambda chosen: [x[chosen]]  # noqa: E731
    honest = rows.Operation("honest", lambda x: x * 2, pick, axis=0)
    company = rows.Operation("company", lambda x: x * (1 + (x.shape[0] == 4)), pick, axis=0)
    signed = rows.Operation("signed", lambda x: x * 0 * (1 if x.shape[0] == 8 else -1), pick, axis=0)
    bench = SimpleNamespace(options={})
    differ = {o.name: [row["differ"] for row in rows.compare(o, bench=bench, orders=orders)]
              for o in (honest, company, signed)}
    assert differ["honest"] == [0, 0, 0]
    zero_row = 0 in orders["4"]
    assert differ["company"] == [0, 12 - zero_row, 0]  # only the number 0 is its own double
    assert differ["signed"] == [3, 12, 0]


def test_the_page_puts_measured_beside_predicted(tmp_path, monkeypatch):
    bench = Bench(tmp_path, tiny=True)
    monkeypatch.setattr(report, "predicted_round", lambda *at: {"estimate_ms": 8.0} if at == (256, 4096, 1) else None)
    row = {"batch": 1, "context": 4096, "floor_ms": 5.0, "call_ms": 0.1, "temp_bytes": 2e6}
    bench.save("rounds", [row | {"budget": 1, "ms": 6.0}, row | {"budget": 256, "ms": 12.0},
                          {"budget": 64, "batch": 1, "error": "XlaRuntimeError: no | memory\nmore"}])
    bench.save("kernels", [{"kernel": "k", "budget": 1, "operands": "f32[1]", "floor_us": 2.0, "us": 3.0}])
    text = report.as_markdown(tmp_path)
    assert "| 256 | 1 | 4096 | 12.000 | 5.000 | 8.000 | 2.40 | 1.50 | 2.00 | 0.10 | 2 |" in text
    assert "| 1 | 1 | 4096 | 6.000 | 5.000 |  | 1.20 |  | 1.00 | 0.10 | 2 |" in text
    assert "failed: XlaRuntimeError: no \\| memory" in text
    assert "| k | 1 | f32[1] | 3.0 | 2.0 | 1.50 |" in text


def test_a_damaged_ledger_is_one_line(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(JetSpecError, match=r"steps\.json is damaged"):
        Ledger(tmp_path)


def test_every_step_has_a_module_and_a_section():
    folder = ROOT / "experiments" / "h100_steps"
    assert all((folder / f"{name}.py").exists() for name in LIMITS)
    assert set(report.SECTIONS) == set(LIMITS) - {"machine"}
