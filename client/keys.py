"""A site's keys: made once, opened by a passphrase, and changed without a moment in which there is none.

A site has two. Its *identity*, Ed25519, says who it is: it stands on rosters and signs checkpoints of the ledger. It
can be changed; the old and the new one both sign that. Its *vault key*, X25519, never changes: whatever the site seals
or recognises by a keyed digest depends on it. Those who approve plans have keys of their own, in files of their own.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

from confide.client.home import Home, read_private, replace_private, write_private
from confide.common.canonical import canonical_bytes
from confide.common.crypto import (
    LARGEST_KEY_FILE_BYTES,
    MOST_PASSPHRASE_BYTES,
    AgreementKey,
    Entropy,
    Identity,
    derive,
    key_from_file,
    key_to_file,
    public_in_file,
)
from confide.common.disk import sync_folder
from confide.common.entries import Rotation
from confide.common.errors import LedgerError, Refused, SealError, UsageError
from confide.common.settings import shown

NO_PASSPHRASE: Final = "insecure_no_passphrase"  # noqa: S105  a word, not a passphrase
PASSPHRASE_FILE: Final = "CONFIDE_PASSPHRASE_FILE"  # noqa: S105  where one is
APPROVER_FORMAT: Final = "confide-approver/1"
ROTATIONS_FORMAT: Final = "confide-rotations/1"
_VAULT = b"confide-vault/1\n"
_LONGEST_NAME = 200  # as in the ledger
_LARGEST_ROTATIONS_BYTES = 1 << 20  # some 2,000 changes of keys

_Key = TypeVar("_Key", Identity, AgreementKey)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What a site signs and seals with.

    Attributes:
        identity: Who the site is, as its ledger has it in force.
        vault: The key that never changes.
        pending: The public key of an identity that was made to follow and is not in force, or None.
        words: What is allowed although it weakens: NO_PASSPHRASE, or nothing.
    """

    identity: Identity
    vault: AgreementKey
    pending: bytes | None = None
    words: tuple[str, ...] = ()

    def secret(self, purpose: bytes) -> bytes:
        """Return the site's 32 secret bytes for one purpose; of another purpose's they say nothing.

        Raises:
            UsageError: The purpose is empty.

        Source: RFC 5869, with SHA-256, over the vault key.
        """
        if not purpose:
            raise UsageError("A secret needs a purpose, so that no two uses share one. Name it.")
        return derive(self.vault.secret(), _VAULT + purpose)


def make_keys(
    home: Home, passphrase: bytes, entropy: Entropy = os.urandom, *, insecure_no_passphrase: bool = False
) -> Keys:
    """Make the keys of a new site, on disk, and return them as they are read back.

    Call it again if it was interrupted: a vault key that is there is kept. No key is ever replaced.

    Args:
        home: The site's directory; nobody may hold its lock.
        passphrase: Encrypts both; see `key_to_file`.
        entropy: Gives the keys.
        insecure_no_passphrase: Without encryption; the passphrase is empty then.

    Raises:
        UsageError: The site has an identity or a ledger, is in use, or the passphrase does not do.
        SealError: There is a vault key under another passphrase.
    """
    with home.lock():
        if there := next((path for path in (home.identity, home.ledger) if os.path.lexists(path)), None):
            raise UsageError(
                f"{there} is there: the site {home.site} had its keys made before, and they are not replaced. To change "
                "the identity use: confide site key rotate. If a key is lost, restore it from a backup."
            )
        if not os.path.lexists(home.vault):
            vault = AgreementKey.generate(entropy)
            write_private(home.vault, key_to_file(vault, passphrase, insecure_no_passphrase=insecure_no_passphrase))
        _read_key(home.vault, AgreementKey, passphrase, insecure_no_passphrase=insecure_no_passphrase)
        identity = Identity.generate(entropy)
        write_private(home.identity, key_to_file(identity, passphrase, insecure_no_passphrase=insecure_no_passphrase))
    return load_keys(home, passphrase, insecure_no_passphrase=insecure_no_passphrase)


def load_keys(
    home: Home, passphrase: bytes, *, in_force: bytes | None = None, insecure_no_passphrase: bool = False
) -> Keys:
    """Return the site's keys, the identity being the one that the ledger has in force.

    Args:
        home: The site's directory.
        passphrase: As it was when they were made.
        in_force: The ledger's key, 32 bytes. None asks the ledger itself, and only if there are two identities: when a
            change of keys was interrupted, which `complete_rotation` or `rotate` ends.
        insecure_no_passphrase: The keys are not encrypted; the passphrase is empty then.

    Raises:
        UsageError: A file is missing or too open, the identity in force is not there, or the passphrase is missing.
        SealError: The passphrase is another, or a file is damaged.
        LedgerError: It had to be asked, and cannot be read.
    """
    vault = _read_key(home.vault, AgreementKey, passphrase, insecure_no_passphrase=insecure_no_passphrase)
    path, pending = _in_force(home, in_force)
    identity = _read_key(path, Identity, passphrase, insecure_no_passphrase=insecure_no_passphrase)
    words = (NO_PASSPHRASE,) if insecure_no_passphrase else ()
    return Keys(identity=identity, vault=vault, pending=pending, words=words)


