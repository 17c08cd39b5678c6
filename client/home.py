"""A site's directory: where everything it owns lies, who may read it, and that one agent uses it at a time.

    site.toml            the site's name
    policy.toml          what its owner allows
    ledger.db            what its data have cost
    keys/                identity.pem, vault.pem, and approvers/
    data/                the registry of data sets
    plans/               plans, with what was decided on them
    federations/         the federations it belongs to, and what was seen of other sites' ledgers
    rounds/              sealed vectors of rounds that are not over
    personal/            adapters of its own
    log/                 the trail
    run/                 the sockets; the one place that a group may enter

All of it belongs to one user and is closed to everybody else, mode 0700 and 0600. What is more open, somebody else's
or a symbolic link is refused rather than used. The keys, the ledger and the policy are made by their own rooms.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import re
import secrets
import stat
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Self

from confide.client.postbox import LONGEST_PATH_BYTES
from confide.common.disk import sync_folder, whole
from confide.common.errors import UsageError
from confide.common.roster import SITE_NAME
from confide.common.settings import shown, toml_value

FORMAT = "confide-site/1"
LARGEST_SITE_BYTES = 1 << 12
_FOLDERS = ("keys", "keys/approvers", "data", "plans", "federations", "rounds", "personal", "log")
_OTHERS = 0o077
_BUT_ENTERED_BY_ITS_GROUP = 0o067  # a postman of another user comes through the site's directory to run/
_BUT_READ_BY_ITS_GROUP = 0o027
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A site's directory, as `create` makes it and `open` finds it.

    Attributes:
        root: Its absolute path.
        site: The site's name.
        created: When it was made, such as `2026-11-23T02:40:00Z`.
    """

    root: Path
    site: str
    created: str

    @classmethod
    def create(
        cls, root: Path, site: str, *, postman_group: int | None = None, clock: Callable[[], float] = time.time
    ) -> Self:
        """Make the directory of a new site and return it.

        Every mode is as above whatever the umask is. The last file written, `site.toml`, makes it a site's directory;
        if two make one at once, one of them is refused.

        Args:
            root: Where; what is there already must be an empty directory of this user's.
            site: The site's name, as it will stand on rosters.
            postman_group: The number of the group that may use the sockets, if the postman runs as another user; it may
                then pass through `root` (0710), and read nothing.
            clock: Gives the seconds since 1970.

        Raises:
            UsageError: The name is malformed, the path too long for a socket, the directory not empty, or it cannot be
                made.
        """
        cls.check_new(root, site)
        created = datetime.datetime.fromtimestamp(int(clock()), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        home = cls(root=_absolute(root), site=site, created=created)
        try:
            home._make(postman_group)
        except FileExistsError:
            raise UsageError(
                f"{home.root} is being made, or filled, by another process. Choose a new directory."
            ) from None
        except OSError as error:
            raise UsageError(
                f"The site's directory {home.root} cannot be made: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}. Give a place that this user may write to."
            ) from None
        return home

    @classmethod
    def check_new(cls, root: Path, site: str) -> None:
        """Return if `create` would not refuse the name or the directory; asked before somebody thinks of a passphrase.

        Raises:
            UsageError: The name is malformed, the path too long for a socket, or the directory a site's, or not empty.
        """
        if not SITE_NAME.fullmatch(site):
            raise UsageError(
                f"The site's name {shown(site)} is no name: 1 to 63 letters a–z and A–Z without accents, digits, spaces and . _ - "
                "are allowed, the first and the last a letter or digit."
            )
        home = cls(root=_absolute(root), site=site, created="")
        home._check_length()
        if os.path.lexists(home.identity) and os.path.lexists(home.root / "site.toml"):
            there, _ = _read_site(home.root / "site.toml")
            raise UsageError(
                f"{home.root} is the site {there} already, with keys that are never replaced. To look at it use: confide site "
                "status. Another site needs a new directory."
            )
        if home.root.is_dir():
            _check(home.root, stat.S_ISDIR, 0)
            home._expect(())

    @classmethod
    def open(cls, root: Path) -> Self:
        """Return the site's directory at `root`, once it is found to be closed to others.

        Looked at are the directory itself, whatever lies directly in it, and all keys.

        Raises:
            UsageError: It is no site's directory, or something in it is too open (the line that mends it is in the
                message), another user's, a symbolic link, missing or malformed.
        """
        root = _absolute(root)
        _check(root, stat.S_ISDIR, _BUT_ENTERED_BY_ITS_GROUP)
        if not os.path.lexists(root / "site.toml"):
            raise UsageError(
                f"{root} is no site's directory: it has no site.toml. Check the path, or make one with: confide site init"
            )
        site, created = _read_site(root / "site.toml")
        home = cls(root=root, site=site, created=created)
        home._check_length()
        home.check()
        return home

    def check(self) -> None:
        """Return if everything that `open` looks at is as it must be; an agent asks again before it begins.

        Raises:
            UsageError: As for `open`.
        """
        _check(self.root, stat.S_ISDIR, _BUT_ENTERED_BY_ITS_GROUP)
        for name in _FOLDERS:
            _check(self.root / name, stat.S_ISDIR, _OTHERS)
        _check(self.run, stat.S_ISDIR, _BUT_READ_BY_ITS_GROUP)
        for path in (*_inside(self.root), *_inside(self.keys), *_inside(self.approvers)):
            if path != self.run and os.path.lexists(path):  # a draft may have been put in its place meanwhile
                _check(path, _is_file_or_directory, _OTHERS)

    def lock(self) -> IO[bytes]:
        """Return an open file that keeps the site to this process until it is closed or the process ends.

        Keep it: an open file that nothing refers to is closed.

        Raises:
            UsageError: Another process has it.
        """
        path = self.root / ".lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stream = os.fdopen(descriptor, "r+b")
            os.fchmod(descriptor, 0o600)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be opened: {error.strerror}. Remove it if it is no file of yours."
            ) from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = stream.read(20).decode("ascii", "replace").strip()
            stream.close()
            raise UsageError(
                f"The site {self.site} in {self.root} is in use{f' by process {holder}' if holder.isdecimal() else ''}: "
                "one agent at a time works on it. Stop the other one first."
            ) from None
        except OSError as error:
            stream.close()
            raise UsageError(f"{path} cannot be locked: {error.strerror}. Put the site on a local disk.") from None
        stream.truncate(0)
        stream.write(b"%d\n" % os.getpid())
        stream.flush()
        return stream

    @property
    def policy(self) -> Path:
        """What the site's owner allows."""
        return self.root / "policy.toml"

    @property
    def ledger(self) -> Path:
        """The ledger's database."""
        return self.root / "ledger.db"

    @property
    def keys(self) -> Path:
        """The directory of the site's keys."""
        return self.root / "keys"

    @property
    def identity(self) -> Path:
        """The key that says who the site is."""
        return self.keys / "identity.pem"

    @property
    def next_identity(self) -> Path:
        """The key that is about to follow it; there only while keys are changed."""
        return self.keys / "identity.next.pem"

    @property
    def rotations(self) -> Path:
        """What the site's keys signed when one followed another; public, and kept with the keys for a recovery."""
        return self.keys / "rotations.jsonl"

    @property
    def vault(self) -> Path:
        """The key from which the site's own secrets follow."""
        return self.keys / "vault.pem"

    @property
    def approvers(self) -> Path:
        """The directory for keys of those who approve plans, if they are kept here."""
        return self.keys / "approvers"

    @property
    def data(self) -> Path:
        """The directory of the registry of data sets."""
        return self.root / "data"

    @property
    def plans(self) -> Path:
        """The directory of plans."""
        return self.root / "plans"

    @property
    def federations(self) -> Path:
        """The directory of what is pinned of each federation."""
        return self.root / "federations"

    @property
    def witness(self) -> Path:
        """How far other sites' ledgers had come, and this site's own; the name is no federation's."""
        return self.federations / "witness"

    @property
    def rounds(self) -> Path:
        """The directory of sealed vectors."""
        return self.root / "rounds"

    @property
    def personal(self) -> Path:
        """The directory of adapters that never leave."""
        return self.root / "personal"

    @property
    def log(self) -> Path:
        """The directory of the trail."""
        return self.root / "log"

    @property
    def run(self) -> Path:
        """The directory of the sockets, mode 0750."""
        return self.root / "run"

    @property
    def agent_socket(self) -> Path:
        """Where the postman asks."""
        return self.run / "agent.sock"

    @property
    def control_socket(self) -> Path:
        """Where the steward asks."""
        return self.run / "control.sock"

    def _check_length(self) -> None:
        longest = max(len(os.fsencode(socket)) for socket in (self.agent_socket, self.control_socket))
        if longest > LONGEST_PATH_BYTES:
            raise UsageError(
                f"The site's directory {self.root} lies too deep: its sockets' paths would have {longest} bytes, and at "
                f"most {LONGEST_PATH_BYTES} are possible. Choose a directory whose path is {longest - LONGEST_PATH_BYTES} "
                "bytes shorter."
            )

    def _make(self, group: int | None) -> None:
        """Make everything and write it through to the disk, the directory's own name last."""
        with contextlib.suppress(FileExistsError):
            _make_folder(self.root, 0o700)
        _check(self.root, stat.S_ISDIR, 0)
        self._expect(())
        _make_folder(self.keys, 0o700)  # one process can; who cannot is refused here, and has changed nothing
        self.root.chmod(0o700)
        self._expect(("keys",))  # nor did anybody put something in while the directory was open to them
        for name in _FOLDERS[1:]:
            _make_folder(self.root / name, 0o700)
        _make_folder(self.run, 0o750)
        if group is not None:
            os.chown(self.run, -1, group)
            os.chown(self.root, -1, group)
            self.run.chmod(0o750)
            self.root.chmod(0o710)
        for folder in (*map(self.root.joinpath, _FOLDERS), self.run):
            sync_folder(folder)
        write_private(
            self.root / "site.toml",
            (
                "# A site's directory, made by `confide site init`. The name is the one on rosters.\n"
                f"format = {toml_value(FORMAT)}\nname = {toml_value(self.site)}\ncreated = {toml_value(self.created)}\n"
            ).encode(),
        )
        sync_folder(self.root.parent)

    def _expect(self, names: tuple[str, ...]) -> None:
        there = tuple(path.name for path in _inside(self.root))
        if there != names:
            raise UsageError(
                f"{self.root} is not empty: it holds {', '.join(map(shown, there[:3]))}{' …' if there[3:] else ''}. Choose "
                "a new directory. If it is a site's that was not finished, it has no keys yet: remove it and begin again."
            )


