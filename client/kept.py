"""The vector of a round, kept until the round is over, so that another attempt at it needs no training.

A site that is started anew in the middle of a round finds the vector again, sealed on its disk: it masks the same one
once more and spends nothing.
"""

import secrets
from pathlib import Path

import numpy as np

from confide.common.canonical import sha256
from confide.common.crypto import seal_bytes, unseal_bytes
from confide.common.disk import whole
from confide.common.errors import SealError, UsageError
from confide.common.ring import RingLayout, RingVector

_SALT_BYTES = 32


class Kept:
    """Vectors by round.

    Args:
        folder: Where they are sealed; None keeps them in memory only.
        key: 32 bytes of the site's own that survive a restart; with `folder`.
        run: The run's name; a vector of another run is not found by mistake.

    Raises:
        UsageError: A folder is given without a key.
    """

    def __init__(self, folder: Path | None = None, key: bytes = b"", run: str = "") -> None:
        if folder is not None and not key:
            raise UsageError("A folder for vectors needs a key to seal them with.")
        self._folder = folder
        self._key = key
        self._run = run
        self._memory: dict[int, RingVector] = {}

    def __repr__(self) -> str:
        return f"<Kept: rounds {sorted(self._memory)} in memory>"

    def holds(self, number: int) -> bool:
        """Return whether round `number` has a vector here."""
        return number in self._memory or (self._folder is not None and self._path(number).exists())

    def get(self, number: int, layout: RingLayout, commitment: str | None) -> RingVector | None:
        """Return the vector of round `number`, or None if there is none.

        Args:
            number: The round.
            layout: The ring's.
            commitment: What `put` returned for it, as the ledger has it; None if the ledger has nothing. A file is read only
                if it holds what was committed to.

        Raises:
            SealError: Its file is damaged, sealed with another key, or not of the vector that was committed to.
        """
        if number not in self._memory and self.holds(number):
            plain = unseal_bytes(self._path(number).read_bytes(), self._key, self._purpose(number))
            if sha256(plain) != commitment:
                raise SealError(f"{self._path(number)} holds another vector than the record of spends commits to.")
            words = np.frombuffer(plain[_SALT_BYTES:], layout.dtype.newbyteorder("<")).astype(layout.dtype)
            if len(words) != layout.size:
                raise SealError(f"{self._path(number)} holds a vector of another ring. Remove it; the round is lost.")
            self._memory[number] = RingVector(words=words, layout=layout)
        return self._memory.get(number)

    def put(self, number: int, vector: RingVector) -> str:
        """Keep the vector of round `number`, on disk if there is one, and return a salted commitment to it."""
        salt = secrets.token_bytes(_SALT_BYTES)
        content = salt + vector.words.astype(vector.words.dtype.newbyteorder("<"), copy=False).tobytes()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with whole(self._path(number)) as draft:
                draft.write_bytes(seal_bytes(content, self._key, self._purpose(number)))
        self._memory[number] = vector
        return sha256(content)

    def forget_all_but(self, number: int) -> None:
        """Let go of the vectors of all other rounds."""
        self._memory = {kept: vector for kept, vector in self._memory.items() if kept == number}
        if self._folder is not None:
            for path in self._folder.glob("*.vector"):
                if path != self._path(number):
                    path.unlink()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:06}.vector"

    def _purpose(self, number: int) -> bytes:
        return f"confide-kept/1 run {self._run} round {number}\n".encode()
