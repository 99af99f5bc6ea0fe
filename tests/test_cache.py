"""The cache writes what was accepted, and nothing else."""

import jax.numpy as jnp
import numpy as np

from jetspec_jax.cache import KVCache
from tests.models import tiny_target


def filled(batch, slots, seed=0):
    rng = np.random.default_rng(seed)
    cache = KVCache.create(tiny_target(), batch, slots)
    return KVCache(jnp.asarray(rng.standard_normal(cache.k.shape)), jnp.asarray(rng.standard_normal(cache.v.shape)))


def test_commit_writes_only_accepted_rows_and_never_clamps():
    cache = filled(3, 10)
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 2, 3, 4, 2, 8))  # [L, B, R, K, C]
    start, count = [0, 8, 5], [4, 4, 0]  # the second would end two slots beyond the cache
    zero = jnp.zeros((3,), jnp.int32)
    after = cache.commit(jnp.asarray(k), jnp.asarray(v), jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32),
                         after=zero)
    for old, new, rows in ((cache.k, after.k, k), (cache.v, after.v, v)):
        expected = np.array(old)
        expected[:, 0, :, 0:4] = rows[:, 0].swapaxes(1, 2)
        expected[:, 1, :, 8:10] = rows[:, 1, :2].swapaxes(1, 2)
        np.testing.assert_array_equal(new, expected)


def test_insert_replaces_whole_rows_and_drops_padding():
    cache, prefix = filled(3, 10), filled(2, 6, seed=5)
    after = cache.insert(prefix, jnp.asarray([2, 3], jnp.int32))  # row 3 does not exist
    expected = np.array(cache.k)
    expected[:, 2, :, :6] = prefix.k[:, 0]
    np.testing.assert_array_equal(after.k, expected)


def test_write_chunk_is_a_plain_slice():
    cache = filled(2, 10)
    k = np.random.default_rng(2).standard_normal((2, 2, 4, 2, 8))
    after = cache.write_chunk(jnp.asarray(k), jnp.asarray(k), jnp.int32(3))
    expected = np.array(cache.v)
    expected[:, :, :, 3:7] = k.swapaxes(2, 3)
    np.testing.assert_array_equal(after.v, expected)
