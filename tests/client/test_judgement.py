"""Judgement: what a site's owner does not allow is refused, whoever asks, and the refusal leaves by its rule's name only."""

import dataclasses
import itertools
import math
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings, strategies

from confide.client.judgement import (
    Price,
    Refusal,
    judge_hours,
    judge_offer,
    judge_plan,
    judge_price,
    judge_release,
    require,
    starter_for,
)
from confide.client.policy import LABEL_HISTOGRAM, read_policy
from confide.common import plan as plans
from confide.common.accounting import planned_spend
from confide.common.calibration import noise_multiplier
from confide.common.errors import RULES, ConfideError, Refused, UsageError
from confide.common.filter import Filter, best_order
from confide.common.messages import Failure, open_envelope, seal
from confide.common.roster import Roster
from tests.policies import DIGEST, FEDERATION, HERE, NOON, PLAN, ROSTER, SITES, changed, key, offer, policy


def rules(refusals: tuple[Refusal, ...]) -> list[str]:
    return sorted({refusal.rule for refusal in refusals})


def only(refusals: tuple[Refusal, ...]) -> Refusal:
    (one,) = refusals
    return one


# What a plan may not go beyond: (rule, a value beyond, the limit as the sentence spells it, where the limit is).
BEYOND: dict[str, tuple[str, Any, str, str]] = {
    "model__base_digest": ("base-model", "sha256:" + "0" * 64, DIGEST, "[model] base_digests"),
    "model__max_tokens": ("base-model", 129, "128", "[model] most_tokens"),
    "model__quantization": ("base-model", "nf4", "none", "[model] quantizations"),
    "adapter__method": ("targets", "share-a", "ffa", "[model] methods"),
    "adapter__rank": ("targets", 9, "8", "[model] largest_rank"),
    "adapter__alpha": ("plan-privacy", 16.1, "2.0", "[training] largest_scale"),
    "adapter__targets": ("targets", ("query", "output.dense"), "query, value", "[model] targets"),
    "task__kind": ("task", "masked-lm", "text-classification", "[model] tasks"),
    "data__person_id": ("plan-privacy", None, "whole persons", "[privacy] whole_persons"),
    "privacy__epsilon": ("plan-privacy", 8.1, "8.0", "[budget] plan_epsilon"),
    "privacy__delta": ("plan-privacy", 2e-5, "1e-05", "[budget] plan_delta"),
    "privacy__sampling_rate": ("plan-privacy", 0.11, "0.1", "[privacy] largest_sampling_rate"),
    "privacy__clip_norm": ("plan-privacy", 1.1, "1.0", "[privacy] largest_clip_norm"),
    "privacy__steps_per_round": ("rounds", 5, "4", "[privacy] most_steps_per_round"),
    "privacy__rounds": ("rounds", 11, "10", "[privacy] most_rounds"),
    "privacy__min_persons": ("plan-privacy", 999, "1000", "[privacy] fewest_persons"),
    "training__learning_rate": ("plan-privacy", 0.02, "0.01", "[training] largest_learning_rate"),
    "training__head_learning_rate": ("plan-privacy", 0.02, "0.01", "[training] largest_learning_rate"),
    "federation__min_sites": ("cohort", 2, "3", "[federation] fewest_summed"),
    "federation__server_learning_rate": ("plan-privacy", 1.5, "1.0", "[training] largest_server_learning_rate"),
    "federation__update_bound": ("plan-privacy", 1.0, "0.0", "[training] largest_update_bound"),
    "federation__key_agreement": ("federation", "x25519+ml-kem-768", "x25519", "[federation] key_agreements"),
    "federation__graph": ("graph", "semi_honest_graph", "nothing", "[federation] words"),
    "compute__device": ("compute", "cuda", "cpu", "[compute] devices"),
    "compute__memory_mb": ("compute", 6145, "14336", "[compute] memory_mb"),
    "compute__cache_mb": ("compute", 12_289, "14336", "[compute] memory_mb"),
}
# What a plan may choose as it likes: it changes neither guarantee nor partners, or only how fast a site goes.
FREE: dict[str, Any] = {
    "model__base": "another name",
    "model__pooling": "mean",
    "adapter__top_layers": 1,
    "adapter__head_start": "seeded",
    "adapter__seed": 7,
    "task__labels": ("a", "b", "c"),
    "task__score": "accuracy",
    "task__center": 1.0,
    "task__scale": 2.0,
    "task__mask_rate": 0.2,
    "data__label": "other",
    "data__answer": "other",
    "data__system": "other",
    "data__image": "other",
    "data__text": "other",
    "data__text_pair": "other",
    "data__template": "{other}",
    "data__max_rows_per_person": 1000,
    "data__on_missing": "skip",
    "data__on_unknown_label": "skip",
    "data__on_empty_text": "skip",
    "training__optimizer": "sgd",
    "training__proximal": 1.0,
    "federation__max_sites": 32,
    "federation__server_optimizer": "fedadam",
    "federation__server_momentum": 0.5,
    "federation__ring_bits": 16,
    "compute__threads": 2,
    "compute__micro_batch": 8,
    "compute__precision": "bfloat16",
    "compute__gradient_checkpointing": True,
    "compute__cache_prefix": False,
}


