"""Tokenizers and chat templates: how they travel with a target, and how they are loaded."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from converters.gguf_file import GGUFFile
from jetspec_jax.chat_template import MAX_TEMPLATE
from jetspec_jax.errors import JetSpecError
from jetspec_jax.files import MAX_JSON, MAX_TEXT, cannot_read, local_path, read_bytes, read_json, read_text
from jetspec_jax.text import tokenizer_errors, without_advice

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
FILES = {"tokenizer.json": MAX_TEXT, "vocab.json": MAX_TEXT, "merges.txt": MAX_TEXT, "tokenizer.model": MAX_TEXT,
         "added_tokens.json": MAX_JSON, "chat_template.json": MAX_JSON}  # the most bytes of each
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
WHOLE = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))  # any of these makes a tokenizer
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the class of a tokenizer.json that stands for itself
# Settings that transformers takes for files to open, or for what it reads from them.
OPENED = ("vocab", "merges", "init_inputs", "tokenizer_object", "name_or_path")
OPENED_ENDINGS = ("_file", "_files", "_path", "_dir")


def save_tokenizer(source: Path, folder: Path) -> None:
    """Lets the tokenizer and chat templates of a source travel along; a source without any is fine.

    Only known files do, and settings that name no other ones: whatever else lies beside them stays out of reach.

    Raises:
        JetSpecError: a file that is not ordinary or too large, a chat template that is no text, a tokenizer that is
            code, or the tokenizer of a GGUF file that is not supported.
    """
    if source.is_file():
        GGUFFile(source).save_tokenizer(folder)
        return
    contents = {name: read_bytes(source / name, most) for name, most in FILES.items() if local_path(source / name)}
    for name in SETTINGS:
        if local_path(source / name):
            settings = read_json(source / name)
            _check_no_code(source / name, settings)
            contents[name] = _as_json(_without_files(settings))
    for file in [source / TEMPLATE, *_more_templates(source / MORE_TEMPLATES)]:
        if local_path(file):
            contents[str(file.relative_to(source))] = read_text(file, MAX_TEMPLATE).encode()
    if contents and local_path(source / "config.json"):
        # Without a class of its own a tokenizer gets that of its model.
        config = read_json(source / "config.json")
        contents["config.json"] = _as_json({name: config[name] for name in ("model_type", "tokenizer_class")
                                            if isinstance(config.get(name), str)})
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def load_tokenizer(source: Path) -> Any:
    """The Hugging Face tokenizer of a folder or GGUF file, or None where there is none.

    It is loaded from a copy of the files that `save_tokenizer` lets travel, so that transformers reaches no code, no
    pickle and no other path; nor does it ask anybody or use the network.

    Raises:
        JetSpecError: a damaged tokenizer, or one that is code (see `save_tokenizer`); or there is no room for the copy.
    """
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as error:
        raise _cannot_copy(source, error) from error
    with temporary as copy:
        folder = Path(copy)
        try:
            save_tokenizer(source, folder)
        except OSError as error:
            raise _cannot_copy(source, error) from error
        if not any(all((folder / name).is_file() for name in names) for names in WHOLE):
            return None
        with without_advice():
            from transformers import PreTrainedTokenizerBase

        try:
            with tokenizer_errors(f"the tokenizer in {source} cannot be loaded"):
                tokenizer = _from_copy(folder)
        except JetSpecError as error:
            raise JetSpecError(str(error).replace(copy, str(source))) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise JetSpecError(f"the tokenizer in {source} cannot be loaded: its class is none of a "
                           f"tokenizer but {type(tokenizer).__name__}")
    for settings in (tokenizer.init_kwargs, vars(tokenizer)):  # the copy is gone
        settings.update({name: value.replace(copy, str(source), 1) for name, value in settings.items()
                         if isinstance(value, str) and value.startswith(copy)})
    return tokenizer


def _from_copy(folder: Path) -> Any:
    """What transformers makes of files that are known to be harmless."""
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    plain = named in GENERIC and (folder / "tokenizer.json").is_file() and not (folder / "config.json").is_file()
    if plain:  # no model to choose a class by: AutoTokenizer, which imports models and PyTorch, would take the same
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _cannot_copy(source: Path, error: OSError) -> JetSpecError:
    return JetSpecError(f"cannot copy the tokenizer of {source} into TMPDIR: {error.strerror or error}")


def _more_templates(folder: Path) -> list[Path]:
    if local_path(folder) is None:
        return []
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if Path(name).suffix == ".jinja"]
    except OSError as error:
        raise cannot_read(folder, error) from error


def _check_no_code(file: Path, settings: dict[str, Any]) -> None:
    """Raises JetSpecError for a tokenizer whose class comes with its files and not with transformers."""
    code = settings.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if not code:
        return
    import transformers

    named = [settings["tokenizer_class"]] if settings.get("tokenizer_class") else list(code)
    classes = [str(name).rpartition(".")[2].removesuffix("Fast") for name in named if name]
    if not any(hasattr(transformers, name + fast) for name in classes for fast in ("", "Fast")):
        raise JetSpecError(f"{file}: the tokenizer is code of its own ({', '.join(classes)[:200]}), and code from a "
                           "checkpoint is never run: save a tokenizer.json that needs none")


def _without_files(value: Any) -> Any:
    """Settings without those that name files, nor code, at any depth."""
    if isinstance(value, list):
        return [_without_files(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_files(inner) for name, inner in value.items()
            if name not in (*OPENED, "auto_map") and not name.endswith(OPENED_ENDINGS)}


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
