"""The directory of a base model and its digest."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from confide.common.base import base_digest, check_base, model_type
from confide.common.errors import ModelError

FILES = {
    "model.safetensors": b"weights",
    "model-2.safetensors": b"more weights",
    "config.json": b'{"model_type": "bert"}',
    "vocab.txt": b"[PAD]\nword\n",
    "tokenizer_config.json": b"{}",
}
IGNORED = {"README.md": b"read me", "training_args.json": b"{}", ".gitattributes": b"*", "model.onnx": b"graph"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name, content in {**FILES, **IGNORED}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_digest_is_that_of_the_sorted_lines_of_sha256sum(base: Path) -> None:
    lines = [f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in sorted(FILES)]

    assert base_digest(base) == "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_digest_can_be_recomputed_with_sha256sum_alone(base: Path) -> None:
    command = f"LC_ALL=C; export LC_ALL; sha256sum {' '.join(reversed(FILES))} | sort -k2 | sha256sum"

    printed = subprocess.run(command, shell=True, cwd=base, check=True, capture_output=True, text=True).stdout

    assert base_digest(base) == f"sha256:{printed.split()[0]}"


def test_files_of_more_than_one_block_are_read_to_the_end(base: Path) -> None:
    content = bytes(range(256)) * 10_000
    (base / "model.safetensors").write_bytes(content)
    lines = [
        f"{hashlib.sha256(content if name == 'model.safetensors' else FILES[name]).hexdigest()}  {name}\n"
        for name in sorted(FILES)
    ]

    assert base_digest(base) == "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_the_digest_changes_with_weights_configuration_and_vocabulary(base: Path, name: str) -> None:
    before = base_digest(base)

    (base / name).write_bytes(FILES[name] + b" ")

    assert base_digest(base) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "merges.txt", "model-3.safetensors"])
def test_the_digest_changes_with_a_decisive_file_that_comes_or_goes(base: Path, name: str) -> None:
    before = base_digest(base)

    (base / name).write_bytes(b"new")

    assert base_digest(base) != before
    (base / name).unlink()
    assert base_digest(base) == before


def test_the_digest_changes_if_two_files_change_places(base: Path) -> None:
    before = base_digest(base)

    (base / "model.safetensors").write_bytes(FILES["model-2.safetensors"])
    (base / "model-2.safetensors").write_bytes(FILES["model.safetensors"])

    assert base_digest(base) != before


@pytest.mark.parametrize("name", [*IGNORED, "another.txt"])
def test_the_digest_does_not_change_with_files_that_decide_nothing(base: Path, name: str) -> None:
    before = base_digest(base)

    (base / name).write_bytes(b"changed")

    assert base_digest(base) == before


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "model.pkl", "tf_model.h5", "model.ckpt"])
def test_pickled_weights_alone_are_refused(tmp_path: Path, pickled: str) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / pickled).write_bytes(b"\x80\x04.")

    with pytest.raises(ModelError, match=r"no \*.safetensors file. Other weight formats can run code"):
        base_digest(tmp_path)


def test_a_directory_named_like_weights_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").mkdir()

    with pytest.raises(ModelError, match=r"no \*.safetensors file"):
        base_digest(tmp_path)


def test_a_model_without_a_directory_or_a_configuration_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no model directory .* nothing is downloaded"):
        base_digest(base / "none")
    with pytest.raises(ModelError, match="There is no model directory"):
        base_digest(base / "config.json")
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config.json"):
        base_digest(base)


def test_a_base_of_another_digest_is_refused(base: Path) -> None:
    check_base(base, base_digest(base))

    with pytest.raises(ModelError, match=f"has digest {base_digest(base)}, but the plan names sha256:0000"):
        check_base(base, "sha256:" + "0" * 64)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors", "b": "sub/x.safetensors"}}),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}),
        ("config.json", {"model_type": "bert", "transformers_weights": "sub/x.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"]}),
    ],
)
def test_a_base_that_names_files_which_no_digest_covers_is_refused(
    base: Path, name: str, content: dict[str, object]
) -> None:
    (base / name).write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(ModelError, match="names files that no digest covers"):
        base_digest(base)


def test_a_base_in_several_parts_has_a_digest(base: Path) -> None:
    parts = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(parts), encoding="utf-8")

    assert base_digest(base).startswith("sha256:")


def test_the_model_type_is_read_from_the_configuration(base: Path) -> None:
    assert model_type(base) == "bert"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", json.dumps({"architectures": ["Bert"]}).encode(), b"\xff", b"[" * 100_000],
    ids=["empty", "cut short", "list", "null", "no type", "no text", "deep"],
)
def test_a_configuration_that_is_none_is_refused(base: Path, content: bytes) -> None:
    (base / "config.json").write_bytes(content)

    with pytest.raises(ModelError, match="missing or not a model's configuration"):
        model_type(base)
