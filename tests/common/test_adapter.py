"""Named tensors, one flat vector, and everything a seed decides."""

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies
from hypothesis.extra import numpy as arrays

from confide.common.adapter import (
    Floats,
    Layout,
    frozen_factor,
    load_tensors,
    load_vector,
    save_vector,
    seeded_head,
)
from confide.common.errors import AdapterError

SHAPES = {"layers.10.B": (3, 2), "layers.9.B": (2,), "head.bias": (), "Z": (1, 2, 2)}
FINITE = strategies.floats(width=32, allow_nan=False, allow_infinity=False)
NAMES = strategies.text(
    strategies.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
)
LAYOUTS = strategies.dictionaries(NAMES, arrays.array_shapes(max_dims=3, max_side=4), min_size=1, max_size=5).map(
    Layout.of
)


def vector_of(layout: Layout) -> Floats:
    return np.arange(layout.length, dtype=np.float32)


def test_tensors_are_sorted_by_code_point() -> None:
    layout = Layout.of({"b": (1,), "a.10": (1,), "a.9": (1,), "B": (1,), "é": (1,), "\U0001f600": (1,), "\uffff": (1,)})

    assert [name for name, _ in layout.tensors] == ["B", "a.10", "a.9", "b", "é", "\uffff", "\U0001f600"]


def test_the_order_in_which_tensors_are_given_does_not_matter() -> None:
    other = Layout.of(dict(reversed(SHAPES.items())))

    assert other == Layout.of(SHAPES)
    assert other.digest == Layout.of(SHAPES).digest


def test_tensors_lie_end_to_end_in_row_major_order() -> None:
    layout = Layout.of({"b": (2, 2), "a": (3,)})

    parts = layout.split(np.arange(7, dtype=np.float32))

    assert parts["a"].tolist() == [0, 1, 2]
    assert parts["b"].tolist() == [[3, 4], [5, 6]]


@given(LAYOUTS, strategies.data())
def test_flatten_is_the_inverse_of_split(layout: Layout, data: strategies.DataObject) -> None:
    vector = data.draw(arrays.arrays(np.float32, layout.length, elements=FINITE))

    again = layout.flatten(layout.split(vector))

    assert again.dtype == np.float32
    assert again.tobytes() == vector.tobytes()


@given(LAYOUTS, strategies.data())
def test_split_is_the_inverse_of_flatten(layout: Layout, data: strategies.DataObject) -> None:
    tensors = {name: data.draw(arrays.arrays(np.float32, shape, elements=FINITE)) for name, shape in layout.tensors}

    again = layout.split(layout.flatten(tensors))

    assert list(again) == [name for name, _ in layout.tensors]
    assert all(np.array_equal(again[name], tensor) for name, tensor in tensors.items())


def test_transposed_tensors_are_flattened_as_they_read() -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3).T

    assert Layout.of({"a": (3, 2)}).flatten({"a": tensor}).tolist() == [0, 3, 1, 4, 2, 5]


def test_the_digest_changes_with_names_and_shapes() -> None:
    digests = {
        Layout.of(shapes).digest
        for shapes in (
            SHAPES,
            SHAPES | {"Z": (1, 4)},
            SHAPES | {"Z": (2, 2)},
            SHAPES | {"more": (1,)},
            {("z" if name == "Z" else name): shape for name, shape in SHAPES.items()},
        )
    }

    assert len(digests) == 5


def test_the_digest_is_that_of_the_documented_bytes() -> None:
    spelled = b'{"format":"confide-layout/1","tensors":[["a",[3]],["b",[2,2]]]}'

    assert Layout.of({"b": (2, 2), "a": (3,)}).digest == "sha256:" + hashlib.sha256(spelled).hexdigest()


@pytest.mark.parametrize("length", [0, 10, 12])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(AdapterError, match=r"this layout has \(13,\)"):
        Layout.of(SHAPES).split(np.zeros(length, np.float32))


@pytest.mark.parametrize(
    "change",
    [{"Z": np.zeros((2, 2))}, {"extra": np.zeros(1)}, {"head.bias": np.zeros(1)}],
    ids=["shape", "extra", "scalar"],
)
def test_tensors_of_another_layout_are_refused(change: dict[str, npt.NDArray[np.floating]]) -> None:
    layout = Layout.of(SHAPES)

    with pytest.raises(AdapterError, match="a name or a shape differs"):
        layout.flatten({**layout.split(vector_of(layout)), **change})


def test_split_gives_views_of_the_vector() -> None:
    vector = vector_of(Layout.of(SHAPES))

    assert all(np.shares_memory(part, vector) for part in Layout.of(SHAPES).split(vector).values())


