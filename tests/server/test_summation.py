"""One attempt at a sum: who is asked what, who is lost where, and what is left when it goes wrong."""

import dataclasses
import logging
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from confide.client.agent import Agent
from confide.client.journal import Journal
from confide.common.entries import Started
from confide.common.errors import DataError, MessageError, RunError
from confide.common.messages import (
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    MaskedVector,
    Message,
    Opening,
    Peers,
    Shares,
    Survivors,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.plan import Plan
from confide.common.ring import RingLayout, Update
from confide.common.shamir import SHARE_BYTES
from confide.common.witness import Witness
from confide.server.summation import Collected, Conversation, SecureSummation, Task
from tests.cohorts import EXCHANGES
from tests.server.agents import (
    LAYOUT,
    SITES,
    SUMMATIONS,
    Behaviour,
    Moment,
    Sites,
    honest,
    refusing,
    unanswered,
    unheard,
)

ADAPTER = np.zeros(5, np.float32)
WIDE = RingLayout(length=5, update_bound=100.0, max_sites=64)


def task(sites: Sites, attempt: int = 1) -> Task:
    return Task(
        run="demo",
        plan=sites.plan,
        round=1,
        attempt=attempt,
        cohort=tuple(sorted(sites.names)),
        layout=LAYOUT.digest,
        ring=sites.ring,
        adapter=ADAPTER,
        parent=vector_digest(ADAPTER),
        training_s=5.0,
        answer_s=1.0,
    )


def collect(sites: Sites) -> Collected:
    return sites.run.summation.collect(sites, task(sites))


def changing(kind: type[Message], change: Callable[[Any], Any]) -> Behaviour:
    """Return the behaviour of a site that changes what it sends of one kind."""

    def answer(agent: Agent, envelope: Envelope) -> Envelope | None:
        message = open_envelope(agent.answer(envelope))
        return seal(change(message) if isinstance(message, kind) else message)

    return answer


def only(site: str, behaviour: Behaviour) -> Callable[[str, Moment], Behaviour]:
    return lambda other, _: behaviour if other == site else honest


@settings(max_examples=40)
@given(strategies.data())
def test_whoever_drops_out_where_the_sum_is_that_of_those_who_contributed_or_there_is_none(
    plan: Plan, data: strategies.DataObject
) -> None:
    names = tuple(f"site-{number}" for number in range(data.draw(strategies.integers(3, 7))))
    faults = strategies.sampled_from([unheard, unanswered, refusing])
    moments = strategies.tuples(strategies.sampled_from(names), strategies.sampled_from(EXCHANGES))
    turns = data.draw(strategies.dictionaries(moments, faults, max_size=4))

    def script(site: str, moment: Moment) -> Behaviour:
        return turns.get((site, moment[2]), honest)

    collected = collect(Sites(plan=plan, summation="real", names=names, ring=WIDE, script=script))

    quorum = 2 * len(names) // 3 + 1
    lost: dict[str, str] = {}
    void = False
    for exchange in EXCHANGES:
        lost |= {
            site: f"{exchange}: {'Refused' if fault is refusing else 'no answer'}"
            for (site, where), fault in turns.items()
            if where == exchange and site not in lost
        }
        if len(names) - len(lost) < quorum:
            void = True
            break
    summed = tuple(site for site in names if lost.get(site, "open").split(":")[0] in {"confirm", "open"})
    assert dict(collected.missing) == lost
    assert (collected.total is None) == bool(collected.void) == void
    assert collected.present == (() if void else summed)
    if collected.total is not None:
        mean = np.mean([1.0 + names.index(site) for site in summed])
        assert collected.total.count == len(summed)
        assert Update.decode(collected.total).mean == pytest.approx(np.full(5, mean), abs=1e-3)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_another_attempt_may_follow_only_while_nobody_was_asked_to_open_the_sum(plan: Plan, exchange: str) -> None:
    def script(site: str, moment: Moment) -> Behaviour:
        return unheard if site in "cd" and moment[2] == exchange else honest

    collected = collect(Sites(plan=plan, summation="real", script=script))

    assert collected.total is None
    assert collected.again == (() if exchange == "open" else SITES)


def test_another_attempt_is_for_those_who_answered_well_or_not_at_all_if_they_can_be_enough(plan: Plan) -> None:
    garbled = changing(Shares, lambda m: dataclasses.replace(m, sealed=b""))
    faults: dict[str, Behaviour] = {"a": unheard, "b": refusing, "c": garbled}

    def script(site: str, moment: Moment) -> Behaviour:
        return faults.get(site, honest) if moment[2] == "share" else honest

    seven = collect(Sites(plan=plan, summation="real", names=tuple("abcdefg"), ring=WIDE, script=script))
    faults["d"] = refusing
    fewer = collect(Sites(plan=plan, summation="real", names=tuple("abcdefg"), ring=WIDE, script=script))

    assert (seven.total, seven.again) == (None, ("a", "d", "e", "f", "g"))
    assert (fewer.total, fewer.again) == (None, ())


def test_a_cohort_below_the_rosters_quorum_is_not_even_asked(plan: Plan) -> None:
    sites = Sites(plan=plan, summation="real", names=tuple("abcdefg"), ring=WIDE)

    with pytest.raises(RunError, match="offered to 4 of the 7 sites on the roster; at least 5 must be asked"):
        sites.run.summation.collect(sites, dataclasses.replace(task(sites), cohort=tuple("abcd")))

    assert sites.moments == []


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_sum_that_was_opened_is_not_repeated(plan: Plan, summation: str) -> None:
    collected = collect(Sites(plan=plan, summation=summation))

    assert collected.total is not None
    assert collected.again == ()


def test_the_exchanges_come_in_their_order_and_whoever_was_lost_is_asked_no_more(plan: Plan) -> None:
    def script(site: str, moment: Moment) -> Behaviour:
        return unheard if (site, moment[2]) == ("b", "share") else honest

    sites = Sites(plan=plan, summation="real", script=script)

    collect(sites)

    assert [exchange for _, _, exchange in sites.moments] == list(EXCHANGES)
    assert sites.asked((1, 1, "share")) == ["a", "b", "c", "d"]
    for exchange in EXCHANGES[2:]:
        assert sites.asked((1, 1, exchange)) == ["a", "c", "d"]


def test_only_training_may_take_the_time_of_training(plan: Plan) -> None:
    waited: list[float] = []

    class Timed(Sites):
        def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
            waited.append(timeout_s)
            yield from super().ask(messages, timeout_s)

    for summation in SUMMATIONS:
        collect(Timed(plan=plan, summation=summation))

    assert waited == [1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 5.0]


def test_the_offer_is_signed_by_the_coordinator_and_sites_of_another_roster_refuse_it(plan: Plan) -> None:
    sites, strangers = Sites(plan=plan, summation="real"), Sites(plan=plan, summation="real")
    sites.agents["d"] = strangers.agents["d"]

    collected = collect(sites)

    assert sites.offers[0].signature
    assert dict(collected.missing) == {"d": "advertise: MessageError"}
    assert collected.present == ("a", "b", "c")


@pytest.mark.parametrize(("server", "site"), [SUMMATIONS, SUMMATIONS[::-1]])
def test_no_site_takes_part_in_a_sum_of_another_kind(plan: Plan, server: str, site: str) -> None:
    sites = Sites(plan=plan, summation=server)
    sites.agents = Sites(plan=plan, summation=site).agents

    collected = collect(sites)

    assert collected.total is None
    assert [exchange for _, _, exchange in sites.moments] == ["advertise"]
    assert set(collected.missing) == set(SITES)
    assert all(trainer.starts == [] for trainer in sites.trainers.values())


SPOILED: dict[str, tuple[str, Behaviour]] = {
    "keys cut short": ("advertise", changing(Advertisement, lambda m: dataclasses.replace(m, keys=m.keys[:-1]))),
    "keys of another": (
        "advertise",
        changing(Advertisement, lambda m: dataclasses.replace(m, keys=bytes(len(m.keys)))),
    ),
    "boxes cut short": ("share", changing(Shares, lambda m: dataclasses.replace(m, sealed=m.sealed[:-1]))),
    "one box too few": ("share", changing(Shares, lambda m: dataclasses.replace(m, sealed=m.sealed[:-82]))),
    "of another context": ("contribute", changing(Contribution, lambda m: dataclasses.replace(m, context="0" * 64))),
    "too long": (
        "contribute",
        changing(
            Contribution, lambda m: Contribution(context=m.context, vector=MaskedVector(words=np.ones(8, np.uint32)))
        ),
    ),
    "a wrong signature": (
        "confirm",
        changing(
            Confirmation, lambda m: dataclasses.replace(m, signature=bytes([m.signature[0] ^ 1]) + m.signature[1:])
        ),
    ),
    "shares cut short": ("open", changing(Opening, lambda m: dataclasses.replace(m, shares=m.shares[:-1]))),
    "no shares": ("open", changing(Opening, lambda m: dataclasses.replace(m, shares=b""))),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_answer_that_does_not_fit_loses_its_site_and_nothing_else(
    plan: Plan, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    exchange, behaviour = SPOILED[case]

    with caplog.at_level(logging.WARNING):
        collected = collect(Sites(plan=plan, summation="real", script=only("d", behaviour)))

    counted = SITES if exchange in {"confirm", "open"} else ("a", "b", "c")
    assert dict(collected.missing) == {"d": f"{exchange}: MessageError"}
    assert collected.present == counted
    assert collected.total is not None
    assert Update.decode(collected.total).mean == pytest.approx(np.full(5, 2.5 if "d" in counted else 2.0), abs=1e-5)
    assert "site d was lost" in caplog.text


def test_wrong_shares_are_found_out_and_their_site_is_named(plan: Plan) -> None:
    def wrong(message: Opening) -> Opening:
        return dataclasses.replace(message, shares=bytes(SHARE_BYTES - 1) + b"\x07" + message.shares[SHARE_BYTES:])

    names = tuple("abcdefg")  # five shares open a secret, so of seven one may be wrong and is found out
    sites = Sites(plan=plan, summation="real", names=names, ring=WIDE, script=only("d", changing(Opening, wrong)))

    collected = collect(sites)

    assert dict(collected.missing) == {"d": "open: wrong shares"}
    assert collected.present == names
    assert collected.total is not None
    assert Update.decode(collected.total).mean == pytest.approx(np.full(5, 4.0), abs=1e-4)


def test_too_many_wrong_shares_leave_the_round_void(plan: Plan) -> None:
    spoil = changing(Opening, lambda m: dataclasses.replace(m, shares=b"\0" * len(m.shares)))
    sites = Sites(plan=plan, summation="real", script=lambda site, _: spoil if site in "cd" else honest)

    collected = collect(sites)

    assert collected.total is None
    assert "The round cannot be opened" in collected.void
    assert collected.again == ()


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_sum_that_cannot_be_one_of_honest_vectors_is_void(plan: Plan, summation: str) -> None:
    def poisoned(message: Contribution) -> Contribution:
        words = message.vector.words.copy()
        words[:1] += np.uint32(2**30)
        return dataclasses.replace(message, vector=MaskedVector(words=words))

    collected = collect(Sites(plan=plan, summation=summation, script=only("d", changing(Contribution, poisoned))))

    assert collected.total is None
    assert collected.present == ()
    assert "This cannot be the sum of 4 honest vectors" in collected.void
    assert collected.again == ()


def large_cohort(plan: Plan, script: Callable[[str, Moment], Behaviour]) -> Sites:
    terms = dataclasses.replace(plan.federation, max_sites=66, graph="semi_honest_graph")
    return Sites(
        plan=dataclasses.replace(plan, federation=terms),
        summation="real",
        names=tuple(f"site-{number:02}" for number in range(66)),
        ring=RingLayout(length=5, update_bound=200.0, max_sites=66),
        script=script,
    )


def test_a_large_cohort_is_summed_over_the_sparse_graph_and_the_sum_says_so(plan: Plan) -> None:
    sites = large_cohort(plan, lambda *_: honest)

    collected = collect(sites)

    assert collected.summation == "semi_honest_graph"
    assert collected.present == sites.names
    assert collected.total is not None
    assert Update.decode(collected.total).mean == pytest.approx(np.full(5, 67 / 2), abs=1e-3)


def test_a_large_cohort_of_which_more_than_a_tenth_did_not_advertise_shares_no_keys(plan: Plan) -> None:
    sites = large_cohort(plan, lambda site, _: unheard if site < "site-07" else honest)

    collected = collect(sites)

    assert collected.void == "After `advertise` 59 of a cohort of 66 sites were left; 60 are needed."
    assert [exchange for _, _, exchange in sites.moments] == ["advertise"]
    assert collected.again == sites.names  # they were silent, and may answer now


def test_a_masked_vector_is_let_go_before_the_next_one_is_made(plan: Plan) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    def noted(agent: Agent, envelope: Envelope) -> Envelope | None:
        answer = agent.answer(envelope)
        if answer.vector is not None:
            alive.append(sum(words() is not None for words in made))
            made.append(weakref.ref(answer.vector))
            assert made[-1]() is not None
        return answer

    sites = Sites(plan=plan, summation="real", script=lambda *_: noted)

    collected = collect(sites)

    assert collected.total is not None
    assert alive == [0, 0, 0, 0]


def test_sites_are_told_everybodys_checkpoint_in_the_order_of_their_places(plan: Plan) -> None:
    shown: dict[str, str] = {}
    told: list[tuple[str, ...]] = []

    def noting(agent: Agent, envelope: Envelope) -> Envelope | None:
        message, answer = open_envelope(envelope), agent.answer(envelope)
        if isinstance(message, Peers):
            told.append(message.checkpoints)
        if isinstance(advertisement := open_envelope(answer), Advertisement):
            shown[agent.site] = advertisement.checkpoint
        return answer

    def script(site: str, moment: Moment) -> Behaviour:
        return unheard if (site, moment[2]) == ("b", "advertise") else noting

    collected = collect(Sites(plan=plan, summation="real", watched=True, script=script))

    assert collected.present == ("a", "c", "d")
    assert len(set(shown.values())) == 3
    assert told == [tuple(shown[site] for site in "acd")] * 3


def test_a_server_without_a_witness_takes_sites_without_ledgers(plan: Plan) -> None:
    behaviour = changing(Contribution, lambda message: dataclasses.replace(message, checkpoint=""))

    collected = collect(Sites(plan=plan, summation="real", script=lambda *_: behaviour))

    assert collected.present == SITES


def forked(ledger: Journal, size: int) -> None:
    """Let a ledger grow to that size with records that it never had."""
    while ledger.book.size < size:
        ledger.append(Started(process=secrets.token_hex(16), software="another"))


# What a ledger that was put back does next, as the records it has more than were seen, and what then shows.
GROWN: dict[str, tuple[int | None, str]] = {
    "an old copy": (None, "An old copy was put in its place: put the newest back"),
    "a fork": (0, "There are two of it"),
    "an old copy that grew by starts of agents": (1, "has 0 charges; it had 1 when it was last seen"),
    "an old copy that grew by many starts": (30, "has 0 charges; it had 1 when it was last seen"),
}


@pytest.mark.parametrize("what", GROWN)
def test_a_site_whose_ledger_went_back_is_not_in_the_sum_and_the_server_remembers_that_over_a_restart(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    beyond, words = GROWN[what]
    path = tmp_path / "witness.json"
    sites = Sites(plan=plan, summation="real", folder=tmp_path, witness=Witness(path))
    copy = sites.copy("d")
    assert collect(sites).present == SITES
    seen = Witness(path).last("simulation", "d")
    assert seen is not None
    sites.put_back("d", copy)  # the whole disk was, and the site itself cannot tell
    forked(sites.ledgers["d"], 0 if beyond is None else seen.size + beyond)
    secure = sites.run.summation
    assert isinstance(secure, SecureSummation)
    restarted = SecureSummation(secure.roster, secure.coordinator, witness=Witness(path))

    with caplog.at_level(logging.WARNING):
        collected = restarted.collect(sites, dataclasses.replace(task(sites), round=2))

    assert dict(collected.missing) == {"d": "advertise: Refused"}
    assert collected.present == ("a", "b", "c")
    assert "site d was lost: The ledger of site d of simulation has" in caplog.text
    assert words in caplog.text
    assert [len(sites.trainers[site].starts) for site in SITES] == [2, 2, 2, 1]


def test_a_ledger_that_is_put_back_to_what_it_showed_before_it_trained_is_refused(plan: Plan, tmp_path: Path) -> None:
    sites = Sites(plan=plan, summation="real", folder=tmp_path, witness=Witness())
    copy = sites.copy("d")
    sites.script = lambda _, moment: unheard if moment[2] == "confirm" else honest
    collect(sites)
    sites.put_back("d", copy)
    sites.script = lambda *_: honest

    collected = sites.run.summation.collect(sites, dataclasses.replace(task(sites), round=2))

    assert dict(collected.missing) == {"d": "advertise: Refused"}
    assert len(sites.trainers["d"].starts) == 1


def test_a_vector_without_a_newer_checkpoint_than_was_seen_is_not_in_the_sum(plan: Plan, tmp_path: Path) -> None:
    sites = Sites(plan=plan, summation="real", folder=tmp_path, witness=Witness())
    old = sites.shown("d")
    collect(sites)
    spoil = changing(Contribution, lambda message: dataclasses.replace(message, checkpoint=old))
    sites.script = only("d", spoil)

    collected = sites.run.summation.collect(sites, dataclasses.replace(task(sites), round=2))

    assert dict(collected.missing) == {"d": "contribute: Refused"}
    assert collected.present == ("a", "b", "c")
    assert collected.total is not None
    assert Update.decode(collected.total).mean == pytest.approx(np.full(5, 2.0), abs=1e-5)


SHOWN: dict[str, Callable[[str], str]] = {
    "nothing": lambda checkpoint: "",
    "no checkpoint": lambda checkpoint: "none",
    "another signature": lambda checkpoint: checkpoint[:-8] + "AAAAAAAA",
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_server_with_a_witness_takes_no_site_that_shows_no_checkpoint_of_its_own(plan: Plan, case: str) -> None:
    showing = changing(
        Advertisement, lambda message: dataclasses.replace(message, checkpoint=SHOWN[case](message.checkpoint))
    )
    sites = Sites(plan=plan, summation="real", watched=True, witness=Witness(), script=only("d", showing))

    collected = collect(sites)

    assert dict(collected.missing) == {"d": "advertise: Refused"}
    assert collected.present == ("a", "b", "c")


def test_a_site_that_showed_a_refused_checkpoint_is_not_asked_for_another_attempt(plan: Plan) -> None:
    spoil = changing(Advertisement, lambda message: dataclasses.replace(message, checkpoint=""))
    faults = {("d", "advertise"): spoil, ("c", "confirm"): unheard}
    sites = Sites(
        plan=plan,
        summation="real",
        witness=Witness(),
        script=lambda site, moment: faults.get((site, moment[2]), honest),
    )

    collected = collect(sites)

    assert collected.total is None
    assert collected.again == ("a", "b", "c")


@pytest.mark.parametrize(("lost", "asked"), [("", 20), ("bcd", 1)])
def test_checkpoints_are_on_the_servers_disk_before_any_site_hears_more_and_if_too_few_advertised(
    plan: Plan, tmp_path: Path, lost: str, asked: int
) -> None:
    path = tmp_path / "witness.json"
    seen: list[list[str]] = []

    def noting(agent: Agent, envelope: Envelope) -> Envelope | None:
        witness = Witness(path)
        seen.append([site for site in SITES if witness.last("simulation", site)])
        return agent.answer(envelope)

    def script(site: str, moment: Moment) -> Behaviour:
        return unheard if site in lost and moment[2] == "advertise" else noting

    collect(Sites(plan=plan, summation="real", watched=True, witness=Witness(path), script=script))

    assert seen == [[]] * min(asked, 4) + [list(SITES)] * max(asked - 4, 0)
    assert Witness(path).last("simulation", "a") is not None


def test_a_checkpoint_is_remembered_although_the_keys_beside_it_do_not_fit(plan: Plan) -> None:
    spoil = changing(Advertisement, lambda message: dataclasses.replace(message, keys=message.keys[:-1]))
    witness = Witness()

    collected = collect(Sites(plan=plan, summation="real", watched=True, witness=witness, script=only("d", spoil)))

    assert dict(collected.missing) == {"d": "advertise: MessageError"}
    assert all(witness.last("simulation", site) for site in SITES)  # the site signed it, whatever else it sent


@dataclasses.dataclass
class Said:
    """A channel that yields what it was given."""

    answers: list[tuple[str, Envelope]]
    asked: list[Mapping[str, Envelope]] = dataclasses.field(default_factory=list)

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        self.asked.append(messages)
        yield from self.answers


QUESTION = Survivors(context="c", sites=b"")
ANSWER = seal(Confirmation(context="c", signature=b"s"))


def talked(answers: list[tuple[str, Envelope]], least: int = 1) -> tuple[Conversation, Said, list[str], str]:
    """Return a conversation of one exchange, its channel, whose answers were taken, and the error at its end."""
    channel, taken, error = Said(answers), list[str](), ""
    talk = Conversation(channel, ("a", "b", "c"), least)
    try:
        talk.ask("confirm", lambda _: QUESTION, Confirmation, lambda site, _: taken.append(site), 1.0)
    except MessageError as caught:
        error = str(caught)
    return talk, channel, taken, error


def test_each_site_is_heard_once_and_nobody_else_is() -> None:
    answers = [(site, ANSWER) for site in ("b", "a", "a", "z", "b", "c")]

    talk, _, taken, _ = talked(answers)

    assert taken == ["b", "a", "c"]
    assert (talk.present, talk.missing) == (("a", "b", "c"), {})
    assert talk.bytes_up == ANSWER.size_bytes


def test_a_second_answer_does_not_mend_the_first() -> None:
    talk, _, taken, _ = talked([("a", Envelope(body=b"?")), ("a", ANSWER), ("b", ANSWER), ("c", ANSWER)])

    assert taken == ["b", "c"]
    assert talk.missing == {"a": "confirm: MessageError"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no answer"),
        (Envelope(body=b""), "MessageError"),
        (seal(QUESTION), "MessageError"),
        (seal(Failure(error="DataError", sentence=DataError.outside)), "DataError"),
    ],
    ids=["silence", "nothing", "another kind", "a failure"],
)
def test_why_a_site_was_lost_is_noted_with_the_exchange(answer: Envelope | None, reason: str) -> None:
    answers = [("b", ANSWER), ("c", ANSWER), *([] if answer is None else [("a", answer)])]

    talk, _, _, error = talked(answers)

    assert talk.missing == {"a": f"confirm: {reason}"}
    assert talk.present == ("b", "c")
    assert talk.exchange == "confirm"
    assert error == ""


def test_too_few_sites_end_the_conversation_and_are_noted_all_the_same() -> None:
    talk, _, taken, error = talked([("a", ANSWER)], least=2)

    assert error == "After `confirm` 1 of a cohort of 3 sites were left; 2 are needed."
    assert taken == ["a"]
    assert talk.missing == {"b": "confirm: no answer", "c": "confirm: no answer"}


def test_a_question_that_is_the_same_for_all_is_sealed_once() -> None:
    _, channel, _, _ = talked([])

    assert len({id(envelope) for envelope in channel.asked[0].values()}) == 1


def test_an_error_of_the_channel_or_the_server_ends_the_round_and_is_no_dropout(plan: Plan) -> None:
    class Broken(Sites):
        def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
            yield from super().ask(messages, timeout_s)
            raise ConnectionResetError

    for summation in SUMMATIONS:
        with pytest.raises(ConnectionResetError):
            collect(Broken(plan=plan, summation=summation))
