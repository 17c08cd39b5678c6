"""The federations a site belongs to: whose word on its members is taken, and the roster that is in force.

What a site knows of a federation is one file, replaced whole: the admins' keys, pinned when the steward compared their
fingerprints, and the newest roster that all of them signed. A roster never goes back to an earlier epoch.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from confide.client.home import Home, read_private, replace_private, write_private
from confide.client.keys import check_fingerprint, fingerprint, public_identity
from confide.common.canonical import canonical_bytes
from confide.common.crypto import PUBLIC_BYTES
from confide.common.entries import Federation
from confide.common.errors import MessageError, Refused, UsageError
from confide.common.roster import LARGEST_ROSTER_BYTES, SITE_NAME, Roster, read_roster
from confide.common.settings import shown

FORMAT: Final = "confide-enrolment/1"
MOST_ADMINS: Final = 16
_LARGEST_BYTES = LARGEST_ROSTER_BYTES + 4096
_SUFFIX = ".json"


def join(
    home: Home, federation: str, admins: tuple[bytes, ...], roster_bytes: bytes, *, fingerprints: Sequence[str]
) -> Roster:
    """Pin the federation's admins, keep its roster, and return it.

    Args:
        home: The site's directory.
        federation: The federation's name, as the steward knows it.
        admins: The admins' Ed25519 public keys, 32 bytes each, 1 to 16.
        roster_bytes: The roster, signed by all of them.
        fingerprints: Of each admin's key, in the same order, as the steward heard them from the admins.

    Raises:
        UsageError: The site belongs to that federation already, or the admins' keys or their number are malformed.
        Refused: A fingerprint is another, an admin did not sign, or the roster is another federation's or does not have
            this site with its key.
        MessageError: The bytes are not a roster.
    """
    faults = {
        f"{len(admins)} keys of admins are given; 1 to {MOST_ADMINS} are allowed": not 1 <= len(admins) <= MOST_ADMINS,
        f"an admin's key does not have {PUBLIC_BYTES} bytes": any(len(admin) != PUBLIC_BYTES for admin in admins),
        "an admin's key is given twice": len(set(admins)) < len(admins),
        f"{len(fingerprints)} fingerprints are given for {len(admins)} keys": len(fingerprints) != len(admins),
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise UsageError(f"The federation {shown(federation)} cannot be joined: {found[0]}. Ask its admins.")
    for admin, told in zip(admins, fingerprints, strict=True):
        check_fingerprint(admin, told, f"an admin of {federation}")
    kept = _Enrolled(admins=tuple(sorted(admins)), roster=read_roster(roster_bytes, admins), signed=roster_bytes)
    _check_site(home, federation, kept.roster)
    with _one_writer(home):
        path = _path(home, federation)
        try:
            write_private(path, kept.canonical())
        except FileExistsError:
            raise UsageError(
                f"The site belongs to the federation {federation} already. For a newer roster use: confide site join, "
                f"without --admin. To pin other admins remove {path} first, and compare their fingerprints anew."
            ) from None
    return kept.roster


def update(home: Home, federation: str, roster_bytes: bytes) -> Roster:
    """Keep a newer roster of a federation the site belongs to, and return it; the same one again changes nothing.

    Args:
        home: The site's directory.
        federation: The federation's name.
        roster_bytes: The roster, signed by all pinned admins.

    Raises:
        UsageError: The site does not belong to that federation, or what it keeps of it is damaged.
        Refused: A pinned admin did not sign, the roster is not newer, or it is another federation's or does not have
            this site with its key.
        MessageError: The bytes are not a roster.

    Guarantee: a roster is only ever followed by one of a later epoch.
    """
    with _one_writer(home):
        kept = _read(home, federation)
        roster = read_roster(roster_bytes, kept.admins)
        _check_site(home, federation, roster)
        if roster == kept.roster:
            return roster
        if roster.epoch <= kept.roster.epoch:
            raise Refused(
                f"The roster of {federation} that was given is of epoch {roster.epoch}, and the one in force is of epoch "
                f"{kept.roster.epoch}{' and another' if roster.epoch == kept.roster.epoch else ''}. Only a later epoch "
                "follows: ask the admins for the newest roster, and tell them of this one.",
                rule="federation",
            )
        newer = dataclasses.replace(kept, roster=roster, signed=roster_bytes)
        replace_private(_path(home, federation), newer.canonical())
    return roster


def current(home: Home, federation: str) -> Roster:
    """Return the roster in force, its signatures and this site's place on it checked again.

    Raises:
        UsageError: The site does not belong to that federation, or what it keeps of it is damaged.
        Refused: The roster does not have this site with the key that it has now.
    """
    roster = _read(home, federation).roster
    _check_site(home, federation, roster)
    return roster


def federations(home: Home) -> tuple[str, ...]:
    """Return the names of the federations that the site belongs to, in order."""
    names = (path.name.removesuffix(_SUFFIX) for path in home.federations.glob(f"*{_SUFFIX}"))
    return tuple(sorted(name for name in names if SITE_NAME.fullmatch(name)))


def federation_entry(home: Home, federation: str) -> Federation:
    """Return the ledger's record of the roster in force and of whose word it rests on.

    Raises:
        ConfideError: As for `current`.
    """
    kept = _read(home, federation)
    _check_site(home, federation, kept.roster)
    return Federation(
        federation=kept.roster.federation,
        epoch=kept.roster.epoch,
        roster=kept.roster.digest,
        admins=tuple(admin.hex() for admin in kept.admins),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Enrolled:
    """What a site keeps of a federation.

    Attributes:
        admins: The pinned keys, sorted.
        roster: The roster in force.
        signed: It, as it was signed.
    """

    admins: tuple[bytes, ...]
    roster: Roster
    signed: bytes

    def canonical(self) -> bytes:
        return canonical_bytes(
            {
                "format": FORMAT,
                "federation": self.roster.federation,
                "admins": [admin.hex() for admin in self.admins],
                "roster": json.loads(self.signed),
            }
        )


@functools.lru_cache(maxsize=4)  # an agent reads it before every message, and mostly it is the same
def _parsed(raw: bytes) -> _Enrolled:
    """Return what `canonical` wrote, the admins' signatures checked; raises ValueError and more if it is not."""
    tree = json.loads(raw)
    admins = tuple(bytes.fromhex(admin) for admin in tree["admins"])
    if not 1 <= len(admins) <= MOST_ADMINS or list(admins) != sorted(set(admins)):
        raise ValueError
    signed = canonical_bytes(tree["roster"])
    kept = _Enrolled(admins=admins, roster=read_roster(signed, admins), signed=signed)
    if kept.canonical() != raw:
        raise ValueError
    return kept


