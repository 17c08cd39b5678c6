"""What the project stands on: packages, links, installed files, contracts, examples in the documentation."""

import ast
import doctest
import importlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from confide.common import cli, errors

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PACKAGES = ("client", "common", "server", "simulations")
HEAVY = ("torch", "flwr", "dp_accounting", "transformers", "peft", "opacus", "datasets", "ray")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if not {"generated", "_build"} & set(page.parts)),
]
PAGES_WITH_EXAMPLES = [page for page in PAGES if "```pycon" in page.read_text(encoding="utf-8")]
PAGES_WITH_SESSIONS = [page for page in PAGES if "```console" in page.read_text(encoding="utf-8")]

MAIN_WITH_HELP = """
import sys
from confide.common.cli import main
sys.argv = ["confide", "--help"]
try:
    code = main()
except SystemExit as end:
    code = end.code
print(*(name for name in HEAVY if name in sys.modules), sep="\\n", file=sys.stderr)
sys.exit(code)
"""


def test_packages_are_the_root_folders_with_an_init_and_one_level_deep() -> None:
    folders = {f"confide.{init.parent.name}": init.parent.name for init in ROOT.glob("*/__init__.py")}
    nested = [init for name in PACKAGES for init in (ROOT / name).glob("*/**/__init__.py")]

    assert SETUPTOOLS["package-dir"] == folders
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    assert sorted(folders.values()) == sorted(PACKAGES)
    assert not nested


def test_the_links_for_static_tools_lead_to_the_packages() -> None:
    links = {link.name: link.resolve() for link in (ROOT / ".typing" / "confide").iterdir()}

    assert links == {name: ROOT / name for name in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_says_what_it_is_for(package: str) -> None:
    silent = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / package).rglob("*.py"))
        if not ast.get_docstring(ast.parse(file.read_bytes()))
    ]

    assert not silent


def test_the_version_is_readable() -> None:
    assert importlib.metadata.version("confide") == PYPROJECT["project"]["version"]


def test_the_wheel_holds_every_file_of_the_packages_with_type_markers_and_licence(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    _copy_packages(tree)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"

    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        f"confide/{file.relative_to(tree).as_posix()}"
        for name in PACKAGES
        for file in (tree / name).rglob("*")
        if file.suffix in {".py", ".toml"}
    }
    assert shipped <= held
    assert {f"confide/{name}/py.typed" for name in PACKAGES} <= held
    assert any(name.endswith("/licenses/LICENSE") for name in held)


def test_help_is_shown_without_any_heavy_library() -> None:
    snippet = f"HEAVY = {HEAVY}{MAIN_WITH_HELP}"

    done = subprocess.run([sys.executable, "-c", snippet], check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr.split() == []


def test_every_exit_code_belongs_to_one_error_and_is_in_the_drawing() -> None:
    tree = [
        error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.ConfideError)
    ]

    drawn = dict(re.findall(r"(\w+) +exit (\d+) ", errors.__doc__ or ""))

    assert drawn == {error.__name__: str(error.exit_code) for error in tree}
    assert len(set(drawn.values())) == len(tree)


def test_a_new_file_that_imports_a_kept_library_breaks_its_contract(tmp_path: Path) -> None:
    _copy_packages(tmp_path / "confide")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package, library in (("common", "torch"), ("client", "cryptography"), ("server", "flwr")):
        text = f'"""A newcomer."""\n\n\ndef late() -> None:\n    import {library}.sub\n'
        (tmp_path / "confide" / package / "newcomer.py").write_text(text, encoding="utf-8")

    report = _lint_imports(tmp_path)

    assert "confide.common.newcomer -> torch" in report
    assert "confide.client.newcomer -> cryptography" in report
    assert "confide.server.newcomer -> flwr" in report


def test_imports_against_the_grain_break_their_contracts(tmp_path: Path) -> None:
    _copy_packages(tmp_path / "confide")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, imported in (
        ("client/upward.py", "confide.server.upward"),
        ("server/upward.py", "confide.common.canonical"),
        ("common/errors.py", "confide.common.canonical"),
        ("common/canonical.py", "confide.common.plan"),
    ):
        with (tmp_path / "confide" / file).open("a", encoding="utf-8") as stream:
            stream.write(f"\nimport {imported}\n")

    report = _lint_imports(tmp_path)

    assert "confide.client.upward -> confide.server.upward" in report
    assert "confide.common.errors -> confide.common.canonical" in report
    assert "No cycles are allowed in confide.common." in report


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_in_the_documentation_go_as_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    result = doctest.testfile(
        str(page),
        module_relative=False,
        optionflags=doctest.ELLIPSIS | doctest.REPORT_NDIFF,
        encoding="utf-8",
    )

    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES_WITH_SESSIONS, ids=lambda page: page.stem)
