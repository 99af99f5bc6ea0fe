"""Descriptions check themselves; presets have the published numbers of parameters."""

import math

import jax
import numpy as np
import pytest

from jetspec_jax import PRESETS, JetSpecError, SamplingParams, TreeConfig
from jetspec_jax.config import RopeScaling
from jetspec_jax.errors import shown
from jetspec_jax.head import head_shapes
from jetspec_jax.presets import default_target_layer_ids
from jetspec_jax.target import target_shapes
from tests.models import tiny_head, tiny_moe, tiny_target

YARN = RopeScaling(kind="yarn", factor=4, original_max_positions=32, beta_fast=32, beta_slow=1, attention_factor=1,
                   truncate=True)
HUGE = (0, 10**5000)  # Python does not print it


def parameters(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("name", "count"), [
    ("smollm2-135m", 134_515_008), ("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976),
    ("qwen3-4b", 4_022_468_096), ("qwen3-8b", 8_190_735_360), ("qwen3-14b", 14_768_307_200),
    ("qwen3-32b", 32_762_123_264), ("qwen3-30b-a3b", 30_532_122_624), ("qwen3-235b-a22b", 235_093_634_560)])
def test_presets_have_the_published_size(name, count):
    assert parameters(target_shapes(PRESETS[name].target)) == count


@pytest.mark.parametrize(("name", "count"), [("qwen3-8b", 1_048_626_432), ("qwen3-30b-a3b", 473_995_264)])
def test_the_released_heads_have_the_published_size(name, count):
    head = PRESETS[name].head
    assert parameters(head_shapes(head)) == count
    head.check_fits(PRESETS[name].target)


def test_experts_take_the_place_of_the_mlp():
    shapes = target_shapes(tiny_moe(num_layers=3, dense_layers=(1,)))["params"]
    found = {i: jax.tree.map(lambda leaf: leaf.shape, shapes[f"layers_{i}"]["mlp"]) for i in range(3)}
    experts = {"router": (16, 5), "gate_up_proj": (5, 16, 24), "down_proj": (5, 12, 16)}
    assert found == {0: experts, 2: experts,
                     1: {"gate_up_proj": {"kernel": (16, 48)}, "down_proj": {"kernel": (24, 16)}}}


@pytest.mark.parametrize(("layers", "taps", "ids"), [
    (36, 5, (1, 9, 17, 25, 33)), (48, 5, (1, 12, 23, 34, 45)), (36, 1, (18,)), (8, 3, (1, 3, 5))])
def test_default_taps(layers, taps, ids):
    assert default_target_layer_ids(layers, taps) == ids


@pytest.mark.parametrize("make", [
    lambda: TreeConfig(width=17), lambda: TreeConfig(width=0), lambda: TreeConfig(budget=0),
    lambda: TreeConfig(budget=10**9), lambda: TreeConfig(builder="greedy"), lambda: TreeConfig(width=2.0),
    lambda: SamplingParams(temperature=-1), lambda: SamplingParams(temperature=float("nan")),
    lambda: SamplingParams(temperature=1e-9), lambda: SamplingParams(top_k=0), lambda: SamplingParams(top_p=0.0),
    lambda: SamplingParams(top_p=1.1), lambda: SamplingParams(top_k=True),
    lambda: tiny_target(num_heads=3, num_kv_heads=2), lambda: tiny_target(head_dim=7),
    lambda: tiny_target(vocab_size=0), lambda: tiny_target(dtype="int8"), lambda: tiny_target(rope_theta=0),
    lambda: tiny_target(rope_theta=float("inf")), lambda: tiny_target(rope_theta=float("nan")),
    lambda: tiny_target(rope_theta=1e39), lambda: tiny_target(rope_theta=10**400),  # float32 holds neither
    lambda: tiny_target(rms_norm_eps=float("inf")), lambda: tiny_target(rms_norm_eps="1e-6"),
    lambda: tiny_target(max_positions=2**31), lambda: tiny_target(max_positions=0),
    lambda: tiny_target(eos_token_ids=(23,)), lambda: tiny_target(eos_token_ids=(-1,)),
    lambda: tiny_target(eos_token_ids=3), lambda: tiny_target(tie_embeddings=1), lambda: tiny_target(qk_norm=None),
    lambda: tiny_target(qkv_bias="no"), lambda: tiny_moe(norm_topk_prob=0),
    lambda: tiny_target(rope_scaling={"kind": "linear", "factor": 2}),
    lambda: tiny_target(rope_theta=1, rope_scaling=YARN),
    lambda: tiny_target(rope_scaling=RopeScaling(kind="table", divisors=(1, 2, 3))),
    lambda: tiny_head(tiny_target(), num_target_layers=0), lambda: tiny_head(tiny_target(), num_target_layers="2"),
    lambda: tiny_head(tiny_target(), target_layer_ids=1),
    lambda: tiny_moe(num_experts_per_tok=6), lambda: tiny_moe(num_experts_per_tok=0),
    lambda: tiny_moe(moe_intermediate_size=0), lambda: tiny_moe(num_experts=-1), lambda: tiny_moe(dense_layers=(2,)),
    lambda: tiny_head(tiny_target(), block_size=1), lambda: tiny_head(tiny_target(), target_layer_ids=()),
    lambda: tiny_head(tiny_target(), target_layer_ids=(2,)), lambda: tiny_head(tiny_target(), mask_token_id=23)])
def test_nonsense_is_refused(make):
    with pytest.raises(JetSpecError):
        make()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: tiny_target(num_layers=4097), "num_layers must be an integer from 1 to 4096, not 4097"),
    (lambda: tiny_target(vocab_size=2**31), "vocab_size must be an integer from 1 to 2147483647"),
    (lambda: tiny_moe(num_experts=2**16 + 1), "num_experts must be an integer from 1 to 65536"),
    (lambda: tiny_moe(moe_intermediate_size=2**31), "moe_intermediate_size must be an integer from 1 to 2147483647"),
    (lambda: tiny_head(tiny_target(), num_target_layers=4097), "num_target_layers must be an integer from 1 to 4096"),
    (lambda: tiny_target(vocab_size=2**31 - 1, hidden_size=2**20), "a target of these sizes has about 5e\\+15 param"),
    (lambda: tiny_moe(num_experts=2**16, hidden_size=2**16, moe_intermediate_size=2**17), "a target of these sizes"),
    (lambda: tiny_head(tiny_target(), hidden_size=2**25), "a head of these sizes has about 2e\\+15 parameters"),
    (lambda: tiny_target(num_layers=10**5000), "num_layers must fit into 64 bits"),
    (lambda: tiny_target(eos_token_ids=HUGE), "eos_token_ids must fit into 64 bits"),
    (lambda: tiny_moe(dense_layers=HUGE), "dense_layers must fit into 64 bits"),
    (lambda: RopeScaling(kind="table", divisors=HUGE), "divisors must fit into 64 bits"),
    (lambda: tiny_head(tiny_target(), target_layer_ids=HUGE), "target_layer_ids must fit into 64 bits"),
    (lambda: tiny_target(eos_token_ids=[HUGE]), "eos_token_ids must be .*, not tuple too large to be printed"),
    (lambda: tiny_target(rope_scaling={"factor": 10**5000}), "not dict too large to be printed"),
    (lambda: tiny_moe(dense_layers=1), "dense_layers must be a list of layers, not 1")])
