"""A plan in plain sentences, for those who approve it."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from confide.common.accounting import planned_cost, planned_spend
from confide.common.bounds import BOUND_PER_NORM, BOUND_PER_RMS, predicted
from confide.common.calibration import noise_multiplier
from confide.common.conversions import Conversions
from confide.common.filter import best_order
from confide.common.forecast import forecast, without_model
from confide.common.graph import COMPLETE_UP_TO, CORRUPT, SEMI_HONEST, connections, survives
from confide.common.plan import (
    ALTERNATE,
    CAUSAL,
    CLASSES,
    FEDIT,
    FFA,
    INSTRUCTION,
    LANGUAGE,
    MASKED,
    R_ONLY,
    REGRESSION,
    SHARE_A,
    X25519,
    Plan,
    ring_sites,
    ring_steps,
    template_columns,
)
from confide.common.pld import LEAST_PLD_DELTA

# Conversions of longer runs take longer than an explanation should; `confide plan budget` gives them.
_MOST_STEPS_CONVERTED = 2000


def explain(plan: Plan, model: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield (heading, sentences): what is trained on what, what leaves a site, what is guaranteed, who may drop out.

    Args:
        plan: The plan.
        model: The base model's local directory, if trained numbers are to be counted for the forecast.

    Raises:
        ModelError: `model` holds no model that the plan's targets are in.
    """
    yield "What is trained", _trained(plan)
    yield "On what", _data(plan)
    yield "What leaves a site", _leaves(plan)
    yield "How updates are summed", _ring(plan)
    yield "What is guaranteed", _guarantee(plan)
    yield "What else it would cost", _conversions(plan)
    yield "What is to be expected", [without_model(plan)] if model is None else forecast(plan, model).sentences
    yield "Who must take part", _cohort(plan)


def _trained(plan: Plan) -> list[str]:
    adapter, privacy, training = plan.adapter, plan.privacy, plan.training
    where = {0: "all layers", 1: "the top layer"}.get(adapter.top_layers, f"the top {adapter.top_layers} layers")
    head = "" if plan.task.kind in LANGUAGE else " and the head"
    proximal = (
        f" A site is drawn back to the round's start with strength {training.proximal:g} (FedProx); this looks at no row."
        if training.proximal
        else ""
    )
    rates = f"learning rate {training.learning_rate:g} for the adapter"
    if head:
        rates += f" and {training.head_learning_rate:g} for the head"
    return [
        f"Purpose: {plan.purpose}",
        f"The base model {plan.model.base} stays as it is; its files must have the digest {plan.model.base_digest}.",
        f"In {where}, the modules {', '.join(adapter.targets)} get a low-rank adapter of rank {adapter.rank}. "
        f"{_factors(adapter.method, head)}",
        f"Training takes {privacy.rounds} rounds of {privacy.steps_per_round} {training.optimizer} steps at each site, with "
        f"{rates}. After each round the server applies {plan.federation.server_optimizer} to the mean of the sites' "
        f"updates.{proximal}",
    ]


def _factors(method: str, head: str) -> str:
    """Say which of the low-rank factors are trained."""
    also = f"{head} are trained" if head else " is trained"
    both = f"A, B{head}" if head else "A and B"
    return {
        FFA: f"Its factor A follows from the plan's seed and never changes; its factor B{also}.",
        FEDIT: f"Its factors {both} are trained.",
        ALTERNATE: f"Its factors {both} are trained: B in odd rounds, A in even ones.",
        SHARE_A: f"Its factors {both} are trained; B stays at the site.",
        R_ONLY: f"A small matrix between two factors that follow from the plan's seed{also}.",
    }.get(method, f"It is trained by the method {method}.")


def _data(plan: Plan) -> list[str]:
    data, task = plan.data, plan.task
    if data.image is not None:
        source = f"The image is read from the column {data.image!r}"
    elif data.template is not None:
        source = f"Each row becomes a text from its columns {', '.join(template_columns(data.template))}"
    else:
        pair = f" and {data.text_pair!r}" if data.text_pair else ""
        source = f"The text is read from the column {data.text!r}{pair}"
    cut = "" if data.image is not None else f", cut at {plan.model.max_tokens} tokens"
    person = (
        f"Rows with the same {data.person_id!r} belong to one person. Of one person at most {data.max_rows_per_person} rows "
        "are used, the first in the table; later ones are left out and counted."
        if data.person_id
        else "Each row counts as a person of its own. If a person can have several rows, name a person_id column: without it "
        "only single rows are protected."
    )
    return [
        f"{source}{cut}; {_answer(plan)}.",
        person,
        f"A missing value: {data.on_missing}. An unknown label: {data.on_unknown_label}. An empty text: "
        f"{data.on_empty_text}. What is skipped is counted and shown to the site.",
        f"Results are judged by {task.decides}.",
    ]


