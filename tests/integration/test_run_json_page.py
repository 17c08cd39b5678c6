"""The pages of run.json and manifest.json, beside a run that wrote both."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BY_CLINIC, LABELS, simulate

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", list: "list", dict: "object"}
# Objects whose keys are what happened, and lists of plain words: the table describes them as a whole.
WHOLE = {"skipped", "missing", "moments", "weakened_by", "present"}


@pytest.fixture
def written(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    assert simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC, "--compare") == 0
    return tmp_path / "run"


def test_the_pages_name_exactly_the_keys_that_a_run_writes_with_their_types(written: Path) -> None:
    for page, file in (("run-json.md", "run.json"), ("manifest.md", "adapter/manifest.json")):
        value = json.loads((written / file).read_bytes())

        found = dict(_paths(value, names_in(written)))
        told = _table(page)

        assert set(found) == set(told), page
        assert {path for path, kind in found.items() if kind not in told[path]} == set(), page


def names_in(directory: Path) -> Mapping[str, str]:
    """Return what stands on the page for the names in this run."""
    run: dict[str, Any] = json.loads((directory / "run.json").read_bytes())
    arms = dict.fromkeys(run["measured"], "ARM")
    return {
        **dict.fromkeys(run["sites"], "SITE"),
        **dict.fromkeys(LABELS, "LABEL"),
        **dict.fromkeys(run["measured"]["federated"], "SCORE"),
        **{f"measured.{arm}": "measured.ARM" for arm in arms},
    }


def _paths(value: object, names: Mapping[str, str], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, type) of every leaf, with the page's words for names."""
    if isinstance(value, dict) and path.rpartition(".")[2] not in WHOLE:
        for key, inner in value.items():
            along = f"{path}.{key}" if path else key
            spelled = names.get(along) or f"{path}.{names.get(key, key)}".removeprefix(".")
            yield from _paths(inner, names, spelled)
    elif isinstance(value, list) and path.rpartition(".")[2] not in WHOLE:
        for inner in value:
            yield from _paths(inner, names, f"{path}[]")
    else:
        yield path, "null" if value is None else WORDS[type(value)]


def _table(page: str) -> dict[str, set[str]]:
    lines = re.findall(r"^\| `(.+?)` \| (.+?) \| .+ \|$", (REFERENCE / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {path: {kind, *kind.split(" or ")} for path, kind in lines}
