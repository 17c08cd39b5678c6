"""The plan: what is refused and why, and what its digest covers."""

import dataclasses
import hashlib
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from confide.common.errors import PlanError, UsageError
from confide.common.explain import explain
from confide.common.plan import (
    LARGEST_PLAN_BYTES,
    LEAST_RING_STEPS,
    SCORES,
    Plan,
    differences,
    load_plan,
    read_plan,
    reference,
    ring_sites,
    ring_steps,
    starter,
    template_columns,
)
from confide.common.settings import Meaning, toml_value

STARTER = starter("demo", "tiny-bert", "sha256:" + "0" * 64, ["query", "value"])
STARTERS = {kind: starter("demo", "tiny", "sha256:" + "0" * 64, ["query"], kind) for kind in SCORES}
PINNED_DIGEST = "sha256:1eb0850199b6c55245ac0924f0373b93f689159dbc0826e601527127eb7cd76e"
SECTIONS = [field.name for field in dataclasses.fields(Plan) if field.name not in {"name", "purpose"}]

Edit = Callable[[str], str]


def put(key: str, value: str) -> Edit:
    """Set the starter's `key`, commented out or not, to `value` as TOML spells it."""
    return line(key, f"{key} = {value}\n")


def drop(key: str) -> Edit:
    return line(key, "")


def deep(key: str) -> Edit:
    return line(key, key + ".a" * 3000 + " = 1\n")


def line(key: str, new: str) -> Edit:
    def edit(text: str) -> str:
        changed, count = re.subn(rf"(?m)^(# )?{key} =.*\n", lambda _: new, text, count=1)
        assert count == 1, key
        return changed

    return edit


def under(section: str, new: str) -> Edit:
    return lambda text: text.replace(f"[{section}]\n", f"[{section}]\n{new}\n", 1)


def at_the_head(new: str) -> Edit:
    return lambda text: f"{new}\n{text}"


def both(*edits: Edit) -> Edit:
    def edit(text: str) -> str:
        for one in edits:
            text = one(text)
        return text

    return edit


def templated(value: str) -> Edit:
    return both(drop("text"), put("template", value))


def compute_is(new: str) -> Edit:
    return lambda text: new + text.partition("[compute]")[0]


