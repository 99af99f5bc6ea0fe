"""Rotary embeddings as Hugging Face configs describe them, to ours and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from converters.fields import Fields, is_one_of, naming
from jetspec_jax.config import THETA_LIMITS, RopeScaling
from jetspec_jax.errors import JetSpecError, shown

PLACES = ("rope_scaling", "rope_parameters")  # older and newer files
ORIGINAL = "original_max_position_embeddings"
MSCALE_LIMITS = (0, 1e6)  # what is below could make a divisor of zero
TOP_LEVEL = ("rope_theta", "partial_rotary_factor", ORIGINAL)
# The fields that a type takes.
TYPES: dict[str, tuple[str, ...]] = {
    "default": (ORIGINAL,), "linear": ("factor", ORIGINAL),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}
# The fields of all types, and of types that are refused, with the values that say nothing where they do not belong.
FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((ORIGINAL, "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale",
                     "mscale_all_dim", "truncate", "short_factor", "long_factor", "short_mscale", "long_mscale",
                     "alpha"), ()),
    **dict.fromkeys(("factor", "attention_factor", "attn_factor", "extrapolation_factor", "partial_rotary_factor"),
                    (1,))}
KNOWN = frozenset((*FOREIGN, "type", "rope_type", "rope_theta", "finetuned"))
WHOLE_LENGTH = ": its angles depend on the length of the whole text, so a text that grows would not match itself"
REASONS = {"dynamic": WHOLE_LENGTH, "longrope": WHOLE_LENGTH, "su": WHOLE_LENGTH}


class Rope(NamedTuple):
    """Rotary embeddings of a file.

    Attributes:
        theta: base of the frequencies.
        scaling: how they differ from the plain ones, or None.
        original: the context before the scaling, where the file says it.
    """

    theta: float
    scaling: RopeScaling | None
    original: int | None

    def context_limit(self, stated: int) -> int:
        """The context limit of a file that states `stated`; see `RopeScaling.context_limit`."""
        if self.scaling is None:
            return stated
        return self.scaling.context_limit(self.original or stated if self.scaling.kind == "linear" else stated)


def read_rope(config: Fields) -> Rope:
    """Rotary embeddings from rope_theta, rope_scaling and rope_parameters, wherever a file puts what.

    Raises:
        JetSpecError: a type that is not computed, places that contradict each other, or a field that its type lacks or
            does not have.
    """
    found = _gather(config)
    fields = Fields(config.file, dict(found.values()))

    def name(key: str) -> str:
        return found[key][0] if key in found else f"rope_scaling.{key}"

    kind = fields.text(name("rope_type"), "default")
    if kind not in TYPES:
        raise JetSpecError(f"{config.file}: {name('rope_type')} {shown(kind)} is not supported, only "
                           f"{', '.join(TYPES)} are{REASONS.get(kind, '')}")
    for key, inactive in FOREIGN.items():
        if key in found and key not in TYPES[kind] and not is_one_of(found[key][1], inactive):
            raise _misplaced(config, name(key), found[key][1], kind, "rope_type" in found)
    theta = fields.number(name("rope_theta"), 10000.0, THETA_LIMITS)
    original = fields.integer(name(ORIGINAL)) if ORIGINAL in found or kind in ("llama3", "yarn") else None
    if kind == "default":
        return Rope(theta, None, original)

    def number(key: str, default: float | None = None) -> float:
        return fields.number(name(key), default, RopeScaling.LIMITS[key])

    numbers: dict[str, Any] = {"factor": number("factor")}
    if kind == "llama3":
        numbers |= {key: number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        _refuse_null(config, "truncate")
        numbers |= {"beta_fast": number("beta_fast", 32.0), "beta_slow": number("beta_slow", 1.0),
                    "truncate": fields.flag(name("truncate"), True),
                    "attention_factor": number("attention_factor", yarn_attention_factor(
                        numbers["factor"], *(fields.number(name(key), 0.0, MSCALE_LIMITS)
                                             for key in ("mscale", "mscale_all_dim"))))}
    if kind != "linear":
        numbers["original_max_positions"] = original
    with naming(config.file):
        return Rope(theta, RopeScaling(kind=kind, **numbers), original)  # type: ignore[arg-type]


def rope_scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The rope_scaling of a config.json; `read_rope` reads it back.

    Raises:
        JetSpecError: a table of divisors, which config.json has no type for.
    """
    if scaling is None:
        return None
    if scaling.kind == "table":
        raise JetSpecError("its rotary frequencies are divided by a table (from a GGUF file), which has no form in a "
                           "config.json: keep it as a checkpoint, or train it for a target from a Hugging Face folder")
    names = {"original_max_positions": ORIGINAL}
    return {"rope_type": scaling.kind,
            **{names.get(field, field): getattr(scaling, field) for field in RopeScaling.FIELDS[scaling.kind]}}


