"""One optimiser step, on one device or a mesh, and the loop around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jetspec_jax.collectives import DATA
from jetspec_jax.config import DrafterConfig, HeadConfig, TargetConfig
from jetspec_jax.errors import JetSpecError
from jetspec_jax.training.batches import Batch, Batches
from jetspec_jax.training.config import TrainConfig
from jetspec_jax.training.loss import loss_and_metrics


@struct.dataclass
class TrainState:
    """Everything that a step changes. Data order and random keys follow from the seed and `step`."""

    step: Array  # int32, steps done
    params: Any  # of the head, float32
    optimiser: Any


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine and clipping; norms' scales are not decayed."""
    warmup = max(1, round(config.warmup * config.steps))
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1),
                                              config.learning_rate * config.final_rate)
    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(optax.clip_by_global_norm(config.clip),
                       optax.adamw(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=matrices))


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains a draft head on a frozen target's recorded answers.

    Attributes:
        target, head: shapes; the head's dtype is float32, and products are rounded as `config` says.
        target_params: the frozen target.
        config: settings.
        layers: layers of the batches' states, in their order.
        mesh: devices with an axis "data", or None for one device.
        shard_params: with a mesh, spread parameters and optimiser over it too (fully sharded).
    """

    target: TargetConfig
    head: DrafterConfig
    target_params: Any
    config: TrainConfig
    layers: tuple[int, ...]
    mesh: Mesh | None = None
    shard_params: bool = False

    def __post_init__(self) -> None:
        self.head.check_fits(self.target)
        missing = {*self.head.target_layer_ids, self.target.num_layers - 1} - set(self.layers)
        if missing:
            raise JetSpecError(f"the dataset stores no states of layers {sorted(missing)}, which this head reads: "
                               "record it for this head, or without states")
        if self.config.slots is not None and self.config.slots > self.head.block_size:
            raise JetSpecError(f"slots {self.config.slots} exceed the head's block of {self.head.block_size}")
        bidirectional = isinstance(self.head, HeadConfig) and not self.head.causal
        if self.config.slots not in (None, self.head.block_size) and bidirectional:
            raise JetSpecError("a bidirectional head sees its whole block: train all its slots (slots=None)")
        if self.mesh is not None and self.config.rows % self.mesh.devices.size:
            raise JetSpecError(f"rows {self.config.rows} are not a multiple of the mesh's {self.mesh.devices.size} "
                               "devices: choose a multiple")
        if self.mesh is not None:  # a loaded target lies on one device
            object.__setattr__(self, "target_params", jax.device_put(
                self.target_params, NamedSharding(self.mesh, PartitionSpec())))

    def create_state(self, params: Any) -> TrainState:
        """Step 0 from given head parameters."""
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
        state = TrainState(jnp.zeros((), jnp.int32), params, make_optimiser(self.config).init(params))
        return jax.device_put(state, self._state_sharding(state)) if self.mesh is not None else state

    def _state_sharding(self, state: TrainState) -> Any:
        """Fully sharded: every array is split along its first axis that divides evenly."""
        mesh = self.mesh
        assert mesh is not None
        count = mesh.devices.size

        def place(leaf: Array) -> NamedSharding:
            axes: list[str | None] = [None] * leaf.ndim
            fitting = [i for i, size in enumerate(leaf.shape) if size % count == 0]
            if self.shard_params and fitting:
                axes[fitting[0]] = DATA
            return NamedSharding(mesh, PartitionSpec(*axes))

        return jax.tree.map(place, state)

    def _put(self, batches: list[Batch]) -> Batch:
        """Micro-batches stacked [accumulate, ...] on the device(s), rows spread over the mesh."""
        stacked: Any = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        if self.mesh is None:
            return jax.device_put(stacked)
        spread = NamedSharding(self.mesh, PartitionSpec(None, DATA))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        shardings: Any = jax.tree.map(lambda _: spread, stacked)
        return jax.device_put(stacked, shardings.replace(subset=everywhere))

    def step_function(self) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Array]]]:
        """The jitted step: gradients summed over micro-batches, one update."""
        optimiser = make_optimiser(self.config)
        head = dataclasses.replace(self.head, dtype="float32", product_dtype=self.config.product_dtype)
        target = dataclasses.replace(self.target, product_dtype=self.config.product_dtype)
        loss = partial(loss_and_metrics, target, head, self.config, self.layers)

        def step(state: TrainState, target_params: Any, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
            def micro(total: Any, one: Batch) -> tuple[Any, dict[str, Array]]:
                (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, target_params, one)
                return jax.tree.map(jnp.add, total, gradient), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            if self.config.accumulate == 1:
                gradient, metrics = micro(zeros, jax.tree.map(lambda leaf: leaf[0], batch))
            else:
                gradient, metrics = lax.scan(micro, zeros, batch)
                gradient = jax.tree.map(lambda leaf: leaf / self.config.accumulate, gradient)
                metrics = jax.tree.map(lambda leaf: jnp.mean(leaf.astype(jnp.float32), axis=0), metrics)
            updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics["gradient_norm"] = optax.tree.norm(gradient)
            return TrainState(state.step + 1, params, optimiser_state), metrics

        return jax.jit(step, donate_argnums=0)

    def train(self, state: TrainState, batches: Batches) -> Iterator[tuple[int, TrainState, dict[str, Array]]]:
        """Steps from `state.step` to the end, yielding (steps done, state, metrics on the device)."""
        step = self.step_function()
        for number in range(int(state.step), self.config.steps):
            micro = [batches.batch(number, i) for i in range(self.config.accumulate)]
            state, metrics = step(state, self.target_params, self._put(micro))
            yield number + 1, state, metrics
