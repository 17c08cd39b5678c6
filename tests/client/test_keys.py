"""A site's keys: made once, opened by a passphrase, changed without a moment without one."""

import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from confide.client.home import Home, read_private, write_private
from confide.client.journal import Journal
from confide.client.keys import (
    NO_PASSPHRASE,
    PASSPHRASE_FILE,
    Keys,
    approver_in_file,
    change_passphrase,
    check_fingerprint,
    complete_rotation,
    fingerprint,
    load_approver,
    load_keys,
    make_approver,
    make_keys,
    passphrase_from,
    public_identity,
    rotate,
)
from confide.common.crypto import AgreementKey, Identity, key_to_file, verify
from confide.common.entries import Rotation, rotation_statement
from confide.common.errors import ConfideError, LedgerError, Refused, SealError, UsageError
from tests.client.test_home import child, kill_at_line

SITE, LEDGER = "St. Anna", "ab" * 16
PASSPHRASE, OTHER = b"correct horse battery staple", b"another of sufficient length"
BARE: dict[str, Any] = {"insecure_no_passphrase": True}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "site", SITE)


def bare_keys(home: Home) -> Keys:
    return load_keys(home, b"", **BARE)


def secrets_of(keys: Keys) -> tuple[bytes, bytes]:
    return keys.identity.seed(), keys.vault.secret()


def tree(home: Home) -> dict[str, bytes]:
    return {str(path.relative_to(home.root)): path.read_bytes() for path in home.keys.rglob("*") if path.is_file()}


def test_the_keys_that_were_made_are_loaded_again_under_their_passphrase_only(home: Home) -> None:
    made = make_keys(home, PASSPHRASE)

    loaded = load_keys(home, PASSPHRASE)

    assert secrets_of(loaded) == secrets_of(made)
    assert (made.words, made.pending) == ((), None)
    assert public_identity(home) == made.identity.public
    with pytest.raises(SealError, match=r"vault.pem: .* passphrase is another"):
        load_keys(home, OTHER)
    with pytest.raises(UsageError, match=r"vault.pem: .* is encrypted. Give its passphrase"):
        load_keys(home, b"", **BARE)
    assert {path.stat().st_mode & 0o777 for path in home.keys.glob("*.pem")} == {0o600}
    assert Home.open(home.root) == home


def test_keys_without_a_passphrase_need_the_word_that_says_so_each_time(home: Home) -> None:
    with pytest.raises(UsageError, match=NO_PASSPHRASE):
        make_keys(home, b"")
    assert tree(home) == {}

    made = make_keys(home, b"", **BARE)

    assert made.words == (NO_PASSPHRASE,)
    assert secrets_of(bare_keys(home)) == secrets_of(made)
    with pytest.raises(UsageError, match=NO_PASSPHRASE):
        load_keys(home, b"")
    with pytest.raises(UsageError, match="is not encrypted, but a passphrase is given"):
        load_keys(home, PASSPHRASE)


def test_a_passphrase_that_does_not_do_leaves_no_key(home: Home) -> None:
    for passphrase in (b"short", b"x" * 1024):
        with pytest.raises(UsageError, match="15 to 1023 are needed"):
            make_keys(home, passphrase)

    assert tree(home) == {}


def test_keys_come_from_the_entropy_and_no_two_sites_have_the_same(tmp_path: Path) -> None:
    homes = [Home.create(tmp_path / name, SITE) for name in "abcd"]

    seeded = [make_keys(each, b"", lambda size: b"e" * size, **BARE) for each in homes[:2]]
    drawn = [make_keys(each, b"", **BARE) for each in homes[2:]]

    assert secrets_of(seeded[0]) == secrets_of(seeded[1])
    assert len({secret for keys in (seeded[0], *drawn) for secret in secrets_of(keys)}) == 6


def test_no_key_is_ever_made_over_another(home: Home) -> None:
    make_keys(home, b"", **BARE)
    before = tree(home)

    with pytest.raises(UsageError, match=r"identity.pem is there: .* not replaced"):
        make_keys(home, b"", **BARE)
    assert tree(home) == before

    home.identity.unlink()
    write_private(home.ledger, b"")
    with pytest.raises(UsageError, match=r"ledger.db is there: .* restore it from a backup"):
        make_keys(home, b"", **BARE)


