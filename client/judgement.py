"""Judgement: what follows from a policy for a plan, an offer, a price and a statistic, and from nothing else.

Each is a pure function that returns every refusal. A refusal tells rule, value and limit to the person at this machine;
outside only the rule's name is told. The one exception to purity is `enforced`, by which the policy on disk comes into
force: from then on the ledger judges by it too.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Self

from confide.client.home import Home, read_private
from confide.client.journal import Journal
from confide.client.policy import LARGEST_POLICY_BYTES, Metrics, Policy, read_policy, spelled_key, starter
from confide.client.terminal import spent
from confide.common import plan as plans
from confide.common.accounting import planned_cost, planned_spend
from confide.common.calibration import noise_multiplier
from confide.common.errors import RULES, PrivacyError, Refused, UsageError
from confide.common.filter import MOST_EPSILON, Filter, best_order, order_for
from confide.common.graph import COMPLETE_UP_TO, SEMI_HONEST
from confide.common.messages import Offer
from confide.common.plan import Plan
from confide.common.roster import Roster
from confide.common.settings import toml_value
from confide.common.wording import command

_ROUNDING = 1e-9  # relative; more than what adding up a hundred thousand rounds one by one can come to
_MOST_NOISE = 10_000  # of a statistic; the largest number that the policy can ask for
_LIBRARIES_MB = 4096  # for libraries and a base model of usual size, beside what a plan says


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One reason why not.

    Attributes:
        rule: Its name, one of `common.errors.RULES`; all that may be told outside.
        sentence: Value, limit and remedy, for the person at this machine.
    """

    rule: str
    sentence: str

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"{self.rule!r} is no rule's name; see RULES.")


def require(refusals: Iterable[Refusal]) -> None:
    """Return if there is no refusal.

    Raises:
        Refused: There are some; all their sentences are in the message, and the first one's rule is told outside.
    """
    found = tuple(refusals)
    if found:
        raise Refused("\n".join(refusal.sentence for refusal in found), found[0].rule)


def judge_plan(
    policy: Policy,
    plan: Plan,
    *,
    base_digest: str,
    federation: str,
    sites_on_roster: int,
    declared_persons: int,
    person_id: str | None = None,
) -> tuple[Refusal, ...]:
    """Return every reason why this plan must not run here; none if it may be approved.

    Noise and cost are judged only of a plan whose rounds, steps and other numbers are allowed: they follow from these,
    and of a million steps they take seconds.

    Args:
        policy: The site's.
        plan: The plan.
        base_digest: The digest of the base model's files on this site's disk.
        federation: The name of the federation whose coordinator signed the plan.
        sites_on_roster: How many sites that federation's pinned roster has, this one included.
        declared_persons: N, the number of persons that the site declares for the data set.
        person_id: The column by which the data set was registered, "" if by none; None if it is judged elsewhere.
    """
    numbers = tuple(_numbers(policy, plan))
    found = [
        *numbers,
        *_choices(policy, plan),
        *_base(plan, base_digest),
        *_partners(policy, plan, federation, sites_on_roster),
        *_persons(policy, plan, declared_persons, person_id),
    ]
    if not any(refusal.rule in {"plan-privacy", "rounds"} for refusal in numbers):
        found += _noise_and_cost(policy, plan)
    return tuple(found)


def judge_offer(policy: Policy, plan: Plan, offer: Offer, roster: Roster, now: float) -> tuple[Refusal, ...]:
    """Return every reason why this site must not take part in the round it is offered.

    Args:
        policy: The site's.
        plan: The plan that was approved.
        offer: The offer.
        roster: The federation's pinned roster; who counts as a site is looked up there, not in the offer.
        now: Seconds since 1970 UTC.
    """
    return (*judge_hours(policy, now), *_terms(policy, plan, offer, roster), *_cohort(policy, plan, offer, roster))


