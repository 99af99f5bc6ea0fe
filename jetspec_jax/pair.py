"""A target and its draft head, ready to decode with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import Mesh

from jetspec_jax.chat_template import render, title
from jetspec_jax.config import DrafterConfig, TargetConfig, TransformerConfig
from jetspec_jax.costs import Costs
from jetspec_jax.draft import Params, count_parameters
from jetspec_jax.errors import JetSpecError, first_line, shown
from jetspec_jax.programs import Programs
from jetspec_jax.sharding import shards_of
from jetspec_jax.text import ChatText, tokenizer_errors

# Of `apply_chat_template`: what it reads otherwise, and what is about token ids.
NO_SWITCHES = ("self", "messages", "conversation", "system", "tokenize", "return_dict", "return_tensors",
               "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs",
               "sanitize_control_tokens")


@dataclass(frozen=True, eq=False)
class Pair:
    """A target and its draft head, loaded.

    Attributes:
        target_config, head_config: their shapes; no head, no tree decoding.
        params: their parameters on the device, or spread over the mesh.
        tokenizer: a Hugging Face tokenizer, or None where the source had none.
        programs: the programs compiled for this pair so far.
        mesh: the devices that decode together (see `jetspec_jax.sharding`); None is one device.
        costs: what forwards cost this processor, by layout of the weights; empty where nothing was timed.
    """

    target_config: TargetConfig
    head_config: DrafterConfig | None
    params: Params
    tokenizer: Any = None
    programs: Programs = field(default_factory=Programs)
    mesh: Mesh | None = None
    costs: tuple[Costs, ...] = ()

    def __repr__(self) -> str:
        def told(config: TransformerConfig, params: dict) -> str:
            layers = "1 layer" if config.num_layers == 1 else f"{config.num_layers} layers"
            return f"{layers} of {config.hidden_size}, {count_parameters(params)}, {config.dtype}"

        head = "none" if self.head_config is None else told(self.head_config, self.params.head)
        mesh = "" if self.mesh is None else f"; mesh: {' x '.join(map(str, self.mesh.devices.shape))} devices"
        return (f"Pair(target: {told(self.target_config, self.params.target)}; head: {head}; "
                f"tokenizer: {'no' if self.tokenizer is None else 'yes'}{mesh})")

    def share(self) -> Pair:
        """The pair with the shapes of what one device of the mesh holds.

        Raises:
            JetSpecError: a size that cannot be split evenly over the mesh.
        """
        shards = shards_of(self.mesh)[1]
        return replace(self, target_config=self.target_config.share(shards),
                       head_config=self.head_config and self.head_config.share(shards))

    def chat(self, /, messages: str | Sequence[Mapping[str, Any]], system: str | None = None,
             **switches: Any) -> ChatText:
        """Messages as the text that the target's chat template makes of them; the model's turn comes next.

        Args:
            messages: a user's message, or a whole conversation: a list of dicts with `role` and `content`, as
                `apply_chat_template` of transformers takes it.
            system: a system message to begin with.
            switches: what the template or `apply_chat_template` reads besides: `enable_thinking=False`, `tools=[...]`,
                `chat_template="rag"`, `continue_final_message=True` (the model goes on with the last message).

        Returns:
            Text that `encode` turns into exactly the ids of `apply_chat_template(tokenize=True)`.

        Raises:
            JetSpecError: no tokenizer or no chat template; messages or switches that make no sense, are no Unicode, or
                that the template refuses; a template that goes beyond its bounds (see `chat_template.render`).
        """
        check_switches(switches)
        conversation = _conversation(messages, system)
        if self.tokenizer is None:
            raise JetSpecError("this target has no tokenizer, and so no chat template: pass token ids to generate")
        _check_template(self.tokenizer.chat_template, switches)
        asked = f" with {', '.join(switches)}" if switches else ""
        switches.setdefault("add_generation_prompt", not switches.get("continue_final_message"))
        try:
            text = render(self.tokenizer, conversation, switches)
        except JetSpecError:
            raise
        except Exception as error:  # a template is a program, which fails in every way
            raise JetSpecError(f"{title(self.tokenizer, switches)} refuses these messages{asked} "
                               f"({type(error).__name__}: {first_line(error)}): change them, leave the system message "
                               "out, or give the template what it asks for (pair.chat(..., name=value); decode.py: "
                               "--chat-option name=value)") from error
        _check_unicode(text)
        return ChatText(text)

    def encode(self, text: str) -> list[int]:
        """Text as token ids; all that is decoded goes through here.

        What a chat template wrote is encoded as it stands. Plain text gets the special tokens that the tokenizer adds,
        as for `generate` of transformers (an end token too, where one is appended: pass ids to go without), but no
        second start token where it begins with one.

        Raises:
            JetSpecError: no tokenizer or a damaged one, or text that is no Unicode.
        """
        if self.tokenizer is None:
            raise JetSpecError("this target has no tokenizer: pass token ids instead of text")
        _check_unicode(text)
        with tokenizer_errors("the tokenizer of this target is damaged and cannot encode this text"):
            return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if isinstance(text, ChatText):
            return self.tokenizer(str(text), add_special_tokens=False)["input_ids"]
        ids, start = self.tokenizer(text)["input_ids"], getattr(self.tokenizer, "bos_token", None)
        if start and text.startswith(start):
            own, start_id = self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.bos_token_id
            after = ids.index(start_id) + 1 if own[:1] == [start_id] else 0
            if after and ids[after:after + len(own)] == own:
                del ids[after - 1]
        return ids


def check_switches(switches: Mapping[str, Any]) -> None:
    """Raises JetSpecError for a name that is no switch of a chat template: `Pair.chat` always returns text."""
    for name in switches:
        if name in NO_SWITCHES:
            raise JetSpecError(f"{name!r} is no switch of a chat template: leave it out (a system message goes into "
                               "system, or into the list of messages; decode.py: --system)")


def _check_unicode(text: str) -> None:
    """Raises JetSpecError for half a character, which no tokenizer knows."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JetSpecError(f"{text[error.start]!r} at character {error.start} of a text is no Unicode character: it "
                           "was read in the wrong encoding") from error


