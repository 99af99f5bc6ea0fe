"""Times from bytes and operations: the floor of what must be done, and the estimate of what a program does.

Computed, not measured. The two rates were measured on an H100 SXM: a device-to-device copy (bytes read plus bytes
written) and a bfloat16 product of 8192 x 8192 matrices of random numbers. Those of the links between GPUs are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.h100.costs import used_experts
from experiments.h100.launches import Launch
from jetspec_jax.config import HeadConfig, TargetConfig, TransformerConfig

MEMORY_RATE = 3.0e12  # bytes a second
PRODUCT_RATE = 798e12  # bfloat16 operations a second
LAUNCH_SECONDS = 2e-6
# Assumed. Of the 450 GB/s that NVLink 4 has in each direction NCCL's rings reach 370 (github.com/NVIDIA/nccl-tests,
# issue 212). Small sums of two H100s took 6 us in a CUDA graph, those of more take longer (NVIDIA/nccl, issue 1259).
LINK_RATE = 370e9
COLLECTIVE_SECONDS = 10e-6
DEVICE_BYTES = 80e9


@dataclass(frozen=True)
class Operation:
    """Something that must be done: bytes that must be read and operations of its products."""

    name: str
    bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        return roofline(self.bytes, self.flops)


def roofline(size: float, flops: float) -> float:
    """Seconds for `size` bytes and `flops` operations that overlap perfectly."""
    return max(size / MEMORY_RATE, flops / PRODUCT_RATE)


def bound(size: float, flops: float) -> str:
    """Which of the two it waits for."""
    return "memory" if size / MEMORY_RATE >= flops / PRODUCT_RATE else "products"


def launch_seconds(launch: Launch) -> float:
    """One launch of it, overlapping with no other."""
    if launch.cost.sent:
        return launch.cost.sent / LINK_RATE + COLLECTIVE_SECONDS
    return roofline(launch.cost.bytes, launch.cost.flops) + LAUNCH_SECONDS


def estimate(launches: list[Launch]) -> float:
    """Seconds for all of them, one after another."""
    return sum(launch.times * launch_seconds(launch) for launch in launches)


def floor(operations: list[Operation]) -> float:
    """Seconds below which no program does this."""
    return sum(operation.seconds for operation in operations)


def matrix(name: str, rows: int, inputs: int, outputs: int, itemsize: int = 2) -> Operation:
    """The product of `rows` rows with a weight matrix, which is read once."""
    return Operation(name, inputs * outputs * itemsize, 2 * rows * inputs * outputs)


def layer_operations(config: TransformerConfig, rows: int, cached: int, seen: int, batch: int) -> list[Operation]:
    """One decoder layer, dense.

    Args:
        config: of the model, or of a device's share of it.
        rows: of all sequences together.
        cached: committed keys that each sequence's attention reads.
        seen: keys that each row meets, on average.
        batch: B.
    """
    c, wide = config, config.jnp_dtype.itemsize
    return [*attention_operations(config, rows, cached, seen, batch),
            matrix("gate and up product", rows, c.hidden_size, 2 * c.intermediate_size, wide),
            matrix("down product", rows, c.intermediate_size, c.hidden_size, wide)]


def attention_operations(config: TransformerConfig, rows: int, cached: int, seen: int, batch: int) -> list[Operation]:
    """A layer's attention and the products around it."""
    c, wide = config, config.jnp_dtype.itemsize
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return [matrix("qkv product", rows, c.hidden_size, heads + 2 * kv, wide),
            Operation("attention", 2 * batch * cached * kv * wide, 4 * rows * heads * seen),
            matrix("output product", rows, heads, c.hidden_size, wide)]


def expert_operations(target: TargetConfig, rows: int) -> list[Operation]:
    """A layer's mixture of experts: those that are chosen are read once. A device has its share of them and of rows."""
    t, wide = target, target.jnp_dtype.itemsize
    used = used_experts(t.num_experts, t.num_experts_per_tok, rows) / t.shards
    numbers = 3 * t.hidden_size * t.moe_intermediate_size  # of an expert: gate, up and down
    return [matrix("router", rows, t.hidden_size, t.num_experts, wide),
            Operation("experts", used * numbers * wide, 2 * rows * t.num_experts_per_tok * numbers / t.shards)]


def stack_operations(target: TargetConfig, rows: int, cached: int, seen: int, batch: int) -> list[Operation]:
    """All layers of the target."""
    shape = (rows, cached, seen, batch)
    return [operation for i in range(target.num_layers) for operation in (
        [*attention_operations(target, *shape), *expert_operations(target, rows)] if target.has_experts(i)
        else layer_operations(target, *shape))]


def target_operations(target: TargetConfig, nodes: int, context: int, batch: int) -> list[Operation]:
    """The target (or a device's share of it) on `nodes` tokens of each of B sequences, and its logits. The embedding
    is only gathered from."""
    rows = batch * nodes
    return [*stack_operations(target, rows, context, context, batch), lm_head(target, rows)]


def head_operations(target: TargetConfig, head: HeadConfig, context: int, batch: int) -> list[Operation]:
    """The draft head on one block of each of B sequences, and the logits of its depths."""
    rows, wide = batch * head.block_size, head.jnp_dtype.itemsize
    fuse = matrix("fusion of the taps", rows, taps_of(head), head.hidden_size, wide)
    layer = layer_operations(head, rows, context, context, batch)
    return [fuse, *layer * head.num_layers, lm_head(target, batch * (head.block_size - 1))]


def prompt_operations(target: TargetConfig, head: HeadConfig | None, tokens: int, batch: int) -> list[Operation]:
    """A prompt read in one pass: every weight once, a row meets half of the prompt; logits of the last row alone. Of
    the draft head only what fills its cache."""
    rows = batch * tokens
    operations = [*stack_operations(target, rows, 0, tokens // 2, batch), lm_head(target, batch)]
    if head is not None:
        wide, kv = head.jnp_dtype.itemsize, 2 * head.num_kv_heads * head.head_dim
        operations.append(matrix("fusion of the taps", rows, taps_of(head), head.hidden_size, wide))
        operations += [matrix("context keys and values", rows, head.hidden_size, kv, wide)] * head.num_layers
    return operations


def taps_of(head: HeadConfig) -> int:
    """Width of the tapped states that a device reads."""
    return len(head.target_layer_ids) * head.hidden_size // head.shards


def lm_head(target: TargetConfig, rows: int) -> Operation:
    return matrix("LM head", rows, target.hidden_size, target.vocab_size // target.shards,
                  target.jnp_dtype.itemsize)
