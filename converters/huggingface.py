"""Hugging Face configs to ours and back.

Every field that changes what a model computes is read, or refused by name where it asks for what is not computed here.
The rest is known to change nothing (`HARMLESS`), or the user is told (`unknown_fields`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.fields import Fields, naming
from converters.rope import PLACES, TOP_LEVEL, Rope, read_rope, rope_scaling_fields, unknown_rope_fields
from converters.safetensors_folder import stored_dtype
from jetspec_jax.config import (
    EPS_LIMITS,
    FLOAT_DTYPES,
    MAX_EXPERTS,
    MAX_LAYERS,
    HeadConfig,
    TargetConfig,
    is_integer,
)
from jetspec_jax.errors import JetSpecError, shown
from jetspec_jax.files import local_path, read_json

MODEL_TYPES = ("qwen3", "qwen3_moe", "llama")
DEFAULT_HEAD_DIM = {"qwen3": 128}  # the others derive it from the hidden size

SHARED_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias", "dtype", "torch_dtype", "layer_types",
    "sliding_window", "max_position_embeddings", "eos_token_id", "tie_word_embeddings", *PLACES, *TOP_LEVEL)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
                 "decoder_sparse_step", "mlp_only_layers")
HEAD_FIELDS = ("block_size", "num_target_layers", "dflash_config", "causal_head", "causal", "auto_map",
               "accept_lengths")
DFLASH_FIELDS = ("target_layer_ids", "mask_token_id", "causal_head", "causal")
# Features that are not computed here, with the values besides null that leave them out.
INACTIVE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "use_sliding_window": (False,), "mlp_bias": (False,), "attention_chunk_size": (),
    "attn_temperature_tuning": (False, 0), "attn_output_gate": (False,), "attention_multiplier": (), "clip_qkv": (),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "embedding_multiplier": (1,), "logit_scale": (1,),
    "logits_scaling": (1,), "residual_multiplier": (1,), "no_rope_layers": ([],), "rope_interleave": (False,),
    "rope_interleaved": (False,), "rotary_pct": (1,), "is_causal": (True,), "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},), "per_layer_config": ({},),
    "quantization_config": ({},), "compression_config": ({},)}
REMEDIES = dict.fromkeys(("quantization_config", "compression_config"),
                         ": quantised checkpoints must be dequantised first")
# Training, bookkeeping, the text around the model; pretraining_tp cuts products into parts and sums them.
HARMLESS = (
    "_attn_implementation", "_flash_attn_2_enabled", "_name_or_path", "architectures", "attention_dropout",
    "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cls_token_id", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_decoder",
    "label2id", "length_penalty", "max_length", "max_sequence_length", "max_window_layers", "min_length",
    "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "router_aux_loss_coef", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_last_hidden_states", "tokenizer_class", "top_k",
    "top_p", "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache")


def read_target_config(folder: Path) -> TargetConfig:
    """The shape of a Hugging Face target from its config.json (and generation_config.json for the EOS ids).

    Raises:
        JetSpecError: an architecture or a feature that `Target` does not compute, or a field that makes no sense.
    """
    config = _read(folder)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise JetSpecError(f"{config.file}: model_type {shown(model_type)} is not supported; supported are "
                           f"{', '.join(MODEL_TYPES)}")
    rope = read_rope(config)
    fields: dict[str, Any] = {
        **_transformer_fields(config, model_type, rope), **_expert_fields(config, model_type),
        "qk_norm": model_type != "llama", "tie_embeddings": config.flag("tie_word_embeddings", False),
        "max_positions": rope.context_limit(config.integer("max_position_embeddings"))}
    fields["eos_token_ids"] = _end_tokens(folder, config, fields["vocab_size"])
    with naming(config.file):
        return TargetConfig(**fields)


def read_head_config(folder: Path) -> HeadConfig:
    """The shape of a released JetSpec or DFlash head from its config.json.

    Raises:
        JetSpecError: no head, a feature that `DraftHead` does not compute, or a field that makes no sense.
    """
    config = _read(folder)
    if not isinstance(config.get("dflash_config"), dict):
        raise JetSpecError(f"{config.file} has no dflash_config: it does not describe a JetSpec or DFlash draft head")
    if config.get("model_type", "qwen3") != "qwen3":
        raise config.error("model_type", "of a head must be 'qwen3'")
    dflash = _dflash(config)
    if dflash.get("dflash_config.target_layer_ids") is None:
        raise JetSpecError(f"{config.file}: dflash_config lacks 'target_layer_ids', the layers of the target that the "
                           "head reads: add those that it was trained with")
    for name in ("mask_token_id", "target_layer_ids", "block_size", "num_target_layers"):
        above, inside = config.get(name), dflash.get(f"dflash_config.{name}")
        if above is not None and inside is not None and above != inside:
            raise JetSpecError(f"{config.file}: {name} {shown(above)} and dflash_config.{name} {shown(inside)} "
                               "contradict each other")
    flags = {place.flag(name, False) for place in (config, dflash) for name in place.values
             if name.removeprefix("dflash_config.") in ("causal_head", "causal") and place.get(name) is not None}
    if len(flags) > 1:
        raise JetSpecError(f"{config.file}: causal_head and causal contradict each other")
    fields = {
        **_transformer_fields(config, "qwen3", read_rope(config)), "block_size": config.integer("block_size"),
        "target_layer_ids": tuple(dflash.integers("dflash_config.target_layer_ids")),
        "num_target_layers": config.integer("num_target_layers", most=MAX_LAYERS), "causal": True in flags,
        "mask_token_id": dflash.integer("dflash_config.mask_token_id", least=0),
        "accept_lengths": config.get("accept_lengths", ())}
    with naming(config.file):
        return HeadConfig(**fields)


def released_head_config(config: HeadConfig) -> dict[str, Any]:
    """The config.json of a head in the released format; `read_head_config` reads it back.

    Raises:
        JetSpecError: see `rope_scaling_fields`.
    """
    known = {"accept_lengths": list(config.accept_lengths)} if config.accept_lengths else {}  # our own field
    return {
        **known, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0, "block_size": config.block_size,
        "dflash_config": {"causal_head": config.causal, "mask_token_id": config.mask_token_id,
                          "target_layer_ids": list(config.target_layer_ids)},
        "dtype": config.dtype, "head_dim": config.head_dim, "hidden_act": "silu", "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "layer_types": ["full_attention"] * config.num_layers,
        "num_attention_heads": config.num_heads, "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads, "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps, "rope_scaling": rope_scaling_fields(config.rope_scaling),
        "rope_theta": config.rope_theta, "tie_word_embeddings": False, "vocab_size": config.vocab_size}


def unknown_fields(folder: Path, kind: str) -> list[str]:
    """Names of the fields in the config.json of a "target" or "head" that are neither read nor known."""
    config = Fields(folder / "config.json", read_json(folder / "config.json"))
    known = {*SHARED_FIELDS, *INACTIVE, *HARMLESS}
    known.update(HEAD_FIELDS if kind == "head" else EXPERT_FIELDS if config.get("model_type") == "qwen3_moe" else ())
    unknown = [name for name in config.values if name not in known and config.get(name) is not None]
    inside = [] if kind == "target" else [name for name, value in _dflash(config).values.items()
                                          if value is not None and name.split(".", 1)[1] not in DFLASH_FIELDS]
    return unknown + inside + unknown_rope_fields(config)


def _read(folder: Path) -> Fields:
    """The config.json of a folder, without features that are not computed here."""
    if not folder.is_dir():
        raise JetSpecError(f"{folder} is no folder with a config.json and safetensors files")
    config = Fields(folder / "config.json", read_json(folder / "config.json"))
    config.refuse(INACTIVE, REMEDIES)
    # Llama's own code has no such switch, and Qwen3's is off unless the file turns it on.
    windowed = config.get("sliding_window") is not None and config.get("use_sliding_window") is None
    if windowed and config.get("model_type") == "llama":
        raise JetSpecError(f"{config.file}: sliding_window {shown(config.get('sliding_window'))} is not supported: "
                           "here every token sees all before it; set it to null if the model was trained so")
    return config


def _dflash(config: Fields) -> Fields:
    inside = config.within("dflash_config")
    return Fields(config.file, {f"dflash_config.{name}": value for name, value in inside.items()})


def _transformer_fields(config: Fields, model_type: str, rope: Rope) -> dict[str, Any]:
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    if config.get("head_dim") is None and model_type not in DEFAULT_HEAD_DIM and hidden % heads:
        raise JetSpecError(f"{config.file} lacks 'head_dim', and hidden_size {hidden} is not a multiple of "
                           f"num_attention_heads {heads}")
    # Without a dtype in the config, the stored tensors decide.
    dtype = config.get("dtype", config.get("torch_dtype"))
    dtype = stored_dtype(config.file.parent) if dtype is None else dtype
    if dtype not in FLOAT_DTYPES:
        raise JetSpecError(f"{config.file}: dtype {shown(dtype)} is not one of {', '.join(FLOAT_DTYPES)}")
    _check_layer_types(config, layers)
    bias = config.flag("attention_bias", False)
    return {
        "vocab_size": config.integer("vocab_size"), "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size"), "num_layers": layers, "num_heads": heads,
        "num_kv_heads": config.integer("num_key_value_heads", heads),
        "head_dim": config.integer("head_dim", DEFAULT_HEAD_DIM.get(model_type, hidden // heads)),
        "rope_theta": rope.theta, "rope_scaling": rope.scaling,
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6, EPS_LIMITS), "qkv_bias": bias, "out_bias": bias,
        "dtype": dtype}


def _check_layer_types(config: Fields, layers: int) -> None:
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list):
        raise config.error("layer_types", "must be a list")
    for kind in kinds:
        if kind != "full_attention":
            raise JetSpecError(f"{config.file}: layer_types has {shown(kind)}, which is not supported, only "
                               "'full_attention' is")
    if len(kinds) != layers:
        raise JetSpecError(f"{config.file}: layer_types has {len(kinds)} entries for num_hidden_layers {layers}")


def _expert_fields(config: Fields, model_type: str) -> dict[str, Any]:
    """What a mixture of experts adds."""
    if model_type != "qwen3_moe":
        return {}
    layers, sparse_step = config.integer("num_hidden_layers", most=MAX_LAYERS), config.integer("decoder_sparse_step", 1)
    dense = set(config.integers("mlp_only_layers"))
    newer, older = config.get("num_local_experts"), config.get("num_experts")
    if newer is not None and older is not None and newer != older:
        raise JetSpecError(f"{config.file}: num_local_experts {shown(newer)} and num_experts {shown(older)} contradict "
                           "each other")
    count = "num_experts" if newer is None else "num_local_experts"
    return {"num_experts": config.integer(count, most=MAX_EXPERTS),
            "num_experts_per_tok": config.integer("num_experts_per_tok"),
            "moe_intermediate_size": config.integer("moe_intermediate_size"),
            "norm_topk_prob": config.flag("norm_topk_prob", False),
            "dense_layers": tuple(i for i in range(layers) if i in dense or (i + 1) % sparse_step)}


def _end_tokens(folder: Path, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """The EOS ids of generation_config.json, or of config.json where that has none."""
    generation = folder / "generation_config.json"
    sources = [Fields(generation, read_json(generation))] if local_path(generation) else []
    found = []
    for source in (*sources, config):
        value = source.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        if not all(is_integer(i) and 0 <= i < vocab_size for i in ids):
            raise source.error("eos_token_id", f"must be token ids from 0 to {vocab_size - 1}")
        if source.get("eos_token_id") is not None:
            found.append(tuple(dict.fromkeys(ids)))
    return found[0] if found else ()
