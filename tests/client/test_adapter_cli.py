"""What the user of a trained adapter can do with it, from the command line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from confide.common.model import attach
from confide.common.plan import load_plan
from tests.conftest import BY_CLINIC, run, simulate


@pytest.fixture
def trained(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    assert simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC, "--no-alone") == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_show_names_claims_and_what_weakened_them(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adapter", "show", trained / "adapter") == 0

    told = capsys.readouterr().out
    assert "clinic-0: epsilon 7.9" in told or "clinic-0: epsilon 8.0" in told
    assert "weakened by insecure_seeded_noise" in told


def test_evaluate_scores_a_table(
    trained: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("adapter", "evaluate", trained / "adapter", "--model", base_directory, "--data", table, "--json") == 0

    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 90
    assert 0 <= found["macro-f1"] <= 1


def test_predict_answers_every_row_in_order_without_labels(trained: Path, base_directory: Path, tmp_path: Path) -> None:
    texts = ["the service was great", "awful", "plain usual fine"]
    (tmp_path / "new.csv").write_text("text\n" + "\n".join(texts) + "\n")
    out = tmp_path / "answers.csv"

    assert (
        run(
            "adapter",
            "predict",
            trained / "adapter",
            "--model",
            base_directory,
            "--data",
            tmp_path / "new.csv",
            "--out",
            out,
        )
        == 0
    )

    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3
    for row in rows:
        chances = [float(row[f"probability {label}"]) for label in ("negative", "neutral", "positive")]
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert row["label"] == ("negative", "neutral", "positive")[int(np.argmax(chances))]


def test_merge_gives_full_weights_with_the_same_answers(trained: Path, base_directory: Path, tmp_path: Path) -> None:
    assert run("adapter", "merge", trained / "adapter", "--model", base_directory, "--out", tmp_path / "full") == 0

    full = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "full").eval()
    model = attach(base_directory, load_plan(trained / "adapter" / "plan.toml"))
    model.write(model.import_exported(trained / "adapter"))
    inputs = {"input_ids": torch.tensor([[2, 6, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(full(**inputs).logits, model.network(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_any_stored_version_can_be_exported(trained: Path, base_directory: Path, tmp_path: Path) -> None:
    first = json.loads((trained / "rounds" / "0001.json").read_text())["adapter"].removeprefix("sha256:")
    version = trained / "adapters" / f"{first}.safetensors"

    code = run(
        "adapter",
        "export",
        version,
        "--plan",
        trained / "plan.toml",
        "--model",
        base_directory,
        "--out",
        tmp_path / "v1",
    )

    assert code == 0
    assert (tmp_path / "v1" / "adapter_config.json").exists()
    assert (
        run(
            "adapter",
            "export",
            version,
            "--plan",
            trained / "plan.toml",
            "--model",
            base_directory,
            "--out",
            tmp_path / "v1",
        )
        == 2
    )


@pytest.mark.parametrize(
    ("damage", "code", "fragment"),
    [
        ("no manifest", 6, "no readable manifest.json"),
        ("no plan", 6, "holds no plan.toml"),
        ("no weights", 6, "Cannot read the adapter"),
        ("cut weights", 6, "damaged or not safetensors"),
    ],
)
def test_a_damaged_adapter_is_refused_with_what_is_wrong(
    trained: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str],
    damage: str, code: int, fragment: str,
) -> None:  # fmt: skip
    adapter = trained / "adapter"
    weights = adapter / "adapter_model.safetensors"
    match damage:
        case "no manifest":
            (adapter / "manifest.json").unlink()
        case "no plan":
            (adapter / "plan.toml").unlink()
        case "no weights":
            weights.unlink()
        case _:
            weights.write_bytes(b"short")

    if damage == "no manifest":
        found = run("adapter", "show", adapter)
    else:
        found = run("adapter", "evaluate", adapter, "--model", base_directory, "--data", table)

    assert found == code
    assert fragment in capsys.readouterr().err


def test_weights_that_are_not_the_manifests_are_refused(
    trained: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = attach(base_directory, load_plan(trained / "adapter" / "plan.toml"))
    manifest = (trained / "adapter" / "manifest.json").read_bytes()
    model.export(model.start, trained / "adapter")
    assert (trained / "adapter" / "manifest.json").read_bytes() == manifest

    code = run("adapter", "evaluate", trained / "adapter", "--model", base_directory, "--data", table)

    assert code == 6
    assert "are not those its manifest speaks of" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_place_that_cannot_be_written_is_a_clear_error(
    trained: Path, base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("")
    version = next((trained / "adapters").glob("*.safetensors"))
    what = [version, "--plan", trained / "plan.toml"] if command == "export" else [trained / "adapter"]

    assert run("adapter", command, *what, "--model", base_directory, "--out", tmp_path / "file" / "out") == 2

    assert "Traceback" not in capsys.readouterr().err
