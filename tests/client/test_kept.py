"""The vector of a round, kept and sealed until the round is over."""

from pathlib import Path

import numpy as np
import pytest

from confide.client.kept import Kept
from confide.common.errors import SealError, UsageError
from confide.common.ring import RingLayout, RingVector

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
WIDE = RingLayout(length=6, update_bound=1.0, max_sites=4)
NARROW = RingLayout(length=5, max_sites=4, bits=16, segments=((5, 1.0),))
BOTH = pytest.mark.parametrize("ring", [WIDE, NARROW], ids=["32 bits", "16 bits"])


def vector(ring: RingLayout = WIDE, seed: int = 0) -> RingVector:
    drawn = np.random.default_rng(seed).integers(0, 2**ring.bits, ring.size)
    return RingVector(words=drawn.astype(ring.dtype), layout=ring)


def words(kept: Kept, number: int, commitment: str | None, ring: RingLayout = WIDE) -> list[int] | None:
    found = kept.get(number, ring, commitment)
    return None if found is None else found.words.tolist()


@BOTH
def test_what_was_kept_is_found_again_by_whoever_is_started_anew(ring: RingLayout, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", KEY, "run")

    commitment = kept.put(3, vector(ring))
    again = Kept(tmp_path / "kept", KEY, "run")

    for each in (kept, again):
        assert each.holds(3)
        assert words(each, 3, commitment, ring) == vector(ring).words.tolist()
    found = again.get(3, ring, commitment)
    assert found is not None
    assert (found.words.dtype, found.layout) == (ring.dtype, ring)


def test_without_a_folder_a_vector_lives_in_memory_only() -> None:
    kept = Kept()

    commitment = kept.put(1, vector())

    assert words(kept, 1, commitment) == vector().words.tolist()
    assert not Kept().holds(1)
    assert Kept().get(1, WIDE, None) is None


def test_a_folder_without_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a key"):
        Kept(tmp_path)


def test_nothing_of_a_vector_can_be_read_on_disk_and_only_by_its_owner(tmp_path: Path) -> None:
    ring = RingLayout(length=3000, update_bound=1.0, max_sites=4)
    zeros = RingVector(words=np.zeros(ring.size, ring.dtype), layout=ring)
    folder = tmp_path / "kept"

    Kept(folder, KEY).put(1, zeros)
    (path,) = folder.iterdir()
    raw = path.read_bytes()

    assert bytes(8) not in raw
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    Kept(folder, KEY).put(1, zeros)
    assert path.read_bytes() != raw  # another salt, another key
    assert "3002" not in repr(Kept(folder, KEY))


def test_the_commitment_binds_the_vector_and_does_not_tell_it() -> None:
    kept = Kept()

    commitments = [kept.put(1, vector()), kept.put(1, vector()), kept.put(1, vector(seed=1))]

    assert len(set(commitments)) == 3
    assert all(commitment.startswith("sha256:") for commitment in commitments)


def damaged(path: Path, how: str) -> None:
    raw = path.read_bytes()
    changed = {
        "cut": raw[:-1],
        "longer": raw + b"\0",
        "empty": b"",
        "header only": raw[:20],
        "another byte": raw[:-1] + bytes([raw[-1] ^ 1]),
        "another format": b"X" + raw[1:],
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["cut", "longer", "empty", "header only", "another byte", "another format"])
def test_a_damaged_file_is_an_error_and_not_an_absent_vector(how: str, tmp_path: Path) -> None:
    commitment = Kept(tmp_path, KEY).put(1, vector())
    (path,) = tmp_path.iterdir()
    damaged(path, how)

    again = Kept(tmp_path, KEY)

    assert again.holds(1)
    with pytest.raises(SealError):
        again.get(1, WIDE, commitment)


def test_no_changed_byte_of_the_file_goes_unnoticed(tmp_path: Path) -> None:
    commitment = Kept(tmp_path, KEY).put(1, vector())
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()

    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << position % 8]) + raw[position + 1 :])
        with pytest.raises(SealError):
            Kept(tmp_path, KEY).get(1, WIDE, commitment)


@pytest.mark.parametrize(("key", "run"), [(OTHER_KEY, "run"), (KEY, "another"), (KEY, "")])
def test_another_key_or_run_does_not_open_it(key: bytes, run: str, tmp_path: Path) -> None:
    commitment = Kept(tmp_path, KEY, "run").put(1, vector())

    with pytest.raises(SealError):
        Kept(tmp_path, key, run).get(1, WIDE, commitment)


def test_the_file_of_one_round_does_not_stand_for_another(tmp_path: Path) -> None:
    commitment = Kept(tmp_path, KEY).put(1, vector())
    (tmp_path / "000001.vector").rename(tmp_path / "000002.vector")

    with pytest.raises(SealError):
        Kept(tmp_path, KEY).get(2, WIDE, commitment)


@pytest.mark.parametrize("ring", [NARROW, RingLayout(length=7, update_bound=1.0, max_sites=4)])
def test_a_vector_of_another_ring_is_an_error(ring: RingLayout, tmp_path: Path) -> None:
    commitment = Kept(tmp_path, KEY).put(1, vector())

    with pytest.raises(SealError, match="a vector of another ring"):
        Kept(tmp_path, KEY).get(1, ring, commitment)


def test_a_vector_that_nobody_committed_to_is_not_taken_from_the_disk(tmp_path: Path) -> None:
    Kept(tmp_path, KEY).put(1, vector())
    another = Kept().put(1, vector(seed=1))

    for commitment in (None, another):
        with pytest.raises(SealError, match="another vector than the record of spends commits to"):
            Kept(tmp_path, KEY).get(1, WIDE, commitment)


def test_the_vectors_of_all_other_rounds_are_let_go_in_memory_and_on_disk(tmp_path: Path) -> None:
    kept = Kept(tmp_path, KEY)
    commitments = [kept.put(number, vector(seed=number)) for number in (1, 2, 3)]

    kept.forget_all_but(2)

    assert [kept.holds(number) for number in (1, 2, 3)] == [False, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["000002.vector"]
    assert words(kept, 2, commitments[1]) == vector(seed=2).words.tolist()
    assert kept.get(1, WIDE, None) is None
    kept.forget_all_but(4)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_leaves_no_vector_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            Kept(tmp_path, KEY).put(1, vector())

    assert list(tmp_path.iterdir()) == []
    assert not Kept(tmp_path, KEY).holds(1)