def test_the_narrowest_policy_for_a_plan_allows_exactly_that_plan() -> None:
    assert judge_plan(policy(), PLAN, **HERE) == ()


@pytest.mark.parametrize("setting", BEYOND)
def test_a_plan_beyond_a_limit_in_any_one_setting_is_refused_with_rule_value_and_limit(setting: str) -> None:
    rule, value, limit, place = BEYOND[setting]

    found = judge_plan(policy(), changed(PLAN, **{setting: value}), **HERE | {"person_id": None})

    told = [refusal.sentence for refusal in found if refusal.rule == rule and place in refusal.sentence]
    shown = value[-1] if isinstance(value, tuple) else str(value)
    assert len(told) == 1
    assert limit in told[0]
    assert any(word in told[0] for word in (shown, "14337", "2.0125", "person_id"))
    assert "policy" in told[0] or "Ask for" in told[0]


@pytest.mark.parametrize("setting", FREE)
def test_what_is_limited_by_nothing_changes_no_judgement(setting: str) -> None:
    assert judge_plan(policy(), changed(PLAN, **{setting: FREE[setting]}), **HERE) == ()


def test_every_setting_of_a_plan_is_limited_or_known_to_be_free() -> None:
    keys = {f"{section}__{name}" for section, name, *_ in plans.reference()}

    assert keys == BEYOND.keys() | FREE.keys()
    assert not BEYOND.keys() & FREE.keys()


def test_all_refusals_are_told_at_once() -> None:
    beyond = changed(
        PLAN, **{setting: value for setting, (_, value, _, _) in BEYOND.items()} | {"adapter__alpha": 99.0}
    )

    found = judge_plan(policy(), beyond, **HERE | {"person_id": None})

    assert {place for _, _, _, place in BEYOND.values()} <= {
        place for refusal in found for _, _, _, place in BEYOND.values() if place in refusal.sentence
    }
    assert rules(found) == sorted({rule for rule, *_ in BEYOND.values()})


NUMBERS = {
    setting: value
    for setting, (_, value, _, _) in BEYOND.items()
    if isinstance(value, int | float) and not setting.startswith(("compute", "privacy", "federation__update"))
}


@given(strategies.sampled_from(sorted(NUMBERS)), strategies.floats(0.01, 100, allow_nan=False))
def test_a_number_is_refused_if_and_only_if_it_is_beyond_its_limit(setting: str, factor: float) -> None:
    section, _, name = setting.partition("__")
    now = getattr(getattr(PLAN, section), name)
    value: float = max(1, round(now * factor)) if isinstance(now, int) else now * factor
    # The head's rate is the larger of the two that one limit holds for.
    most = 0.01 if "learning_rate" in name and section == "training" else now
    more = {"adapter__alpha": 2.0 * value} if setting == "adapter__rank" else {}  # so that alpha / rank stays as it is
    fine = value >= 3 if setting == "federation__min_sites" else value <= most

    found = judge_plan(policy(), changed(PLAN, **{setting: value}, **more), **HERE | {"sites_on_roster": 1000})

    assert (not any(refusal.rule != "graph" for refusal in found)) == fine


