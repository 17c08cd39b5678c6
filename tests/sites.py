"""A made-up site on disk: keys, a policy, approvers, a federation it belongs to, registered data and a signed plan."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from confide.client import enrolment
from confide.client.home import Home, replace_private, write_private
from confide.client.journal import Journal
from confide.client.judgement import enforced, starter_for
from confide.client.keys import (
    APPROVER_FORMAT,
    change_passphrase,
    fingerprint,
    load_approver,
    load_keys,
    make_approver,
    make_keys,
)
from confide.client.mechanism import Mechanism
from confide.client.policy import approver_entry
from confide.client.registry import Registry
from confide.client.synthetic import write_synthetic
from confide.common import plan as plans
from confide.common.accounting import planned_spend
from confide.common.crypto import Identity, key_to_file
from confide.common.entries import Bind, Commit, Reserve
from confide.common.plan import read_plan
from confide.common.roster import Roster
from confide.common.signed_plan import sign_plan
from tests.conftest import run

NAME, FEDERATION, RUN, DATA = "St. Anna", "heart-2030", "spring", "letters"
ANNA, BEN, EVE = "Anna Huber", "Ben Müller", "Eve Stranger"
ADMIN, COORDINATOR = (Identity(bytes([number]) * 32) for number in (101, 102))
PASSPHRASE = "correct horse battery staple"
OTHERS = {f"site-{number}": Identity(bytes([number]) * 32).public for number in (103, 104, 105)}
DIGEST = "sha256:" + "12345678" * 8
START = "sha256:" + "b2" * 32


def plan_text(**settings: object) -> str:
    """A plan of few rounds that the site's policy allows; settings such as rounds replace its own."""
    text = plans.starter("heart", "tiny", DIGEST, ["query", "value"])
    given = {
        "person_id": '"patient"',
        "rounds": 3,
        "min_persons": 50,
        "sampling_rate": 0.2,
        "delta": 1e-3,
        "device": '"cpu"',
    }
    for key, value in {**given, **settings}.items():
        text, found = re.subn(rf"^(# )?{key} =.*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    return text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The directory `root` holds the site, the approvers' keys and a signed plan. No key is encrypted: it is slow."""

    root: Path

    @property
    def home(self) -> Home:
        return Home.open(self.root / "site")

    @property
    def passphrase(self) -> Path:
        return self.root / "passphrase"

    @property
    def plan(self) -> Path:
        return self.root / "spring.plan"

    def key(self, person: str) -> Path:
        return self.root / f"{person.split(maxsplit=1)[0].lower()}.pem"

    def read(self, *words: object) -> int:
        """The exit code of a command that needs no passphrase."""
        return run("site", *words, "--site", self.root / "site")

    def do(self, *words: object) -> int:
        """The exit code of a command that opens the site's keys."""
        return self.read(*words, "--insecure-no-passphrase")

    def approve(self, *words: object, by: str = ANNA) -> int:
        """The exit code of approving as a person."""
        return self.do("plan", "approve", *words, "--key", self.key(by), "--insecure-no-key-passphrase")

    def encrypt(self) -> None:
        """Put the site's keys and Anna's under the passphrase in the file `passphrase`."""
        secret = PASSPHRASE.encode()
        write_private(self.passphrase, secret)
        change_passphrase(self.home, b"", secret)
        anna = load_approver(self.key(ANNA), b"", insecure_no_passphrase=True)
        replace_private(self.key(ANNA), f"{APPROVER_FORMAT} {ANNA}\n".encode() + key_to_file(anna.identity, secret))

    def sign(self, name: str, plan: str, run_name: str = RUN, coordinator: Identity = COORDINATOR) -> Path:
        """Another signed plan's file."""
        path = self.root / name
        path.write_bytes(sign_plan(plan.encode(), federation=FEDERATION, run=run_name, coordinator=coordinator))
        return path

    def change_policy(self, **settings: object) -> None:
        """Change settings in the policy's file, and nothing else."""
        text = self.home.policy.read_text(encoding="utf-8")
        for key, value in settings.items():
            text, found = re.subn(rf"^{key} = .*$", lambda _, k=key, v=value: f"{k} = {v}", text, flags=re.MULTILINE)  # type: ignore[misc]
            assert found, key
        replace_private(self.home.policy, text.encode())

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        home = self.home
        journal = Journal.open(home.ledger, identity=load_keys(home, b"", insecure_no_passphrase=True).identity)
        try:
            yield journal
        finally:
            journal.close()

    def train(self, *rounds: int, run_name: str = RUN) -> None:
        """What an agent would record of these rounds."""
        with self.journal() as journal:
            approval = next(each.approval for each in journal.book.approvals if each.approval.run == run_name)
            data = journal.book.data_set(approval.data)
            plan = read_plan(self.plan.read_bytes().split(b"\n", 2)[2])
            mechanism = Mechanism.of(plan.privacy, data.declared_persons)
            for number in rounds:
                journal.append(
                    Reserve(
                        run=run_name,
                        plan=approval.plan,
                        data=approval.data,
                        version=1,
                        round=number,
                        sampling_rate=mechanism.sampling_rate,
                        noise_multiplier=mechanism.noise_multiplier,
                        steps=mechanism.steps,
                        clip_norm=mechanism.clip_norm,
                        divisor=mechanism.divisor,
                        noise="cryptographic",
                        start=START,
                        roster=journal.book.federations[FEDERATION].roster,
                    ),
                    Bind(run=run_name, round=number, commitment=START),
                    Commit(run=run_name, round=number, evidence=""),
                )


def made(root: Path) -> Site:
    """Make such a site in the directory `root`, which must not exist."""
    root.mkdir(mode=0o700)
    site = Site(root=root)
    home = Home.create(root / "site", NAME)
    keys = make_keys(home, b"", insecure_no_passphrase=True)
    people = [make_approver(site.key(person), person, b"", insecure_no_passphrase=True) for person in (ANNA, BEN, EVE)]
    plan = read_plan(plan_text().encode())
    entries = [approver_entry(person.name, person.identity.public) for person in people[:2]]
    write_private(home.policy, starter_for(plan, NAME, [FEDERATION], entries).encode())
    site.change_policy(epsilon=30.0)
    roster = Roster(
        federation=FEDERATION,
        epoch=1,
        coordinator=COORDINATOR.public,
        sites={NAME: keys.identity.public, **OTHERS},
    )
    enrolment.join(home, FEDERATION, (ADMIN.public,), roster.signed([ADMIN]), fingerprints=[fingerprint(ADMIN.public)])
    journal = Journal.create(home.ledger, site=NAME, identity=keys.identity)
    enforced(home, journal)
    journal.append(enrolment.federation_entry(home, FEDERATION))
    table = root / "letters.csv"
    write_synthetic(plan, table, 120)
    registry = Registry(home.data, journal, keys.secret(b"data"))
    registry.add(DATA, table, "patient", typical=planned_spend(plan.privacy))
    journal.close()
    site.sign(site.plan.name, plan_text())
    return site


def copied(site: Site, root: Path) -> Site:
    """A copy of a site, to be changed."""
    shutil.copytree(site.root, root, symlinks=True)
    return Site(root=root)
