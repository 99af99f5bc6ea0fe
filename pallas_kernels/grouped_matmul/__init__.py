"""The gated MLPs of the experts that each token chose, as grouped products: only chosen experts are read."""

from pallas_kernels.grouped_matmul import pallas, reference

__all__ = ["pallas", "reference"]
