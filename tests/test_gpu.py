"""On an NVIDIA GPU: the compiled kernels at the sizes of real models, and whole recorded runs through them.

    python -m pytest -m gpu tests/test_gpu.py
"""

import dataclasses
import time

import jax
import pytest

from experiments.h100_steps.correct import cases, check
from jetspec_jax import TreeConfig, load_pretrained
from jetspec_jax.generate import generate
from tests.models import DATA
from tests.test_golden import recorded

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("case", [case for case in cases(tiny=False) if not case.x64], ids=lambda case: case.name)
def test_kernels(case):
    """Against their references on fresh random numbers, outputs poisoned, twice; here all under 64-bit types."""
    row = check(case, int(time.time()), "pallas")
    assert row["passed"], row


@pytest.mark.parametrize("name", ["dense", "tied_bidirectional"])
def test_recorded_runs(name):
    pair = load_pretrained(DATA / name / "target", DATA / name / "head")
    pair = dataclasses.replace(
        pair, target_config=dataclasses.replace(pair.target_config, kernels="pallas"),
        head_config=dataclasses.replace(pair.head_config, kernels="pallas"))
    activations, expected = recorded(name, 0)
    for run in expected["runs"]:
        out = generate(pair, activations["prompt"].tolist(), max_new_tokens=expected["max_new"], eos_token_ids=(),
                       tree=TreeConfig("accum_logp", run["width"], run["budget"]))
        assert (out.token_ids, out.accept_lengths) == (run["token_ids"], run["accept_lengths"])
