"""What the compiled loop is: one device program, no word to the host, no copy of a cache."""

import re

import jax
import jax.numpy as jnp
import pytest

from jetspec_jax import SamplingParams, TreeConfig
from jetspec_jax.decode import Decoder, create_state, run_rounds
from jetspec_jax.draft import HeadDrafter, NoDrafter
from jetspec_jax.sampling import Sampler
from tests.models import random_pair

SLOTS = 7 * 73  # a number that no other dimension has


def compiled_loop(pair, drafter, sampling, batch):
    decoder = Decoder(pair.target_config, drafter)
    state = jax.eval_shape(lambda: create_state(decoder, batch, SLOTS, Sampler.create(sampling),
                                                jnp.zeros((4,), jnp.int32)))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(run_rounds, static_argnums=0, donate_argnums=2).lower(
        decoder, pair.params, state, number, number).compile()


def drafters(pair):
    trees = (TreeConfig("accum_logp", 3, 20), TreeConfig("best_first", 3, 20), TreeConfig("chain"))
    return [NoDrafter(), *(HeadDrafter(pair.target_config, pair.head_config, tree) for tree in trees)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.8, top_k=5, top_p=0.9)])
def test_the_loop_is_one_device_program(index, sampling, batch):
    pair = random_pair(0)
    program = compiled_loop(pair, drafters(pair)[index], sampling, batch)
    text = program.as_text()
    for word in ("outfeed", "infeed", "send(", "recv(", "xla_python", "xla_ffi_python", "host_transfer=true"):
        assert word not in text
    entry = text[text.index("\nENTRY"):]
    assert len(re.findall(r" while\(", entry)) == 1  # the loop over rounds; all else is inside it
    copied = re.findall(rf"= (\w+\[[\d,]*\b{SLOTS}\b[\d,]*\])\S* copy\(", text)
    # Small per-sequence logs [B, S] may be copied; a cache [L, B, K, S, C] may not.
    assert [shape for shape in copied if shape.count(",") == 4] == []
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes > 0.95 * memory.output_size_in_bytes  # the state is updated in place
