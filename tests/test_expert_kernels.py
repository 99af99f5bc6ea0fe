"""The kernels of a mixture of experts, interpreted, against their references; the references against loops."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, router

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def expert_inputs(experts, count, size, width, dtype):
    """Inputs of `grouped_mlp` for the choices `experts` [N, A] of `count` experts."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.2, dtype)  # noqa: E731
    tokens, choices = np.shape(experts)
    wide = np.promote_types(dtype, np.float32)
    return (draw(tokens, size), jnp.asarray(experts, jnp.int32),
            jnp.asarray(rng.dirichlet(np.ones(choices), tokens), wide), draw(count, size, 2 * width),
            draw(count, width, size))


def random_choices(tokens, choices, count):
    return np.random.default_rng(0).permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, :choices]


def test_experts_by_loops():
    """The reference against one product after another; experts -1 and 4 are elsewhere and add nothing."""
    x, experts, weights, gate_up, down = expert_inputs([[3, 0], [1, -1], [0, 3], [4, 3]], 4, 6, 5, np.float64)
    expected = np.zeros((4, 6))
    for n, a in np.ndindex(4, 2):
        if 0 <= (e := int(experts[n, a])) < 4:
            gate, up = np.asarray(x[n]) @ gate_up[e, :, :5], np.asarray(x[n]) @ gate_up[e, :, 5:]
            expected[n] += weights[n, a] * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    np.testing.assert_allclose(grouped_matmul.reference.grouped_mlp(x, experts, weights, gate_up, down), expected,
                               atol=1e-12)


CHOICES = {
    # experts [N, A], count, D, F
    "one token": ([[6, 1]], 8, 32, 16),
    "fewer choices than experts, shared ones": ([[6, 1], [1, 2], [0, 6]], 8, 32, 16),
    "all rows to one expert, three tiles": (np.full((41, 1), 1), 3, 16, 32),
    "empty groups": (np.tile([[5, 2]], (5, 1)), 6, 64, 48),
    "experts elsewhere": (np.where(random_choices(9, 3, 7) < 4, random_choices(9, 3, 7), -1), 4, 32, 16),
    "more tokens than are looked through at a time": (random_choices(300, 2, 3), 3, 32, 16),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(CHOICES))
def test_grouped_mlp(name, dtype):
    arguments = expert_inputs(*CHOICES[name], dtype)
    kernel = jax.jit(lambda *arrays: grouped_matmul.pallas.grouped_mlp(*arrays, interpret=True))
    found, expected = kernel(*arguments), grouped_matmul.reference.grouped_mlp(*arguments)
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_array_equal(found, kernel(*arguments))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype])


def test_experts_that_nobody_chose_are_not_read():
    x, experts, weights, gate_up, down = expert_inputs([[6, 1], [1, 2]], 8, 16, 16, jnp.float32)
    unused = jnp.asarray([0, 3, 4, 5, 7])
    gate_up, down = gate_up.at[unused].set(np.nan), down.at[unused].set(np.nan)
    for out in (grouped_matmul.reference.grouped_mlp(x, experts, weights, gate_up, down),
                grouped_matmul.pallas.grouped_mlp(x, experts, weights, gate_up, down, interpret=True)):
        assert np.isfinite(out).all()


def test_expert_tiles_for_an_h100():
    """Qwen3-30B-A3B: one token keeps all multiprocessors busy; a mean expert of 256 tokens fits one tile."""
    for inner, width, parts in ((2048, 768, 2), (768, 2048, 1)):
        config = grouped_matmul.pallas.choose_config(1, 8, 128, inner, width, parts)
        assert 8 * width // config.columns >= 132
        assert grouped_matmul.pallas.choose_config(256, 8, 128, inner, width, parts).rows == 32


def test_router_by_hand():
    """Logits 1, 3, 3, 2 (of equal ones the lower id is first); weights of two from e^3 and e^3, of three with e^2."""
    x, matrix = jnp.ones((1, 16), jnp.float32), jnp.asarray([[1, 3, 3, 2], *[[0] * 4] * 15], jnp.float32)
    for kernel in (router.reference.router, partial(router.pallas.router, interpret=True)):
        experts, weights = kernel(x, matrix, 3, True)
        assert experts.tolist() == [[1, 2, 3]]
        total = 2 * np.exp(3) + np.exp(2)
        np.testing.assert_allclose(weights[0], [np.exp(3) / total, np.exp(3) / total, np.exp(2) / total], rtol=1e-6)
        np.testing.assert_allclose(kernel(x, matrix, 2, False)[1][0], np.exp(3) / (total + np.exp(1)), rtol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "size", "count", "choices", "normalised"), [
    (1, 48, 128, 8, True), (37, 64, 20, 3, False), (16, 128, 8, 2, True)])
def test_router(tokens, size, count, choices, normalised, dtype):
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.standard_normal(shape) * 0.4, dtype) for shape in ((tokens, size), (size, count)))
    found = router.pallas.router(x, matrix, choices, normalised, interpret=True)
    expected = router.reference.router(x, matrix, choices, normalised)
    assert [(a.dtype, a.shape) for a in found] == [(a.dtype, a.shape) for a in expected]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize(("dtype", "size", "width", "count", "reason"), [
    (jnp.float64, 16, 16, 4, "float64"), (jnp.float32, 24, 16, 4, "24"), (jnp.float32, 16, 8, 4, "multiples of 16"),
    (jnp.float32, 16, 16, 300, "300 experts")])
def test_experts_that_are_not_taken(dtype, size, width, count, reason):
    x, experts, weights, gate_up, down = expert_inputs([[0]], count, size, width, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        router.pallas.router(x, x.T @ jnp.ones((1, count), dtype), 1, True, interpret=True)
        grouped_matmul.pallas.grouped_mlp(x, experts, weights, gate_up, down, interpret=True)
