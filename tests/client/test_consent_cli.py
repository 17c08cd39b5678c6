"""`confide site plan` and `confide site policy`: what a steward reads, what she signs, and what stops a run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from confide.client.home import write_private
from confide.client.journal import Journal
from confide.client.policy import read_policy, starter
from confide.common.base import base_digest
from confide.common.crypto import Identity
from tests.sites import ANNA, BEN, DATA, EVE, FEDERATION, NAME, RUN, Site, copied, made, plan_text


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return made(tmp_path_factory.mktemp("site") / "s")


@pytest.fixture
def site(template: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("COLUMNS", "100")
    return copied(template, tmp_path / "s")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command with --json printed: one object, on one line."""
    (line,) = capsys.readouterr().out.splitlines()
    tree: dict[str, Any] = json.loads(line)
    return tree


def flat(text: str) -> str:
    """The text as if the terminal were endlessly wide."""
    return " ".join(text.split())


def approved(site: Site, run: str = RUN) -> bool:
    with site.journal() as journal:
        book = journal.book
        return any(
            book.in_force(each.approval.plan, run, each.approval.data, book.at) is not None
            for each in book.approvals
            if each.approval.run == run
        )


def test_a_plan_is_shown_with_verdict_price_and_what_is_missing_and_may_then_be_named_by_its_run(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.read("plan", "show", site.plan) == 0
    text = capsys.readouterr().out
    site.plan.unlink()
    assert site.read("plan", "show", RUN, "--data", DATA, "--json") == 0
    tree = told(capsys)

    headings = (
        "What the policy says",
        "What you are asked",
        "What it would cost",
        "What would be left",
        "Who approved it",
    )
    assert [text.index(f"\n{heading}\n") for heading in headings] == sorted(
        text.index(f"\n{heading}\n") for heading in headings
    )
    assert "It allows this plan." in text
    assert "The base model's files were not looked at." in text
    assert "1 more must approve: Anna Huber or Ben Müller" in flat(text)
    assert max(len(line) for line in text.splitlines() if str(site.root) not in line) <= 100
    assert (tree["run"], tree["federation"], tree["data"]) == (RUN, FEDERATION, DATA)
    assert (tree["allowed"], tree["refusals"], tree["approvals"], tree["signatures_missing"]) == (True, [], [], 1)
    assert tree["base_files_compared"] is False
    assert tree["price"]["accounts"][0]["account"] == "1"
    assert Path(tree["copy"]).read_bytes().startswith(b"confide-signed-plan/1\n")


def test_every_refusal_is_shown_and_nothing_is_signed_then(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    beyond = site.sign("beyond.plan", plan_text(rounds=4, rank=9))

    assert site.read("plan", "show", beyond, "--json") == 0
    tree = told(capsys)
    assert site.approve(beyond) == 9
    message = capsys.readouterr().err

    assert not tree["allowed"]
    assert {"rounds", "targets"} <= {refusal["rule"] for refusal in tree["refusals"]}
    for refusal in tree["refusals"]:
        assert refusal["sentence"] in message.replace("\n  ", "\n")
    assert not approved(site)


def test_a_plan_of_a_million_steps_is_refused_without_computing_what_it_costs(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    enormous = site.sign("enormous.plan", plan_text(rounds=100_000, steps_per_round=10))

    assert site.read("plan", "show", enormous) == 0

    text = capsys.readouterr().out
    assert "The policy refuses this plan, for" in text
    assert "That is not computed" in text


def test_the_files_of_another_base_model_are_found_out(
    site: Site, base_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.read("plan", "show", site.plan, "--model", base_directory, "--json") == 0
    refused = told(capsys)
    fitting = site.sign("fitting.plan", plan_text(base_digest=f'"{base_digest(base_directory)}"'))
    site.change_policy(base_digests=f'["{base_digest(base_directory)}"]')
    assert site.read("plan", "show", fitting, "--model", base_directory, "--json") == 0

    assert {refusal["rule"] for refusal in refused["refusals"]} == {"base-model"}
    taken = told(capsys)
    assert taken["allowed"]
    assert taken["base_files_compared"]


@pytest.mark.parametrize("case", ["another signer", "a changed byte", "a plan that nobody signed", "no file"])
def test_what_no_pinned_coordinator_signed_is_not_shown_and_not_kept(
    case: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    path = site.root / "other.plan"
    if case == "another signer":
        site.sign("other.plan", plan_text(), coordinator=Identity(bytes([77]) * 32))
    elif case == "a changed byte":
        path.write_bytes(site.plan.read_bytes().replace(b"rounds = 3", b"rounds = 2"))
    elif case == "a plan that nobody signed":
        path.write_text(plan_text(), encoding="utf-8")

    code = site.read("plan", "show", path)

    words = {
        "another signer": "was verified for none of the federations",
        "a changed byte": "was verified for none of the federations",
        "a plan that nobody signed": "is not a signed plan",
        "no file": "There is no file",
    }
    assert code in {2, 8, 9}
    assert words[case] in capsys.readouterr().err
    assert not list(site.home.plans.iterdir())


def test_an_approval_is_signed_by_its_person_and_lets_the_run_begin(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.approve(site.plan, "--as", ANNA, "--days", 30) == 0
    text = flat(capsys.readouterr().out)

    assert f"{ANNA} approved the plan heart for the run {RUN} on {DATA}, until" in text
    assert "One person's approval is enough" in text
    assert approved(site)
    site.train(1)


def test_where_two_must_approve_the_first_does_not_suffice_and_is_told_who_else_may(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.change_policy(signatures=2)

    assert site.approve(site.plan, "--json") == 0
    first = told(capsys)
    assert not approved(site)
    assert site.approve(RUN, "--json") == 0
    again = told(capsys)
    assert not approved(site)
    assert site.approve(RUN, by=BEN) == 0

    assert (first["by"], first["signatures_missing"]) == (ANNA, 1)
    assert again["signatures_missing"] == 1  # the same person twice is one
    assert "It may run until" in flat(capsys.readouterr().out)
    assert approved(site)


@pytest.mark.parametrize(
    ("words", "by", "code", "message"),
    [
        ((), EVE, 9, "may not approve"),
        (("--as", BEN), ANNA, 2, "belongs to 'Anna Huber', not to 'Ben Müller'"),
        (("--days", 91), ANNA, 9, "allows 1 to 90"),
        (("--data", "others"), ANNA, 9, "'others' is not registered"),
    ],
)
def test_who_may_not_or_asks_for_too_much_approves_nothing(
    words: tuple[object, ...], by: str, code: int, message: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.approve(site.plan, *words, by=by) == code

    assert message in capsys.readouterr().err
    assert not approved(site)


def test_neither_the_sites_nor_the_persons_passphrase_stands_in_for_the_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.encrypt()
    wrong = site.root / "wrong"
    write_private(wrong, b"another long passphrase")
    monkeypatch.setenv("CONFIDE_PASSPHRASE_FILE", str(site.passphrase))

    key = ("--key", site.key(ANNA))
    unlocked = site.read("plan", "approve", site.plan, *key)
    asked = capsys.readouterr().err
    persons = site.read("plan", "approve", site.plan, *key, "--key-passphrase-file", wrong)
    sites = site.read(
        *("plan", "approve", site.plan, *key, "--key-passphrase-file", site.passphrase, "--passphrase-file", wrong)
    )

    size = Journal.look(site.home.ledger).size
    both = site.read("plan", "approve", site.plan, *key, "--key-passphrase-file", site.passphrase)

    assert (unlocked, persons, sites, both) == (2, 12, 12, 0)
    assert "No passphrase of Anna Huber's key is given" in asked
    assert Journal.look(site.home.ledger).size == size + 1


def test_a_revoked_run_trains_no_more_and_its_plan_needs_a_new_approval(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.approve(site.plan)
    site.train(1)
    capsys.readouterr()

    assert site.do("plan", "revoke", RUN, "--reason", "A patient objected.", "--as", BEN) == 0
    assert not approved(site)
    assert site.do("plan", "revoke", RUN, "--reason", "Again.") == 2
    assert "No approval of a run 'spring' is recorded that was not revoked" in capsys.readouterr().err
    assert site.approve(RUN) == 0  # in the same second, perhaps

    assert approved(site)


def test_the_list_tells_each_runs_state_rounds_and_cost(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.read("plan", "list")
    nothing = capsys.readouterr().out
    site.approve(site.plan, "--days", 30)
    site.train(1, 2)
    site.read("plan", "show", site.sign("summer.plan", plan_text(), "summer"))
    capsys.readouterr()

    site.read("plan", "list", "--json")
    (run,), shown = (tree := told(capsys))["runs"], tree["not_approved"]
    site.read("plan", "list")
    text = capsys.readouterr().out
    site.do("plan", "revoke", RUN, "--reason", "It is over.")
    capsys.readouterr()
    site.read("plan", "list", "--json")

    assert "No plan was shown or approved here yet" in nothing
    assert (run["run"], run["state"], run["begun"], run["rounds"], run["to_come"]) == (RUN, "approved", 2, 3, 1)
    assert run["charged"] > 0
    assert shown == ["summer"]
    assert "2 of 3" in text
    assert f"approved until {run['until'][:16].replace('T', ' ')}\n" in text
    assert told(capsys)["runs"][0]["state"] == "revoked"


def test_the_price_is_of_the_rounds_to_come(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.approve(site.plan)
    prices = []
    for number in (0, 1, 2, 3):
        if number:
            site.train(number)
        capsys.readouterr()
        site.read("plan", "show", RUN, "--json")
        prices.append(told(capsys)["price"])

    assert [price["rounds"] for price in prices[:3]] == [3, 2, 1]
    assert prices[0]["adaptive"] > prices[1]["adaptive"] > prices[2]["adaptive"]
    assert prices[3] is None


def test_a_changed_plan_is_compared_with_the_approved_one_and_needs_an_approval_of_its_own(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.approve(site.plan)
    changed = site.sign("changed.plan", plan_text(clip_norm=0.5, epsilon=7.0), "spring-2")
    capsys.readouterr()

    assert site.read("plan", "diff", changed, "--json") == 0
    tree = told(capsys)
    assert site.read("plan", "diff", changed, site.plan) == 0
    text = capsys.readouterr().out

    assert {row["key"] for row in tree["differences"]} == {"[privacy] clip_norm", "[privacy] epsilon"}
    assert not tree["same_digest"]
    assert tree["price"]["old"]["charged"] > tree["price"]["new"]["charged"]
    assert "[privacy] epsilon\n  - 8.0\n  + 7.0\n" in text
    assert "2 differences; different digests: it needs approval." in text
    assert not approved(site, "spring-2")


def test_a_plan_is_not_compared_with_itself_and_a_digest_says_nothing_of_another_run_s_approval(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.approve(site.plan)
    again = site.sign("summer.plan", plan_text(), "summer")
    capsys.readouterr()

    assert site.read("plan", "diff", site.plan) == 2
    alone = capsys.readouterr().err
    assert site.read("plan", "diff", again) == 0
    text = " ".join(capsys.readouterr().out.split())

    assert "There is no earlier approved plan to compare with" in alone
    assert "0 differences; the same digest. An approval is for one run: confide site plan list" in text
    assert not approved(site, "summer")


def test_what_is_approved_already_is_said_and_not_recorded_again_unless_for_longer(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.approve(site.plan, "--days", 20) == 0
    size = Journal.look(site.home.ledger).size
    capsys.readouterr()

    assert site.approve(RUN) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert site.approve(RUN, "--days", 10, "--json") == 0
    shorter = told(capsys)
    assert Journal.look(site.home.ledger).size == size
    assert site.approve(RUN, "--days", 30, "--json") == 0
    longer = told(capsys)
    assert site.approve(RUN, "--json", by=BEN) == 0

    assert f"{ANNA} approved this plan for the run {RUN} on {DATA} already, until" in text
    assert "so nothing was recorded. Approved by Anna Huber until" in text
    assert (shorter["recorded"], longer["recorded"], told(capsys)["recorded"]) == (False, True, True)
    assert longer["until"] > shorter["until"]


def test_a_federation_that_was_never_joined_is_pointed_out(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.change_policy(federations=f'["{FEDERATION}", "heart-2031"]')

    assert site.read("policy", "check") == 0

    text = " ".join(capsys.readouterr().out.split())
    assert "[federation] federations names 'heart-2031', which this site never joined" in text
    assert f"names '{FEDERATION}'" not in text


def test_a_policy_that_allows_nothing_says_so_in_words(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    path = site.root / "starter.toml"
    path.write_text(starter(NAME), encoding="utf-8")

    assert site.read("policy", "check", path) == 0

    text = " ".join(capsys.readouterr().out.split())
    for said in ("come from no federation.", "Nobody may approve a plan.", "Quantization: not allowed in any form."):
        assert said in text
    assert "federations: nothing" not in text


def test_without_anything_to_compare_with_a_difference_is_not_made_up(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.read("plan", "diff", site.plan) == 2

    assert "was approved here. Name the one to compare with" in capsys.readouterr().err


def test_two_plans_for_one_run_are_kept_both_and_must_be_told_apart(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    other = site.sign("other.plan", plan_text(clip_norm=0.5))
    site.read("plan", "show", site.plan)
    site.read("plan", "show", other)
    capsys.readouterr()

    code = site.approve(RUN)

    assert code == 2
    assert "Several plans are kept for the run 'spring'" in capsys.readouterr().err
    assert len(list(site.home.plans.iterdir())) == 2


def test_a_new_policy_is_the_narrowest_for_a_plan_or_allows_nothing_and_replaces_no_file(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    out = site.root / "new.toml"

    assert site.read("policy", "new") == 0
    allowing_nothing = read_policy(capsys.readouterr().out.encode())
    assert site.read("policy", "new", "--for", site.plan, "--out", out, "--json") == 0
    tree = told(capsys)
    assert site.read("policy", "new", "--out", out) == 2

    assert (allowing_nothing.site, allowing_nothing.approvers) == (NAME, {})
    narrow = read_policy(out.read_bytes())
    assert tree["digest"] == narrow.digest
    assert narrow.federation.federations == (FEDERATION,)
    assert set(narrow.approvers.values()) == {ANNA, BEN}
    assert "exists and is left as it is" in capsys.readouterr().err


def test_a_policy_is_told_in_sentences_and_what_it_lacks_too(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    starter = site.root / "starter.toml"
    site.read("policy", "new", "--out", starter)
    capsys.readouterr()

    assert site.read("policy", "check") == 0
    own = capsys.readouterr().out
    assert site.read("policy", "check", starter) == 0
    empty = capsys.readouterr().out
    (site.root / "broken.toml").write_text("site = 7", encoding="utf-8")
    assert site.read("policy", "check", site.root / "broken.toml") == 2

    assert "in force  yes" in own
    assert "One of these approves a plan: Anna Huber, Ben Müller." in own
    assert "What is missing" not in own
    assert "[approval] approvers is empty: nobody can approve a plan." in empty
    assert "It is not in force yet." in empty
    assert "faults, so it allows nothing" in capsys.readouterr().err


def test_a_changed_policy_is_put_in_force_and_says_which_runs_it_stops(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.approve(site.plan)
    site.change_policy(signatures=2)
    capsys.readouterr()

    assert site.read("policy", "check", "--json") == 0
    before = told(capsys)
    assert site.do("policy", "apply", "--json") == 0
    applied = told(capsys)
    assert site.do("policy", "apply") == 0
    again = capsys.readouterr().out

    assert not before["in_force"]
    assert applied["changed"]
    assert applied["changes"]["approvals_needed"] == ["1", "2"]
    assert applied["stopped"] == [f"{RUN} on {DATA}"]
    assert "in force already" in again
    assert not approved(site)


def test_a_policy_for_another_site_allows_nothing_here(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.change_policy(site='"north"')

    assert site.read("plan", "show", site.plan) == 2
    assert site.do("policy", "apply") == 2

    assert "is for the site 'north'" in capsys.readouterr().err


def test_reading_and_approving_need_no_torch(site: Site) -> None:
    words = ["site", "plan", "show", str(site.plan), "--site", str(site.root / "site")]
    code = (
        "import sys\nfrom confide.common import cli\n"
        f"try:\n    cli.main({words!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_what_is_looked_at_without_a_passphrase_changes_nothing_in_the_ledger(site: Site) -> None:
    size = Journal.look(site.home.ledger).size

    for words in (("plan", "show", site.plan), ("plan", "list"), ("policy", "check"), ("policy", "new")):
        assert site.read(*words) == 0

    assert Journal.look(site.home.ledger).size == size


def test_an_approver_is_told_whose_rows_and_since_when_their_budget_counts(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()

    assert site.read("plan", "show", site.plan) == 0

    shown = " ".join(capsys.readouterr().out.split())
    assert "are told apart by the column 'patient', among the identifiers 'person'." in shown
    assert re.search(r"It charges account 1, in period 1 since 20\d\d-\d\d-\d\dT", shown)
