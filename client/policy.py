"""The policy: what a site's owner allows, as a strict TOML file on the site's own disk.

No plan and no message can change it. What it does not allow is refused: a list that is absent or empty allows nothing,
and a limit that is absent makes the file invalid, so that nobody relies on a number that was never chosen. What follows
from it for a plan or an offer is in `client/judgement`.

Secure aggregation has no key here, because nothing could switch it off: a site's update has no other way out.

The file is long because the keys and their reader are one list whose parts must not drift apart.
"""

import dataclasses
import datetime
import functools
import re
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from confide.common import plan as plans
from confide.common import settings
from confide.common.canonical import canonical_bytes, sha256
from confide.common.entries import PolicyInForce
from confide.common.errors import PrivacyError, UsageError
from confide.common.filter import MOST_EPSILON, Filter
from confide.common.graph import COMPLETE_UP_TO, SEMI_HONEST
from confide.common.roster import SITE_NAME
from confide.common.settings import Meaning, read_section, read_tree, setting, shown, toml_value

FORMAT = "confide-policy/1"
LARGEST_POLICY_BYTES = 1 << 18
LABEL_HISTOGRAM = "label-histogram"
METRICS = (LABEL_HISTOGRAM,)  # what may leave beside updates, if the policy names it
WORDS = (SEMI_HONEST,)  # what weakens the guarantee, and is allowed only by its name

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAMED_KEY = re.compile(rf"({SITE_NAME.pattern}) ([0-9a-f]{{64}})")
# A person's name has letters of any language, and nothing that turns a line around or cannot be seen.
_PERSON_KEY = re.compile(r"(\w(?:[\w .,'()-]{0,98}[\w.)])?) ([0-9a-f]{64})")
_LEAST_DIGITS = 8  # distinct ones in a key; fewer is a placeholder, and some of those are keys that anyone can sign for
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"([a-z,-]+) ([0-2][0-9]):([0-5][0-9])-([0-2][0-9]):([0-5][0-9])")
_DAY_MINUTES = 24 * 60
_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`[budget]`: what the persons of a data set may lose, by all plans together and by each."""

    epsilon: float = setting(
        "What all plans together may cost a person of a data set, over its whole life, as the Rényi filter counts.",
        above=0,
        at_most=MOST_EPSILON,
        example=12.0,
    )
    delta: float = setting(
        "The probability with which that epsilon may be exceeded.", at_least=1e-12, below=0.01, example=1e-5
    )
    plan_epsilon: float = setting(
        "The largest epsilon that one plan may ask for.", above=0, at_most=MOST_EPSILON, example=8.0
    )
    plan_delta: float = setting(
        "The largest delta that one plan may ask for.", at_least=1e-12, below=0.01, example=1e-5
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """`[privacy]`: the numbers a plan's guarantee follows from."""

    smallest_noise_multiplier: float = setting(
        "The smallest noise multiplier; it is computed from the plan, never taken from anybody's word.",
        above=0,
        at_most=10_000,
        example=0.5,
    )
    largest_sampling_rate: float = setting(
        "The largest probability with which a person takes part in a step.", above=0, at_most=1, example=0.1
    )
    largest_clip_norm: float = setting(
        "The largest length a person's gradient may be cut to; noise grows with it.", above=0, at_most=1e6, example=10.0
    )
    fewest_persons: int = setting(
        "The fewest persons a plan may ask of a site, and a data set may have.", at_least=2, at_most=10**9, example=100
    )
    most_rounds: int = setting("The most rounds of a plan.", at_least=1, at_most=100_000, example=100)
    most_steps_per_round: int = setting("The most steps of a round.", at_least=1, at_most=100_000, example=100)
    whole_persons: bool = setting(
        "Whether a plan must say which column tells whose row it is; without one, only single rows are protected.",
        default=True,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """`[training]`: how far a plan may move the weights; enormous ones would make rounding depend on rows."""

    largest_learning_rate: float = setting(
        "The largest step size, of adapter and head.", above=0, at_most=100, example=0.1
    )
    largest_server_learning_rate: float = setting(
        "The largest step size of the server.", above=0, at_most=100, example=1.0
    )
    largest_update_bound: float = setting(
        "The largest update_bound that a plan may name; 0 means that it follows from the plan's step sizes.",
        default=0.0,
        at_least=0,
        at_most=1e6,
    )
    largest_scale: float = setting("The largest alpha / rank of the adapter.", above=0, at_most=4096, example=8.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """`[federation]`: with whom this site sums, and with how many at least."""

    federations: tuple[str, ...] = setting(
        "The federations whose plans may be judged at all, by name.", default=(), at_most=1000, example=["heart-2030"]
    )
    fewest_cohort: int = setting(
        "The fewest sites, this one included, that are on the roster and asked for a round.",
        at_least=3,
        at_most=1000,
        example=3,
    )
    fewest_summed: int = setting(
        "The fewest sites whose sum may be opened: the plan's min_sites. More than two thirds of the roster always are.",
        at_least=3,
        at_most=1000,
        example=3,
    )
    known_sites: tuple[str, ...] = setting(
        "Other sites you know to be real, each as its name, a space and its key of 64 hexadecimal digits.",
        default=(),
        at_most=1000,
        example=["north-clinic " + "<64 hexadecimal digits>"],
    )
    fewest_known: int = setting(
        "The fewest known sites that must be asked beside this one; a roster can list sites that nobody ever saw.",
        default=0,
        at_least=0,
        at_most=1000,
    )
    key_agreements: tuple[str, ...] = setting(
        "How the boxes that carry key shares may be sealed.",
        default=(),
        at_most=10,
        example=[plans.X25519, plans.HYBRID],
    )
    words: tuple[str, ...] = setting(
        f"What is allowed although it weakens the guarantee: {SEMI_HONEST} lets sums of more than {COMPLETE_UP_TO} sites "
        "withstand an honest-but-curious server only.",
        default=(),
        at_most=10,
        example=[SEMI_HONEST],
    )

    @property
    def known(self) -> dict[bytes, str]:
        """The known sites: names by keys of 32 bytes."""
        return {bytes.fromhex(key): name for key, name in _named(self.known_sites).items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`[model]`: what may be trained."""

    base_digests: tuple[str, ...] = setting(
        "The base models allowed, by the digest of their files; a name alone says nothing.",
        default=(),
        at_most=1000,
        example=["sha256:" + "<64 hexadecimal digits>"],
    )
    quantizations: tuple[str, ...] = setting(
        "How the frozen base may be kept.", default=(), at_most=10, example=["none"]
    )
    most_tokens: int = setting("The most tokens of a text that are read.", at_least=2, at_most=8192, example=512)
    tasks: tuple[str, ...] = setting(
        "The kinds of task allowed.", default=(), at_most=100, example=[plans.TEXT_CLASSES]
    )
    methods: tuple[str, ...] = setting(
        "Which of the adapter's factors may be trained, by the plan's method.",
        default=(),
        at_most=100,
        example=[plans.FFA],
    )
    targets: tuple[str, ...] = setting(
        "The names of the modules that may carry adapters.", default=(), at_most=1000, example=["query", "value"]
    )
    largest_rank: int = setting("The largest rank of an adapter.", at_least=1, at_most=256, example=16)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """`[hours]`: when this site answers."""

    windows: tuple[str, ...] = setting(
        "When exchanges may begin, each as days, a space, and hours; hours that end before they begin reach into the next "
        "day.",
        default=(),
        at_most=100,
        example=["mon-fri 19:00-07:00", "sat,sun 00:00-24:00"],
    )
    time_zone: str = setting(
        "Whose clock that is: UTC, or a name of the time zone database such as Europe/Vienna.",
        default="UTC",
        at_least=1,
        at_most=100,
    )

    def allow(self, now: float) -> bool:
        """Return whether an exchange may begin at `now`, in seconds since 1970 UTC."""
        local = self._local(now)
        today, minute = local.weekday(), 60 * local.hour + local.minute
        for days, start, end in map(_window, self.windows):
            if start < end:
                if today in days and start <= minute < end:
                    return True
            elif (today in days and minute >= start) or ((today - 1) % 7 in days and minute < end):
                return True
        return False

    def shown(self, now: float) -> str:
        """Return what this clock shows at `now`, such as `mon 12:00 in UTC`."""
        local = self._local(now)
        return f"{_DAYS[local.weekday()]} {local:%H:%M} in {self.time_zone}"

    def _local(self, now: float) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(now, _zone(self.time_zone))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """`[compute]`: what a round may take of this machine; the agent ends what takes more."""

    devices: tuple[str, ...] = setting(
        "Where it may train; auto means the fastest there is.", default=(), at_most=10, example=["cpu"]
    )
    memory_mb: int = setting(
        "How much memory training may take, in MiB. The plan's rows and cache must fit, beside the base model and the "
        "libraries; the training process is ended if it takes more.",
        at_least=16,
        at_most=1 << 24,
        example=16_384,
    )
    round_s: int = setting(
        "The longest that training a round may take, in seconds.", at_least=1, at_most=7 * 86_400, example=3600
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """`[metrics]`: which statistics may leave beside updates; each is noised, and charged to the data's budget."""

    leave: tuple[str, ...] = setting(
        f"What may leave, of: {', '.join(METRICS)}.", default=(), at_most=100, example=[LABEL_HISTOGRAM]
    )
    smallest_noise_multiplier: float = setting(
        "The smallest noise it leaves with, over what one person can change.", above=0, at_most=10_000, example=10.0
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Approvals:
    """`[approval]`: who may approve a plan."""

    signatures: int = setting("How many persons must approve a plan.", choices=(1, 2), example=1)
    approvers: tuple[str, ...] = setting(
        "Who may, each as a name, a space and the person's key of 64 hexadecimal digits.",
        default=(),
        at_most=100,
        example=["Anna Huber " + "<64 hexadecimal digits>"],
    )
    most_days: int = setting("For how many days an approval may hold.", at_least=1, at_most=3660, example=90)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """`[renewal]`: whether a budget that is used up may begin anew; each renewal is signed, and needs a reason."""

    after_days: int = setting(
        "After how many days at least; 0 means never.", default=0, at_least=0, at_most=36_600, example=0
    )
    most: int = setting("How many times at most.", default=0, at_least=0, at_most=1000, example=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """`[answers]`: what an onlooker may learn from time."""

    hold_s: int = setting(
        "Answers are held back until so many seconds after the request, so that how long training took stays here; more than "
        "[compute] round_s, or 0, which sends them at once.",
        default=0,
        at_least=0,
        at_most=7 * 86_400,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a site's owner allows. Make one with `load_policy` or `read_policy`."""

    site: str
    budget: Budget
    privacy: Privacy
    training: Training
    federation: Federation
    model: Model
    hours: Hours
    compute: Compute
    metrics: Metrics
    approval: Approvals
    renewal: Renewal
    answers: Answers

    def canonical(self) -> bytes:
        """Return the policy's one spelling: all settings, defaults included; comments and order play no part."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}
        return canonical_bytes({"format": FORMAT, "site": self.site, **sections})

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical()`; the ledger records it."""
        return sha256(self.canonical())

    @property
    def approvers(self) -> dict[str, str]:
        """Who may approve: names by keys of 64 hexadecimal digits."""
        return _named(self.approval.approvers)

    def in_force(self) -> PolicyInForce:
        """Return what the ledger records of this policy, and judges later records by."""
        return _in_force(self)


@functools.lru_cache(maxsize=4)
def _in_force(policy: Policy) -> PolicyInForce:
    return PolicyInForce(
        digest=policy.digest,
        epsilon=policy.budget.epsilon,
        delta=policy.budget.delta,
        plan_epsilon=policy.budget.plan_epsilon,
        plan_delta=policy.budget.plan_delta,
        approvals_needed=policy.approval.signatures,
        approvers=tuple(policy.approvers),
        most_days=policy.approval.most_days,
        renewal_days=policy.renewal.after_days,
        most_renewals=policy.renewal.most,
        release_noise=policy.metrics.smallest_noise_multiplier if policy.metrics.leave else 0.0,
        words=policy.federation.words,
    )


_SECTIONS: dict[str, type] = {
    "budget": Budget,
    "privacy": Privacy,
    "training": Training,
    "federation": Federation,
    "model": Model,
    "hours": Hours,
    "compute": Compute,
    "metrics": Metrics,
    "approval": Approvals,
    "renewal": Renewal,
    "answers": Answers,
}


def load_policy(path: Path) -> Policy:
    """Read the policy in the file `path`.

    Raises:
        UsageError: There is no such file, it cannot be read, or it is no valid policy; all its faults are listed.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_POLICY_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Cannot read the policy {path}: {getattr(error, 'strerror', None) or error}. Without one, nothing is allowed."
        ) from None
    return read_policy(raw, str(path))


@functools.lru_cache(maxsize=4)  # an agent reads its policy before every message, and mostly it is the same
def read_policy(raw: bytes, where: str = "at hand") -> Policy:
    """Read a policy from the bytes of a TOML file.

    Args:
        raw: The bytes.
        where: Where they are from, for messages.

    Raises:
        UsageError: They are no valid policy; all faults are listed.
    """
    faults: list[str] = []
    policy = _read(raw, faults)
    if policy is None or faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UsageError("\n".join([f"The policy {where} has {count}, so it allows nothing:", *faults]))
    return policy


def starter(site: str, given: Mapping[str, object] = _NOTHING) -> str:
    """Return a commented policy that is valid as it stands and allows nothing but what is given: every list is empty.

    Args:
        site: The site's name.
        given: Values by section and key, such as `budget.epsilon`; limits that are not given have their examples.

    Raises:
        UsageError: `site` is no site's name.
    """
    if not SITE_NAME.fullmatch(site):
        raise UsageError(f"The site's name {site!r} is not 1 to 63 letters, digits, spaces and . _ -. Choose another.")
    lines = [
        "# A Confide policy: what this site allows. What is not allowed here is refused, whoever asks.",
        f'format = "{FORMAT}"',
        f"site = {toml_value(site)}",
    ]
    for name, section in _SECTIONS.items():
        lines += ["", f"[{name}]"]
        for field in dataclasses.fields(section):
            meaning: Meaning = field.metadata["meaning"]
            required = field.default is dataclasses.MISSING
            value = given.get(f"{name}.{field.name}", meaning.example if required else field.default)
            limit = f" ({meaning.limit})" if meaning.limit else ""
            lines.append(f"# {meaning.says}{limit}")
            if value == () and meaning.example:
                lines.append(f"# For example: {field.name} = {toml_value(meaning.example)}")
            lines.append(f"{field.name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def reference() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (section, key, default, range, meaning) for every key, for the reference page."""
    return settings.reference(_SECTIONS)


def approver_entry(name: str, key: bytes) -> str:
    """Return what stands in [approval] approvers for a person and her key of 32 bytes.

    Raises:
        UsageError: The name is none that may stand there.
    """
    entry = f"{name} {key.hex()}"
    if not _PERSON_KEY.fullmatch(entry):
        raise UsageError(
            f"{shown(name)} is no person's name: 1 to 100 letters of any language, digits, spaces and . , ' ( ) - are allowed, "
            "the first a letter or digit."
        )
    return entry


def spelled_key(dotted: str) -> str:
    """Spell `privacy.rounds` as a person finds it in the file: `[privacy] rounds`."""
    section, _, key = dotted.partition(".")
    return f"[{section}] {key}"


def _read(raw: bytes, faults: list[str]) -> Policy | None:
    """Return the policy, and append what is wrong with it to `faults`."""
    try:
        if len(raw) > LARGEST_POLICY_BYTES:
            raise ValueError(f"It has more than {LARGEST_POLICY_BYTES} bytes.")
        tree = read_tree(raw, subject="It", kind="a policy")
    except ValueError as error:
        faults.append(str(error))
        return None
    site = tree.get("site")
    if tree.get("format") != FORMAT:
        faults.append(f'The policy must begin with format = "{FORMAT}"; it has {shown(tree.get("format", ""))}.')
    if not isinstance(site, str) or not SITE_NAME.fullmatch(site):
        faults.append(f"site = {shown(site or '')} must be 1 to 63 letters, digits, spaces and . _ -; it is this site.")
    for key in sorted(set(tree) - {"format", "site", *_SECTIONS}):
        faults.append(f"The policy has no section or key {key!r}. {_meant(key, _SECTIONS)}")
    sections: dict[str, object] = {}
    for name, section in _SECTIONS.items():
        table = tree.get(name, {})
        if isinstance(table, dict):
            sections[name] = found = read_section(section, name, table, faults)
            faults += [] if found is None else _entry_faults(name, found)
        else:
            faults.append(f"{name!r} must be a table: write [{name}] on a line of its own.")
    if faults:
        return None
    policy = Policy(site=site, **sections)  # type: ignore[arg-type]
    faults += _contradictions(policy)
    return policy


def _of(section: type, key: str) -> tuple[str, ...]:
    """Return what a plan's key may be."""
    meaning: Meaning = next(field.metadata["meaning"] for field in dataclasses.fields(section) if field.name == key)
    return tuple(map(str, meaning.choices))


# Lists whose entries are names that this version knows; a misspelt one would allow nothing, and nobody would know why.
_KNOWN: dict[str, tuple[str, ...]] = {
    "federation.key_agreements": _of(plans.Federation, "key_agreement"),
    "federation.words": WORDS,
    "model.quantizations": _of(plans.Model, "quantization"),
    "model.tasks": _of(plans.Task, "kind"),
    "model.methods": _of(plans.Adapter, "method"),
    "compute.devices": _of(plans.Compute, "device"),
    "metrics.leave": METRICS,
}
_FORMS = {
    "federation.federations": (SITE_NAME, "a federation's name: 1 to 63 letters, digits, spaces and . _ -"),
    "federation.known_sites": (_NAMED_KEY, "a site's name, a space, and its key of 64 hexadecimal digits"),
    "model.base_digests": (_DIGEST, "sha256: and 64 hexadecimal digits, as `confide plan new --model DIR` prints it"),
    "approval.approvers": (_PERSON_KEY, "a person's name, a space, and the person's key of 64 hexadecimal digits"),
}


def _entry_faults(name: str, section: object) -> Iterator[str]:
    """Yield what is wrong with the entries of a section's lists."""
    for key, known in _KNOWN.items():
        for entry in _entries(name, section, key):
            if entry not in known:
                yield f"{spelled_key(key)} holds {shown(entry)}, which is not one of {', '.join(known)}. {_meant(entry, known)}"
    for key, (form, says) in _FORMS.items():
        entries = _entries(name, section, key)
        yield from (
            f"{spelled_key(key)} holds {shown(entry)}, which is not {says}."
            for entry in entries
            if not form.fullmatch(entry)
        )
        if form in {_NAMED_KEY, _PERSON_KEY} and all(map(form.fullmatch, entries)):
            yield from _named_faults(spelled_key(key), entries)
    if isinstance(section, Hours):
        yield from _hours_faults(section)


def _entries(name: str, section: object, key: str) -> tuple[str, ...]:
    """Return the list that `key` stands for if it is in this section, else none."""
    of, _, field = key.partition(".")
    entries: tuple[str, ...] = getattr(section, field) if of == name else ()
    return entries


def _named_faults(key: str, entries: tuple[str, ...]) -> Iterator[str]:
    names = [entry[:-65].lower() for entry in entries]
    if len(set(names)) < len(names) or len(_named(entries)) < len(entries):
        yield f"{key} names a person or site twice, or one key for two. Two of them must be two."
    for entry in entries:
        if len(set(entry[-64:])) < _LEAST_DIGITS:
            yield f"{key} holds {shown(entry[:-65])} with a placeholder instead of a key. Write the key itself."


def _hours_faults(hours: Hours) -> Iterator[str]:
    for entry in hours.windows:
        try:
            _window(entry)
        except ValueError:
            yield (
                f"[hours] windows holds {shown(entry)}, which is not days and hours. Write for example: "
                '"mon-fri 19:00-07:00" or "sat,sun 00:00-24:00".'
            )
    try:
        _zone(hours.time_zone)
    except ValueError:
        yield (
            f"[hours] time_zone = {shown(hours.time_zone)} is no time zone that this machine knows. Write UTC, or a name such "
            "as Europe/Vienna."
        )


def _contradictions(policy: Policy) -> Iterator[str]:
    """Yield what is wrong between settings that are each fine alone."""
    budget, federation, approval, renewal = policy.budget, policy.federation, policy.approval, policy.renewal
    hold_s, round_s = policy.answers.hold_s, policy.compute.round_s
    for key in ("epsilon", "delta"):
        one, all_of_them = getattr(budget, f"plan_{key}"), getattr(budget, key)
        if one > all_of_them:
            yield f"[budget] plan_{key} = {one:g} exceeds {key} = {all_of_them:g}, which is for all plans together. Lower it."
    try:
        Filter(epsilon=budget.epsilon, delta=budget.delta)
    except PrivacyError as error:
        yield f"[budget] leaves no room for any plan. {error}"
    if budget.delta * policy.privacy.fewest_persons >= 1:
        yield (
            f"[budget] delta = {budget.delta:g} is not below 1 / [privacy] fewest_persons = "
            f"{1 / policy.privacy.fewest_persons:g}: publishing a person's rows outright would count as private. Lower delta."
        )
    if federation.fewest_known > len(federation.known_sites):
        yield (
            f"[federation] fewest_known = {federation.fewest_known} exceeds the {len(federation.known_sites)} known_sites. Add "
            "sites whose keys you have compared, or lower it."
        )
    if 0 < len(approval.approvers) < approval.signatures:
        yield (
            f"[approval] signatures = {approval.signatures} exceeds the {len(approval.approvers)} approvers. Add another "
            "person, or lower it."
        )
    if 0 < hold_s <= round_s:
        yield (
            f"[answers] hold_s = {hold_s} is not above [compute] round_s = {round_s}: what takes longer than hold_s is answered "
            "later, and tells so. Raise hold_s, lower round_s, or set hold_s to 0."
        )
    if bool(renewal.after_days) != bool(renewal.most):
        yield (
            f"[renewal] after_days = {renewal.after_days} and most = {renewal.most}: one without the other has no effect. Set "
            "both, or both to 0."
        )


def _named(entries: Iterable[str]) -> dict[str, str]:
    """Return names by keys, of entries that are each a name, a space and a key."""
    return {entry[-64:]: entry[:-65] for entry in entries}


@functools.cache
def _window(entry: str) -> tuple[frozenset[int], int, int]:
    """Return the days, from 0 for Monday, and the minutes of the day at which it opens and closes.

    Raises:
        ValueError: It is none.
    """
    parts = _WINDOW.fullmatch(entry)
    if parts is None:
        raise ValueError(entry)
    days: set[int] = set()
    for part in parts[1].split(","):
        first, dash, last = part.partition("-")
        start, end = _DAYS.index(first), _DAYS.index(last if dash else first)
        days |= {(start + step) % 7 for step in range((end - start) % 7 + 1)}
    opens, closes = 60 * int(parts[2]) + int(parts[3]), 60 * int(parts[4]) + int(parts[5])
    if opens >= _DAY_MINUTES or closes > _DAY_MINUTES or opens == closes:
        raise ValueError(entry)
    return frozenset(days), opens, closes


def _zone(name: str) -> datetime.tzinfo:
    """Return a time zone.

    Raises:
        ValueError: This machine knows none of that name.
    """
    if name == "UTC":  # known where no database is installed
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, OSError):
        raise ValueError(name) from None


def _meant(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(names)}."