def test_a_missing_tensor_is_refused() -> None:
    layout = Layout.of(SHAPES)
    tensors = layout.split(vector_of(layout))
    del tensors["Z"]

    with pytest.raises(AdapterError, match="a name or a shape differs"):
        layout.flatten(tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(AdapterError, match="not finite"):
        Layout.of({"a": (2,)}).flatten({"a": np.array([0, value])})


def test_a_vector_saved_as_safetensors_reads_back_to_the_same_bytes(tmp_path: Path) -> None:
    layout = Layout.of(SHAPES)
    vector = np.random.default_rng(0).normal(size=layout.length).astype(np.float32)
    vector[0] = -0.0

    save_vector(tmp_path / "a.safetensors", vector, layout)

    assert load_vector(tmp_path / "a.safetensors", layout).tobytes() == vector.tobytes()
    assert {name: tensor.shape for name, tensor in load_tensors(tmp_path / "a.safetensors").items()} == SHAPES


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    layout = Layout.of(SHAPES)
    save_vector(tmp_path / "a.safetensors", vector_of(layout), layout)

    with pytest.raises(AdapterError, match="a name or a shape differs"):
        load_vector(tmp_path / "a.safetensors", Layout.of(SHAPES | {"Z": (4,)}))


def safetensors(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def typed(name: str, size: int) -> bytes:
    header = {"a": {"dtype": name, "shape": [2], "data_offsets": [0, 2 * size]}}
    return safetensors(json.dumps(header).encode(), bytes(2 * size))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        safetensors(b"{{"),
        safetensors(b"[" * 10_000),
        safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(7)),
        safetensors(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', bytes(8)),
        b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    ],
    ids=["empty", "header too large", "no JSON", "deep", "cut short", "shape too large", "pickle"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)

    with pytest.raises(AdapterError, match="is damaged or not safetensors"):
        load_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("kind", "size"), [("BF16", 2), ("F8_E4M3", 1), ("I64", 8), ("BOOL", 1), ("C64", 8)])
def test_a_file_of_other_numbers_than_floats_is_refused(tmp_path: Path, kind: str, size: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(typed(kind, size))

    with pytest.raises(AdapterError, match="holds other numbers than floats"):
        load_tensors(tmp_path / "a.safetensors")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(AdapterError, match="Cannot read the adapter"):
            load_tensors(path)


@pytest.mark.parametrize(
    ("rank", "width"), [(1, 1), (1, 7), (2, 16), (3, 8), (8, 384), (16, 768), (5, 312), (64, 4096)]
)
def test_rows_of_the_frozen_factor_are_orthonormal_where_the_power_of_two_divides_the_width(
    rank: int, width: int
) -> None:
    factor = frozen_factor("layers.0.query", rank, width, seed=1).astype(np.float64)

    assert factor.shape == (rank, width)
    assert np.abs(factor @ factor.T - np.eye(rank)).max() < 1e-6


def test_rows_of_the_frozen_factor_are_nearly_orthonormal_at_any_width() -> None:
    factor = frozen_factor("layers.0.query", 8, 100, seed=1).astype(np.float64)

    assert np.allclose((factor**2).sum(axis=1), 1, atol=1e-6)
    assert np.abs(factor @ factor.T - np.eye(8)).max() <= 8 / 100


def test_the_frozen_factor_differs_with_name_and_seed_only() -> None:
    first = frozen_factor("query", 4, 64, seed=0)

    assert first.tobytes() == frozen_factor("query", 4, 64, seed=0).tobytes()
    assert first.tobytes() != frozen_factor("value", 4, 64, seed=0).tobytes()
    assert first.tobytes() != frozen_factor("query", 4, 64, seed=1).tobytes()


def test_the_frozen_factor_has_the_pinned_bits_on_every_machine() -> None:
    factor = frozen_factor("x", 8, 384, seed=7)

    assert factor.dtype == np.float32
    assert hashlib.sha256(factor.astype("<f4").tobytes()).hexdigest() == (
        "d66457d5e82d9b4ec727507bddd0ed155e7813942686aba7e2417e0d362e694e"
    )


def test_the_seeded_head_is_uniform_with_standard_deviation_0_02() -> None:
    # Kolmogorov-Smirnov at 100,000 draws: a uniform sample exceeds 0.0087 with probability 2·exp(-2·n·D²) < 1e-6.
    head = np.sort(seeded_head("classifier.weight", (100, 1000), seed=3).ravel().astype(np.float64))
    bound = 0.02 * math.sqrt(3)

    places = (head + bound) / (2 * bound)
    distance = np.abs(places - np.arange(0.5, len(head)) / len(head)).max()

    assert -bound - 1e-9 <= head[0] < head[-1] <= bound + 1e-9
    assert distance < 0.0087
    assert head.std() == pytest.approx(0.02, rel=0.01)


def test_the_seeded_head_has_the_pinned_bits_on_every_machine() -> None:
    head = seeded_head("classifier.weight", (3, 16), seed=7)

    assert head.shape == (3, 16)
    assert head.dtype == np.float32
    assert hashlib.sha256(head.astype("<f4").tobytes()).hexdigest() == (
        "31d165352686ae3b330b994fa395408179b7bb4b5be07c5875e5f20be93ede93"
    )
    assert head.tobytes() != seeded_head("classifier.weight", (3, 16), seed=8).tobytes()
    assert head.tobytes() != seeded_head("classifier.bias", (3, 16), seed=7).tobytes()


@settings(max_examples=20)
@given(strategies.integers(0, 2**63 - 1), strategies.text(max_size=20))
def test_any_seed_and_name_give_finite_numbers(seed: int, name: str) -> None:
    assert np.isfinite(seeded_head(name, (4,), seed)).all()
    assert np.isfinite(frozen_factor(name, 3, 5, seed)).all()
