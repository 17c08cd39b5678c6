"""The plan: a whole run as data, never code.

A plan is a TOML file that says what is trained, on what, under which guarantee. It is read strictly: an unknown key, a
value out of range or an impossible combination is refused with what the key means and what to do. `Plan.digest` is what
a site approves; it covers every setting but those in `[compute]`, which change speed only.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from confide.common import settings
from confide.common.canonical import canonical_bytes, sha256
from confide.common.errors import PlanError, UsageError
from confide.common.graph import COMPLETE, COMPLETE_UP_TO, SEMI_HONEST
from confide.common.settings import Meaning, holds_control, read_section, read_tree, setting, shown, toml_value

FORMAT = "confide-plan/1"
LARGEST_PLAN_BYTES = 1 << 20
X25519, HYBRID = "x25519", "x25519+ml-kem-768"  # how the boxes that carry key shares are sealed
LEAST_RING_STEPS = 127  # fewer, and a site whose update is much smaller than predicted would mostly send rounding
# What a task may be, and what its results can be judged by; the first score is the usual one.
TEXT_CLASSES, IMAGE_CLASSES, TOKEN_CLASSES = "text-classification", "image-classification", "token-classification"
REGRESSION, CAUSAL, INSTRUCTION, MASKED = "regression", "causal-lm", "instruction", "masked-lm"
SCORES = {
    TEXT_CLASSES: ("macro-f1", "accuracy", "auroc"),
    IMAGE_CLASSES: ("macro-f1", "accuracy", "auroc"),
    TOKEN_CLASSES: ("macro-f1", "accuracy"),
    REGRESSION: ("r2", "mae"),
    CAUSAL: ("perplexity", "accuracy"),
    INSTRUCTION: ("perplexity", "accuracy"),
    MASKED: ("perplexity", "accuracy"),
}
CLASSES = (TEXT_CLASSES, IMAGE_CLASSES, TOKEN_CLASSES)  # the tasks that have labels
LANGUAGE = (CAUSAL, INSTRUCTION, MASKED)  # the tasks whose answers are tokens of the model's own vocabulary
_USUAL_COLUMNS = {
    TEXT_CLASSES: ("label", "text"),
    IMAGE_CLASSES: ("label", "image"),
    TOKEN_CLASSES: ("label", "text"),
    REGRESSION: ("label", "text"),
    CAUSAL: ("text",),
    INSTRUCTION: ("answer", "text"),
    MASKED: ("text",),
}
FFA, ALTERNATE, FEDIT, SHARE_A, R_ONLY = "ffa", "alternate", "fedit", "share-a", "r-only"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`[model]`: the frozen base model."""

    base: str = setting(
        "The base model's public name, for people; its files are found by a local path.",
        at_least=1,
        at_most=200,
        example="all-MiniLM-L6-v2",
    )
    base_digest: str = setting(
        "The digest of the base model's files, as `confide plan new --model DIR` prints it; every site checks it.",
        example="sha256:" + "0" * 64,
    )
    max_tokens: int = setting(
        "How many tokens of a text are read; what is beyond is cut off.", default=128, at_least=2, at_most=8192
    )
    pooling: str = setting(
        "What the head reads: what the model's own classifier class gives it, or the mean over all tokens, which suits "
        "sentence encoders. Only text-classification and regression know the mean.",
        default="own",
        choices=("own", "mean"),
    )
    quantization: str = setting(
        "How the frozen base is kept: as it is, or in 4-bit NormalFloat, which needs a GPU and the package bitsandbytes.",
        default="none",
        choices=("none", "nf4"),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """`[adapter]`: what is trained."""

    method: str = setting(
        "Which of the low-rank factors are trained. ffa: B, while A is fixed by the seed and never sent. fedit: A and B. "
        "alternate: B in odd rounds, A in even ones. share-a: A and B, of which B stays at the site. r-only: a small matrix R "
        "between fixed factors. The head, if the task has one, is trained with all of them.",
        default=FFA,
        choices=(FFA, ALTERNATE, FEDIT, SHARE_A, R_ONLY),
    )
    rank: int = setting("The rank r of the adapter's factors.", default=8, at_least=1, at_most=256)
    alpha: float = setting("LoRA's scale: the adapter adds alpha / rank × B A.", default=16.0, above=0, at_most=4096)
    targets: tuple[str, ...] = setting(
        "The names of the linear modules that carry adapters.",
        at_least=1,
        at_most=32,
        example=["query", "value"],
    )
    top_layers: int = setting(
        "How many of the topmost transformer layers carry adapters; 0 means all. Layers below are then computed once.",
        default=0,
        at_least=0,
        at_most=1024,
    )
    head_start: str = setting(
        "How the classification head starts: all zeros, or small values drawn from the seed.",
        default="zeros",
        choices=("zeros", "seeded"),
    )
    seed: int = setting(
        "The number from which A and a seeded head are drawn, equal on every machine.",
        default=0,
        at_least=0,
        at_most=2**63 - 1,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """`[task]`: what is learned and how it is scored."""

    kind: str = setting("What kind of answer is learned.", default=TEXT_CLASSES, choices=tuple(SCORES))
    labels: tuple[str, ...] = setting(
        "The label names, in the order of the model's outputs; only tasks that classify have them.",
        default=(),
        at_most=10_000,
        example=["negative", "positive"],
    )
    score: str | None = setting(
        "The score that decides; if absent, the usual one of the kind of task.",
        default=None,
        choices=tuple(sorted({score for scores in SCORES.values() for score in scores})),
    )
    center: float = setting(
        "Regression only: a public number that is subtracted from every answer before it is learned.",
        default=0.0,
        at_least=-1e12,
        at_most=1e12,
    )
    scale: float = setting(
        "Regression only: the public number by which answers are then divided, so that they are about 1 in size.",
        default=1.0,
        above=0,
        at_most=1e12,
    )
    mask_rate: float = setting(
        "masked-lm only: the share of a text's tokens that are hidden and learned.", default=0.15, above=0, at_most=0.5
    )

    @property
    def decides(self) -> str:
        """The score that decides."""
        return self.score or SCORES[self.kind][0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """`[data]`: how a site's table is read."""

    label: str | None = setting(
        "The column that holds the label name, a label name for each word, or the number to predict.",
        default=None,
        at_least=1,
        at_most=200,
    )
    answer: str | None = setting(
        "instruction only: the column that holds the answer to learn; the text is the prompt.",
        default=None,
        at_least=1,
        at_most=200,
    )
    system: str | None = setting(
        "instruction only: what the model is told before every prompt.", default=None, at_least=1, at_most=10_000
    )
    image: str | None = setting(
        "image-classification only: the column that holds the image, or its path beside the table.",
        default=None,
        at_least=1,
        at_most=200,
    )
    text: str | None = setting(
        "The column that holds the text; give this or `template`.", default=None, at_least=1, at_most=200
    )
    text_pair: str | None = setting(
        "A second text column, for tasks on pairs of texts.", default=None, at_least=1, at_most=200
    )
    template: str | None = setting(
        'Turns a table\'s row into text, such as "Age {age}, income {income}"; {name} stands for that column.',
        default=None,
        at_least=1,
        at_most=10_000,
    )
    person_id: str | None = setting(
        "The column that says whose row it is; a person's rows are protected together. Without it each row is one.",
        default=None,
        at_least=1,
        at_most=200,
    )
    max_rows_per_person: int = setting(
        "How many rows of one person are used; those that come later in the table are left out and counted.",
        default=64,
        at_least=1,
        at_most=100_000,
    )
    on_missing: str = setting(
        "What a missing value in a used column does: refuse the table, or skip the row and count it.",
        default="refuse",
        choices=("refuse", "skip"),
    )
    on_unknown_label: str = setting(
        "What a label that cannot be used does, be it outside [task] labels, no number, or one of more or fewer than "
        "there are words: refuse the table, or skip the row and count it.",
        default="refuse",
        choices=("refuse", "skip"),
    )
    on_empty_text: str = setting(
        "What a row with nothing to read or to learn does, be it a text of white space only, an image that cannot be read "
        "or an answer wholly beyond max_tokens: refuse the table, or skip the row and count it.",
        default="refuse",
        choices=("refuse", "skip"),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """`[privacy]`: everything the guarantee follows from. The noise multiplier follows from these numbers alone."""

    epsilon: float = setting(
        "What a person's whole participation at one site may cost, over all rounds.",
        above=0,
        at_most=100,
        example=8.0,
    )
    delta: float = setting(
        "The probability with which epsilon may be exceeded; must be below 1 / min_persons.",
        at_least=1e-12,
        below=0.01,
        example=1e-5,
    )
    sampling_rate: float = setting(
        "The probability q with which each person takes part in a step, independently (Poisson sampling).",
        above=0,
        at_most=1,
        example=0.1,
    )
    clip_norm: float = setting(
        "The largest L2 norm of one person's gradient; longer ones are scaled down.",
        default=1.0,
        above=0,
        at_most=1e6,
    )
    steps_per_round: int = setting(
        "Optimizer steps a site takes in each round.", at_least=1, at_most=100_000, example=4
    )
    rounds: int = setting("How many rounds the run has, void ones included.", at_least=1, at_most=100_000, example=10)
    min_persons: int = setting(
        "The fewest persons a site must hold to take part.", at_least=2, at_most=10**9, example=1000
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of one site over the whole run."""
        return self.steps_per_round * self.rounds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """`[training]`: how a site moves the weights; post-processing of noised gradients, so free of privacy cost."""

    optimizer: str = setting(
        "The site's optimizer; its state starts anew in each round.", default="adam", choices=("adam", "sgd")
    )
    learning_rate: float = setting("The step size of the adapter.", default=2e-3, above=0, at_most=100)
    head_learning_rate: float = setting("The step size of the head.", default=1e-2, above=0, at_most=100)
    proximal: float = setting(
        "FedProx's μ: how strongly a site is drawn back to the round's start. It looks at no row, so it acts outside the "
        "clipped and noised gradient.",
        default=0.0,
        at_least=0,
        at_most=1e6,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """`[federation]`: how sites are joined."""

    min_sites: int = setting("The fewest sites whose sum may be opened.", default=3, at_least=3, at_most=1000)
    max_sites: int = setting(
        "The most sites of a cohort; the ring leaves head-room for this many.", default=16, at_least=3, at_most=1000
    )
    server_optimizer: str = setting(
        "What the server does with the mean update: take it, give it momentum, or Adam (Reddi et al. 2021).",
        default="fedavg",
        choices=("fedavg", "fedavgm", "fedadam"),
    )
    server_learning_rate: float = setting("The server's step size.", default=1.0, above=0, at_most=100)
    server_momentum: float | None = setting(
        "Momentum of fedavgm, or beta 1 of fedadam; 0.9 if absent.", default=None, at_least=0, below=1
    )
    update_bound: float | None = setting(
        "The largest L2 norm of a site's update that a ring of 32 bits encodes; longer ones are scaled down. "
        "If absent it follows from the learning rates and steps.",
        default=None,
        above=0,
        at_most=1e6,
    )
    ring_bits: int = setting(
        "The width of the integers that are summed; 16 halves what a site sends and has coarser steps.",
        default=32,
        choices=(32, 16),
    )
    key_agreement: str = setting(
        "How the boxes that carry key shares are sealed; the second withstands a later quantum computer for these boxes, "
        "not for the masks.",
        default=X25519,
        choices=(X25519, HYBRID),
    )
    graph: str = setting(
        f"Who shares keys with whom. Above {COMPLETE_UP_TO} sites only {SEMI_HONEST} is possible; its guarantee holds "
        "against an honest-but-curious server only. Smaller rosters are complete with either.",
        default=COMPLETE,
        choices=(COMPLETE, SEMI_HONEST),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """`[compute]`: what changes speed only; not part of the digest, and each site may choose its own."""

    device: str = setting("Where to train.", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = setting("Processor threads; 0 leaves it to torch.", default=0, at_least=0, at_most=1024)
    micro_batch: int = setting(
        "The most rows that go through the model at once; fewer do if memory_mb asks for it.",
        default=32,
        at_least=1,
        at_most=65_536,
    )
    memory_mb: int = setting(
        "About how much memory the rows that go through the model at once may take, in MiB.",
        default=2048,
        at_least=16,
        at_most=1 << 20,
    )
    precision: str = setting(
        "The numbers the frozen base computes with; trained numbers and norms are always float32.",
        default="float32",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool = setting(
        "Whether layers are computed again on the way back instead of kept: less memory, about a third more time.",
        default=False,
    )
    cache_prefix: bool = setting("Whether the layers below the adapters are computed once and kept.", default=True)
    cache_mb: int = setting(
        "How much memory what they give may take, in MiB; what does not fit goes to an encrypted temporary file.",
        default=8192,
        at_least=0,
        at_most=1 << 20,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole run as data. Make one with `load_plan` or `read_plan`."""

    name: str
    purpose: str
    model: Model
    adapter: Adapter
    task: Task
    data: Data
    privacy: Privacy
    training: Training
    federation: Federation
    compute: Compute

    def canonical(self) -> bytes:
        """Return the plan's one spelling: all settings, defaults included, without `[compute]`."""
        tree: dict[str, object] = {"format": FORMAT, "name": self.name, "purpose": self.purpose}
        for name in _SECTIONS:
            if name != "compute":
                tree[name] = dataclasses.asdict(getattr(self, name))
        return canonical_bytes(tree)

    @property
    def digest(self) -> str:
        """What a site approves: SHA-256 of `canonical()`."""
        return sha256(self.canonical())


_SECTIONS: dict[str, type] = {
    "model": Model,
    "adapter": Adapter,
    "task": Task,
    "data": Data,
    "privacy": Privacy,
    "training": Training,
    "federation": Federation,
    "compute": Compute,
}


def load_plan(path: Path) -> Plan:
    """Read the plan in the file `path`.

    Raises:
        UsageError: There is no such file, or it cannot be read.
        PlanError: The file is not a valid plan; all its faults are listed.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"Cannot read the plan {path}: {error.strerror or error}. Write one with: confide plan new"
        ) from None
    return read_plan(raw)


def read_plan(raw: bytes) -> Plan:
    """Read a plan from the bytes of a TOML file.

    Raises:
        PlanError: The bytes are not a valid plan; all its faults are listed.
    """
    if len(raw) > LARGEST_PLAN_BYTES:
        raise PlanError(f"The plan has {len(raw)} bytes, and may have at most {LARGEST_PLAN_BYTES}.")
    try:
        tree = read_tree(raw, subject="The plan", kind="one")
    except ValueError as error:
        raise PlanError(str(error)) from None
    problems = list(_head_faults(tree))
    sections: dict[str, object] = {}
    for name, section in _SECTIONS.items():
        table = tree.get(name, {})
        if not isinstance(table, dict):
            problems.append(f"{name!r} must be a table: write [{name}] on a line of its own.")
            continue
        sections[name] = read_section(section, name, table, problems)
    if problems:
        raise PlanError(*problems)
    plan = Plan(name=tree["name"], purpose=tree["purpose"], **sections)  # type: ignore[arg-type]
    contradictions = list(_contradictions(plan))
    if contradictions:
        raise PlanError(*contradictions)
    return plan


def _head_faults(tree: dict[str, object]) -> Iterator[str]:
    if tree.get("format") != FORMAT:
        yield f'The plan must begin with format = "{FORMAT}"; it has {shown(tree.get("format", ""))}.'
    name, purpose = tree.get("name"), tree.get("purpose")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield f"name = {shown(name or '')} must be 1 to 63 of a-z, 0-9 and -, beginning with a letter or digit."
    if not isinstance(purpose, str) or not 1 <= len(purpose) <= 2000:
        yield "purpose must be a text of 1 to 2000 characters: why this is trained, for those who approve it."
    elif holds_control(purpose):
        yield "purpose holds a control character. Remove it."
    unknown = sorted(set(tree) - {"format", "name", "purpose", *_SECTIONS})
    if unknown:
        yield f"The plan has no section or key {', '.join(map(repr, unknown))}. Known sections: {', '.join(_SECTIONS)}."


def _contradictions(plan: Plan) -> Iterator[str]:
    """Yield what is wrong between settings that are each fine alone."""
    privacy, federation = plan.privacy, plan.federation
    if not _DIGEST.fullmatch(plan.model.base_digest):
        yield (
            "[model] base_digest must be sha256: and 64 hexadecimal digits. "
            "`confide plan new --model DIR` computes it from the model's files."
        )
    yield from _task_faults(plan)
    yield from _column_faults(plan)
    yield from _method_faults(plan)
    if privacy.delta * privacy.min_persons >= 1:
        yield (
            f"[privacy] delta = {privacy.delta:g} is not below 1 / min_persons = {1 / privacy.min_persons:g}: with it, "
            "publishing a person's rows outright would count as private. Lower delta or raise min_persons."
        )
    if privacy.sampling_rate * privacy.min_persons < 1:
        yield (
            f"[privacy] sampling_rate × min_persons = {privacy.sampling_rate * privacy.min_persons:g} persons a step: "
            "most steps would be noise alone. Raise sampling_rate or min_persons."
        )
    if privacy.steps > 1_000_000:
        yield f"[privacy] rounds × steps_per_round = {privacy.steps} steps; at most 1000000 are allowed."
    if federation.min_sites > federation.max_sites:
        yield f"[federation] min_sites = {federation.min_sites} exceeds max_sites = {federation.max_sites}."
    if federation.server_momentum is not None and federation.server_optimizer == "fedavg":
        yield "[federation] server_momentum has no effect on fedavg. Remove it, or choose fedavgm or fedadam."
    yield from _summation_faults(federation)


def _task_faults(plan: Plan) -> Iterator[str]:
    """Yield what does not suit the kind of task, apart from columns."""
    task, kind = plan.task, plan.task.kind
    if kind in CLASSES and len(task.labels) < 2:
        yield (
            f"[task] labels has {len(task.labels)} entries, and needs at least 2: {kind} chooses among them. "
            f"Name every label, in the order of the model's outputs{_for_example(Task, 'labels')}."
        )
    if kind not in CLASSES and task.labels:
        yield f"[task] labels has no effect: {kind} does not choose among labels. Remove it."
    if task.decides not in SCORES[kind]:
        yield f'[task] score = "{task.score}" does not judge {kind}. Choose one of {", ".join(SCORES[kind])}.'
    for key, only in (("center", REGRESSION), ("scale", REGRESSION), ("mask_rate", MASKED)):
        if kind != only and getattr(task, key) != _default(Task, key):
            yield f"[task] {key} has no effect on {kind}; it belongs to {only}. Remove it."
    if plan.model.pooling == "mean" and kind not in {TEXT_CLASSES, REGRESSION}:
        yield (
            f'[model] pooling = "mean" has no effect on {kind}, whose head reads no pooled vector. '
            'Set it to "own"; only text-classification and regression know the mean.'
        )


def _column_faults(plan: Plan) -> Iterator[str]:
    """Yield what is wrong with the columns: too few or too many for the kind of task, or one used twice."""
    data, kind = plan.data, plan.task.kind
    yield from _text_faults(data, kind)
    for key, kinds, what in (
        ("label", (*CLASSES, REGRESSION), "the column that holds what is to be told"),
        ("answer", (INSTRUCTION,), "the column that holds the answer to learn"),
        ("image", (IMAGE_CLASSES,), "the column that holds the image, or its path beside the table"),
    ):
        if kind in kinds and getattr(data, key) is None:
            yield f'[data] lacks `{key}`, which {kind} needs: {what}. Add it, for example: {key} = "{key}".'
        elif kind not in kinds and getattr(data, key) is not None:
            yield f"[data] {key} has no effect on {kind}. Remove it."
    if data.system is not None and kind != INSTRUCTION:
        yield f"[data] system has no effect on {kind}; it belongs to {INSTRUCTION}. Remove it."
    shown_columns = {name: getattr(data, name) for name in ("text", "text_pair", "image") if getattr(data, name)}
    for key in ("label", "answer"):
        column = getattr(data, key)
        for name in [name for name, other in shown_columns.items() if column is not None and other == column][:1]:
            what = "text" if name == "text_pair" else name
            yield f"[data] {key} and {what} name the same column {column!r}: the model would be shown the answer."
    if data.person_id is not None and data.person_id in {data.label, data.answer, *shown_columns.values()}:
        yield f"[data] person_id names the column {data.person_id!r}, which is already the label or the text."


def _text_faults(data: Data, kind: str) -> Iterator[str]:
    if kind == IMAGE_CLASSES:
        for key in ("text", "text_pair", "template"):
            if getattr(data, key) is not None:
                yield f"[data] {key} has no effect on {kind}, which reads the column `image` only. Remove it."
        return
    if kind == TOKEN_CLASSES and data.template is not None:
        yield f"[data] template does not suit {kind}: each word needs a label. Name the column of the words as `text`."
    elif (data.text is None) == (data.template is None):
        yield "[data] needs exactly one of `text` (a column) and `template` (a row turned into text)."
    if data.text_pair is not None and kind not in {TEXT_CLASSES, REGRESSION}:
        yield f"[data] text_pair has no effect on {kind}; it belongs to {TEXT_CLASSES} and {REGRESSION}. Remove it."
    elif data.text_pair is not None and data.text is None:
        yield "[data] text_pair goes with `text`, not with `template`."
    elif data.text_pair is not None and data.text_pair == data.text:
        yield f"[data] text_pair names the column {data.text!r}, which is already the text. Remove it."
    if data.template is not None:
        yield from _template_faults(data)


def _method_faults(plan: Plan) -> Iterator[str]:
    """Yield the combinations of algorithms that would not do what their names say."""
    method, privacy, optimizer = plan.adapter.method, plan.privacy, plan.federation.server_optimizer
    if method == ALTERNATE and optimizer != "fedavg":
        yield (
            f'[adapter] method = "{ALTERNATE}" does not go with server_optimizer = "{optimizer}": the server\'s momentum '
            "would go on moving the factor that rests in a round. Choose fedavg, or another method."
        )
    if method == ALTERNATE and privacy.rounds < 2:
        yield (
            f'[adapter] method = "{ALTERNATE}" with rounds = {privacy.rounds} would never train A, whose turn is the second '
            f'round. Set rounds to at least 2, or choose "{FFA}".'
        )
    if plan.training.proximal and privacy.steps_per_round == 1:
        yield (
            f"[training] proximal = {plan.training.proximal:g} has no effect with steps_per_round = 1: at a round's first "
            "step a site still stands where the round began, so nothing draws it back. Remove it, or take more steps."
        )


def _default(section: type, key: str) -> object:
    return next(field.default for field in dataclasses.fields(section) if field.name == key)


def _for_example(section: type, key: str) -> str:
    meaning: Meaning = next(field.metadata["meaning"] for field in dataclasses.fields(section) if field.name == key)
    return f", for example: {key} = {toml_value(meaning.example)}"


def _summation_faults(federation: Federation) -> Iterator[str]:
    sites, bits = federation.max_sites, federation.ring_bits
    if sites > COMPLETE_UP_TO and federation.graph == COMPLETE:
        yield (
            f"[federation] max_sites = {sites} is too many for a complete graph, which joins at most {COMPLETE_UP_TO}. "
            f'Lower max_sites, or set graph = "{SEMI_HONEST}", whose guarantee holds against an honest-but-curious '
            "server only."
        )
    if ring_steps(bits, sites) < LEAST_RING_STEPS:
        yield (
            f"[federation] ring_bits = {bits} leaves a number {ring_steps(bits, sites)} steps to either side if the sums of "
            f"max_sites = {sites} sites must fit; at least {LEAST_RING_STEPS} are needed. Lower max_sites to "
            f"{ring_sites(bits)}, or set ring_bits = 32."
        )
    if bits == 16 and federation.update_bound is not None:
        yield (
            f"[federation] update_bound = {federation.update_bound:g} bounds the length of a whole update, but with "
            "ring_bits = 16 each number is bounded on its own. Remove update_bound, or set ring_bits = 32."
        )


def ring_steps(bits: int, sites: int) -> int:
    """Return the largest magnitude a ring entry may have, so that a sum over `sites` sites never wraps.

    It is the largest q with sites × (q + 1) ≤ 2^(bits - 1) - 1; the + 1 is what stochastic rounding may add.

    Args:
        bits: The width of the ring's integers.
        sites: How many vectors may be summed, at least 1.
    """
    return int(2 ** (bits - 1) - 1) // sites - 1


def ring_sites(bits: int) -> int:
    """Return how many sites a ring of so many bits has room for, each number having LEAST_RING_STEPS steps."""
    return int(2 ** (bits - 1) - 1) // (LEAST_RING_STEPS + 1)


def _template_faults(data: Data) -> Iterator[str]:
    try:
        columns = template_columns(data.template or "")
    except ValueError as error:
        yield f"[data] template is malformed: {error}. Write {{column}} for a column, {{{{ and }}}} for braces."
        return
    if not columns:
        yield "[data] template names no column: every row would have the same text. Write {column} for a column."
    for key in ("label", "answer"):
        if getattr(data, key) in columns:
            yield (
                f"[data] template shows the {key} column {getattr(data, key)!r}: the model would be shown the answer."
            )
    if data.person_id in columns:
        yield f"[data] template shows the person_id column {data.person_id!r}: the model would learn who is who."


@functools.cache
def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns a template names, in order, each once.

    Raises:
        ValueError: A brace is unbalanced, or a field has no name, a conversion or a format.
    """
    columns: dict[str, None] = {}
    for _, column, form, conversion in string.Formatter().parse(template):
        if column is None:
            continue
        if not column:
            raise ValueError("a pair of braces is empty")
        if form or conversion:
            raise ValueError(f"the field {{{column}}} carries a format or conversion, which plans do not have")
        columns[column] = None
    return tuple(columns)


def differences(old: Plan, new: Plan) -> list[tuple[str, str, str]]:
    """Return (key, old value, new value) for every setting in which two plans differ, `[compute]` included."""
    rows = [
        (key, str(getattr(old, key)), str(getattr(new, key)))
        for key in ("name", "purpose")
        if getattr(old, key) != getattr(new, key)
    ]
    for name, section in _SECTIONS.items():
        for field in dataclasses.fields(section):
            before, after = getattr(getattr(old, name), field.name), getattr(getattr(new, name), field.name)
            if before != after:
                rows.append((f"[{name}] {field.name}", _spelled(before), _spelled(after)))
    return rows


def _spelled(value: object) -> str:
    return "absent" if value is None else toml_value(value)


def starter(name: str, base: str, base_digest: str, targets: Sequence[str], kind: str = TEXT_CLASSES) -> str:
    """Return a commented plan that is valid as it stands: every key, its meaning, its range and its default.

    Args:
        name: The plan's name.
        base: The base model's public name.
        base_digest: The digest of the base model's files.
        targets: The modules that carry adapters.
        kind: The kind of task, one of SCORES; it decides which columns are named and whether there are labels.
    """
    lines = [
        "# A Confide plan: what is trained, on what, under which guarantee. Check it with: confide plan check",
        f'format = "{FORMAT}"',
        f"name = {toml_value(name)}",
        'purpose = "Say here, for those who approve it, why this is trained."',
    ]
    given: dict[str, object] = {"base": base, "base_digest": base_digest, "targets": targets, "kind": kind}
    given |= {column: column for column in _USUAL_COLUMNS[kind]}
    for section_name, section in _SECTIONS.items():
        lines += ["", f"[{section_name}]"]
        for field in dataclasses.fields(section):
            meaning: Meaning = field.metadata["meaning"]
            limit = f" ({meaning.limit})" if meaning.limit else ""
            lines.append(f"# {meaning.says}{limit}")
            wanted = field.default is dataclasses.MISSING or (field.name == "labels" and kind in CLASSES)
            value = given.get(field.name, meaning.example if wanted else field.default)
            lines.append(f"# {field.name} =" if value is None else f"{field.name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def reference() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (section, key, default, range, meaning) for every key, for the reference page."""
    return settings.reference(_SECTIONS)