@pytest.mark.parametrize("setting", [setting for setting in BEYOND if isinstance(BEYOND[setting][1], float)])
def test_what_is_not_a_number_is_beyond_every_limit(setting: str) -> None:
    assert BEYOND[setting][0] in rules(judge_plan(policy(), changed(PLAN, **{setting: math.nan}), **HERE))


def test_a_refusal_leaves_with_its_rules_name_and_nothing_else() -> None:
    for setting, (_, value, _, _) in BEYOND.items():
        found = judge_plan(policy(), changed(PLAN, **{setting: value}), **HERE)

        with pytest.raises(Refused) as refused:
            require(found)

        failure = Failure.of(refused.value)
        assert failure.sentence == f"The site refused. It follows its rule on: {found[0].rule}."
        assert open_envelope(seal(failure)) == failure
        assert all(refusal.sentence in str(refused.value) for refusal in found)


def test_nothing_refused_is_required_of_nobody_and_a_rule_must_be_known() -> None:
    require(())

    with pytest.raises(ValueError, match="no rule's name"):
        Refusal(rule="weather", sentence="It rains.")


def test_another_model_under_the_same_name_is_refused() -> None:
    other = "sha256:" + "a" * 64

    of_site = only(judge_plan(policy(), PLAN, **HERE | {"base_digest": other}))
    nothing = only(judge_plan(policy(), PLAN, **HERE | {"base_digest": ""}))

    assert of_site.rule == nothing.rule == "base-model"
    assert DIGEST in of_site.sentence
    assert other in of_site.sentence
    assert "have none" in nothing.sentence


def test_a_plan_with_less_noise_than_allowed_is_refused_though_every_number_it_names_is_allowed() -> None:
    noise = noise_multiplier(PLAN.privacy)
    more = policy(privacy__smallest_noise_multiplier=noise + 0.0001)

    found = only(judge_plan(more, PLAN, **HERE))

    assert found.rule == "noise"
    assert f"{noise:g}" in found.sentence
    assert f"{noise + 0.0001:g}" in found.sentence


def test_noise_follows_from_the_plan_so_fewer_steps_or_a_larger_epsilon_are_seen_as_less_noise() -> None:
    wide = policy(budget__plan_epsilon=20.0, budget__epsilon=60.0)

    for less in (changed(PLAN, privacy__rounds=2), changed(PLAN, privacy__epsilon=20.0)):
        assert rules(judge_plan(wide, less, **HERE)) == ["noise"]


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    hard = changed(PLAN, privacy__epsilon=1e-6)

    assert only(judge_plan(policy(), hard, **HERE)).rule == "noise"


def test_a_million_steps_are_refused_before_their_cost_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confide.client.judgement.noise_multiplier", lambda _: pytest.fail("it was computed"))
    enormous = changed(PLAN, privacy__rounds=100_000, privacy__steps_per_round=10)

    assert rules(judge_plan(policy(), enormous, **HERE)) == ["rounds"]


def test_a_plan_that_costs_more_than_the_lifetime_budget_is_refused_though_its_epsilon_is_within() -> None:
    tight = policy(budget__epsilon=8.0)

    found = only(judge_plan(tight, PLAN, **HERE))

    assert found.rule == "budget"
    assert "asks for epsilon = 8 " in found.sentence
    assert "[budget] epsilon is 8," in found.sentence


@pytest.mark.parametrize(
    ("here", "rule", "told"),
    [
        ({"federation": "heart-2031"}, "federation", ("'heart-2031'", FEDERATION)),
        ({"sites_on_roster": 1}, "cohort", ("has 1 sites", "at least 3")),
        ({"sites_on_roster": 2}, "cohort", ("has 2 sites", "at least 3")),
        ({"sites_on_roster": 65}, "graph", ("has 65 sites", "at most 64", "semi_honest_graph")),
        ({"declared_persons": 999}, "data", ("999", "1000")),
        ({"declared_persons": 100_000}, "plan-privacy", ("100000", "1e-05", "below 1")),
        ({"person_id": ""}, "data", ("by the column 'patient'", "registered row by row", "with no person_id")),
        (
            {"person_id": "visit"},
            "data",
            ("'patient'", "'visit'", "with that person_id", "confide site data add NAME TABLE --person-id patient"),
        ),
    ],
)
def test_a_plan_is_refused_where_federation_roster_or_persons_do_not_fit(
    here: dict[str, Any], rule: str, told: tuple[str, ...]
) -> None:
    found = [refusal for refusal in judge_plan(policy(), PLAN, **HERE | here) if refusal.rule == rule]

    assert len(found) == 1
    assert all(words in found[0].sentence for words in told)


