"""Rotary scaling: what each kind computes, where files say it, and what is refused."""

import argparse
import dataclasses
import json
import math
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert
from converters.cli import main
from experiments.h100.plan import released_shape
from experiments.train_head import starting_point
from jetspec_jax import JetSpecError, TreeConfig, checkpoint, load_pretrained
from jetspec_jax.config import RopeScaling
from jetspec_jax.generate import generate
from jetspec_jax.head import DraftHead, head_shapes
from jetspec_jax.presets import Preset
from jetspec_jax.rotary import frequency_divisors, rotary_tables
from jetspec_jax.target import target_shapes
from tests.models import BUILDERS, DATA, random_pair, random_params, tiny_head, tiny_moe, tiny_target
from tests.test_converters import assert_refused, edit_json

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
QWEN3 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR = RopeScaling(kind="linear", factor=4)
LLAMA3 = RopeScaling(kind="llama3", factor=8, original_max_positions=32, low_freq_factor=1, high_freq_factor=4)
YARN = RopeScaling(kind="yarn", factor=4, original_max_positions=32, beta_fast=32, beta_slow=1, attention_factor=1.1,
                   truncate=True)
TABLE = RopeScaling(kind="table", divisors=(1, 1.5, 4, 8))


def llama3_divisor(frequency, original, factor, low, high):
    """As the published code of Llama 3.1 goes through the frequencies."""
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return factor
    smooth = (original / wavelength - low) / (high - low)
    return frequency / ((1 - smooth) * frequency / factor + smooth * frequency)


