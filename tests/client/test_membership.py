"""Which offers a site attends: those of its coordinator, to enough of its roster, over a graph its owner allows."""

import dataclasses
from typing import Any

import pytest

from confide.client.membership import Membership
from confide.common.attempt import Attempt
from confide.common.crypto import Identity
from confide.common.errors import MessageError, Refused, UsageError
from confide.common.graph import SEMI_HONEST, connections
from confide.common.messages import Offer
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.common.roster import Roster

COORDINATOR = Identity(bytes([7] * 32))
IDENTITIES = {f"site-{number:02}": Identity(number.to_bytes(32)) for number in range(66)}
NAMES = tuple(IDENTITIES)
RING = RingLayout(length=3, update_bound=1.0, max_sites=66)


def roster(count: int = 7, **changes: Any) -> Roster:
    fields: dict[str, Any] = {
        "federation": "test",
        "epoch": 1,
        "coordinator": COORDINATOR.public,
        "sites": {site: IDENTITIES[site].public for site in NAMES[:count]},
    }
    return Roster(**fields | changes)


ROSTER = roster()  # of its seven sites five must be asked


def with_federation(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, federation=dataclasses.replace(plan.federation, **changes))


def member(plan: Plan, site: str = "site-00", **changes: Any) -> Membership:
    fields: dict[str, Any] = {"identity": IDENTITIES[site], "roster": ROSTER, "plan": plan, "ring": RING}
    return Membership(site=site, **fields | changes)


def offer(
    plan: Plan, cohort: tuple[str, ...] = NAMES[:5], signer: Identity = COORDINATOR, pinned: Roster = ROSTER
) -> Offer:
    unsigned = Offer(
        run="run",
        plan=plan.digest,
        round=1,
        attempt=1,
        cohort=cohort,
        roster=pinned.digest,
        layout="sha256:1",
        ring=RING.digest,
        signature=b"",
    )
    offered = Attempt.of(unsigned, pinned, RING, plan.federation).offered
    return dataclasses.replace(unsigned, signature=signer.sign(offered))


def test_an_offer_of_the_coordinator_to_members_is_attended(plan: Plan) -> None:
    side = member(plan).attend(offer(plan))

    assert side.advertise().context == Attempt.of(offer(plan), ROSTER, RING, plan.federation).pre.hex()


def test_every_attendance_has_keys_of_its_own(plan: Plan) -> None:
    sides = [member(plan).attend(offer(plan)) for _ in range(2)]

    assert sides[0].advertise().keys[:64] != sides[1].advertise().keys[:64]


@pytest.mark.parametrize("term", ["run", "plan", "layout"])
def test_a_term_changed_after_the_coordinator_signed_is_refused(plan: Plan, term: str) -> None:
    changed: dict[str, Any] = {term: "another"}

    with pytest.raises(MessageError, match="signature"):
        member(plan).attend(dataclasses.replace(offer(plan), **changed))


@pytest.mark.parametrize("term", ["round", "attempt"])
def test_a_number_changed_after_the_coordinator_signed_is_refused(plan: Plan, term: str) -> None:
    changed: dict[str, Any] = {term: 2}

    with pytest.raises(MessageError, match="signature"):
        member(plan).attend(dataclasses.replace(offer(plan), **changed))


@pytest.mark.parametrize("cohort", [NAMES[:6], NAMES[:7], (*NAMES[:4], NAMES[5])])
def test_a_cohort_changed_after_the_coordinator_signed_is_refused(plan: Plan, cohort: tuple[str, ...]) -> None:
    with pytest.raises(MessageError, match="signature"):
        member(plan).attend(dataclasses.replace(offer(plan), cohort=cohort))


@pytest.mark.parametrize("signer", [Identity(bytes(32)), IDENTITIES["site-01"]])
def test_an_offer_signed_by_anybody_else_is_refused(plan: Plan, signer: Identity) -> None:
    with pytest.raises(MessageError, match="signature"):
        member(plan).attend(offer(plan, signer=signer))


def test_terms_of_another_federation_section_are_not_what_the_coordinator_signed(plan: Plan) -> None:
    stricter = with_federation(plan, min_sites=6)

    with pytest.raises(MessageError, match="signature"):
        member(stricter).attend(offer(plan, NAMES[:7]))


@pytest.mark.parametrize("term", ["roster", "ring"])
def test_another_roster_or_ring_is_refused(plan: Plan, term: str) -> None:
    changed: dict[str, Any] = {term: "sha256:" + "0" * 64}

    with pytest.raises(MessageError, match="another roster or ring"):
        member(plan).attend(dataclasses.replace(offer(plan), **changed))