def test_the_lifetime_delta_too_must_be_below_one_over_the_persons() -> None:
    loose = policy(budget__delta=9e-4)

    found = only(judge_plan(loose, PLAN, **HERE))

    assert found.rule == "budget"
    assert "0.0009 times 2000" in found.sentence


def test_a_large_roster_needs_the_word_in_plan_and_policy() -> None:
    word, large = changed(PLAN, federation__graph="semi_honest_graph"), HERE | {"sites_on_roster": 100}
    allows = policy(federation__words=["semi_honest_graph"])

    assert judge_plan(allows, word, **large) == ()
    assert rules(judge_plan(policy(), word, **large)) == ["graph"]
    assert rules(judge_plan(allows, PLAN, **large)) == ["graph"]


def test_an_offer_within_all_limits_is_taken() -> None:
    assert judge_offer(policy(), PLAN, offer(), ROSTER, NOON) == ()
    assert judge_offer(policy(), PLAN, offer(round=10, cohort=("St. Anna", "east", "north")), ROSTER, NOON) == ()


@pytest.mark.parametrize(
    ("changes", "rule", "told"),
    [
        ({"round": 11}, "rounds", ("Round 11", "1 to 10")),
        ({"round": 0}, "rounds", ("Round 0", "1 to 10")),
        ({"plan": DIGEST}, "approval", (DIGEST, PLAN.digest)),
        ({"roster": DIGEST}, "federation", (DIGEST, ROSTER.digest)),
        ({"cohort": ("St. Anna",)}, "cohort", ("1 sites", "at least 3")),
        ({"cohort": ("St. Anna", "east")}, "cohort", ("2 sites", "at least 3")),
        ({"cohort": ()}, "cohort", ("0 sites", "at least 3")),
    ],
)
def test_an_offer_beyond_a_limit_is_refused(changes: dict[str, Any], rule: str, told: tuple[str, ...]) -> None:
    found = only(judge_offer(policy(), PLAN, offer(**changes), ROSTER, NOON))

    assert found.rule == rule
    assert all(words in found.sentence for words in told)


@pytest.mark.parametrize(
    "cohort",
    [
        ("St. Anna",) * 5,  # one real site, five times
        ("St. Anna", "ghost-1", "ghost-2", "ghost-3"),  # one real site among names that nobody enrolled
        ("St. Anna", "St. anna", "st. anna", "ST. ANNA"),
        ("St. Anna", "east", "east", "ghost"),
    ],
)
def test_a_cohort_of_one_real_site_is_refused_however_it_is_dressed_up(cohort: tuple[str, ...]) -> None:
    found = judge_offer(policy(), PLAN, offer(cohort=cohort), ROSTER, NOON)

    assert rules(found) == ["cohort"]
    assert any("at least 3" in refusal.sentence for refusal in found)


def test_even_a_full_cohort_with_a_name_beyond_the_roster_or_twice_is_refused() -> None:
    for more in ("ghost", "east"):
        assert rules(judge_offer(policy(), PLAN, offer(cohort=(*SITES, more)), ROSTER, NOON)) == ["cohort"]


