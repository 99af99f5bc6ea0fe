"""Prompt lookup: drafting from the text so far, without a head and without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jetspec_jax.config import PromptLookup
from jetspec_jax.draft import Params, StatelessDrafter, anchor_of
from jetspec_jax.tree import DraftTree, chain_tree


@dataclass(frozen=True)
class LookupDrafter(StatelessDrafter):
    """Finds the last tokens earlier in the text and proposes what came after them, as a chain.

    The longest match wins, among equally long ones the latest. All places are compared at once.
    """

    lookup: PromptLookup

    @property
    def nodes(self) -> int:
        return self.lookup.length + 1

    @property
    def max_path(self) -> int:
        return self.lookup.length + 1

    def propose(self, params: Params, state: Any, tokens: Array, position: Array) -> tuple[DraftTree, Any]:
        with jax.named_scope("draft"):
            slots = tokens.shape[1]
            place = jnp.arange(slots, dtype=jnp.int32)[None, :]
            matches = jnp.broadcast_to(place < position[:, None], tokens.shape)
            length = jnp.zeros_like(tokens)  # of the run that ends at each place and at the anchor alike
            for back in range(self.lookup.ngram):
                last = anchor_of(tokens, jnp.maximum(position - back, 0))
                shifted = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
                matches = matches & (shifted == last[:, None]) & (position >= back)[:, None]
                length = length + matches.astype(jnp.int32)
            found = jnp.argmax(length * slots + place, axis=1).astype(jnp.int32)
            any_found = jnp.max(length, axis=1) > 0
            at = found[:, None] + jnp.arange(1, self.nodes, dtype=jnp.int32)[None, :]
            drafted = jnp.take_along_axis(tokens, jnp.minimum(at, slots - 1), axis=1)
            count = jnp.where(any_found, jnp.minimum(position - found, self.lookup.length), 0)
            chain = jnp.concatenate([anchor_of(tokens, position)[:, None], drafted], axis=1)
            return chain_tree(chain, count + 1), state