MALFORMED: dict[str, tuple[Edit, str]] = {
    # The head.
    "another version": (put("format", '"confide-plan/2"'), '"confide-plan/1"; it has "confide-plan/2"'),
    "no format": (drop("format"), 'must begin with format = "confide-plan/1"'),
    "format no text": (put("format", "1"), "it has 1."),
    "format too long to show": (deep("format"), "nested too deeply"),
    "name in capitals": (put("name", '"Demo"'), 'name = "Demo" must be 1 to 63'),
    "name with a line break": (put("name", '"demo\\n"'), "must be 1 to 63"),
    "name too long": (put("name", f'"{"a" * 64}"'), "must be 1 to 63"),
    "no name": (drop("name"), "must be 1 to 63"),
    "name a deep table": (deep("name"), "nested too deeply"),
    "purpose empty": (put("purpose", '""'), "purpose must be a text of 1 to 2000"),
    "purpose too long": (put("purpose", f'"{"a" * 2001}"'), "purpose must be a text of 1 to 2000"),
    "purpose a number": (put("purpose", "7"), "purpose must be a text of 1 to 2000"),
    "purpose with a terminal's escape": (put("purpose", '"\\u001b[2J"'), "purpose holds a control character"),
    "purpose with a C1 control": (put("purpose", '"\\u009b2J"'), "purpose holds a control character"),
    "unknown section": (lambda text: text + "\n[extras]\n", "no section or key 'extras'. Known sections: model,"),
    "unknown key at the head": (at_the_head("epsilon = 1"), "no section or key 'epsilon'"),
    "section a number": (compute_is("compute = 1\n"), "'compute' must be a table: write [compute]"),
    "section a list": (compute_is("compute = [{ threads = 1 }]\n"), "'compute' must be a table: write [compute]"),
    # Keys.
    "key misspelt": (line("rank", "rnak = 8\n"), "[adapter] has no key 'rnak'. Did you mean 'rank'?"),
    "key of nothing near": (under("compute", "zzz = 1"), "no key 'zzz'. Known keys: device, threads, micro_batch"),
    "key in another section": (under("training", "epsilon = 8.0"), "[training] has no key 'epsilon'"),
    "epsilon missing": (drop("epsilon"), "[privacy] lacks 'epsilon': What a person's whole"),
    "required text missing": (drop("base"), "[model] lacks 'base': The base model's public name, for people;"),
    "required list missing": (drop("targets"), 'for example: targets = ["query", "value"].'),
    # Types.
    "a number for a text": (put("label", "1"), "[data] label = 1 is not text in quotes"),
    "a deep table for a text": (deep("label"), "nested too deeply"),
    "a text for a number": (put("epsilon", '"8"'), '[privacy] epsilon = "8" is not a number'),
    "a bool for a number": (put("epsilon", "true"), "[privacy] epsilon = true is not a number"),
    "a bool for a whole number": (put("rank", "true"), "[adapter] rank = true is not a number"),
    "a float for a whole number": (put("rounds", "10.0"), "[privacy] rounds = 10.0 is not a whole number"),
    "a date for a number": (put("alpha", "2024-01-31"), "[adapter] alpha = 2024-01-31 is not a number"),
    "a number for a bool": (put("cache_prefix", "1"), "[compute] cache_prefix = 1 is not true or false"),
    "a text for a bool": (put("cache_prefix", '"true"'), '[compute] cache_prefix = "true" is not true or false'),
    "a text for a list": (put("targets", '"query"'), '[adapter] targets = "query" is not a list'),
    "a table for a list": (put("labels", "{ a = 1 }"), "[task] labels = {'a': 1} is not a list"),
    "a number in a list": (put("labels", '["a", 1]'), "holds an entry that is not text in quotes"),
    "a list in a list": (put("labels", '["a", ["b"]]'), "holds an entry that is not text in quotes"),
    "an empty text in a list": (put("labels", '["a", ""]'), "holds an entry that has 0 characters"),
    # Ranges.
    "epsilon zero": (put("epsilon", "0"), "epsilon = 0 is outside its range (above 0, at most 100)"),
    "epsilon negative": (put("epsilon", "-1.0"), "epsilon = -1.0 is outside its range"),
    "epsilon nan": (put("epsilon", "nan"), "epsilon = nan is not a finite number"),
    "epsilon infinite": (put("epsilon", "inf"), "epsilon = inf is not a finite number"),
    "epsilon minus infinite": (put("epsilon", "-inf"), "epsilon = -inf is not a finite number"),
    "epsilon beyond float": (put("epsilon", "9" * 400), "is outside its range (above 0, at most 100)"),
    "rank of 5000 hexadecimal digits": (put("rank", "0x" + "f" * 5000), "rank = (too long to show) is outside"),
    "rank of 5000 digits": (put("rank", "9" * 5000), "holds a number of too many digits"),
    "delta too small": (put("delta", "1e-13"), "delta = 1e-13 is outside its range (at least 1e-12, below 0.01)"),
    "delta too large": (put("delta", "0.01"), "delta = 0.01 is outside its range"),
    "sampling rate above one": (put("sampling_rate", "1.001"), "sampling_rate = 1.001 is outside its range"),
    "clip norm zero": (put("clip_norm", "0.0"), "clip_norm = 0.0 is outside its range"),
    "no rounds": (put("rounds", "0"), "rounds = 0 is outside its range"),
    "one person": (put("min_persons", "1"), "min_persons = 1 is outside its range"),
    "two sites": (put("min_sites", "2"), "min_sites = 2 is outside its range (at least 3"),
    "momentum one": (put("server_momentum", "1.0"), "server_momentum = 1.0 is outside its range (at least 0, below 1)"),
    "update bound zero": (put("update_bound", "0"), "update_bound = 0 is outside its range"),
    "ring of 24 bits": (put("ring_bits", "24"), "[federation] ring_bits = 24 is not one of 32, 16. It means:"),
    "ring of no whole bits": (put("ring_bits", "16.0"), "[federation] ring_bits = 16.0 is not a whole number"),
    "ring of true bits": (put("ring_bits", "true"), "[federation] ring_bits = true is not a number"),
    "ring of bits in quotes": (put("ring_bits", '"16"'), '[federation] ring_bits = "16" is not a number'),
    "ring of too many bits": (put("ring_bits", "9" * 400), "is not one of 32, 16"),
    "seed negative": (put("seed", "-1"), "seed = -1 is outside its range"),
    "seed beyond 63 bits": (put("seed", str(2**63)), "is outside its range"),
    # Texts and lists.
    "an unknown choice": (put("score", '"f1"'), '[task] score = "f1" is not one of accuracy, auroc, macro-f1, mae, p'),
    "key agreement unknown": (put("key_agreement", '"x25518"'), "is not one of x25519, x25519+ml-kem-768 (did you"),
    "graph unknown": (
        put("graph", '"sparse"'),
        '[federation] graph = "sparse" is not one of complete, semi_honest_graph',
    ),
    "a choice misspelt": (put("optimizer", '"adan"'), "is not one of adam, sgd (did you mean 'adam'?)"),
    "a control character": (put("label", '"la\\u0000bel"'), "holds a control character"),
    "a control character in a list": (put("labels", '["a", "\\u001b[31m"]'), "an entry that holds a control character"),
    "a delete character": (put("text", '"te\\u007fxt"'), "holds a control character"),
    "text too short": (put("label", '""'), "has 0 characters, and needs at least 1"),
    "text too long": (put("label", f'"{"a" * 201}"'), "has 201 characters, and may have at most 200"),
    "one label": (put("labels", '["only"]'), "has 1 entries, and needs at least 2"),
    "too many labels": (
        put("labels", str([f"l{i}" for i in range(10_001)])),
        "10001 entries, and may have at most 10000",
    ),
    "too many targets": (put("targets", str([f"t{i}" for i in range(33)])), "has 33 entries, and may have at most 32"),
    "a label twice": (put("labels", '["a", "b", "a"]'), "names an entry twice"),
    "a target twice": (put("targets", '["query", "query"]'), "names an entry twice"),
    # What is no plan at all.
    "not TOML": (at_the_head("what?"), "The plan is not valid TOML"),
    "a key twice": (under("privacy", "epsilon = 8.0"), "The plan gives a key or a section twice (at line"),
    "a section twice": (lambda text: text + "\n[privacy]\n", "The plan gives a key or a section twice (at line"),
    "an unpaired surrogate": (put("label", '"\\ud800"'), "The plan is not valid TOML"),
    "too large": (lambda text: text + "#" * LARGEST_PLAN_BYTES, "bytes, and may have at most 1048576"),
    "nested deeply": (put("label", "[" * 5000 + "]" * 5000), "The plan is nested too deeply"),
    # Contradictions.
    "digest without its name": (put("base_digest", f'"{"0" * 64}"'), "base_digest must be sha256: and 64 hexadecimal"),
    "digest in capitals": (put("base_digest", f'"sha256:{"A" * 64}"'), "base_digest must be sha256: and 64"),
    "digest too short": (put("base_digest", f'"sha256:{"0" * 63}"'), "base_digest must be sha256: and 64"),
    "digest with a line break": (put("base_digest", f'"sha256:{"0" * 64}\\n"'), "base_digest must be sha256: and 64"),
    "neither text nor template": (drop("text"), "needs exactly one of `text` (a column) and `template`"),
    "text and template": (put("template", '"{age}"'), "needs exactly one of `text` (a column) and `template`"),
    "text_pair with template": (both(templated('"{a}"'), put("text_pair", '"b"')), "text_pair goes with `text`"),
    "text_pair is text": (put("text_pair", '"text"'), "text_pair names the column 'text', which is already the text"),
    "template unbalanced": (templated('"{age"'), "template is malformed: expected '}'"),
    "template closed only": (templated('"age}"'), "template is malformed: Single '}'"),
    "template with empty braces": (templated('"{}"'), "template is malformed: a pair of braces is empty"),
    "template with a format": (templated('"{age:>9}"'), "the field {age} carries a format or conversion"),
    "template with a conversion": (templated('"{age!r}"'), "the field {age} carries a format or conversion"),
    "template without columns": (templated('"{{age}}"'), "template names no column"),
    "template shows the person": (
        lambda text: templated('"{age} {who}"')(text).replace("# person_id =", 'person_id = "who"'),
        "template shows the person_id column 'who'",
    ),
    "key of thousands of parts": (lambda text: text + "\n" + "a." * 20_000 + "a = 1\n", "nested too deeply"),
    "template shows the label": (templated('"{age} {label}"'), "template shows the label column 'label'"),
    "label is text": (put("label", '"text"'), "label and text name the same column 'text'"),
    "label is text_pair": (put("text_pair", '"label"'), "label and text name the same column 'label'"),
    "person_id is label": (put("person_id", '"label"'), "person_id names the column 'label', which is already"),
    "person_id is text": (put("person_id", '"text"'), "person_id names the column 'text', which is already"),
    "delta not below one person": (put("delta", "1e-3"), "delta = 0.001 is not below 1 / min_persons = 0.001"),
    "batches of less than one": (put("sampling_rate", "0.0009"), "sampling_rate × min_persons = 0.9 persons a step"),
    "too many steps": (
        both(put("rounds", "1001"), put("steps_per_round", "1000")),
        "rounds × steps_per_round = 1001000 steps; at most 1000000",
    ),
    "least sites above most": (put("min_sites", "17"), "min_sites = 17 exceeds max_sites = 16"),
    "complete graph of too many": (
        put("max_sites", "65"),
        'max_sites = 65 is too many for a complete graph, which joins at most 64. Lower max_sites, or set graph = "semi_ho',
    ),
    "16 bits for too many sites": (
        both(put("max_sites", "256"), put("graph", '"semi_honest_graph"'), put("ring_bits", "16")),
        "ring_bits = 16 leaves a number 126 steps to either side if the sums of max_sites = 256 sites must fit; at least 127",
    ),
    "a length bound for 16 bits": (
        both(put("update_bound", "2.5"), put("ring_bits", "16")),
        "update_bound = 2.5 bounds the length of a whole update, but with ring_bits = 16 each number is bounded on its own",
    ),
    "momentum without use": (put("server_momentum", "0.9"), "server_momentum has no effect on fedavg"),
}


