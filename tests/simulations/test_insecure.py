"""What only a simulation may do: sums that nothing hides, and noise from a seed."""

import dataclasses
import hashlib
import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies
from scipy import stats

from confide.client.noise import rounded_gaussian
from confide.common.errors import MessageError, Refused
from confide.common.messages import (
    Advertisement,
    Contribution,
    Envelope,
    Failure,
    MaskedVector,
    Message,
    Offer,
    Peers,
    Signatures,
    Start,
    Survivors,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.plan import Plan
from confide.common.ring import RingLayout, RingVector
from confide.server.summation import Collected, Task
from confide.simulations.insecure import InsecurePlainSum, InsecureSeededNoise, InsecureUnmasked

RING = RingLayout(length=4, update_bound=1.0, max_sites=8)
NARROW = RingLayout(length=4, max_sites=8, bits=16, segments=((4, 1.0),))
ADAPTER = np.zeros(4, np.float32)
VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "noise.json").read_text())["seeded"]

Answer = Callable[[Message], Message | None]


def task(plan: Plan, sites: list[str], ring: RingLayout = RING, least: int = 3, **changes: Any) -> Task:
    terms = dataclasses.replace(plan, federation=dataclasses.replace(plan.federation, min_sites=least))
    given = Task(
        run="demo",
        plan=terms,
        round=3,
        attempt=1,
        cohort=tuple(sites),
        layout="sha256:2",
        ring=ring,
        adapter=ADAPTER,
        parent=vector_digest(ADAPTER),
        training_s=1.0,
        answer_s=1.0,
    )
    return dataclasses.replace(given, **changes)


def vector(words: list[int], ring: RingLayout = RING) -> RingVector:
    """Return a vector of these words that tells of no bound."""
    tail = [0] * (ring.size - ring.length)
    return RingVector(words=np.array([*words, *tail], ring.dtype), layout=ring)


def site(sent: RingVector) -> Answer:
    """Return the answers of a site that sends this vector."""
    part: list[InsecureUnmasked] = []

    def answer(message: Message) -> Message:
        if isinstance(message, Offer):
            part[:] = [InsecurePlainSum().attend(message)]
            return part[0].advertise()
        assert isinstance(message, Start)
        part[0].admit(message)
        return part[0].mask(sent)

    return answer


def failing(message: Message) -> Message:
    return Failure(error="DataError", sentence="The site's data do not fit the plan.")


class Answers:
    """A channel whose sites answer as they were told to; those it does not have are silent."""

    def __init__(self, sites: Mapping[str, Answer]) -> None:
        self._sites = sites
        self.asked: list[tuple[str, str]] = []

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        assert timeout_s > 0
        for name, envelope in messages.items():
            message = open_envelope(envelope)
            self.asked.append((message.kind, name))
            answer = self._sites[name](message) if name in self._sites else None
            if answer is not None:
                yield name, seal(answer)


def collect(given: Task, sites: Mapping[str, Answer]) -> Collected:
    return InsecurePlainSum().collect(Answers(sites), given)


