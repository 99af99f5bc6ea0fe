"""On an NVIDIA GPU: the compiled kernels at the sizes of Qwen3-8B, and whole recorded runs through them.

    python -m pytest -m gpu tests/test_gpu.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax import PRESETS, TreeConfig, load_pretrained
from jetspec_jax.attention import pack_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.config import TargetConfig
from jetspec_jax.generate import generate
from jetspec_jax.target import target_forward, target_shapes
from tests.models import DATA, random_params
from tests.test_golden import recorded
from tests.test_kernels import random_tree

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]


def compare_forwards(config: TargetConfig, nodes: int, slots: int, backend: str) -> None:
    """Two layers over a random tree and a full cache, through kernels and through references."""
    rng = np.random.default_rng(nodes)
    reference = dataclasses.replace(config, kernels="reference")
    params = random_params(target_shapes(reference), rng, 0.02)
    shape = (config.num_layers, 1, config.num_kv_heads, slots, config.head_dim)
    cache = KVCache(*(jnp.asarray(rng.standard_normal(shape), config.jnp_dtype) for _ in range(2)))
    mask = random_tree(rng, 1, nodes)
    arguments = (params, jnp.asarray(rng.integers(0, config.vocab_size, (1, nodes)), jnp.int32),
                 slots + jnp.asarray(mask.sum(-1) - 1, jnp.int32), pack_bits(jnp.asarray(mask)), cache,
                 jnp.asarray([slots], jnp.int32), (0,))
    run = jax.jit(target_forward, static_argnums=(0, 7))
    with jax.numpy_rank_promotion("allow"):
        found = run(dataclasses.replace(config, kernels=backend), *arguments)
    for name, expected in run(reference, *arguments)._asdict().items():
        np.testing.assert_allclose(np.asarray(getattr(found, name), np.float32), np.asarray(expected, np.float32),
                                   atol=4e-2, rtol=4e-2, err_msg=name)


@pytest.mark.parametrize("nodes", [1, 64, 256])
def test_layers_of_qwen3_8b(nodes):
    config = dataclasses.replace(PRESETS["qwen3-8b"].target, num_layers=2, vocab_size=1024)
    compare_forwards(config, nodes, 4096, "pallas")


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
