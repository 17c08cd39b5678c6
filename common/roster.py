"""The roster: the pinned list of a federation's sites and their keys, signed by its admins.

A site takes part with those on its roster and nobody else. Who is added or removed makes a new roster of the next
epoch; its digest is in the context of every key, mask and signature, so two rosters never mix.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

from confide.common.canonical import canonical_bytes, sha256
from confide.common.crypto import PUBLIC_BYTES, Identity, verify
from confide.common.errors import MessageError, Refused, UsageError

FORMAT = "confide-roster/1"
MOST_SITES = 1000
LARGEST_ROSTER_BYTES = 1 << 20
# A site's name becomes a file's name, and travels in messages.
SITE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,61}[A-Za-z0-9])?")
_PURPOSE = b"confide-roster/1 signature\n"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who belongs to a federation.

    Attributes:
        federation: Its name.
        epoch: From 1; the next roster has the next.
        coordinator: The Ed25519 public key that signs rounds, 32 bytes.
        sites: Each site's Ed25519 public key, 32 bytes, by its name.

    Raises:
        UsageError: There are too many sites, a name or key is malformed, or two are the same.
    """

    federation: str
    epoch: int
    coordinator: bytes
    sites: Mapping[str, bytes]

    def __post_init__(self) -> None:
        keys = [self.coordinator, *self.sites.values()]
        faults = {
            f"it has {len(self.sites)} sites; 1 to {MOST_SITES} are allowed": not 1 <= len(self.sites) <= MOST_SITES,
            "the federation's name is no name of a site's form": not SITE_NAME.fullmatch(self.federation),
            f"its epoch is {self.epoch}, which is below 1": self.epoch < 1,
            "a site's name is not 1 to 63 letters, digits, spaces and . _ -": not all(
                map(SITE_NAME.fullmatch, self.sites)
            ),
            "two sites' names differ in upper and lower case only": len({s.lower() for s in self.sites})
            < len(self.sites),
            f"a key does not have {PUBLIC_BYTES} bytes": any(len(key) != PUBLIC_BYTES for key in keys),
            "two of its members have the same key": len(set(keys)) < len(keys),
        }
        if found := [fault for fault, there in faults.items() if there]:
            raise UsageError(f"The roster cannot be used: {'; '.join(found)}.")

    def canonical(self) -> bytes:
        """Return the roster's one spelling; what admins sign and the digest covers."""
        return canonical_bytes(
            {
                "format": FORMAT,
                "federation": self.federation,
                "epoch": self.epoch,
                "coordinator": self.coordinator.hex(),
                "sites": {site: key.hex() for site, key in self.sites.items()},
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical()`."""
        return sha256(self.canonical())

    def signed(self, admins: Sequence[Identity]) -> bytes:
        """Return the roster with the admins' signatures, as bytes for a file; `read_roster` reads it."""
        signatures = {admin.public.hex(): admin.sign(_PURPOSE + self.canonical()).hex() for admin in admins}
        return canonical_bytes({"roster": json.loads(self.canonical()), "signatures": signatures})


def read_roster(raw: bytes, admins: Sequence[bytes]) -> Roster:
    """Return the roster in `raw` once every one of the pinned admins is found to have signed it.

    Args:
        raw: What `Roster.signed` returned.
        admins: The admins' Ed25519 public keys as they were pinned at enrolment, at least one.

    Raises:
        MessageError: The bytes are not a roster.
        Refused: An admin's signature is missing or wrong.
        UsageError: No admin is pinned, or the roster contradicts itself.
    """
    if not admins:
        raise UsageError("No admin's key is pinned, so no roster can be trusted. Pin the federation's admins first.")
    if len(raw) > LARGEST_ROSTER_BYTES:
        raise MessageError(f"A roster of {len(raw)} bytes was given; at most {LARGEST_ROSTER_BYTES} are allowed.")
    try:
        tree = json.loads(raw)
        roster = parse_roster(canonical_bytes(tree["roster"]))
        signatures = {bytes.fromhex(key): bytes.fromhex(signature) for key, signature in tree["signatures"].items()}
        one_spelling = canonical_bytes(tree) == raw and tree.keys() == {"roster", "signatures"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        one_spelling = False
    if not one_spelling:
        raise _unreadable()
    for admin in admins:
        try:
            verify(admin, _PURPOSE + roster.canonical(), signatures.get(admin, b""))
        except MessageError:
            raise Refused(
                f"The roster of {roster.federation}, epoch {roster.epoch}, is not signed by the pinned admin "
                f"{admin.hex()[:16]}…. Ask the federation for the roster that is."
            ) from None
    return roster


def parse_roster(raw: bytes) -> Roster:
    """Return the roster whose `canonical()` is `raw`. It says nothing about who signed it; see `read_roster`.

    Raises:
        MessageError: The bytes are not a roster in its one spelling.
        UsageError: The roster contradicts itself.
    """
    try:
        fields = json.loads(raw)
        roster = Roster(
            federation=str(fields["federation"]),
            epoch=int(fields["epoch"]),
            coordinator=bytes.fromhex(fields["coordinator"]),
            sites={str(site): bytes.fromhex(key) for site, key in fields["sites"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _unreadable() from None
    if roster.canonical() != raw:
        raise _unreadable()
    return roster


def _unreadable() -> MessageError:
    return MessageError(f"The roster cannot be read: it is not in the one spelling of the format {FORMAT}.")