def test_sizes_that_no_model_has_are_refused(make, message):
    with pytest.raises(JetSpecError, match=message) as error:
        make()
    assert len(str(error.value)) < 300


def test_the_largest_known_sizes_are_no_nonsense():
    """Ten times as many layers, and four times as many experts, as models of a trillion parameters have."""
    config = tiny_moe(vocab_size=262_144, hidden_size=16_384, num_layers=600, num_heads=128, num_kv_heads=8,
                      head_dim=256, intermediate_size=65_536, num_experts=2048, num_experts_per_tok=8,
                      moe_intermediate_size=2048, dense_layers=tuple(range(0, 600, 2)))
    assert [config.has_experts(i) for i in (0, 1, 598, 599)] == [False, True, False, True]


def test_what_cannot_be_printed_is_shown():
    assert shown(-7) == "-7"
    assert shown("a\n\ud800") == r"'a\n\ud800'"
    assert shown("x" * 100) == "'" + "x" * 76 + "..."
    assert shown(10**5000) == "int too large to be printed"


def test_a_head_of_another_target_is_refused():
    head = tiny_head(tiny_target())
    head.check_fits(tiny_target())
    for changes in ({"hidden_size": 32}, {"num_layers": 3}, {"vocab_size": 24}):
        with pytest.raises(JetSpecError, match="does not fit"):
            head.check_fits(tiny_target(**changes))


def test_numpy_numbers_and_lists_become_plain():
    assert TreeConfig(width=np.int32(16), budget=np.int64(9)) == TreeConfig(width=16, budget=9)
    assert type(TreeConfig(width=np.int32(16)).width) is int
    assert SamplingParams(np.float32(0.5)).temperature == 0.5
    assert tiny_target(eos_token_ids=[np.int64(2), 3]).eos_token_ids == (2, 3)
    assert hash(tiny_head(tiny_target(), target_layer_ids=[0, 1])) is not None
