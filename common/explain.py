"""A plan in plain sentences, for those who approve it."""

from collections.abc import Iterator

from confide.common.accounting import noise_multiplier, planned_cost
from confide.common.plan import Plan, template_columns


def explain(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Yield (heading, sentences): what is trained on what, what leaves a site, what is guaranteed, who may drop out."""
    yield "What is trained", _trained(plan)
    yield "On what", _data(plan)
    yield "What leaves a site", _leaves(plan)
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
    return [
        "Rows, texts, labels, counts, losses and gradients never leave a site.",
        "In each round a site sends one vector: the change of the trained numbers, computed from clipped and noised "
        "gradients, written as 32-bit integers. It sends 4 bytes per trained number.",
        "An error leaves a site as a class name and a fixed sentence.",
    ]


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
    survives = "; ".join(
        f"a cohort of {n} survives {n - least if n > least else 'no'} dropout{'' if n - least == 1 else 's'}"
        for n in sorted({least, least + 1, least + 2, federation.max_sites})
        if n <= federation.max_sites
    )
    return [
        f"{least} to {federation.max_sites} sites, each with at least {plan.privacy.min_persons} persons.",
        f"A round's sum is opened only if at least {least} sites are in it: {survives}. With fewer, the round is void: the "
        "adapter stays as it was, and the round still counts.",
    ]


def _epsilon(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])} and {len(names) - 6} more"
