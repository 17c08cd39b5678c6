"""The policy: the file that says what a site's owner allows is read strictly, and allows nothing that is not in it."""

import dataclasses
import math
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.client.judgement import judge_hours, judge_plan, judge_release
from confide.client.policy import (
    LABEL_HISTOGRAM,
    LARGEST_POLICY_BYTES,
    Policy,
    approver_entry,
    load_policy,
    read_policy,
    reference,
    starter,
)
from confide.common import plan as plans
from confide.common.errors import UsageError
from tests.policies import APPROVERS, DIGEST, HERE, NARROW, NOON, PLAN, key, policy, spelled, text


def test_a_starter_is_valid_and_allows_nothing_until_it_is_edited() -> None:
    begun = read_policy(starter("St. Anna").encode())

    found = judge_plan(begun, PLAN, **HERE)

    assert {"base-model", "compute", "federation", "targets", "task"} <= {refusal.rule for refusal in found}
    assert any(judge_hours(begun, NOON + 3600.0 * hour) == () for hour in range(7 * 24)) is False
    assert judge_release(begun.metrics, LABEL_HISTOGRAM, 1e4) != ()
    assert begun.approvers == {}
    assert begun.in_force().approvers == ()


def test_a_starter_shows_every_key_with_its_meaning() -> None:
    lines = starter("St. Anna").splitlines()

    for section, name, _, _, says in reference():
        place = next(
            number
            for number, line in enumerate(lines)
            if line.startswith(f"{name} =") and f"# {says}" in "\n".join(lines)
        )
        assert lines[place - 1].startswith("#"), (section, name)
    assert [line[1:-1] for line in lines if line.startswith("[")] == list(
        dict.fromkeys(section for section, *_ in reference())
    )


@pytest.mark.parametrize("site", ["", "../etc", "a\nb", " a", "ä" * 3, 'a"b'])
def test_a_starter_for_what_is_no_sites_name_is_refused(site: str) -> None:
    with pytest.raises(UsageError, match="is not 1 to 63 letters"):
        starter(site)


def test_the_ledger_is_told_what_it_judges_by() -> None:
    found = policy(
        approval__signatures=2, renewal__after_days=365, renewal__most=2, federation__words=["semi_honest_graph"]
    )

    entry = found.in_force()

    assert entry.digest == found.digest
    assert (entry.epsilon, entry.delta) == (found.budget.epsilon, 1e-5)
    assert (entry.plan_epsilon, entry.plan_delta) == (8.0, 1e-5)
    assert entry.approvals_needed == 2
    assert entry.approvers == (key(101).hex(), key(102).hex())
    assert (entry.renewal_days, entry.most_renewals) == (365, 2)
    assert entry.words == ("semi_honest_graph",)


OTHERS: dict[str, Any] = {
    "answers__hold_s": 3601,
    "federation__known_sites": [f"north {key(3).hex()}"],
    "metrics__leave": [LABEL_HISTOGRAM],
    "federation__words": ["semi_honest_graph"],
    "hours__time_zone": "Europe/Vienna",
    "privacy__whole_persons": False,
}


def test_the_digest_covers_every_setting_and_no_comment() -> None:
    digests = {policy().digest, policy(site="north").digest}
    refused = set()
    for section, name, *_ in reference():
        dotted = f"{section}__{name}"
        new = OTHERS[dotted] if dotted in OTHERS else other_than(NARROW[section][name])
        try:
            digests.add(policy(**{dotted: new}).digest)
        except UsageError:
            refused.add(dotted)

    in_pairs = {"budget__delta", "federation__fewest_known", "renewal__after_days", "renewal__most"}
    assert refused == in_pairs
    assert len(digests) == 2 + sum(1 for _ in reference()) - len(in_pairs)
    assert (
        policy(renewal__after_days=9, renewal__most=1).digest != policy(renewal__after_days=9, renewal__most=2).digest
    )
    assert read_policy(("# a comment\n" + text() + "\n\n").encode()).digest == policy().digest


def other_than(value: Any) -> object:
    if isinstance(value, list):
        return value[:-1]
    return value + 1 if isinstance(value, int) else value * 0.99 or 1.0


ALL_AT_ONCE = """
format = "confide-policy/2"
site = "../here"
lucky = 7
[budgte]
[privacy]
largest_sampling_rate = 2
most_round = 3
[approval]
signatures = 3
"""


