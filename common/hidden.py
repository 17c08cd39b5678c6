"""Hidden states of many tokens, in memory or in an encrypted file without a name.

They tell as much as the rows they were computed from. The file has no name, its key is never written down, and both are
gone when the process ends, however it ends.
"""

import os
import secrets
import tempfile

import numpy as np
import numpy.typing as npt
import torch

from confide.common.crypto import BLOCK_BYTES, KEY_BYTES, Keystream, Scratch
from confide.common.errors import DataError


class Hidden:
    """Room for the hidden states of so many positions; each position is put in once.

    Args:
        positions: How many.
        width: Numbers per position.
        dtype: What they are kept in.
        in_memory: Whether they are kept in memory, or else encrypted in a file in the directory for temporary files.
    """

    def __init__(self, positions: int, width: int, dtype: torch.dtype, *, in_memory: bool) -> None:
        self.size_bytes = positions * width * dtype.itemsize
        self.in_memory = in_memory
        self._width, self._dtype = width, dtype
        if in_memory:
            self._numbers = torch.empty(positions, width, dtype=dtype)
            return
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  it lives as long as this object
        self._stream, self._scratch = Keystream(secrets.token_bytes(KEY_BYTES)), Scratch()

    def put(self, start: int, states: torch.Tensor) -> None:
        """Keep the states of the positions from `start` on, (positions, width).

        Raises:
            DataError: The disk is full or cannot be written to.
        """
        if self.in_memory:
            self._numbers[start : start + len(states)] = states.cpu()
            return
        plain = states.to(self._dtype).cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
        offset = start * self._width * self._dtype.itemsize
        # A keystream hides one plaintext. Each position is put in once, so none of its bytes is used twice.
        sealed = (plain ^ self._key_bytes(offset, len(plain))).tobytes()
        try:
            written = 0
            while written < len(sealed):
                written += os.pwrite(self._file.fileno(), sealed[written:], offset + written)
        except OSError as error:
            raise DataError(
                f"Cannot write hidden states to {tempfile.gettempdir()}: {error.strerror or error}. Free "
                f"{self.size_bytes >> 20} MiB there, set TMPDIR to a directory with room, or set [compute] cache_prefix = "
                "false."
            ) from None

    def get(self, start: int, positions: int) -> torch.Tensor:
        """Return the states of so many positions from `start` on, (positions, width)."""
        if self.in_memory:
            return self._numbers[start : start + positions]
        each = self._width * self._dtype.itemsize
        sealed = np.frombuffer(os.pread(self._file.fileno(), positions * each, start * each), np.uint8)
        plain = sealed ^ self._key_bytes(start * each, len(sealed))
        return torch.from_numpy(plain).view(self._dtype).view(positions, self._width)

    def _key_bytes(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Return the keystream's bytes from `offset` on."""
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        blocks = [self._stream.block(number, self._scratch).copy() for number in range(first, last + 1)]
        return np.concatenate(blocks)[offset - first * BLOCK_BYTES :][:size]

    def __repr__(self) -> str:
        return f"<Hidden states, {self.size_bytes} bytes, {'in memory' if self.in_memory else 'encrypted on disk'}>"
