"""The keys of a simulated federation, and both ends of its sums."""

import dataclasses

import numpy as np
import pytest

from confide.client.membership import Membership
from confide.common.attempt import Attempt
from confide.common.crypto import verify
from confide.common.errors import MessageError, Refused, UsageError
from confide.common.graph import SEMI_HONEST
from confide.common.messages import Offer
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.server.summation import SecureSummation, Task
from confide.simulations.enrolment import Enrolment, Sums
from confide.simulations.insecure import InsecurePlainSum
from confide.simulations.setting import SUMMATIONS

RING = RingLayout(length=4, update_bound=1.0, max_sites=16)
SITES = ("a", "b", "c", "d")


def task(plan: Plan, sites: tuple[str, ...] = SITES, ring: RingLayout = RING) -> Task:
    return Task(
        run="demo",
        plan=plan,
        round=1,
        attempt=1,
        cohort=sites,
        layout="sha256:2",
        ring=ring,
        adapter=np.zeros(4, np.float32),
        parent="sha256:parent",
        training_s=1.0,
        answer_s=1.0,
    )


def offered(summation: SecureSummation, given: Task) -> Offer:
    """Return the offer as the server signs it."""
    attempt = Attempt.of(given.offer(summation.roster.digest), summation.roster, given.ring, given.plan.federation)
    return dataclasses.replace(attempt.offer, signature=summation.coordinator.sign(attempt.offered))


def test_the_roster_holds_the_public_half_of_every_key() -> None:
    enrolment = Enrolment.of(SITES)

    assert enrolment.roster.coordinator == enrolment.coordinator.public
    assert dict(enrolment.roster.sites) == {site: key.public for site, key in enrolment.identities.items()}
    assert tuple(enrolment.identities) == SITES
    for site, identity in enrolment.identities.items():
        verify(enrolment.roster.sites[site], b"message", identity.sign(b"message"))


def test_every_enrolment_has_keys_of_its_own() -> None:
    one, other = (Enrolment.of(SITES) for _ in range(2))

    keys = [key.seed() for made in (one, other) for key in (made.coordinator, *made.identities.values())]

    assert len(set(keys)) == len(keys) == 10
    assert one.roster.digest != other.roster.digest


def test_no_key_shows_in_what_is_printed(plan: Plan) -> None:
    enrolment = Enrolment.of(SITES)

    shown = repr(enrolment) + repr(enrolment.member("a", plan, RING))

    for key in (enrolment.coordinator, *enrolment.identities.values()):
        assert key.seed().hex() not in shown
        assert repr(key.seed()) not in shown


def test_a_site_that_cannot_be_on_a_roster_cannot_be_enrolled() -> None:
    with pytest.raises(UsageError, match="a site's name is not"):
        Enrolment.of(["a", "b", "../c"])


def test_a_member_attends_what_its_coordinator_signed_and_nothing_else(plan: Plan) -> None:
    sums, others = (Sums.of("real", plan, RING, SITES) for _ in range(2))
    assert isinstance(sums.summation, SecureSummation)
    assert isinstance(others.summation, SecureSummation)
    offer = offered(sums.summation, task(plan))

    sums.protections["a"].attend(offer)

    with pytest.raises(MessageError, match="another roster"):
        sums.protections["a"].attend(offered(others.summation, task(plan)))
    with pytest.raises(MessageError, match="signature"):
        sums.protections["a"].attend(dataclasses.replace(offer, attempt=2))
    with pytest.raises(MessageError, match="signature"):
        sums.protections["a"].attend(task(plan).offer(sums.summation.roster.digest))
    with pytest.raises(MessageError):
        sums.protections["a"].attend(task(plan).offer("insecure_plain_sum"))


def test_real_means_a_member_for_each_site_and_one_roster_for_all(plan: Plan) -> None:
    sums = Sums.of("real", plan, RING, SITES)

    assert isinstance(sums.summation, SecureSummation)
    assert tuple(sums.protections) == SITES
    for site, member in sums.protections.items():
        assert isinstance(member, Membership)
        assert (member.site, member.roster, member.plan, member.ring) == (site, sums.summation.roster, plan, RING)
        assert member.retries
    assert set(sums.summation.roster.sites) == set(SITES)


def test_insecure_plain_sum_means_no_keys_and_no_second_attempt(plan: Plan) -> None:
    sums = Sums.of("insecure_plain_sum", plan, RING, SITES)

    assert isinstance(sums.summation, InsecurePlainSum)
    assert tuple(sums.protections) == SITES
    assert not any(protection.retries for protection in sums.protections.values())


@pytest.mark.parametrize("name", ["", "plain", "Real", "secure_aggregation"])
def test_there_is_no_sum_but_those_that_are_named(plan: Plan, name: str) -> None:
    with pytest.raises(UsageError, match=f"no summation '{name}'. Known are real, insecure_plain_sum"):
        Sums.of(name, plan, RING, SITES)


def test_every_sum_that_a_setting_names_can_be_made(plan: Plan) -> None:
    for name in SUMMATIONS:
        assert set(Sums.of(name, plan, RING, SITES).protections) == set(SITES)


def test_in_a_simulation_a_site_allows_the_sparse_graph_where_the_plan_does(plan: Plan) -> None:
    names = tuple(f"site-{number:02}" for number in range(66))
    ring = dataclasses.replace(RING, max_sites=66)
    complete = dataclasses.replace(plan, federation=dataclasses.replace(plan.federation, max_sites=66))
    sparse = dataclasses.replace(plan, federation=dataclasses.replace(complete.federation, graph=SEMI_HONEST))
    enrolment = Enrolment.of(names)
    server = SecureSummation(enrolment.roster, enrolment.coordinator)

    enrolment.member(names[0], sparse, ring).attend(offered(server, task(sparse, names, ring)))

    with pytest.raises(Refused, match="Plan and site must both allow it"):
        enrolment.member(names[0], complete, ring).attend(offered(server, task(complete, names, ring)))
