"""GGUF files: weights dequantised to float, and the byte-level BPE tokenizer that travels inside."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from converters.names import gguf_name, target_slots
from jetspec_jax.checkpoint import first_line
from jetspec_jax.config import TargetConfig
from jetspec_jax.errors import JetSpecError

ARCHITECTURES = ("llama", "qwen3")
# How Qwen2 and Qwen3 split text before byte-level BPE.
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                 r"|\s+(?!\S)|\s+")
CONTROL, USER_DEFINED = 3, 4


class GGUFFile:
    """A `TensorSource` over a GGUF file, under Hugging Face names."""

    def __init__(self, file: Path) -> None:
        import gguf

        self.label = str(file)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._reader = gguf.GGUFReader(file)
        except OSError as error:
            raise JetSpecError(f"cannot read {file}: {error.strerror or error}") from error
        except Exception as error:  # the reader meets damage as whatever numpy or struct raise
            raise JetSpecError(f"{file} is not a sound GGUF file (truncated download?): {error}") from error
        try:
            self.config = self._read_config()
        except JetSpecError:
            raise
        except Exception as error:  # a list or a text where a number belongs, a tensor without a second axis
            raise JetSpecError(f"{file}: its metadata is not that of a supported model: {error}") from error
        names = {gguf_name(part.name): part.name for slot in target_slots(self.config) for part in slot.parts}
        self._tensors: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            name = names.get(tensor.name, tensor.name)
            if name in self._tensors:
                raise JetSpecError(f"{file} stores tensor {tensor.name} twice")
            self._tensors[name] = tensor
        self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        except Exception as error:  # unknown quantisation, or data of the wrong size
            raise JetSpecError(f"{self.label}: cannot dequantise tensor {tensor.name}: {error}") from error
        # GGUF stores Llama's queries and keys for interleaved rotary pairs; ours are half-split.
        if self.field("general.architecture") == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config.num_heads if "q_proj" in name else self.config.num_kv_heads
            values = values.reshape(heads, self.config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        return values

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value, or `default`; without a default its absence is an error."""
        found = self._reader.get_field(name)
        if found is None:
            if default is None:
                raise JetSpecError(f"{self.label} lacks the metadata field {name!r}")
            return default
        return found.contents()

    def _read_config(self) -> TargetConfig:
        kind = self.field("general.architecture")
        if kind not in ARCHITECTURES:
            raise JetSpecError(f"{self.label}: architecture {kind!r} is not supported; supported are "
                               f"{', '.join(ARCHITECTURES)}")
        for name in self._reader.fields:
            if name.startswith(f"{kind}.rope.scaling") and self.field(f"{kind}.rope.scaling.type", "none") != "none":
                raise JetSpecError(f"{self.label}: scaled rotary embeddings are not supported")
        heads, hidden = self.field(f"{kind}.attention.head_count"), self.field(f"{kind}.embedding_length")
        embedding = {tensor.name: tensor for tensor in self._reader.tensors}.get("token_embd.weight")
        if embedding is None:
            raise JetSpecError(f"{self.label} lacks the tensor token_embd.weight")
        eos = self.field("tokenizer.ggml.eos_token_id", -1)
        return TargetConfig(
            vocab_size=int(embedding.shape[1]), hidden_size=hidden,
            intermediate_size=self.field(f"{kind}.feed_forward_length"), num_layers=self.field(f"{kind}.block_count"),
            num_heads=heads, num_kv_heads=self.field(f"{kind}.attention.head_count_kv", heads),
            head_dim=self.field(f"{kind}.attention.key_length", hidden // max(heads, 1)),
            rope_theta=float(self.field(f"{kind}.rope.freq_base", 10000.0)),
            # Stored as float32: 1e-5 comes back as 9.999999747e-06.
            rms_norm_eps=float(np.format_float_positional(
                np.float32(self.field(f"{kind}.attention.layer_norm_rms_epsilon")))),
            qk_norm=kind == "qwen3", dtype="float32", max_positions=self.field(f"{kind}.context_length"),
            tie_embeddings=all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            eos_token_ids=() if eos < 0 else (eos,))

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer and chat template as Hugging Face files; a file without a tokenizer writes nothing.

        Raises:
            JetSpecError: a tokenizer that is not byte-level BPE with a known pre-tokenizer, or a damaged one.
        """
        if self._reader.get_field("tokenizer.ggml.model") is None:
            return
        try:
            tokenizer = self._tokenizer()
        except (JetSpecError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust library panics at a merge of unknown tokens, which is no Exception
            raise JetSpecError(f"{self.label}: its tokenizer is damaged: {first_line(error)}") from error
        tokenizer.save_pretrained(folder)

    def _tokenizer(self) -> Any:
        """The Hugging Face tokenizer that the metadata describes."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        qwen2 = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
        splits: dict[str, list[Any]] = {
            "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
            "qwen2": [qwen2, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
            "gpt-2": [byte_level]}
        kind, pre = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or pre not in splits:
            raise JetSpecError(f"{self.label}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
                               f"supported is gpt2 with {', '.join(splits)}; convert the model's Hugging Face folder "
                               "instead")
        tokens, types = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                      for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)
                              for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED])
        named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
                 "unk_token": "unknown_token_id"}
        special = {ours: tokens[self.field(f"tokenizer.ggml.{theirs}")] for ours, theirs in named.items()
                   if self.field(f"tokenizer.ggml.{theirs}", -1) >= 0}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
        template = self.field("tokenizer.chat_template", "")
        if template:
            fast.chat_template = template
        return fast