def test_keys_are_not_made_while_the_site_is_in_use(home: Home) -> None:
    with home.lock(), pytest.raises(UsageError, match="is in use"):
        make_keys(home, b"", **BARE)

    assert tree(home) == {}


@pytest.mark.slow
def test_a_making_killed_at_any_line_is_completed_by_the_next_and_a_vault_key_is_kept(home: Home) -> None:
    number, code, kept = 0, -1, 0
    while code:
        number += 1

        def work(number: int = number) -> None:
            kill_at_line(number, "client/keys.py", "client/home.py")
            make_keys(home, b"", **BARE)

        code = child(work)
        assert code in {0, -signal.SIGKILL}
        vault = home.vault.read_bytes() if home.vault.exists() else None
        if home.identity.exists():
            bare_keys(home)
        else:
            make_keys(home, b"", **BARE)
        assert vault in {None, home.vault.read_bytes()}
        kept += vault is not None
        for path in home.keys.iterdir():
            if path.is_file():
                path.unlink()
    assert number > 100
    assert kept > 10


def test_a_vault_key_under_another_passphrase_is_not_taken_over(home: Home) -> None:
    write_private(home.vault, key_to_file(AgreementKey.generate(), OTHER))

    with pytest.raises(SealError, match="passphrase is another"):
        make_keys(home, PASSPHRASE)

    assert not home.identity.exists()


def test_each_purpose_has_a_secret_of_its_own_that_lasts(home: Home) -> None:
    made = make_keys(home, b"", **BARE)

    secrets = {purpose: made.secret(purpose) for purpose in (b"seal", b"fingerprint", b"seal\n", b"s")}

    assert len({*secrets.values(), made.vault.secret(), made.identity.seed()}) == 6
    assert {len(secret) for secret in secrets.values()} == {32}
    assert {purpose: bare_keys(home).secret(purpose) for purpose in secrets} == secrets
    with pytest.raises(UsageError, match="needs a purpose"):
        made.secret(b"")


def test_a_missing_damaged_exchanged_or_too_open_key_file_is_refused_and_named(home: Home) -> None:
    make_keys(home, b"", **BARE)
    vault, identity = home.vault.read_bytes(), home.identity.read_bytes()

    home.vault.write_bytes(identity)
    with pytest.raises(SealError, match=r"vault.pem: .* another kind than AgreementKey"):
        bare_keys(home)
    home.vault.write_bytes(vault)
    for raw in (b"", identity[:-1], identity + b"\n", vault, b"\xff" * 5000):
        home.identity.write_bytes(raw)
        with pytest.raises((SealError, UsageError), match=r"identity.pem"):
            bare_keys(home)
        with pytest.raises((SealError, UsageError), match=r"identity.pem"):
            public_identity(home)
    home.identity.write_bytes(identity)
    home.identity.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 0600"):
        bare_keys(home)
    home.identity.unlink()
    with pytest.raises(UsageError, match=r"identity.pem is not there"):
        bare_keys(home)


def test_no_secret_is_in_what_is_shown(home: Home) -> None:
    keys = make_keys(home, PASSPHRASE)
    hidden = [*secrets_of(keys), keys.secret(b"seal"), PASSPHRASE]

    shown = [repr(keys), str(keys)]
    calls: list[Callable[[], object]] = [
        lambda: load_keys(home, PASSPHRASE + b"!"),
        lambda: make_keys(home, PASSPHRASE),
    ]
    for call in calls:
        with pytest.raises(ConfideError) as caught:
            call()
        shown.append("".join(traceback.format_exception(caught.value)))

    for secret in hidden:
        assert not any(spelling in text for text in shown for spelling in (secret.hex(), repr(secret)[2:-1]))


