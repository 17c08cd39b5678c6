"""The Merkle tree: published roots and proofs, the papers' recursion beside our loops, and proofs of what is not so."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common.errors import LedgerError, UsageError
from confide.common.merkle import (
    EMPTY_ROOT,
    Tree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "merkle.json").read_text())
ENTRIES = [bytes.fromhex(entry) for entry in VECTORS["entries"]]
MOST = 64
MANY = [number.to_bytes(3) for number in range(MOST)]


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def split(count: int) -> int:
    """The largest power of 2 below `count`."""
    power = 1
    while 2 * power < count:
        power *= 2
    return power


def plain_root(entries: Sequence[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, as it is written."""
    if not entries:
        return digest(b"")
    if len(entries) == 1:
        return digest(b"\x00" + entries[0])
    middle = split(len(entries))
    return digest(b"\x01" + plain_root(entries[:middle]) + plain_root(entries[middle:]))


def plain_path(index: int, entries: Sequence[bytes]) -> list[bytes]:
    """RFC 9162, section 2.1.3.1, as it is written."""
    if len(entries) == 1:
        return []
    middle = split(len(entries))
    if index < middle:
        return [*plain_path(index, entries[:middle]), plain_root(entries[middle:])]
    return [*plain_path(index - middle, entries[middle:]), plain_root(entries[:middle])]


def plain_growth(first: int, entries: Sequence[bytes], known: bool = True) -> list[bytes]:
    """RFC 9162, section 2.1.4.1, as it is written."""
    if first == len(entries):
        return [] if known else [plain_root(entries)]
    middle = split(len(entries))
    if first <= middle:
        return [*plain_growth(first, entries[:middle], known), plain_root(entries[middle:])]
    return [*plain_growth(first - middle, entries[middle:], known=False), plain_root(entries[:middle])]


def leaves(entries: Sequence[bytes]) -> list[bytes]:
    return [leaf_hash(entry) for entry in entries]


def root(entries: Sequence[bytes]) -> bytes:
    tree = Tree()
    for entry in entries:
        tree.add(leaf_hash(entry))
    return tree.root


def test_roots_are_the_published_ones() -> None:
    tree, found = Tree(), [Tree().root.hex()]
    for entry in ENTRIES:
        tree.add(leaf_hash(entry))
        found.append(tree.root.hex())

    assert found == VECTORS["roots"]
    assert found == [plain_root(ENTRIES[:size]).hex() for size in range(9)]
    assert tree.size == 8
    assert Tree().root == EMPTY_ROOT


@pytest.mark.parametrize("vector", VECTORS["inclusion"])
def test_proofs_of_inclusion_are_the_published_ones(vector: dict[str, Any]) -> None:
    entries = ENTRIES[: vector["size"]]

    assert [node.hex() for node in inclusion_proof(leaves(entries), vector["leaf"])] == vector["proof"]
    assert [node.hex() for node in plain_path(vector["leaf"], entries)] == vector["proof"]


@pytest.mark.parametrize("vector", VECTORS["consistency"])
def test_proofs_of_consistency_are_the_published_ones(vector: dict[str, Any]) -> None:
    found = consistency_proof(leaves(ENTRIES), vector["first"], vector["second"])

    assert [node.hex() for node in found] == vector["proof"]
    assert [node.hex() for node in plain_growth(vector["first"], ENTRIES[: vector["second"]])] == vector["proof"]


def test_roots_of_every_size_are_those_of_the_recursion() -> None:
    tree = Tree()
    for size, entry in enumerate(MANY):
        assert (tree.size, tree.root) == (size, plain_root(MANY[:size]))
        tree.add(leaf_hash(entry))


def test_every_leaf_of_every_size_is_proved_and_every_other_one_refused() -> None:
    for size in range(1, MOST + 1):
        below, above = leaves(MANY[:size]), plain_root(MANY[:size])
        for index in range(size):
            proof = inclusion_proof(below, index)

            assert list(proof) == plain_path(index, MANY[:size])
            verify_inclusion(below[index], index, size, proof, above)
            with pytest.raises(LedgerError):
                verify_inclusion(leaf_hash(b"another"), index, size, proof, above)


