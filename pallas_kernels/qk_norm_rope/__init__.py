"""Query and key norms, rotary embedding and the split into queries, keys and values, in one launch."""

from pallas_kernels.qk_norm_rope import pallas, reference

__all__ = ["pallas", "reference"]
