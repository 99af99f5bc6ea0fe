"""Rotary position embeddings: the plain frequencies, and those of models that were stretched to longer contexts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jetspec_jax.config import RopeScaling, TransformerConfig


def rotary_tables(config: TransformerConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of the rotary angles, times the attention factor of a scaling that has one.

    Args:
        config: whose C, theta, scaling and dtype count; the tables are float32, or float64 for float64.
        positions: int32 [B, M], absolute positions.

    Returns:
        (cos, sin), each [B, M, C/2].
    """
    wide = np.promote_types(config.jnp_dtype, np.float32)
    frequency = 1.0 / float(config.rope_theta) ** (jnp.arange(0, config.head_dim, 2, dtype=wide) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        frequency = frequency / frequency_divisors(scaling, config.head_dim, config.rope_theta).astype(wide)
    angle = positions.astype(wide)[:, :, None] * frequency[None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is None or scaling.attention_factor is None:
        return cos, sin
    return cos * scaling.attention_factor, sin * scaling.attention_factor


def frequency_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """What each plain frequency is divided by: float64 [C/2]. The kinds mean what they mean in transformers."""
    if scaling.kind == "table":
        return np.array(scaling.divisors, np.float64)
    assert scaling.factor is not None  # the other kinds have one
    if scaling.kind == "linear":
        return np.full(head_dim // 2, float(scaling.factor))
    keep = (_llama3_kept if scaling.kind == "llama3" else _yarn_kept)(scaling, head_dim, theta)
    return 1 / (keep + (1 - keep) / scaling.factor)


def _llama3_kept(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """Which share of each frequency is not divided: all of a fast one, nothing of a slow one."""
    assert scaling.original_max_positions and scaling.low_freq_factor and scaling.high_freq_factor
    frequency = float(theta) ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    return np.clip((turns - scaling.low_freq_factor) / width, 0, 1)


def _yarn_kept(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """As `_llama3_kept`, with a ramp that is linear in the number of the frequency."""
    assert scaling.original_max_positions and scaling.beta_fast and scaling.beta_slow

    def number_of(turns: float) -> float:
        """Of the frequency that turns so often in the original context."""
        assert scaling.original_max_positions
        return head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = number_of(scaling.beta_fast), number_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