def judge_hours(policy: Policy, now: float) -> tuple[Refusal, ...]:
    """Return a refusal if no exchange may begin at `now`, in seconds since 1970 UTC."""
    hours = policy.hours
    if hours.allow(now):
        return ()
    sentence = f"It is {hours.shown(now)}; [hours] windows allow {_several(hours.windows)}. Wait until then, or change the policy."
    return (Refusal(rule="hours", sentence=sentence),)


def judge_release(metrics: Metrics, what: str, noise: float) -> tuple[Refusal, ...]:
    """Return every reason why the statistic `what`, noised with this noise multiplier, must not leave under `[metrics]`."""
    found = []
    if what not in metrics.leave:
        found.append(
            Refusal(
                rule="data",
                sentence=f"{what!r} would leave; [metrics] leave allows {_several(metrics.leave)}. {_CHANGE}",
            )
        )
    if not metrics.smallest_noise_multiplier <= noise <= _MOST_NOISE:
        found.append(
            Refusal(
                rule="noise",
                sentence=f"{what!r} would leave with a noise multiplier of {noise:g}; [metrics] smallest_noise_multiplier is "
                f"{metrics.smallest_noise_multiplier:g}, and {_MOST_NOISE} is the most there is. Release it with noise between the two, "
                "or change the policy.",
            )
        )
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AccountPrice:
    """What a plan would take of one account.

    Attributes:
        account: Its name.
        epsilon: Its budget.
        delta: Its delta.
        used: How much its filter counts as used now.
        after: The same after the plan.
        left: What would be left of epsilon; negative if the plan does not fit.
        fits: How many such plans fit into what is left now.
    """

    account: str
    epsilon: float
    delta: float
    used: float
    after: float
    left: float
    fits: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a plan would cost, and what would be left.

    Attributes:
        rounds: How many rounds it is of.
        asked: The epsilon that the plan asks for.
        delta: The plan's delta.
        declared: What the rounds cost if they run as declared, or stop early.
        adaptive: What a filter of the plan's best order counts for them; that is what budgets are charged.
        accounts: What they would take of each account that the data set charges.
    """

    rounds: int
    asked: float
    delta: float
    declared: float
    adaptive: float
    accounts: tuple[AccountPrice, ...]

    @classmethod
    def of(cls, privacy: plans.Privacy, accounts: Mapping[str, Filter], rounds: int | None = None) -> Self:
        """Return the price of so many rounds of a plan, all of them by default.

        It is never below what the ledger will count, whatever the order in which rounds are added up.

        Args:
            privacy: The plan's.
            accounts: The filters of the accounts that the data set charges, by name, as they stand.
            rounds: How many rounds are still to come, from 1.
        """
        rounds = privacy.rounds if rounds is None else rounds
        cost = planned_cost(privacy, rounds)
        return cls(
            rounds=rounds,
            asked=privacy.epsilon,
            delta=privacy.delta,
            declared=cost.declared,
            adaptive=cost.adaptive,
            accounts=tuple(_priced(name, gate, privacy, rounds) for name, gate in accounts.items()),
        )

    @property
    def fits(self) -> int:
        """How many such plans fit into every account."""
        return min((account.fits for account in self.accounts), default=0)


def judge_price(price: Price) -> tuple[Refusal, ...]:
    """Return a refusal for each account that has no room for the plan."""
    return tuple(
        Refusal(
            rule="budget",
            sentence=f"The plan would bring account {account.account} to epsilon = {spent(account.after)}; its budget is "
            f"{account.epsilon:g} at delta = {account.delta:g}, of which {spent(account.used)} is used. Ask for fewer rounds or "
            "more noise.",
        )
        for account in price.accounts
        if account.fits < 1
    )


def starter_for(plan: Plan, site: str, federations: Iterable[str] = (), approvers: Iterable[str] = ()) -> str:
    """Return the narrowest policy that allows exactly this plan, at any hour; an owner reads it and edits it.

    Only memory has room to spare: the plan does not say how much the base model and the libraries take.

    Args:
        plan: The plan.
        site: The site's name.
        federations: The names of the federations that may ask for it; without one, none may.
        approvers: Who may approve it, each as name, space and key; without one, nobody may.

    Raises:
        UsageError: `site` is no site's name.
        PrivacyError: No noise reaches the plan's epsilon.
    """
    privacy, federation = plan.privacy, plan.federation
    given: dict[str, object] = {
        limit: attrgetter(of_plan)(plan) for _, of_plan, limit in _LIMITS if limit != "training.largest_learning_rate"
    }
    given |= {limit: _listed(attrgetter(of_plan)(plan)) for _, of_plan, limit in _LISTS}
    given |= {
        "budget.epsilon": _room_for(privacy),
        "budget.delta": privacy.delta,
        "privacy.smallest_noise_multiplier": noise_multiplier(privacy),
        "privacy.whole_persons": plan.data.person_id is not None,
        "training.largest_learning_rate": max(plan.training.learning_rate, plan.training.head_learning_rate),
        "training.largest_scale": plan.adapter.alpha / plan.adapter.rank,
        "federation.federations": tuple(federations),
        "federation.fewest_cohort": federation.min_sites,
        "federation.words": (SEMI_HONEST,) if federation.graph == SEMI_HONEST else (),
        "hours.windows": ("mon-sun 00:00-24:00",),
        "compute.memory_mb": _memory(plan) + _LIBRARIES_MB,
        "approval.approvers": tuple(approvers),
    }
    if federation.update_bound is not None:
        given["training.largest_update_bound"] = federation.update_bound
    return starter(site, given)


def enforced(home: Home, journal: Journal) -> Policy:
    """Return the policy as it is on disk, once the ledger says that it is in force.

    Raises:
        UsageError: It is missing or malformed, open to others, no plain file of this user's, or another site's; then nothing is
            allowed.
        LedgerError: The ledger cannot be written.
    """
    policy = policy_of(home)
    entry = policy.in_force()
    if journal.book.policy != entry:
        journal.append(entry)
    return policy


def policy_of(home: Home) -> Policy:
    """Return a site's policy as it is on disk; whether the ledger judges by it already is not asked.

    Raises:
        UsageError: It is missing or malformed, open to others, no plain file of this user's, or another site's; then nothing is
            allowed.
    """
    try:
        raw = read_private(home.policy, LARGEST_POLICY_BYTES)
    except UsageError as error:
        raise UsageError(f"{error} Without a policy, nothing is allowed.") from None
    policy = read_policy(raw, str(home.policy))
    if policy.site != home.site:
        raise UsageError(
            f"The policy {home.policy} is for the site {policy.site!r}, and this is {home.site!r}. Write this site's own."
        )
    return policy


# Rule, the plan's number, the policy's limit; limits that begin with "fewest" or "smallest" bound from below.
_LIMITS = (
    ("plan-privacy", "privacy.epsilon", "budget.plan_epsilon"),
    ("plan-privacy", "privacy.delta", "budget.plan_delta"),
    ("plan-privacy", "privacy.sampling_rate", "privacy.largest_sampling_rate"),
    ("plan-privacy", "privacy.clip_norm", "privacy.largest_clip_norm"),
    ("plan-privacy", "privacy.min_persons", "privacy.fewest_persons"),
    ("rounds", "privacy.rounds", "privacy.most_rounds"),
    ("rounds", "privacy.steps_per_round", "privacy.most_steps_per_round"),
    ("plan-privacy", "training.learning_rate", "training.largest_learning_rate"),
    ("plan-privacy", "training.head_learning_rate", "training.largest_learning_rate"),
    ("plan-privacy", "federation.server_learning_rate", "training.largest_server_learning_rate"),
    ("cohort", "federation.min_sites", "federation.fewest_summed"),
    ("base-model", "model.max_tokens", "model.most_tokens"),
    ("targets", "adapter.rank", "model.largest_rank"),
)
# Rule, the plan's choice or choices, the policy's list.
_LISTS = (
    ("base-model", "model.base_digest", "model.base_digests"),
    ("base-model", "model.quantization", "model.quantizations"),
    ("task", "task.kind", "model.tasks"),
    ("targets", "adapter.method", "model.methods"),
    ("targets", "adapter.targets", "model.targets"),
    ("federation", "federation.key_agreement", "federation.key_agreements"),
    ("compute", "compute.device", "compute.devices"),
)
_CHANGE = "Change the policy if you mean to allow it."
_OTHER = "Ask for a plan that keeps to it, or change the policy if you mean to allow more."


def _numbers(policy: Policy, plan: Plan) -> Iterator[Refusal]:
    for rule, of_plan, limit in _LIMITS:
        yield from _bounded(policy, rule, spelled_key(of_plan), attrgetter(of_plan)(plan), limit)
    bound = plan.federation.update_bound
    if bound is not None:
        yield from _bounded(policy, "plan-privacy", "[federation] update_bound", bound, "training.largest_update_bound")
    scale = plan.adapter.alpha / plan.adapter.rank
    yield from _bounded(policy, "plan-privacy", "[adapter] alpha / rank", scale, "training.largest_scale")
    yield from _bounded(policy, "compute", "[compute] memory and cache in MiB", _memory(plan), "compute.memory_mb")


def _bounded(policy: Policy, rule: str, what: str, value: float, limit: str) -> Iterator[Refusal]:
    """Yield a refusal if a number of the plan is beyond its limit; one that is not a number is beyond every limit."""
    allowed = attrgetter(limit)(policy)
    below = limit.rpartition(".")[2].startswith(("fewest", "smallest"))
    if not (value >= allowed if below else value <= allowed):
        yield Refusal(
            rule=rule,
            sentence=f"The plan has {what} = {value}; the policy's {spelled_key(limit)} allows {'no less' if below else 'no more'} than "
            f"{allowed}. {_OTHER}",
        )


def _choices(policy: Policy, plan: Plan) -> Iterator[Refusal]:
    for rule, of_plan, limit in _LISTS:
        allowed = attrgetter(limit)(policy)
        for value in _listed(attrgetter(of_plan)(plan)):
            if value not in allowed:
                yield Refusal(
                    rule=rule,
                    sentence=f"The plan has {spelled_key(of_plan)} {toml_value(value)}; the policy's {spelled_key(limit)} allows {_several(allowed)}. "
                    f"{_OTHER}",
                )


def _base(plan: Plan, digest: str) -> Iterator[Refusal]:
    if digest != plan.model.base_digest:
        yield Refusal(
            rule="base-model",
            sentence=f"The plan names the base model {plan.model.base} with the digest {plan.model.base_digest}; the files here "
            f"have {digest or 'none'}. Another model under the same name is another model: get the files that were meant.",
        )


def _partners(policy: Policy, plan: Plan, federation: str, sites: int) -> Iterator[Refusal]:
    terms = policy.federation
    if federation not in terms.federations:
        yield Refusal(
            rule="federation",
            sentence=f"The plan comes from the federation {federation!r}; [federation] federations allows "
            f"{_several(terms.federations)}. {_CHANGE}",
        )
    least = max(terms.fewest_cohort, plan.federation.min_sites)
    if not sites >= least:
        yield Refusal(
            rule="cohort",
            sentence=f"The federation's roster has {sites} sites; at least {least} are needed, by [federation] fewest_cohort and "
            "the plan's min_sites. Wait until more sites have joined.",
        )
    if plan.federation.graph == SEMI_HONEST and SEMI_HONEST not in terms.words:
        yield Refusal(
            rule="graph",
            sentence=f"The plan has [federation] graph = {toml_value(SEMI_HONEST)}; [federation] words allows "
            f'{_several(terms.words)}. Ask for a plan with graph = "complete". {_CHANGE}',
        )
    elif sites > COMPLETE_UP_TO and plan.federation.graph != SEMI_HONEST:
        yield Refusal(
            rule="graph",
            sentence=f"The federation's roster has {sites} sites; a complete graph joins at most {COMPLETE_UP_TO}. Plan and "
            f"policy must both allow {SEMI_HONEST} by that word.",
        )


def _persons(policy: Policy, plan: Plan, persons: int, person_id: str | None) -> Iterator[Refusal]:
    least = max(policy.privacy.fewest_persons, plan.privacy.min_persons)
    if not persons >= least:
        yield Refusal(
            rule="data",
            sentence=f"The data set declares {persons} persons; at least {least} are needed, by [privacy] fewest_persons and the "
            "plan's min_persons. Give more data, or ask for a plan that needs less.",
        )
    for rule, whose, delta in (
        ("plan-privacy", "The plan's delta", plan.privacy.delta),
        ("budget", "The policy's [budget] delta", policy.budget.delta),
    ):
        if not delta * persons < 1:
            yield Refusal(
                rule=rule,
                sentence=f"{whose} = {delta:g} times {persons} declared persons is {delta * persons:.3g}; it must be below 1. With "
                "more, publishing one person's rows outright would count as private. Lower delta.",
            )
    if plan.data.person_id is None and policy.privacy.whole_persons:
        yield Refusal(
            rule="plan-privacy",
            sentence="The plan names no [data] person_id, so it protects single rows; [privacy] whole_persons asks for whole "
            f"persons. Ask for a plan that names the column. {_CHANGE}",
        )
    if person_id is not None and (plan.data.person_id or "") != person_id:
        yield Refusal(
            rule="data",
            sentence=other_unit(plan, person_id),
        )


def other_unit(plan: Plan, person_id: str, data: str = "") -> str:
    """Say that a plan tells persons apart otherwise than they were registered, by the column `person_id`, or row by row."""
    asked, registered = (
        f"by the column {column!r}" if column else "row by row" for column in (plan.data.person_id, person_id)
    )
    column = ("--person-id", plan.data.person_id) if plan.data.person_id is not None else ()
    return (
        f"The plan tells persons apart {asked}; {repr(data) if data else 'the data set'} was registered {registered}, and its budget "
        f"follows that. Ask for a plan with {'that' if person_id else 'no'} person_id, or register the table as the plan has it: "
        f"{command('confide', 'site', 'data', 'add', data or 'NAME', 'TABLE', *column)}"
    )


def _noise_and_cost(policy: Policy, plan: Plan) -> Iterator[Refusal]:
    """Judge what follows from the plan's numbers; a plan cannot say otherwise, for nothing else is asked."""
    privacy, budget = plan.privacy, policy.budget
    try:
        noise = noise_multiplier(privacy)
    except PrivacyError as error:
        yield Refusal(rule="noise", sentence=str(error))
        return
    least = policy.privacy.smallest_noise_multiplier
    if not noise >= least:
        yield Refusal(
            rule="noise",
            sentence=f"The plan's noise multiplier is {noise:g}; [privacy] smallest_noise_multiplier allows no less than "
            f"{least:g}. Ask for a smaller epsilon, or for more steps or persons a step. {_CHANGE}",
        )
    whole = planned_spend(privacy, privacy.rounds)
    gate = Filter(epsilon=budget.epsilon, delta=budget.delta, order=order_for(budget.epsilon, budget.delta, whole))
    price = _priced("", gate, privacy, privacy.rounds)
    if price.fits < 1:
        yield Refusal(
            rule="budget",
            sentence=f"The plan asks for epsilon = {privacy.epsilon:g} and costs {spent(price.after)} as a budget is counted, "
            f"at delta = {budget.delta:g}; [budget] epsilon is {budget.epsilon:g}, for the whole life of a data set. Ask for "
            f"fewer rounds or more noise. {_CHANGE}",
        )