def yarn_divisor(number, dim, theta, original, factor, fast=32, slow=1, truncate=True):
    """As arXiv 2309.00071 and its published code: a ramp between the dimensions of two numbers of rotations."""
    def dimension(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = min(max((number - low) / ((high - low) or 0.001), 0), 1)
    return 1 / (ramp / factor + 1 - ramp)


@pytest.mark.parametrize(("dim", "theta", "original", "factor", "low", "high"), [
    (128, 5e5, 8192, 8, 1, 4), (64, 5e5, 8192, 32, 1, 4), (16, 1e4, 32, 4, 0.5, 3)])
def test_llama3_divisors(dim, theta, original, factor, low, high):
    scaling = RopeScaling(kind="llama3", factor=factor, original_max_positions=original, low_freq_factor=low,
                          high_freq_factor=high)
    expected = [llama3_divisor(theta ** (-2 * i / dim), original, factor, low, high) for i in range(dim // 2)]
    np.testing.assert_allclose(frequency_divisors(scaling, dim, theta), expected, rtol=1e-12)
    assert expected[0] == 1 and expected[-1] == factor and len({*expected}) > 2


@pytest.mark.parametrize(("dim", "theta", "original", "factor", "fast", "slow", "truncate"), [
    (128, 1e6, 32768, 4, 32, 1, True), (128, 1e6, 32768, 4, 32, 1, False), (64, 1e4, 4096, 16, 40, 2, True),
    (16, 1e4, 32, 4, 32, 1, True), (16, 1e4, 4, 4, 32, 1, True)])
def test_yarn_divisors(dim, theta, original, factor, fast, slow, truncate):
    """The last ones have so short a context that no frequency turns once, and the ramp is a step."""
    scaling = RopeScaling(kind="yarn", factor=factor, original_max_positions=original, beta_fast=fast, beta_slow=slow,
                          attention_factor=1, truncate=truncate)
    expected = [yarn_divisor(i, dim, theta, original, factor, fast, slow, truncate) for i in range(dim // 2)]
    np.testing.assert_allclose(frequency_divisors(scaling, dim, theta), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("scaling", "divisors", "times"), [
    (None, [1] * 4, 1), (LINEAR, [4] * 4, 1), (TABLE, [1, 1.5, 4, 8], 1),
    (LLAMA3, [llama3_divisor(10 ** -i, 32, 8, 1, 4) for i in range(4)], 1),
    (YARN, [yarn_divisor(i, 8, 1e4, 32, 4) for i in range(4)], 1.1)])
def test_tables(dtype, scaling, divisors, times):
    """Frequencies 1, 0.1, 0.01 and 0.001, each divided; a table is wide whatever the model's dtype."""
    config = tiny_target(dtype=dtype, rope_scaling=scaling)
    positions = np.array([[0, 1, 7, 500], [3, 40, 41, 599]])
    cos, sin = rotary_tables(config, jnp.asarray(positions, jnp.int32))
    angles = positions[..., None] * np.array([1, 0.1, 0.01, 0.001]) / np.array(divisors)
    assert cos.dtype == sin.dtype == ("float64" if dtype == "float64" else "float32")
    tolerance = 1e-12 if dtype == "float64" else 2e-4
    np.testing.assert_allclose(cos, times * np.cos(angles), atol=tolerance)
    np.testing.assert_allclose(sin, times * np.sin(angles), atol=tolerance)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3, YARN, TABLE])
@pytest.mark.parametrize("builder", BUILDERS)
def test_trees_decode_the_plain_tokens_of_scaled_models(scaling, builder):
    """Far beyond the original context of 32, with a target and a head that are scaled."""

    target = tiny_target(rope_scaling=scaling)
    pair = random_pair(5, target, tiny_head(target, rope_scaling=scaling))
    prompt = np.random.default_rng(0).integers(0, 20, 90).tolist()
    plain = generate(pair, prompt, max_new_tokens=30, tree=None).token_ids
    assert generate(pair, prompt, max_new_tokens=30, tree=TreeConfig(builder, 3, 12)).token_ids == plain
    unscaled = dataclasses.replace(pair, target_config=tiny_target())
    assert generate(unscaled, prompt, max_new_tokens=30, tree=None).token_ids != plain


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN, TABLE])
def test_checkpoints_keep_the_scaling(tmp_path, scaling):
    target = tiny_target(dtype="float32", rope_scaling=scaling)
    head = tiny_head(target, rope_scaling=scaling)
    for name, config, shapes in (("t", target, target_shapes), ("h", head, head_shapes)):
        with checkpoint.written_beside(tmp_path / name) as beside:
            checkpoint.save(beside, config, random_params(shapes(config), np.random.default_rng(0)), "a test")
        assert checkpoint.load_config(tmp_path / name) == config
        assert hash(checkpoint.load_config(tmp_path / name)) == hash(config)


@pytest.mark.parametrize(("scaling", "message"), [
    ("yarn", "mapping"), ([1], "mapping"), ({"kind": "dynamic", "factor": 2.0}, "'dynamic'"), ({}, "kind"),
    ({"kind": "linear"}, "lacks factor"), ({"kind": "linear", "factor": 0.5}, "factor must be"),
    ({"kind": "linear", "factor": 2.0, "beta_fast": 3.0}, "no beta_fast"), ({"kind": "linear", "gain": 2}, "gain"),
    ({"kind": ["yarn"]}, "kind"), ({"kind": "table", "divisors": [1, 2, 3]}, "3 divisors"),
    ({"kind": "table", "divisors": [1, 2, 3, 0]}, "divisors must be"), ({"kind": "table", "divisors": 3}, "divisors")])
def test_malformed_scaling_in_a_checkpoint_is_one_error(tmp_path, scaling, message):
    config = tiny_target(dtype="float32")
    with checkpoint.written_beside(tmp_path / "t") as beside:
        checkpoint.save(beside, config, random_params(target_shapes(config), np.random.default_rng(0)), "a test")
    file = tmp_path / "t" / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    del description["config"]["rope_scaling"]  # as written before there was scaling
    file.write_text(json.dumps(description))
    assert checkpoint.load_config(tmp_path / "t") == config
    description["config"]["rope_scaling"] = scaling
    file.write_text(json.dumps(description))
    with pytest.raises(JetSpecError, match=f"description of .*t is damaged: .*{message}"):
        checkpoint.load_config(tmp_path / "t")


@pytest.mark.parametrize("changes", [
    {"factor": 0.9}, {"factor": float("inf")}, {"factor": float("nan")}, {"factor": "4"}, {"factor": True},
    {"factor": 10**400}, {"original_max_positions": 0}, {"original_max_positions": 8.0},
    {"original_max_positions": True}, {"beta_fast": 1}, {"beta_slow": 0}, {"beta_slow": 40}, {"attention_factor": 0},
    {"attention_factor": float("inf")}, {"truncate": 1}, {"factor": None}, {"low_freq_factor": 1.0},
    {"divisors": (1, 2)}, {"kind": "longrope"}, {"kind": None}])
def test_nonsense_is_refused(changes):
    with pytest.raises(JetSpecError):
        dataclasses.replace(YARN, **changes)


def test_low_must_be_below_high():
    with pytest.raises(JetSpecError, match="low_freq_factor 4 must be below high_freq_factor 4"):
        dataclasses.replace(LLAMA3, low_freq_factor=4)


@pytest.fixture
def target(tmp_path):
    return shutil.copytree(DATA / "dense" / "target", tmp_path / "source")


@pytest.fixture
def head(tmp_path):
    return shutil.copytree(DATA / "dense" / "head", tmp_path / "head")


def without_rope(folder, **changes):
    edit_json(folder / "config.json", rope_theta=None, rope_scaling=None, **changes)


@pytest.mark.parametrize(("changes", "theta", "kind"), [
    ({}, 10000, None), ({"rope_theta": 5e5}, 5e5, None),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
    ({"rope_scaling": {"rope_theta": 5e5}}, 5e5, None), ({"rope_scaling": {}}, 10000, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}, 5e5, None),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 5e5}}}, 5e5, None),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": None}}, 5e5, None),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000}}, 5e5, None),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 7e5}, 7e5, "linear"),
    ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, 10000, "linear"),
    ({"rope_scaling": LLAMA31, "rope_theta": 5e5}, 5e5, "llama3"),
    ({"rope_parameters": {**LLAMA31, "rope_theta": 5e5}}, 5e5, "llama3"),
    ({"rope_parameters": {"full_attention": {**QWEN3, "rope_theta": 1e6}}}, 1e6, "yarn"),
    ({"rope_scaling": QWEN3, "rope_parameters": {"rope_theta": 1e6}}, 1e6, "yarn"),
    ({"partial_rotary_factor": 1.0, "rope_scaling": {"partial_rotary_factor": 1}}, 10000, None)])