def test_known_sites_are_met_by_key_and_neither_by_name_nor_by_oneself() -> None:
    known = [f"north {key(3).hex()}", f"South Clinic {key(4).hex()}", f"Anna by another name {key(2).hex()}"]
    two, three = (
        policy(federation__known_sites=known, federation__fewest_known=2),
        policy(federation__known_sites=known, federation__fewest_known=3),
    )
    sybils = Roster(
        federation=FEDERATION,
        epoch=1,
        coordinator=key(1),
        sites={"St. Anna": key(2), "north": key(13), "south": key(14), "east": key(5)},
    )

    assert judge_offer(two, PLAN, offer(), ROSTER, NOON) == ()
    assert "asks 2 of the sites" in only(judge_offer(three, PLAN, offer(), ROSTER, NOON)).sentence
    told = only(judge_offer(two, PLAN, offer(cohort=tuple(sybils.sites), roster=sybils.digest), sybils, NOON)).sentence
    assert "asks 0 of the sites" in told
    assert "asks for 2" in told


def test_an_offer_from_a_roster_that_is_too_large_or_of_another_federation_is_refused() -> None:
    sites = {f"site-{number}": key(number + 10) for number in range(65)}
    large = Roster(federation=FEDERATION, epoch=1, coordinator=key(1), sites=sites)
    foreign = Roster(federation="heart-2031", epoch=1, coordinator=key(1), sites=SITES)

    graph = judge_offer(policy(), PLAN, offer(cohort=tuple(sites), roster=large.digest), large, NOON)
    other = judge_offer(policy(), PLAN, offer(roster=foreign.digest), foreign, NOON)

    assert only(graph).rule == "graph"
    assert only(other).rule == "federation"