def _read(home: Home, federation: str) -> _Enrolled:
    path = _path(home, federation)
    if not os.path.lexists(path):
        raise UsageError(
            f"The site {home.site} does not belong to the federation {federation}; it belongs to "
            f"{', '.join(federations(home)) or 'none'}. Join it with: confide site join"
        )
    raw = read_private(path, _LARGEST_BYTES)
    try:
        kept = _parsed(raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MessageError, Refused, UsageError):
        kept = None
    if kept is None or kept.roster.federation != federation:
        raise UsageError(
            f"{path} is damaged, or was written by hand: it does not hold pinned admins and a roster of {federation} that "
            "they signed. Restore it from a backup, or remove it and join again."
        )
    return kept


def _check_site(home: Home, federation: str, roster: Roster) -> None:
    """Return if the roster is this federation's and has this site with its key."""
    if roster.federation != federation:
        raise Refused(
            f"The roster is of the federation {roster.federation}, not of {federation}. Ask for the right one.",
            rule="federation",
        )
    own = public_identity(home)
    if roster.sites.get(home.site) != own:
        enrolled = roster.sites.get(home.site)
        holds = "does not have it" if enrolled is None else f"has it with the key {fingerprint(enrolled)}"
        raise Refused(
            f"The site {home.site} has the key {fingerprint(own)}, and the roster of {federation}, epoch {roster.epoch}, "
            f"{holds}. Give the admins this key's fingerprint, and ask for a roster with it.",
            rule="federation",
        )


@contextlib.contextmanager
def _one_writer(home: Home) -> Iterator[None]:
    """Keep others from writing meanwhile, so that what was read is still what is replaced."""
    descriptor = os.open(home.federations, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _path(home: Home, federation: str) -> Path:
    if not SITE_NAME.fullmatch(federation):
        raise UsageError(
            f"The federation's name {shown(federation)} is no name: 1 to 63 letters, digits, spaces and . _ - are allowed."
        )
    return home.federations / f"{federation}{_SUFFIX}"