def public_identity(home: Home) -> bytes:
    """Return the public key that `identity.pem` names, 32 bytes; no passphrase is needed.

    Raises:
        UsageError: The file is missing or too open.
        SealError: It is damaged.
    """
    return _read_public(home.identity)


def pending_identity(home: Home) -> bytes | None:
    """Return the public key of the identity that is about to follow, 32 bytes, or None if no change of keys is under way.

    Raises:
        UsageError: The file is too open.
        SealError: It is damaged.
    """
    return _read_public(home.next_identity) if os.path.lexists(home.next_identity) else None


def rotate(
    home: Home,
    passphrase: bytes,
    ledger: str,
    entropy: Entropy = os.urandom,
    *,
    in_force: bytes | None = None,
    insecure_no_passphrase: bool = False,
) -> tuple[Identity, Rotation]:
    """Return the identity that is to follow, which is on disk now, and the record that puts it in force.

    Hold the site's lock, pass the identity to `Journal.rotate`, which appends that record, and call
    `complete_rotation`. Until then the old identity is in force, from then on the new one. Called again before that,
    it returns the same two. What both signed is kept beside the keys before this returns, so that an export from before
    can be recovered from after the old one is gone; see `rotations_between`.

    Args:
        home: The site's directory.
        passphrase: Opens the old one and encrypts the new one.
        ledger: The ledger's identifier, which both sign.
        entropy: Gives the new identity.
        in_force: As for `load_keys`.
        insecure_no_passphrase: As for `load_keys`.

    Raises:
        ConfideError: As for `load_keys`.

    Guarantee: a kill at any point leaves the identity in force usable.
    """
    old = load_keys(home, passphrase, in_force=in_force, insecure_no_passphrase=insecure_no_passphrase).identity
    complete_rotation(home, old.public)  # of a change before, killed after its record
    if not os.path.lexists(home.next_identity):
        made = Identity.generate(entropy)
        write_private(home.next_identity, key_to_file(made, passphrase, insecure_no_passphrase=insecure_no_passphrase))
    new = _read_key(home.next_identity, Identity, passphrase, insecure_no_passphrase=insecure_no_passphrase)
    rotation = Rotation.between(ledger, old, new)
    _keep(home, ledger, old.public, rotation)
    return new, rotation


def rotations_between(home: Home, ledger: str, old: bytes, new: bytes) -> tuple[Rotation, ...] | None:
    """Return the records that lead a ledger from one key of the site's to another, or None if they are not all there.

    Whether they are signed is for `ledger.Book` to say.

    Args:
        home: The site's directory.
        ledger: The ledger's identifier.
        old: The key that it has in force, 32 bytes.
        new: The key that it is to have, 32 bytes.

    Raises:
        UsageError: The file is too open.
        SealError: It is damaged.
    """
    before = {rotation.key: (former, rotation) for of, former, rotation in _kept(home) if of == ledger}
    found, key = list[Rotation](), new.hex()
    while key != old.hex():
        if key not in before or len(found) > len(before):
            return None
        key, rotation = before[key]
        found.append(rotation)
    return tuple(reversed(found))


def complete_rotation(home: Home, in_force: bytes) -> None:
    """Put the new identity in the old one's place if the ledger has it in force; the old one is gone then.

    Args:
        home: The site's directory.
        in_force: The ledger's key, 32 bytes.
    """
    if os.path.lexists(home.next_identity) and _read_public(home.next_identity) == in_force:
        home.next_identity.replace(home.identity)
        sync_folder(home.keys)


def change_passphrase(home: Home, old: bytes, new: bytes) -> None:
    """Return once all keys of the site open with the passphrase `new`, and not with `old`.

    Call it again if it was interrupted: keys that open with `new` already are left as they are.

    Args:
        home: The site's directory.
        old: The passphrase until now; empty if there was none.
        new: The passphrase from now on.

    Raises:
        UsageError: The new passphrase does not do, or a key is not encrypted and `old` is not empty, or the other way
            round.
        SealError: A key opens with neither; none was changed.
    """
    if not new:
        raise UsageError("The new passphrase is empty. Give one.")
    opened: dict[Path, Identity | AgreementKey] = {}
    for path in filter(os.path.lexists, (home.vault, home.identity, home.next_identity)):
        try:
            _read_own(home, path, new)
        except (SealError, UsageError):
            opened[path] = _read_own(home, path, old)
    for path, key in opened.items():
        replace_private(path, key_to_file(key, new))