LEAKS = "name the same column"
AT_ODDS: dict[str, tuple[str, Edit, str]] = {
    # What a kind of task needs.
    "classes without labels": (
        "text-classification",
        drop("labels"),
        "labels has 0 entries, and needs at least 2: text-",
    ),
    "words without labels": (
        "token-classification",
        put("labels", "[]"),
        "labels has 0 entries, and needs at least 2: t",
    ),
    "images of one label": (
        "image-classification",
        put("labels", '["a"]'),
        "labels has 1 entries, and needs at least 2",
    ),
    "classes without label": ("text-classification", drop("label"), "lacks `label`, which text-classification needs: "),
    "words without label": ("token-classification", drop("label"), "lacks `label`, which token-classification needs"),
    "images without label": ("image-classification", drop("label"), "lacks `label`, which image-classification needs"),
    "numbers without label": (
        "regression",
        drop("label"),
        "lacks `label`, which regression needs: the column that holds",
    ),
    "prompts without answer": (
        "instruction",
        drop("answer"),
        "instruction needs: the column that holds the answer to l",
    ),
    "images without image": ("image-classification", drop("image"), 'Add it, for example: image = "image".'),
    "causal without text": ("causal-lm", drop("text"), "needs exactly one of `text` (a column) and `template`"),
    "masked without text": ("masked-lm", drop("text"), "needs exactly one of `text` (a column) and `template`"),
    "numbers of text and template": (
        "regression",
        put("template", '"{a}"'),
        "needs exactly one of `text` (a column) and",
    ),
    "words without text": ("token-classification", drop("text"), "needs exactly one of `text`"),
    # What has no effect on it.
    "labels for numbers": (
        "regression",
        put("labels", '["a", "b"]'),
        "labels has no effect: regression does not choose",
    ),
    "labels for language": (
        "causal-lm",
        put("labels", '["a", "b"]'),
        "labels has no effect: causal-lm does not choose",
    ),
    "label for prompts": (
        "instruction",
        put("label", '"label"'),
        "[data] label has no effect on instruction. Remove it.",
    ),
    "label for language": ("masked-lm", put("label", '"label"'), "[data] label has no effect on masked-lm. Remove it."),
    "answer for classes": ("text-classification", put("answer", '"a"'), "[data] answer has no effect on text-class"),
    "system for language": (
        "causal-lm",
        put("system", '"a"'),
        "system has no effect on causal-lm; it belongs to instr",
    ),
    "image for classes": (
        "text-classification",
        put("image", '"a"'),
        "[data] image has no effect on text-classification",
    ),
    "text for images": (
        "image-classification",
        put("text", '"a"'),
        "text has no effect on image-classification, which",
    ),
    "template for images": ("image-classification", put("template", '"{a}"'), "template has no effect on image-classi"),
    "pair for images": (
        "image-classification",
        put("text_pair", '"a"'),
        "text_pair has no effect on image-classification",
    ),
    "pair for language": ("causal-lm", put("text_pair", '"a"'), "text_pair has no effect on causal-lm; it belongs to"),
    "pair for words": (
        "token-classification",
        put("text_pair", '"a"'),
        "text_pair has no effect on token-classification",
    ),
    "template for words": (
        "token-classification",
        templated('"{a}"'),
        "template does not suit token-classification: each",
    ),
    "center for classes": (
        "text-classification",
        put("center", "1.0"),
        "center has no effect on text-classification; it",
    ),
    "scale for language": ("causal-lm", put("scale", "2.0"), "scale has no effect on causal-lm; it belongs to regress"),
    "mask for causal": (
        "causal-lm",
        put("mask_rate", "0.3"),
        "mask_rate has no effect on causal-lm; it belongs to mas",
    ),
    "mean for words": (
        "token-classification",
        put("pooling", '"mean"'),
        'pooling = "mean" has no effect on token-class',
    ),
    "mean for images": (
        "image-classification",
        put("pooling", '"mean"'),
        'pooling = "mean" has no effect on image-clas',
    ),
    "mean for language": (
        "masked-lm",
        put("pooling", '"mean"'),
        'Set it to "own"; only text-classification and regressi',
    ),
    # Scores.
    "auroc of words": (
        "token-classification",
        put("score", '"auroc"'),
        'score = "auroc" does not judge token-classifica',
    ),
    "perplexity of classes": (
        "text-classification",
        put("score", '"perplexity"'),
        "Choose one of macro-f1, accuracy, au",
    ),
    "f1 of numbers": ("regression", put("score", '"macro-f1"'), "does not judge regression. Choose one of r2, mae."),
    "r2 of language": (
        "instruction",
        put("score", '"r2"'),
        "does not judge instruction. Choose one of perplexity, acc",
    ),
    # A column used twice.
    "number is text": ("regression", put("label", '"text"'), f"label and text {LEAKS} 'text'"),
    "answer is prompt": ("instruction", put("answer", '"text"'), f"answer and text {LEAKS} 'text'"),
    "label is image": ("image-classification", put("label", '"image"'), f"label and image {LEAKS} 'image'"),
    "template shows the answer": ("instruction", templated('"{answer}?"'), "template shows the answer column 'answer'"),
    "person is image": (
        "image-classification",
        put("person_id", '"image"'),
        "person_id names the column 'image', which",
    ),
    "person is answer": (
        "instruction",
        put("person_id", '"answer"'),
        "person_id names the column 'answer', which is alr",
    ),
    # Algorithms.
    "alternate with momentum": (
        "text-classification",
        both(put("method", '"alternate"'), put("server_optimizer", '"fedavgm"')),
        'method = "alternate" does not go with server_optimizer = "fedavgm": the server\'s momentum would go on moving the',
    ),
    "alternate with Adam": (
        "causal-lm",
        both(put("method", '"alternate"'), put("server_optimizer", '"fedadam"')),
        "would go on moving the factor that rests in a round. Choose fedavg",
    ),
    "alternate in one round": (
        "text-classification",
        both(put("method", '"alternate"'), put("rounds", "1")),
        'method = "alternate" with rounds = 1 would never train A',
    ),
    "proximal of one step": (
        "text-classification",
        both(put("proximal", "0.1"), put("steps_per_round", "1")),
        "proximal = 0.1 has no effect with steps_per_round = 1: at a round's first step",
    ),
}