def at(local: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(local).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("window", "open_at", "closed_at"),
    [
        ("mon-fri 09:00-17:00", ["2026-11-23T09:00", "2026-11-27T16:59"], ["2026-11-23T08:59", "2026-11-23T17:00"]),
        ("mon 22:00-06:00", ["2026-11-23T22:00", "2026-11-24T05:59"], ["2026-11-23T05:00", "2026-11-24T06:00"]),
        ("sun 22:00-06:00", ["2026-11-29T23:00", "2026-11-30T00:00"], ["2026-11-30T22:00", "2026-11-29T06:00"]),
        ("sat,sun 00:00-24:00", ["2026-11-28T00:00", "2026-11-29T23:59"], ["2026-11-27T23:59", "2026-11-30T00:00"]),
        ("sat-mon 12:00-13:00", ["2026-11-28T12:00", "2026-11-30T12:30"], ["2026-12-01T12:30", "2026-11-27T12:30"]),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Europe/Vienna", "America/Los_Angeles", "Asia/Kolkata"])
def test_exchanges_begin_in_the_hours_that_are_allowed_and_in_no_others(
    window: str, open_at: list[str], closed_at: list[str], zone: str
) -> None:
    hours = policy(hours__windows=[window], hours__time_zone=zone)

    assert all(judge_hours(hours, at(moment, zone)) == () for moment in open_at)
    for moment in closed_at:
        found = only(judge_offer(hours, PLAN, offer(), ROSTER, at(moment, zone)))
        assert found.rule == "hours"
        assert window in found.sentence
        assert f"{moment[-5:]} in {zone}" in found.sentence


def test_hours_follow_summer_time() -> None:
    evening = policy(hours__windows=["mon-sun 20:00-21:00"], hours__time_zone="Europe/Vienna")

    assert judge_hours(evening, at("2026-07-01T18:30")) == ()
    assert judge_hours(evening, at("2026-12-01T18:30")) != ()
    assert judge_hours(evening, at("2026-12-01T19:30")) == ()


def test_a_statistic_leaves_only_if_it_is_named_and_with_enough_noise() -> None:
    allows = policy(metrics__leave=[LABEL_HISTOGRAM], metrics__smallest_noise_multiplier=10.0).metrics

    assert judge_release(allows, LABEL_HISTOGRAM, 10.0) == ()
    assert rules(judge_release(policy().metrics, LABEL_HISTOGRAM, 10.0)) == ["data"]
    assert rules(judge_release(allows, "loss", 9.0)) == ["data", "noise"]
    for noise in (9.99, 0.0, -1.0, math.nan, 10_001.0, math.inf):
        found = only(judge_release(allows, LABEL_HISTOGRAM, noise))
        assert found.rule == "noise"
        assert f"{noise:g}; [metrics] smallest_noise_multiplier is 10" in found.sentence


def test_a_budget_is_charged_more_than_the_plan_asks_for() -> None:
    gate = Filter(epsilon=30.0, delta=1e-5, order=best_order(PLAN.privacy))

    price = Price.of(PLAN.privacy, {"1": gate})

    assert price.asked == 8.0
    assert 7.9 < price.declared <= 8.0
    assert 9 < price.adaptive < 12
    assert price.accounts[0].after == pytest.approx(price.adaptive, rel=1e-6)
    assert price.accounts[0].left == pytest.approx(30 - price.adaptive, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    strategies.floats(3.0, 60.0),
    strategies.integers(0, 30),
    strategies.sampled_from([8, 12, 20, 64]),
    strategies.integers(1, 12),
)
def test_so_many_plans_fit_as_the_filter_lets_through_and_never_one_more(
    budget: float, before: int, order: int, rounds: int
) -> None:
    one = planned_spend(PLAN.privacy)
    gate = Filter(epsilon=budget, delta=1e-5, order=order).after([one] * before)

    price = Price.of(PLAN.privacy, {"1": gate}, rounds)

    fits = price.fits
    admitted = gate
    for _ in range(fits * rounds):
        admitted = admitted.with_spend(one)
    beyond = admitted.after([one] * rounds)
    assert beyond.left < 1e-6
    assert (judge_price(price) == ()) == (fits >= 1)
    if fits:
        assert price.accounts[0].after >= gate.after([one] * rounds).used


def test_each_account_without_room_is_refused_by_name() -> None:
    one = planned_spend(PLAN.privacy, PLAN.privacy.rounds)
    roomy, full = Filter(epsilon=40.0, delta=1e-5, order=3), Filter(epsilon=11.0, delta=1e-5, order=3).after([one])

    price = Price.of(PLAN.privacy, {"1": roomy, "2": full})
    found = only(judge_price(price))

    assert price.fits == 0
    assert found.rule == "budget"
    assert "account 2" in found.sentence
    assert "its budget is 11" in found.sentence
    assert Price.of(PLAN.privacy, {}).fits == 0


def test_a_starter_for_a_plan_with_all_that_must_be_allowed_by_a_word_allows_it() -> None:
    special = changed(
        PLAN,
        federation__graph="semi_honest_graph",
        federation__update_bound=3.5,
        data__person_id=None,
        compute__cache_prefix=False,
    )
    narrow = read_policy(starter_for(special, "north", [FEDERATION]).encode())

    assert judge_plan(narrow, special, **HERE | {"person_id": ""}) == ()
    assert narrow.training.largest_update_bound == 3.5
    assert narrow.compute.memory_mb > special.compute.memory_mb  # for the base model, whose size no plan tells
    assert rules(judge_plan(narrow, changed(special, federation__update_bound=3.6), **HERE | {"person_id": ""})) == [
        "plan-privacy"
    ]


def test_a_policy_cannot_be_changed_by_a_plan_or_message() -> None:
    found = policy()
    before = found.canonical()
    hostile = [changed(PLAN, **{setting: value}) for setting, (_, value, _, _) in BEYOND.items()]
    offers = [offer(round=number, cohort=cohort) for number, cohort in itertools.product((0, 1, 99), (("x",), ()))]

    for plan in hostile:
        judge_plan(found, plan, **HERE)
    for message in offers:
        judge_offer(found, PLAN, message, ROSTER, NOON)

    assert found.canonical() == before
    for holder in (found, found.budget, found.privacy, found.federation, found.model, found.hours):
        for field in dataclasses.fields(holder):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(holder, field.name, None)
    with pytest.raises(UsageError):
        read_policy(seal(offer()).body)


def test_every_rule_that_a_policy_follows_has_a_refusal_that_names_it() -> None:
    by_plan = {rule for rule, *_ in BEYOND.values()} | {"data", "noise", "budget"}
    by_offer = {"hours", "approval"}

    # The ledger itself is judged by witnesses and by those who read it.
    assert by_plan | by_offer == set(RULES) - {"ledger"}


def test_a_refusal_is_an_error_of_this_program() -> None:
    with pytest.raises(ConfideError) as refused:
        require(judge_release(policy().metrics, "loss", 1.0))

    assert refused.value.exit_code == 9
