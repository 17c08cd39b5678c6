"""The Merkle tree over a growing list: one hash that stands for every entry, and short proofs of what it stands for.

    leaf of an entry    SHA-256(0x00 || entry)
    node of two nodes   SHA-256(0x01 || left || right)
    root of n leaves    the node of the root of the first k and the root of the rest; k is the largest power of 2 below n
    root of none        SHA-256 of nothing

The functions take and return hashes of 32 bytes; `leaf_hash` makes the first of them. The first bytes 0x00 and 0x01 keep
a node from passing for an entry.

Source: RFC 6962, section 2.1, which RFC 9162, section 2.1, keeps.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

from confide.common.errors import LedgerError, UsageError

HASH_BYTES = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()


class Tree:
    """A tree that grows by one leaf at a time, in memory that grows with the logarithm of its size.

    It keeps the roots of the full subtrees that its leaves fall into, one for each 1 among the binary digits of `size`.

    Attributes:
        size: The number of leaves.
    """

    __slots__ = ("_full", "size")

    def __init__(self) -> None:
        self.size = 0
        self._full: list[bytes] = []  # the largest subtree, the leftmost, first

    def add(self, leaf: bytes) -> None:
        """Append a leaf, 32 bytes as of `leaf_hash`.

        Raises:
            UsageError: It has another length.
        """
        if len(leaf) != HASH_BYTES:
            raise UsageError(f"A leaf of {len(leaf)} bytes was to be added; leaves have {HASH_BYTES}. Use leaf_hash.")
        node, rest = leaf, self.size
        while rest & 1:  # two subtrees of equal size become one, as a carry does in binary addition
            node = _node(self._full.pop(), node)
            rest >>= 1
        self._full.append(node)
        self.size += 1

    @property
    def root(self) -> bytes:
        """The root, 32 bytes; it takes one hash for each subtree kept but the last."""
        if not self._full:
            return EMPTY_ROOT
        root = self._full[-1]
        for node in self._full[-2::-1]:
            root = _node(node, root)
        return root

    def __repr__(self) -> str:
        return f"<Tree of {self.size} leaves>"


def leaf_hash(data: bytes) -> bytes:
    """Return the leaf, 32 bytes, that stands for an entry of any length."""
    return hashlib.sha256(b"\x00" + data).digest()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Return the hashes that lead from leaf `index`, from 0, to the root of all leaves; the nearest comes first.

    Raises:
        UsageError: There is no such leaf.

    Source: RFC 9162, section 2.1.3.1.
    """
    if not 0 <= index < len(leaves):
        raise UsageError(f"There is no leaf {index} to prove; there are {len(leaves)}, counted from 0.")
    return tuple(_root(leaves[begin:end]) for begin, end, _ in reversed(_beside(index, len(leaves))))


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Return if `leaf` is number `index`, from 0, of the `size` leaves that `root` stands for.

    Raises:
        LedgerError: The proof does not show that.

    Guarantee: a proof is accepted only for the leaf that is in this place; another one would be a collision of SHA-256.

    Source: RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < size:
        raise LedgerError(f"A proof that leaf {index} is among {size} arrived; leaves are counted from 0. Refuse it.")
    siblings = _beside(index, size)
    _check_hashes(proof, len(siblings), f"that leaf {index} is among {size}")
    found = leaf
    for sibling, (_, _, left) in zip(proof, reversed(siblings), strict=True):
        found = _node(sibling, found) if left else _node(found, sibling)
    if found != root:
        raise LedgerError(
            f"The proof that leaf {index} is among the {size} leaves of the root {_shown(root)} leads to the root "
            f"{_shown(found)}. The leaf, its place, the proof or the root was altered: refuse it."
        )


def consistency_proof(leaves: Sequence[bytes], first: int, second: int) -> tuple[bytes, ...]:
    """Return the hashes that show that the first `second` leaves begin with the first `first`; the nearest comes first.

    It is empty if both are equal, or if `first` is 0.

    Raises:
        UsageError: Not 0 <= first <= second <= number of leaves.

    Source: RFC 9162, section 2.1.4.1.
    """
    if not 0 <= first <= second <= len(leaves):
        raise UsageError(
            f"No growth from {first} to {second} leaves can be proved; sizes go from 0 to {len(leaves)} and do not fall."
        )
    if first == 0:
        return ()
    siblings = _beside(first - 1, second, whole=first)
    proof = [_root(leaves[begin:end]) for begin, end, _ in reversed(siblings)]
    common = max((end for _, end, left in siblings if left), default=0)
    return (_root(leaves[common:first]), *proof) if common else tuple(proof)


def verify_consistency(first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> None:
    """Return if the `second` leaves of `second_root` begin with the `first` leaves of `first_root`.

    Raises:
        LedgerError: The proof does not show that.

    Guarantee: a proof is accepted only if nothing of the first leaves was changed, left out or reordered in the second.

    Source: RFC 9162, section 2.1.4.2.
    """
    if not 0 <= first <= second:
        raise LedgerError(
            f"A proof of growth from {first} to {second} leaves arrived; a ledger never shrinks. Refuse it."
        )
    what = f"of growth from {first} to {second} leaves"
    if first == 0:
        _check_hashes(proof, 0, what)
        if first_root != EMPTY_ROOT or (second == 0 and second_root != EMPTY_ROOT):
            raise LedgerError(f"A root of no leaves is {_shown(EMPTY_ROOT)}, not {_shown(first_root)}. Refuse it.")
        return
    siblings = _beside(first - 1, second, whole=first)
    inside = any(left for _, _, left in siblings)  # else the first leaves are a whole subtree, whose root is known
    _check_hashes(proof, len(siblings) + inside, what)
    old = new = proof[0] if inside else first_root
    for sibling, (_, _, left) in zip(proof[inside:], reversed(siblings), strict=True):
        if left:
            old = _node(sibling, old)
        new = _node(sibling, new) if left else _node(new, sibling)
    if (old, new) != (first_root, second_root):
        raise LedgerError(
            f"The proof {what} leads from the root {_shown(old)} to {_shown(new)}, and should lead from "
            f"{_shown(first_root)} to {_shown(second_root)}. The ledger was rewritten, or the proof altered: refuse it."
        )


def _beside(index: int, size: int, whole: int | None = None) -> list[tuple[int, int, bool]]:
    """Return the subtrees passed by on the way from the root down to leaf `index`, the nearest to the root first.

    Each is its first leaf, the one after its last, and whether it lies to the left. The way ends early at the first
    subtree whose last leaf is number `whole` - 1, if that is given.
    """
    begin, end, passed = 0, size, []
    while end - begin > 1 and end != whole:
        middle = begin + (1 << (end - begin - 1).bit_length() - 1)  # the largest power of 2 below the number of leaves
        if index < middle:
            passed.append((middle, end, False))
            end = middle
        else:
            passed.append((begin, middle, True))
            begin = middle
    return passed


def _root(leaves: Sequence[bytes]) -> bytes:
    tree = Tree()
    for leaf in leaves:
        tree.add(leaf)
    return tree.root


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _check_hashes(proof: Sequence[bytes], due: int, what: str) -> None:
    if len(proof) != due or any(len(node) != HASH_BYTES for node in proof):
        raise LedgerError(
            f"A proof {what} has {len(proof)} hashes; {due} of {HASH_BYTES} bytes each are due. Refuse it."
        )


def _shown(node: bytes) -> str:
    return f"{node.hex()[:16]}…"
