"""A plan as its coordinator signed it: for one federation and one run, in the very bytes that people read.

    confide-signed-plan/1
    {"digest":"sha256:…","federation":"Heart 2030","run":"spring","signature":"…"}
    # A Confide plan: …

The first line is the format, the second canonical JSON, and the rest the plan's TOML, byte for byte. The signature
covers federation, run, the plan's digest and its bytes: comments too, since people decide by what they read.
"""

import dataclasses
import json
from typing import Final

from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity, verify
from confide.common.errors import MessageError, Refused, UsageError
from confide.common.plan import LARGEST_PLAN_BYTES, Plan, read_plan
from confide.common.roster import SITE_NAME
from confide.common.settings import shown

FORMAT: Final = "confide-signed-plan/1"
_MOST_HEAD_BYTES = 1024
LARGEST_SIGNED_PLAN_BYTES: Final = LARGEST_PLAN_BYTES + len(FORMAT) + _MOST_HEAD_BYTES + 2
_PURPOSE = b"confide-signed-plan/1 signature\n"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SignedPlan:
    """A plan whose signature was found to be its coordinator's.

    Attributes:
        plan: The plan.
        toml: The bytes it was read from.
        federation: The federation it is for.
        run: The run it is for: 1 to 63 letters, digits, spaces and . _ -, so that it may become a file's name.
        digest: `plan.digest`.
    """

    plan: Plan
    toml: bytes
    federation: str
    run: str
    digest: str


def sign_plan(plan_toml: bytes, *, federation: str, run: str, coordinator: Identity) -> bytes:
    """Return the plan, signed for one run of one federation, as bytes for a file; `read_signed_plan` reads them.

    Args:
        plan_toml: A plan's TOML.
        federation: The federation's name.
        run: The run's name.
        coordinator: The federation's coordinator, who signs.

    Raises:
        PlanError: The TOML is not a valid plan.
        UsageError: A name is malformed.
    """
    for what, name in (("federation", federation), ("run", run)):
        if not SITE_NAME.fullmatch(name):
            raise UsageError(
                f"The {what}'s name {shown(name)} is no name: 1 to 63 letters, digits, spaces and . _ - are allowed, the "
                "first and the last a letter or digit."
            )
    digest = read_plan(plan_toml).digest
    signature = coordinator.sign(_statement(federation, run, digest, plan_toml))
    return _spelled(federation, run, digest, signature, plan_toml)


def read_signed_plan(raw: bytes, coordinator_public: bytes, *, federation: str | None = None) -> SignedPlan:
    """Return the plan in `raw` once its signature is found to be the coordinator's; before that no TOML is parsed.

    Args:
        raw: What `sign_plan` returned.
        coordinator_public: The coordinator's Ed25519 public key as the pinned roster has it, 32 bytes.
        federation: The federation it must be for. Name it wherever one key may coordinate several.

    Raises:
        MessageError: The bytes are not a signed plan in its one spelling, another key signed them, they were changed,
            or the digest is not the plan's.
        Refused: It is for another federation.
        PlanError: The coordinator signed what is no valid plan here, which another version of Confide may have made.
    """
    if len(raw) > LARGEST_SIGNED_PLAN_BYTES:
        raise MessageError(
            f"A signed plan of {len(raw)} bytes was given; at most {LARGEST_SIGNED_PLAN_BYTES} are allowed."
        )
    _, _, rest = raw.partition(b"\n")
    head, _, toml = rest.partition(b"\n")
    try:
        fields = json.loads(head) if len(head) <= _MOST_HEAD_BYTES else {}
        named, run, digest = str(fields["federation"]), str(fields["run"]), str(fields["digest"])
        signature = bytes.fromhex(fields["signature"])
        one_spelling = _spelled(named, run, digest, signature, toml) == raw
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        one_spelling = False
    if not one_spelling or not SITE_NAME.fullmatch(named) or not SITE_NAME.fullmatch(run):
        raise MessageError(
            f"The signed plan cannot be read: it is not in the one spelling of the format {FORMAT}, or a name in it is "
            "malformed. Ask the coordinator for the file as it was made."
        )
    verify(coordinator_public, _statement(named, run, digest, toml), signature)
    if federation is not None and named != federation:
        raise Refused(
            f"The plan is signed for the federation {named}, not for {federation}. Ask the coordinator for the one that is.",
            rule="federation",
        )
    plan = read_plan(toml)
    if plan.digest != digest:
        raise MessageError(
            f"The coordinator signed the digest {shown(digest)} for a plan whose digest is {plan.digest}. Check that both "
            "sides run the same version of Confide."
        )
    return SignedPlan(plan=plan, toml=toml, federation=named, run=run, digest=digest)


def _statement(federation: str, run: str, digest: str, toml: bytes) -> bytes:
    """Return what is signed; the head has no line break, so where the plan begins is certain."""
    return _PURPOSE + canonical_bytes({"federation": federation, "run": run, "digest": digest}) + b"\n" + toml


def _spelled(federation: str, run: str, digest: str, signature: bytes, toml: bytes) -> bytes:
    fields = {"federation": federation, "run": run, "digest": digest, "signature": signature.hex()}
    return FORMAT.encode() + b"\n" + canonical_bytes(fields) + b"\n" + toml
