"""A made-up plan, the narrowest policy that allows it, and the federation it comes from."""

import copy
import dataclasses
import tomllib
from collections.abc import Mapping
from typing import Any

from confide.client.judgement import starter_for
from confide.client.policy import Policy, read_policy
from confide.common import plan as plans
from confide.common.crypto import Identity
from confide.common.messages import Offer
from confide.common.plan import Plan, read_plan
from confide.common.roster import Roster
from confide.common.settings import toml_value

DIGEST = "sha256:" + "12345678" * 8
NOON = 1_795_435_200  # Monday, 23 November 2026, 12:00 UTC
FEDERATION = "heart-2030"


def key(number: int) -> bytes:
    return Identity(number.to_bytes(32)).public


def changed(plan: Plan, **settings: object) -> Plan:
    """Return the plan with settings such as privacy__rounds replaced, unchecked."""
    for dotted, value in settings.items():
        section, _, name = dotted.partition("__")
        plan = dataclasses.replace(plan, **{section: dataclasses.replace(getattr(plan, section), **{name: value})})
    return plan


PLAN = changed(
    read_plan(plans.starter("heart", "tiny", DIGEST, ["query", "value"]).encode()),
    data__person_id="patient",
    compute__device="cpu",
)
HERE: dict[str, Any] = {
    "base_digest": DIGEST,
    "federation": FEDERATION,
    "sites_on_roster": 5,
    "declared_persons": 2000,
    "person_id": "patient",
}
SITES = {"St. Anna": key(2), "north": key(3), "south": key(4), "east": key(5), "west": key(6)}
ROSTER = Roster(federation=FEDERATION, epoch=1, coordinator=key(1), sites=SITES)
APPROVERS = (f"Anna Huber {key(101).hex()}", f"Ben Ito {key(102).hex()}")


def spelled(tree: Mapping[str, Any]) -> str:
    """Spell a policy's tree as TOML."""
    head = [f"{name} = {toml_value(value)}" for name, value in tree.items() if not isinstance(value, dict)]
    tables = [
        "\n".join([f"[{name}]", *(f"{inner} = {toml_value(value)}" for inner, value in table.items())])
        for name, table in tree.items()
        if isinstance(table, dict)
    ]
    return "\n".join([*head, *tables]) + "\n"


NARROW: dict[str, Any] = tomllib.loads(starter_for(PLAN, "St. Anna", [FEDERATION], APPROVERS))


def text(**settings: object) -> str:
    """Return the narrowest policy for PLAN with settings such as privacy__most_rounds replaced; None leaves one out."""
    tree = copy.deepcopy(NARROW)
    for dotted, value in settings.items():
        section, _, name = dotted.rpartition("__")
        table = tree[section] if section else tree
        if value is None:
            del table[name]
        else:
            table[name] = value
    return spelled(tree)


def policy(**settings: object) -> Policy:
    return read_policy(text(**settings).encode())


def offer(**changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "run": "heart-1",
        "plan": PLAN.digest,
        "round": 1,
        "attempt": 1,
        "cohort": tuple(sorted(SITES)),
        "roster": ROSTER.digest,
        "layout": DIGEST,
        "ring": DIGEST,
        "signature": bytes(64),
    }
    return Offer(**fields | changes)
