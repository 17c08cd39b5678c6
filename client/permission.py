"""What a policy allows, in sentences, for those who write it and those who answer for it."""

from collections.abc import Iterable, Iterator

from confide.client.policy import Policy
from confide.common.graph import COMPLETE_UP_TO, SEMI_HONEST
from confide.common.wording import ended, several


def permission(policy: Policy) -> Iterator[tuple[str, list[str]]]:
    """Yield (heading, sentences): who may do what with this site's data, and what it may cost."""
    yield "Who may ask, and who decides", [*_partners(policy), *_approvers(policy)]
    yield "What it may cost", _budget(policy)
    yield "What a plan may do", [*_numbers(policy), *_model(policy)]
    yield "When, and on what machine", _place(policy)
    yield "What may leave beside updates", _metrics(policy)


def gaps(policy: Policy) -> list[str]:
    """Return what is missing without which no plan can run at all, a sentence each."""
    missing = {
        "[federation] federations is empty: no federation's plan may be judged.": policy.federation.federations,
        "[federation] key_agreements is empty: no round's keys may be agreed.": policy.federation.key_agreements,
        "[model] base_digests is empty: no base model may be trained.": policy.model.base_digests,
        "[model] quantizations is empty: no base model may be kept in any form.": policy.model.quantizations,
        "[model] tasks is empty: nothing may be learned.": policy.model.tasks,
        "[model] methods is empty: no factor may be trained.": policy.model.methods,
        "[model] targets is empty: no module may carry an adapter.": policy.model.targets,
        "[hours] windows is empty: no exchange may begin.": policy.hours.windows,
        "[compute] devices is empty: it may train nowhere.": policy.compute.devices,
        "[approval] approvers is empty: nobody can approve a plan.": policy.approval.approvers,
    }
    return [sentence for sentence, allowed in missing.items() if not allowed]


def strangers(policy: Policy, joined: Iterable[str]) -> list[str]:
    """Return what is to be said of federations that the policy names and the site does not belong to, a sentence each."""
    known = set(joined)
    return [
        f"[federation] federations names {name!r}, which this site never joined, so none of its plans can come. Join it, or see "
        "how its roster spells the name: confide site join"
        for name in policy.federation.federations
        if name not in known
    ]


def _partners(policy: Policy) -> Iterator[str]:
    terms = policy.federation
    yield (
        f"Plans may come from the federations: {_listed(terms.federations)}."
        if terms.federations
        else "Plans may come from no federation."
    )
    yield (
        f"A round needs at least {terms.fewest_cohort} sites that are asked, and a sum is opened of at least "
        f"{terms.fewest_summed}."
    )
    if terms.fewest_known:
        yield (
            f"At least {terms.fewest_known} of these must be asked beside this one, by their keys: "
            f"{_listed(terms.known.values())}."
        )
    if SEMI_HONEST in terms.words:
        yield (
            f"With more than {COMPLETE_UP_TO} sites sums may withstand an honest-but-curious server only; the word "
            f"{SEMI_HONEST} allows it."
        )


def _approvers(policy: Policy) -> Iterator[str]:
    approval = policy.approval
    people = ended(_listed(policy.approvers.values()))
    if not policy.approvers:
        yield "Nobody may approve a plan."
    elif approval.signatures == 1:
        yield f"One of these approves a plan: {people}"
    else:
        yield f"{approval.signatures} of these must approve a plan, each with a key of their own: {people}"
    yield f"An approval holds for at most {approval.most_days} days."


def _budget(policy: Policy) -> list[str]:
    budget, renewal = policy.budget, policy.renewal
    renewed = (
        f"A budget may begin anew {renewal.after_days} days after it began, at most {several(renewal.most, 'time')}; an approver signs it and "
        "gives a reason."
        if renewal.after_days
        else "A budget that is used up never begins anew."
    )
    return [
        f"All plans together may cost a person of a data set epsilon = {budget.epsilon:g} at delta = {budget.delta:g}, over its "
        "whole life. Accounts that were opened with less keep that.",
        f"One plan may ask for epsilon = {budget.plan_epsilon:g} at delta = {budget.plan_delta:g}.",
        renewed,
    ]


def _numbers(policy: Policy) -> Iterator[str]:
    privacy, training = policy.privacy, policy.training
    yield (
        f"Its noise multiplier is at least {privacy.smallest_noise_multiplier:g}, its sampling rate at most "
        f"{privacy.largest_sampling_rate:g}, its clip norm at most {privacy.largest_clip_norm:g}."
    )
    yield f"It has at most {privacy.most_rounds} rounds of {privacy.most_steps_per_round} steps."
    yield f"It asks each site for at least {privacy.fewest_persons} persons, and a data set here must have as many."
    yield (
        "It must say which column tells whose row it is, so that whole persons are protected."
        if privacy.whole_persons
        else "It may protect single rows only: it need not say which column tells whose row it is."
    )
    yield (
        f"Its learning rates are at most {training.largest_learning_rate:g}, the server's at most "
        f"{training.largest_server_learning_rate:g}, and alpha / rank at most {training.largest_scale:g}."
    )


def _model(policy: Policy) -> Iterator[str]:
    model = policy.model
    digests = _listed(model.base_digests) if model.base_digests else "no base model is allowed"
    kept = _listed(model.quantizations) if model.quantizations else "not allowed in any form"
    yield f"Base models, by digest: {digests}. Quantization: {kept}."
    tasks = (
        f"Tasks: {_listed(model.tasks)}, of texts of at most {model.most_tokens} tokens."
        if model.tasks
        else "Tasks: none is allowed."
    )
    methods, modules = (_listed(names) if names else "none is allowed" for names in (model.methods, model.targets))
    yield f"{tasks} Adapters: methods {methods}, modules {modules}, rank at most {model.largest_rank}."


def _place(policy: Policy) -> list[str]:
    hours, compute, hold = policy.hours, policy.compute, policy.answers.hold_s
    return [
        f"Exchanges may begin: {_listed(hours.windows)} ({hours.time_zone})."
        if hours.windows
        else "Exchanges may begin at no time.",
        f"Training may use {_listed(compute.devices) if compute.devices else 'no device'}, {compute.memory_mb} MiB of memory, and {compute.round_s} s a round; it is "
        "ended if it takes more.",
        f"Answers are held back until {hold} s after the request."
        if hold
        else "Answers are sent at once, so that others can tell how long training took.",
    ]


def _metrics(policy: Policy) -> list[str]:
    metrics = policy.metrics
    if not metrics.leave:
        return ["Nothing."]
    return [
        f"{_listed(metrics.leave)}, with a noise multiplier of at least {metrics.smallest_noise_multiplier:g}; each is charged to "
        "the data's budget."
    ]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