def _terms(policy: Policy, plan: Plan, offer: Offer, roster: Roster) -> Iterator[Refusal]:
    """Judge whose round it is, of which plan, and which one."""
    if offer.plan != plan.digest:
        yield Refusal(
            rule="approval",
            sentence=f"The round is offered under the plan {offer.plan}; approved is {plan.digest}. Have the other approved first.",
        )
    if offer.roster != roster.digest:
        yield Refusal(
            rule="federation",
            sentence=f"The round is offered to the roster {offer.roster}; pinned is {roster.digest}, epoch {roster.epoch}. "
            "Ask for the current roster.",
        )
    if roster.federation not in policy.federation.federations:
        yield Refusal(
            rule="federation",
            sentence=f"The round comes from the federation {roster.federation!r}; [federation] federations allows "
            f"{_several(policy.federation.federations)}. {_CHANGE}",
        )
    most = min(plan.privacy.rounds, policy.privacy.most_rounds)
    if not 1 <= offer.round <= most:
        yield Refusal(
            rule="rounds",
            sentence=f"Round {offer.round} is offered; plan and [privacy] most_rounds allow 1 to {most}. Nothing is owed beyond.",
        )
    if len(roster.sites) > COMPLETE_UP_TO and not (
        plan.federation.graph == SEMI_HONEST and SEMI_HONEST in policy.federation.words
    ):
        yield Refusal(
            rule="graph",
            sentence=f"The roster has {len(roster.sites)} sites; a complete graph joins at most {COMPLETE_UP_TO}. Plan and "
            f"[federation] words must both allow {SEMI_HONEST}.",
        )