def test_where_files_say_it(target, head, changes, theta, kind):
    for folder, read in ((target, convert.read_target_config), (head, convert.read_head_config)):
        without_rope(folder)
        edit_json(folder / "config.json", **changes)
        config = read(folder)
        assert config.rope_theta == theta
        assert (config.rope_scaling.kind if config.rope_scaling else None) == kind


@pytest.mark.parametrize(("scaling", "expected"), [
    ({}, 0.1 * math.log(4) + 1), ({"attention_factor": 1.25}, 1.25),
    ({"attention_factor": None}, 0.1 * math.log(4) + 1),
    ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0), ({"mscale": 2.0}, 0.1 * math.log(4) + 1)])
def test_yarn_in_full(target, scaling, expected):
    """Qwen3's recipe: the file still states the context of 4096 that the model had, and 4 * 2048 are reached."""
    edit_json(target / "config.json", rope_scaling={**QWEN3, "original_max_position_embeddings": 2048, **scaling})
    config = convert.read_target_config(target)
    assert config.max_positions == 8192
    assert config.rope_scaling.attention_factor == pytest.approx(expected, rel=1e-12)
    assert dataclasses.replace(config.rope_scaling, attention_factor=1.0) == RopeScaling(
        kind="yarn", factor=4, original_max_positions=2048, beta_fast=32, beta_slow=1, attention_factor=1,
        truncate=True)


