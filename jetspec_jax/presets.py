"""Targets and heads that are known by name."""

from __future__ import annotations

from dataclasses import dataclass

from jetspec_jax.config import HeadConfig, TargetConfig


def default_target_layer_ids(num_layers: int, taps: int) -> tuple[int, ...]:
    """The tapped layers of the released heads: `taps` ids spread from layer 1 to layer L-3."""
    if taps == 1:
        return (num_layers // 2,)
    return tuple(round(1 + i * (num_layers - 4) / (taps - 1)) for i in range(taps))


@dataclass(frozen=True)
class Preset:
    """A target and its head by their CLI name.

    Args:
        target: the target's shape.
        target_source: hub id of the target, or "pypi:" and the name of a source that `pretrained.py` knows.
        head: the head's shape, if one is known for this target.
        head_source: hub id of the released head, or "shipped:" and the folder of `heads/`; None if there is none.
    """

    target: TargetConfig
    target_source: str
    head: HeadConfig | None = None
    head_source: str | None = None


def _qwen3(d: int, f: int, layers: int, heads: int, tied: bool = False) -> TargetConfig:
    return TargetConfig(vocab_size=151936, hidden_size=d, intermediate_size=f, num_layers=layers, num_heads=heads,
                        num_kv_heads=8, head_dim=128, tie_embeddings=tied, eos_token_ids=(151645, 151643))


def _qwen3_moe(d: int, f: int, expert: int, layers: int, heads: int) -> TargetConfig:
    return TargetConfig(vocab_size=151936, hidden_size=d, intermediate_size=f, num_layers=layers, num_heads=heads,
                        num_kv_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
                        moe_intermediate_size=expert, eos_token_ids=(151645, 151643))


QWEN3_8B_HEAD = HeadConfig(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=5, num_heads=32, num_kv_heads=8,
    head_dim=128, block_size=16, target_layer_ids=default_target_layer_ids(36, 5), num_target_layers=36,
    mask_token_id=151669)

QWEN3_30B_A3B_HEAD = HeadConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_layers=8, num_heads=32, num_kv_heads=4,
    head_dim=128, block_size=16, target_layer_ids=default_target_layer_ids(48, 5), num_target_layers=48,
    mask_token_id=151669)

SMOLLM2_135M = TargetConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, rope_theta=1e5, rms_norm_eps=1e-5, qk_norm=False, dtype="float32", max_positions=8192,
    tie_embeddings=True, eos_token_ids=(2,))

# Three layers of blocks of 8 learn fastest at this scale; the mask token is <reponame>, which no text contains.
SMOLLM2_135M_HEAD = HeadConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=3, num_heads=9, num_kv_heads=3,
    head_dim=64, rope_theta=1e5, rms_norm_eps=1e-5, dtype="float32", block_size=8,
    target_layer_ids=default_target_layer_ids(30, 5), num_target_layers=30, mask_token_id=4)

PRESETS: dict[str, Preset] = {
    "smollm2-135m": Preset(SMOLLM2_135M, "pypi:smollm2-135m", SMOLLM2_135M_HEAD, "shipped:smollm2-135m"),
    "qwen3-0.6b": Preset(_qwen3(1024, 3072, 28, 16, tied=True), "Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": Preset(_qwen3(2048, 6144, 28, 16, tied=True), "Qwen/Qwen3-1.7B"),
    "qwen3-4b": Preset(_qwen3(2560, 9728, 36, 32, tied=True), "Qwen/Qwen3-4B"),
    "qwen3-8b": Preset(_qwen3(4096, 12288, 36, 32), "Qwen/Qwen3-8B", QWEN3_8B_HEAD, "JetSpec/jetspec-qwen3-8b"),
    "qwen3-14b": Preset(_qwen3(5120, 17408, 40, 40), "Qwen/Qwen3-14B"),
    "qwen3-32b": Preset(_qwen3(5120, 25600, 64, 64), "Qwen/Qwen3-32B"),
    "qwen3-30b-a3b": Preset(_qwen3_moe(2048, 6144, 768, 48, 32), "Qwen/Qwen3-30B-A3B", QWEN3_30B_A3B_HEAD,
                            "JetSpec/jetspec-qwen3-30b-a3b"),
    "qwen3-235b-a22b": Preset(_qwen3_moe(4096, 12288, 1536, 94, 64), "Qwen/Qwen3-235B-A22B"),
}
