"""Compiled programs, kept by what they were compiled for; what callers wait for them, and how long they may run."""

from __future__ import annotations

import ctypes
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import jax

from jetspec_jax.store import Place, place_of

# The whole loop of rounds becomes one CUDA graph: the GPU itself decides whether to go on, and the host neither
# launches nor waits within it. Without the second option XLA makes no graph of a loop at all. Products that share an
# operand stay apart: to join them XLA copies their weights side by side every time. COLLECTIVES are not in the list:
# a graph that loops cannot hold NCCL's as they are (github.com/NVIDIA/nccl, issue 1986), so over a mesh of several GPUs
# the loop is the host's, which launches graphs and collectives in turn.
GPU_OPTIONS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,WHILE,CONDITIONAL",
               "xla_gpu_graph_min_graph_size": 1, "xla_gpu_dot_merger_threshold_mb": 0}

# A call of `generate` needs five, and two to four more for other lengths of prompts and answers; two of them are large
# (of the default pair nearly 100 MB each on a CPU). What is stored comes back within a second, what is not is compiled
# again. Nine are one shape of prompts and answers decoded in two ways.
MOST_PROGRAMS, MOST_STORED = 64, 9

DISPATCH_SECONDS = 0.5
MOST_ROUNDS = 1024  # of a dispatch
ROUNDS_OF_PROCESSES = 16


def compiler_options() -> dict[str, Any]:
    """What XLA must be told on this backend."""
    return GPU_OPTIONS if jax.default_backend() == "gpu" else {}


def give_back_memory() -> None:
    """Tells the C library to return what was freed: glibc would keep a hundred megabytes after every large program that
    was compiled, loaded or let go."""
    with suppress(OSError, AttributeError, TypeError):  # another library, or another system
        ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """Tells a caller's time, but stands still while the caller waits for programs.

    Attributes:
        waited: seconds of waiting so far, for its own compilation or for another thread's.
    """

    def __init__(self) -> None:
        self.waited = 0.0

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter() - self.waited


class Pace:
    """How many rounds a dispatch may take: about half a second of them.

    Nothing ends a program that runs, so this is how long a device goes on with what nobody wants any more (Ctrl-C).

    Attributes:
        rounds: of the next dispatch. Where several processes must agree on it, none can go by its own clock.
    """

    def __init__(self) -> None:
        self.rounds = 1 if jax.process_count() == 1 else ROUNDS_OF_PROCESSES

    def took(self, rounds: int, seconds: float) -> None:
        """Learns how long a dispatch took for all of its rounds."""
        if jax.process_count() == 1:
            self.rounds = max(1, min(MOST_ROUNDS, int(DISPATCH_SECONDS * rounds / seconds)))


@dataclass
class _Program:
    """A place for a program; who holds `compiling` fills it."""

    run: Callable[..., Any] | None = None
    stored: bool = False
    compiling: Lock = field(default_factory=Lock)


class Programs:
    """Compiles ahead of time, so that compilation is never counted as decoding; for any number of threads.

    Each program is compiled once: others that want it wait for it, and try themselves should it fail. Of too many,
    those go that were not used for longest.

    Args:
        options: what XLA must be told; None takes `compiler_options()`.
        most: how many programs are kept in memory.
        store: a folder that keeps them for later processes too (`jetspec_jax.store`).

    Attributes:
        most_stored: how many of those that are stored stay in memory too; who goes through many shapes in turn may
            raise it.
        compile_seconds: seconds that callers waited so far for programs to be compiled, or loaded where they were
            stored; those of all threads added up.
    """

    def __init__(self, options: dict[str, Any] | None = None, most: int = MOST_PROGRAMS,
                 store: Path | None = None) -> None:
        self._options, self._most, self._store = options, most, store
        self.most_stored = MOST_STORED
        self._lock = Lock()  # of what follows; never held for long
        self._programs: OrderedDict[Any, _Program] = OrderedDict()
        self.compile_seconds = 0.0

    def clear(self) -> None:
        """Forgets all programs and frees their memory."""
        with self._lock:
            self._programs.clear()

    def __call__(self, clock: Clock, function: Callable[..., Any], static: tuple, *args: Any,
                 donate: int | None = None) -> Any:
        """Runs `function(*static, *args)`, compiled.

        Args:
            clock: of the caller.
            static: hashable leading arguments.
            donate: index into `args` whose buffers the result may take over.
        """
        program = self._find(function, static, args, donate)
        if program.run is None:
            start = time.perf_counter()
            with program.compiling:
                if program.run is None:
                    program.run, program.stored = self._compile(function, static, args, donate)
            waited = time.perf_counter() - start
            clock.waited += waited
            with self._lock:
                self.compile_seconds += waited
                self._let_go()
            give_back_memory()
        assert program.run is not None
        return program.run(*args)

    def prepare(self, function: Callable[..., Any], static: tuple, *args: Any, donate: int | None = None) -> None:
        """Begins to load what will be called soon and is stored, beside what the caller does until then."""
        program = self._find(function, static, args, donate)
        if program.run is None:
            place = self._place(function, static, args, donate)
            if place is not None and place.file.exists():
                Thread(target=self._load, args=(program, place)).start()

    def _load(self, program: _Program, place: Place) -> None:
        with program.compiling:
            if program.run is None:
                program.run = place.load()
                program.stored = program.run is not None
        give_back_memory()

    def _find(self, function: Callable[..., Any], static: tuple, args: tuple, donate: int | None) -> _Program:
        leaves, structure = jax.tree.flatten(args)
        key = (function, static, donate, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            program = self._programs.setdefault(key, _Program())
            self._programs.move_to_end(key)
        return program

    def _let_go(self) -> None:
        """Forgets programs that were not used for longest, while there are too many."""
        ready = [key for key, program in self._programs.items() if program.run is not None]
        stored = [key for key in ready if self._programs[key].stored]
        for key in {*ready[:max(len(ready) - self._most, 0)], *stored[:max(len(stored) - self.most_stored, 0)]}:
            del self._programs[key]

    @property
    def _told(self) -> dict[str, Any]:
        return compiler_options() if self._options is None else self._options

    def _place(self, function: Callable[..., Any], static: tuple, args: tuple, donate: int | None) -> Place | None:
        return None if self._store is None else place_of(self._store, function, static, args, donate, self._told)

    def _compile(self, function: Callable[..., Any], static: tuple, args: tuple,
                 donate: int | None) -> tuple[Callable[..., Any], bool]:
        """(a program, from the store if it is there; whether it is there now)."""
        place = self._place(function, static, args, donate)
        run = None if place is None else place.load()
        stored = run is not None
        if run is None:
            # Of a function that lives on, JAX would keep what it traced and compiled, whoever lets go of it.
            jitted = jax.jit(partial(function, *static), donate_argnums=() if donate is None else donate)
            run = jitted.lower(*args).compile(self._told)
            stored = place is not None and place.save(run)
        return run, stored
