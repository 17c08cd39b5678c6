"""The root command and `confide plan`, as a person at a terminal meets them."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from confide.common.base import base_digest
from confide.common.plan import load_plan
from tests.conftest import run

HEAVY = {"torch", "flwr", "transformers", "peft", "opacus", "dp_accounting", "datasets", "pyarrow", "numpy", "ray"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--help"],
        ["plan", "check", "{plan}"],
        ["plan", "diff", "{plan}", "{plan}"],
        ["plan", "new"],
    ],
    ids=" ".join,
)
def test_light_commands_load_no_heavy_library(arguments: list[str], plan_file: Path) -> None:
    code = (
        "import sys; from confide.common.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)"
    )
    words = [word.format(plan=plan_file) for word in arguments]

    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)

    assert not HEAVY & set(done.stderr.split())
    assert done.stdout


def test_a_new_plan_is_valid_and_names_the_model_at_hand(base_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"

    assert run("plan", "new", "--model", base_directory, "--out", out, "--name", "mine") == 0

    plan = load_plan(out)
    assert (plan.name, plan.model.base) == ("mine", "tiny-bert")
    assert plan.model.base_digest == base_digest(base_directory)
    assert plan.adapter.targets == ("query", "value")


def test_new_refuses_a_name_that_check_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "new", "--name", "Bad_Name!") == 3

    assert "must be 1 to 63 of a-z" in capsys.readouterr().err


def test_new_leaves_an_existing_file_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.toml"
    out.write_text("mine")

    assert run("plan", "new", "--out", out) == 2

    assert out.read_text() == "mine"
    assert "exists and is left as it is" in capsys.readouterr().err


def test_check_tells_the_digest(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "check", plan_file, "--json") == 0

    assert json.loads(capsys.readouterr().out) == {
        "status": "ok",
        "name": "tiny",
        "digest": load_plan(plan_file).digest,
    }


def test_check_with_a_model_compares_its_digest(
    plan_file: Path, base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "check", plan_file, "--model", base_directory) == 0
    assert run("plan", "check", plan_file, "--model", tmp_path) == 5

    assert "holds no *.safetensors" in capsys.readouterr().err


def test_check_lists_every_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('format = "confide-plan/1"\nname = "x"\npurpose = "y"\n[privacy]\nepsilon = -1\ndelta = "a"\n')

    assert run("plan", "check", path) == 3

    told = capsys.readouterr().err
    for fragment in (
        "epsilon = -1",
        "delta = ",
        "[privacy] lacks 'rounds'",
        "[model] lacks 'base_digest'",
        "[adapter] lacks 'targets'",
    ):
        assert fragment in told


def test_an_error_is_one_json_object_too_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "check", tmp_path / "none.toml", "--json") == 2

    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "failed"
    assert told["error"] == "UsageError"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "check", "--json"), "Missing argument 'PLAN'"),
        (("plan", "check", "none.toml", "--odd", "--json"), "No such option"),
        (("plan", "nonsense", "--json"), "No such command 'nonsense'"),
    ],
    ids=["nothing", "an option", "a command"],
)
def test_a_wrong_word_is_one_json_object_too_when_asked(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2

    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert (told["status"], told["error"]) == ("failed", "UsageError")
    assert said in told["message"]
    assert "Usage:" in captured.err


@pytest.mark.parametrize("end", [KeyboardInterrupt, click.Abort])
def test_ctrl_c_is_one_json_object_too_when_asked(
    end: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path) -> None:
        raise end

    monkeypatch.setattr("confide.common.plan_cli.load_plan", interrupted)

    assert run("plan", "check", "plan.toml", "--json") == 130
    told = json.loads(capsys.readouterr().out)
    assert run("plan", "check", "plan.toml") == 130

    assert (told["status"], told["error"]) == ("failed", "Interrupted")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [("plan", "check", "{}"), ("{}",), ("plan", "check", "--{}")])
def test_a_terminal_obeys_nothing_of_an_error(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*(word.format("\x1b]0;owned\x07\x1b[31m") for word in arguments)) == 2

    told = capsys.readouterr().err
    assert "owned" in told
    assert "\x1b]0;" not in told
    assert "\x07" not in told


def test_explain_says_what_is_promised_and_what_leaves(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "explain", plan_file) == 0

    told = " ".join(capsys.readouterr().out.split())
    for fragment in (
        "Each row of a site is protected with epsilon = ",
        "Rows, texts, labels, counts, losses and gradients never leave a site.",
        "a roster of 3 survives no dropouts; one of 4 to 6 survives 1 dropout",
        "only single rows are protected",
        "drawn with probability 0.5",
    ):
        assert fragment in told


def test_explain_speaks_of_persons_where_the_plan_does(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_file.write_text(plan_file.read_text().replace("# person_id =", 'person_id = "who"'))

    assert run("plan", "explain", plan_file, "--json") == 0

    told = json.loads(capsys.readouterr().out)
    assert "Each person of a site" in told["sections"]["What is guaranteed"][0]


def test_diff_shows_what_differs_and_whether_approval_is_void(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, faster = tmp_path / "other.toml", tmp_path / "faster.toml"
    other.write_text(plan_file.read_text().replace("epsilon = 8.0", "epsilon = 4.0"))
    faster.write_text(plan_file.read_text().replace("micro_batch = 8", "micro_batch = 16"))

    assert run("plan", "diff", plan_file, other) == 0
    assert run("plan", "diff", plan_file, faster) == 0

    told = capsys.readouterr().out
    assert "[privacy] epsilon\n  - 8.0\n  + 4.0\n1 difference; different digests." in told
    assert "[compute] micro_batch\n  - 8\n  + 16\n1 difference; the same digest." in told


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("plan", "nonsense"), ("plan", "check"), ("plan", "check", "--odd")]
)
def test_a_wrong_word_is_a_usage_error(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2

    assert "Usage:" in capsys.readouterr().err


def test_a_missing_package_gives_the_line_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "confide.simulations.cli", None)
    monkeypatch.setattr("confide.common.cli.importlib.import_module", _absent)

    assert run("simulate", "demo") == 11

    assert "pip install 'confide[simulate]'" in capsys.readouterr().err


def _absent(module: str) -> None:
    raise ModuleNotFoundError(f"No module named 'rayon' (from {module})", name="rayon")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0

    assert capsys.readouterr().out.startswith("confide 0.")