def test_both_keys_sign_that_one_follows_the_other(home: Home) -> None:
    old = make_keys(home, b"", **BARE).identity

    new, record = rotate(home, b"", LEDGER, in_force=old.public, **BARE)

    statement = rotation_statement(LEDGER, old.public.hex(), new.public.hex())
    assert record.key == new.public.hex() != old.public.hex()
    verify(old.public, statement, bytes.fromhex(record.by_old))
    verify(new.public, statement, bytes.fromhex(record.by_new))
    assert rotate(home, b"", LEDGER, in_force=old.public, **BARE)[1] == record


def rotated(home: Home) -> Rotation:
    """Change the identity as a steward would, from whatever state the site is in."""
    with home.lock():
        journal = Journal.open(home.ledger, identity=bare_keys(home).identity)
        new, record = rotate(home, b"", journal.book.ledger, **BARE)
        journal.rotate(new)
        complete_rotation(home, journal.book.key)
        journal.close()
    return record


def with_ledger(home: Home) -> Identity:
    identity = make_keys(home, b"", **BARE).identity
    Journal.create(home.ledger, site=SITE, identity=identity).close()
    return identity


def test_after_a_rotation_the_new_identity_signs_the_ledger_and_the_vault_key_is_the_same(home: Home) -> None:
    old = with_ledger(home)
    before = bare_keys(home)

    record = rotated(home)

    after = bare_keys(home)
    assert after.identity.public.hex() == record.key == Journal.look(home.ledger).key.hex()
    assert after.identity.public == public_identity(home) != old.public
    assert after.secret(b"seal") == before.secret(b"seal")
    assert sorted(path.name for path in home.keys.glob("*.pem")) == ["identity.pem", "vault.pem"]
    Journal.open(home.ledger, identity=after.identity).close()
    with pytest.raises(LedgerError):
        Journal.open(home.ledger, identity=old)


def test_between_record_and_exchange_the_ledger_says_which_identity_is_in_force(home: Home) -> None:
    old = with_ledger(home)
    journal = Journal.open(home.ledger, identity=old)

    new, _ = rotate(home, b"", journal.book.ledger, **BARE)
    waiting = bare_keys(home)
    complete_rotation(home, journal.book.key)
    still = bare_keys(home)
    journal.rotate(new)
    recorded = bare_keys(home)

    assert (waiting.identity.public, waiting.pending) == (old.public, new.public)
    assert (still.identity.public, still.pending) == (old.public, new.public)
    assert (recorded.identity.public, recorded.pending) == (new.public, None)
    assert public_identity(home) == old.public
    complete_rotation(home, journal.book.key)
    assert public_identity(home) == new.public
    assert not home.next_identity.exists()


def test_if_the_ledger_has_neither_identity_in_force_both_fingerprints_are_told(home: Home) -> None:
    old = with_ledger(home)
    new, _ = rotate(home, b"", LEDGER, **BARE)
    third = Identity.generate()

    with pytest.raises(UsageError) as caught:
        load_keys(home, b"", in_force=third.public, **BARE)

    assert all(fingerprint(key.public) in str(caught.value) for key in (old, new, third))
    home.ledger.unlink()
    with pytest.raises(ConfideError):
        bare_keys(home)


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_the_identity_in_force_usable(home: Home) -> None:
    old = with_ledger(home)
    seen: set[tuple[bool, bool]] = set()
    number, code = 0, -1
    while code:
        number += 1
        root = home.root.with_name(f"{number}")
        shutil.copytree(home.root, root)
        site = Home.open(root)

        def work(number: int = number, site: Home = site) -> None:
            kill_at_line(number, "client/keys.py", "client/home.py")
            rotated(site)

        code = child(work)
        keys = bare_keys(site)
        Journal.open(site.ledger, identity=keys.identity).close()
        state = keys.identity.public == old.public, site.next_identity.exists()
        if state not in seen or number % 10 == 0:
            again = rotated(site)  # from whatever was left
            assert public_identity(site).hex() == again.key == Journal.look(site.ledger).key.hex()
            assert not site.next_identity.exists()
        assert code in {0, -signal.SIGKILL}
        seen.add(state)
        shutil.rmtree(root)
    assert number > 100
    assert seen == {(True, False), (True, True), (False, True), (False, False)}


