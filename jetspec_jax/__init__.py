"""Lossless tree decoding of language models in JAX (JetSpec, arXiv 2606.18394).

Dimension glossary, the same letters everywhere:
    B sequences · P prompt tokens · N new tokens that ask (tree nodes, block slots, a prompt chunk) · M new tokens that
    are seen (>= N) · S cache slots · L layers · D model width · H query heads · K key/value heads · C head dimension ·
    F MLP width · E experts · V vocabulary · W tree width (children per node, at most 16) · G block size of the head
    (anchor + G-1 drafted depths) · R rows of an accepted path (at most G) · T tapped target layers
"""

from jetspec_jax.config import HeadConfig, PromptLookup, SamplingParams, TargetConfig, TreeConfig
from jetspec_jax.errors import JetSpecError
from jetspec_jax.pair import Pair
from jetspec_jax.presets import PRESETS
from jetspec_jax.pretrained import load_pretrained, with_head

__all__ = ["PRESETS", "HeadConfig", "JetSpecError", "Pair", "PromptLookup", "SamplingParams", "TargetConfig",
           "TreeConfig", "load_pretrained", "with_head"]
__version__ = "0.1.0"
