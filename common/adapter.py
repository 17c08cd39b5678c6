"""An adapter as one flat float32 vector, and back.

The order is fixed: tensors sorted by name (code points), each in row-major order, end to end. The layout, names and
shapes in that order, has a digest, so that two sides know that they mean the same vector. Here too is everything a
seed decides: the frozen factors A and the head's start, made of exact arithmetic only and hence equal on every machine.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from confide.common.canonical import canonical_bytes, sha256
from confide.common.errors import AdapterError

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which tensors a vector holds, in which order.

    Attributes:
        tensors: (name, shape), sorted by name.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Return the layout of tensors with these names and shapes."""
        return cls(tensors=tuple(sorted((name, tuple(shape)) for name, shape in shapes.items())))

    @property
    def length(self) -> int:
        """How many numbers the vector has."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 over names and shapes."""
        return sha256(canonical_bytes({"format": "confide-layout/1", "tensors": list(self.tensors)}))

    def split(self, vector: Floats) -> dict[str, Floats]:
        """Return the named tensors of `vector`, as views of it.

        Raises:
            AdapterError: The vector has another length.
        """
        if vector.shape != (self.length,):
            raise AdapterError(f"A vector of shape {vector.shape} was given; this layout has ({self.length},).")
        tensors, start = {}, 0
        for name, shape in self.tensors:
            size = math.prod(shape)
            tensors[name] = vector[start : start + size].reshape(shape)
            start += size
        return tensors

    def flatten(self, tensors: Mapping[str, npt.NDArray[np.floating]]) -> Floats:
        """Return `tensors` as one vector.

        Raises:
            AdapterError: A tensor is missing, too many, of another shape, or not finite.
        """
        if {name: tensor.shape for name, tensor in tensors.items()} != dict(self.tensors):
            raise AdapterError("The tensors are not those of this layout: a name or a shape differs.")
        parts = [tensors[name].astype(np.float32).ravel() for name, _ in self.tensors]
        vector = np.concatenate([np.empty(0, np.float32), *parts])
        if not np.isfinite(vector).all():
            raise AdapterError("The adapter holds a value that is not finite.")
        return vector


def save_vector(path: Path, vector: Floats, layout: Layout) -> None:
    """Write `vector` to `path` as safetensors, one tensor per name."""
    from safetensors.numpy import save_file

    save_file({name: np.asarray(part, order="C") for name, part in layout.split(vector).items()}, path)


def load_vector(path: Path, layout: Layout) -> Floats:
    """Return the vector that `save_vector` wrote.

    Raises:
        AdapterError: The file is missing, damaged or of another layout.
    """
    return layout.flatten(load_tensors(path))


def load_tensors(path: Path) -> dict[str, Floats]:
    """Return the named tensors of a safetensors file.

    Raises:
        AdapterError: The file is missing or damaged, or holds other numbers than floats of 16, 32 or 64 bits.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = dict(load_file(path))
    except OSError as error:
        raise AdapterError(f"Cannot read the adapter {path}: {error.strerror or error}.") from None
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"The adapter {path} is damaged or not safetensors: {error}.") from None
    except (TypeError, AttributeError):  # numbers numpy has no name for, such as bfloat16
        tensors = None
    if tensors is None or any(tensor.dtype.kind != "f" for tensor in tensors.values()):
        raise AdapterError(
            f"The adapter {path} holds other numbers than floats of 16, 32 or 64 bits. Save it as float32."
        )
    return tensors


def frozen_factor(name: str, rank: int, width: int, seed: int) -> Floats:
    """Return the factor A of one module: (rank, width), rows of length 1, fixed by seed and name.

    Each row is a row of a Hadamard matrix, repeated over the width with random signs, over √width. Rows are orthogonal
    whenever 2^⌈log2 rank⌉ divides the width, as it does for common models; else nearly so. Only signs are drawn, so
    every machine gets the same bits.

    Args:
        name: The module's name; equal names and seeds give equal factors.
        rank: Rows, at least 1.
        width: Columns, at least 1.
        seed: Any whole number at least 0.
    """
    order = 1 << (rank - 1).bit_length()
    bits = np.unpackbits(np.frombuffer(_stream(f"A|{name}", seed, (width + 7) // 8), np.uint8))[:width]
    signs = 1 - 2 * bits.astype(np.int64)  # (width,)
    rows, columns = np.arange(rank)[:, None], np.arange(width)[None, :] % order
    parity = np.bitwise_count(rows & columns) & 1  # (rank, width): entry of the Walsh–Hadamard matrix
    factor: Floats = ((1 - 2 * parity.astype(np.int64)) * signs / math.sqrt(width)).astype(np.float32)
    return factor


def seeded_head(name: str, shape: tuple[int, ...], seed: int) -> Floats:
    """Return a head's weights: uniform with standard deviation 0.02, fixed by seed and name."""
    size = math.prod(shape)
    words = np.frombuffer(_stream(f"head|{name}", seed, 4 * size), "<u4") >> 8
    uniform = words.astype(np.float64) / 2**23 - 1  # exact
    return (uniform * (0.02 * math.sqrt(3))).astype(np.float32).reshape(shape)


def _stream(purpose: str, seed: int, size: int) -> bytes:
    return hashlib.shake_256(f"confide/1|{purpose}|{seed}".encode()).digest(size)
