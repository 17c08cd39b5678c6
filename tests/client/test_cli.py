"""`confide site`: making a site, joining a federation, and what every command must keep to."""

import importlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import confide.client
import confide.common
import confide.simulations
from confide.client.enrolment import current
from confide.client.journal import Journal
from confide.client.keys import fingerprint, public_identity
from confide.client.policy import load_policy
from confide.common import cli
from confide.common.crypto import Identity
from confide.common.roster import Roster
from tests.conftest import run
from tests.sites import ADMIN, COORDINATOR, FEDERATION, NAME, OTHERS, PASSPHRASE, Site, copied, made

HEAVY = {"torch", "transformers", "peft", "opacus", "flwr", "matplotlib", "datasets", "pyarrow", "ray"}
PRINT = "print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return made(tmp_path_factory.mktemp("site") / "s")


@pytest.fixture
def site(template: Site, tmp_path: Path) -> Site:
    return copied(template, tmp_path / "s")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (line,) = capsys.readouterr().out.splitlines()
    tree: dict[str, Any] = json.loads(line)
    return tree


def _loaded(code: str, *words: object) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{PRINT}", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.split())


def test_importing_the_commands_loads_no_heavy_library() -> None:
    assert not HEAVY & _loaded("import confide.client.cli")


def test_help_loads_next_to_nothing() -> None:
    code = "from confide.common.cli import main\ntry: main(['site', '--help'])\nexcept SystemExit: pass"

    loaded = _loaded(code)

    # These alone take most of half a second.
    assert not (HEAVY | {"numpy", "cryptography", "dp_accounting", "prometheus_client", "sqlite3"}) & loaded


@pytest.mark.parametrize("command", ["status", "budget", "watch --once", "data list", "plan list", "ledger show"])
def test_commands_that_only_look_load_no_torch(command: str, site: Site) -> None:
    code = "from confide.common.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code"

    assert not HEAVY & _loaded(code, "site", *command.split(), "--site", site.home.root)


def test_a_new_site_has_keys_a_ledger_and_a_policy_that_allows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "north"

    assert run("site", "init", "north", "--site", root, "--insecure-no-passphrase", "--json") == 0

    found, book = told(capsys), Journal.look(root / "ledger.db")
    policy = load_policy(root / "policy.toml")
    assert (found["site"], found["ledger"], found["words"]) == ("north", book.ledger, ["insecure_no_passphrase"])
    assert found["key"] == book.key.hex()
    assert found["fingerprint"] == fingerprint(book.key)
    assert (policy.site, policy.approvers, policy.model.tasks) == ("north", {}, ())
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o077 for path in root.iterdir() if path.name != "run")


def test_making_a_site_shows_its_key_and_the_next_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE)
    secret.chmod(0o600)

    assert run("site", "init", "north", "--site", tmp_path / "n", "--passphrase-file", secret) == 0

    text = capsys.readouterr().out
    key = Journal.look(tmp_path / "n" / "ledger.db").key
    for said in (key.hex(), fingerprint(key), "1. make a key", "2. edit", "3. with the federation's roster"):
        assert said in text
    assert "not encrypted" not in text


