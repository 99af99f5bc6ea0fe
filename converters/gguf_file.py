"""GGUF files: weights dequantised to float, and the byte-level BPE tokenizer that travels inside."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from converters.fields import Fields, is_one_of, naming, shown
from converters.names import gguf_name, target_slots
from converters.rope import REASONS, Rope, yarn_attention_factor
from jetspec_jax.checkpoint import first_line
from jetspec_jax.config import EPS_LIMITS, THETA_LIMITS, RopeScaling, TargetConfig
from jetspec_jax.errors import JetSpecError

ARCHITECTURES = ("llama", "qwen3")
# How models split text before byte-level BPE; Llama 3 takes digits in groups of three, Qwen2 and Qwen3 one by one.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
QWEN2_PATTERN, LLAMA3_PATTERN = SPLIT.replace("DIGITS", r"\p{N}"), SPLIT.replace("DIGITS", r"\p{N}{1,3}")
CONTROL, USER_DEFINED = 3, 4
ROPE_TABLE = "rope_freqs.weight"

# What follows lacks the name of the architecture before each field.
READ = ("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
# Features that are not computed here, with the values that leave them out.
INACTIVE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention.sliding_window", "attention.sliding_window_pattern", "attention.scale",
                     "attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_scale",
                     "attention.temperature_length", "attention.shared_kv_layers", "attn_logit_softcapping",
                     "final_logit_softcapping", "expert_count", "expert_used_count", "expert_shared_count",
                     "nextn_predict_layers", "n_deepstack_layers", "pooling_type", "rope.scaling.alpha",
                     "rope.scaling.yarn_log_multiplier"), (0, False, [])),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"), (0, 1)),
    **dict.fromkeys(("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"), (1,)),
    "attention.causal": (True,), "use_parallel_residual": (False,), "swin_norm": (False,),
    "rope.dimension_sections": ([], [0, 0, 0, 0])}
HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout", "expert_feed_forward_length",
            "expert_shared_feed_forward_length", "leading_dense_block_count", "embedding_length_out")
# The fields that a type of rope scaling takes; and all of them, with the values that say nothing elsewhere.
SCALINGS: dict[str, tuple[str, ...]] = {
    "none": (), "linear": ("factor",), "yarn": ("factor", "attn_factor", "yarn_beta_fast", "yarn_beta_slow")}
SCALING_FIELDS: dict[str, tuple[Any, ...]] = {
    "factor": (0, 1), "attn_factor": (1,), "yarn_beta_fast": (), "yarn_beta_slow": ()}
# Outside the architecture: the tokenizer's, and bookkeeping by the first part of the name.
TOKENIZER = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
             "eom_token_id", "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token")
TOKENIZER_HARMLESS = (  # they speak of other kinds of tokenizers, of pairs of texts, or of filling gaps in code
    "scores", "token_type_count", "add_space_prefix", "remove_extra_whitespaces", "add_sep_token",
    "seperator_token_id", "cls_token_id", "mask_token_id", "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id",
    "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id", "prefix_token_id", "suffix_token_id",
    "middle_token_id")
BOOKKEEPING = ("GGUF", "general", "quantize", "imatrix", "split")
CHAT_TEMPLATE = "tokenizer.chat_template"
LISTS = ("tokenizer.chat_templates", *(f"tokenizer.ggml.{name}" for name in (
    "tokens", "token_type", "merges", "scores", "precompiled_charsmap")))  # long ones; see `GGUFFile._list`


class GGUFFile:
    """A `TensorSource` over a GGUF file, under Hugging Face names.

    Attributes:
        config: the shape of the target.
        unknown_fields: names of metadata that is neither read nor known to change nothing.
    """

    def __init__(self, file: Path) -> None:
        self.label, self._file = str(file), file
        self._reader = _open(file)
        try:
            self._fields, self._arch = self._metadata()
            self.config = self._read_config()
        except JetSpecError:
            raise
        except Exception as error:  # a text that is no UTF-8, a tensor without a second axis
            raise JetSpecError(f"{file}: its metadata is not that of a supported model: {error}") from error
        self.unknown_fields = [name for name in self._reader.fields if not self._is_known(name)]
        names = {gguf_name(part.name): part.name for slot in target_slots(self.config) for part in slot.parts}
        self._tensors: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            name = names.get(tensor.name, tensor.name)
            if name in self._tensors:
                raise JetSpecError(f"{file} stores tensor {tensor.name} twice")
            if name != ROPE_TABLE:
                self._tensors[name] = tensor
        self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        values = self._dequantized(self._tensors[name]).reshape(self.shapes[name])
        # GGUF stores Llama's queries and keys for interleaved rotary pairs; ours are half-split.
        if self._arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config.num_heads if "q_proj" in name else self.config.num_kv_heads
            values = values.reshape(heads, self.config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        return values

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

    def _dequantized(self, tensor: Any) -> np.ndarray:
        from gguf.quants import dequantize

        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:  # unknown quantisation, or data of the wrong size
            raise JetSpecError(f"{self.label}: cannot dequantise tensor {tensor.name}: {error}") from error

    def _metadata(self) -> tuple[Fields, str]:
        """The fields that speak of the model, and its architecture. What is long stays in the file: see `_list`."""
        found = self._reader.get_field("general.architecture")
        arch = None if found is None else found.contents()
        if arch not in ARCHITECTURES:
            raise JetSpecError(f"{self.label}: general.architecture {shown(arch)} is not supported; supported are "
                               f"{', '.join(ARCHITECTURES)}")
        ours = (f"{arch}.", "tokenizer.ggml.", CHAT_TEMPLATE, "general.type", "split.")
        values = {name: _value(field) for name, field in self._reader.fields.items()
                  if name.startswith(ours) and name not in LISTS}
        fields = Fields(self._file, values)
        fields.refuse({f"{arch}.{name}": inactive for name, inactive in INACTIVE.items()}, {})
        fields.refuse({"general.type": ("model",), "split.count": (0, 1)},
                      {"split.count": ": merge the parts with llama.cpp's gguf-split first"})
        return fields, arch

    def _is_known(self, name: str) -> bool:
        first, _, rest = name.partition(".")
        if first == self._arch:
            return rest in READ or rest in INACTIVE or rest in HARMLESS
        return (first in BOOKKEEPING or name.startswith(CHAT_TEMPLATE)
                or name.removeprefix("tokenizer.ggml.") in (*TOKENIZER, *TOKENIZER_HARMLESS))

    def _list(self, name: str) -> list[Any]:
        """A metadata list, which may be long."""
        found = self._reader.get_field(name)
        values = None if found is None else found.contents()
        if not isinstance(values, list):
            raise JetSpecError(f"{self.label} lacks the list {name!r}")
        return values

    def _read_config(self) -> TargetConfig:
        fields, arch = self._fields, self._arch
        heads = fields.integer(f"{arch}.attention.head_count")
        hidden = fields.integer(f"{arch}.embedding_length")
        head_dim = fields.integer(f"{arch}.attention.key_length", hidden // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if fields.integer(f"{arch}.{name}", head_dim) != head_dim:
                raise fields.error(f"{arch}.{name}", f"must be the head dimension {head_dim}")
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if "token_embd.weight" not in tensors:
            raise JetSpecError(f"{self.label} lacks the tensor token_embd.weight")
        vocab_size = int(tensors["token_embd.weight"].shape[1])
        if fields.integer(f"{arch}.vocab_size", vocab_size) != vocab_size:
            raise fields.error(f"{arch}.vocab_size", f"must be the {vocab_size} rows of token_embd.weight")
        rope = self._read_rope(tensors.get(ROPE_TABLE))
        ends = (self._token_id(f"{name}_token_id", vocab_size) for name in ("eos", "eot", "eom"))
        values: dict[str, Any] = {
            "vocab_size": vocab_size, "hidden_size": hidden, "num_heads": heads, "head_dim": head_dim,
            "num_kv_heads": fields.integer(f"{arch}.attention.head_count_kv", heads),
            "intermediate_size": fields.integer(f"{arch}.feed_forward_length"),
            "num_layers": fields.integer(f"{arch}.block_count"),
            "rope_theta": rope.theta, "rope_scaling": rope.scaling,
            "max_positions": rope.context_limit(fields.integer(f"{arch}.context_length")),
            "rms_norm_eps": fields.number(f"{arch}.attention.layer_norm_rms_epsilon", limits=EPS_LIMITS),
            "eos_token_ids": tuple(dict.fromkeys(i for i in ends if i is not None))}
        with naming(self._file):
            return TargetConfig(qk_norm=arch == "qwen3", dtype="float32", tie_embeddings="output.weight" not in tensors,
                                **values)

    def _read_rope(self, table: Any) -> Rope:
        """Rotary embeddings from the fields and from the tensor that Llama 3.1 and later have (None: there is none)."""
        fields, prefix = self._fields, f"{self._arch}.rope."
        scaling = f"{prefix}scaling."
        theta = fields.number(f"{prefix}freq_base", 10000.0, THETA_LIMITS)
        context, factor = f"{scaling}original_context_length", f"{scaling}factor"
        original = None if fields.get(context) is None else fields.integer(context)
        kind = fields.text(f"{scaling}type", "none")
        if kind not in SCALINGS:
            raise JetSpecError(f"{self.label}: {scaling}type {shown(kind)} is not supported, only "
                               f"{', '.join(SCALINGS)} are{REASONS.get(kind, '')}")
        if fields.get(f"{prefix}scale_linear", 1) not in (0, 1):  # the older name of what linear scaling is
            if fields.get(f"{scaling}type") is not None or fields.get(factor) is not None:
                raise JetSpecError(f"{self.label}: {prefix}scale_linear and {scaling}type or factor contradict each "
                                   "other")
            kind, factor = "linear", f"{prefix}scale_linear"
        for name, inactive in SCALING_FIELDS.items():
            value = fields.get(scaling + name)
            if value is not None and name not in SCALINGS[kind] and not is_one_of(value, inactive):
                typed = fields.get(f"{scaling}type") is not None
                raise JetSpecError(f"{self.label}: {scaling}{name} {shown(value)} " + (
                    f"is no field of {scaling}type {kind!r}" if typed else
                    f"is given without {scaling}type: set the one that is meant (linear or yarn)"))
        if table is not None:
            if kind != "none":
                raise JetSpecError(f"{self.label}: {kind} scaling and the tensor {ROPE_TABLE} contradict each other")
            divisors = tuple(self._dequantized(table).flatten())
            with naming(f"{self.label}: tensor {ROPE_TABLE}"):
                return Rope(theta, RopeScaling(kind="table", divisors=divisors), original)
        if kind == "none":
            return Rope(theta, None, original)
        limits = RopeScaling.LIMITS
        numbers: dict[str, Any] = {"factor": fields.number(factor, limits=limits["factor"])}
        if kind == "yarn":
            own = fields.number(f"{scaling}attn_factor", 1.0, limits["attention_factor"])
            numbers |= {"original_max_positions": fields.integer(context),
                        "beta_fast": fields.number(f"{scaling}yarn_beta_fast", 32.0, limits["beta_fast"]),
                        "beta_slow": fields.number(f"{scaling}yarn_beta_slow", 1.0, limits["beta_slow"]),
                        "truncate": True,
                        "attention_factor": own * yarn_attention_factor(numbers["factor"])}
        with naming(self._file):
            return Rope(theta, RopeScaling(kind=kind, **numbers), original)  # type: ignore[arg-type]

    def _token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id of the tokenizer; None where it is absent or -1."""
        full = f"tokenizer.ggml.{name}"
        value = self._fields.integer(full, -1, least=-1)
        if value >= vocab_size:
            raise self._fields.error(full, f"must be a token id from 0 to {vocab_size - 1}")
        return None if value < 0 else value

    def _tokenizer(self) -> Any:
        """The Hugging Face tokenizer that the metadata describes."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        def split(pattern: str) -> list[Any]:
            return [pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        splits: dict[str, list[Any]] = {
            "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
            "qwen2": split(QWEN2_PATTERN), "llama-bpe": split(LLAMA3_PATTERN), "gpt-2": [byte_level]}
        kind, pre = (self._fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        if kind != "gpt2" or pre not in splits:
            raise JetSpecError(f"{self.label}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
                               f"supported is gpt2 with {', '.join(splits)}; convert the model's Hugging Face folder "
                               "instead")
        tokens, types = self._list("tokenizer.ggml.tokens"), self._list("tokenizer.ggml.token_type")
        if len(tokens) != self.config.vocab_size:
            raise JetSpecError(f"{self.label}: tokenizer.ggml.tokens has {len(tokens)} tokens, and token_embd.weight "
                               f"{self.config.vocab_size} rows")
        merges = [tuple(merge.split(" ", 1)) for merge in self._list("tokenizer.ggml.merges")]
        # Llama 3 takes a piece of text that is a token whole, though no merges lead to it.
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
                                         ignore_merges=pre == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                      for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)
                              for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED])
        named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
                 "unk_token": "unknown_token_id"}
        ids = {ours: self._token_id(theirs, len(tokens)) for ours, theirs in named.items()}
        special = {name: tokens[i] for name, i in ids.items() if i is not None}
        self._add_ends(tokenizer, special, start_by_default=pre == "llama-bpe")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
        templates = {name.removeprefix(CHAT_TEMPLATE).lstrip(".") or "default": self._fields.text(name)
                     for name in self._fields.values if name.startswith(CHAT_TEMPLATE)}
        fast.chat_template = templates if templates.keys() - {"default"} else templates.get("default") or None
        return fast

    def _add_ends(self, tokenizer: Any, special: dict[str, str], start_by_default: bool) -> None:
        """Lets the tokenizer put its start and end tokens around a text, where the file asks for them."""
        from tokenizers import processors

        around = {}
        for name, by_default in (("bos", start_by_default), ("eos", False)):
            around[name] = ""
            if self._fields.flag(f"tokenizer.ggml.add_{name}_token", by_default):
                if f"{name}_token" not in special:
                    raise JetSpecError(f"{self.label} lacks 'tokenizer.ggml.{name}_token_id', and its tokenizer adds "
                                       "that token to every text")
                around[name] = special[f"{name}_token"]
        added = [token for token in around.values() if token]
        if added:
            one = [part for part in (around["bos"], "$0", around["eos"]) if part]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=one, pair=[*one, *(part.replace("$0", "$B") for part in one)],
                special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(added)])


def _open(file: Path) -> Any:
    """The `gguf.GGUFReader` of a file whose tensors lie where they may."""
    import gguf

    try:
        with file.open("rb") as stream:
            start = stream.read(8)
        if start[:4] == b"GGUF" and len(start) == 8 and start[4:6] == bytes(2):  # the version's upper half comes first
            raise JetSpecError(f"{file} is a big-endian GGUF file, and only little-endian ones are read: turn it with "
                               "gguf-convert-endian of the Python package gguf")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns of offsets that do not fit into 64 bits
            reader = gguf.GGUFReader(file)
        _check_layout(file, reader)
    except JetSpecError:
        raise
    except OSError as error:
        raise JetSpecError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # the reader meets damage as whatever numpy or struct raise
        raise JetSpecError(f"{file} is not a sound GGUF file (truncated download?): {first_line(error)}") from error
    return reader


def _check_layout(file: Path, reader: Any) -> None:
    """That tensors are aligned, inside the file, and apart."""
    from gguf.constants import GGML_QUANT_SIZES

    def damaged(tensor: Any, why: str) -> JetSpecError:
        return JetSpecError(f"{file} is not a sound GGUF file: tensor {tensor.name} {why}")

    spans, alignment = [], int(reader.alignment)
    for tensor in reader.tensors:
        # The reader's own numbers wrap around at 64 bits.
        offset, count = int(tensor.field.parts[-1][0]), math.prod(int(n) for n in tensor.shape)
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        end = offset + count // block * size
        if count % block:
            raise damaged(tensor, f"has {count} values, which are no whole blocks of {block}")
        if offset % alignment:
            raise damaged(tensor, f"begins at offset {offset}, which is no multiple of the alignment {alignment}")
        if int(reader.data_offset) + end > reader.data.size:
            raise damaged(tensor, f"ends at offset {end}, beyond the end of the file (truncated download?)")
        if end > offset:
            spans.append((offset, end, tensor))
    spans.sort(key=lambda span: span[:2])
    for (_, end, first), (offset, _, second) in itertools.pairwise(spans):
        if offset < end:
            raise damaged(second, f"begins at offset {offset}, inside tensor {first.name}")


def _value(field: Any) -> Any:
    """A metadata value; what is stored as float32 becomes the shortest number that rounds to it (1e-5, and not
    9.999999747e-06)."""
    from gguf.constants import GGUFValueType

    value = field.contents()
    return float(str(np.float32(value))) if field.types == [GGUFValueType.FLOAT32] else value