def _conversation(messages: str | Sequence[Mapping[str, Any]], system: str | None) -> list[Mapping[str, Any]]:
    """The messages as a list, the system message first."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list | tuple) or not messages:
        raise JetSpecError("messages must be a text, or a list of dicts with role and content that is not empty, not "
                           f"{shown(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise JetSpecError(f'message {i} must be a dict like {{"role": "user", "content": "Hi"}}, not '
                               f"{shown(message)}")
        content = message.get("content")
        calls = content is None and message["role"] == "assistant" and message.keys() - {"role", "content"}
        if not isinstance(content, str | list | tuple | Mapping) and not calls:
            raise JetSpecError(f"the content of message {i} must be text (or a list of parts), not {shown(content)}")
    if system is not None and not isinstance(system, str):
        raise JetSpecError(f"system must be text, not {shown(system)}")
    if system is None:
        return list(messages)
    if any(message["role"] == "system" for message in messages):
        raise JetSpecError("there is a system message among the messages already: leave system out")
    return [{"role": "system", "content": system}, *messages]


def _check_template(templates: str | dict[str, str] | None, switches: Mapping[str, Any]) -> None:
    """Raises JetSpecError where no chat template is there, or which one is not clear."""
    chosen, named = switches.get("chat_template"), templates if isinstance(templates, dict) else {}
    if chosen is None and not templates:
        raise JetSpecError("this target has no chat template: pass plain text (decode.py: --no-chat-template)")
    names = sorted(map(str, named))
    found = "default" in named or ("tool_use" in named and switches.get("tools") is not None)
    if chosen is None and named and not found:
        raise JetSpecError(f"this target has several chat templates and no default: choose one of {names} "
                           f"(pair.chat(..., chat_template={names[0]!r}); decode.py: --chat-option "
                           f"chat_template={names[0]})")
    if chosen is not None and not (isinstance(chosen, str) and (chosen in named or "{" in chosen)):
        raise JetSpecError(f"chat_template {shown(chosen)} is neither a template nor the name of one; this target has "
                           f"{names or 'a single one, without a name'}")