def entries(ring: RingLayout) -> strategies.SearchStrategy[list[int]]:
    """Return lists of entries of which the sum of eight is still one of honest vectors."""
    return strategies.lists(strategies.integers(-ring.largest // 2, ring.largest // 2), min_size=4, max_size=4)


@pytest.mark.parametrize("ring", [RING, NARROW], ids=["32 bits", "16 bits"])
@given(data=strategies.data())
def test_the_sum_is_the_integer_sum_modulo_the_ring(plan: Plan, ring: RingLayout, data: strategies.DataObject) -> None:
    vectors = data.draw(strategies.lists(entries(ring), min_size=3, max_size=8))
    modulus = 2**ring.bits
    sites = {f"site-{number}": site(vector([entry % modulus for entry in v], ring)) for number, v in enumerate(vectors)}

    collected = collect(task(plan, sorted(sites), ring), sites)

    assert collected.total is not None
    assert collected.total.count == len(vectors)
    assert collected.total.words[: ring.length].tolist() == [
        sum(column) % modulus for column in zip(*vectors, strict=True)
    ]
    assert (collected.present, dict(collected.missing)) == (tuple(sorted(sites)), {})


def test_what_a_site_sends_says_that_nothing_hides_it(plan: Plan) -> None:
    offer = task(plan, ["a", "b", "c"]).offer("insecure_plain_sum")
    part = InsecurePlainSum().attend(offer)

    sent = part.mask(vector([1, 2, 3, 4]))

    assert sent.vector.words.tolist() == [1, 2, 3, 4, 0, 0]
    # The word is in the offer, and all that the site sends is bound to the offer.
    other = InsecurePlainSum().attend(dataclasses.replace(offer, round=4))
    assert offer.roster == "insecure_plain_sum"
    assert sent.context == part.advertise().context != other.advertise().context
    assert part.advertise().keys == b""
    assert collect(task(plan, ["a"]), {}).summation == "insecure_plain_sum"


def test_a_site_that_is_offered_another_sum_refuses(plan: Plan) -> None:
    with pytest.raises(Refused, match="not for a sum by insecure_plain_sum"):
        InsecurePlainSum().attend(task(plan, ["a", "b", "c"]).offer("sha256:" + "0" * 64))


def test_no_sum_is_given_of_fewer_sites_than_the_least(plan: Plan) -> None:
    sites = {"a": site(vector([1] * 4)), "b": failing, "c": site(vector([1] * 4))}

    collected = collect(task(plan, ["a", "b", "c", "d"]), sites)

    assert collected.total is None
    assert collected.present == ()
    assert dict(collected.missing) == {"b": "advertise: DataError", "d": "advertise: no answer"}
    assert collected.void == "After `advertise` 2 of a cohort of 4 sites were left; 3 are needed."
    assert collected.again == ()
    enough = collect(task(plan, ["a", "b", "c", "d"], least=2), sites)
    assert enough.total is not None
    assert enough.present == ("a", "c")


def test_whoever_is_lost_while_training_is_not_in_the_sum(plan: Plan) -> None:
    def lost(message: Message) -> Message | None:
        return site(vector([9] * 4))(message) if isinstance(message, Offer) else None

    sites = {name: site(vector([1] * 4)) for name in "abc"}

    collected = collect(task(plan, ["a", "b", "c", "d"]), {**sites, "d": lost})

    assert collected.total is not None
    assert collected.total.words.tolist() == [3, 3, 3, 3, 0, 0]
    assert dict(collected.missing) == {"d": "contribute: no answer"}


def test_who_did_not_advertise_is_not_asked_to_train(plan: Plan) -> None:
    channel = Answers({name: site(vector([1] * 4)) for name in "abc"} | {"d": failing})

    InsecurePlainSum().collect(channel, task(plan, ["a", "b", "c", "d"]))

    assert channel.asked == [*(("offer", name) for name in "abcd"), *(("start", name) for name in "abc")]


@pytest.mark.parametrize("changes", [{"round": 2}, {"attempt": 2}, {"run": "other"}, {"layout": "sha256:9"}])
def test_a_contribution_to_another_attempt_enters_no_sum(plan: Plan, changes: dict[str, Any]) -> None:
    given = task(plan, ["a", "b", "c", "d"])
    elsewhere = InsecurePlainSum().attend(dataclasses.replace(given, **changes).offer("insecure_plain_sum"))

    def late(message: Message) -> Message | None:
        return site(vector([9] * 4))(message) if isinstance(message, Offer) else elsewhere.mask(vector([9] * 4))

    sites = {name: site(vector([1] * 4)) for name in "abc"}

    collected = collect(given, {**sites, "d": late})

    assert collected.total is not None
    assert collected.total.words.tolist() == [3, 3, 3, 3, 0, 0]
    assert dict(collected.missing) == {"d": "contribute: MessageError"}


def test_a_site_that_brings_keys_takes_part_in_another_sum(plan: Plan) -> None:
    given = task(plan, ["a", "b", "c", "d"])
    context = InsecurePlainSum().attend(given.offer("insecure_plain_sum")).advertise().context
    sites = {name: site(vector([1] * 4)) for name in "abc"}

    collected = collect(given, {**sites, "d": lambda _: Advertisement(context=context, keys=b"keys")})

    assert dict(collected.missing) == {"d": "advertise: MessageError"}


def test_a_sum_that_cannot_be_one_of_honest_vectors_is_void(plan: Plan) -> None:
    sites = {name: site(vector([1] * 4)) for name in "abc"}

    collected = collect(task(plan, ["a", "b", "c", "d"]), {**sites, "d": site(vector([2**31] * 4))})

    assert collected.total is None
    assert collected.present == ()
    assert "This cannot be the sum of 4 honest vectors" in collected.void
    assert collected.again == ()


def test_a_site_starts_only_for_the_attempt_it_attends(plan: Plan) -> None:
    part = InsecurePlainSum().attend(task(plan, ["a", "b", "c"]).offer("insecure_plain_sum"))
    part.admit(Start(context=part.advertise().context, inbox=b"", adapter=ADAPTER))

    with pytest.raises(MessageError, match="another attempt"):
        part.admit(Start(context="0" * 64, inbox=b"", adapter=ADAPTER))


def test_there_are_no_shares_and_nothing_to_open(plan: Plan) -> None:
    part = InsecurePlainSum().attend(task(plan, ["a", "b", "c"]).offer("insecure_plain_sum"))

    with pytest.raises(Refused, match="has no peers"):
        part.share(Peers(context="", adapter="", advertisements=b""))
    with pytest.raises(Refused, match="has no survivors"):
        part.confirm(Survivors(context="", sites=b""))
    with pytest.raises(Refused, match="has no signatures"):
        part.open(Signatures(context="", signatures=b""))


def test_the_contributions_themselves_are_left_as_they_were(plan: Plan) -> None:
    vectors = {name: vector([7] * 4) for name in "abc"}

    collect(task(plan, ["a", "b", "c"]), {name: site(sent) for name, sent in vectors.items()})

    for sent in vectors.values():
        assert sent.words.tolist() == [7] * 4 + [0, 0]


def test_an_answer_is_let_go_before_the_next_one_is_made(plan: Plan) -> None:
    alive: list[int] = []
    given = task(plan, [f"site-{n}" for n in range(8)])

    class Fresh(Answers):
        def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
            if next(iter(messages.values())).vector is None:
                yield from super().ask(messages, timeout_s)
                return
            made: list[weakref.ref[np.ndarray[Any, Any]]] = []
            for name, envelope in messages.items():
                alive.append(sum(words() is not None for words in made))
                fresh = vector([1, 2, 3, 4])
                made.append(weakref.ref(fresh.words))
                start = open_envelope(envelope)
                assert isinstance(start, Start)
                words = MaskedVector(words=fresh.layout.packed(fresh.words))
                answer = seal(Contribution(context=start.context, vector=words))
                del fresh, words
                assert made[-1]() is not None
                yield name, answer
                del answer

    collected = InsecurePlainSum().collect(Fresh({name: site(vector([0] * 4)) for name in given.cohort}), given)

    assert collected.total is not None
    assert alive == [0] * 8


def draws(seed: int, stream: str, number: int) -> tuple[bytes, bytes]:
    noise = InsecureSeededNoise(seed, stream, number)
    return noise.words(16).tobytes(), noise.rounding_key()


def test_seeded_noise_is_equal_on_every_repetition_and_says_that_it_is_insecure() -> None:
    assert draws(1, "a", 1) == draws(1, "a", 1)
    assert InsecureSeededNoise(1, "a", 1).name.startswith("insecure_")


def test_seeded_noise_differs_with_seed_site_and_round() -> None:
    keys = [
        (1, "a", 1),
        (2, "a", 1),
        (1, "b", 1),
        (1, "a", 2),
        (1, "a|1", 1),
        (1, "a", 11),
        (11, "a", 1),
        (1 + 2**32, "a", 1),
    ]

    for kind in zip(*(draws(*key) for key in keys), strict=True):
        assert len(set(kind)) == len(keys)


def test_the_rounding_key_has_32_bytes_and_does_not_depend_on_what_was_drawn() -> None:
    noise = InsecureSeededNoise(1, "a", 1)
    before = noise.rounding_key()

    noise.words(3)

    assert len(before) == 32
    assert noise.rounding_key() == before


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: f"{case['deviation']:g}")
def test_seeded_noise_is_equal_on_every_machine(case: dict[str, Any]) -> None:
    noise = InsecureSeededNoise(VECTORS["seed"], VECTORS["stream"], VECTORS["round"])
    again = InsecureSeededNoise(VECTORS["seed"], VECTORS["stream"], VECTORS["round"])

    drawn = rounded_gaussian(noise, case["deviation"], VECTORS["count"])

    assert [f"{word:016x}" for word in again.words(3).tolist()] == VECTORS["words"]
    assert drawn[:6].tolist() == case["first"]
    assert hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest() == case["sha256"]
    assert f"{noise.words(1)[0]:016x}" == case["after"]


def test_seeded_words_are_uniform_and_independent() -> None:
    """False alarm 1e-6 each: chi-square over 256 equal bins, and the correlation of neighbours, of 100,000 words."""
    words = InsecureSeededNoise(5, "a", 1).words(100_000)

    places = words / 2.0**64 - 0.5
    assert words.dtype == np.uint64
    for shift in (0, 28, 56):
        counts = np.bincount((words >> np.uint64(shift) & np.uint64(255)).astype(np.int64), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
    assert abs(12 * (places[1:] @ places[:-1])) < 4.9 * math.sqrt(len(words))
