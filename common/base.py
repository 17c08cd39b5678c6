"""The directory of a base model: which files it holds, and one digest over them.

Nothing is ever downloaded and no code in the directory is ever run: weights are safetensors, the rest is JSON and text.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path

from confide.common.errors import ModelError, UsageError

# Files that decide what the model computes. Others (README, training configurations) do not enter the digest.
_DECISIVE = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "model.safetensors.index.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)


def base_digest(directory: Path) -> str:
    """Return the digest of a base model: SHA-256 over the sorted lines `sha256-of-file  name`.

    The lines cover every `*.safetensors` file and those configuration and tokenizer files that decide what the model
    computes, so that neither weights nor vocabulary can be exchanged unnoticed. The same as
    `sha256sum FILES | sort -k2 | sha256sum` in that directory.

    Args:
        directory: A local directory in Hugging Face's layout.

    Raises:
        ModelError: There is no such directory, no safetensors file in it or no `config.json`.
    """
    return files_digest(sorted(_decisive_files(directory), key=lambda file: file.name))


def files_digest(files: Iterable[Path]) -> str:
    """Return SHA-256 over the lines `sha256-of-file  name` of the given files, in their order.

    Raises:
        UsageError: A file cannot be read.
    """
    lines = []
    for file in files:
        try:
            with file.open("rb") as stream:
                lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}\n")
        except OSError as error:
            raise UsageError(f"Cannot read {file}: {error.strerror or error}.") from None
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def check_base(directory: Path, expected: str) -> None:
    """Return if the base model in `directory` has the digest `expected`.

    Raises:
        ModelError: It has another, or is no base model.
    """
    found = base_digest(directory)
    if found != expected:
        raise ModelError(
            f"The base model in {directory} has digest {found}, but the plan names {expected}. "
            "Use the model the plan was written for, or write a plan for this one: confide plan new --model DIR"
        )


def model_type(directory: Path) -> str:
    """Return the architecture named in `config.json`, such as `bert`.

    Raises:
        ModelError: The file is missing or is not a model's configuration.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{directory}/config.json is missing or not a model's configuration ({type(error).__name__}). "
            "Give the directory of a model in Hugging Face's layout."
        ) from None


def _decisive_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ModelError(f"There is no model directory {directory}. Give a local path; nothing is downloaded.")
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory} holds an adapter_config.json, so what is loaded from it would be an adapted model, not a base. "
            "Merge that adapter first, or remove it."
        )
    weights = [file for file in directory.glob("*.safetensors") if file.is_file()]
    if not weights:
        raise ModelError(
            f"{directory} holds no *.safetensors file. Other weight formats can run code when loaded and are refused; "
            "convert the model with safetensors first."
        )
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no config.json, so it is no model in Hugging Face's layout.")
    _check_index(directory, {file.name for file in weights})
    return weights + [directory / name for name in _DECISIVE if (directory / name).is_file()]


def _check_index(directory: Path, weights: Collection[str]) -> None:
    """Return if the model's own files name no others to be loaded than those that the digest covers."""
    index = _fields(directory / "model.safetensors.index.json").get("weight_map")
    named = {
        "model.safetensors.index.json": set(map(str, index.values())) - {*weights}
        if isinstance(index, dict)
        else set(),
        "config.json": _names(_fields(directory / "config.json").get("transformers_weights")),
        "tokenizer_config.json": _names(_fields(directory / "tokenizer_config.json").get("fast_tokenizer_files"))
        - {"tokenizer.json"},
    }
    for name, beyond in named.items():
        if beyond:
            raise ModelError(
                f"{directory / name} names files that no digest covers, {ascii(min(beyond))[:100]} among them. Save the model "
                "anew with save_pretrained into one directory."
            )


def _fields(path: Path) -> dict[str, object]:
    """Return what a file of JSON holds; nothing if it is none, which then cannot be loaded either."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _names(value: object) -> set[str]:
    return set(map(str, value)) if isinstance(value, list) else set() if value is None else {str(value)}
