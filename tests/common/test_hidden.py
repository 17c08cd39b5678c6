"""Hidden states: what is put in comes out, and on disk nobody can read it."""

import itertools
import os

import numpy as np
import pytest
import torch

from confide.common.crypto import BLOCK_BYTES
from confide.common.errors import DataError
from confide.common.hidden import Hidden


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_come_out_as_they_were_put_in(in_memory: bool, dtype: torch.dtype) -> None:
    width = 96
    positions = 3 * BLOCK_BYTES // (width * dtype.itemsize)  # windows that end inside, at and beyond a block of the key
    states = torch.randn(positions, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = Hidden(positions, width, dtype, in_memory=in_memory)
    cuts = [0, 1, 40, positions // 3, positions // 3 + 1, positions]

    for start, stop in reversed(list(itertools.pairwise(cuts))):
        kept.put(start, states[start:stop])

    assert torch.equal(kept.get(0, positions), states)
    assert torch.equal(kept.get(39, 2), states[39:41])
    assert kept.size_bytes == positions * width * dtype.itemsize


def test_on_disk_the_states_look_like_noise_and_the_file_has_no_name() -> None:
    """False alarm 1e-9: a chi-square test on bytes that are all zero before they are sealed."""
    kept = Hidden(1000, 256, torch.float32, in_memory=False)

    kept.put(0, torch.zeros(1000, 256))

    sealed = np.frombuffer(os.pread(kept._file.fileno(), kept.size_bytes, 0), np.uint8)
    counts = np.bincount(sealed, minlength=256)
    chance = np.square(counts - len(sealed) / 256).sum() / (len(sealed) / 256)
    assert len(sealed) == kept.size_bytes
    assert chance < 255 + 6 * np.sqrt(2 * 255) + 36
    assert os.fstat(kept._file.fileno()).st_nlink == 0


def test_a_full_disk_is_told_with_the_room_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Hidden(1 << 20, 4, torch.float32, in_memory=False)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)

    with pytest.raises(DataError, match="Free 16 MiB there"):
        kept.put(0, torch.zeros(2, 4))


def test_hidden_states_do_not_print_themselves() -> None:
    assert repr(Hidden(2, 4, torch.float32, in_memory=False)) == "<Hidden states, 32 bytes, encrypted on disk>"
