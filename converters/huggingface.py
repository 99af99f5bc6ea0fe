"""Hugging Face configs to ours and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.safetensors_folder import read_json, stored_dtype
from jetspec_jax.config import FLOAT_DTYPES, HeadConfig, TargetConfig, default_target_layer_ids, is_integer
from jetspec_jax.errors import JetSpecError

DEFAULT_HEAD_DIM = {"qwen3": 128}  # Llama derives it from the hidden size


def read_target_config(folder: Path) -> TargetConfig:
    """The shape of a Hugging Face target from its config.json (and generation_config.json for the EOS ids).

    Raises:
        JetSpecError: an architecture or a feature that `Target` does not compute.
    """
    file = folder / "config.json"
    config = read_json(file)
    model_type = config.get("model_type")
    if model_type not in ("qwen3", "qwen3_moe", "llama"):
        raise JetSpecError(f"{file}: model_type {model_type!r} is not supported; supported are qwen3, qwen3_moe and "
                           "llama")
    _refuse_unknown_features(file, config)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    bias = bool(config.get("attention_bias", False))
    return TargetConfig(
        **_transformer_fields(file, config, model_type), **_expert_fields(file, config, model_type),
        qk_norm=model_type != "llama", qkv_bias=bias, out_bias=bias,
        max_positions=_get(file, config, "max_position_embeddings"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_eos(file, eos if eos is not None else config.get("eos_token_id")))


def read_head_config(folder: Path) -> HeadConfig:
    """The shape of a released JetSpec or DFlash head from its config.json."""
    file = folder / "config.json"
    config = read_json(file)
    dflash = config.get("dflash_config")
    if not isinstance(dflash, dict):
        raise JetSpecError(f"{file} has no dflash_config: it does not describe a JetSpec or DFlash draft head")
    _refuse_unknown_features(file, config)
    bias = bool(config.get("attention_bias", False))
    fields, target_layers = _transformer_fields(file, config, "qwen3"), _get(file, config, "num_target_layers")
    layer_ids = dflash.get("target_layer_ids", list(default_target_layer_ids(target_layers, fields["num_layers"])))
    if not isinstance(layer_ids, list):
        raise JetSpecError(f"{file}: target_layer_ids must be a list, not {layer_ids!r}")
    flags = [dflash[name] for name in ("causal_head", "causal") if name in dflash] or [False]
    if not all(isinstance(flag, bool) for flag in flags) or len(set(flags)) > 1:
        raise JetSpecError(f"{file}: causal_head must be true or false, and agree with causal, where that is given too")
    return HeadConfig(
        **fields, qkv_bias=bias, out_bias=bias, block_size=_get(file, config, "block_size"),
        target_layer_ids=tuple(layer_ids),
        num_target_layers=target_layers, mask_token_id=_get(file, dflash, "mask_token_id"), causal=flags[0])


def released_head_config(config: HeadConfig) -> dict[str, Any]:
    """The config.json of a head in the released format; `read_head_config` reads it back."""
    return {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0, "block_size": config.block_size,
        "dflash_config": {"causal_head": config.causal, "mask_token_id": config.mask_token_id,
                          "target_layer_ids": list(config.target_layer_ids)},
        "dtype": config.dtype, "head_dim": config.head_dim, "hidden_act": "silu", "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "layer_types": ["full_attention"] * config.num_layers,
        "num_attention_heads": config.num_heads, "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads, "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps, "rope_scaling": None, "rope_theta": config.rope_theta,
        "tie_word_embeddings": False, "vocab_size": config.vocab_size}


def _transformer_fields(file: Path, config: dict[str, Any], model_type: str) -> dict[str, Any]:
    heads, hidden = _get(file, config, "num_attention_heads"), _get(file, config, "hidden_size")
    head_dim = config.get("head_dim") or DEFAULT_HEAD_DIM.get(model_type) or hidden // max(heads, 1)
    # Without a dtype in the config, the stored tensors decide.
    dtype = str(config.get("dtype") or config.get("torch_dtype") or stored_dtype(file.parent))
    if dtype not in FLOAT_DTYPES:
        raise JetSpecError(f"{file}: dtype {dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
    rope = config.get("rope_parameters") or {}
    return {
        "vocab_size": _get(file, config, "vocab_size"), "hidden_size": hidden,
        "intermediate_size": _get(file, config, "intermediate_size"),
        "num_layers": _get(file, config, "num_hidden_layers"), "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads, "head_dim": head_dim,
        "rope_theta": _number(file, "rope_theta", rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rms_norm_eps": _number(file, "rms_norm_eps", config.get("rms_norm_eps", 1e-6)), "dtype": dtype}


def _expert_fields(file: Path, config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """What a mixture of experts adds."""
    if model_type != "qwen3_moe":
        return {}
    layers, sparse_step = _get(file, config, "num_hidden_layers"), config.get("decoder_sparse_step", 1)
    dense, normalised = config.get("mlp_only_layers") or [], config.get("norm_topk_prob", False)
    if not is_integer(sparse_step) or sparse_step < 1:
        raise JetSpecError(f"{file}: decoder_sparse_step must be an integer of at least 1, not {sparse_step!r}")
    if not isinstance(dense, list) or not all(is_integer(i) for i in dense):
        raise JetSpecError(f"{file}: mlp_only_layers must be a list of layers, not {dense!r}")
    if not isinstance(normalised, bool):
        raise JetSpecError(f"{file}: norm_topk_prob must be true or false, not {normalised!r}")
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"  # newer files have the first
    return {"num_experts": _get(file, config, count), "num_experts_per_tok": _get(file, config, "num_experts_per_tok"),
            "moe_intermediate_size": _get(file, config, "moe_intermediate_size"), "norm_topk_prob": normalised,
            "dense_layers": tuple(i for i in range(layers) if i in dense or (i + 1) % sparse_step)}


def _refuse_unknown_features(file: Path, config: dict[str, Any]) -> None:
    """A feature that changes the function but is not computed here must not be dropped silently."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if rope is not None and not isinstance(rope, dict):
            raise JetSpecError(f"{file}: {field} should be an object, not {rope!r}")
        kind = (rope or {}).get("rope_type") or (rope or {}).get("type") or "default"
        if kind != "default":
            raise JetSpecError(f"{file}: {field} of type {kind!r} is not supported, only plain rotary embeddings are")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise JetSpecError(f"{file}: hidden_act {activation!r} is not supported, only silu is")
    for switch in ("use_sliding_window", "mlp_bias"):
        if config.get(switch):
            raise JetSpecError(f"{file}: {switch} is not supported")
    if config.get("quantization_config"):
        raise JetSpecError(f"{file}: quantised checkpoints must be dequantised first")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise JetSpecError(f"{file}: layer_types must be a list, not {kinds!r}")
    if "sliding_attention" in kinds:
        raise JetSpecError(f"{file}: sliding attention layers are not supported")


def _get(file: Path, config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if value is None:
        raise JetSpecError(f"{file} lacks {name!r}")
    if not is_integer(value):
        raise JetSpecError(f"{file}: {name} must be an integer, not {value!r}")
    return value


def _number(file: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise JetSpecError(f"{file}: {name} must be a number, not {value!r}")
    return float(value)


def _eos(file: Path, value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(is_integer(i) and i >= 0 for i in ids):
        raise JetSpecError(f"{file}: eos_token_id {value!r} is neither a token id nor a list of them")
    return tuple(ids)
