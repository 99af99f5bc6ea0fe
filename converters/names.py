"""The name tables: which tensors of a file make up which parameter. Import, export and every check read them."""

from __future__ import annotations

from dataclasses import dataclass

from jetspec_jax.config import HeadConfig, TargetConfig, TransformerConfig
from jetspec_jax.errors import JetSpecError


@dataclass(frozen=True)
class Part:
    """One tensor of a file: its name and its shape there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One parameter of ours.

    Attributes:
        path: keys below "params".
        parts: the tensors it is made of, side by side along the last axis.
        transposed: the file stores [..., out, in], we store [..., in, out].
        stacked: 0, or how many rows of a new first axis; the parts of each row come one row after another.
    """

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    transposed: bool = False
    stacked: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        row = self.parts[:len(self.parts) // max(self.stacked, 1)]
        shapes = [(*part.shape[:-2], *part.shape[:-3:-1]) if self.transposed else part.shape for part in row]
        return (*((self.stacked,) if self.stacked else ()), *shapes[0][:-1], sum(shape[-1] for shape in shapes))


def check_counts(label: str, config: TransformerConfig, stored: int, fused_experts: bool = False) -> None:
    """Compares the counts of a config with what a file holds, before the tables below make a row for each.

    Args:
        label: the file, in messages.
        stored: the file's tensors.
        fused_experts: see `target_slots`.

    Raises:
        JetSpecError: more layers, or more experts, than there are tensors.
    """
    layers, experts = config.num_layers, 0
    if isinstance(config, TargetConfig) and not fused_experts:
        experts = config.num_experts * (layers - len(set(config.dense_layers)))
    if max(layers, experts) > stored:
        what = f"{experts} experts in {layers} layers" if experts else f"{layers} layers"
        raise JetSpecError(f"{label}: the config asks for {what}, and there are {stored} tensors in all: is it "
                           "complete, and does its config fit?")


def target_slots(config: TargetConfig, fused_experts: bool = False) -> list[Slot]:
    """Hugging Face Qwen3ForCausalLM / LlamaForCausalLM / Qwen3MoeForCausalLM.

    Args:
        fused_experts: the file stores a layer's experts as one tensor a projection, not each by itself.
    """
    d, v = config.hidden_size, config.vocab_size
    slots = [Slot(("embedding",), (Part("model.embed_tokens.weight", (v, d)),))]
    for i in range(config.num_layers):
        ours, theirs = (f"layers_{i}", "mlp"), f"model.layers.{i}.mlp."
        mlp = _expert_slots(config, ours, theirs, fused_experts) if config.has_experts(i) else None
        slots += _layer_slots(config, i, "model.", mlp)
    slots.append(Slot(("norm", "scale"), (Part("model.norm.weight", (d,)),)))
    if not config.tie_embeddings:
        slots.append(Slot(("lm_head",), (Part("lm_head.weight", (v, d)),), transposed=True))
    return slots


def head_slots(config: HeadConfig) -> list[Slot]:
    """A released JetSpec or DFlash head."""
    d = config.hidden_size
    return [Slot(("fc", "kernel"), (Part("fc.weight", (d, len(config.target_layer_ids) * d)),), transposed=True),
            Slot(("hidden_norm", "scale"), (Part("hidden_norm.weight", (d,)),)),
            *(slot for i in range(config.num_layers) for slot in _layer_slots(config, i, "")),
            Slot(("norm", "scale"), (Part("norm.weight", (d,)),))]


def _layer_slots(config: TransformerConfig, i: int, prefix: str, mlp: list[Slot] | None = None) -> list[Slot]:
    """Decoder layer i; `mlp`: what it has in the place of the gated MLP."""
    d, f, c = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * c, config.num_kv_heads * c
    ours, theirs = f"layers_{i}", f"{prefix}layers.{i}."
    attention = f"{theirs}self_attn."
    qkv = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
    slots = [
        Slot((ours, "input_layernorm", "scale"), (Part(f"{theirs}input_layernorm.weight", (d,)),)),
        Slot((ours, "attention", "qkv_proj", "kernel"),
             tuple(Part(f"{attention}{name}.weight", (size, d)) for name, size in qkv), transposed=True),
        Slot((ours, "attention", "o_proj", "kernel"), (Part(f"{attention}o_proj.weight", (d, queries)),),
             transposed=True),
        Slot((ours, "post_attention_layernorm", "scale"), (Part(f"{theirs}post_attention_layernorm.weight", (d,)),))]
    slots += mlp or [
        Slot((ours, "mlp", "gate_up_proj", "kernel"),
             tuple(Part(f"{theirs}mlp.{name}.weight", (f, d)) for name in ("gate_proj", "up_proj")), transposed=True),
        Slot((ours, "mlp", "down_proj", "kernel"), (Part(f"{theirs}mlp.down_proj.weight", (d, f)),), transposed=True)]
    if config.qk_norm:
        slots += [Slot((ours, "attention", name, "scale"), (Part(f"{attention}{name}.weight", (c,)),))
                  for name in ("q_norm", "k_norm")]
    if config.qkv_bias:
        slots.append(Slot((ours, "attention", "qkv_proj", "bias"),
                          tuple(Part(f"{attention}{name}.bias", (size,)) for name, size in qkv)))
    if config.out_bias:
        slots.append(Slot((ours, "attention", "o_proj", "bias"), (Part(f"{attention}o_proj.bias", (d,)),)))
    return slots


def _expert_slots(config: TargetConfig, ours: tuple[str, ...], theirs: str, fused: bool) -> list[Slot]:
    """Router and experts of one layer."""
    d, f, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    router = Slot((*ours, "router"), (Part(f"{theirs}gate.weight", (count, d)),), transposed=True)
    if fused:
        return [router,
                Slot((*ours, "gate_up_proj"), (Part(f"{theirs}experts.gate_up_proj", (count, 2 * f, d)),),
                     transposed=True),
                Slot((*ours, "down_proj"), (Part(f"{theirs}experts.down_proj", (count, d, f)),), transposed=True)]
    return [router,
            Slot((*ours, "gate_up_proj"),
                 tuple(Part(f"{theirs}experts.{e}.{name}.weight", (f, d)) for e in range(count)
                       for name in ("gate_proj", "up_proj")), transposed=True, stacked=count),
            Slot((*ours, "down_proj"),
                 tuple(Part(f"{theirs}experts.{e}.down_proj.weight", (d, f)) for e in range(count)), transposed=True,
                 stacked=count)]


GGUF_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight"}
GGUF_LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
              "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
              "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face target tensor."""
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    _, _, index, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{GGUF_LAYER[module]}.{kind}"
