"""A draft tree from one distribution per depth, with its packed ancestors, in one launch."""

from pallas_kernels.tree_build import pallas, reference

__all__ = ["pallas", "reference"]
