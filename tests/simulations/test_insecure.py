"""What only a simulation may do: sums that nothing hides, and noise from a seed."""

import math
import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given, strategies

from confide.common.messages import Contribution, Envelope, Failure, Offer, open_envelope, seal
from confide.common.ring import RingLayout, RingVector
from confide.server.rounds import Collected
from confide.simulations.insecure import InsecurePlainSum, InsecureSeededNoise

RING = RingLayout(length=4, update_bound=1.0, max_sites=8)
OFFER = Offer(
    run="demo", plan="sha256:1", round=3, attempt=1, sites=4, layout="sha256:2", adapter=np.zeros(4, np.float32)
)
WORDS = strategies.lists(strategies.integers(0, 2**32 - 1), min_size=4, max_size=4)


class Answers:
    """A channel whose sites answer what they were told to."""

    def __init__(self, answers: Mapping[str, Envelope]) -> None:
        self._answers = answers

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        yield from ((site, self._answers[site]) for site in messages if site in self._answers)


def vector(words: list[int]) -> RingVector:
    return RingVector(words=np.array(words, np.uint32), layout=RING, bounded=False)


def collect(answers: Mapping[str, Envelope], sites: list[str], least: int = 3) -> Collected:
    return InsecurePlainSum().collect(Answers(answers), OFFER, sites, RING, least, 1.0)


@given(strategies.lists(WORDS, min_size=3, max_size=8))
def test_the_sum_is_the_integer_sum_modulo_2_to_the_32(vectors: list[list[int]]) -> None:
    names = [f"site-{number}" for number in range(len(vectors))]
    plain = InsecurePlainSum()
    answers = {name: seal(plain.protect(vector(v), OFFER)) for name, v in zip(names, vectors, strict=True)}

    collected = collect(answers, names)

    assert collected.total is not None
    assert collected.total.count == len(vectors)
    assert collected.total.words.tolist() == [sum(column) % 2**32 for column in zip(*vectors, strict=True)]


def test_what_a_site_sends_says_that_nothing_hides_it() -> None:
    sent = InsecurePlainSum().protect(vector([1, 2, 3, 4]), OFFER)

    assert sent.protection == "insecure_plain_sum"
    assert (sent.run, sent.round, sent.attempt, sent.ring) == ("demo", 3, 1, RING.digest)
    assert sent.words.tolist() == [1, 2, 3, 4]


def test_no_sum_is_given_of_fewer_sites_than_the_least() -> None:
    answers = {name: seal(InsecurePlainSum().protect(vector([1] * 4), OFFER)) for name in ("a", "c")}
    answers["b"] = seal(Failure(error="DataError", sentence="The site's data do not fit the plan."))

    collected = collect(answers, ["d", "c", "b", "a"])

    assert collected.total is None
    assert collected.present == ("a", "c")
    assert dict(collected.missing) == {"b": "DataError", "d": "no answer"}
    assert collect(answers, ["d", "c", "b", "a"], least=2).total is not None


def test_the_contributions_themselves_are_left_as_they_were() -> None:
    answers = {name: seal(InsecurePlainSum().protect(vector([7] * 4), OFFER)) for name in "abc"}

    collect(answers, ["a", "b", "c"])

    for envelope in answers.values():
        message = open_envelope(envelope)
        assert isinstance(message, Contribution)
        assert message.words.tolist() == [7] * 4


def test_an_answer_is_let_go_before_the_next_but_one_is_made() -> None:
    alive: list[int] = []

    class Fresh:
        def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
            made: list[weakref.ref[np.ndarray[tuple[int], np.dtype[np.uint32]]]] = []
            for site in messages:
                alive.append(sum(words() is not None for words in made))
                fresh = vector([1, 2, 3, 4])
                made.append(weakref.ref(fresh.words))
                answer = seal(InsecurePlainSum().protect(fresh, OFFER))
                del fresh
                yield site, answer
                del answer

    collected = InsecurePlainSum().collect(Fresh(), OFFER, [f"site-{n}" for n in range(8)], RING, 3, 1.0)

    assert collected.total is not None
    assert alive == [0, 1, 1, 1, 1, 1, 1, 1]


def draws(seed: int, site: str, number: int) -> tuple[bytes, bytes]:
    noise = InsecureSeededNoise(seed, site, number)
    return noise.uniforms(16).tobytes(), noise.gaussian(16).tobytes()


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

    assert len({draws(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("kind", ["gaussian", "uniforms"])
def test_seeded_noise_has_the_distribution_it_names(kind: str) -> None:
    # Kolmogorov-Smirnov at 100,000 draws: the distance exceeds 0.0087 with probability 2·exp(-2·n·D²) < 1e-6.
    noise, count = InsecureSeededNoise(5, "a", 1), 100_000

    drawn = np.sort(noise.gaussian(count) if kind == "gaussian" else noise.uniforms(count))

    places = drawn if kind == "uniforms" else np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in drawn])
    assert drawn.dtype == np.float64
    assert 0 <= places[0] <= places[-1] < 1
    assert np.abs(places - np.arange(0.5, count) / count).max() < 0.0087