def test_sessions_in_the_documentation_go_as_shown(page: Path, tmp_path: Path) -> None:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": programs, "COLUMNS": "80"}
    checker, how = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    steps = [
        step.partition("\n")
        for session in re.findall(
            r"^```console\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        for step in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]
    ]

    for command, _, shown in steps:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

        assert checker.check_output(shown, done.stdout, how), f"$ {command}\n{done.stdout}"
    assert steps


def test_commands_in_the_documentation_exist_with_their_options() -> None:
    unknown, found = [], 0
    for page in PAGES:
        for command in _commands_of(page):
            found += 1
            unknown += [f"{page.name}: {fault}" for fault in _unknown_in(command)]

    assert not unknown
    assert found > 30


def test_tests_that_the_documentation_names_exist() -> None:
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in (file.stem, *re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    }

    named = {
        name for page in PAGES for name in re.findall(r"\btest(?:_[a-z0-9]+){3,}", page.read_text(encoding="utf-8"))
    }

    assert named <= known
    assert len(named) > 30


def test_rooms_has_a_line_for_every_file() -> None:
    rooms = (ROOT / "docs" / "explanation" / "rooms.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        chapter = rooms.partition(f"## {package}:")[2].partition("\n## ")[0]
        lines = re.findall(r"^\| (`.*?`) \| (.*) \|$", chapter, re.MULTILINE)
        told = {name for names, _ in lines for name in re.findall(r"`(\w+)`", names)}
        to_come = {
            name for names, says in lines if says.startswith("to come") for name in re.findall(r"`(\w+)`", names)
        }
        files = {file.stem for file in (ROOT / package).glob("*.py")} - {"__init__"}

        assert told - to_come == files


def test_the_command_page_shows_every_command_and_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import generate  # type: ignore[import-not-found]  # not a package: Sphinx runs it

    page = generate.cli_page()

    for group, _, commands in generate.groups():
        for name, command in commands.items():
            chapter = page.partition(f"### `confide {group} {name}`")[2].partition("\n##")[0]
            for parameter in command.params:
                word = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
                assert re.search(rf"^\| `{word}\b", chapter, re.MULTILINE), f"{group} {name} {word}"
            assert command.epilog.removeprefix("Example: ") in chapter


def _commands_of(page: Path) -> Iterator[str]:
    """Yield every call of `confide` on a page, in fences and in the text."""
    text = page.read_text(encoding="utf-8")
    for fence in re.findall(r"^```(?:shell|sh|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in fence.replace("\\\n", " ").splitlines():
            if call := re.match(r"(?:\$ )?(?:\S*/)?(confide .*)", line):
                yield call[1]
    for fence in re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield from re.findall(r"^\$ (confide [^&\n]*)", fence, re.MULTILINE)
    for span in re.findall(r"`(confide [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
        yield " ".join(span.split())


def _unknown_in(command: str) -> Iterator[str]:
    words = [word for word in shlex.split(command, comments=True)[1:] if word not in {"…", "..."}]
    if not words or words[0].startswith("-"):
        return
    if words[0] not in cli._GROUPS:
        yield f"{command}: no group {words[0]}"
        return
    called, words = _group(words[0]), words[1:]
    while words and hasattr(called, "commands"):
        if words[0] not in called.commands:
            yield f"{command}: no command {words[0]}"
            return
        called, words = called.commands[words[0]], words[1:]
    known = {"--help", *(o for p in called.params for o in (*p.opts, *p.secondary_opts))}
    yield from (f"{command}: no option {word}" for word in words if word.startswith("--") and word not in known)


def _group(name: str) -> Any:
    return typer.main.get_command(importlib.import_module(cli._GROUPS[name][0]).app)


def _copy_packages(destination: Path) -> None:
    for name in PACKAGES:
        shutil.copytree(ROOT / name, destination / name, ignore=shutil.ignore_patterns("__pycache__"))


def _lint_imports(tree: Path) -> str:
    """Check the contracts of the packages in `tree/confide`, which hide the installed ones."""
    tool = Path(sys.executable).parent / "lint-imports"
    environment = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"}
    done = subprocess.run([tool, "--no-cache"], cwd=tree, env=environment, check=False, capture_output=True, text=True)
    return done.stdout + done.stderr