@pytest.mark.parametrize("case", AT_ODDS)
def test_what_does_not_suit_the_task_or_the_method_is_refused_with_what_to_do(case: str) -> None:
    kind, edit, fragment = AT_ODDS[case]

    with pytest.raises(PlanError) as caught:
        read_plan(edit(STARTERS[kind]).encode())

    assert fragment in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("kind", SCORES)
def test_the_starter_of_every_kind_of_task_is_a_valid_plan(kind: str) -> None:
    plan = read_plan(STARTERS[kind].encode())

    assert plan.task.kind == kind
    assert plan.task.decides == SCORES[kind][0]
    assert plan.task.labels == (("negative", "positive") if kind.endswith("classification") else ())
    assert read_plan(spelled(plan).encode()).digest == plan.digest


@pytest.mark.parametrize(("kind", "score"), [(kind, score) for kind, names in SCORES.items() for score in names])
def test_every_score_of_a_kind_can_decide(kind: str, score: str) -> None:
    plan = read_plan(put("score", f'"{score}"')(STARTERS[kind]).encode())

    assert plan.task.decides == score


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("text-classification", put("text_pair", '"more"')),
        ("text-classification", put("pooling", '"mean"')),
        (
            "regression",
            both(put("text_pair", '"more"'), put("pooling", '"mean"'), put("center", "-3"), put("scale", "9")),
        ),
        ("regression", templated('"{a} {b}"')),
        ("causal-lm", templated('"{a}"')),
        ("masked-lm", both(templated('"{a}"'), put("mask_rate", "0.4"))),
        ("instruction", both(templated('"{a}?"'), put("system", '"Be brief."'))),
        ("image-classification", put("person_id", '"who"')),
        ("causal-lm", both(put("method", '"alternate"'), put("rounds", "2"))),
        ("causal-lm", both(put("method", '"share-a"'), put("server_optimizer", '"fedadam"'))),
        ("causal-lm", both(put("method", '"r-only"'), put("rank", "256"), put("quantization", '"nf4"'))),
        ("causal-lm", both(put("proximal", "0.1"), put("steps_per_round", "2"))),
    ],
)
def test_what_suits_the_task_and_the_method_is_accepted(kind: str, edit: Edit) -> None:
    assert read_plan(edit(STARTERS[kind]).encode()).task.kind == kind


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_plan_is_refused_with_its_fault(case: str) -> None:
    edit, fragment = MALFORMED[case]

    with pytest.raises(PlanError) as caught:
        read_plan(edit(STARTER).encode())

    assert fragment in str(caught.value)
    assert len(caught.value.problems) == 1
    assert len(str(caught.value)) < 1000
    assert caught.value.exit_code == 3