def test_a_new_identity_under_another_passphrase_is_refused_and_the_old_one_stays(home: Home) -> None:
    old = make_keys(home, PASSPHRASE).identity
    write_private(home.next_identity, key_to_file(Identity.generate(), OTHER))

    with pytest.raises(SealError, match=r"identity.next.pem: .* passphrase is another"):
        rotate(home, PASSPHRASE, LEDGER, in_force=old.public)

    assert load_keys(home, PASSPHRASE, in_force=old.public).identity.public == old.public


def test_after_a_change_of_passphrase_every_key_opens_with_the_new_one_only(home: Home) -> None:
    made = make_keys(home, PASSPHRASE)
    new, _ = rotate(home, PASSPHRASE, LEDGER, in_force=made.identity.public)

    change_passphrase(home, PASSPHRASE, OTHER)

    loaded = load_keys(home, OTHER, in_force=made.identity.public)
    assert secrets_of(loaded) == secrets_of(made)
    assert load_keys(home, OTHER, in_force=new.public).identity.seed() == new.seed()
    with pytest.raises(SealError):
        load_keys(home, PASSPHRASE, in_force=made.identity.public)
    assert Home.open(home.root) == home


def test_a_change_of_passphrase_that_was_interrupted_is_completed_by_the_next(home: Home) -> None:
    made = make_keys(home, b"", **BARE)
    home.vault.write_bytes(key_to_file(made.vault, OTHER))  # as a kill after the first file leaves it

    for passphrase in (b"", b"short"):
        with pytest.raises(UsageError):
            change_passphrase(home, b"", passphrase)
    with pytest.raises(SealError, match=r"vault\.pem"):
        change_passphrase(home, PASSPHRASE, b"a third of sufficient length")
    change_passphrase(home, b"", OTHER)

    assert secrets_of(load_keys(home, OTHER)) == secrets_of(made)


def test_a_passphrase_comes_from_the_file_that_is_named_or_is_asked_for(tmp_path: Path) -> None:
    def asked() -> str:
        return "geheime Wörter für dich"

    for name, raw in (("one", PASSPHRASE), ("two", OTHER + b"\n"), ("three", PASSPHRASE + b"\r\n")):
        write_private(tmp_path / name, raw)
    environment = {PASSPHRASE_FILE: str(tmp_path / "two")}

    assert passphrase_from(tmp_path / "one", environment=environment, ask=asked) == PASSPHRASE
    assert passphrase_from(environment=environment, ask=asked) == OTHER
    assert passphrase_from(tmp_path / "three", environment={}) == PASSPHRASE
    assert passphrase_from(environment={}, ask=asked) == asked().encode()
    with pytest.raises(UsageError, match="No passphrase is given"):
        passphrase_from(environment={PASSPHRASE_FILE: ""})


def test_a_passphrase_file_that_others_may_read_or_that_holds_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    for raw in (b"", b"\n", b"one\ntwo\n", b"one\n\n", b"a\0b", b"x" * 2000):
        path.unlink(missing_ok=True)
        write_private(path, raw)
        with pytest.raises(UsageError, match=str(path)):
            passphrase_from(path, environment={})
    path.write_bytes(PASSPHRASE)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UsageError, match="symbolic link"):
        passphrase_from(tmp_path / "link", environment={})

    path.chmod(0o640)

    with pytest.raises(UsageError, match="chmod 0600") as caught:
        passphrase_from(environment={PASSPHRASE_FILE: str(path)})
    assert PASSPHRASE.decode() not in str(caught.value)
    with pytest.raises(UsageError, match="What was typed is no passphrase"):
        passphrase_from(environment={}, ask=lambda: "")


def test_a_fingerprint_is_forty_digits_in_eight_groups() -> None:
    assert fingerprint(bytes(32)) == "23181 20599 60523 21280 18917 18131 94429 40261"