def test_every_growth_of_every_size_is_proved_and_another_past_is_refused() -> None:
    other = [b"another", *MANY[1:]]
    for second in range(MOST + 1):
        for first in range(second + 1):
            proof = consistency_proof(leaves(MANY[:second]), first, second)
            old, new = plain_root(MANY[:first]), plain_root(MANY[:second])

            assert list(proof) == (plain_growth(first, MANY[:second]) if first else [])
            verify_consistency(first, old, second, new, proof)
            if first:
                rewritten = consistency_proof(leaves(other[:second]), first, second)
                for told in (proof, rewritten):
                    with pytest.raises(LedgerError, match="rewritten"):
                        verify_consistency(first, old, second, plain_root(other[:second]), told)


@settings(max_examples=300)
@given(strategies.data())
def test_a_proof_is_accepted_only_for_the_leaf_that_is_in_this_place(data: strategies.DataObject) -> None:
    size = data.draw(strategies.integers(1, MOST))
    index = data.draw(strategies.integers(0, size - 1))
    below = leaves(MANY[:size])
    truth = (below[index], index, size, inclusion_proof(below, index), plain_root(MANY[:size]))
    told = data.draw(
        _twisted(truth, [_bytes_twisted, _number_twisted, _number_twisted, _proof_twisted, _bytes_twisted])
    )

    verify_inclusion(*truth)

    # The size itself is not under the root: a proof that has the same shape in a tree of another size holds there too.
    if told[:2] + told[3:] == truth[:2] + truth[3:] and _same_shape(index, told[2], size):
        return
    with pytest.raises(LedgerError):
        verify_inclusion(*told)


@settings(max_examples=300)
@given(strategies.data())
def test_a_proof_is_accepted_only_if_nothing_of_the_first_leaves_was_changed(data: strategies.DataObject) -> None:
    second = data.draw(strategies.integers(2, MOST))
    first = data.draw(strategies.integers(1, second))
    place = data.draw(strategies.integers(0, first - 1))
    past = list(MANY[:second])
    match data.draw(strategies.sampled_from(["changed", "left out", "reordered"])):
        case "changed":
            past[place] = data.draw(strategies.binary(max_size=4).filter(lambda entry: entry != MANY[place]))
        case "left out":
            past = [*past[:place], *past[place + 1 :], b"another"]
        case _:
            other = data.draw(strategies.integers(0, second - 1).filter(lambda found: found != place))
            past[place], past[other] = past[other], past[place]
    proof = data.draw(_either(consistency_proof(leaves(past), first, second), leaves(MANY), first, second))

    with pytest.raises(LedgerError):
        verify_consistency(first, plain_root(MANY[:first]), second, plain_root(past), proof)


@settings(max_examples=300)
@given(strategies.data())
def test_a_proof_of_growth_with_any_twisted_root_or_hash_is_refused(data: strategies.DataObject) -> None:
    second = data.draw(strategies.integers(2, MOST))
    first = data.draw(strategies.integers(1, second))
    proof = consistency_proof(leaves(MANY), first, second)
    old, new = plain_root(MANY[:first]), plain_root(MANY[:second])
    told = data.draw(_twisted((old, new, proof), [_bytes_twisted, _bytes_twisted, _proof_twisted]))

    with pytest.raises(LedgerError):
        verify_consistency(first, told[0], second, told[1], told[2])


@pytest.mark.parametrize(("first", "second"), [(-1, 3), (4, 3), (5, 2), (0, -1)])
def test_a_ledger_that_shrinks_has_no_proof(first: int, second: int) -> None:
    with pytest.raises(LedgerError, match="never shrinks"):
        verify_consistency(first, plain_root(MANY[:4]), second, plain_root(MANY[:3]), ())
    with pytest.raises(UsageError, match="No growth"):
        consistency_proof(leaves(MANY[:8]), first, second)


