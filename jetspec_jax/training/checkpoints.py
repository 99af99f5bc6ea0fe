"""Training checkpoints: weights, optimiser and step, with the settings they belong to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jetspec_jax.checkpoint import quiet
from jetspec_jax.config import DrafterConfig
from jetspec_jax.errors import JetSpecError, first_line
from jetspec_jax.training.config import TrainConfig
from jetspec_jax.training.trainer import TrainState


class TrainCheckpoints:
    """The last two checkpoints of a run, each complete or absent (Orbax writes beside and renames).

    Args:
        folder: of the run.
        head, config, data: what the run trains, how, and on what; a checkpoint made otherwise is refused.
    """

    def __init__(self, folder: Path, head: DrafterConfig, config: TrainConfig, data: dict) -> None:
        self.folder = folder / "checkpoints"
        self.description = {"head": asdict(head), "config": asdict(config), "data": data}
        with quiet():
            self._manager = ocp.CheckpointManager(
                self.folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True,
                                                                             enable_async_checkpointing=False))

    def save(self, state: TrainState) -> None:
        """Writes the state under its step; complete when this returns."""
        with quiet():
            self._manager.save(int(state.step), args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), description=ocp.args.JsonSave(self.description)))

    def restore(self, like: TrainState) -> TrainState | None:
        """The latest state, on the devices and in the shapes of `like`; None where nothing was saved.

        Raises:
            JetSpecError: the checkpoint is of a run with other settings, or damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            with quiet():
                found = self._manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
                self._compare(found.description)
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                return self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
        except JetSpecError:
            raise
        except Exception as error:  # damaged files raise many types
            raise JetSpecError(f"checkpoint {step} in {self.folder} is damaged ({first_line(error)}): "
                               f"delete {self.folder / str(step)} to resume from the one before") from error

    def _compare(self, found: dict) -> None:
        """Everything but the total of steps must be as it was. (The cosine then follows the new total.)"""
        for part, mine in self.description.items():
            theirs = found.get(part, {})
            for name, value in mine.items():
                stored = theirs.get(name)
                if name != "steps" and (list(value) if isinstance(value, tuple) else value) != stored:
                    raise JetSpecError(f"{self.folder} belongs to a run with {name} {stored!r}, not {value!r}: resume "
                                       "with the same options, or choose another --out")
