"""What ptxas makes of a kernel: registers, spills, shared memory, tensor-core instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.h100.launches import Launch
from jetspec_jax import JetSpecError

PTXAS = "nvidia/cu13/bin/ptxas"  # in site-packages, from the wheel nvidia-cuda-nvcc


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of ours.

    Attributes:
        registers: per thread.
        spill_bytes: stored and loaded per thread because registers ran out.
        shared_bytes: per block.
        wgmma: Hopper tensor-core instructions in its code.
        wgmma_serialized: whether ptxas warns that it has to wait for each of them.
        blocks: of one launch.
        launches: how often it is launched in a round.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    wgmma_serialized: bool
    blocks: int
    launches: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_ptxas() -> str:
    """Path of ptxas, from its wheel or from the PATH."""
    installed = (Path(folder) / PTXAS for folder in sys.path)
    found = next((str(path) for path in installed if path.is_file()), None) or shutil.which("ptxas")
    if not found:
        raise JetSpecError("ptxas, which tells registers and spills, is missing: pip install -e '.[plan]'")
    return found


def kernels_of(launches: list[Launch], ptx: dict[str, str]) -> list[Kernel]:
    """The Pallas kernels among `launches`, each once, in the order of their first launch."""
    ours: dict[str, list[Launch]] = {}
    for launch in launches:
        if launch.kernel and launch.scope.endswith("/pallas_call"):
            ours.setdefault(launch.kernel, []).append(launch)
    missing = [name for name in ours if name not in ptx]
    if missing:
        raise JetSpecError(f"XLA wrote no code down for {', '.join(missing)}: use jax 0.10.2 or 0.11")
    return [kernel_of(name, assemble(name, ptx[name]), same) for name, same in ours.items()]


@dataclass(frozen=True)
class Assembled:
    """What ptxas says of one kernel; fields as in `Kernel`, shared memory only as far as the code fixes it."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    wgmma_serialized: bool


def assemble(name: str, ptx: str) -> Assembled:
    """Runs ptxas on one kernel and reads its report."""
    done = subprocess.run([find_ptxas(), "-arch=sm_90a", "-v", "-", "-o", "/dev/null"], input=ptx, text=True,
                          capture_output=True)
    if done.returncode:
        raise JetSpecError(f"ptxas does not take kernel {name}: {done.stderr.strip().splitlines()[-1]}")
    report = done.stderr + done.stdout
    return Assembled(*read_report(report), ptx.count("wgmma.mma_async"),
                     "wgmma.mma_async instructions are serialized" in report)


def kernel_of(name: str, found: Assembled, launches: list[Launch]) -> Kernel:
    """A kernel with what its launches add."""
    return Kernel(name=name, registers=found.registers, spill_bytes=found.spill_bytes,
                  shared_bytes=found.shared_bytes + max(launch.shared_bytes for launch in launches),
                  wgmma=found.wgmma, wgmma_serialized=found.wgmma_serialized,
                  blocks=max(launch.blocks for launch in launches),
                  launches=sum(launch.times for launch in launches))


def read_report(text: str) -> tuple[int, int, int]:
    """(registers, bytes spilled, static shared memory) from what `ptxas -v` prints on one kernel."""
    registers = re.search(r"Used (\d+) registers", text)
    if not registers:
        raise JetSpecError(f"ptxas reported no registers: {text.strip()[:200]}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text))
    static = re.search(r"(\d+) bytes smem", text)
    return int(registers.group(1)), spills, int(static.group(1)) if static else 0