@pytest.mark.parametrize("content", ["", "short", "two\nlines\n"], ids=["nothing", "too short", "two lines"])
def test_a_passphrase_that_does_not_do_leaves_nothing_behind(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text(content)
    secret.chmod(0o600)

    assert run("site", "init", "north", "--site", tmp_path / "n", "--passphrase-file", secret) == 2

    assert not (tmp_path / "n").exists()
    assert not content or content not in capsys.readouterr().err


def test_a_site_is_never_made_over_another(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    before = site.home.ledger.read_bytes()

    assert run("site", "init", "other", "--site", site.home.root) == 2  # no passphrase was asked for

    assert site.home.ledger.read_bytes() == before
    assert f"is the site {site.home.site} already" in capsys.readouterr().err


def test_a_name_that_no_roster_could_have_is_refused_before_a_passphrase_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("site", "init", "Zürich", "--site", tmp_path / "n") == 2

    assert "letters a–z and A–Z without accents" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_commands_that_are_printed_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("site", "init", "north", "--site", tmp_path / "our site", "--insecure-no-passphrase") == 0

    assert f"confide site policy check --site '{tmp_path / 'our site'}'" in capsys.readouterr().out


def test_a_socket_that_a_killed_agent_left_behind_is_no_agent(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(site.home.control_socket))

    assert run("site", "stop", "--site", site.home.root) == 10

    assert "No agent of" in capsys.readouterr().err


def test_a_group_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--postman-group", "no-such-group-here", "--insecure-no-passphrase")

    assert run("site", "init", "north", "--site", tmp_path / "n", *words) == 2

    assert "no group 'no-such-group-here'" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_a_group_may_pass_to_the_sockets_and_read_nothing(tmp_path: Path) -> None:
    root, group = tmp_path / "n", os.getgid()

    assert run("site", "init", "north", "--site", root, "--postman-group", group, "--insecure-no-passphrase") == 0

    assert stat.S_IMODE(root.stat().st_mode) == 0o710
    assert (root / "run").stat().st_gid == group


def _roster(site: Site, tmp_path: Path, epoch: int = 1, federation: str = "lung-2031", admin: Identity = ADMIN) -> Path:
    path = tmp_path / f"roster-{epoch}.json"
    roster = Roster(
        federation=federation,
        epoch=epoch,
        coordinator=COORDINATOR.public,
        sites={NAME: public_identity(site.home), **OTHERS},
    )
    path.write_bytes(roster.signed([admin]))
    return path


def test_joining_pins_the_admins_and_is_in_the_ledger(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--admin", ADMIN.public.hex(), "--fingerprint", fingerprint(ADMIN.public))

    assert site.do("join", _roster(site, tmp_path), *words, "--json") == 0

    found, book = told(capsys), Journal.look(site.home.ledger)
    assert found["fingerprints"] == [fingerprint(ADMIN.public)]
    assert found["coordinator"] == fingerprint(COORDINATOR.public)
    assert book.federations["lung-2031"].admins == (ADMIN.public.hex(),)
    assert book.federations["lung-2031"].roster == current(site.home, "lung-2031").digest


def test_a_newer_roster_needs_no_keys_and_an_older_one_is_refused(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = _roster(site, tmp_path, 1, FEDERATION)

    assert site.do("join", _roster(site, tmp_path, 3, FEDERATION)) == 0
    assert "epoch 3" in capsys.readouterr().out
    assert site.do("join", older) == 9
    assert site.do("join", _roster(site, tmp_path, 4, FEDERATION, admin=COORDINATOR)) == 9

    assert Journal.look(site.home.ledger).federations[FEDERATION].epoch == 3


def test_the_same_roster_again_adds_no_record(site: Site, tmp_path: Path) -> None:
    roster = _roster(site, tmp_path, 3, FEDERATION)
    assert site.do("join", roster) == 0
    before = Journal.look(site.home.ledger).size

    assert site.do("join", roster) == 0

    assert Journal.look(site.home.ledger).size == before


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--admin", ADMIN.public.hex()), 2, "Nobody is here to compare fingerprints"),
        (
            ("--admin", ADMIN.public.hex(), "--fingerprint", "12345 " * 8),
            9,
            "has another fingerprint than the one given",
        ),
        (("--admin", "zz"), 2, "is not a key of 64 hexadecimal digits"),
        (("--fingerprint", "12345 " * 8), 2, "Give both, or neither"),
        ((), 2, "does not belong to the federation"),
    ],
    ids=["nobody compares", "another fingerprint", "no key", "no admin", "not a member"],
)
def test_nothing_is_pinned_that_was_not_compared(
    words: tuple[str, ...], code: int, says: str, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.do("join", _roster(site, tmp_path), *words) == code

    assert says in capsys.readouterr().err
    assert "lung-2031" not in Journal.look(site.home.ledger).federations


def test_what_is_no_roster_is_said_to_be_none(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello")

    assert site.do("join", tmp_path / "text") == 8
    assert "not a roster" in capsys.readouterr().err
    assert site.do("join", tmp_path / "absent") == 2


def test_without_an_agent_there_is_nothing_to_stop(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.read("stop") == 10

    assert "confide site agent" in capsys.readouterr().err


def test_an_agent_of_a_plan_that_nobody_approved_is_refused_and_the_trail_has_why(
    site: Site, base_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Journal.look(site.home.ledger).size

    assert site.do("agent", site.plan, "--model", base_directory) == 9
    assert "is not approved" in capsys.readouterr().err
    assert site.do("agent", site.plan, "--model", base_directory, "--data", "letters") == 9

    told_why = [json.loads(line) for path in sorted(site.home.log.glob("*.jsonl")) for line in path.open()]
    assert told_why[-1]["event"] == "agent-refused"
    assert told_why[-1]["error"] == "Refused"
    assert Journal.look(site.home.ledger).size == before
    assert not list(site.home.run.iterdir())


def test_an_agent_is_refused_a_site_that_another_one_holds(
    site: Site, base_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with site.home.lock():
        assert site.do("agent", site.plan, "--model", base_directory, "--data", "letters") == 2

    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


def test_an_agent_waits_for_whoever_writes_to_the_ledger_and_a_command_soon_says_that_it_is_busy(
    site: Site, base_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    begun = Journal.open

    def watched(path: Path, *, wait_s: float, **options: Any) -> Journal:
        waits.append(wait_s)
        return begun(path, wait_s=wait_s, **options)

    monkeypatch.setattr(Journal, "open", watched)
    site.do("agent", site.plan, "--model", base_directory)
    site.do("data", "check", "letters", site.plan)

    assert waits == [600.0, 10.0]


def _commands() -> Any:
    return typer.main.get_command(importlib.import_module("confide.client.cli").app)


def test_every_command_that_a_message_names_exists() -> None:
    named: dict[str, Path] = {}
    for package in (confide.client, confide.common, confide.simulations):
        for path in Path(package.__path__[0]).glob("*.py"):
            text = re.sub(r'"\s*\n?\s*f?"', "", path.read_text(encoding="utf-8"))
            named |= dict.fromkeys(re.findall(r"confide site ((?:[a-z]+ ?){1,2})", text), path)

    for words, path in named.items():
        called = _commands()
        for word in words.split():
            if not hasattr(called, "commands"):
                break
            assert word in called.commands, f"{path.name}: confide site {words}"
            called = called.commands[word]
    assert len(named) > 20


def test_every_command_has_an_example_and_what_shows_can_print_json() -> None:
    def within(command: Any, words: str) -> Any:
        if not hasattr(command, "commands"):
            yield words, command
            return
        for name, inner in command.commands.items():
            yield from within(inner, f"{words} {name}")

    for words, command in within(_commands(), "confide site"):
        assert command.epilog.startswith(f"Example: {words}"), words
        assert command.help, words
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options or words in {"confide site agent", "confide site watch"}, words


def test_the_group_is_loaded_lazily() -> None:
    assert cli._GROUPS["site"][:2] == ("confide.client.cli", "site")
