"""Float vectors as integers modulo 2^32 or 2^16, so that a sum of many is exact and can be masked.

A site's update is bounded, scaled, rounded to integers and written modulo the ring. Sums of such vectors are exact; the
sum of at most `max_sites` of them cannot wrap, which `RingLayout` proves before a round begins.

With 32 bits the update's L2 norm is bounded, and there is one scale. With 16 bits a step is coarser, so each segment of
the vector has a bound on the magnitude of its numbers, and a scale of its own. Two entries follow the update and tell
what the bounds did to it. They are functions of the noised update, so they cost no privacy.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from confide.common.canonical import canonical_bytes, sha256
from confide.common.crypto import BLOCK_BYTES, Keystream, Scratch
from confide.common.errors import MessageError, PlanError
from confide.common.plan import ring_steps

_TAIL = 2
_BLOCK = 1 << 15  # entries gone through at once, so that they and their float64 copies stay in the cache
_DOT = 1 << 13
_LARGE_PAGES_BYTES = 1 << 22
_DRAWS = BLOCK_BYTES // 2  # uniforms in one block of the keystream; a multiple of _BLOCK

Floats = npt.NDArray[np.float32]
Wire = npt.NDArray[np.uint32]
RingWords = npt.NDArray[np.uint32 | np.uint16]
Signed = npt.NDArray[np.int32 | np.int16]
_Word = TypeVar("_Word", bound=np.generic)
Numbers = npt.NDArray[np.float32 | np.int32 | np.int16]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RingLayout:
    """How a vector is laid out in the ring; equal at all sites and the server.

    In the ring a vector has `size` entries: the update; 1 if a bound changed it, else 0; the share of its entries that
    were cut, where `largest` is all of them; and a 0 if words of 16 bits would not fill whole uint32 otherwise.

    Attributes:
        length: Entries of the update.
        max_sites: How many vectors may be summed.
        bits: The width of a word, 32 or 16.
        update_bound: With 32 bits, the largest L2 norm that is encoded.
        segments: With 16 bits, runs of entries that fill the length: how many, and the largest magnitude encoded.
    """

    length: int
    max_sites: int
    bits: int = 32
    update_bound: float | None = None
    segments: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        spans = self._spans
        sound = all(length >= 1 and 0 < bound < math.inf for length, bound in spans) and self.length >= 1
        kind = self.bits == (16 if self.update_bound is None else 32) and not (self.update_bound and self.segments)
        if not (sound and kind and self.max_sites >= 1 and sum(length for length, _ in spans) == self.length):
            raise PlanError(
                f"A ring of {self.bits} bits, {self.length} entries, {self.max_sites} sites and (entries, bound) {spans} "
                "cannot be: it has 32 bits and an update_bound, or 16 bits and segments that add up to the length; all "
                "are positive and finite."
            )
        if self.largest < 1:
            raise PlanError(
                f"A {self.bits}-bit ring has no room for the sum of {self.max_sites} sites. Lower [federation] max_sites."
            )
        smallest = min(bound for _, bound in spans)
        if not math.isfinite(self.largest / smallest * 2.0**128):  # 2^128 is beyond every float32
            raise PlanError(
                f"The update bound {smallest:g} is too small to be written in integers. "
                "Raise [federation] update_bound or the learning rates."
            )

    @property
    def largest(self) -> int:
        """The largest magnitude an entry may have, so that max_sites × (largest + 1) stays below 2^(bits - 1).

        The + 1 is what stochastic rounding may add. Hence the sum of max_sites vectors never wraps.
        """
        return ring_steps(self.bits, self.max_sites)

    @property
    def size(self) -> int:
        """Entries in the ring: the update, two that tell what was bounded, and what fills up the last uint32."""
        bare = self.length + _TAIL
        return bare + bare % 2 if self.bits == 16 else bare

    @property
    def dtype(self) -> np.dtype[np.uint32 | np.uint16]:
        """The type of a word."""
        return np.dtype(np.uint32) if self.bits == 32 else np.dtype(np.uint16)

    @property
    def digest(self) -> str:
        """SHA-256 over the layout."""
        return sha256(canonical_bytes({"format": "confide-ring/1", **dataclasses.asdict(self)}))

    def packed(self, words: RingWords) -> Wire:
        """Return `words`, (size,), as the uint32 that travel; two words of 16 bits are one, the first its lower half.

        A view, where numbers are little-endian.

        Raises:
            MessageError: The words have another shape or type.
        """
        _check_fit("Words", words, self.size, self.dtype)
        return words.astype(words.dtype.newbyteorder("<"), copy=False).view("<u4").astype(np.uint32, copy=False)

    def unpacked(self, wire: Wire) -> RingWords:
        """Return the words, (size,), that `packed` made `wire` of: a view.

        Raises:
            MessageError: The wire has another shape or type.
        """
        _check_fit("A vector", wire, self.size * self.dtype.itemsize // 4, np.dtype(np.uint32))
        return wire.astype("<u4", copy=False).view(self.dtype.newbyteorder("<")).astype(self.dtype, copy=False)

    @property
    def _spans(self) -> tuple[tuple[int, float], ...]:
        return self.segments if self.update_bound is None else ((self.length, self.update_bound),)

    def _blocks(self) -> Iterator[tuple[slice, float]]:
        """Yield (entries, bound) over the update; no block crosses a multiple of _BLOCK or the end of a segment."""
        start = end = 0
        for length, bound in self._spans:
            end += length
            while start < end:
                stop = min(end, (start // _BLOCK + 1) * _BLOCK)
                yield slice(start, stop), bound
                start = stop


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RingVector:
    """One site's update in the ring, `words` (size,). It is not masked yet, so it has no way out of the site."""

    words: RingWords
    layout: RingLayout

    @property
    def bounded(self) -> bool:
        """Whether the update was beyond a bound, and was scaled down (32 bits) or cut (16 bits)."""
        return bool(self.words[self.layout.length])

    @property
    def saturated(self) -> float:
        """The share of entries that were cut, from 0 to 1."""
        return int(self.words[self.layout.length + 1]) / self.layout.largest

    def __repr__(self) -> str:
        return f"<RingVector of {self.layout.length} entries>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RingSum:
    """The exact sum of `count` ring vectors, `words` (size,). If a site did not follow the rules, it may be anything."""

    words: RingWords
    layout: RingLayout
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.layout.max_sites:
            raise MessageError(
                f"A sum of {self.count} vectors was offered; the ring has room for 1 to {self.layout.max_sites}. "
                "Discard it."
            )
        _check_fit("A sum", self.words, self.layout.size, self.layout.dtype)

    def __repr__(self) -> str:
        return f"<RingSum of {self.count} vectors of {self.layout.length} entries>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """The mean of the sites' updates: what the server learns of a round.

    Attributes:
        mean: (length,), float32.
        count: How many sites are in it.
        bounded: The share of sites whose update was scaled down or cut.
        saturated: The share of entries that were cut, over all sites.
    """

    mean: Floats
    count: int
    bounded: float = 0.0
    saturated: float = 0.0

    @classmethod
    def decode(cls, total: RingSum) -> Self:
        """Return the mean update that a sum stands for; the exact inverse of the scale, up to float32 rounding.

        A sum that came from sites goes through `check_sum` first. It stays as it is, and no vector but the mean is made.
        """
        layout, count, signed = total.layout, total.count, _signed(total.words)
        mean = fresh(layout.length, np.dtype(np.float32))
        for block, bound in layout._blocks():
            unit = bound / (layout.largest * count)
            np.multiply(signed[block], unit, out=mean[block], dtype=np.float64, casting="same_kind")
        bounded, saturated = (int(value) / count for value in signed[layout.length : layout.length + _TAIL])
        return cls(mean=mean, count=count, bounded=bounded, saturated=saturated / layout.largest)


def encode(update: Floats, layout: RingLayout, rounding: Keystream) -> RingVector:
    """Return `update` in the ring, without bias: on average it decodes to the update, bounded.

    With 32 bits an update longer than the bound is scaled down; with 16 bits each number beyond its bound is cut. Entry
    i becomes ⌊x + (k + 0.5) / 65536⌋, where x is its value in ring units and k the keystream's little-endian bytes 2 i
    and 2 i + 1, counted from the start of block 0.

    Args:
        update: (length,), float32, finite.
        layout: The ring's layout.
        rounding: The keystream of a key used for this one update only.

    Raises:
        MessageError: The vector has another length or holds a value that is not finite.

    Guarantee: no entry is larger than largest + 1, and the expected entry is within 2^-17 of x.
    Source: stochastic rounding as in Bonawitz et al. 2017 (arXiv 1611.04482) followed by Agarwal et al. 2018.
    """
    if update.shape != (layout.length,):
        raise MessageError(f"An update of shape {update.shape} was to be encoded; ({layout.length},) was due.")
    norm_bound, cut, shrink = layout.update_bound, 0, 1.0
    if norm_bound is not None and not _norm_is_surely_below(norm_bound, update):
        norm = _norm(update)
        _check_finite(norm)
        shrink = min(1.0, norm_bound / norm) if norm else 1.0
    words = fresh(layout.size, layout.dtype)
    signed = _signed(words)
    room, draws_room = np.empty(_BLOCK), np.empty(_BLOCK)
    scratch, drawn, stream = Scratch(), -1, np.empty(0, np.dtype("<u2"))
    for block, bound in layout._blocks():
        part, count = update[block], block.stop - block.start
        number, place = divmod(block.start, _DRAWS)
        if number != drawn:
            drawn, stream = number, rounding.block(number, scratch).view("<u2")
        values, draws = room[:count], draws_room[:count]
        np.multiply(part, layout.largest / bound * shrink, out=values, dtype=np.float64)
        if norm_bound is None:
            farthest = _farthest(part)
            _check_finite(farthest)
            if farthest > bound:
                cut += int(np.count_nonzero(np.abs(part) > np.float64(bound)))
                np.clip(values, -layout.largest, layout.largest, out=values)
        np.add(stream[place : place + count], 0.5, out=draws, dtype=np.float64)
        draws *= 2.0**-16
        values += draws
        np.floor(values, out=values)
        np.copyto(signed[block], values, casting="unsafe")  # the layout proves that they fit
    share = round(cut / layout.length * layout.largest)
    words[layout.length :] = (shrink < 1 or cut > 0, share, 0)[: layout.size - layout.length]
    return RingVector(words=words, layout=layout)


def fresh(size: int, dtype: np.dtype[_Word]) -> npt.NDArray[_Word]:
    """Return a vector of any values, (size,), to be written to.

    From 4 MiB on numpy asks the system for large pages. A vector of half that or more is given as much room: touching
    small pages for the first time would cost it as much as several masks.
    """
    enough = _LARGE_PAGES_BYTES // dtype.itemsize
    return np.empty(max(size, enough if 2 * size >= enough else 0), dtype)[:size]


def check_sum(total: RingSum) -> None:
    """Return if `total` can be the sum of as many vectors as it says, all made by `encode`.

    With 32 bits the L2 norm of the entries is at most count × (largest + √length), as rounding moves each entry by less
    than one. With 16 bits no entry is beyond count × (largest + 1); when count is near max_sites that says little. Of
    the entries behind, the first is at most count, the second count × largest, and what fills up is 0.

    Raises:
        MessageError: It cannot: a site sent a vector that breaks the rules.
    """
    count, signed, faults = total.count, _signed(total.words), []
    largest, length = total.layout.largest, total.layout.length
    bounded, saturated, *filling = (int(value) for value in signed[length:])
    if total.layout.bits == 32:
        found, limit = _norm(signed[:length]), count * (largest + math.sqrt(length))
    else:
        found, limit = _farthest(signed[:length]), count * (largest + 1)
    if found > limit:
        faults.append(f"it is larger than they can be ({found:.0f} ring units, at most {limit:.0f})")
    if not 0 <= bounded <= count or not 0 <= saturated <= count * largest:
        faults.append(f"it tells of {bounded} bounded updates and {saturated} / {largest} of entries cut")
    if any(filling):
        faults.append(f"what fills up its last word is {filling[0]}, not 0")
    if faults:
        raise MessageError(
            f"This cannot be the sum of {count} honest vectors: {'; '.join(faults)}. A site sent something else; which "
            "one, the sum does not tell. Discard the round."
        )


def _norm_is_surely_below(bound: float, update: Floats) -> bool:
    """Return whether the L2 norm is below `bound` by more than float32 can err; a quick look that spares most updates
    the exact norm. A sum of n products errs by less than n × 2^-24 of it, here 2^-11.
    """  # noqa: D205  one sentence of two lines
    blocks = (update[start : start + _DOT] for start in range(0, len(update), _DOT))
    with np.errstate(over="ignore"):
        return math.sqrt(sum(float(np.dot(block, block)) for block in blocks)) < (1 - 2.0**-10) * bound


def _norm(values: Numbers) -> float:
    """Return the L2 norm, computed in float64 block by block."""
    # Longer dot products are shared out to threads, which costs several times what it saves.
    room, squares = np.empty(_DOT), 0.0
    for start in range(0, len(values), _DOT):
        part = values[start : start + _DOT]
        block = room[: len(part)]
        np.copyto(block, part)
        squares += float(np.dot(block, block))
    return math.sqrt(squares)


def _farthest(values: Numbers) -> float:
    """Return the largest magnitude, or NaN if there is a NaN."""
    low, high = float(values.min()), float(values.max())
    return max(-low, high)


def _check_finite(farthest: float) -> None:
    if not math.isfinite(farthest):
        raise MessageError("An update with a value that is not finite was to be encoded. Nothing of it is sent.")


def _signed(words: RingWords) -> Signed:
    """Return `words` as the signed integers they stand for: a view."""
    return words.view(np.int32) if words.dtype == np.uint32 else words.view(np.int16)


def _check_fit(what: str, found: npt.NDArray[np.generic], due: int, dtype: np.dtype[np.uint32 | np.uint16]) -> None:
    if found.shape != (due,) or found.dtype != dtype:
        raise MessageError(
            f"{what} of shape {found.shape}, {found.dtype} was offered; ({due},), {dtype} was due. Discard it, and check "
            "that both sides have the same plan and base model."
        )