def test_bytes_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(PlanError, match=r"not UTF-8 text \(byte 2\). Save it as UTF-8"):
        read_plan(b"# \xff\n" + STARTER.encode())


def test_nesting_of_every_depth_is_refused_as_a_fault_of_the_plan() -> None:
    for depth in range(1, 600):
        nested = put("label", "[" * depth + "]" * depth)(STARTER)

        with pytest.raises(PlanError, match=r"is not text in quotes|is nested too deeply"):
            read_plan(nested.encode())


def test_all_faults_are_listed_at_once() -> None:
    edits = both(put("epsilon", "0"), put("rank", "0"), drop("rounds"), put("name", '"?"'), under("task", "x = 1"))

    with pytest.raises(PlanError) as caught:
        read_plan(edits(STARTER).encode())

    assert len(caught.value.problems) == 5
    assert str(caught.value) == "\n".join(caught.value.problems)


def test_all_contradictions_are_listed_at_once() -> None:
    edits = both(put("delta", "2e-3"), put("min_sites", "17"), put("server_momentum", "0.5"), put("label", '"text"'))

    with pytest.raises(PlanError) as caught:
        read_plan(edits(STARTER).encode())

    assert len(caught.value.problems) == 4


def test_the_starter_is_a_valid_plan_and_holds_what_it_was_given() -> None:
    plan = read_plan(STARTER.encode())

    assert (plan.name, plan.model.base, plan.model.base_digest) == ("demo", "tiny-bert", "sha256:" + "0" * 64)
    assert plan.adapter.targets == ("query", "value")


