"""What users run today, on the same weights in the same run: transformers' generate, plain and with prompt lookup."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.torch_peer import torch_model
from jetspec_jax import Pair


@dataclass(frozen=True)
class PeerAnswer:
    """A greedy answer, the seconds it took with its prompt, and those that prompt and first token took alone."""

    token_ids: list[int]
    seconds: float
    first_seconds: float


@dataclass(frozen=True)
class Peer:
    """A way of decoding elsewhere.

    Attributes:
        name: as in the table.
        run: (token ids, new tokens) -> new token ids.
        pair: whose tokenizer encodes the prompts.
    """

    name: str
    run: Callable[[list[int], int], list[int]]
    pair: Pair

    def generate(self, prompt: str, tokens: int) -> PeerAnswer:
        """The greedy answer, once with its first token alone and once whole."""
        ids = self.pair.encode(prompt)
        start = time.perf_counter()
        self.run(ids, 1)
        middle = time.perf_counter()
        answer = self.run(ids, tokens)
        return PeerAnswer(answer, time.perf_counter() - middle, middle - start)


def _peer(name: str, options: dict[str, Any], pair: Pair) -> Peer:
    model, generate = torch_model(pair)
    generate(model, [1, 2, 3], 2, **options)  # warm-up
    return Peer(name, lambda ids, tokens: generate(model, ids, tokens, **options), pair)


PEERS: dict[str, Callable[[Pair], Peer]] = {
    "transformers": partial(_peer, "transformers", {}),
    "transformers-lookup": partial(_peer, "transformers-lookup", {"prompt_lookup_num_tokens": 7}),
}
