"""The measurements for an H100, on a CPU: the same code on a tiny model with interpreted kernels."""

import json

from tests.test_scripts import run


def test_measures_kernels_and_rounds(tmp_path):
    done = run("experiments/h100_bench.py", "--out", tmp_path / "out", "--tiny", "--repeats", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["name"] for row in report["kernels"]} >= {"tree_attention", "qk_norm_rope", "add_norm", "tree_build"}
    assert [row["budget"] for row in report["rounds"]] == [8]
    for row in (*report["kernels"], *report["rounds"], report["plain"]):
        assert row["seconds"] > row["floor_seconds"] > 0
    assert report["gpu_tests"]["passed"]
    assert (tmp_path / "out" / "results.md").read_text() in done.stdout


def test_without_a_gpu_nothing_is_written(tmp_path):
    done = run("experiments/h100_bench.py", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()