@pytest.mark.parametrize(("scaling", "limit"), [
    ({"type": "linear", "factor": 2.5}, 10240), ({**LLAMA31, "original_max_position_embeddings": 1024}, 4096),
    ({"type": "linear", "factor": 2.0, "original_max_position_embeddings": 1000}, 2000),
    ({**QWEN3, "original_max_position_embeddings": 512}, 4096), ({**QWEN3}, 131072)])
def test_context_limit(target, scaling, limit):
    edit_json(target / "config.json", rope_scaling=scaling)
    assert convert.read_target_config(target).max_positions == limit


SAYS = {"rope_type": "yarn", "original_max_position_embeddings": 32}
REFUSED = [
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "'longrope' is not supported"),
    ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.type 'mrope'"),
    ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type must be a text"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type must be a text"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor 4.0 is given without a rope_type"),
    ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "is no field of rope_type 'default'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta_fast": 8}}, "rope_scaling.beta_fast 8 is no field"),
    ({"rope_scaling": {**SAYS, "factor": 4.0, "extrapolation_factor": 2}}, "rope_scaling.extrapolation_factor 2"),
    ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'rope_scaling.factor'"),
    ({"rope_scaling": {**SAYS}}, "lacks 'rope_scaling.factor'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "lacks 'rope_scaling.original_max_position_embeddings'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks"),
    ({"rope_scaling": {**LLAMA31, "high_freq_factor": 1.0}}, "low_freq_factor 1.0 must be below high_freq_factor"),
    ({"rope_scaling": {**LLAMA31, "low_freq_factor": 0}}, "low_freq_factor must be"),
    ({"rope_scaling": {**LLAMA31, "original_max_position_embeddings": 8192.0}}, "original_max_position_embeddings"),
    ({"rope_scaling": {**SAYS, "factor": "4"}}, "rope_scaling.factor must be a number from 1 to"),
    ({"rope_scaling": {**SAYS, "factor": math.inf}}, "rope_scaling.factor must be a number from 1 to"),
    ({"rope_scaling": {**SAYS, "factor": 0}}, "rope_scaling.factor must be a number from 1 to"),
    ({"rope_scaling": {**SAYS, "factor": 4, "beta_fast": 0}}, "beta_fast must be"),
    ({"rope_scaling": {**SAYS, "factor": 4, "beta_slow": 64}}, "beta_slow 64"),
    ({"rope_scaling": {**SAYS, "factor": 4, "truncate": "no"}}, "rope_scaling.truncate must be true or false"),
    ({"rope_scaling": {**SAYS, "factor": 4, "attention_factor": -1.0}}, "attention_factor must be"),
    ({"rope_scaling": {**SAYS, "factor": 4, "mscale": [1], "mscale_all_dim": 1}}, "rope_scaling.mscale must be"),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "contradict each other"),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 4}},
     "rope_scaling.factor 2 and rope_parameters.factor 4 contradict"),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "contradict"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta 10000.0 and rope_parameters.rope_theta"),
    ({"rope_theta": 1e4, "rope_scaling": {"rope_theta": 1e6}}, "contradict"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}}, "differs"),
    ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e6}}}, "differs between sliding_attention"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "rope_type": "yarn"}}, "mixes 'rope_type'"),
    ({"rope_parameters": {"full_attention": [1e4]}}, "rope_parameters must have an object for each type of layer"),
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object"), ({"rope_parameters": [1]}, "rope_parameters must be"),
    ({"rope_theta": 0}, "rope_theta must be a number from 2 to 1e+30, not 0"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be"), ({"rope_theta": -1e4}, "rope_theta must be"),
    ({"rope_theta": math.inf}, "rope_theta must be"), ({"rope_theta": math.nan}, "rope_theta must be"),
    ({"rope_theta": 1e39}, "rope_theta must be"), ({"rope_theta": True}, "rope_theta must be"),
    ({"rope_theta": "1e6"}, "rope_theta must be"),
    ({"rope_theta": 1, "rope_scaling": {**SAYS, "factor": 4}}, "rope_theta must be a number from 2"),
    ({"rope_theta": 1e-50}, "rope_theta must be a number from 2"), ({"rms_norm_eps": 1e-50}, "rms_norm_eps must be"),
    ({"rope_scaling": {**SAYS, "factor": 4, "beta_slow": 1e-320}}, "rope_scaling.beta_slow must be a number from"),
    ({"rope_scaling": {**SAYS, "factor": 4, "beta_fast": 1e38}}, "rope_scaling.beta_fast must be"),
    ({"rope_scaling": {**SAYS, "factor": 4, "attention_factor": 3e38}}, "rope_scaling.attention_factor must be"),
    ({"rope_scaling": {**SAYS, "factor": 4, "truncate": None}}, "rope_scaling.truncate must be true or false, not"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor 0"),
    ({"partial_rotary_factor": True}, "partial_rotary_factor True"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor 0.5 is not supported"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor"),
    ({"rotary_pct": 0.25}, "rotary_pct 0.25 is not supported"),
    ({"head_dim": 0}, "head_dim must be an integer of at least 1, not 0"), ({"head_dim": 16.0}, "head_dim must be"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer of at least 1, not 0"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads must be"),
    ({"num_attention_heads": True}, "num_attention_heads must be"),
    ({"num_attention_heads": 0}, "num_attention_heads must be"), ({"hidden_size": 10**400}, "hidden_size must be"),
    ({"vocab_size": -1}, "vocab_size must be"), ({"intermediate_size": 1.5}, "intermediate_size must be"),
    ({"num_hidden_layers": []}, "num_hidden_layers must be"), ({"head_dim": 15}, "even"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps must be"), ({"rms_norm_eps": 0}, "rms_norm_eps must be"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be"), ({"rms_norm_eps": math.nan}, "rms_norm_eps must be"),
    ({"attention_bias": "false"}, "attention_bias must be true or false"),
    ({"attention_bias": 0}, "attention_bias must be"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries"),
    ({"layer_types": "full_attention"}, "layer_types must be a list"), ({"layer_types": []}, "layer_types has 0"),
    ({"layer_types": ["linear_attention"] * 8}, "layer_types has 'linear_attention'"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention', which is not supported"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"), ({"layer_types": [3]}, "has 3"),
    ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
    ({"use_sliding_window": "no"}, "use_sliding_window 'no'"), ({"use_sliding_window": 0}, "use_sliding_window 0"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ({"hidden_act": ["silu"]}, "hidden_act ['silu']"),
    ({"mlp_bias": True}, "mlp_bias True is not supported"), ({"logit_scale": 0.5}, "logit_scale 0.5"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"), ({"is_encoder_decoder": True}, "is_encoder"),
    ({"embedding_multiplier": 12}, "embedding_multiplier 12"), ({"attention_chunk_size": 64}, "attention_chunk_size"),
    ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"), ({"per_layer_config": {"0": {}}}, "per_layer_config"),
    ({"quantization_config": {"bits": 4}}, "must be dequantised first"), ({"dtype": "int8"}, "dtype 'int8'"),
    ({"dtype": ["float32"]}, "dtype ['float32']"), ({"dtype": ""}, "dtype ''")]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_not_computed_is_refused(tmp_path, target, head, capsys, changes, message):
    """In targets and heads alike, in one line that names the file and the field."""
    for folder, kind in ((target, "target"), (head, "head")):
        without_rope(folder)
        edit_json(folder / "config.json", **changes)
        assert_refused(tmp_path, folder, capsys, message, kind)


TARGET_REFUSED = [
    ({"max_position_embeddings": 0}, "max_position_embeddings must be"), ({"max_position_embeddings": None}, "lacks"),
    ({"max_position_embeddings": 4096.0}, "max_position_embeddings must be"),
    ({"max_position_embeddings": 2**31}, "max_position_embeddings must be"),
    ({"rope_scaling": {"type": "linear", "factor": 1e9}}, "rope_scaling.factor must be"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"), ({"tie_word_embeddings": 1}, "tie_"),
    ({"eos_token_id": 64}, "config.json: eos_token_id must be token ids from 0 to 63, not 64"),
    ({"eos_token_id": [3, -1]}, "eos_token_id must be"), ({"eos_token_id": True}, "eos_token_id must be"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be"), ({"eos_token_id": 3.0}, "eos_token_id must be"),
    ({"model_type": "llama", "sliding_window": 4096, "use_sliding_window": None}, "sliding_window 4096 is"),
    ({"model_type": "llama", "sliding_window": 4096, "use_sliding_window": True}, "use_sliding_window True"),
    ({"model_type": "llama", "head_dim": None, "num_attention_heads": 6}, "lacks 'head_dim'"),
    ({"model_type": "mistral"}, "model_type 'mistral'"), ({"model_type": ["llama"]}, "model_type ['llama']"),
    ({"model_type": None}, "model_type None")]


@pytest.mark.parametrize(("changes", "message"), TARGET_REFUSED)
def test_what_targets_refuse(tmp_path, target, capsys, changes, message):
    edit_json(target / "config.json", **changes)
    assert_refused(tmp_path, target, capsys, message)


def test_end_tokens_of_generation_config(tmp_path, target, capsys):
    (target / "generation_config.json").write_text('{"eos_token_id": [3, 64]}')
    assert_refused(tmp_path, target, capsys, "generation_config.json: eos_token_id must be token ids from 0 to 63")
    with pytest.raises(JetSpecError, match="eos_token_ids must be token ids from 0 to 22"):
        tiny_target(eos_token_ids=(23,))


HEAD_REFUSED = [
    ({"dflash_config": {"mask_token_id": 63}}, "dflash_config lacks 'target_layer_ids'"),
    ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": None}}, "lacks 'target_layer_ids'"),
    ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": 3}}, "target_layer_ids must be a list of integers"),
    ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": [1.0]}}, "target_layer_ids must be"),
    ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": []}}, "target_layer_ids is empty"),
    ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": [8]}}, "lie outside"),
    ({"dflash_config": {"mask_token_id": 64, "target_layer_ids": [1]}}, "mask_token_id 64 lies outside"),
    ({"dflash_config": {"mask_token_id": "63", "target_layer_ids": [1]}}, "dflash_config.mask_token_id must be"),
    ({"dflash_config": {"target_layer_ids": [1]}}, "lacks 'dflash_config.mask_token_id'"),
    ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": [1], "causal": 1}}, "causal must be true or false"),
    ({"mask_token_id": 7}, "mask_token_id 7 and dflash_config.mask_token_id"),
    ({"block_size": 8, "dflash_config": {"mask_token_id": 63, "target_layer_ids": [1], "block_size": 4}}, "contradict"),
    ({"causal": False}, "causal_head and causal contradict each other"),
    ({"dflash_config": [1]}, "no dflash_config"), ({"block_size": 1}, "block_size must be"),
    ({"block_size": None}, "lacks 'block_size'"), ({"block_size": 8.0}, "block_size must be"),
    ({"num_target_layers": 0}, "num_target_layers must be"), ({"num_target_layers": None}, "lacks 'num_target_layers'"),
    ({"model_type": "llama"}, "model_type of a head must be 'qwen3'")]


@pytest.mark.parametrize(("changes", "message"), HEAD_REFUSED)
def test_what_heads_refuse(tmp_path, head, capsys, changes, message):
    edit_json(head / "config.json", **changes)
    assert_refused(tmp_path, head, capsys, message, "head")


HARMLESS = {"pretraining_tp": 2, "attention_dropout": 0.1, "bos_token_id": 1, "transformers_version": "5.0",
            "use_sliding_window": False, "sliding_window": 4096, "quantization_config": None, "mlp_bias": False}


def test_what_nobody_knows_is_noted_once(tmp_path, target, head, capsys):
    edit_json(target / "config.json", **HARMLESS, novel_gate=0.5, novel_null=None,
              rope_scaling={"rope_type": "default", "mrope_section": [1, 2]})
    dflash = json.loads((head / "config.json").read_text())["dflash_config"]
    edit_json(head / "config.json", **HARMLESS, novel_head=True, dflash_config={**dflash, "novel_inside": 1})
    for folder, kind, names in ((target, "target", "'novel_gate', 'rope_scaling.mrope_section'"),
                                (head, "head", "'novel_head', 'dflash_config.novel_inside'")):
        assert main([kind, str(folder), str(tmp_path / f"{kind}_out")]) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
        assert notes == [f"jetspec-convert: note: {folder / 'config.json'}: fields that are not known here are "
                         f"ignored: {names}"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_pretrained(target, head)
    assert [str(w.message).split("ignored: ")[1] for w in caught] == [
        "'novel_gate', 'rope_scaling.mrope_section'", "'novel_head', 'dflash_config.novel_inside'"]
    assert all(w.category is UserWarning for w in caught)


def test_what_is_known_is_not_noted(target, head, recwarn):
    for folder in (target, head):
        edit_json(folder / "config.json", **HARMLESS)
    load_pretrained(target, head)
    assert not recwarn.list


def test_experts_are_scaled_too():
    scaled, plain = (rotary_tables(tiny_moe(rope_scaling=scaling), jnp.array([[100]], jnp.int32))[0]
                     for scaling in (LINEAR, None))
    assert float(jnp.abs(scaled - plain).max()) > 0.1


@pytest.mark.parametrize("scaling", [QWEN3, LLAMA31, {"rope_type": "linear", "factor": 3.0}])
def test_heads_are_scaled_and_exported_as_they_were_read(tmp_path, head, scaling):
    edit_json(head / "config.json", rope_scaling=scaling)
    config = convert.read_head_config(head)
    cos, sin = DraftHead(config).apply({}, jnp.array([[5, 70_000]], jnp.int32), method="_tables")
    frequencies = 1e6 ** (-np.arange(8) / 8)
    divisors = {"yarn": [yarn_divisor(i, 16, 1e6, 32768, 4) for i in range(8)],
                "llama3": [llama3_divisor(f, 8192, 8, 1, 4) for f in frequencies],
                "linear": [3] * 8}[scaling["rope_type"]]
    angles = np.array([5, 70_000])[:, None] * frequencies / divisors
    times = 0.1 * math.log(4) + 1 if scaling["rope_type"] == "yarn" else 1
    np.testing.assert_allclose(cos[0], times * np.cos(angles), atol=0.02)  # float32 angles up to 70000
    np.testing.assert_allclose(sin[0], times * np.sin(angles), atol=0.02)
    assert main(["head", str(head), str(tmp_path / "h")]) == 0
    assert main(["export-head", str(tmp_path / "h"), str(tmp_path / "back")]) == 0
    assert convert.read_head_config(tmp_path / "back") == config
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"].items() >= scaling.items()


@pytest.mark.parametrize("scaling", [None, YARN])
def test_new_heads_take_the_scaling_of_their_target(scaling):
    target = tiny_target(num_layers=8, dtype="float32", rope_scaling=scaling)
    args = argparse.Namespace(model="a folder", init="random", layers=1, mask_token_id=22, block_size=None,
                              autoregressive=False, bidirectional=False)
    assert starting_point(args, target, {}, 0)[0].rope_scaling == scaling
    assert released_shape(Preset(target, "")).rope_scaling == scaling


def test_a_table_has_no_released_form(tmp_path, capsys):
    target = tiny_target(dtype="float32")
    config = tiny_head(target, rope_scaling=TABLE)
    with checkpoint.written_beside(tmp_path / "h") as beside:
        checkpoint.save(beside, config, random_params(head_shapes(config), np.random.default_rng(0)), "a test")
    assert main(["export-head", str(tmp_path / "h"), str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'h'}: " in error and "table" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["h"]
