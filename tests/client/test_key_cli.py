"""`confide site key`: who the site is, how that is changed, and how a person gets a key to approve with."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from confide.client.home import write_private
from confide.client.journal import Journal
from confide.client.keys import fingerprint, load_approver, load_keys, public_identity, rotate
from confide.client.policy import read_policy, starter
from tests.conftest import run
from tests.sites import NAME, PASSPHRASE, Site, copied, made


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return made(tmp_path_factory.mktemp("site") / "s")


@pytest.fixture
def site(template: Site, tmp_path: Path) -> Site:
    return copied(template, tmp_path / "s")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command with --json printed: one object, on one line."""
    (line,) = capsys.readouterr().out.splitlines()
    tree: dict[str, Any] = json.loads(line)
    return tree


def test_the_key_is_shown_with_its_fingerprint(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    key = public_identity(site.home)

    assert site.read("key", "show") == 0
    text = capsys.readouterr().out
    assert site.read("key", "show", "--json") == 0

    assert key.hex() in text
    assert fingerprint(key) in text
    assert told(capsys) == {
        "status": "ok",
        "site": NAME,
        "key": key.hex(),
        "fingerprint": fingerprint(key),
        "pending": None,
    }


def test_a_changed_key_is_in_force_in_the_ledger_and_the_old_one_is_gone(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    old = public_identity(site.home)

    assert site.do("key", "rotate", "--json") == 0

    tree = told(capsys)
    book = Journal.look(site.home.ledger)
    assert tree["old"] == old.hex()
    assert tree["key"] == book.key.hex() == public_identity(site.home).hex() != old.hex()
    assert site.read("ledger", "verify") == 0
    assert site.do("ledger", "export", site.root / "out.jsonl") == 0


def test_a_change_that_was_interrupted_is_shown_and_completed_and_not_done_twice(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    home, old = site.home, public_identity(site.home)
    with site.journal() as journal:
        new, _ = rotate(home, b"", journal.book.ledger, insecure_no_passphrase=True)
    site.read("key", "show", "--json")
    waiting = told(capsys)
    with site.journal() as journal:
        journal.rotate(new)
    site.read("key", "show", "--json")
    in_force = told(capsys)

    assert site.do("key", "rotate") == 0

    assert (waiting["key"], waiting["pending"]) == (old.hex(), new.public.hex())
    assert in_force["key"] == new.public.hex()
    assert public_identity(home) == Journal.look(home.ledger).key == new.public
    assert not home.next_identity.exists()
    assert "that was interrupted is complete" in " ".join(capsys.readouterr().out.split())


def test_a_key_is_not_changed_while_an_agent_works(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with site.home.lock():
        assert site.do("key", "rotate") == 2

    assert "in use" in capsys.readouterr().err


def test_an_approvers_key_is_its_own_persons_and_its_line_fits_into_the_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret, out, name = tmp_path / "secret", tmp_path / "zoe.pem", "Dr. Zoë O'Hara-Müller"
    write_private(secret, PASSPHRASE.encode())

    assert run("site", "key", "approver", name, "--out", out, "--key-passphrase-file", secret, "--json") == 0
    tree = told(capsys)
    assert run("site", "key", "approver", name, "--out", out, "--key-passphrase-file", secret) == 2

    person = load_approver(out, PASSPHRASE.encode())
    assert (person.name, person.identity.public.hex()) == (name, tree["key"])
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert read_policy(starter(NAME, {"approval.approvers": (tree["policy"],)}).encode()).approvers == {
        tree["key"]: name
    }
    assert "is not replaced" in capsys.readouterr().err


def test_the_entry_for_the_policy_is_printed_alone_and_a_name_that_ends_in_a_full_stop_gets_no_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "anna.pem"

    assert run("site", "key", "approver", "Anna Huber jr.", "--out", out, "--insecure-no-key-passphrase") == 0

    text = capsys.readouterr().out
    assert "the key of Anna Huber jr. key " in " ".join(text.split())
    assert "Add it to [approval] approvers in the policy:" in text
    assert "approvers = [" not in text


@pytest.mark.parametrize("name", ["", " Anna", "Anna\nBen", "Anna \u202eneB", "A" * 101, "Anna; Ben"])
def test_a_name_that_the_policy_would_refuse_gets_no_key(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "key.pem"

    assert run("site", "key", "approver", name, "--out", out, "--insecure-no-key-passphrase") == 2

    assert "is no person's name" in capsys.readouterr().err
    assert not out.exists()


def test_the_sites_passphrase_is_never_taken_for_a_persons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret, out = tmp_path / "secret", tmp_path / "anna.pem"
    write_private(secret, PASSPHRASE.encode())
    monkeypatch.setenv("CONFIDE_PASSPHRASE_FILE", str(secret))

    assert run("site", "key", "approver", "Anna", "--out", out) == 2

    assert "--key-passphrase-file" in capsys.readouterr().err
    assert not out.exists()


def test_after_a_change_keys_open_with_the_new_passphrase_only(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.encrypt()
    new, another = site.root / "new", "another long passphrase"
    write_private(new, another.encode())
    change = ("key", "passphrase", "--new-passphrase-file", new, "--passphrase-file")

    assert site.read(*change, site.passphrase, "--json") == 0
    told(capsys)
    assert site.read("ledger", "export", site.root / "a.jsonl", "--passphrase-file", site.passphrase) == 12
    assert site.read("ledger", "export", site.root / "a.jsonl", "--passphrase-file", new) == 0

    load_keys(site.home, another.encode())


def test_no_secret_is_ever_printed(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.encrypt()
    identity = load_keys(site.home, PASSPHRASE.encode()).identity

    site.read("key", "show")
    site.read("key", "rotate", "--passphrase-file", site.passphrase)
    site.read("key", "rotate", "--passphrase-file", site.passphrase, "--json")

    captured = capsys.readouterr()
    for secret in (PASSPHRASE, identity.seed().hex(), load_keys(site.home, PASSPHRASE.encode()).identity.seed().hex()):
        assert secret not in captured.out + captured.err