def test_growth_from_nothing_needs_no_proof_but_the_root_of_nothing() -> None:
    verify_consistency(0, EMPTY_ROOT, 5, plain_root(MANY[:5]), ())

    for old, second, new, proof in (
        (plain_root(MANY[:5]), 5, plain_root(MANY[:5]), ()),
        (EMPTY_ROOT, 0, plain_root(MANY[:1]), ()),
        (EMPTY_ROOT, 5, plain_root(MANY[:5]), (EMPTY_ROOT,)),
    ):
        with pytest.raises(LedgerError):
            verify_consistency(0, old, second, new, proof)


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0), (0, -1)])
def test_a_place_outside_the_tree_is_refused(index: int, size: int) -> None:
    with pytest.raises(LedgerError, match="counted from 0"):
        verify_inclusion(leaf_hash(b""), index, size, (), leaf_hash(b""))
    with pytest.raises(UsageError, match="There is no leaf"):
        inclusion_proof(leaves(MANY[: max(size, 0)]), index)


def test_a_node_does_not_pass_for_an_entry() -> None:
    left, right = leaves(MANY[:2])

    assert root([left + right]) != root(MANY[:2])
    assert root([b"\x01" + left + right]) != root(MANY[:2])
    with pytest.raises(UsageError, match="A leaf of 3 bytes"):
        Tree().add(MANY[0])


def test_a_tree_of_a_hundred_thousand_leaves_keeps_a_handful_of_hashes() -> None:
    tree, leaf = Tree(), leaf_hash(b"")
    for _ in range(100_000):
        tree.add(leaf)
        assert len(tree.root) == 32

    assert len(tree._full) == (100_000).bit_count()


def _same_shape(index: int, size: int, other: int) -> bool:
    """Whether a proof for leaf `index` turns left and right alike in trees of both sizes."""

    def turns(count: int) -> list[bool]:
        at, way = index, []
        while count > 1:
            middle = split(count)
            way.append(at >= middle)
            at, count = (at - middle, count - middle) if at >= middle else (at, middle)
        return way

    return index < size and turns(size) == turns(other)


def _bytes_twisted(value: bytes) -> strategies.SearchStrategy[bytes]:
    other = strategies.integers(0, 8 * len(value) - 1).map(lambda bit: _flipped(value, bit))
    return other | strategies.sampled_from([b"", value[:-1], value + b"\x00", leaf_hash(b"another")])


def _number_twisted(value: int) -> strategies.SearchStrategy[int]:
    return strategies.integers(-(2**70), 2**70).filter(lambda other: other != value)


def _proof_twisted(proof: tuple[bytes, ...]) -> strategies.SearchStrategy[tuple[bytes, ...]]:
    longer = strategies.sampled_from([(*proof, EMPTY_ROOT), (EMPTY_ROOT, *proof)])
    if not proof:
        return longer
    turned = [proof[:-1], proof[1:], *([proof[::-1]] if len(set(proof)) > 1 else [])]
    place = strategies.integers(0, len(proof) - 1)
    changed = place.flatmap(
        lambda at: _bytes_twisted(proof[at]).map(lambda node: (*proof[:at], node, *proof[at + 1 :]))
    )
    return longer | strategies.sampled_from(turned) | changed


def _twisted(
    truth: tuple[Any, ...], ways: Sequence[Callable[[Any], strategies.SearchStrategy[Any]]]
) -> strategies.SearchStrategy[tuple[Any, ...]]:
    """The truth with one of its parts twisted."""

    def at(place: int) -> strategies.SearchStrategy[tuple[Any, ...]]:
        return ways[place](truth[place]).map(lambda part: (*truth[:place], part, *truth[place + 1 :]))

    return strategies.integers(0, len(truth) - 1).flatmap(at)


def _either(
    rewritten: tuple[bytes, ...], below: list[bytes], first: int, second: int
) -> strategies.SearchStrategy[tuple[bytes, ...]]:
    return strategies.sampled_from([rewritten, consistency_proof(below, first, second)])


def _flipped(value: bytes, bit: int) -> bytes:
    return bytes(byte ^ (1 << bit % 8 if place == bit // 8 else 0) for place, byte in enumerate(value))
