"""What the head is taught: many anchored blocks of a packed row in one forward, and their distance to the target.

Only the mask differs from decoding: the head's layers are run by `head_run`, which drafting uses too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.attention import pack_bits
from jetspec_jax.autoregressive import autoregressive_forward, fuse_features
from jetspec_jax.cache import KVCache
from jetspec_jax.config import AutoregressiveHeadConfig, DrafterConfig, HeadConfig, TargetConfig
from jetspec_jax.head import head_run
from jetspec_jax.target import target_embed, target_forward, target_logits, target_norm
from jetspec_jax.training.batches import Batch
from jetspec_jax.training.config import TrainConfig


@struct.dataclass
class Slots:
    """The drafted slots of all blocks, g = 1..G'-1 (slot 0 is the anchor and has no loss)."""

    hidden: Array  # [B, A, G'-1, D], the head's
    teacher: Array  # [B, A, G'-1, D], the target's, after its final norm, one position before the taught token
    label: Array  # int32 [B, A, G'-1], the token of the text
    real: Array  # bool [B, A, G'-1]


def batch_states(target: TargetConfig, params: dict, batch: Batch, layers: tuple[int, ...]) -> Array:
    """Outputs of the target's `layers`, [B, P, T*D]: the stored ones, or the target's own forward where none are.

    Padding has zeros, so that whatever the target makes of it comes into no product.
    """
    real = (batch.segment > 0)[..., None]
    if batch.states.shape[-1]:
        return jnp.where(real, lax.bitcast_convert_type(batch.states, jnp.bfloat16).astype(target.jnp_dtype), 0)
    rows, width = batch.tokens.shape
    same = (batch.segment[:, :, None] == batch.segment[:, None, :]) & jnp.tril(jnp.ones((1, width, width), bool))
    nothing = KVCache.create(target, rows, 16)  # the fewest slots that the kernel takes
    tapped = target_forward(target, params, batch.tokens, batch.position, pack_bits(same), nothing,
                            jnp.zeros((rows,), jnp.int32), layers).tapped
    return lax.stop_gradient(jnp.where(real, tapped, 0))


def run_blocks(target: TargetConfig, head: HeadConfig, target_params: dict, head_params: Any, batch: Batch,
               tapped: Array, slots: int, remat: bool = False) -> Array:
    """The head's hidden states [B, A, G', D] of one block per anchor, blocks blind to each other.

    Args:
        tapped: [B, P, T*D], the outputs of the head's tapped layers.
        slots: G'.
    """
    rows, anchors = batch.anchor.shape
    masks = jnp.full((rows, anchors, slots - 1), head.mask_token_id, jnp.int32)
    anchor_token = jnp.take_along_axis(batch.tokens, batch.anchor, axis=1)
    block = target_embed(target, target_params, jnp.concatenate([anchor_token[..., None], masks], axis=-1))
    block = jnp.where(batch.anchor_real[..., None, None], block, 0)
    at = jnp.take_along_axis(batch.position, batch.anchor, axis=1)  # [B, A], absolute position of the anchor
    slot_position = at[:, :, None] + jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    positions = jnp.concatenate([batch.position, slot_position.reshape(rows, -1)], axis=1)
    # Context strictly before the anchor, of the anchor's own sequence.
    of_anchor = jnp.take_along_axis(batch.segment, batch.anchor, axis=1)
    context = ((batch.segment[:, None, :] == of_anchor[:, :, None])
               & (batch.position[:, None, :] < at[:, :, None]))  # [B, A, P]
    inside = jnp.tril(jnp.ones((slots, slots), bool)) if head.causal else jnp.ones((slots, slots), bool)

    def attend(q: Array, k: Array, v: Array, layer: int) -> Array:
        return block_attention(q, k, v, context, inside)

    forward = jax.checkpoint(head_run, static_argnums=(0, 5)) if remat else head_run
    out = forward(head, head_params, block.reshape(rows, anchors * slots, -1), tapped, positions, attend)
    return out.hidden.reshape(rows, anchors, slots, -1)


