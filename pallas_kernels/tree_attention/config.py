"""Block sizes of the tree-attention kernels, and which shapes they take."""

from __future__ import annotations

from dataclasses import dataclass

# Multiprocessors of an H100 SXM: enough blocks for all of them is what splitting over keys is for.
PROCESSORS = 132
WORD = 32  # columns of new tokens met at a time: one word of ancestor bits per row
MANY_BLOCKS = 120  # of 64 lines: nearly one for each multiprocessor
WIDE_NUMBERS = 2048  # of a block's queries in float32


@dataclass(frozen=True)
class TreeAttentionConfig:
    """How the work is cut.

    Args:
        nodes: tree nodes (queries) per block; with the padded group they make the rows of its products.
        keys: cache slots per step.
        splits: blocks that share the committed keys of one row block; their partial results are combined.
        warps, stages: of Triton.
    """

    nodes: int
    keys: int
    splits: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def choose_config(batch: int, queries: int, heads: int, kv_heads: int, width: int, slots: int,
                  itemsize: int = 2) -> TreeAttentionConfig:
    """The heuristic for a shape, as measured where it was (docs/h100_measured.md).

    Rows fill the 64 lines of a tensor-core product, where there are so many that such blocks fill the GPU by
    themselves; of fewer rows up to 128 go into a block, which then meets more keys alone. Keys are split until every
    multiprocessor has a block (two of 64 lines, which fit side by side), but into no more than pieces of 256 slots.
    Full float32 products have no tensor core and keep all their numbers in registers: few rows and keys at a time, and
    of wide heads no keys in advance, or thousands of bytes a thread are spilled; the copies of a lone query take twice
    the threads.

    Args:
        itemsize: bytes of a number.

    Raises:
        NotImplementedError: a shape that the kernels do not take; the message says why.
    """
    group = padded(heads // kv_heads)
    if width & (width - 1) or not 8 <= width <= 256:
        raise NotImplementedError(f"head dimension {width} is not a power of two from 8 to 256")
    wide = itemsize > 2
    keys = 32 if wide else 64
    while slots % keys:
        keys //= 2
    if keys < 16:
        raise NotImplementedError(f"{slots} cache slots are not a multiple of 16")
    many = not wide and batch * kv_heads * queries * group >= MANY_BLOCKS * 64
    most = max(16, min(WIDE_NUMBERS // width, 32)) if wide else 64 if many else 128
    rows = min(most, max(16, padded(queries * group)))
    nodes = max(1, rows // group)
    blocks = batch * kv_heads * -(-queries // nodes)
    splits = 1
    while blocks * splits * 2 <= PROCESSORS * (2 if many else 1) and slots // (splits * 2) >= 256:
        splits *= 2
    large = wide or nodes * group >= 128
    stages = 1 if wide and width > 64 else 2 if large else 3
    warps = 16 if wide and queries == 1 else 8 if large else 4
    return TreeAttentionConfig(nodes=nodes, keys=keys, splits=splits, warps=warps, stages=stages)