def unknown_rope_fields(config: Fields) -> list[str]:
    """Names of fields that nobody knows, inside rope_scaling and rope_parameters."""
    return [name for place in PLACES for name, value in _flat(config, place).items()
            if value is not None and name.rsplit(".", 1)[1] not in KNOWN]


def yarn_attention_factor(factor: float, mscale: float = 0, mscale_all_dim: float = 0) -> float:
    """What yarn multiplies cosines and sines by, where a file does not say it (arXiv 2309.00071, section 3.4)."""
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1)


def _gather(config: Fields) -> dict[str, tuple[str, Any]]:
    """By its last name, the full name and the value of every field that is given; places must not contradict."""
    found: dict[str, tuple[str, Any]] = {}
    places = [{key: config.get(key) for key in TOP_LEVEL}, *(_flat(config, place) for place in PLACES)]
    for name, value in [item for place in places for item in place.items() if item[1] is not None]:
        key = name.rsplit(".", 1)[-1]
        key = "rope_type" if key == "type" else key  # the older spelling
        first, other = found.setdefault(key, (name, value))
        if first != name and other != value:
            raise JetSpecError(f"{config.file}: {first} {shown(other)} and {name} {shown(value)} contradict each other")
    return found


def _flat(config: Fields, place: str) -> dict[str, Any]:
    """The fields of a place by their full names; where each type of layer has its own, those of full attention."""
    fields = config.within(place)
    by_layer = {kind: value for kind, value in fields.items()
                if isinstance(value, dict) or (kind.endswith("_attention") and value is not None)}
    if by_layer:
        if not all(isinstance(value, dict) for value in by_layer.values()):
            raise config.error(place, "must have an object for each type of layer")
        others = [kind for kind, value in fields.items() if value is not None and kind not in by_layer]
        if others:
            raise JetSpecError(f"{config.file}: {place} mixes {others[0]!r} with objects for types of layers")
        if any(value != by_layer.get("full_attention") for value in by_layer.values()):
            raise JetSpecError(f"{config.file}: {place} differs between {', '.join(sorted(by_layer))}, and every layer "
                               "computed here is full_attention")
        place, fields = f"{place}.full_attention", by_layer["full_attention"]
    return {f"{place}.{name}": value for name, value in fields.items()}


def _refuse_null(config: Fields, key: str) -> None:
    """For a switch that transformers takes for off where it is null, and for on where it is absent."""
    for place in PLACES:
        for name, value in _flat(config, place).items():
            if name.endswith(f".{key}") and value is None:
                raise JetSpecError(f"{config.file}: {name} must be true or false, not null")


def _misplaced(config: Fields, name: str, value: Any, kind: str, typed: bool) -> JetSpecError:
    if name.endswith("partial_rotary_factor"):
        return JetSpecError(f"{config.file}: {name} {shown(value)} is not supported, only 1 is: heads are rotated "
                            "whole")
    if not typed:
        return JetSpecError(f"{config.file}: {name} {shown(value)} is given without a rope_type: add the one that is "
                            "meant (linear, llama3 or yarn)")
    return JetSpecError(f"{config.file}: {name} {shown(value)} is no field of rope_type {kind!r}")
