"""Times from bytes and operations: the floor of what must be done, and the estimate of what a program does.

Computed, not measured. The two rates were measured on an H100 SXM: a device-to-device copy (bytes read plus bytes
written) and a bfloat16 product of 8192 x 8192 matrices of random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.h100.launches import Launch
from jetspec_jax.config import HeadConfig, TargetConfig, TransformerConfig

MEMORY_RATE = 3.0e12  # bytes a second
PRODUCT_RATE = 798e12  # bfloat16 operations a second
LAUNCH_SECONDS = 2e-6
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
    """One decoder layer.

    Args:
        rows: of all sequences together.
        cached: committed keys that each sequence's attention reads.
        seen: keys that each row meets, on average.
        batch: B.
    """
    c, wide = config, config.jnp_dtype.itemsize
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return [matrix("qkv product", rows, c.hidden_size, heads + 2 * kv, wide),
            Operation("attention", 2 * batch * cached * kv * wide, 4 * rows * heads * seen),
            matrix("output product", rows, heads, c.hidden_size, wide),
            matrix("gate and up product", rows, c.hidden_size, 2 * c.intermediate_size, wide),
            matrix("down product", rows, c.intermediate_size, c.hidden_size, wide)]


def target_operations(target: TargetConfig, nodes: int, context: int, batch: int) -> list[Operation]:
    """The target on `nodes` tokens of each of B sequences, and its logits. The embedding is only gathered from."""
    layer = layer_operations(target, batch * nodes, context, context, batch)
    return layer * target.num_layers + [lm_head(target, batch * nodes)]


def head_operations(target: TargetConfig, head: HeadConfig, context: int, batch: int) -> list[Operation]:
    """The draft head on one block of each of B sequences, and the logits of its depths."""
    rows, wide = batch * head.block_size, head.jnp_dtype.itemsize
    fuse = matrix("fusion of the taps", rows, len(head.target_layer_ids) * head.hidden_size, head.hidden_size, wide)
    layer = layer_operations(head, rows, context, context, batch)
    return [fuse, *layer * head.num_layers, lm_head(target, batch * (head.block_size - 1))]


def prompt_operations(target: TargetConfig, head: HeadConfig | None, tokens: int, batch: int) -> list[Operation]:
    """A prompt read in one pass: every weight once, a row meets half of the prompt; logits of the last row alone. Of
    the draft head only what fills its cache."""
    rows = batch * tokens
    operations = layer_operations(target, rows, 0, tokens // 2, batch) * target.num_layers + [lm_head(target, batch)]
    if head is not None:
        wide, kv = head.jnp_dtype.itemsize, 2 * head.num_kv_heads * head.head_dim
        operations.append(matrix("fusion of the taps", rows, len(head.target_layer_ids) * head.hidden_size,
                                 head.hidden_size, wide))
        operations += [matrix("context keys and values", rows, head.hidden_size, kv, wide)] * head.num_layers
    return operations


def lm_head(target: TargetConfig, rows: int) -> Operation:
    return matrix("LM head", rows, target.hidden_size, target.vocab_size, target.jnp_dtype.itemsize)