def test_all_faults_are_told_at_once_with_the_files_path_and_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(ALL_AT_ONCE, encoding="utf-8")

    with pytest.raises(UsageError) as fault:
        load_policy(path)

    for words in (
        f"The policy {path} has ",
        'must begin with format = "confide-policy/1"; it has "confide-policy/2"',
        'site = "../here" must be',
        "no section or key 'lucky'. Known are: ",
        "no section or key 'budgte'. Did you mean 'budget'?",
        "[budget] lacks 'epsilon'",
        "largest_sampling_rate = 2 is outside its range (above 0, at most 1)",
        "[privacy] has no key 'most_round'. Did you mean 'most_rounds'?",
        "signatures = 3 is not one of 1, 2",
    ):
        assert words in str(fault.value)


FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "a limit left out": ({"privacy__most_rounds": None}, "[privacy] lacks 'most_rounds'"),
    "a number as text": ({"privacy__most_rounds": "10"}, "is not a number"),
    "a list as text": ({"model__tasks": "regression"}, "is not a list"),
    "an entry twice": ({"model__targets": ["query", "query"]}, "names an entry twice"),
    "a task misspelt": ({"model__tasks": ["regresion"]}, "Did you mean 'regression'?"),
    "a method misspelt": ({"model__methods": ["share_a"]}, "Did you mean 'share-a'?"),
    "an unknown word": ({"federation__words": ["insecure_no_noise"]}, "which is not one of semi_honest_graph"),
    "an unknown metric": ({"metrics__leave": ["losses"]}, "which is not one of label-histogram"),
    "an unknown device": ({"compute__devices": ["gpu"]}, "Did you mean 'cpu'?"),
    "an unknown key agreement": ({"federation__key_agreements": ["x448"]}, "which is not one of x25519"),
    "an unknown quantization": ({"model__quantizations": ["int4"]}, "which is not one of none, nf4"),
    "a digest without its kind": ({"model__base_digests": ["0" * 64]}, "is not sha256: and 64 hexadecimal"),
    "a digest in capitals": ({"model__base_digests": ["sha256:" + "A" * 64]}, "is not sha256: and 64 hexadecimal"),
    "a federation's name": ({"federation__federations": ["a/b"]}, "is not a federation's name"),
    "an approver whose name turns the line around": (
        {"approval__approvers": ["Anna \u202eneB " + key(9).hex()]},
        "is not a person's name, a space",
    ),
    "an approver without a name": ({"approval__approvers": [key(9).hex()]}, "is not a person's name, a space"),
    "an approver's short key": ({"approval__approvers": ["Anna 0123"]}, "is not a person's name, a space"),
    "an approver's placeholder": ({"approval__approvers": ["Anna " + "0" * 64]}, "placeholder instead of a key"),
    "a key that anyone can sign for": ({"approval__approvers": ["Anna 01" + "00" * 31]}, "placeholder"),
    "one person with two keys": (
        {"approval__approvers": [f"Anna {key(8).hex()}", f"anna {key(9).hex()}"]},
        "Two of them must be two",
    ),
    "one key for two persons": (
        {"approval__approvers": [f"Anna {key(9).hex()}", f"Ben {key(9).hex()}"]},
        "Two of them must be two",
    ),
    "two signatures of one person": (
        {"approval__signatures": 2, "approval__approvers": list(APPROVERS[:1])},
        "signatures = 2 exceeds the 1 approvers",
    ),
    "a plan beyond the lifetime": ({"budget__plan_epsilon": 90.0}, "plan_epsilon = 90 exceeds epsilon"),
    "a plan's delta beyond the lifetime": ({"budget__plan_delta": 1e-4}, "plan_delta = 0.0001 exceeds delta"),
    "a delta that publishes persons": ({"budget__delta": 0.002}, "not below 1 / [privacy] fewest_persons"),
    "a budget without room": (
        {"budget__epsilon": 1e-4, "budget__plan_epsilon": 1e-4},
        "[budget] leaves no room for any plan",
    ),
    "an infinite limit": ({"training__largest_scale": math.inf}, "is not a finite number"),
    "known sites that are not there": ({"federation__fewest_known": 1}, "exceeds the 0 known_sites"),
    "renewals without days": ({"renewal__most": 1}, "one without the other has no effect"),
    "days without renewals": ({"renewal__after_days": 1}, "one without the other has no effect"),
    "no cohort": ({"federation__fewest_cohort": 2}, "outside its range (at least 3"),
    "no such zone": ({"hours__time_zone": "Mars/Olympus"}, "is no time zone that this machine knows"),
    "a part of the world": ({"hours__time_zone": "Europe"}, "is no time zone that this machine knows"),
    "a zone outside the database": ({"hours__time_zone": "../../etc/passwd"}, "is no time zone"),
    **{
        f"the window {window!r}": ({"hours__windows": [window]}, "which is not days and hours")
        for window in (
            "always",
            "mon 9:00-17:00",
            "mon 09:00-24:01",
            "mon 24:00-06:00",
            "mon 09:00-09:00",
            "mon 09:60-10:00",
            "mon-09:00",
            "monday 09:00-10:00",
            "mon, tue 09:00-10:00",
            "mon-tue-wed 09:00-10:00",
            ", 09:00-10:00",
            "mon 09:00-29:00",
            "mon 09:00-10:00\n",
        )
    },
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_policy_with_a_fault_allows_nothing_and_says_what_is_wrong(case: str) -> None:
    settings, words = FAULTS[case]

    with pytest.raises(UsageError) as fault:
        policy(**settings)

    assert words in str(fault.value)
    assert "so it allows nothing" in str(fault.value)