def write_private(path: Path, content: bytes) -> None:
    """Return once there is a new file at `path`, mode 0600, whole and on disk; what is there already stays.

    Raises:
        FileExistsError: Something is there.
        UsageError: It cannot be written; nothing is there.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with _written(path):
        try:
            _write_new(draft, content)
            os.link(draft, path)  # unlike a renaming, it replaces nothing
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(path.parent)


def replace_private(path: Path, content: bytes) -> None:
    """Return once `content` is at `path`, mode 0600, whole and on disk, in place of what was there.

    Raises:
        UsageError: It cannot be written; what was there is there.
    """
    with _written(path), whole(path) as draft:
        draft.chmod(0o600)  # the umask may have taken the owner's bits
        draft.write_bytes(content)


def read_private(path: Path, most_bytes: int) -> bytes:
    """Return the content of a file that nobody but this user may read or write.

    Checked is the very file that is read, so that nothing can be exchanged in between.

    Args:
        path: A file, no symbolic link.
        most_bytes: It may have so many.

    Raises:
        UsageError: It is missing, no file, too open, another user's or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        _check(path, stat.S_ISREG, _OTHERS)
        raise UsageError(f"{path} cannot be read. Check that it is a file of this user's.") from None
    try:
        _check_status(path, os.fstat(descriptor), stat.S_ISREG, _OTHERS)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            content = stream.read(most_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > most_bytes:
        raise UsageError(
            f"{path} has more than {most_bytes} bytes, the most it may have. Check that it is the right file."
        )
    return content


def _read_site(path: Path) -> tuple[str, str]:
    """Return name and time of creation in `site.toml`."""
    raw = read_private(path, LARGEST_SITE_BYTES)
    try:
        tree = tomllib.loads(raw.decode())
    except (ValueError, RecursionError):
        tree = {}
    name, created = tree.get("name"), tree.get("created")
    faults = {
        f"it does not hold format, name and created, and nothing else; format is {toml_value(FORMAT)}": tree.keys()
        != {"format", "name", "created"}
        or tree["format"] != FORMAT,
        "the name is not 1 to 63 letters a–z and A–Z without accents, digits, spaces and . _ -": not isinstance(
            name, str
        )
        or not SITE_NAME.fullmatch(name),
        "created is not a time such as 2026-11-23T02:40:00Z": not isinstance(created, str)
        or not _CREATED.fullmatch(created),
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise UsageError(f"{path} cannot be used: {found[0]}. Restore it from a backup; nothing else names the site.")
    return str(name), str(created)


def _check(path: Path, is_right_kind: Callable[[int], bool], forbidden: int) -> None:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UsageError(f"{path} is not there. Check the path, or restore it from a backup.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be looked at: {error.strerror}.") from None
    _check_status(path, status, is_right_kind, forbidden)


def _check_status(path: Path, status: os.stat_result, is_right_kind: Callable[[int], bool], forbidden: int) -> None:
    """Return if what is at `path` is of the right kind, this user's, and closed to all whom `forbidden` names."""
    if stat.S_ISLNK(status.st_mode):
        raise UsageError(f"{path} is a symbolic link, which could be pointed elsewhere. Put the thing itself there.")
    if not is_right_kind(status.st_mode):
        raise UsageError(
            f"{path} is neither the file nor the directory that belongs there. Remove it, or check the path."
        )
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"{path} belongs to user {status.st_uid}, and this process runs as {os.geteuid()}. Run as the owner, or mend "
            f"it with: chown {os.geteuid()} {_quoted(path)}"
        )
    if open_to := status.st_mode & forbidden:
        mended = stat.S_IMODE(status.st_mode) & ~forbidden
        if forbidden == _BUT_ENTERED_BY_ITS_GROUP and status.st_gid == os.getegid():
            mended &= ~_OTHERS  # no group was named for a postman of another user
        raise UsageError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, which lets others at it (by {open_to:04o}). Mend it with: "
            f"chmod {mended:04o} {_quoted(path)}"
        )


def _is_file_or_directory(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _inside(folder: Path) -> Iterator[Path]:
    """Yield what lies directly in `folder`, in order."""
    try:
        yield from sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed: {error.strerror}. Run as the user it belongs to.") from None


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}. Check that its directory is there, is this user's, and "
            "that the disk has room."
        ) from None


def _make_folder(path: Path, mode: int) -> None:
    path.mkdir(mode=0o700)
    path.chmod(mode)  # mkdir's is cut by the umask


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(descriptor, 0o600)  # the umask may have taken the owner's bits
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)


def _absolute(root: Path) -> Path:
    if "\0" in str(root):
        raise UsageError("The directory's path holds a zero byte. Check it.")
    return Path(os.path.abspath(root))


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(os.fspath(path))
