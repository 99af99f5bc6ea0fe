"""Metrics of a training run: JSON lines and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from jetspec_jax.errors import JetSpecError


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events in a run's folder. A resumed run drops what lies beyond its step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.file = folder / "metrics.jsonl"
        kept = read_metrics(self.file) if self.file.exists() and step else []  # step 0 is logged anew
        kept = [entry for entry in kept if entry["step"] <= step]
        partial = self.file.with_name(".metrics.jsonl")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        partial.rename(self.file)
        from tensorboardX import SummaryWriter  # needed for training alone

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """One entry, on the disk when this returns."""
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes the events that TensorBoard's writer still holds."""
        self._events.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The entries of a `metrics.jsonl`; a last line that was cut off by a kill is left out.

    Raises:
        JetSpecError: any other line is no JSON object.
    """
    lines = file.read_text().splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise JetSpecError(f"{file}, line {number} is damaged") from error
    return entries