def passphrase_from(
    file: Path | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    ask: Callable[[], str] | None = None,
) -> bytes:
    """Return the passphrase, from the first of these that is given.

    Args:
        file: Holds it as its one line; nobody but this user may read it.
        environment: CONFIDE_PASSPHRASE_FILE in it names such a file. The passphrase itself is never taken from there,
            since other processes may read a process's environment.
        ask: Asks the person at this machine.

    Raises:
        UsageError: None is given, or the file is too open, empty, or of more than one line.
    """
    if file is None and environment.get(PASSPHRASE_FILE):
        file = Path(environment[PASSPHRASE_FILE])
    if file is None and ask is None:
        raise UsageError(
            f"No passphrase is given. Name a file that holds it, mode 0600, with --passphrase-file or {PASSPHRASE_FILE}."
        )
    if file is None:
        assert ask is not None
        passphrase, where = ask().encode("utf-8", "surrogateescape"), "What was typed"
    else:
        passphrase, where = read_private(file, MOST_PASSPHRASE_BYTES + 2), str(file)
        passphrase = passphrase.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase or any(byte in passphrase for byte in b"\0\r\n"):
        raise UsageError(f"{where} is no passphrase: it must be one line, not empty, and nothing else.")
    return passphrase


def fingerprint(public: bytes) -> str:
    """Return 40 decimal digits in 8 groups that stand for a public key, to be read over the telephone.

    Each group is four bytes of the key's SHA-256 modulo 100,000: 132 bits in all, so nobody makes another key with the
    same. They are digits because letters are easily misheard.

    Args:
        public: A public key, 32 bytes.
    """
    digest = hashlib.sha256(public).digest()
    return " ".join(f"{int.from_bytes(digest[at : at + 4]) % 100_000:05}" for at in range(0, 32, 4))


