"""GGUF files: weights dequantised to float, and the byte-level BPE tokenizer that travels inside."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from converters.fields import Fields, is_one_of, naming
from converters.gguf_header import GGUFTensor, read_header
from converters.names import check_counts, gguf_name, target_slots
from converters.rope import REASONS, Rope, yarn_attention_factor
from jetspec_jax.config import EPS_LIMITS, MAX_LAYERS, THETA_LIMITS, RopeScaling, TargetConfig
from jetspec_jax.errors import JetSpecError, first_line, shown
from jetspec_jax.files import cannot_read
from jetspec_jax.text import tokenizer_errors, without_advice

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
BOOKKEEPING = ("general", "quantize", "imatrix", "split")
CHAT_TEMPLATE, TEMPLATE_NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"


class GGUFFile:
    """A `TensorSource` over a GGUF file, under Hugging Face names.

    Attributes:
        config: the shape of the target.
        unknown_fields: names of metadata that is neither read nor known to change nothing.
    """

    def __init__(self, file: Path) -> None:
        self.label, self._file = str(file), file
        header = read_header(file)
        self._fields = Fields(file, header.metadata)
        self._arch = self._architecture()
        self.config = self._read_config(header.tensors)
        self.unknown_fields = [name for name in header.metadata if not self._is_known(name)]
        check_counts(self.label, self.config, len(header.tensors))
        names = {gguf_name(part.name): part.name for slot in target_slots(self.config) for part in slot.parts}
        self._tensors: dict[str, GGUFTensor] = {}
        for tensor in header.tensors.values():
            name = names.get(tensor.name, tensor.name)
            if name in self._tensors:
                raise JetSpecError(f"{file} stores tensor {tensor.name} twice")
            if name != ROPE_TABLE:
                self._tensors[name] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        values = self._dequantized(self._tensors[name])
        # GGUF stores Llama's queries and keys for interleaved rotary pairs; ours are half-split.
        if self._arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config.num_heads if "q_proj" in name else self.config.num_kv_heads
            values = values.reshape(heads, self.config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        return values

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer and chat template as Hugging Face files; a file without a tokenizer writes nothing.

        Raises:
            JetSpecError: a tokenizer that is not byte-level BPE with a known pre-tokenizer, or a damaged one.
            OSError: the files cannot be written.
        """
        if self._fields.get("tokenizer.ggml.model") is None:
            return
        with tokenizer_errors(f"{self.label}: its tokenizer is damaged"):
            tokenizer = self._tokenizer()
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the Rust library has no other kind for a full disk
            raise OSError(first_line(error)) from error

    def _dequantized(self, tensor: GGUFTensor) -> np.ndarray:
        from gguf.quants import dequantize

        try:
            stored = np.fromfile(self._file, np.uint8, tensor.size, offset=tensor.offset)
            with np.errstate(all="ignore"):  # who takes the values looks whether they are finite
                return dequantize(stored.reshape(*tensor.shape[:-1], -1), tensor.kind)
        except OSError as error:
            raise cannot_read(self._file, error) from error
        except Exception as error:  # a quantisation that the package does not know, or a file that became shorter
            raise JetSpecError(f"{self.label}: cannot dequantise tensor {tensor.name}: {first_line(error)}") from error

    def _architecture(self) -> str:
        """The architecture, which is supported, without a feature that is not."""
        arch = self._fields.get("general.architecture")
        if arch not in ARCHITECTURES:
            raise JetSpecError(f"{self.label}: general.architecture {shown(arch)} is not supported; supported are "
                               f"{', '.join(ARCHITECTURES)}")
        self._fields.refuse({f"{arch}.{name}": inactive for name, inactive in INACTIVE.items()}, {})
        self._fields.refuse({"general.type": ("model",), "split.count": (0, 1)},
                            {"split.count": ": merge the parts with llama.cpp's gguf-split first"})
        return arch

    def _is_known(self, name: str) -> bool:
        first, _, rest = name.partition(".")
        if first == self._arch:
            return rest in READ or rest in INACTIVE or rest in HARMLESS
        return (first in BOOKKEEPING or _is_template(name) or name == TEMPLATE_NAMES
                or name.removeprefix("tokenizer.ggml.") in (*TOKENIZER, *TOKENIZER_HARMLESS))

    def _list(self, name: str) -> list[Any]:
        """A list of the metadata."""
        values = self._fields.get(name)
        if not isinstance(values, list):
            raise JetSpecError(f"{self.label} lacks the list {name!r}")
        return values

    def _read_config(self, tensors: dict[str, GGUFTensor]) -> TargetConfig:
        fields, arch = self._fields, self._arch
        heads = fields.integer(f"{arch}.attention.head_count")
        hidden = fields.integer(f"{arch}.embedding_length")
        head_dim = fields.integer(f"{arch}.attention.key_length", hidden // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if fields.integer(f"{arch}.{name}", head_dim) != head_dim:
                raise fields.error(f"{arch}.{name}", f"must be the head dimension {head_dim}")
        if "token_embd.weight" not in tensors:
            raise JetSpecError(f"{self.label} lacks the tensor token_embd.weight")
        vocab_size = tensors["token_embd.weight"].shape[0]
        if fields.integer(f"{arch}.vocab_size", vocab_size) != vocab_size:
            raise fields.error(f"{arch}.vocab_size", f"must be the {vocab_size} rows of token_embd.weight")
        rope = self._read_rope(tensors.get(ROPE_TABLE), head_dim)
        ends = (self._token_id(f"{name}_token_id", vocab_size) for name in ("eos", "eot", "eom"))
        values: dict[str, Any] = {
            "vocab_size": vocab_size, "hidden_size": hidden, "num_heads": heads, "head_dim": head_dim,
            "num_kv_heads": fields.integer(f"{arch}.attention.head_count_kv", heads),
            "intermediate_size": fields.integer(f"{arch}.feed_forward_length"),
            "num_layers": fields.integer(f"{arch}.block_count", most=MAX_LAYERS),
            "rope_theta": rope.theta, "rope_scaling": rope.scaling,
            "max_positions": rope.context_limit(fields.integer(f"{arch}.context_length")),
            "rms_norm_eps": fields.number(f"{arch}.attention.layer_norm_rms_epsilon", limits=EPS_LIMITS),
            "eos_token_ids": tuple(dict.fromkeys(i for i in ends if i is not None))}
        with naming(self._file):
            return TargetConfig(qk_norm=arch == "qwen3", dtype="float32", tie_embeddings="output.weight" not in tensors,
                                **values)

    def _read_rope(self, table: GGUFTensor | None, head_dim: int) -> Rope:
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
            count = math.prod(table.shape)
            if count != head_dim // 2:
                raise JetSpecError(f"{self.label}: tensor {ROPE_TABLE} has {count} divisors, and head_dim {head_dim} "
                                   f"needs {head_dim // 2}")
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

        with without_advice():
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
            raise JetSpecError(f"{self.label}: tokenizer {shown(kind)} with pre-tokenizer {shown(pre)} is not "
                               f"supported; supported is gpt2 with {', '.join(splits)}; convert the model's Hugging "
                               "Face folder instead")
        tokens, types = self._list("tokenizer.ggml.tokens"), self._list("tokenizer.ggml.token_type")
        if len(tokens) != self.config.vocab_size:
            raise JetSpecError(f"{self.label}: tokenizer.ggml.tokens has {len(tokens)} tokens, and token_embd.weight "
                               f"{self.config.vocab_size} rows")
        merges = [tuple(merge.split(" ", 1)) for merge in self._list("tokenizer.ggml.merges")]
        known = set(tokens)
        for merge in merges:  # the Rust library would panic, at length
            if len(merge) < 2 or not known.issuperset((*merge, "".join(merge))):
                raise JetSpecError(f"{self.label}: its tokenizer is damaged: the merge {shown(' '.join(merge))} makes "
                                   "no token of two others")
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
                     for name in self._fields.values if _is_template(name)}
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


def _is_template(name: str) -> bool:
    return name == CHAT_TEMPLATE or name.startswith(f"{CHAT_TEMPLATE}.")