def test_the_starter_names_every_key_with_its_meaning() -> None:
    for section, key, _, limit, says in reference():
        text = STARTER.partition(f"[{section}]\n")[2].partition("\n[")[0]

        assert re.search(rf"(?m)^# {re.escape(says)}{re.escape(f' ({limit})' if limit else '')}\n(# )?{key} =", text)


def test_a_plan_spelled_out_again_reads_back_equal() -> None:
    plan = read_plan(
        both(put("labels", '["sí \\"a\\"", "b\\\\", "c\\td"]'), put("text_pair", '"two"'))(STARTER).encode()
    )

    again = read_plan(spelled(plan).encode())

    assert again == plan
    assert again.digest == plan.digest


def test_a_plan_in_a_file_is_read_and_a_missing_one_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(STARTER, encoding="utf-8")

    assert load_plan(tmp_path / "plan.toml") == read_plan(STARTER.encode())
    with pytest.raises(UsageError, match="confide plan new"):
        load_plan(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="Cannot read the plan"):
        load_plan(tmp_path)


def test_canonical_bytes_and_digest_are_pinned() -> None:
    plan = read_plan(STARTER.encode())

    assert plan.canonical().startswith(b'{"adapter":{"alpha":16.0,"head_start":"zeros","method":"ffa","rank":8,')
    assert plan.digest == "sha256:" + hashlib.sha256(plan.canonical()).hexdigest()
    assert plan.digest == PINNED_DIGEST


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: re.sub(r"(?m)^#.*\n", "", text),
        lambda text: "".join(f"{part}\n" for part in (text.partition("\n[")[0], *reversed(sections_of(text)))),
        put("epsilon", "8"),
        put("epsilon", "80e-1"),
        lambda text: re.sub(r"(?m)^max_tokens = .*\n", "", text),
        put("threads", "3"),
        lambda text: text.partition("[compute]")[0],
    ],
    ids=["BOM", "CRLF", "comments", "order", "whole", "exponent", "default left out", "compute", "compute left out"],
)
def test_the_digest_does_not_change_with_spelling_or_speed(edit: Edit) -> None:
    changed = edit(STARTER)

    assert changed != STARTER
    assert read_plan(changed.encode()).digest == read_plan(STARTER.encode()).digest


def test_the_digest_changes_with_every_setting_but_compute() -> None:
    plan = read_plan(STARTER.encode())
    digests = {plan.digest, dataclasses.replace(plan, name="x").digest, dataclasses.replace(plan, purpose="x").digest}
    assert len(digests) == 3

    for section, key in keys():
        changed = altered(plan, section, key)

        if section == "compute":
            assert changed.digest == plan.digest
        else:
            digests.add(changed.digest)

    assert len(digests) == 3 + sum(section != "compute" for section, _ in keys())


def test_differences_name_exactly_the_setting_that_differs() -> None:
    plan = read_plan(STARTER.encode())
    assert differences(plan, plan) == []

    for section, key in keys():
        changed = altered(plan, section, key)

        ((name, before, after),) = differences(plan, changed)
        assert name == f"[{section}] {key}"
        assert before == spelled_value(getattr(getattr(plan, section), key))
        assert after == spelled_value(getattr(getattr(changed, section), key))


def test_differences_show_absence_and_the_head() -> None:
    plan = read_plan(STARTER.encode())
    other = read_plan(both(put("name", '"other"'), put("update_bound", "2"), put("rank", "4"))(STARTER).encode())

    assert differences(plan, other) == [
        ("name", "demo", "other"),
        ("[adapter] rank", "8", "4"),
        ("[federation] update_bound", "absent", "2.0"),
    ]


