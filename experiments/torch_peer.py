"""The same target in transformers on torch, to compare with (extra `parity`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.assemble import take_apart
from converters.names import target_slots
from converters.rope import rope_scaling_fields
from jetspec_jax.config import TargetConfig
from jetspec_jax.errors import JetSpecError
from jetspec_jax.machine import cores
from jetspec_jax.pair import Pair
from jetspec_jax.tiles import from_tiles


def torch_model(pair: Pair) -> tuple[Any, Callable[..., list[int]]]:
    """A transformers model with the pair's weights, and its greedy `generate(model, ids, tokens, ...)`.

    It runs where JAX runs: in float32 on a CPU, in the pair's dtype on a GPU.

    Raises:
        JetSpecError: torch is not installed, or sees no GPU where JAX does.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise JetSpecError("this comparison needs torch: pip install -e '.[parity]'") from error
    torch.set_num_threads(cores())
    config, params = from_tiles(pair.target_config, pair.params.target)
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise JetSpecError("JAX decodes on a GPU that this torch does not see: install torch with CUDA, or set "
                           "JAX_PLATFORMS=cpu to compare on the CPU")
    kind = "Qwen3Moe" if config.num_experts else "Qwen3" if config.qk_norm else "Llama"
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**huggingface_fields(config)))
    weights = {name: torch.from_numpy(np.array(value, np.float32))
               for name, value in take_apart(params, target_slots(config, fused_experts=True))}
    model.load_state_dict(weights, strict=not config.tie_embeddings)
    model.eval().to("cuda" if on_gpu else "cpu")
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32, as ours are
        parameter.data = parameter.data.to(getattr(torch, config.dtype) if on_gpu else torch.float32)

    def generate(model: Any, ids: list[int], tokens: int, **options: Any) -> list[int]:
        prompt = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
                                    min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
                                    **options)
        return answer[0, len(ids):].tolist()

    return model, generate


def save_huggingface(pair: Pair, folder: Path) -> None:
    """Writes the pair's target as transformers loads it, with its tokenizer.

    Raises:
        JetSpecError: see `torch_model`; or the target has no tokenizer.
    """
    if pair.tokenizer is None:
        raise JetSpecError("this target has no tokenizer, and programs that start from its files need one")
    torch_model(pair)[0].save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)


def huggingface_fields(config: TargetConfig) -> dict[str, Any]:
    """A target's shape in the words of a transformers config."""
    experts = {"num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
               "moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob,
               "mlp_only_layers": list(config.dense_layers)} if config.num_experts else {}
    return {**experts, "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim, "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta,
                                **(rope_scaling_fields(config.rope_scaling) or {})},
            "max_position_embeddings": config.max_positions, "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": config.qkv_bias}