def _cohort(policy: Policy, plan: Plan, offer: Offer, roster: Roster) -> Iterator[Refusal]:
    """Judge who is asked: only names that the pinned roster holds count, each once."""
    asked, terms = set(offer.cohort), policy.federation
    enrolled = asked & roster.sites.keys()
    if asked != enrolled or len(asked) < len(offer.cohort):
        strangers = sorted(asked - enrolled)
        yield Refusal(
            rule="cohort",
            sentence=f"Round {offer.round} names {len(offer.cohort)} sites, of which {len(enrolled)} different ones are on the "
            f"roster{f'; {_several(strangers)} not' if strangers else ''}. Nobody else is summed with.",
        )
    least = max(terms.fewest_cohort, plan.federation.min_sites)
    if len(enrolled) < least:
        yield Refusal(
            rule="cohort",
            sentence=f"Round {offer.round} asks {len(enrolled)} sites of the roster; at least {least} are needed, by [federation] "
            "fewest_cohort and the plan's min_sites. Wait until more take part.",
        )
    met = len({roster.sites[site] for site in enrolled - {policy.site}} & terms.known.keys())
    if met < terms.fewest_known:
        yield Refusal(
            rule="cohort",
            sentence=f"Round {offer.round} asks {met} of the sites in [federation] known_sites; fewest_known asks for "
            f"{terms.fewest_known}. Wait until they take part, or add sites whose keys you have compared.",
        )


