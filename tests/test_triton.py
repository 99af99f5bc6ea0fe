"""The attention in plain Triton: how it is chosen, and what is compiled. (What it computes is in test_kernels.py.)"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from jetspec_jax import JetSpecError, kernels
from pallas_kernels import add_norm

NEEDED = ("triton", "jax_triton", "jax_cuda13_plugin")


@pytest.mark.parametrize(("backend", "module", "extra"), [
    ("triton", "jax_triton", "gpu"), ("triton", "triton", "gpu"), ("triton_interpret", "torch", "test,parity")])
def test_a_missing_dependency_is_told(backend, module, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, "pallas_kernels.tree_attention.triton", raising=False)
    for name in ("jax_triton", "torch"):  # never really imported here
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, module, None)
    kernels._triton_tree_attention.cache_clear()
    with pytest.raises(JetSpecError, match=rf"'{backend}'.*{module}.*jetspec-jax\[{extra}\]"):
        kernels.tree_attention(backend)


def test_other_kernels_stay_in_pallas():
    chosen = kernels.add_norm("triton", 1e-6)
    assert (chosen.func, chosen.keywords) == (add_norm.pallas.add_norm, {"eps": 1e-6, "interpret": False})


@pytest.mark.aot
@pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs " + ", ".join(NEEDED))
def test_compiled_for_an_h100():
    """Tensor cores Hopper's way from 16 queries on, no spills, and no launch besides the kernel and its combine."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.attention_lowerings", "--json", "--queries", "1", "16", "256"], cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "0", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(
            [str(root), os.environ.get("PYTHONPATH", "")])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [row for row in json.loads(done.stdout.splitlines()[-1]) if row["lowering"] == "triton"]
    assert [row["queries"] for row in compiled] == [1, 16, 256]
    for row in compiled:
        assert row["launches"] == 2
        combine, attention = row["kernels"]
        assert (combine["name"], attention["name"]) == ("tree_attention_combine", "tree_attention_kernel")
        assert combine["spill_bytes"] == attention["spill_bytes"] == 0
        assert attention["shared_bytes"] < 227 * 1024
        assert (attention["wgmma"] > 0) == (row["queries"] >= 16)
        assert not attention["serialized"]


@pytest.fixture
def fake_jax_triton(monkeypatch):
    """Stands in for jax-triton: (its primitive, JAX's table of rules for dead code)."""
    pytest.importorskip("triton")
    primitive, rules = object(), {}
    monkeypatch.setitem(sys.modules, "jax_triton",
                        SimpleNamespace(triton_lib=SimpleNamespace(triton_kernel_call_p=primitive)))
    monkeypatch.setattr("jax.interpreters.partial_eval.dce_rules", rules)
    triton = importlib.import_module("pallas_kernels.tree_attention.triton")
    triton._jax_triton.cache_clear()
    yield primitive, rules, triton._jax_triton
    triton._jax_triton.cache_clear()


def old_rule(used_outs, eqn):
    return used_outs, eqn


def new_rule(used_outs, live_ins, eqn):
    return live_ins, eqn


@pytest.mark.parametrize(("version", "rule", "mended"), [
    ((0, 10, 2), None, False), ((0, 11, 2), old_rule, False), ((0, 12, 0), old_rule, True),
    ((0, 12, 0), new_rule, False)])
def test_an_old_rule_for_dead_code_is_wrapped(fake_jax_triton, monkeypatch, version, rule, mended):
    """Only where JAX calls it with one argument more than it knows."""
    primitive, rules, load = fake_jax_triton
    monkeypatch.setattr("jax.__version_info__", version)
    if rule:
        rules[primitive] = rule
    load()
    assert rules.get(primitive) is rule or mended
    if mended:
        assert rules[primitive]("used", "live", "equation") == ("used", "equation")