RAW: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", 'must begin with format = "confide-policy/1"'),
    "no text": (b"\xff\xfe", "not UTF-8"),
    "no TOML": (b"format = ", "not valid TOML"),
    "too large": (b"#" * (LARGEST_POLICY_BYTES + 1), "more than 262144 bytes"),
    "a deep key": (b"a" + b".a" * 50_000 + b" = 1", "nested too deeply"),
    "a deep list": (b"a = " + b"[" * 50_000, "nested too deeply"),
    "a long number": (b"a = " + b"9" * 5000, "too many digits"),
    "a section that is none": (b"budget = 7", "'budget' must be a table: write [budget]"),
    "a plan": (plans.starter("heart", "tiny", DIGEST, ["query"]).encode(), "no section or key 'adapter'"),
}


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_are_no_policy_are_refused_in_words(case: str) -> None:
    raw, words = RAW[case]

    with pytest.raises(UsageError, match="so it allows nothing") as fault:
        read_policy(raw)

    assert words in str(fault.value)


@pytest.mark.parametrize("name", ["Anna Huber", "Dr. Zoë O'Hara-Müller", "王小明", "Ольга П.", "Ben Ito (deputy)"])
def test_an_approver_may_have_a_name_of_any_language(name: str) -> None:
    found = policy(approval__approvers=[approver_entry(name, key(9))])

    assert found.approvers == {key(9).hex(): name}


def test_answers_are_held_for_longer_than_a_round_may_take_or_not_at_all() -> None:
    for hold_s in (0, 3601):
        assert policy(answers__hold_s=hold_s, compute__round_s=3600).answers.hold_s == hold_s

    for hold_s in (1, 3600):
        with pytest.raises(UsageError, match=rf"hold_s = {hold_s} is not above \[compute\] round_s = 3600"):
            policy(answers__hold_s=hold_s, compute__round_s=3600)


def test_a_policy_that_is_not_there_allows_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "\0"):
        with pytest.raises(UsageError, match=r"Cannot read the policy .* nothing is allowed"):
            load_policy(path)


def test_a_policy_is_read_from_its_file_as_it_is_from_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("\ufeff" + text(), encoding="utf-8")

    assert load_policy(path) == policy()


@settings(max_examples=300)
@given(strategies.data())
def test_no_bytes_make_the_reader_fail_in_another_way_than_in_words(data: strategies.DataObject) -> None:
    raw = bytearray(text().encode())
    for _ in range(data.draw(strategies.integers(1, 4))):
        place = data.draw(strategies.integers(0, len(raw) - 1))
        raw[place : place + data.draw(strategies.integers(0, 3))] = data.draw(strategies.binary(max_size=6))

    try:
        found = read_policy(bytes(raw))
    except UsageError:
        return
    assert read_policy(found_text(found).encode()) == found


def found_text(found: Policy) -> str:
    """Spell a policy that was read."""
    sections = {section: dataclasses.asdict(getattr(found, section)) for section, *_ in reference()}
    return spelled({"format": "confide-policy/1", "site": found.site, **sections})


VALUES = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(),
    strategies.floats(),
    strategies.text(
        alphabet=strategies.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=80
    ).filter(lambda word: word.isprintable()),
    strategies.lists(strategies.text(alphabet="abcdef0123456789:- /.,", max_size=75), max_size=3),
    strategies.lists(strategies.integers(), max_size=2),
)


@settings(max_examples=300)
@given(strategies.dictionaries(strategies.sampled_from([f"{s}__{k}" for s, k, *_ in reference()]), VALUES, max_size=5))
def test_no_value_makes_the_reader_fail_in_another_way_than_in_words(values: dict[str, object]) -> None:
    try:
        found = policy(**values)
    except UsageError:
        return
    for section, name, *_ in reference():
        value = attrgetter(f"{section}.{name}")(found)
        wanted = values.get(f"{section}__{name}", NARROW[section][name])
        assert wanted is None or value == (tuple(wanted) if isinstance(wanted, list) else wanted)
