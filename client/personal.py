"""What of an adapter never leaves its site, kept from round to round: the factors B of the method `share-a`.

It came out of noised gradients, so it is no more secret than an update.
"""

import re
from pathlib import Path

from confide.common.adapter import Floats, Layout, load_vector, save_vector
from confide.common.disk import whole

_FILE = re.compile(r"personal-(\d{1,9})\.safetensors")


class Personal:
    """The personal numbers of one site in one run, after each of the last two rounds it trained.

    Two, so that a round that is trained again, as simulations may, starts from what it started from.

    Args:
        layout: Their order; empty if the method keeps nothing.
        start: What a run begins with, (layout.length,), float32.
        directory: Where they are kept; None keeps them in memory only, and they are lost with the process.
    """

    def __init__(self, layout: Layout, start: Floats, directory: Path | None = None) -> None:
        self._layout = layout
        self._start = start
        self._directory = directory if layout.length else None
        self._after: dict[int, Floats] = {}
        for file in sorted(self._directory.iterdir()) if self._directory and self._directory.is_dir() else ():
            if match := _FILE.fullmatch(file.name):
                self._after[int(match[1])] = load_vector(file, layout)

    def before(self, number: int) -> Floats:
        """Return what round `number` starts from: what the latest round before it left, or else the start."""
        return self._after[max(earlier)] if (earlier := [n for n in self._after if n < number]) else self._start

    @property
    def latest(self) -> Floats:
        """What the latest round left, or else the start."""
        return self._after[max(self._after)] if self._after else self._start

    def keep(self, number: int, vector: Floats) -> None:
        """Keep what round `number` left; what is older than the round before is forgotten."""
        self._after[number] = vector
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            with whole(self._directory / f"personal-{number}.safetensors") as draft:
                save_vector(draft, vector, self._layout)
        for old in sorted(self._after)[:-2]:
            del self._after[old]
            if self._directory is not None:
                (self._directory / f"personal-{old}.safetensors").unlink(missing_ok=True)
