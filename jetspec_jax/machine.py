"""The processor that this process runs on."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor as its maker calls it, where the system tells."""
    named = re.search(r"^model name\s*: (.+)$", processor_details(), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


@cache
def processor_details() -> str:
    """Which processor it is and what it can do: several makers give the same name to many."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return repr(platform.uname())
    told = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags", "Features", "CPU ")
    return "\n".join(line for line in first.splitlines() if line.startswith(told))
