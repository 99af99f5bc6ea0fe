"""What decoding takes of memory, and what a user hears where there is not enough."""

from contextlib import nullcontext

import jax
import pytest

from jetspec_jax import JetSpecError, memory
from jetspec_jax.decode import Decoder
from jetspec_jax.draft import NoDrafter
from jetspec_jax.generate import generate
from jetspec_jax.memory import enough_memory, free_memory
from jetspec_jax.sharding import make_mesh
from tests.models import random_pair, tiny_target

SLOTS = 10**6
BYTES = 2 * 2 * 2 * 8 * 8 + 3 * 4  # of a slot: keys and values, layers, heads, their width, float64; three logs


@pytest.mark.parametrize(("batch", "mesh", "sequences"), [(1, None, 1), (3, None, 3), (1, (2, 2), 4)])
def test_what_a_cpu_has_not_is_refused_before_it_is_asked(batch, mesh, sequences, monkeypatch):
    decoder, mesh = Decoder(tiny_target(), NoDrafter()), mesh and make_mesh(*mesh)
    needed = sequences * SLOTS * BYTES
    monkeypatch.setattr(memory, "free_memory", lambda: needed + 1000)  # some bytes for each sequence
    with enough_memory(decoder, batch, SLOTS, mesh):
        pass
    monkeypatch.setattr(memory, "free_memory", lambda: needed)
    each, left = batch * SLOTS * BYTES / 1e9, needed / 1e9
    with pytest.raises(JetSpecError) as error, enough_memory(decoder, batch, SLOTS, mesh):
        pass
    assert str(error.value) == (f"{batch} x {SLOTS} tokens take {each:.1f} GB on a device, and there is not enough "
                                f"memory: lower batch_size or max_new_tokens ({left:.1f} GB are left)")


def test_several_processes_do_not_decide_each_for_itself(monkeypatch):
    """One that gave up would leave the others waiting."""
    monkeypatch.setattr(memory, "free_memory", lambda: 0)
    for processes, refused in ((1, pytest.raises(JetSpecError)), (2, nullcontext())):
        monkeypatch.setattr(jax, "process_count", lambda count=processes: count)
        with refused, enough_memory(Decoder(tiny_target(), NoDrafter()), 1, 256, None):
            pass


def test_what_xla_cannot_allocate_is_told(monkeypatch):
    """More than addresses reach, so that no system promises it."""
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    pair = random_pair(0, tiny_target(max_positions=2**30))
    with pytest.raises(JetSpecError, match=r"^1000 x 805306368 tokens take 4[\d,.]+ GB on a device.*max_new_tokens$"):
        generate(pair, [[1]] * 1000, max_new_tokens=8 * 10**8, batch_size=1000, tree=None)


def test_other_errors_of_xla_stay_what_they_are():
    error = jax.errors.JaxRuntimeError("INTERNAL: a defect")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"), \
            enough_memory(Decoder(tiny_target(), NoDrafter()), 1, 256, None):
        raise error


def test_what_linux_can_give_away():
    psutil = pytest.importorskip("psutil")
    free = free_memory()
    assert free is None or abs(free - psutil.virtual_memory().available) < 2**30