def test_the_reference_covers_every_key_with_its_default() -> None:
    rows = list(reference())

    assert [(section, key) for section, key, *_ in rows] == keys()
    assert all(says.endswith(".") for *_, says in rows)
    assert ("privacy", "epsilon", "required", "above 0, at most 100") in [row[:4] for row in rows]
    assert ("data", "person_id", "absent", "at least 1, at most 200") in [row[:4] for row in rows]
    assert ("adapter", "rank", "8", "at least 1, at most 256") in [row[:4] for row in rows]


def test_every_default_and_example_is_within_its_own_range() -> None:
    for section, key, default, *_ in reference():
        if default in {"required", "absent"}:
            continue

        text = STARTERS["causal-lm"] if key == "labels" else STARTER  # where there need not be any
        plan = read_plan(put_in(section, key, default)(text).encode())

        assert spelled_value(getattr(getattr(plan, section), key)) == default


@pytest.mark.parametrize(
    "edit",
    [
        put("max_sites", "64"),
        both(put("max_sites", "64"), put("ring_bits", "16")),
        both(put("max_sites", "65"), put("graph", '"semi_honest_graph"')),
        both(put("max_sites", "1000"), put("graph", '"semi_honest_graph"')),
        both(put("max_sites", "255"), put("graph", '"semi_honest_graph"'), put("ring_bits", "16")),
        put("key_agreement", '"x25519+ml-kem-768"'),
        put("graph", '"semi_honest_graph"'),
    ],
)
def test_plans_at_the_edge_of_what_can_be_summed_are_accepted(edit: Edit) -> None:
    changed = edit(STARTER)

    assert read_plan(changed.encode()).digest != read_plan(STARTER.encode()).digest


@pytest.mark.parametrize("bits", [16, 32])
def test_ring_steps_leave_room_for_every_site_and_one_step_more_would_not(bits: int) -> None:
    for sites in (1, 2, 3, 7, 64, 255, 1000):
        steps = ring_steps(bits, sites)

        assert sites * (steps + 1) < 2 ** (bits - 1)
        assert sites * (steps + 2) >= 2 ** (bits - 1)


def test_16_bits_have_room_for_255_sites_and_32_bits_for_all() -> None:
    assert ring_sites(16) == 255
    assert ring_steps(16, 255) >= LEAST_RING_STEPS > ring_steps(16, 256)
    assert ring_sites(32) >= 1000


