"""`confide site ledger`: what anybody may read and verify, and what a site does when its ledger is lost."""

import json
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from confide.client.home import replace_private
from confide.client.journal import Journal, salvage
from confide.client.keys import fingerprint, public_identity
from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import Checkpoint
from confide.common.crypto import Identity
from confide.common.errors import LedgerError, Refused
from confide.common.export import write_export
from confide.common.witness import Witness
from tests.sites import ANNA, DATA, EVE, FEDERATION, NAME, RUN, Site, copied, made

RECOVER = ("ledger", "recover", "--reason", "The disk failed.", "--as", ANNA)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = made(tmp_path_factory.mktemp("site") / "s")
    site.change_policy(after_days=1, most=1)
    site.approve(site.plan)
    site.train(1)
    return site


@pytest.fixture
def site(template: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    monkeypatch.setenv("COLUMNS", "100")
    capsys.readouterr()
    return copied(template, tmp_path / "s")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command with --json printed: one object, on one line."""
    (line,) = capsys.readouterr().out.splitlines()
    tree: dict[str, Any] = json.loads(line)
    return tree


def exported(site: Site) -> Path:
    path = site.root / "out.jsonl"
    assert site.do("ledger", "export", path) == 0
    return path


def damage(site: Site) -> None:
    """Change a byte of the last record, where SQLite notices nothing."""
    connection = sqlite3.connect(site.home.ledger)
    connection.execute("DROP TRIGGER record_stays")
    line = connection.execute("SELECT line FROM record ORDER BY seq DESC LIMIT 1").fetchone()[0]
    connection.execute("UPDATE record SET line = ? WHERE line = ?", (line.replace(b"spring", b"sprint"), line))
    connection.execute(
        "CREATE TRIGGER record_stays BEFORE UPDATE ON record BEGIN SELECT RAISE(ABORT, 'records are only added'); END"
    )
    connection.commit()
    connection.close()


def test_the_table_has_a_line_for_each_record_and_json_the_records_themselves(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.read("ledger", "show") == 0
    text = capsys.readouterr().out
    assert site.read("ledger", "show", "--json") == 0
    tree = told(capsys)
    assert site.read("ledger", "show", "--kind", "reserve", "--last", 1) == 0
    one = capsys.readouterr().out

    lines = salvage(site.home.ledger)
    assert tree["records"] == [json.loads(line) for line in lines]
    assert [row.split()[3] for row in text.splitlines() if row[:4].strip().isdecimal()] == [
        json.loads(line)["kind"] for line in lines
    ]
    assert f"{RUN}, round 1 on {DATA}: 4 steps" in one
    assert f"1 of {len(lines)} records" in one


def test_a_kind_that_there_is_none_of_is_refused_by_name(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.read("ledger", "show", "--kind", "spend") == 2

    assert "no kind of record 'spend'. Known are: genesis, policy," in capsys.readouterr().err


def test_a_whole_ledger_and_its_export_are_verified_to_the_same_root(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    export = exported(site)
    capsys.readouterr()

    assert site.read("ledger", "verify", "--json") == 0
    own = told(capsys)
    assert site.read("ledger", "verify", export, "--json") == 0
    other = told(capsys)
    assert site.read("ledger", "verify", export, "--key", own["key"]) == 0
    text = capsys.readouterr().out

    assert own == other
    assert own["size"] == Journal.look(site.home.ledger).size
    (account,) = own["accounts"]
    assert account["used"] > 0
    assert account["used"] + account["left"] == pytest.approx(30)
    assert f"The ledger of {NAME} is whole" in text
    assert own["root"] in text
    assert "Compare the key" not in text


def test_an_export_is_verified_without_a_site_a_database_or_torch(site: Site, tmp_path: Path) -> None:
    export = exported(site)
    shutil.rmtree(site.root / "site")
    words = ["site", "ledger", "verify", str(export)]
    code = (
        "import sys\nfrom confide.common import cli\n"
        f"try:\n    cli.main({words!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'sqlite3'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)


def rewritten(site: Site, export: Path) -> None:
    """An export that somebody else made up, whole in itself."""
    stranger = Identity(bytes([99]) * 32)
    journal = Journal.create(None, site=NAME, identity=stranger)
    write_export(export, journal.lines(), journal.checkpoint(), stranger.public)


def without(line: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [kept for place, kept in enumerate(lines) if place != line % len(lines)]


TAMPERED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a byte": (lambda lines: [line.replace(b'"round":1', b'"round":2') for line in lines], "chain is broken"),
    "a record left out": (without(3), "missing, repeated or in another order"),
    "the last record left out": (lambda lines: [*lines[:-2], lines[-1]], "older copy, or it was cut short"),
    "two records swapped": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "in another order"),
    "the checkpoint left out": (without(-1), "is not a checkpoint"),
    "the end cut off": (lambda lines: [*lines[:-1], lines[-1][:-9]], "is not a checkpoint"),
    "no record": (lambda lines: lines[-1:], "this is no ledger, or its beginning is missing"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_is_wrong_with_an_export_is_named_and_the_exit_code_is_the_ledgers(
    case: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    export = exported(site)
    change, words = TAMPERED[case]
    export.write_bytes(b"\n".join(change(export.read_bytes().splitlines())) + b"\n")

    code = site.read("ledger", "verify", export)

    assert code == LedgerError.exit_code
    assert words in capsys.readouterr().err


def test_a_ledger_that_somebody_else_made_up_is_found_by_the_sites_key(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.read("key", "show", "--json")
    key = told(capsys)["key"]
    made_up = site.root / "made-up.jsonl"
    rewritten(site, made_up)

    assert site.read("ledger", "verify", made_up) == 0
    assert "Compare the key with the one that you know" in capsys.readouterr().out
    assert site.read("ledger", "verify", made_up, "--key", key) == 13


def test_a_damaged_ledger_is_named_by_every_command_that_reads_it(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(site)

    for words in (("ledger", "show"), ("ledger", "verify"), ("plan", "list"), ("plan", "show", RUN)):
        assert site.read(*words) == 13
        assert "confide site ledger recover" in capsys.readouterr().err
    assert site.do("ledger", "export", site.root / "new.jsonl") == 13


def seen(site: Site, path: Path) -> None:
    """What another site's witness remembers of the ledger as it is now."""
    with site.journal() as journal:
        Witness(path).see(FEDERATION, NAME, journal.book.key, journal.checkpoint().short())


def test_checkpoints_that_others_saw_are_compared_whatever_form_they_have(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    witness, note, short = (site.root / name for name in ("witness.json", "note.txt", "short.txt"))
    seen(site, witness)
    with site.journal() as journal:
        note.write_text(journal.checkpoint().note(journal.book.key), encoding="utf-8")
        short.write_text(journal.checkpoint().short() + "\n", encoding="utf-8")
    site.train(2)
    files = [word for path in (witness, note, short) for word in ("--witness", path)]

    assert site.read("ledger", "verify", *files, "--json") == 0
    tree = told(capsys)
    assert site.read("ledger", "verify", *files) == 0

    assert [each["of"] for each in tree["seen"]] == [f"{NAME} in {FEDERATION}", "a checkpoint", "a checkpoint"]
    assert {each["size"] for each in tree["seen"]} == {tree["size"] - 3}
    assert "seen elsewhere, and agrees" in capsys.readouterr().out


def test_an_old_copy_is_found_by_what_others_saw(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    witness, old = site.root / "witness.json", site.root / "old.jsonl"
    assert site.do("ledger", "export", old) == 0
    site.train(2)
    seen(site, witness)

    assert site.read("ledger", "verify", old) == 0
    capsys.readouterr()
    assert site.read("ledger", "verify", old, "--witness", witness) == 13

    message = capsys.readouterr().err
    assert str(witness) in message
    assert "older copy" in message


def test_a_fork_is_found_by_what_others_saw(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    other, witness = copied(site, site.root.with_name("fork")), site.root / "witness.json"
    site.train(2)
    other.do("plan", "revoke", RUN, "--reason", "Over.")
    other.approve(other.plan)
    other.train(2)
    with other.journal() as journal:
        longer = journal.checkpoint().size
    assert longer > Journal.look(site.home.ledger).size
    seen(site, witness)
    capsys.readouterr()

    assert other.read("ledger", "verify", "--witness", witness) == 13

    assert "forked" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_said_to_be_none(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, code in (("a", b"hello", 13), ("b", b"{}", 13), ("c", None, 2)):
        path = site.root / name
        if content is not None:
            path.write_bytes(content)
        assert site.read("ledger", "verify", "--witness", path) == code
        assert str(path) in capsys.readouterr().err


def test_an_export_replaces_an_older_one_of_the_same_ledger_and_no_other_file(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    export, letter, made_up = exported(site), site.root / "letter.txt", site.root / "made-up.jsonl"
    letter.write_text("Dear colleague", encoding="utf-8")
    rewritten(site, made_up)
    site.train(2)

    assert site.do("ledger", "export", export) == 0
    assert site.do("ledger", "export", letter) == 2
    assert site.do("ledger", "export", made_up) == 2

    assert len(export.read_bytes().splitlines()) == Journal.look(site.home.ledger).size + 1
    assert letter.read_text(encoding="utf-8") == "Dear colleague"
    assert "is no export of this ledger" in capsys.readouterr().err


def check_recovered(site: Site, tree: dict[str, Any]) -> None:
    """Nothing is approved, registered or left after a recovery, and the file before is kept."""
    book = Journal.look(site.home.ledger)
    assert book.recoveries == 1
    assert all(account.left == 0 for account in book.accounts.values())
    assert all(standing.revoked for standing in book.approvals)
    assert book.lost_data_sets == set(tree["data_sets_to_register"])


def test_a_damaged_ledger_is_taken_up_as_far_as_it_holds_and_the_file_is_kept(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(site)
    before, records = site.home.ledger.read_bytes(), len(salvage(site.home.ledger))

    assert site.do(*RECOVER, "--json") == 0

    tree = told(capsys)
    check_recovered(site, tree)
    assert tree["records"] == records
    assert tree["data_sets_to_register"] == [DATA]
    assert Path(tree["moved_aside"]).read_bytes() == before
    assert site.read("ledger", "verify") == 0
    assert site.approve(site.plan) == 2
    assert "No data set is registered here" in capsys.readouterr().err


def test_a_lost_ledger_is_taken_up_from_its_export(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    export, witness = exported(site), site.root / "witness.json"
    site.train(2)
    seen(site, witness)
    size = Journal.look(site.home.ledger).size
    site.home.ledger.unlink()
    for end in ("-wal", "-shm"):
        site.home.ledger.with_name(f"ledger.db{end}").unlink(missing_ok=True)
    capsys.readouterr()

    assert site.do(*RECOVER) == 2
    assert "Give an export, or an earlier copy" in capsys.readouterr().err
    assert site.do(*RECOVER, export, "--witness", witness) == 0
    text = " ".join(capsys.readouterr().out.split())

    book = Journal.look(site.home.ledger)
    assert book.accounts["1"].left == 0
    last = json.loads(salvage(site.home.ledger)[-1])
    assert (last["kind"], last["size"], last["by"]) == ("recover", size, ANNA)
    assert f"Register the data again: {DATA}." in text
    assert "Tell the admins of each federation" in text


def lost(site: Site) -> None:
    """Let the ledger be gone."""
    for end in ("", "-wal", "-shm"):
        site.home.ledger.with_name(f"ledger.db{end}").unlink(missing_ok=True)


def test_an_export_from_before_changes_of_the_key_is_recovered_from_with_the_present_keys(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    export, first = exported(site), public_identity(site.home)
    for _ in range(2):
        assert site.do("key", "rotate") == 0
    text = " ".join(capsys.readouterr().out.split())
    lost(site)

    assert site.do(*RECOVER, export, "--json") == 0

    tree, book = told(capsys), Journal.look(site.home.ledger)
    kinds = [json.loads(line)["kind"] for line in salvage(site.home.ledger)[tree["records"] :]]
    assert kinds[:3] == ["rotate", "rotate", "recover"]
    assert tree["rotations"] == 2
    assert book.key == public_identity(site.home) != first
    assert stat.S_IMODE(site.home.rotations.stat().st_mode) == 0o600
    assert "Write a new export of the ledger: confide site ledger export FILE" in text
    assert site.do("ledger", "export", export) == 0


def test_without_the_changes_of_the_key_an_export_from_before_is_refused_by_name_and_both_fingerprints(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    export, first = exported(site), public_identity(site.home)
    assert site.do("key", "rotate") == 0
    site.home.rotations.unlink()
    lost(site)
    capsys.readouterr()

    assert site.do(*RECOVER, export) == 2

    text = capsys.readouterr().err
    for part in (str(export), fingerprint(first), fingerprint(public_identity(site.home)), "--nothing-left"):
        assert part in text
    assert site.do(*RECOVER, "--nothing-left") == 0


@pytest.mark.parametrize("content", ["", "confide-rotations/2\n", "confide-rotations/1\n{}\n", None])
def test_changes_of_the_key_that_are_damaged_or_not_signed_lead_nowhere(
    site: Site, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    export = exported(site)
    assert site.do("key", "rotate") == 0
    kept = site.home.rotations.read_text(encoding="ascii")
    if content is None:
        line = json.loads(kept.splitlines()[1])
        content = f"confide-rotations/1\n{canonical_bytes(line | {'by_old': line['by_new']}).decode()}\n"
    replace_private(site.home.rotations, content.encode())
    lost(site)
    capsys.readouterr()

    assert site.do(*RECOVER, export) in {12, 13}

    assert "rotations.jsonl is damaged" in (text := capsys.readouterr().err) or "do not follow on the export" in text
    assert not site.home.ledger.exists()


@pytest.mark.parametrize("reason", ["two\nlines", "x" * 2001, "\x1b[31mred"])
def test_a_reason_that_cannot_be_recorded_is_said_so_before_any_key_is_opened(
    site: Site, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = Journal.look(site.home.ledger).size

    for words in (
        ("ledger", "recover", "--old-copy"),
        ("ledger", "renew", "1", "--key", "none.pem"),
        ("ledger", "forget", FEDERATION, "south"),
        ("plan", "revoke", RUN),
    ):
        opens = [] if words[1] == "forget" else ["--insecure-no-passphrase"]
        assert site.read(*words, "--reason", reason, *opens) == 2
        assert "--reason h" in (text := capsys.readouterr().err)
        assert "\x1b[31m" not in text
    assert Journal.look(site.home.ledger).size == size


def test_white_space_around_a_reason_is_not_recorded(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.do("plan", "revoke", RUN, "--reason", "  A patient objected. ") == 0

    assert json.loads(salvage(site.home.ledger)[-1])["reason"] == "A patient objected."


def test_what_is_no_key_is_not_compared_with_one(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.read("ledger", "verify", "--key", "00") == 2

    assert "--key has 2 characters and is no key: 64 hexadecimal digits are." in capsys.readouterr().err


def test_an_earlier_copy_of_the_database_is_taken_up_too(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with site.journal():
        pass  # what SQLite keeps beside it is in it now
    copy = site.root / "copy.db"
    shutil.copy(site.home.ledger, copy)
    site.train(2)
    damage(site)

    assert site.do(*RECOVER, copy, "--json") == 0

    check_recovered(site, told(capsys))


def test_where_nothing_is_left_a_new_ledger_says_so_and_gives_nobody_a_fresh_budget(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Journal.look(site.home.ledger).ledger
    site.home.ledger.write_bytes(b"\0" * 8192)

    assert site.do(*RECOVER) == 2
    assert "--nothing-left" in capsys.readouterr().err
    assert site.do(*RECOVER, "--nothing-left", "--json") == 0
    tree = told(capsys)

    book = Journal.look(site.home.ledger)
    assert book.recoveries == 1
    assert book.ledger != old
    assert book.policy is not None
    assert Path(tree["moved_aside"]).read_bytes() == b"\0" * 8192


def test_a_whole_ledger_is_not_recovered_unless_it_is_said_to_be_an_old_copy(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.do("ledger", "recover") == 2
    assert "needs a reason" in capsys.readouterr().err
    assert site.do(*RECOVER) == 2
    assert "is whole" in capsys.readouterr().err
    assert Journal.look(site.home.ledger).recoveries == 0
    assert site.do(*RECOVER, "--old-copy", "--json") == 0

    check_recovered(site, told(capsys))


def test_a_recovery_that_fails_leaves_the_ledger_where_it_was(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(site)
    before = site.home.ledger.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise LedgerError("There is no room on the disk.")

    monkeypatch.setattr(Journal, "restore", full)
    assert site.do(*RECOVER) == 13

    assert site.home.ledger.read_bytes() == before
    assert not list(site.home.root.glob("ledger.db.before-*"))


def test_an_agent_at_work_is_not_recovered_under_its_hands(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    damage(site)

    with site.home.lock():
        assert site.do(*RECOVER) == 2

    assert "in use" in capsys.readouterr().err


def renew(site: Site, *words: object, by: str = ANNA) -> int:
    return site.do(
        *("ledger", "renew", *words, "--key", site.key(by), "--insecure-no-key-passphrase"),
        *("--reason", "The admissions of a new year."),
    )


def test_a_budget_begins_anew_when_the_policy_allows_it_and_an_approver_signs(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert renew(site, 1) == 9
    assert "not before" in capsys.readouterr().err
    used = Journal.look(site.home.ledger).accounts["1"].used
    monkeypatch.setattr(Journal.open.__func__, "__kwdefaults__", {"clock": lambda: 4e9, "wait_s": 10.0})  # type: ignore[attr-defined]

    assert renew(site, 2) == 2
    assert renew(site, 1, by=EVE) == 9
    assert renew(site, 1, "--json") == 0
    tree = told(capsys)
    assert renew(site, 1) == 9

    assert (tree["period"], tree["used"], tree["by"]) == (2, 0.0, ANNA)
    assert tree["total"] == pytest.approx(used)


def test_a_peer_whose_ledger_was_lost_is_let_go_on_by_name_and_reason(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    key, other = Identity(bytes([7] * 32)), "south"
    seen = Witness(site.home.witness)
    seen.see(FEDERATION, other, key.public, Checkpoint.sign("1" * 32, 40, bytes(32), 3, key).short())
    younger = Checkpoint.sign("2" * 32, 2, bytes(32), 0, key).short()
    with pytest.raises(Refused):
        Witness(site.home.witness).see(FEDERATION, other, key.public, younger)

    assert site.read("ledger", "forget", FEDERATION, other, "--reason", "Its disk failed.", "--json") == 0

    assert told(capsys)["records"] == 40
    Witness(site.home.witness).see(FEDERATION, other, key.public, younger)
    assert [each.reason for each in Witness(site.home.witness).forgotten(FEDERATION, other)] == ["Its disk failed."]
    assert site.read("ledger", "forget", FEDERATION, "nobody", "--reason", "None.") == 2