def _answer(plan: Plan) -> str:
    """Say what is to be learned."""
    data, task = plan.data, plan.task
    if task.kind in CLASSES:
        return f"the answer is the column {data.label!r}, one of {_few(task.labels)}"
    return {
        REGRESSION: f"the answer is the number in the column {data.label!r}, less {task.center:g} and divided by {task.scale:g}",
        CAUSAL: "what is learned is each next token",
        INSTRUCTION: f"what is learned is the answer in the column {data.answer!r}, and nothing of the prompt",
        MASKED: f"what is learned are the tokens that are hidden, {task.mask_rate:.0%} of them",
    }[task.kind]


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
    unit = _unit(plan)
    return [
        f"Each {unit} of a site is protected with epsilon = {_epsilon(cost.declared)} (asked for: {privacy.epsilon:g}) at delta = "
        f"{privacy.delta:g}, over the whole run, against everyone who sees the updates, the server and other sites "
        "included. It compares the run with one in which that "
        f"{unit}'s gradients are replaced by zeros.",
        f"How: in each of {privacy.steps} steps every {unit} is drawn with probability {privacy.sampling_rate:g}, on its "
        f"own; its gradient is cut to length {privacy.clip_norm:g}; Gaussian noise of standard deviation {noise:g} × "
        f"{privacy.clip_norm:g} is added to the sum. The noise multiplier {noise:g} follows from the plan alone.",
        _drawn_together(plan),
        f"In the comparison all public numbers stay as they are: sampling rate, steps, noise, and how many {unit}s the site "
        f"says it has. That number, N, only sets the constant {privacy.sampling_rate:g} × N by which the noised sum is divided. "
        "If it is wrong, updates are too short or too long; epsilon is the same.",
        f"Two accountants: epsilon = {cost.pld:.3f} by privacy loss distributions, {cost.rdp:.3f} by Rényi DP; both are upper "
        "bounds. The smaller holds for a run that went as planned, and for one that was stopped early, whoever stopped it and "
        f"whatever they had seen. If noise or steps are changed on the way, a Rényi filter counts (order {best_order(privacy)} "
        f"for this plan), by which the whole plan costs epsilon = {_epsilon(cost.adaptive)}.",
        "What is not certified: that batches which are shuffled rather than drawn gain anything from sampling (only Poisson "
        f"sampling is counted); a delta below {LEAST_PLD_DELTA:g} by privacy loss distributions; scores and other metrics that "
        "a site lets out; and that settings were chosen without looking at these rows: each further run on them adds to "
        "the cost.",
        "What is not covered: that the final adapter shows what the sites' data have in common, and what other releases "
        "of the same data cost.",
    ]


def _drawn_together(plan: Plan) -> str:
    if plan.data.person_id is None:
        return "The unit is the row: each is drawn, cut and counted on its own, whosever it is."
    return (
        f"The unit is the person: all her rows, up to {plan.data.max_rows_per_person}, are drawn together, and her gradient is "
        f"the mean over them, cut once. Rows of hers with another {plan.data.person_id!r}, or with none, are not protected "
        "together with these."
    )


def _conversions(plan: Plan) -> list[str]:
    privacy, unit = plan.privacy, _unit(plan)
    if privacy.steps > _MOST_STEPS_CONVERTED:
        sentences = [
            f"For {privacy.steps} steps this takes a while. It is told by: confide plan budget PLAN (a {unit} replaced by "
            "another, the same person at several sites)."
        ]
    else:
        found = Conversions.of(planned_spend(privacy, privacy.rounds), privacy.delta)
        sites = ", ".join(f"{_epsilon(value)} at {sites}" for sites, value in found.sites.items())
        replaced = (
            f"Against a run in which the {unit} is replaced by another, instead of by nothing: epsilon = "
            f"{_epsilon(found.replace_one)}."
            if math.isfinite(found.replace_one)
            else f"Against a run in which the {unit} is replaced by another, no epsilon can be certified."
        )
        sentences = [
            replaced,
            f"Somebody who is at several sites: epsilon = {sites}. Each site adds its own noise, and each update counts as "
            "seen. Persons of different sites do not add to each other's cost.",
        ]
    if plan.data.person_id is None:
        sentences.append(
            "Somebody with k rows: more than k times epsilon, for her rows are drawn apart and each may add its full length. "
            "How much it is says: confide plan budget PLAN --rows-per-person K"
        )
    return sentences


def _unit(plan: Plan) -> str:
    return "person" if plan.data.person_id else "row"


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