def block_attention(q: Array, k: Array, v: Array, context: Array, inside: Array) -> Array:
    """Attention of A blocks of G' slots over P context rows and their own block.

    Args:
        q: [B, A*G', H, C].
        k, v: [B, P+A*G', K, C], context rows first.
        context: bool [B, A, P], what each block sees of the context.
        inside: bool [G', G'], what each slot sees of its block.
    """
    rows, _, heads, width = q.shape
    anchors, length, slots, kv_heads = context.shape[1], context.shape[2], inside.shape[0], k.shape[2]
    group, blocks = heads // kv_heads, anchors * slots
    # Heads of a group become rows of one product over the context, [B, K, g*A*G', C].
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(rows, blocks, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, P+A*G', C]
    # What nobody sees (padding) is multiplied by a weight of zero, forwards and backwards.
    seen = jnp.concatenate([jnp.any(context, axis=1), jnp.ones((rows, blocks), bool)], axis=1)[:, None, :, None]
    k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    before = jnp.einsum("bkrc,bkpc->bkrp", q.reshape(rows, kv_heads, group * blocks, width), k[:, :, :length])
    before = before.reshape(rows, kv_heads, group, anchors, slots, length)
    blockwise = (rows, kv_heads, group, anchors, slots, width)
    own_k, own_v = (x[:, :, length:].reshape(rows, kv_heads, anchors, slots, width) for x in (k, v))
    within = jnp.einsum("bkgasc,bkatc->bkgast", q.reshape(blockwise), own_k)
    before = jnp.where(context[:, None, None, :, None, :], before, -jnp.inf)
    within = jnp.where(inside[None, None, None, None, :, :], within, -jnp.inf)
    # One softmax over both parts, which are never joined. A slot sees at least itself, so the peak is finite.
    peak = lax.stop_gradient(jnp.maximum(jnp.max(before, axis=-1, keepdims=True),
                                         jnp.max(within, axis=-1, keepdims=True)))
    before, within = jnp.exp(before - peak), jnp.exp(within - peak)
    norm = jnp.sum(before, axis=-1, keepdims=True) + jnp.sum(within, axis=-1, keepdims=True)
    out = jnp.einsum("bkrp,bkpc->bkrc", before.reshape(rows, kv_heads, group * blocks, length),
                     v[:, :, :length]).reshape(blockwise)
    out = (out + jnp.einsum("bkgast,bkatc->bkgasc", within, own_v)) / norm
    return out.transpose(0, 3, 4, 1, 2, 5).reshape(rows, blocks, heads, width)


def run_unrolled(target: TargetConfig, head: AutoregressiveHeadConfig, target_params: dict, head_params: Any,
                 batch: Batch, tapped: Array, slots: int) -> Array:
    """An autoregressive head's hidden states [B, A, G'-1, D]: depth i of an anchor is the i-th pass over the row, each
    pass reading what the one before put out one place earlier (EAGLE-3's training-time test)."""
    width = batch.tokens.shape[1]
    embedded = jnp.where((batch.segment > 0)[..., None], target_embed(target, target_params, batch.tokens), 0)
    place = jnp.arange(width, dtype=jnp.int32)
    distance = place[:, None] - place[None, :]
    same = batch.segment[:, :, None] == batch.segment[:, None, :]
    exists = (batch.position > 0)[:, None, :]  # the row of token 0 would need a state before the first
    passes: list[tuple[Array, Array]] = []
    feature, outputs = fuse_features(head, head_params, tapped), []
    for number in range(slots - 1):
        # Rows that were drafted hide the target's own features of their places.
        seen = same & exists & (distance >= number)[None]
        if number == 0:
            seen = seen | (distance == 0)[None]  # later passes see their own row through `keys`

        def attend(q: Array, k: Array, v: Array, layer: int, seen: Array = seen) -> Array:
            keys = [(own[0][layer], own[1][layer]) for own in passes] + [(k, v)]
            return unrolled_attention(q, keys, seen)

        out = autoregressive_forward(head, head_params, embedded, _shift(feature, 1), batch.position, attend)
        passes.append((out.k, out.v))
        feature = out.feature
        outputs.append(out.hidden)
    at = jnp.minimum(batch.anchor[:, :, None] + jnp.arange(slots - 1, dtype=jnp.int32)[None, None, :], width - 1)
    return jnp.stack([jnp.take_along_axis(hidden, at[:, :, i, None], axis=1) for i, hidden in enumerate(outputs)],
                     axis=2)


def _shift(x: Array, by: int) -> Array:
    """Moves rows [B, P, ...] towards higher places."""
    return jnp.pad(x, ((0, 0), (by, 0)) + ((0, 0),) * (x.ndim - 2))[:, :x.shape[1]]


def unrolled_attention(q: Array, keys: list[tuple[Array, Array]], seen: Array) -> Array:
    """Attention of the last pass: over the first pass where `seen`, and over one row of each later pass.

    Args:
        q: [B, P, H, C].
        keys: (k, v) of the passes so far, [B, P, K, C] each; pass m is seen where its drafted row stands, as many
            places back as passes followed it.
        seen: bool [B, P, P].
    """
    rows, length, heads, width = q.shape
    kv_heads = keys[0][0].shape[2]
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(rows, length, kv_heads, heads // kv_heads, width)
    shown = jnp.any(seen, axis=1)[:, :, None, None]
    k, v = keys[0]
    keys = [(jnp.where(shown, k, 0), jnp.where(shown, v, 0)), *keys[1:]]  # as in `block_attention`
    first = jnp.einsum("bpkgc,bskc->bkgps", q, keys[0][0])
    scores = [jnp.where(seen[:, None, None], first, -jnp.inf)]
    later = [(_shift(k, len(keys) - 1 - m), _shift(v, len(keys) - 1 - m)) for m, (k, v) in enumerate(keys) if m]
    scores += [jnp.einsum("bpkgc,bpkc->bkgp", q, k)[..., None] for k, _ in later]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out = jnp.einsum("bkgps,bskc->bpkgc", weights[..., :length], keys[0][1])
    for m, (_, v) in enumerate(later):
        out = out + weights[..., length + m].transpose(0, 3, 1, 2)[..., None] * v[:, :, :, None]
    return out.reshape(rows, length, heads, width)


def block_slots(target: TargetConfig, head: DrafterConfig, target_params: dict, head_params: Any, batch: Batch,
                layers: tuple[int, ...], slots: int, remat: bool = False) -> Slots:
    """Runs all blocks and finds what each slot should have said."""
    states = batch_states(target, target_params, batch, layers)
    width = target.hidden_size
    head = dataclasses.replace(head, kernels="reference")  # the kernels have no backward pass

    def of(layer: int) -> Array:
        start = layers.index(layer) * width
        return states[..., start:start + width]

    tapped = jnp.concatenate([of(layer) for layer in head.target_layer_ids], axis=-1)
    if isinstance(head, HeadConfig):
        hidden = run_blocks(target, head, target_params, head_params, batch, tapped, slots, remat)[:, :, 1:]
    elif isinstance(head, AutoregressiveHeadConfig):
        hidden = run_unrolled(target, head, target_params, head_params, batch, tapped, slots)
    else:
        raise TypeError(f"no training for {type(head).__name__}")
    # Where the taught tokens stand, [B, A, G'-1].
    place = batch.anchor[:, :, None] + jnp.arange(1, slots, dtype=jnp.int32)[None, None, :]
    fits = place < batch.tokens.shape[1]
    place = jnp.where(fits, place, 0)
    flat = place.reshape(place.shape[0], -1)
    segment = jnp.take_along_axis(batch.segment, flat, axis=1).reshape(place.shape)
    of_anchor = jnp.take_along_axis(batch.segment, batch.anchor, axis=1)[:, :, None]
    final = target_norm(target, target_params, of(target.num_layers - 1))
    teacher = jnp.take_along_axis(final, jnp.maximum(flat - 1, 0)[..., None], axis=1).reshape(*place.shape, width)
    label = jnp.take_along_axis(batch.tokens, flat, axis=1).reshape(place.shape)
    return Slots(hidden, teacher, label, fits & (segment == of_anchor) & batch.anchor_real[:, :, None])


def depth_weights(depths: int, gamma: float) -> Array:
    """exp(-(i-1)/gamma) for depth i = 1..depths; uniform for gamma 0."""
    if gamma == 0:
        return jnp.ones((depths,), jnp.float32)
    return jnp.exp(-jnp.arange(depths, dtype=jnp.float32) / gamma)


def slot_losses(target: TargetConfig, target_params: dict, slots: Slots, subset: Array,
                config: TrainConfig) -> tuple[Array, Array, Array]:
    """Loss of every slot, and the arg-maxes of head and target, each [B, A, G'-1].

    Logits exist for `loss_chunk` slots at a time, and are computed again in the backward pass.
    """
    shape = slots.label.shape
    vocabulary = None if subset.shape[0] == 0 else subset
    label = slots.label if vocabulary is None else jnp.searchsorted(vocabulary, slots.label).astype(jnp.int32)

    def chunk(rows: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        hidden, teacher, wanted = rows
        drafted = target_logits(target, target_params, hidden, vocabulary)
        taught = lax.stop_gradient(target_logits(target, target_params, teacher, vocabulary))
        log_q = jax.nn.log_softmax(drafted, axis=-1)
        if config.loss == "forward_kl":
            log_p = jax.nn.log_softmax(taught, axis=-1)
            loss = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        else:
            loss = -jnp.take_along_axis(log_q, wanted[:, None], axis=-1)[:, 0]
        return loss, jnp.argmax(drafted, axis=-1).astype(jnp.int32), jnp.argmax(taught, axis=-1).astype(jnp.int32)

    count = slots.label.size
    size = min(config.loss_chunk, count)
    padding = -count % size

    def split(x: Array) -> Array:
        x = x.reshape(count, *x.shape[3:])
        return jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    rows = (split(slots.hidden), split(slots.teacher), split(label))
    if rows[0].shape[0] == 1:
        loss, drafted, taught = chunk((rows[0][0], rows[1][0], rows[2][0]))
    else:
        loss, drafted, taught = lax.map(jax.checkpoint(chunk), rows)

    def join(x: Array) -> Array:
        return x.reshape(-1)[:count].reshape(shape)

    def token(x: Array) -> Array:
        return join(x) if vocabulary is None else vocabulary[join(x)]

    return join(loss), token(drafted), token(taught)


def accepted_lengths(drafted: Array, taught: Array, label: Array, real: Array) -> Array:
    """Tokens that a chain drafted from each anchor would gain, the free one included, int32 [B, A].

    A drafted token counts while it is the target's own arg-max; beyond a token where the text itself left the
    target's arg-max (sampled text) nothing is known and nothing counted.
    """
    agrees = real & (drafted == taught)
    follows = jnp.cumprod(agrees & (label == taught), axis=-1, dtype=jnp.int32)
    before = jnp.concatenate([jnp.ones_like(follows[..., :1]), follows[..., :-1]], axis=-1)
    return 1 + jnp.sum(before * agrees.astype(jnp.int32), axis=-1, dtype=jnp.int32)


def loss_and_metrics(target: TargetConfig, head: DrafterConfig, config: TrainConfig, layers: tuple[int, ...],
                     head_params: Any, target_params: dict, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """The weighted mean loss over all slots of a batch."""
    slots = block_slots(target, head, target_params, head_params, batch, layers, config.slots or head.block_size,
                        config.remat)
    loss, drafted, taught = slot_losses(target, target_params, slots, batch.subset, config)
    weight = jnp.where(slots.real, depth_weights(loss.shape[-1], config.gamma)[None, None], 0)
    loss = jnp.sum(jnp.where(weight > 0, loss * weight, 0)) / jnp.maximum(jnp.sum(weight), 1e-9)

    def mean(values: Array, over: Array) -> Array:
        total = jnp.sum(jnp.where(over, values.astype(jnp.float32), 0))
        return total / jnp.maximum(jnp.sum(over, dtype=jnp.float32), 1)

    lengths = accepted_lengths(drafted, taught, slots.label, slots.real)
    return loss, {"loss": loss, "accepted_length": mean(lengths, batch.anchor_real),
                  "first_accuracy": mean(drafted[..., 0] == taught[..., 0], slots.real[..., 0]),
                  "anchors": jnp.sum(batch.anchor_real, dtype=jnp.float32),
                  "slots": jnp.sum(slots.real, dtype=jnp.float32)}
