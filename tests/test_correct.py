"""The check of the compiled kernels, on a CPU with interpreted ones: they pass, and what is wrong does not."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from experiments.h100_steps import correct
from experiments.h100_steps.bench import Bench
from experiments.h100_steps.correct import Case, cases, check

KERNELS = {"add_norm", "gated_product", "grouped_mlp", "qk_norm_rope", "router", "top_w", "tree_attention",
           "tree_build"}
SHAPE = (1000, 1000)  # one number of a million moves the distance by a thousandth


@pytest.mark.parametrize("case", cases(tiny=True), ids=lambda case: case.name)
def test_kernels(case):
    row = check(case, 1, "pallas_interpret")
    assert row["passed"], row
    assert row["poisoned"] == 2 * len(row["outputs"])  # of both runs all


def test_every_kernel_is_checked_also_with_64_bit_types():
    for tiny in (True, False):
        found = cases(tiny)
        assert len({case.name for case in found}) == len(found)
        for x64 in (True, False):
            assert {case.name.split()[0] for case in found if case.x64 == x64} == KERNELS


def doubled(x):
    return x * 2


def interpreted(body, x):
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def all_but_one(x_ref, out_ref):
    out_ref[:-1] = x_ref[:-1] * 2
    out_ref[-1, :-1] = x_ref[-1, :-1] * 2


def coin(x):
    """Another last bit of one number in every run."""
    coin.runs = getattr(coin, "runs", 0) + 1
    out = np.array(x) * np.asarray(2, x.dtype)
    out.view(np.uint8)[0, 0] ^= coin.runs % 2
    return out


WRONG = {
    "one wrong number": lambda x: doubled(x).at[3, 5].add(jnp.ones((), x.dtype)),
    "one number not written": partial(interpreted, all_but_one),
    "one NaN": lambda x: doubled(x).at[0, 0].set(jnp.nan),
    "one infinity": lambda x: doubled(x).at[0, 0].set(jnp.inf),
    "all NaN": lambda x: jnp.full(x.shape, jnp.nan, x.dtype),
    "another result in every run": lambda x: jax.pure_callback(coin, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
    "one row too many": lambda x: jnp.concatenate([doubled(x), x[:1]]),
    "an output too many": lambda x: (doubled(x), x),
    "another dtype": lambda x: doubled(x).astype(jnp.float16),
    "everything slightly off": lambda x: doubled(x) * jnp.asarray(1.03, x.dtype),
}


def case_of(kernel, reference=doubled, dtype=jnp.bfloat16, **more):
    return Case("toy", lambda backend: reference if backend == "reference" else kernel,
                lambda d: [d.normal(SHAPE, dtype)], correct.TOLERANCE[jnp.dtype(dtype).name], **more)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_is_right_passes(dtype):
    for kernel in (doubled, partial(interpreted, lambda x_ref, out_ref: out_ref.__setitem__(..., x_ref[...] * 2))):
        row = check(case_of(kernel, dtype=dtype), 1, "pallas")
        assert (row["passed"], row["poisoned"]) == (True, 2), row


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_does_not(name, dtype):
    assert not check(case_of(WRONG[name], dtype=dtype), 1, "pallas")["passed"]


def test_results_are_told_apart_by_their_last_bit():
    (output,) = check(case_of(WRONG["another result in every run"], dtype=jnp.float32), 1, "pallas")["outputs"]
    assert not output["same_again"]
    assert output["relative"] < 1e-6


def test_products_of_tf32_are_found():
    """Ten bits of a float32."""
    def short(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFE000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32) * 2

    assert not check(case_of(short, dtype=jnp.float32), 1, "pallas")["passed"]


@pytest.mark.parametrize(("misses", "passes"), [(0.0, False), (1e-5, True)])
def test_integers_are_equal_or_wrong(misses, passes):
    """But for the share of near-ties."""
    def signs(x):
        return (x > 0).astype(jnp.int32)

    kernel = lambda x: signs(x).at[0, 0].add(jnp.int32(1))  # noqa: E731
    row = check(case_of(kernel, signs, misses=misses), 1, "pallas")
    assert row["outputs"][0]["differ"] == 1
    assert row["passed"] == passes


def test_a_failure_is_kept_and_the_next_case_runs(tmp_path, monkeypatch, capsys):
    def broken(x):
        raise NotImplementedError("a shape that is not taken")

    monkeypatch.setattr(correct, "cases", lambda tiny: [case_of(broken), case_of(doubled)])
    with pytest.raises(AssertionError, match="1 of 2 kernels are wrong: toy"):
        correct.run(Bench(tmp_path, tiny=True))
    first, second = json.loads((tmp_path / "correct.json").read_text())
    assert (first["passed"], second["passed"]) == (False, True)
    assert "NotImplementedError: a shape that is not taken" in first["error"]
    assert f"FAILED with seed {first['seed']}" in capsys.readouterr().out
