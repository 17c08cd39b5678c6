"""Files that are there whole, and survive a power cut, or are not there at all."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

READABLE: Final = 0o666  # for everybody whom the umask lets


@contextlib.contextmanager
def whole(path: Path, mode: int = 0o600) -> Iterator[Path]:
    """Give an empty file to write to; afterwards it is at `path`, on disk and whole, in place of what was there.

    Nobody knows its name before it is there, and it is no link: in a directory where others may write too, none of them can
    have what is written go elsewhere.

    Args:
        path: Where it is to be.
        mode: Its mode, cut by the umask; by default for its owner only.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode))
        yield draft
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def append(path: Path, line: bytes) -> None:
    """Return once `line` stands at the end of the file, on disk.

    Raises:
        OSError: It could not be written; the file is cut back to what it was, if that is possible.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("ab") as stream:
        before = stream.tell()
        try:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                stream.truncate(before)
            raise
    if fresh:
        sync_folder(path.parent)


def lock(folder: Path) -> IO[bytes]:
    """Return an open file that keeps `folder` to this process until it is closed or the process ends.

    Raises:
        BlockingIOError: Another process holds it.
    """
    stream = (folder / ".lock").open("wb")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise
    return stream


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` last; without it a power cut may keep the file and lose its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
