"""A target and its draft head, ready to decode with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import Mesh

from jetspec_jax.config import DrafterConfig, TargetConfig
from jetspec_jax.draft import Params
from jetspec_jax.errors import JetSpecError
from jetspec_jax.programs import Programs
from jetspec_jax.sharding import shards_of


@dataclass(frozen=True, eq=False)
class Pair:
    """A target and its draft head, loaded.

    Attributes:
        target_config, head_config: their shapes; no head, no tree decoding.
        params: their parameters on the device, or spread over the mesh.
        tokenizer: a Hugging Face tokenizer, or None where the source had none.
        programs: the programs compiled for this pair so far.
        mesh: the devices that decode together (see `jetspec_jax.sharding`); None is one device.
    """

    target_config: TargetConfig
    head_config: DrafterConfig | None
    params: Params
    tokenizer: Any = None
    programs: Programs = field(default_factory=Programs)
    mesh: Mesh | None = None

    def share(self) -> Pair:
        """The pair with the shapes of what one device of the mesh holds.

        Raises:
            JetSpecError: a size that cannot be split evenly over the mesh.
        """
        shards = shards_of(self.mesh)[1]
        return replace(self, target_config=self.target_config.share(shards),
                       head_config=self.head_config and self.head_config.share(shards))

    def chat(self, message: str, system: str | None = None) -> str:
        """A user's message (and a system message) as the text that the chat template makes of it.

        Raises:
            JetSpecError: no tokenizer or no chat template.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise JetSpecError("this target has no chat template: pass plain text (decode.py: --no-chat-template)")
        messages = [{"role": "system", "content": system}] if system else []
        return self.tokenizer.apply_chat_template([*messages, {"role": "user", "content": message}], tokenize=False,
                                                  add_generation_prompt=True)
