"""Which steps there are, how long each may take, and how they ended: steps.json, written at every change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jetspec_jax import JetSpecError
from jetspec_jax.files import write_text

# In order; seconds that a step may take on a card, far above what it should.
LIMITS = {"machine": 40, "correct": 150, "rounds": 200, "peer": 90, "kernels": 90, "pair": 240, "batch": 120,
          "products": 150, "profile": 60, "rows": 60, "matmul": 80, "attention": 120, "trees": 40}
ALONE = ("peer",)  # another library needs the card's memory
LOOPS = ("rounds", "pair", "batch", "products", "profile")  # what a looping graph can break


def read_json(file: Path) -> Any:
    """What a step wrote; None where there is no such file.

    Raises:
        JetSpecError: it is damaged.
    """
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise JetSpecError(f"{file} is damaged ({error}): remove it, or name another --out") from error


class Ledger:
    """How each step of a run ended.

    Attributes:
        rows: by step: state (running, done, failed, died), seconds, host_loop and, of a failure, error and message.
    """

    def __init__(self, out: Path) -> None:
        self._file = out / "steps.json"
        self.rows: dict[str, dict[str, Any]] = read_json(self._file) or {}

    def write(self, name: str, **row: Any) -> None:
        self.rows[name] = row
        write_text(self._file, json.dumps(self.rows, indent=1) + "\n")