@pytest.mark.parametrize("cohort", [(*NAMES[:5], "stranger"), NAMES[:8], NAMES[4::-1], (*NAMES[:5], NAMES[4])])
def test_a_cohort_that_is_no_sorted_part_of_the_roster_is_refused(plan: Plan, cohort: tuple[str, ...]) -> None:
    with pytest.raises(MessageError, match="no sorted part of the roster"):
        member(plan).attend(dataclasses.replace(offer(plan), cohort=cohort))


def test_a_cohort_without_the_site_is_refused(plan: Plan) -> None:
    with pytest.raises(Refused, match="whose cohort it is not in"):
        member(plan).attend(offer(plan, NAMES[1:6]))


@pytest.mark.parametrize(("count", "least"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (8, 6), (10, 7), (64, 43)])
def test_more_than_two_thirds_of_the_roster_must_be_asked_however_few_the_plan_would_do_with(
    plan: Plan, count: int, least: int
) -> None:
    terms, pinned = with_federation(plan, min_sites=3, max_sites=66), roster(count)
    site, fits = member(terms, roster=pinned), offer(terms, NAMES[:least], pinned=pinned)

    site.attend(fits)
    for fewer in range(1, least):
        with pytest.raises(Refused, match=f"offered to {fewer} of the {count} sites on the roster; at least {least} "):
            site.attend(dataclasses.replace(fits, cohort=NAMES[:fewer]))


def test_as_many_as_the_plan_says_must_be_asked_if_the_roster_would_do_with_fewer(plan: Plan) -> None:
    terms = with_federation(plan, min_sites=6)
    site, fits = member(terms), offer(terms, NAMES[:6])

    site.attend(fits)
    with pytest.raises(Refused, match="offered to 5 of the 7 sites on the roster; at least 6 must be asked"):
        site.attend(dataclasses.replace(fits, cohort=NAMES[:5]))


@pytest.mark.parametrize("asked", [5, 6, 7])
def test_how_many_shares_open_a_secret_follows_from_the_roster_and_not_from_who_is_asked(
    plan: Plan, asked: int
) -> None:
    attempt = Attempt.of(offer(plan, NAMES[:asked]), ROSTER, RING, plan.federation)

    assert attempt.connections == connections(7)
    assert (attempt.floor, attempt.gathered, attempt.connections.threshold) == (5, 5, 5)


@pytest.mark.parametrize("asked", [60, 64, 66])
@pytest.mark.parametrize("plan_allows", [False, True])
@pytest.mark.parametrize("site_allows", [False, True])
def test_a_roster_of_more_than_64_sites_needs_the_word_of_plan_and_site_whoever_is_asked(
    plan: Plan, plan_allows: bool, site_allows: bool, asked: int
) -> None:
    terms = with_federation(plan, max_sites=66, graph=SEMI_HONEST if plan_allows else "complete")
    pinned = roster(66)
    site = member(terms, roster=pinned, allowed=frozenset({SEMI_HONEST} if site_allows else ()))
    fits = offer(terms, NAMES[:asked], pinned=pinned)

    if plan_allows and site_allows:
        site.attend(fits)
        with pytest.raises(Refused, match="offered to 59 of the 66 sites on the roster; at least 60 must be asked"):
            site.attend(dataclasses.replace(fits, cohort=NAMES[:59]))  # the circle must not lose more than a tenth
    else:
        with pytest.raises(Refused, match="Plan and site must both allow it by that word"):
            site.attend(fits)


def test_a_roster_of_64_sites_needs_no_word(plan: Plan) -> None:
    terms, pinned = with_federation(plan, max_sites=66), roster(64)

    side = member(terms, roster=pinned).attend(offer(terms, NAMES[:64], pinned=pinned))

    assert side.advertise().keys


@pytest.mark.parametrize("site", ["site-01", "stranger"])
def test_a_membership_needs_the_key_that_was_enrolled(plan: Plan, site: str) -> None:
    with pytest.raises(UsageError, match=r"The roster of test, epoch 1, does not hold site .* with the key at hand"):
        Membership(site=site, identity=IDENTITIES["site-00"], roster=ROSTER, plan=plan, ring=RING)


def test_a_roster_whose_key_for_the_site_was_exchanged_is_refused_at_the_start(plan: Plan) -> None:
    sites = dict(ROSTER.sites) | {"site-00": Identity(bytes([8] * 32)).public}

    with pytest.raises(UsageError, match="with the key at hand"):
        member(plan, roster=roster(sites=sites))


def test_no_key_shows_in_what_is_printed(plan: Plan) -> None:
    shown = repr(member(plan))

    assert IDENTITIES["site-00"].seed().hex() not in shown
    assert repr(IDENTITIES["site-00"].seed()) not in shown