def check_fingerprint(public: bytes, told: str, whose: str) -> None:
    """Return if `told`, whose spaces, line breaks and hyphens do not matter, is the fingerprint of `public`.

    Args:
        public: A public key, 32 bytes.
        told: What a person heard or read.
        whose: Whose key it should be, for the message.

    Raises:
        Refused: It is not.
    """
    if "".join(told.split()).replace("-", "") != fingerprint(public).replace(" ", ""):
        raise Refused(
            f"The key of {whose} has another fingerprint than the one given. Ask its holder, on a way that whoever sent the key "
            "does not control."
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Approver:
    """A person who approves plans.

    Attributes:
        name: As it stands in the ledger.
        identity: What this person signs with.
    """

    name: str
    identity: Identity


def make_approver(
    path: Path, name: str, passphrase: bytes, entropy: Entropy = os.urandom, *, insecure_no_passphrase: bool = False
) -> Approver:
    """Make a key for a person who approves plans, in a new file that only this person's user reads, and return it.

    Args:
        path: Where; nothing may be there.
        name: The person's.
        passphrase: The person's own; see `key_to_file`.
        entropy: Gives the key.
        insecure_no_passphrase: Without encryption; the passphrase is empty then.

    Raises:
        UsageError: Something is there, the name or the passphrase does not do, or the file cannot be written.
    """
    if not _is_name(name):
        raise UsageError(
            f"{shown(name)} is no name: 1 to {_LONGEST_NAME} printable characters, without space at either end, are allowed."
        )
    made = key_to_file(Identity.generate(entropy), passphrase, insecure_no_passphrase=insecure_no_passphrase)
    try:
        write_private(path, f"{APPROVER_FORMAT} {name}\n".encode() + made)
    except FileExistsError:
        raise UsageError(f"{path} is there and is not replaced. Give another path.") from None
    return load_approver(path, passphrase, insecure_no_passphrase=insecure_no_passphrase)


def load_approver(path: Path, passphrase: bytes, *, insecure_no_passphrase: bool = False) -> Approver:
    """Return the person whose key is in the file.

    Raises:
        UsageError: The file is missing or too open, or the passphrase is missing.
        SealError: The passphrase is another, or the file is damaged.
    """
    name, raw = _approver_file(path)
    with _named(path):
        key = key_from_file(raw, Identity, passphrase, insecure_no_passphrase=insecure_no_passphrase)
    return Approver(name=name, identity=key)


def approver_in_file(path: Path) -> tuple[str, bytes]:
    """Return name and public key of the person whose key is in the file; no passphrase is needed.

    Raises:
        UsageError: The file is missing or too open.
        SealError: It is damaged.
    """
    name, raw = _approver_file(path)
    with _named(path):
        return name, public_in_file(raw, Identity)


def _in_force(home: Home, in_force: bytes | None) -> tuple[Path, bytes | None]:
    """Return the file of the identity that the ledger has in force, and the public key of one that waits, if any."""
    there = {home.identity: _read_public(home.identity)}
    if os.path.lexists(home.next_identity):
        there[home.next_identity] = _read_public(home.next_identity)
        in_force = in_force or _key_of_ledger(home)
    if in_force is None:
        return home.identity, None
    for path, public in there.items():
        if public == in_force:
            return path, there.get(home.next_identity) if path == home.identity else None
    raise UsageError(
        f"The ledger of site {home.site} has the identity {fingerprint(in_force)} in force, and {home.keys} holds "
        f"{' and '.join(map(fingerprint, there.values()))} only. Restore that directory from a backup."
    )


def _keep(home: Home, ledger: str, old: bytes, rotation: Rotation) -> None:
    """Let `home.rotations` hold a rotation; it is written as a whole, so that a kill leaves the old file or the new one."""
    kept = _kept(home)
    if (ledger, old.hex(), rotation) not in kept:
        lines = [
            canonical_bytes(
                {"ledger": of, "old": former, "new": each.key, "by_old": each.by_old, "by_new": each.by_new}
            )
            for of, former, each in [*kept, (ledger, old.hex(), rotation)]
        ]
        replace_private(home.rotations, b"\n".join([ROTATIONS_FORMAT.encode(), *lines, b""]))


def _kept(home: Home) -> list[tuple[str, str, Rotation]]:
    """Return (ledger, old key, rotation) of each that is kept, in the order in which they were made."""
    if not os.path.lexists(home.rotations):
        return []
    head, *lines = read_private(home.rotations, _LARGEST_ROTATIONS_BYTES).removesuffix(b"\n").split(b"\n")
    found = []
    try:
        if head != ROTATIONS_FORMAT.encode():
            raise ValueError
        for line in lines:
            tree = json.loads(line.decode("ascii"))
            ledger, old, new, by_old, by_new = (tree[key] for key in ("ledger", "old", "new", "by_old", "by_new"))
            if (
                len(tree) != 5
                or not isinstance(ledger, str)
                or not isinstance(old, str)
                or canonical_bytes(tree) != line
            ):
                raise ValueError
            found.append((ledger, old, Rotation(key=new, by_old=by_old, by_new=by_new)))
    except (ValueError, KeyError, TypeError, RecursionError, LedgerError):
        raise SealError(
            f"{home.rotations} is damaged: it must begin with {ROTATIONS_FORMAT} and have a change of keys on each line. Restore "
            "it from a backup; without it only exports that were written since the last change can be recovered from."
        ) from None
    return found


def _key_of_ledger(home: Home) -> bytes:
    from confide.client.journal import Journal  # only if there are two identities

    return Journal.look(home.ledger).key


def _read_key(path: Path, kind: type[_Key], passphrase: bytes, *, insecure_no_passphrase: bool = False) -> _Key:
    raw = read_private(path, LARGEST_KEY_FILE_BYTES)
    with _named(path):
        return key_from_file(raw, kind, passphrase, insecure_no_passphrase=insecure_no_passphrase)


def _read_own(home: Home, path: Path, passphrase: bytes) -> Identity | AgreementKey:
    """Return one of the site's keys, be it encrypted or not."""
    if path == home.vault:
        return _read_key(path, AgreementKey, passphrase, insecure_no_passphrase=not passphrase)
    return _read_key(path, Identity, passphrase, insecure_no_passphrase=not passphrase)


def _read_public(path: Path) -> bytes:
    raw = read_private(path, LARGEST_KEY_FILE_BYTES)
    with _named(path):
        return public_in_file(raw, Identity)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in an error of the body which file it is about."""
    try:
        yield
    except (SealError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None


def _approver_file(path: Path) -> tuple[str, bytes]:
    """Return the name and the key's part of an approver's file."""
    raw = read_private(path, LARGEST_KEY_FILE_BYTES)
    head, _, key = raw.partition(b"\n")
    form, _, name = head.decode("utf-8", "replace").partition(" ")
    if form != APPROVER_FORMAT or not _is_name(name) or name.encode() != head[len(APPROVER_FORMAT) + 1 :]:
        raise SealError(
            f"{path} is not the key file of a person who approves: it does not begin with {APPROVER_FORMAT} and a name. "
            "Check that the path is the right one, or take the file from a backup."
        )
    return name, key


def _is_name(name: str) -> bool:
    """Return whether a person's name is one line that looks the same wherever it is shown."""
    return name.isprintable() and name.strip() == name and 1 <= len(name) <= _LONGEST_NAME
