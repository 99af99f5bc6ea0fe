"""Tokenizers and chat templates: how they travel with a target, and how they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from converters.gguf_file import GGUFFile
from jetspec_jax.checkpoint import first_line
from jetspec_jax.errors import JetSpecError
from jetspec_jax.files import read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model")
WHOLE = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))  # any of these makes a tokenizer
MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja


def save_tokenizer(source: Path, folder: Path) -> None:
    """Lets the tokenizer and chat templates of a source travel along; a source without any is fine.

    Raises:
        JetSpecError: a chat template that is no text, or the tokenizer of a GGUF file that is not supported.
    """
    if source.is_file():
        GGUFFile(source).save_tokenizer(folder)
        return
    files = [source / name for name in FILES]
    for file in [*files, *sorted((source / MORE_TEMPLATES).glob("*.jinja"))]:
        if not file.is_file():
            continue
        if file.suffix == ".jinja":
            _check_text(file)
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if folder.exists() and (source / "config.json").is_file():
        # Without a class of its own a tokenizer gets that of its model.
        kind = read_json(source / "config.json").get("model_type")
        (folder / "config.json").write_text(json.dumps({"model_type": kind}) + "\n")


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in a folder, or None where there is none; code in the folder is not run.

    Raises:
        JetSpecError: a damaged tokenizer, or one that is code.
    """
    if not any(all((folder / name).is_file() for name in names) for names in WHOLE):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files surface as many types
        raise JetSpecError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def _check_text(file: Path) -> None:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise JetSpecError(f"{file} is not UTF-8 text, and so no chat template: remove or repair it") from error