@given(strategies.binary(min_size=32, max_size=32), strategies.integers(0, 39), strategies.integers(1, 9))
def test_a_fingerprint_with_another_digit_is_not_taken(public: bytes, at: int, more: int) -> None:
    digits = fingerprint(public).replace(" ", "")
    wrong = digits[:at] + str((int(digits[at]) + more) % 10) + digits[at + 1 :]

    for spelled in (
        digits,
        fingerprint(public),
        fingerprint(public).replace(" ", " - "),
        digits[:20] + "\n" + digits[20:],
    ):
        check_fingerprint(public, spelled, "an admin")
    for told in (wrong, digits[:-1], digits + "0", "", digits[::-1] + "1"):
        with pytest.raises(Refused, match="The key of an admin has another fingerprint than the one given") as caught:
            check_fingerprint(public, told, "an admin")
        assert fingerprint(public) not in str(caught.value)


@pytest.mark.parametrize("name", ["Dr. Weiss", "Zoë Müller-Łoś", "x" * 200, "王"])
def test_an_approvers_key_comes_back_with_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weiss.pem"

    made = make_approver(path, name, b"", **BARE)

    assert load_approver(path, b"", **BARE).identity.seed() == made.identity.seed()
    assert (made.name, load_approver(path, b"", **BARE).name) == (name, name)
    assert approver_in_file(path) == (name, made.identity.public)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_approvers_key_needs_its_passphrase_and_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "weiss.pem"
    made = make_approver(path, "Dr. Weiss", PASSPHRASE)

    assert load_approver(path, PASSPHRASE).identity.public == made.identity.public
    with pytest.raises(SealError, match=r"weiss.pem: .* passphrase is another"):
        load_approver(path, OTHER)
    with pytest.raises(UsageError, match="is not replaced"):
        make_approver(path, "Dr. Schwarz", OTHER)
    with pytest.raises(UsageError, match="cannot be written"):
        make_approver(tmp_path / "none" / "weiss.pem", "Dr. Weiss", PASSPHRASE)
    assert approver_in_file(path) == ("Dr. Weiss", made.identity.public)


@pytest.mark.parametrize("name", ["", " ", "a ", "a\nb", "a\0", "\u202ea", "x" * 201, "\ud800"])
def test_a_name_that_is_not_one_printable_line_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name"):
        make_approver(tmp_path / "key.pem", name, PASSPHRASE)

    assert not (tmp_path / "key.pem").exists()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "no head": lambda raw: raw.split(b"\n", 1)[1],
    "another format": lambda raw: raw.replace(b"approver/1", b"approver/2"),
    "no name": lambda raw: raw.replace(b" Weiss", b""),
    "a name with a space": lambda raw: raw.replace(b"Weiss", b"Weiss "),
    "a name that is no text": lambda raw: raw.replace(b"Weiss", b"\xff"),
    "two heads": lambda raw: raw.split(b"\n")[0] + b"\n" + raw,
    "nothing": lambda _: b"",
    "cut": lambda raw: raw[:-1],
    "large": lambda raw: raw + b"\n" * 5000,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_approvers_file_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "weiss.pem"
    make_approver(path, "Weiss", b"", **BARE)
    path.write_bytes(BROKEN[case](path.read_bytes()))

    for call in (lambda: load_approver(path, b"", **BARE), lambda: approver_in_file(path)):
        with pytest.raises((SealError, UsageError), match=r"weiss\.pem"):
            call()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_no_changed_byte_of_a_key_file_is_more_than_an_error_of_ours(data: strategies.DataObject, home: Home) -> None:
    if not home.identity.exists():
        make_keys(home, b"", **BARE)
        make_approver(home.approvers / "weiss.pem", "Weiss", b"", **BARE)
    path = data.draw(strategies.sampled_from([home.identity, home.vault, home.approvers / "weiss.pem"]))
    before = read_private(path, 5000)
    raw = bytearray(before)
    for _ in range(data.draw(strategies.integers(1, 3))):
        raw[data.draw(strategies.integers(0, len(raw) - 1))] = data.draw(strategies.integers(0, 255))
    secret = bare_keys(home).secret(b"seal")
    path.write_bytes(bytes(raw))

    try:
        assert bare_keys(home).secret(b"seal") == secret
        load_approver(home.approvers / "weiss.pem", b"", **BARE)
    except (SealError, UsageError):
        assert bytes(raw) != before
    finally:
        path.write_bytes(before)
