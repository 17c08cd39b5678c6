"""A plan in plain sentences, for those who approve it."""

import itertools
from collections.abc import Iterator

from confide.common.accounting import noise_multiplier, planned_cost
from confide.common.bounds import BOUND_PER_NORM, BOUND_PER_RMS, predicted
from confide.common.graph import COMPLETE_UP_TO, CORRUPT, SEMI_HONEST, connections, survives
from confide.common.plan import X25519, Plan, ring_sites, ring_steps, template_columns


def explain(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Yield (heading, sentences): what is trained on what, what leaves a site, what is guaranteed, who may drop out."""
    yield "What is trained", _trained(plan)
    yield "On what", _data(plan)
    yield "What leaves a site", _leaves(plan)
    yield "How updates are summed", _ring(plan)
    yield "What is guaranteed", _guarantee(plan)
    yield "Who must take part", _cohort(plan)


def _trained(plan: Plan) -> list[str]:
    adapter, privacy, training = plan.adapter, plan.privacy, plan.training
    where = f"the top {adapter.top_layers} layers" if adapter.top_layers else "all layers"
    return [
        f"Purpose: {plan.purpose}",
        f"The base model {plan.model.base} stays as it is; its files must have the digest {plan.model.base_digest}.",
        f"In {where}, the modules {', '.join(adapter.targets)} get a low-rank adapter of rank {adapter.rank}. Its factor A "
        "follows from the plan's seed and never changes; its factor B and the classification head are trained.",
        f"Training takes {privacy.rounds} rounds of {privacy.steps_per_round} {training.optimizer} steps at each site, with "
        f"learning rate {training.learning_rate:g} for the adapter and {training.head_learning_rate:g} for the head. After "
        f"each round the server applies {plan.federation.server_optimizer} to the mean of the sites' updates.",
    ]


def _data(plan: Plan) -> list[str]:
    data, task = plan.data, plan.task
    if data.template is not None:
        source = f"Each row becomes a text from its columns {', '.join(template_columns(data.template))}"
    else:
        pair = f" and {data.text_pair!r}" if data.text_pair else ""
        source = f"The text is read from the column {data.text!r}{pair}"
    person = (
        f"Rows with the same {data.person_id!r} belong to one person; at most {data.max_rows_per_person} of them are used."
        if data.person_id
        else "Each row counts as a person of its own. If a person can have several rows, name a person_id column: without it "
        "only single rows are protected."
    )
    return [
        f"{source}, cut at {plan.model.max_tokens} tokens; the answer is the column {data.label!r}, one of "
        f"{_few(task.labels)}.",
        person,
        f"A missing value: {data.on_missing}. An unknown label: {data.on_unknown_label}. An empty text: "
        f"{data.on_empty_text}. What is skipped is counted and shown to the site.",
        f"Results are judged by {task.score}.",
    ]


def _leaves(plan: Plan) -> list[str]:
    federation = plan.federation
    bits = federation.ring_bits
    sentences = [
        "Rows, texts, labels, counts, losses and gradients never leave a site.",
        "In each round a site sends one vector: the change of the trained numbers, computed from clipped and noised "
        f"gradients, written as {bits}-bit integers. It sends {bits // 8} bytes per trained number.",
        "The vector is masked: the server learns the sum of at least ⌊2n/3⌋ + 1 of the n sites on the roster, and of at "
        f"least {federation.min_sites}; of one site it learns nothing but what the sum shows. Up to {COMPLETE_UP_TO} sites masks "
        "hold while fewer than a third of the roster work together with the server; those can take their own parts out of "
        "the sum.",
    ]
    if federation.graph == SEMI_HONEST and federation.max_sites > COMPLETE_UP_TO:
        among = connections(federation.max_sites)
        sentences.append(
            f"With more than {COMPLETE_UP_TO} sites on the roster each shares keys with some others only, in one of "
            f"{among.sites} with {among.neighbours}. Then masks hold against an honest-but-curious server only, which "
            f"follows the protocol and looks on, together with at most {float(CORRUPT):.0%} of the sites. A server that lies "
            "may learn a single site's update, noised as it is. A site must allow this in its own policy."
        )
    elif federation.graph == SEMI_HONEST:
        sentences.append(
            f"The plan allows {SEMI_HONEST}, which is used with rosters of more than {COMPLETE_UP_TO} sites only; here it "
            "has no effect."
        )
    if federation.key_agreement == X25519:
        sentences.append(
            "Keys are agreed with X25519. Whoever keeps the messages may unmask a site's vector, noised as it is, with a "
            "later quantum computer."
        )
    else:
        sentences.append(
            "The boxes that carry key shares are sealed with X25519 and ML-KEM-768 together and withstand a later quantum "
            "computer. The masks between sites rest on X25519 alone and do not."
        )
    return [*sentences, "An error leaves a site as a class name and a fixed sentence."]


def _ring(plan: Plan) -> list[str]:
    federation = plan.federation
    bits, steps = federation.ring_bits, ring_steps(federation.ring_bits, federation.max_sites)
    whose = "the length of a site's update" if bits == 32 else "each number of a site's update"
    return [
        f"A number is a {bits}-bit integer, {bits // 8} bytes. The sum has room for max_sites = {federation.max_sites} sites "
        f"and cannot wrap; with {bits} bits a plan may have up to {min(ring_sites(bits), 1000)}.",
        f"The bound on {whose} is {steps} steps wide, so a step is {1 / steps:.2g} of it. Numbers are rounded up or down "
        "at random, so that on average nothing is lost.",
        _bound(plan),
    ]


def _bound(plan: Plan) -> str:
    """Say what a site's update may be; the numbers of trained entries are the model's, so they stay letters."""
    training, federation = plan.training, plan.federation
    of_adapter, signal = predicted(plan, training.learning_rate)
    of_head, head_signal = predicted(plan, training.head_learning_rate)
    if federation.ring_bits == 16:
        spread = [
            f"{BOUND_PER_RMS * noise:.3g}" + (f" + {BOUND_PER_RMS * more:.3g} / √(A + H)" if more else "")
            for noise, more in ((of_adapter, signal), (of_head, head_signal))
        ]
        return (
            f"A number of the adapter is cut at {spread[0]} and one of the head at {spread[1]}, {BOUND_PER_RMS} times as far "
            f"as a round is predicted to move them{_LETTERS if signal else ''}. How many were cut is summed and shown."
        )
    if federation.update_bound is not None:
        named = f"{federation.update_bound:g}, as the plan says"
    else:
        one, other = BOUND_PER_NORM * of_adapter, BOUND_PER_NORM * of_head
        more = BOUND_PER_NORM * max(signal, head_signal)
        named = (
            f"√({one:.3g}² A + {other:.3g}² H){f' + {more:.3g}' if more else ''}, {BOUND_PER_NORM} times the length that is "
            f"predicted{_LETTERS}"
        )
    return f"The bound is {named}. A longer update is scaled down; how many were is summed and shown."


_LETTERS = "; A and H are how many numbers the model's adapter and head have"


def _guarantee(plan: Plan) -> list[str]:
    privacy = plan.privacy
    cost, noise = planned_cost(privacy), noise_multiplier(privacy)
    unit = "person" if plan.data.person_id else "row"
    return [
        f"Each {unit} of a site is protected with epsilon = {_epsilon(cost.epsilon)} (asked for: {privacy.epsilon:g}) at delta = "
        f"{privacy.delta:g}, over the whole run, against everyone who sees the updates, the server and other sites "
        "included. It compares the run with one in which that "
        f"{unit}'s gradients are replaced by zeros.",
        f"How: in each of {privacy.steps} steps every {unit} is drawn with probability {privacy.sampling_rate:g}, on its "
        f"own; its gradient is cut to length {privacy.clip_norm:g}; Gaussian noise of standard deviation {noise:g} × "
        f"{privacy.clip_norm:g} is added to the sum. The noise multiplier {noise:g} follows from the plan alone.",
        f"Two accountants: {cost.pld:.3f} by privacy loss distributions, {cost.rdp:.3f} by Rényi DP; both are upper bounds. "
        "The smaller holds for a run that went as planned.",
        "What is not covered: that the final adapter shows what the sites' data have in common, and what other releases "
        "of the same data cost.",
    ]


def _cohort(plan: Plan) -> list[str]:
    federation = plan.federation
    least = federation.min_sites
    return [
        f"{least} to {federation.max_sites} sites, each with at least {plan.privacy.min_persons} persons.",
        f"A round's sum is opened only if at least ⌊2n/3⌋ + 1 of the n sites on the roster, and at least {least}, see the "
        f"round through: {_dropouts(plan)}.",
        "If more drop out, they are asked once more, for the same vectors, unless the sites were asked to open the sum "
        "already. After that the round is void: the adapter stays as it was, and the round still counts.",
    ]


def _dropouts(plan: Plan) -> str:
    """Say how many dropouts the smallest cohorts survive, and the largest."""
    least, most = plan.federation.min_sites, plan.federation.max_sites

    def spare(sites: int) -> int:
        return min(survives(sites), sites - least)

    groups = itertools.groupby(range(least, most + 1), spare)  # few are looked at: a graph of many sites takes its time
    told = [(next(sizes), max(sizes, default=0), dropouts) for dropouts, sizes in itertools.islice(groups, 3)]
    if max(told[-1][:2]) < most:
        told.append((most, 0, spare(most)))
    first, *more = (
        f"{start}{f' to {end}' if end else ''} survives {dropouts or 'no'} dropout{'' if dropouts == 1 else 's'}"
        for start, end, dropouts in told
    )
    return "; ".join([f"a roster of {first}", *(f"one of {group}" for group in more)])


def _epsilon(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])} and {len(names) - 6} more"