def _priced(name: str, gate: Filter, privacy: plans.Privacy, rounds: int) -> AccountPrice:
    one = planned_spend(privacy)
    empty = dataclasses.replace(gate, spent=0.0)
    takes = rounds * empty.after((one,)).spent * (1 + _ROUNDING)
    after = dataclasses.replace(gate, spent=gate.spent + takes)
    fits = math.floor(max(0.0, gate.left) / takes) if takes else 0
    return AccountPrice(
        account=name,
        epsilon=gate.epsilon,
        delta=gate.delta,
        used=gate.used,
        after=after.used,
        left=after.left,
        fits=fits,
    )


def _room_for(privacy: plans.Privacy) -> float:
    """Return the smallest budget, to two decimals, that a plan fits into at its own delta."""
    cost = Filter(epsilon=MOST_EPSILON, delta=privacy.delta, order=best_order(privacy))
    after = _priced("", cost, privacy, privacy.rounds).after
    return min(MOST_EPSILON, math.ceil(after * 100) / 100)


def _memory(plan: Plan) -> int:
    """Return how much memory a plan's rows and their cache take, in MiB."""
    compute = plan.compute
    return compute.memory_mb + (compute.cache_mb if compute.cache_prefix else 0)


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _several(names: Iterable[str]) -> str:
    """Spell a list of names for a sentence."""
    told = list(names)
    return f"{', '.join(told[:8])} and {len(told) - 8} more" if len(told) > 8 else ", ".join(told) or "nothing"
