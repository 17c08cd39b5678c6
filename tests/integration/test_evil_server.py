"""A server that lies: row by row of the threat table, against real sites. Each attack ends in a typed refusal.

What the sites sent in the course of it is reckoned through by `assert_nothing_revealed`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.client.agent import LAST_ATTEMPT
from confide.common.attempt import Attempt, Gathering, places
from confide.common.crypto import AgreementKey, Identity
from confide.common.errors import Refused
from confide.common.graph import SEMI_HONEST, connections
from confide.common.messages import (
    Advertisement,
    Contribution,
    Envelope,
    Message,
    Opening,
    Shares,
    Signatures,
    Survivors,
    open_envelope,
    seal,
)
from confide.common.ring import RingLayout
from confide.common.roster import Roster
from confide.common.shamir import NO_SHARE, SHARE_BYTES
from tests.cohorts import EXCHANGES
from tests.evil import (
    LAYOUT,
    OTHER,
    START,
    EvilServer,
    Play,
    Sum,
    assert_nothing_revealed,
    completed,
    errors,
    names,
    opened,
    plan_for,
    spoiled,
    spoken,
    taken,
    trainings,
)

REFUSALS = {"AdapterError", "MessageError", "Refused"}  # the first for an adapter of another length
LOW_ORDER = [  # the u-coordinates of X25519's points of low order, and spellings of them that are not reduced
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
        "00" * 31 + "80",
    )
]
BELOW_A_THIRD = [(count, bad) for count in (4, 5, 7) for bad in range((count - 1) // 3 + 1)]


def whole(server: EvilServer, number: int = 1) -> Sum:
    return number, frozenset(server.names)


def puppets(count: int, bad: int) -> range:
    return range(count - bad, count)


def test_the_reckoning_sees_the_sum_that_was_opened_and_no_other() -> None:
    server = EvilServer(4)

    server.play().until("open")

    assert_nothing_revealed(server, whole(server))
    for other in ((), (whole(server, 2),), ((1, frozenset(server.names[:3])),)):
        with pytest.raises(AssertionError, match="learned"):
            assert_nothing_revealed(server, *other)


def test_the_reckoning_sees_secrets_and_shares_in_whatever_was_sent() -> None:
    server = EvilServer(4)
    server.play().until("contribute")
    victim, *others = server.hospitals.values()
    part = victim.parts[0]
    assert part.vector is not None
    assert_nothing_revealed(server)

    def leak(secrets: Sequence[bytes]) -> None:
        for hospital, secret in zip(server.hospitals.values(), secrets, strict=False):
            hospital.talk.append((Envelope(body=b""), Envelope(body=b"?" + secret)))
        with pytest.raises(AssertionError):
            assert_nothing_revealed(server)
        for hospital, _ in zip(server.hospitals.values(), secrets, strict=False):
            hospital.talk.pop()

    for secret in (part.seed, part.pair, part.box, part.vector.tobytes()):
        leak([secret])
    shares = [server.hospitals[site].parts[0].held[part.place] for site in server.names]
    leak([seed + pair for seed, pair in shares[:3]])
    for hospital in others:
        seeds = [server.hospitals[site].parts[0].held[hospital.parts[0].place][0] for site in server.names[1:]]
        hospital.talk.append((Envelope(body=b""), Envelope(body=b"".join(seeds))))
    assert_nothing_revealed(server)  # these shares were sent by others than those who hold them


def test_a_list_of_survivors_that_names_a_peer_twice_or_in_disorder_is_refused() -> None:
    server = EvilServer(7)
    play = server.play()
    gathering = play.until("contribute")
    lists = [
        places([0, 1, 1, 2, 3, 4, 5]),
        places([1, 0, 2, 3, 4, 5, 6]),
        places([0, 1, 2, 3, 4, 5, 7]),
        places(range(7)) * 2,
        places(range(7))[:-1],
        b"",
    ]

    answers = {
        site: play.ask(site, Survivors(context=gathering.ctx.hex(), sites=raw))
        for site, raw in zip(server.names, lists, strict=False)
    }

    assert errors(answers) == {"MessageError"}
    assert_nothing_revealed(server)


def test_a_site_does_not_confirm_survivors_without_itself() -> None:
    server = EvilServer(4)
    play = server.play()
    gathering = play.until("contribute")

    answers = play.confirm(gathering, server.names[:1], server.names[1:])

    assert errors(answers) == {"Refused"}


def test_a_site_confirms_survivors_once() -> None:
    server = EvilServer(4)
    play = server.play()
    gathering = play.until("confirm")

    again = play.confirm(gathering, survivors=server.names[1:])
    same = play.confirm(gathering)
    play.open(gathering)

    assert errors(again | same) == {"Refused"}
    assert_nothing_revealed(server, whole(server))


def test_survivors_told_differently_to_different_sites_are_opened_by_none() -> None:
    server = EvilServer(4)
    play = server.play()
    gathering = play.until("contribute")
    told = {site: server.names if number < 2 else server.names[1:] for number, site in enumerate(server.names)}

    for site, survivors in told.items():
        assert taken(play.confirm(gathering, [site], survivors))
    answers = {site: play.open(gathering, [site], survivors)[site] for site, survivors in told.items()}

    assert errors(answers) == {"Refused"}
    assert_nothing_revealed(server)


def test_a_site_opens_once_and_only_what_it_signed() -> None:
    server = EvilServer(4, puppets=[3])
    play = server.play()
    gathering = play.until("contribute")
    less = server.names[1:]
    play.confirm(gathering, server.names[:1], server.names)
    play.confirm(gathering, server.names[1:], less)

    crossed = play.open(gathering, server.names[:1], less)  # the signatures are right, for other survivors
    assert taken(play.open(gathering, server.names[1:], less)) == ["site-01", "site-02"]
    again = play.open(gathering, server.names[1:], less) | play.open(gathering, server.names[1:], server.names)

    assert errors(crossed | again) <= REFUSALS
    assert_nothing_revealed(server, (1, frozenset(less)))


def test_survivors_that_shared_no_keys_or_whose_box_was_withheld_are_refused() -> None:
    server = EvilServer(5)
    play = server.play()
    play.advertise()
    gathering = play.gathering(of=server.names[:4])
    play.share(gathering, server.names[:4])
    play.contribute(gathering, server.names[:4])
    absent = play.confirm(gathering, server.names[:1], server.names)
    second = server.play(attempt=2)
    second.advertise()
    later = second.gathering()
    second.share(later)
    second.contribute(later, senders=server.names[:4])

    withheld = second.confirm(later, server.names[:1], server.names)

    assert errors(absent | withheld) == {"MessageError"}
    assert_nothing_revealed(server)


@pytest.mark.parametrize(("count", "bad"), BELOW_A_THIRD)
def test_no_split_of_survivor_views_with_fewer_than_a_third_colluding_opens_two_sums(count: int, bad: int) -> None:
    for told in itertools.product([True, False], repeat=count - bad - 1):
        server = EvilServer(count, puppets(count, bad))
        play = server.play()
        gathering = play.until("contribute")
        views = {True: server.names, False: server.names[1:]}  # is the first site told of as alive?
        for site, alive in zip(server.honest(), (True, *told), strict=True):
            play.confirm(gathering, [site], views[alive])

        for site, alive in zip(server.honest(), (True, *told), strict=True):
            play.open(gathering, [site], views[alive])
            play.open(gathering, [site], views[not alive])

        assert len(opened(server)) <= 1
        assert_nothing_revealed(server, *opened(server))


@pytest.mark.parametrize(("count", "bad"), BELOW_A_THIRD)
def test_no_split_of_adapters_with_fewer_than_a_third_colluding_is_masked_in_two_contexts(count: int, bad: int) -> None:
    for told in itertools.product([True, False], repeat=count - bad - 1):
        server = EvilServer(count, puppets(count, bad))
        play = server.play()
        play.advertise()
        sides = {True: (play.gathering(START), START), False: (play.gathering(OTHER), OTHER)}
        views = dict(zip(server.honest(), (True, *told), strict=True))
        groups = {view: [site for site in views if views[site] is view] for view in (True, False)}
        for view, sites in groups.items():
            play.share(sides[view][0], sites or [server.names[-1]])

        for view, sites in groups.items():
            gathering, adapter = sides[view]
            if sites and taken(play.contribute(gathering, sites, adapter=adapter)):
                survivors = [*sites, *server.puppets]
                play.confirm(gathering, sites, survivors)
                play.open(gathering, sites, survivors)

        trained = {view for view, sites in groups.items() if any(server.hospitals[site].trained for site in sites)}
        assert len(trained) <= 1
        assert_nothing_revealed(server, *opened(server))


@settings(max_examples=80)
@given(strategies.data())
def test_whatever_the_server_says_in_whatever_order_it_opens_one_sum_a_round_and_learns_nothing_else(
    data: strategies.DataObject,
) -> None:
    count, bad = data.draw(strategies.sampled_from([(4, 1), (5, 1), (7, 2)]))
    server = EvilServer(count, puppets(count, bad))
    some = strategies.lists(strategies.sampled_from(server.names), min_size=2, unique=True).map(sorted)
    many = strategies.sampled_from([server.names, server.names[1:], server.names[bad:], server.names[:-1]])

    for attempt in (1, 2):
        cohort = tuple(data.draw(many | some))
        part = strategies.lists(strategies.sampled_from(cohort), min_size=1, unique=True).map(sorted)
        mostly_all = strategies.one_of(strategies.just(list(cohort)), strategies.just(list(cohort)), part)
        play = server.play(cohort, attempt=attempt)
        play.advertise(data.draw(mostly_all))
        if not server.honest(play.cohort[place] for place in play.advertised):
            continue
        contexts = [(play.gathering(adapter), adapter) for adapter in (START, OTHER)]
        for step in EXCHANGES[1:]:
            for _ in range(data.draw(strategies.integers(1, 2))):
                for site in data.draw(mostly_all):
                    gathering, adapter = contexts[data.draw(strategies.sampled_from([0, 0, 0, 1]))]
                    _move(play, step, gathering, adapter, site, data.draw(mostly_all))

    assert len(completed(server)) <= 1
    assert set(trainings(server).values()) <= {0, 1}
    assert_nothing_revealed(server, *completed(server))


def _move(play: Play, step: str, gathering: Gathering, adapter: Any, site: str, sites: Sequence[str]) -> None:
    if site not in play.server.hospitals:
        return
    match step:
        case "share":
            play.share(gathering, [site])
        case "contribute" if gathering.ctx in play.boxes:
            boxes = play.boxes[gathering.ctx]
            senders = [sender for sender in sites if play.place(site) in boxes.get(play.place(sender), ())]
            play.contribute(gathering, [site], senders, adapter)
        case "confirm":
            play.confirm(gathering, [site], sites)
        case "open":
            play.open(gathering, [site], sites)
        case _:
            pass


def forged(attempt: Attempt, place: int, public: bytes, signer: Identity) -> bytes:
    return public + signer.sign(attempt.advertised(place, public))


def test_an_advertisement_of_which_any_byte_was_changed_is_refused() -> None:
    server = EvilServer(3)
    first = server.play()
    first.advertise()
    length = len(first.gathering().message.advertisements)

    for position in range(length):
        number, attempt = divmod(position, LAST_ATTEMPT)
        play = server.play(number=2 + number, attempt=1 + attempt)
        play.advertise()
        message = play.gathering().message
        raw = bytearray(message.advertisements)
        raw[position] ^= 1 << position % 8
        answer = play.ask(server.names[0], dataclasses.replace(message, advertisements=bytes(raw)))
        assert errors({"": answer}) == {"MessageError"}

    assert_nothing_revealed(server)


SUBSTITUTES: dict[str, Callable[[Play], dict[int, bytes]]] = {
    "the server's keys, signed by the coordinator": lambda play: {
        1: forged(play.attempt, 1, os_keys(), play.server.enrolment.coordinator)
    },
    "the server's keys, signed by a puppet": lambda play: {
        1: forged(play.attempt, 1, os_keys(), play.server.puppets["site-03"].identity)
    },
    "the server's keys in the victim's own place": lambda play: {
        0: forged(play.attempt, 0, os_keys(), Identity.generate())
    },
    "a puppet's advertisement in another's place": lambda play: {1: play.advertised[3]},
    "a puppet that repeats another's keys": lambda play: {
        3: forged(play.attempt, 3, play.advertised[1][:64], play.server.puppets["site-03"].identity)
    },
    "a puppet that repeats another's box key": lambda play: {
        3: forged(play.attempt, 3, play.advertised[1][:32] + os_keys()[:32], play.server.puppets["site-03"].identity)
    },
    "a puppet with one key for both": lambda play: {
        3: forged(play.attempt, 3, 2 * os_keys()[:32], play.server.puppets["site-03"].identity)
    },
    "a puppet that signs for another place": lambda play: {
        3: os_keys(play) + play.server.puppets["site-03"].identity.sign(play.attempt.advertised(1, os_keys(play)))
    },
    "keys of another length": lambda play: {1: play.advertised[1] + b"\0"},
}


def with_low_order(point: bytes) -> Callable[[Play], dict[int, bytes]]:
    return lambda play: {3: forged(play.attempt, 3, point + os_keys()[:32], play.server.puppets["site-03"].identity)}


SUBSTITUTES |= {f"a puppet's box key of low order {n}": with_low_order(point) for n, point in enumerate(LOW_ORDER)}


def os_keys(play: Play | None = None) -> bytes:
    seed = bytes(32) if play else None
    keys = [AgreementKey(seed) if seed else AgreementKey.generate() for _ in range(2)]
    return b"".join(key.public for key in keys)


@pytest.mark.parametrize("case", SUBSTITUTES)
def test_keys_that_were_put_in_place_of_others_are_refused(case: str) -> None:
    server = EvilServer(4, puppets=[3])
    play = server.play()
    play.advertise()
    told = play.advertised | SUBSTITUTES[case](play)

    answer = play.ask(server.names[0], Gathering.of(play.attempt, play.gathering().adapter, told).message)

    assert errors({"": answer}) == {"MessageError"}
    assert trainings(server)[server.names[0]] == 0
    assert_nothing_revealed(server)
    server.play(attempt=2).until("open")
    assert_nothing_revealed(server, whole(server))


def test_a_mask_key_of_low_order_ends_the_attempt_and_not_the_round() -> None:
    for number, point in enumerate(LOW_ORDER, start=1):
        server = EvilServer(4, puppets=[3])
        play = server.play(number=number)
        play.advertise()
        signer = server.puppets["site-03"].identity
        play.advertised[3] = forged(play.attempt, 3, os_keys()[:32] + point, signer)
        gathering = play.gathering()
        boxes = play.boxes[gathering.ctx] = {3: dict.fromkeys(range(3), bytes(play.attempt.box_bytes))}
        for site in server.honest():
            answer = play.ask(site, gathering.message)
            if isinstance(answer, Shares):
                boxes[play.place(site)] = play.dealt(gathering, site, answer)
        answers = play.contribute(gathering) if len(boxes) == 4 else {}

        assert errors(answers) <= {"MessageError"}
        assert_nothing_revealed(server)
        server.play(number=number, attempt=2).until("open")
        assert set(trainings(server).values()) == {1}
        assert_nothing_revealed(server, whole(server, number))


@pytest.mark.parametrize("key", ["another's", "a puppet's", "none"])
def test_an_offer_that_the_coordinator_did_not_sign_is_refused(key: str) -> None:
    server = EvilServer(4, puppets=[3])
    signer = {"another's": Identity.generate(), "a puppet's": server.puppets["site-03"].identity}.get(key)
    offer = server.signed(server.offer(), signer) if signer else dataclasses.replace(server.offer(), signature=b"")

    answer = server.hospitals["site-00"].asked(offer)

    assert errors({"": answer}) == {"MessageError"}


@pytest.mark.parametrize("exchanged", ["site-01", "coordinator"])
def test_a_roster_with_one_key_exchanged_is_refused_under_either_digest(exchanged: str) -> None:
    server = EvilServer(4)
    fake, own = Identity.generate(), server.roster
    sites = {site: fake.public if site == exchanged else key for site, key in own.sites.items()}
    coordinator = fake if exchanged == "coordinator" else server.enrolment.coordinator
    other = Roster(federation="test", epoch=1, coordinator=coordinator.public, sites=sites)

    for digest in (other.digest, own.digest):
        offer = dataclasses.replace(server.offer(), roster=digest)
        judged = other if digest == other.digest else own
        pre = Attempt.of(offer, judged, server.ring, server.plan.federation).offered
        answer = server.hospitals["site-00"].asked(dataclasses.replace(offer, signature=coordinator.sign(pre)))
        if digest == own.digest and exchanged != "coordinator":  # the offer is as it should be; the keys are not
            play = server.play(attempt=2)
            play.advertise()
            play.advertised[1] = forged(play.attempt, 1, os_keys(), fake)
            answer = play.ask("site-00", play.gathering().message)
        assert errors({"": answer}) == {"MessageError"}

    assert_nothing_revealed(server)


def script(play: Play, gathering: Gathering, site: str) -> list[Message]:
    """Return all that a site is sent in an attempt."""
    return [
        play.offer,
        gathering.message,
        play.start(gathering, play.inbox(gathering, site)),
        Survivors(context=gathering.ctx.hex(), sites=play.survivors(play.cohort)),
        play.opening(gathering),
    ]


@pytest.mark.parametrize("later", ["attempt", "round", "run"])
def test_what_was_said_in_one_attempt_is_refused_in_every_later_one(later: str) -> None:
    server = EvilServer(3)
    first = server.play()
    gathering = first.until("confirm" if later == "attempt" else "open")
    recorded = {site: script(first, gathering, site) for site in server.names}
    target = EvilServer(3, run="another", enrolment=server.enrolment) if later == "run" else server
    number = 2 if later == "round" else 1

    attempts = itertools.count(2)
    for step in EXCHANGES[:-1]:
        for message in range(len(recorded["site-00"])):
            play = target.play(number=number, attempt=next(attempts))
            play.until(step)
            answers = {site: play.ask(site, recorded[site][message]) for site in server.names}
            assert errors(answers) <= REFUSALS
    last = target.play(number=number, attempt=next(attempts))
    last.until("open")
    idle = {site: target.hospitals[site].asked(message) for site in server.names for message in recorded[site]}

    assert errors(idle) == {"Refused"}
    assert set(trainings(target).values()) == {2 if later == "round" else 1}
    assert opened(target) == {whole(target)} | {whole(target, number)} - ({whole(target)} if later == "run" else set())
    assert_nothing_revealed(target, *opened(target))


@pytest.mark.parametrize("until", EXCHANGES)
def test_what_was_said_before_a_restart_brings_nothing_out_afterwards(until: str, tmp_path: Path) -> None:
    server = EvilServer(3, folder=tmp_path)
    play = server.play()
    gathering = play.until(until)
    play.boxes.setdefault(gathering.ctx, {place: {peer: bytes(82) for peer in range(3)} for place in range(3)})
    victim = server.hospitals["site-00"]
    before = len(victim.talk), victim.trained, opened(server)
    victim.restart()

    replayed = script(play, gathering, "site-00")
    answers = [victim.asked(message) for message in replayed[1:] + replayed]

    assert not any(isinstance(answer, Shares | Contribution | Opening) for answer in answers)
    assert (victim.trained, opened(server)) == before[1:]
    assert_nothing_revealed(server, *opened(server))


@pytest.mark.parametrize("count", [4, 5, 7])
def test_a_site_that_is_sent_another_adapter_than_all_others_does_not_train(count: int) -> None:
    server = EvilServer(count)
    play = server.play()
    play.advertise()
    victim, *others = server.names
    common, apart = play.gathering(START), play.gathering(OTHER)
    play.share(common, others)
    play.share(apart, [victim])
    boxes = play.boxes[common.ctx]

    inbox = {sender: boxes[sender][0] for sender in boxes}
    answers = {victim: play.ask(victim, play.start(apart, inbox, OTHER))}
    play.contribute(common, others)

    assert errors(answers) == {"Refused"}
    assert trainings(server)[victim] == 0
    assert_nothing_revealed(server)


@pytest.mark.parametrize("count", [4, 5, 7])
def test_with_one_adapter_for_each_half_no_site_trains(count: int) -> None:
    server = EvilServer(count)
    play = server.play()
    play.advertise()
    halves = [(server.names[::2], START), (server.names[1::2], OTHER)]
    for sites, adapter in halves:
        play.share(play.gathering(adapter), sites)

    answers: dict[str, Message] = {}
    for sites, adapter in halves:
        answers |= play.contribute(play.gathering(adapter), sites, adapter=adapter)

    assert errors(answers) == {"Refused"}
    assert set(trainings(server).values()) == {0}


def test_an_adapter_exchanged_after_the_keys_were_shared_is_refused_before_training() -> None:
    server = EvilServer(4)
    play = server.play()
    gathering = play.until("share")

    answers = play.contribute(gathering, adapter=OTHER)

    assert errors(answers) == {"MessageError"}
    assert set(trainings(server).values()) == {0}


def test_a_round_that_was_trained_is_not_masked_for_another_adapter(tmp_path: Path) -> None:
    server = EvilServer(4, folder=tmp_path)
    server.play().until("contribute")

    for attempt in (2, 3):
        play = server.play(attempt=attempt)
        play.advertise()
        gathering = play.gathering(OTHER)
        play.share(gathering)
        answers = play.contribute(gathering, adapter=OTHER)
        for hospital in server.hospitals.values():
            hospital.restart()
        assert errors(answers) == {"Refused"}

    assert set(trainings(server).values()) == {1}
    assert_nothing_revealed(server)


@pytest.mark.parametrize("restart", [False, True])
def test_a_round_that_was_opened_is_not_summed_again_without_one_of_its_sites(restart: bool, tmp_path: Path) -> None:
    server = EvilServer(5, folder=tmp_path)
    server.play().until("open")

    for hospital in server.hospitals.values():
        if restart:
            hospital.restart()
    cohorts = [server.names, server.names[1:], server.names[:4], server.names[:3]]  # the last is too small as well
    answers = [server.play(cohort, attempt=attempt).advertise() for attempt, cohort in enumerate(cohorts, start=2)]

    assert all(errors(answer) == {"Refused"} for answer in answers)
    assert set(trainings(server).values()) == {1}
    assert_nothing_revealed(server, whole(server))


RETRIES = [(count, bad, 3) for count, bad in (*BELOW_A_THIRD, *((10, bad) for bad in range(4)))] + [(7, 2, 6)]


@pytest.mark.parametrize(("count", "bad", "least"), RETRIES)
def test_of_two_attempts_at_a_round_at_most_one_is_opened(count: int, bad: int, least: int) -> None:
    """The server keeps the first attempt alive at some sites, claims it failed, and goes on with the others."""
    for stay in range(count - bad + 1):
        server = EvilServer(count, puppets(count, bad), plan=plan_for(min_sites=least))
        stays, leaves = server.honest()[:stay], server.honest()[stay:]
        first = server.play()
        gathering = first.until("confirm")
        first.open(gathering, stays[:-1])  # one short, so that the last may still decide
        cohorts = [[*leaves, *server.puppets], list(server.names), leaves]
        for attempt, cohort in enumerate(cohorts, start=2):
            attack(server.play(cohort, attempt=attempt), leaves)
        first.open(gathering, stays[-1:])

        assert len(completed(server)) <= 1
        if whole(server) in completed(server):
            assert opened(server) == {whole(server)}
        assert set(trainings(server).values()) == {1}
        assert_nothing_revealed(server, *completed(server))


def attack(play: Play, sites: Sequence[str]) -> dict[str, Message]:
    """Play an attempt with these honest sites and all puppets, as far as they go; return how they answered the offer."""
    answers = {site: answer for site, answer in play.advertise(sites).items() if site in sites}
    if there := taken(answers):
        gathering = play.gathering()
        survivors = [*there, *play.server.puppets.keys() & set(play.cohort)]
        play.share(gathering, there)
        play.contribute(gathering, there)
        play.confirm(gathering, there, survivors)
        play.open(gathering, there, survivors)
    return answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two cohorts of one round, each of exactly as many sites as are needed, with all puppets in both.

    Attributes:
        first: The honest sites of the first.
        second: The honest sites of the second.
        told: Of those in both, who was sent the first attempt's signatures before it was offered the second.
        stays: Of those in both, who is not offered the second attempt, and is sent the first's signatures later.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    told: tuple[str, ...]
    stays: tuple[str, ...]

    def play(self, server: EvilServer) -> None:
        """Play the two attempts."""
        first = server.play(sorted([*self.first, *server.puppets]))
        gathering = first.until("confirm")
        first.open(gathering, self.told)
        second = server.play(sorted([*self.second, *server.puppets]), attempt=2)
        offered = [site for site in self.second if site not in self.stays]
        attack(second, offered)
        first.open(gathering, [site for site in self.first if site not in offered])


def overlaps(honest: Sequence[str], each: int) -> Iterator[Overlap]:
    """Yield every way, up to names, to choose two cohorts with so many honest sites each and to treat those in both."""
    for both in range(max(0, 2 * each - len(honest)), each + 1):
        for told, stays in itertools.product(range(both + 1), repeat=2):
            if told + stays <= both:
                yield Overlap(
                    first=tuple(honest[:each]),
                    second=tuple(honest[each - both : 2 * each - both]),
                    told=tuple(honest[each - both : each - both + told]),
                    stays=tuple(honest[each - stays : each]),
                )


@pytest.mark.parametrize(("count", "bad"), [(4, 1), (5, 1), (7, 1), (7, 2), (8, 2), (10, 3)])
def test_of_two_cohorts_of_just_enough_sites_at_most_one_is_opened(count: int, bad: int) -> None:
    done = []
    for overlap in overlaps(EvilServer(count, puppets(count, bad)).honest(), connections(count).quorum - bad):
        server = EvilServer(count, puppets(count, bad))

        overlap.play(server)

        done.append(completed(server))
        assert len(done[-1]) <= 1
        assert set(trainings(server).values()) <= {0, 1}
        assert_nothing_revealed(server, *done[-1])
    assert {len(sums) for sums in done} == {0, 1}  # some attacks cost the server the round, others it


@pytest.mark.parametrize(("count", "bad"), [(4, 2), (5, 3), (7, 3), (10, 4)])
def test_with_a_third_or_more_colluding_two_cohorts_without_a_common_honest_site_are_both_opened(
    count: int, bad: int
) -> None:
    """The limit of the promise, and a proof that these attacks would be seen to succeed."""
    server = EvilServer(count, puppets(count, bad))
    each = connections(count).quorum - bad

    next(overlaps(server.honest(), each)).play(server)

    assert len(completed(server)) == 2
    with pytest.raises(AssertionError, match="learned"):
        assert_nothing_revealed(server, *sorted(completed(server))[:1])
    assert_nothing_revealed(server, *completed(server))


@settings(max_examples=60)
@given(strategies.data())
def test_of_attempts_with_any_cohorts_and_signatures_withheld_from_anybody_at_most_one_is_opened(
    data: strategies.DataObject,
) -> None:
    count, bad = data.draw(strategies.sampled_from([(7, 2), (10, 3)]))
    server = EvilServer(count, puppets(count, bad))
    some = strategies.sets(strategies.sampled_from(server.honest()))
    pending: list[tuple[Play, Gathering, list[str]]] = []

    for attempt in (1, 2, 3):
        honest = data.draw(strategies.permutations(server.honest()))
        least = connections(count).quorum - bad
        cohort = sorted([*honest[: data.draw(strategies.integers(least, len(honest)))], *server.puppets])
        held_back = data.draw(some)
        asked = [site for site in server.honest(cohort) if attempt == 1 or site not in held_back]
        play = server.play(cohort, attempt=attempt)
        present = [site for site in taken(play.advertise(asked)) if site in asked]
        if not present:
            continue
        gathering = play.gathering()
        play.share(gathering, present)
        play.contribute(gathering, present)
        play.confirm(gathering, present, [*present, *server.puppets])
        pending.append((play, gathering, present))
        withheld = data.draw(some)
        at_once = [site for site in present if site not in withheld]
        play.open(gathering, at_once, [*present, *server.puppets])
    for play, gathering, present in data.draw(strategies.permutations(pending)):
        play.open(gathering, present, [*present, *server.puppets])

    assert len(completed(server)) <= 1
    assert set(trainings(server).values()) <= {0, 1}
    assert_nothing_revealed(server, *completed(server))


@pytest.mark.parametrize(("count", "bad"), [(4, 1), (7, 1), (7, 2), (10, 3)])
def test_puppets_below_a_third_of_the_roster_cannot_be_alone_with_a_site(count: int, bad: int) -> None:
    server = EvilServer(count, puppets(count, bad))
    cohort = ("site-00", *server.puppets)

    answers = attack(server.play(cohort), ["site-00"])

    assert errors(answers) == {"Refused"}
    assert trainings(server)["site-00"] == 0
    assert_nothing_revealed(server)


@pytest.mark.parametrize("until", ["", *EXCHANGES[:-1]])
@pytest.mark.parametrize(("count", "bad"), [(4, 1), (5, 1), (7, 2), (10, 3)])
def test_a_cohort_below_the_rosters_quorum_is_refused_and_an_attempt_under_way_goes_on(
    count: int, bad: int, until: str
) -> None:
    server = EvilServer(count, puppets(count, bad))
    first = server.play()
    gathering = first.until(until) if until else None
    trained = trainings(server)

    for attempt, size in enumerate(range(1, connections(count).quorum), start=2):
        for cohort in (server.names[:size], ("site-00", *server.names[count - size + 1 :])):
            play = server.play(cohort, attempt=attempt)
            answers = attack(play, server.honest(cohort))
            assert errors(answers) == {"Refused"}
            with pytest.raises(Refused, match=f"offered to {size} of the {count} sites on the roster"):
                Attempt.of(play.offer, server.roster, server.ring, server.plan.federation)

    assert trainings(server) == trained
    assert_nothing_revealed(server)
    if gathering:
        for step in EXCHANGES[EXCHANGES.index(until) + 1 :]:
            getattr(first, step)(gathering)
    else:
        first.until("open")
    assert completed(server) == {whole(server)}
    assert_nothing_revealed(server, whole(server))


@pytest.mark.parametrize("gone", EXCHANGES)
def test_of_just_enough_sites_asked_none_may_be_missing_anywhere(gone: str) -> None:
    server = EvilServer(7, puppets(7, 2))
    cohort = (*server.names[:3], *server.puppets)  # of seven, five are needed
    there = list(cohort[1:])
    play = server.play(cohort)

    play.advertise(there if gone == "advertise" else cohort)
    gathering = play.gathering()
    for step in EXCHANGES[1:]:
        sites = there if EXCHANGES.index(step) >= EXCHANGES.index(gone) else cohort
        survivors = there if gone in EXCHANGES[:3] else cohort
        if step in ("confirm", "open"):
            getattr(play, step)(gathering, sites, survivors)
        else:
            getattr(play, step)(gathering, sites)

    assert completed(server) == set()
    assert set(trainings(server).values()) == ({0, 1} if gone in EXCHANGES[2:] else {0})
    assert not any(spoken(server.hospitals[site], Opening) for site in server.honest()) or gone == "open"
    assert_nothing_revealed(server)


COHORTS: dict[str, Callable[[EvilServer], Sequence[str]]] = {
    "one site": lambda server: server.names[:1],
    "two sites": lambda server: server.names[:2],
    "fewer than two thirds of the roster": lambda server: server.names[:4],
    "fewer than the plan's min_sites": lambda server: server.names[:5],
    "puppets that are not on the roster": lambda server: (server.names[0], *names(14)[7:]),
    "one puppet that is not on the roster": lambda server: (*server.names, "site-09"),
    "a site twice": lambda server: (*server.names[:6], server.names[5]),
    "in disorder": lambda server: server.names[::-1],
    "without the site": lambda server: server.names[1:],
    "more than the plan's max_sites": lambda server: names(9),
}


@pytest.mark.parametrize("case", COHORTS)
def test_an_offer_with_an_unfit_cohort_is_refused(case: str) -> None:
    server = EvilServer(7, plan=plan_for(min_sites=6, max_sites=8))
    cohort = tuple(COHORTS[case](server))
    offer = dataclasses.replace(server.offer(), cohort=cohort)
    strangers = Roster(
        federation="test",
        epoch=1,
        coordinator=server.roster.coordinator,
        sites=dict(server.roster.sites) | {site: os_keys()[:32] for site in cohort if site not in server.names},
    )
    elsewhere = dataclasses.replace(offer, roster=strangers.digest)

    signed = [
        server.signed(offer),
        server.signed(elsewhere, roster=strangers),
        dataclasses.replace(offer, signature=server.signed(elsewhere, roster=strangers).signature),
    ]
    answers = [server.hospitals["site-00"].asked(each) for each in signed]

    assert {errors({"": answer}).pop() for answer in answers} <= REFUSALS
    assert trainings(server)["site-00"] == 0
    assert_nothing_revealed(server)


@pytest.mark.parametrize("field", ["run", "plan", "roster", "layout", "ring", "round"])
def test_an_offer_under_other_terms_is_refused_although_it_is_signed(field: str) -> None:
    server = EvilServer(4)
    value: Any = 41 if field == "round" else "sha256:" + "0" * 64

    answer = server.hospitals["site-00"].asked(server.offer(**{field: value}))

    assert errors({"": answer}) == {"Refused" if field != "roster" else "MessageError"}


def test_below_the_quorum_of_advertisements_boxes_survivors_or_signatures_nothing_goes_on() -> None:
    server = EvilServer(7)  # a quorum is 5
    few = server.names[:4]
    one = server.play(attempt=1)
    one.advertise()
    advertised = one.share(one.gathering(of=few), few)
    two = server.play(attempt=2)
    gathering = two.until("share")
    boxes = two.contribute(gathering, senders=few)
    assert set(trainings(server).values()) == {0, 1}  # those who hold a share of their own beside four boxes go on
    three = server.play(attempt=3)
    later = three.until("contribute")
    survivors = three.confirm(later, few, few)
    four = server.play(attempt=4)
    last = four.until("contribute")
    four.confirm(last, few)
    signatures = four.open(last)

    assert errors({site: advertised[site] for site in few}) == {"Refused"}
    assert {site: errors({site: boxes[site]}) for site in server.names} == {
        site: {"Refused"} if site in few else {"none"} for site in server.names
    }
    assert errors(survivors) == {"Refused"}
    assert errors(signatures) == {"Refused"}
    assert_nothing_revealed(server)


def test_a_signature_counts_once_and_only_if_it_is_a_survivors_on_these_survivors() -> None:
    server = EvilServer(5, puppets=[4])
    survivors = server.names[:4]
    for case in range(4):
        play = server.play(attempt=case + 1)
        gathering = play.until("contribute")
        play.confirm(gathering, survivors[:3], survivors)
        raw = play.survivors(survivors)
        signed = play.signatures[gathering.ctx, raw]
        signed.pop(4)
        puppet = server.puppets["site-04"]
        three = b"".join(places([place]) + signed[place] for place in (0, 1, 2))
        message = [
            three + places([2]) + signed[2],  # twice
            three + places([3]) + signed[2],  # in another's name
            three + places([4]) + puppet.sign(gathering, raw),  # by one who is no survivor
            three + places([3]) + puppet.sign(gathering, raw),  # forged
        ][case]
        answers = {
            site: play.ask(site, Signatures(context=gathering.ctx.hex(), signatures=message)) for site in survivors[:3]
        }
        assert errors(answers) == {"MessageError"}

    assert_nothing_revealed(server)


def test_a_sites_own_signature_said_in_the_names_of_others_opens_nothing() -> None:
    """Were it taken, each could be shown survivors of its own, and the sum of six of ten opened, where seven are due."""
    server = EvilServer(10)
    play = server.play()
    gathering = play.until("contribute")
    kept, lost = server.names[:6], server.names[6:]
    answers = {}
    for number, site in enumerate(server.names):
        survivors = [*kept, site if site in lost else lost[number % 4]]
        play.confirm(gathering, [site], survivors)
        raw = play.survivors(survivors)
        own = play.signatures[gathering.ctx, raw][play.place(site)]
        said = b"".join(places([play.place(survivor)]) + own for survivor in sorted(survivors))
        answers[site] = play.ask(site, Signatures(context=gathering.ctx.hex(), signatures=said))

    assert errors(answers) == {"MessageError"}
    assert_nothing_revealed(server)


@pytest.mark.parametrize("terms", ["x25519", "x25519+ml-kem-768"])
def test_a_box_with_a_bit_changed_holds_no_share_and_with_too_many_of_them_a_site_does_not_train(terms: str) -> None:
    server = EvilServer(4, plan=plan_for(key_agreement=terms))
    play = server.play()
    gathering = play.until("share")
    victim, *others = server.names
    inbox = play.inbox(gathering, victim)

    inbox[1] = bytes([inbox[1][0] ^ 1]) + inbox[1][1:]
    went_on = play.ask(victim, play.start(gathering, inbox))
    play.contribute(gathering, others)
    play.confirm(gathering)
    play.open(gathering)
    (opening,) = spoken(server.hospitals[victim], Opening)
    assert isinstance(opening, Opening)

    assert isinstance(went_on, Contribution)
    assert opening.shares[SHARE_BYTES : 2 * SHARE_BYTES] == NO_SHARE
    assert opening.shares.count(NO_SHARE) == 1
    assert_nothing_revealed(server, whole(server))

    for attempt, position in enumerate((0, 31, 32, 40, 65, 66, 81, -1), start=1):
        second = server.play(number=2, attempt=attempt)
        later = second.until("share")
        boxes = second.inbox(later, victim)
        for sender in (1, 2):
            box = bytearray(boxes[sender])
            box[position] ^= 0x80
            boxes[sender] = bytes(box)
        refused = second.ask(victim, second.start(later, boxes))
        assert errors({"": refused}) == {"Refused"}
    assert server.hospitals[victim].trained == 1


def test_boxes_of_other_senders_receivers_directions_and_attempts_do_not_open() -> None:
    server = EvilServer(4)
    old = server.play(attempt=1)
    before = old.until("share")

    def refused(attempt: int, change: Callable[[Play, Gathering, dict[int, bytes]], dict[int, bytes]]) -> set[str]:
        play = server.play(attempt=attempt)
        gathering = play.until("share")
        inbox = play.inbox(gathering, "site-00")
        return errors({"": play.ask("site-00", play.start(gathering, change(play, gathering, inbox)))})

    swapped = refused(2, lambda play, gathering, inbox: {1: inbox[2], 2: inbox[1], 3: inbox[3]})
    others = refused(
        3, lambda play, gathering, inbox: inbox | {sender: play.boxes[gathering.ctx][sender][3] for sender in (1, 2)}
    )
    reflected = refused(
        4, lambda play, gathering, inbox: inbox | {peer: play.boxes[gathering.ctx][0][peer] for peer in (1, 2)}
    )
    earlier = refused(
        5, lambda play, gathering, inbox: inbox | {peer: old.inbox(before, "site-00")[peer] for peer in (1, 2)}
    )

    assert swapped == others == reflected == earlier == {"Refused"}
    assert server.hospitals["site-00"].trained == 0


def test_an_inbox_with_a_box_from_nobody_from_oneself_or_twice_is_refused() -> None:
    server = EvilServer(5)
    for attempt, case in enumerate(("oneself", "stranger", "absent", "twice", "disorder", "cut", "empty"), start=1):
        play = server.play(attempt=attempt)
        play.advertise()
        gathering = play.gathering(of=server.names[:4])
        play.share(gathering, server.names[:4])
        inbox = play.inbox(gathering, "site-00")
        records = [places([sender]) + box for sender, box in inbox.items()]
        box = inbox[1]
        raw = {
            "oneself": [places([0]) + box, *records],
            "stranger": [*records, places([9]) + box],
            "absent": [*records, places([4]) + box],
            "twice": [*records, records[-1]],
            "disorder": records[::-1],
            "cut": [b"".join(records)[:-1]],
            "empty": [],
        }[case]
        message = dataclasses.replace(play.start(gathering, inbox), inbox=b"".join(raw))
        assert errors({"": play.ask("site-00", message)}) == {"MessageError"}

    assert server.hospitals["site-00"].trained == 0


@pytest.mark.parametrize(("plan_allows", "site_allows"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_sparse_graph_is_joined_only_if_plan_and_site_allow_it(plan_allows: bool, site_allows: bool) -> None:
    graph = SEMI_HONEST if plan_allows else "complete"
    server = EvilServer(
        65,
        range(1, 65),
        plan=plan_for(max_sites=65, graph=graph),
        ring=RingLayout(length=LAYOUT.length, update_bound=10.0, max_sites=65),
        allowed=frozenset({SEMI_HONEST} if site_allows else ()),
    )

    answer = server.hospitals["site-00"].asked(server.offer())

    if plan_allows and site_allows:
        assert isinstance(answer, Advertisement)
    else:
        assert errors({"": answer}) == {"Refused"}


def test_an_offer_that_nobody_signed_takes_nothing_from_a_site(tmp_path: Path) -> None:
    server = EvilServer(3, folder=tmp_path)
    server.play().until("contribute")

    answers = {
        site: hospital.asked(dataclasses.replace(server.offer(number=2), signature=bytes(64)))
        for site, hospital in server.hospitals.items()
    }
    server.play(attempt=2).until("open")

    assert errors(answers) == {"MessageError"}
    assert opened(server) == {whole(server)}


def test_an_old_offer_said_again_after_a_restart_takes_nothing_from_a_site(tmp_path: Path) -> None:
    server = EvilServer(3, folder=tmp_path)
    old = server.play()
    old.until("open")
    server.play(number=2).until("contribute")
    for hospital in server.hospitals.values():
        hospital.restart()

    answers = {site: hospital.asked(old.offer) for site, hospital in server.hospitals.items()}
    server.play(number=2, attempt=2).until("open")

    assert errors(answers) == {"Refused"}
    assert opened(server) == {whole(server), whole(server, 2)}


@settings(max_examples=150)
@given(strategies.data())
def test_garbage_is_answered_with_a_failure_and_the_next_attempt_goes_well(data: strategies.DataObject) -> None:
    hybrid = data.draw(strategies.booleans())
    server = EvilServer(3, plan=plan_for(key_agreement="x25519+ml-kem-768" if hybrid else "x25519"))
    rehearsal = EvilServer(3, plan=server.plan, enrolment=server.enrolment)
    said = rehearsal.play()
    all_said = script(said, said.until("confirm"), "site-00")
    due = data.draw(strategies.integers(0, 4))
    play = server.play()
    gathering = play.until(EXCHANGES[due - 1]) if due else None
    mine = [*all_said]
    mine[0] = play.offer
    if gathering:
        mine[1] = gathering.message
        if play.boxes:
            mine[2:] = script(play, gathering, "site-00")[2:]
    kind = due if data.draw(strategies.booleans()) else data.draw(strategies.integers(0, 4))
    genuine = seal(mine[kind])
    garbage = data.draw(spoiled(genuine))
    victim = server.hospitals["site-00"]

    answer = open_envelope(victim.answer(garbage))

    if garbage.body != genuine.body or garbage.vector is not genuine.vector:
        if not (kind == due == 1 and isinstance(answer, Shares)):  # boxes for another adapter: they open nowhere
            assert errors({"": answer}) <= REFUSALS
        server.play(attempt=2).until("open")
        assert opened(server) == {whole(server)}
        assert set(trainings(server).values()) == {1}
        assert_nothing_revealed(server, whole(server))
