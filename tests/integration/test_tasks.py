"""Every kind of task from a table to a published adapter that predicts, on tiny random models."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from confide.common.base import base_digest
from confide.common.plan import (
    CAUSAL,
    IMAGE_CLASSES,
    INSTRUCTION,
    MASKED,
    REGRESSION,
    SCORES,
    TOKEN_CLASSES,
    starter,
)
from tests.conftest import WORDS, run, save_tokenizer, simulate
from tests.families import FAMILIES, save_base

pytestmark = pytest.mark.slow  # whole federations of each kind

MODELS = {
    REGRESSION: "distilbert",
    TOKEN_CLASSES: "bert",
    CAUSAL: "gpt2",
    INSTRUCTION: "llama",
    MASKED: "roberta",
    IMAGE_CLASSES: "vit",
}
LABELS = ("negative", "neutral", "positive")


def texts(rows: int = 60) -> list[str]:
    random = np.random.default_rng(2)
    return [" ".join(random.choice(WORDS, random.integers(2, 7))) for _ in range(rows)]


def numbers(folder: Path) -> list[dict[str, str]]:
    return [{"text": text, "label": str(100 + 10 * text.count("good"))} for text in texts()]


def tagged(folder: Path) -> list[dict[str, str]]:
    return [{"text": text, "label": " ".join(LABELS[len(word) % 3] for word in text.split())} for text in texts()]


def plain(folder: Path) -> list[dict[str, str]]:
    return [{"text": text} for text in texts()]


def answered(folder: Path) -> list[dict[str, str]]:
    return [{"text": text, "answer": text.split()[-1]} for text in texts()]


def pictures(folder: Path) -> list[dict[str, str]]:
    random = np.random.default_rng(3)
    rows = []
    for number in range(60):
        label = number % 3
        pixels = random.integers(0, 60, (9, 7, 3)) + 60 * label
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": LABELS[label]})
    return rows


ROWS: dict[str, Callable[[Path], list[dict[str, str]]]] = {
    REGRESSION: numbers,
    TOKEN_CLASSES: tagged,
    CAUSAL: plain,
    INSTRUCTION: answered,
    MASKED: plain,
    IMAGE_CLASSES: pictures,
}


def written(folder: Path, kind: str) -> Path:
    rows = ROWS[kind](folder)
    with (folder / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "rows.csv"


def planned(folder: Path, kind: str, **changes: str) -> tuple[Path, Path]:
    base = save_base(folder / "base", MODELS[kind], kind)
    save_tokenizer(base)
    text = starter("tiny", "tiny", base_digest(base), FAMILIES[MODELS[kind]][2], kind)
    values = {
        "rank": "2",
        "rounds": "2",
        "steps_per_round": "2",
        "sampling_rate": "0.5",
        "min_persons": "10",
        "delta": "1e-3",
        "max_tokens": "20",
        "top_layers": "1",
        **changes,
    }
    if kind in {TOKEN_CLASSES, IMAGE_CLASSES}:
        values["labels"] = json.dumps(LABELS)
    if kind == REGRESSION:
        values |= {"center": "100.0", "scale": "10.0"}
    for key, value in values.items():
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    (folder / "plan.toml").write_text(text, encoding="utf-8")
    return base, folder / "plan.toml"


@pytest.mark.parametrize("kind", MODELS)
def test_a_federation_trains_scores_publishes_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (base, plan), table = planned(tmp_path, kind), written(tmp_path, kind)

    assert simulate(tmp_path / "run", plan, base, table) == 0
    result = json.loads(capsys.readouterr().out)
    adapter = tmp_path / "run/adapter"
    evaluated = run("adapter", "evaluate", adapter, "--model", base, "--data", table, "--json")
    scores = json.loads(capsys.readouterr().out)
    predicted = run("adapter", "predict", adapter, "--model", base, "--data", table, "--out", tmp_path / "said.csv")

    assert (result["status"], result["rounds"], evaluated) == ("completed", 2, 0)
    assert set(SCORES[kind]) <= set(result["measured"]["federated"])
    assert set(SCORES[kind]) <= set(scores)
    assert result["score"] == SCORES[kind][0]
    assert all(epsilon <= result["epsilon_target"] for epsilon in result["epsilon"].values())
    assert (adapter / "README.md").read_text(encoding="utf-8").count("from_pretrained") == 2
    if kind == MASKED:
        assert predicted == 2
        assert "answers no questions" in capsys.readouterr().err
    else:
        assert predicted == 0
        with (tmp_path / "said.csv").open(newline="") as stream:
            said = list(csv.reader(stream))
        assert len(said) == 61


@pytest.mark.parametrize("method", ["fedit", "alternate", "share-a", "r-only"])
@pytest.mark.parametrize("kind", [TOKEN_CLASSES, CAUSAL])
def test_every_method_runs_resumes_and_reloads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, method: str
) -> None:
    (base, plan), table = planned(tmp_path, kind, method=f'"{method}"'), written(tmp_path, kind)

    assert simulate(tmp_path / "run", plan, base, table) == 0
    result = json.loads(capsys.readouterr().out)
    assert run("simulate", "run", "--resume", tmp_path / "run", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    own = tmp_path / "run/personal/site-1"
    places = [own] if method == "share-a" else [tmp_path / "run/adapter"]
    for place in places:
        assert run("adapter", "evaluate", place, "--model", base, "--data", table, "--json") == 0

    assert again["scores"] == result["scores"]
    assert again["round_records"] == result["round_records"]
    assert own.exists() == (method == "share-a")
    assert result["scores"]["federated"] != result["scores"]["untrained"]
