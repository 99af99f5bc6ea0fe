"""Warping against sorting in NumPy; noise keyed by position; no sort of the vocabulary in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jetspec_jax.config import SamplingParams
from jetspec_jax.sampling import Sampler, argmax_last, choose, mass_threshold, warp


def sorted_warp(logits, temperature, top_k, top_p):
    """The textbook way: sort, cut, renormalise; ties with the last kept token are kept."""
    logits = logits / temperature
    if top_k is not None:
        cut = np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
        logits = np.where(logits >= cut, logits, -np.inf)
    logp = log_softmax(logits)
    if top_p is not None:
        order = np.argsort(-logp, kind="stable")
        enough = int(np.argmax(np.cumsum(np.exp(logp[order])) >= top_p)) if top_p < 1 else len(order) - 1
        logp = log_softmax(np.where(logp >= logp[order[enough]], logp, -np.inf))
    return logp


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, None, None), (0.7, 5, None), (1.5, None, 0.8), (0.9, 40, 0.5), (1.0, 1, None), (1.0, None, 1e-4),
    (1.0, 10_000, 0.999), (2.0, 3, 1.0)])
def test_warp_equals_sorting(temperature, top_k, top_p, dtype):
    logits = 3 * np.random.default_rng(0).standard_normal((4, 300)).astype(dtype)
    logp = warp(Sampler.create(SamplingParams(temperature, top_k, top_p)), jnp.asarray(logits))
    for row in range(4):
        expected = sorted_warp(logits[row].astype(np.float64), temperature, top_k, top_p)
        np.testing.assert_array_equal(np.isfinite(logp[row]), np.isfinite(expected))
        kept = np.isfinite(expected)
        np.testing.assert_allclose(np.asarray(logp[row])[kept], expected[kept], atol=1e-5)


def test_ties_at_the_threshold_are_all_kept():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert np.isfinite(warp(Sampler.create(SamplingParams(1.0, top_k=2)), logits)).tolist() == [[1, 1, 1, 1, 0]]


def test_mass_threshold_orders_all_floats():
    x = jnp.asarray([[-np.inf, -3.5, -0.0, 1e-30, 2.0, 1e30]], jnp.float32)
    ones = jnp.ones_like(x)
    for k, expected in enumerate([1e30, 2.0, 1e-30, -0.0, -3.5], start=1):
        assert float(mass_threshold(x, ones, jnp.float32(k))[0, 0]) == np.float32(expected)


def test_argmax_takes_the_first_of_equals():
    x = jnp.asarray([[1.0, 5.0, 5.0], [-np.inf, -np.inf, -1.0], [2.0, 2.0, 2.0]])
    assert argmax_last(x).tolist() == [1, 2, 0]


@pytest.mark.parametrize("size", [1, 63, 64, 127, 128, 130, 1000])
def test_argmax_in_blocks_is_the_argmax(size):
    x = np.random.default_rng(size).integers(0, 40, (50, 2, size)).astype(np.float32)  # ties everywhere
    x[0, 0] = -np.inf
    np.testing.assert_array_equal(argmax_last(jnp.asarray(x)), x.argmax(axis=-1))


def test_noise_depends_on_sequence_and_position_alone():
    sampler = Sampler.create(SamplingParams(1.0))
    logits = jnp.zeros((2, 3, 500))
    keys = jax.random.split(jax.random.key(0), 2)
    draw = choose(sampler, logits, keys, jnp.asarray([10, 11], jnp.int32),
                  jnp.asarray([[0, 1, 1], [0, 0, 1]], jnp.int32),
                  depths=2)
    assert draw[0, 1] == draw[0, 2]  # same position, same distribution
    assert draw[1, 0] == draw[1, 1]
    assert draw[0, 0] != draw[0, 1]  # another position
    assert draw[0, 1] != draw[1, 0]  # position 11 of another sequence
    alone = choose(sampler, logits[:1, :1], keys[:1], jnp.asarray([11], jnp.int32), jnp.zeros((1, 1), jnp.int32),
                   depths=1)
    assert alone[0, 0] == draw[0, 1]


def test_top_p_does_not_sort_the_vocabulary():
    sampler = Sampler.create(SamplingParams(0.8, top_k=50, top_p=0.9))
    text = jax.jit(warp).lower(sampler, jnp.zeros((64, 49152), jnp.float32)).compile().as_text()
    assert " sort(" not in text
    assert "topk" not in text.lower().replace("top_k", "")


def test_a_new_temperature_needs_no_new_program():
    first, second = (Sampler.create(SamplingParams(t, top_p=p)) for t, p in ((0.5, 0.9), (1.5, 0.3)))
    assert jax.tree.structure(first) == jax.tree.structure(second)