EXPLAINED: dict[str, tuple[Edit, str, str]] = {
    "32 bits": (
        put("ring_bits", "32"),
        "What leaves a site",
        "as 32-bit integers. It sends 4 bytes per trained number.",
    ),
    "16 bits": (
        put("ring_bits", "16"),
        "What leaves a site",
        "as 16-bit integers. It sends 2 bytes per trained number.",
    ),
    "masked": (
        put("min_sites", "4"),
        "What leaves a site",
        "the server learns the sum of at least ⌊2n/3⌋ + 1 of the n sites on the roster, and of at least 4;",
    ),
    "one kind of key": (put("key_agreement", '"x25519"'), "What leaves a site", "Keys are agreed with X25519. Whoever"),
    "two kinds of keys": (
        put("key_agreement", '"x25519+ml-kem-768"'),
        "What leaves a site",
        "withstand a later quantum computer. The masks between sites rest on X25519 alone and do not.",
    ),
    "a sparse graph": (
        both(put("max_sites", "100"), put("graph", '"semi_honest_graph"')),
        "What leaves a site",
        "in one of 100 with 42. Then masks hold against an honest-but-curious server only, which",
    ),
    "a sparse graph for few": (
        put("graph", '"semi_honest_graph"'),
        "What leaves a site",
        "with rosters of more than 64 sites only; here it has no effect.",
    ),
    "room of 32 bits": (
        put("max_sites", "64"),
        "How updates are summed",
        "A number is a 32-bit integer, 4 bytes. The sum has room for max_sites = 64 sites and cannot wrap; with 32 bits a "
        "plan may have up to 1000.",
    ),
    "room of 16 bits": (put("ring_bits", "16"), "How updates are summed", "with 16 bits a plan may have up to 255."),
    "steps of 32 bits": (
        put("max_sites", "10"),
        "How updates are summed",
        "The bound on the length of a site's update is 214748363 steps wide, so a step is 4.7e-09 of it.",
    ),
    "steps of 16 bits": (
        put("ring_bits", "16"),
        "How updates are summed",
        "The bound on each number of a site's update is 2046 steps wide, so a step is 0.00049 of it.",
    ),
    # Four Adam steps move a number by 2.4 learning rates, 0.002 and 0.01.
    "a bound of three norms": (
        put("optimizer", '"adam"'),
        "How updates are summed",
        "The bound is √(0.0144² A + 0.072² H), 3 times the length that is predicted; A and H are how many numbers",
    ),
    "a bound of eight rms": (
        put("ring_bits", "16"),
        "How updates are summed",
        "A number of the adapter is cut at 0.0384 and one of the head at 0.192, 8 times as far as a round is predicted to "
        "move them. How many",
    ),
    # Four SGD steps on gradients of length 1 may go 0.008 and 0.04 far.
    "a bound of noise and signal": (
        put("optimizer", '"sgd"'),
        "How updates are summed",
        "² H) + 0.12, 3 times the length that is predicted;",
    ),
    "a bound of noise and spread signal": (
        both(put("optimizer", '"sgd"'), put("ring_bits", "16")),
        "How updates are summed",
        " + 0.064 / √(A + H) and one of the head at ",
    ),
    "a given bound": (
        put("update_bound", "2.5"),
        "How updates are summed",
        "The bound is 2.5, as the plan says. A longer",
    ),
    "dropouts": (
        put("min_sites", "3"),
        "Who must take part",
        "a roster of 3 survives no dropouts; one of 4 to 6 survives 1 dropout; one of 7 to 9 survives 2 dropouts; one of 16 "
        "survives 5 dropouts.",
    ),
    "dropouts where many are needed": (
        both(put("min_sites", "7"), put("max_sites", "9")),
        "Who must take part",
        "and at least 7, see the round through: a roster of 7 survives no dropouts; one of 8 survives 1 dropout; one "
        "of 9 survives 2 dropouts.",
    ),
    "dropouts of one size": (
        put("max_sites", "3"),
        "Who must take part",
        "through: a roster of 3 survives no dropouts.",
    ),
    "another attempt": (
        put("min_sites", "5"),
        "Who must take part",
        "If more drop out, they are asked once more, for the same vectors",
    ),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_what_the_plan_means_for_the_sum(case: str) -> None:
    edit, heading, fragment = EXPLAINED[case]

    sections = dict(explain(read_plan(edit(STARTER).encode())))

    assert fragment in " ".join(sections[heading])


@pytest.mark.parametrize("name", ["banking77", "insurance", "messages"])
def test_the_example_plans_are_valid_and_keep_the_defaults_of_the_sum(name: str) -> None:
    plan = load_plan(Path(__file__).parents[2] / "simulations" / f"{name}.toml")

    federation = plan.federation
    assert (federation.ring_bits, federation.key_agreement, federation.graph) == (32, "x25519", "complete")


def test_template_columns_are_named_in_order_and_once() -> None:
    assert template_columns("{b} of {a}, {b} {{not this}}") == ("b", "a")


def test_no_setting_of_the_guarantee_is_in_compute() -> None:
    assert [key for section, key in keys() if section == "compute"] == [
        "device",
        "threads",
        "micro_batch",
        "memory_mb",
        "precision",
        "gradient_checkpointing",
        "cache_prefix",
        "cache_mb",
    ]


def keys() -> list[tuple[str, str]]:
    plan = read_plan(STARTER.encode())
    return [(section, field.name) for section in SECTIONS for field in dataclasses.fields(getattr(plan, section))]


def altered(plan: Plan, section: str, key: str) -> Plan:
    """Return `plan` with another value under that key, whatever its type."""
    table = getattr(plan, section)
    field = next(field for field in dataclasses.fields(table) if field.name == key)
    meaning: Meaning = field.metadata["meaning"]
    old = getattr(table, key)
    new: object
    match old:
        case bool():
            new = not old
        case int() | float():
            new = old + 1
        case tuple():
            new = (*old, "more")
        case None:
            new = 0.5 if meaning.below or meaning.above is not None else "more"
        case _:
            new = next((choice for choice in meaning.choices if choice != old), f"{old} more")
    return dataclasses.replace(plan, **{section: dataclasses.replace(table, **{key: new})})


def spelled(plan: Plan) -> str:
    """Write a plan as plain TOML."""
    lines = ['format = "confide-plan/1"', f"name = {toml_value(plan.name)}", f"purpose = {toml_value(plan.purpose)}"]
    for section in SECTIONS:
        table = dataclasses.asdict(getattr(plan, section))
        lines += [f"[{section}]", *(f"{key} = {toml_value(v)}" for key, v in table.items() if v is not None)]
    return "\n".join(lines)


def spelled_value(value: object) -> str:
    return "absent" if value is None else toml_value(value)


def put_in(section: str, key: str, value: str) -> Edit:
    def edit(text: str) -> str:
        before, head, after = text.partition(f"[{section}]\n")
        return before + head + put(key, value)(after)

    return edit


def sections_of(text: str) -> list[str]:
    return [f"[{part}" for part in text.split("\n[")[1:]]


def test_the_starter_is_plain_toml() -> None:
    assert set(tomllib.loads(STARTER)) == {"format", "name", "purpose", *SECTIONS}
