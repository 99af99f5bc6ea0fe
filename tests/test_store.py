"""Compiled programs on disk: found again by everything that they depend on, and never a reason to fail."""

import hashlib
import os
import pickle
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jetspec_jax import programs, store
from jetspec_jax.cache import KVCache
from jetspec_jax.decode import ends
from jetspec_jax.pretrained import load_pretrained
from jetspec_jax.programs import Clock, Programs
from jetspec_jax.sampling import sequence_keys
from jetspec_jax.store import Place, place_of
from jetspec_jax.tiles import columns, tiled_product
from tests.test_scripts import PAIR, ROOT

TIMEOUT = 60
TOKENS, EOS = jnp.arange(6, dtype=jnp.int32).reshape(2, 3), jnp.asarray([2, -1], jnp.int32)
FOUND = [[False, False, True], [False, False, False]]


def find_ends(folder):
    return Programs(store=folder)(Clock(), ends, (), TOKENS, EOS).tolist()


@pytest.fixture
def nothing_compiles(monkeypatch):
    """A switch: from then on whatever is to be compiled fails."""
    def fail(*_, **__):
        pytest.fail("it was compiled")

    return lambda: monkeypatch.setattr(jax, "jit", fail)


def test_a_stored_program_is_found_without_tracing(tmp_path, nothing_compiles):
    folder = tmp_path / "not" / "there" / "yet"
    assert find_ends(folder) == FOUND
    (file,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    nothing_compiles()
    assert find_ends(folder) == FOUND


def test_a_stored_program_takes_and_returns_trees_and_takes_buffers_over(tmp_path, nothing_compiles):
    new = jnp.arange(8.0, dtype=jnp.float32).reshape(1, 1, 2, 2, 2)  # [L, B, R, K, C]
    start, two = jnp.zeros(1, jnp.int32), jnp.full(1, 2, jnp.int32)

    def commit():
        cache = KVCache(jnp.zeros((1, 1, 2, 3, 2), jnp.float32), jnp.zeros((1, 1, 2, 3, 2), jnp.float32))
        found = Programs(store=tmp_path)(Clock(), KVCache.commit, (), cache, new, new + 8, start, two, start, donate=0)
        assert cache.k.is_deleted() and cache.v.is_deleted() and not new.is_deleted()
        return found

    commit()
    nothing_compiles()
    found = commit()
    assert isinstance(found, KVCache)
    assert found.k[0, 0].tolist() == [[[0, 1], [4, 5], [0, 0]], [[2, 3], [6, 7], [0, 0]]]
    assert found.v[0, 0, 1].tolist() == [[10, 11], [14, 15], [0, 0]]


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_stored_leaves_memory_sooner(tmp_path, monkeypatch, writable):
    """And what cannot be stored does not: it would be compiled again."""
    monkeypatch.setattr(programs, "MOST_STORED", 3)
    (tmp_path / "file").write_text("no folder")
    kept, compiled = Programs(store=tmp_path if writable else tmp_path / "file"), []
    compile_one = Programs._compile
    monkeypatch.setattr(Programs, "_compile", lambda self, *what: compiled.append(what[2][0].shape) or compile_one(
        self, *what))
    for size in (1, 2, 3, 4, 5, 5, 4, 3, 2, 1):
        kept(Clock(), ends, (), TOKENS[:, :1].repeat(size, axis=1), EOS)
    assert [size for _, size in compiled] == [1, 2, 3, 4, 5, *([2, 1] if writable else [])]


def test_a_cache_that_can_only_be_read_is_read(tmp_path, monkeypatch, nothing_compiles):
    find_ends(tmp_path)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    nothing_compiles()
    assert find_ends(tmp_path) == FOUND


def test_a_folder_that_others_write_into_is_not_trusted(tmp_path):
    """Whoever can write a program into it can run code."""
    find_ends(tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    tmp_path.chmod(0o777)
    file.write_bytes(b"planted")
    assert find_ends(tmp_path) == FOUND
    assert file.read_bytes() == b"planted"  # neither read nor written
    tmp_path.chmod(0o700)
    find_ends(tmp_path)
    assert file.read_bytes() != b"planted"
    assert len(file.read_bytes()) > len(content) // 2


def test_what_is_prepared_is_loaded_beside_the_caller(tmp_path, monkeypatch, nothing_compiles):
    """And only if it is stored: two compilations at once would take twice the memory."""
    find_ends(tmp_path)
    entered, go_on, load = threading.Event(), threading.Event(), Place.load

    def load_slowly(self):
        entered.set()
        assert go_on.wait(TIMEOUT)
        return load(self)

    monkeypatch.setattr(Place, "load", load_slowly)
    nothing_compiles()
    kept = Programs(store=tmp_path)
    kept.prepare(ends, (), TOKENS[:1], EOS)  # was never compiled
    assert not entered.is_set()
    kept.prepare(ends, (), TOKENS, EOS)
    assert entered.wait(TIMEOUT)
    clock = Clock()
    threading.Timer(0.1, go_on.set).start()
    assert kept(clock, ends, (), TOKENS, EOS).tolist() == FOUND
    assert clock.waited > 0  # for the other thread


def test_another_process_says_the_same_with_the_programs_of_the_first(tmp_path):
    """Compiled afresh, loaded, and damaged: one answer. What is loaded is marked as used."""
    command = [sys.executable, "-c", (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from jetspec_jax.generate import generate\n"
        "from jetspec_jax.pretrained import load_pretrained; from jetspec_jax.programs import Programs\n"
        "pair = replace(load_pretrained(sys.argv[1], sys.argv[2]), programs=Programs(store=Path(sys.argv[3])))\n"
        "print(generate(pair, [3, 1, 4], max_new_tokens=24, eos_token_ids=()).token_ids)"), PAIR[1], PAIR[3], tmp_path]

    def answer():
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first, files = answer(), sorted(tmp_path.iterdir())
    assert len(files) == 5
    for file in files:
        os.utime(file, (0, 0))
    assert answer() == first
    assert sorted(tmp_path.iterdir()) == files
    assert all(file.stat().st_mtime > 0 for file in files)
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert answer() == first


def with_checksum(content):
    return hashlib.sha256(content).digest() + content


@pytest.mark.parametrize("content", [
    b"", b"x" * 31, b"x" * 5000, with_checksum(b""), with_checksum(zlib.compress(b"no pickle")),
    with_checksum(zlib.compress(pickle.dumps((b"nothing", None, None))))])
def test_a_program_that_cannot_be_read_is_compiled_and_stored_again(tmp_path, content, nothing_compiles):
    find_ends(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert find_ends(tmp_path) == FOUND
    nothing_compiles()
    assert find_ends(tmp_path) == FOUND


def test_one_flipped_bit_is_seen(tmp_path):
    find_ends(tmp_path)
    (file,) = tmp_path.iterdir()
    place, good = place_of(tmp_path, ends, (), (TOKENS, EOS), None, {}), file.read_bytes()
    assert place.file == file
    assert place.load() is not None
    for at in (0, 31, 32, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        assert place.load() is None


def test_a_folder_that_cannot_be_one_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert find_ends(tmp_path / "file") == FOUND
    assert find_ends(tmp_path / "file" / "inside") == FOUND


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert find_ends(tmp_path) == FOUND
    assert not list(tmp_path.iterdir())


def test_those_that_were_not_used_for_longest_go(tmp_path, monkeypatch):
    def multiply(columns):
        x = jnp.ones((1, 2), jnp.float32)
        return Programs(store=tmp_path)(Clock(), tiled_product, (), x, jnp.ones((columns, 2, 1), jnp.float32))

    (tmp_path / "tmphalf").write_bytes(b"x")  # what a process was killed in writing
    os.utime(tmp_path / "tmphalf", (1, 1))
    names = []
    for columns_ in (1, 2, 3):
        multiply(columns_)
        (new,) = set(tmp_path.iterdir()) - {tmp_path / "tmphalf", *names}
        os.utime(new, (columns_ + 1, columns_ + 1))
        names.append(new)
    multiply(1)  # used now
    monkeypatch.setattr(store, "MOST_BYTES", sum(file.stat().st_size for file in names) + names[1].stat().st_size // 2)
    multiply(4)
    left = set(tmp_path.iterdir())
    assert len(left) == 3
    assert left > {names[0], names[2]}


def test_whatever_a_program_depends_on_names_it(tmp_path, monkeypatch):
    seed, indices = jnp.asarray(1, jnp.uint32), jnp.arange(2, dtype=jnp.uint32)
    x, w = jnp.ones((2, 3), jnp.float32), jnp.ones((4, 3, 5), jnp.float32)
    cache = KVCache(x, x)

    def name(function=tiled_product, static=(), args=(x, w), donate=None, options=None):
        return place_of(tmp_path, function, static, args, donate, options or {}).file.name

    names = [name(), name(columns), name(static=(1,)), name(args=(x[:1], w)), name(args=(x.astype(jnp.int32), w)),
             name(args=((x, w),)), name(args=(cache,)), name(args=([x, x],)), name(donate=0), name(donate=1),
             name(options={"a": 1}), name(options={"a": 2}), name(sequence_keys, (), (seed, indices)),
             name(args=(jax.random.key(0),)), name(args=(jax.random.key(0, impl="rbg"),)),
             name(args=(jax.jit(lambda: 2.0)(),)), name(args=(jnp.asarray(2.0, jnp.float64),)),
             name(args=(jax.device_put(x, jax.devices()[3]),)), name(args=(x,))]
    with jax.default_matmul_precision("bfloat16"):
        names.append(name())
    with jax.enable_x64(False):
        names.append(name())

    def elsewhere(owner, attribute, value):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            store._surroundings.cache_clear()
            names.append(name())
        store._surroundings.cache_clear()

    (tmp_path / "jetspec_jax").mkdir()
    (tmp_path / "jetspec_jax" / "tiles.py").write_text("x = 1")
    elsewhere(store, "PACKAGES", (tmp_path / "jetspec_jax",))
    (tmp_path / "jetspec_jax" / "tiles.py").write_text("x = 2")
    elsewhere(store, "PACKAGES", (tmp_path / "jetspec_jax",))
    (tmp_path / "jetspec_jax" / "tiles.py").rename(tmp_path / "jetspec_jax" / "tile.py")
    elsewhere(store, "PACKAGES", (tmp_path / "jetspec_jax",))
    elsewhere(store.jaxlib, "__version__", "0.0.0")
    elsewhere(store, "cores", lambda: 77)
    elsewhere(store, "processor_details", lambda: "another")
    elsewhere(os, "environ", {**os.environ, "XLA_FLAGS": "--xla_cpu_enable_fast_math=true"})
    assert len(set(names)) == len(names)
    assert name() == names[0]
    assert all(len(name) == 64 for name in names)


def test_what_cannot_be_named_is_not_stored(tmp_path, monkeypatch):
    def local(x, y):
        return x + y

    def place(function=ends, static=(), args=(TOKENS, EOS)):
        return place_of(tmp_path, function, static, args, None, {})

    assert place() is not None
    assert place(local) is None
    assert place(jnp.add) is None  # not our source
    assert place(static=(object(),)) is None
    assert place(args=(TOKENS, jax.device_put(EOS, jax.devices()[1]))) is None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert place() is None
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
        assert place() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_loaded_pair_keeps_its_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pair = load_pretrained(PAIR[1], PAIR[3])
    pair.programs(Clock(), ends, (), TOKENS, EOS)
    (file,) = tmp_path.rglob("*/programs/*")
    assert file.is_file()
