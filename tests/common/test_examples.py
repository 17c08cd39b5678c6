"""Tokenised rows: subsets, unions and batches."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, strategies

from confide.common.examples import IGNORED, Examples, Ints, union

PAD = 9


def examples(
    texts: list[list[int]], persons: list[int], labels: list[int], second: list[int] | None = None
) -> Examples:
    lengths = [len(text) for text in texts]
    return Examples(
        tokens=[np.array(list(itertools.chain.from_iterable(texts)), np.int32)],
        store=np.zeros(len(texts), np.int64),
        starts=np.array([sum(lengths[:row]) for row in range(len(texts))], np.int64),
        lengths=np.array(lengths, np.int64),
        second=np.array(lengths if second is None else second, np.int64),
        labels=np.array(labels, np.int64),
        persons=np.array(persons, np.int64),
        pad_token=PAD,
    )


def three_rows() -> Examples:
    return examples([[1, 2, 3], [4], [5, 6]], persons=[0, 1, 0], labels=[1, 0, 2], second=[2, 1, 1])


def padded(rows: Examples, chosen: Ints) -> tuple[Ints, Ints, Ints]:
    """Return a batch's input_ids, attention_mask and token_type_ids."""
    batch = rows.batch(chosen)
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.token_type_ids is not None
    return batch.input_ids, batch.attention_mask, batch.token_type_ids


def tagged_rows() -> Examples:
    """Return three_rows with a target at each token, the first of each row ignored."""
    rows = three_rows()
    targets = (rows.tokens[0] * 10).astype(np.int32)
    targets[rows.starts] = IGNORED
    return dataclasses.replace(rows, targets=[targets], labels=np.zeros(3, np.int64))


def images(count: int, first: int = 0) -> Examples:
    """Return images of 1 × 2 × 3 that hold the numbers from `first` on, each of a person of its own."""
    rows = np.arange(count)
    return Examples(
        tokens=[np.arange(first, first + 6 * count).astype(np.uint8)],
        store=np.zeros(count, np.int64),
        starts=6 * rows,
        lengths=np.full(count, 6),
        second=np.full(count, 6),
        labels=rows % 2,
        persons=rows,
        pad_token=0,
        image=(1, 2, 3),
    )


def texts_of(rows: Examples) -> list[list[int]]:
    return [
        rows.tokens[store][start : start + length].tolist()
        for store, start, length in zip(rows.store, rows.starts, rows.lengths, strict=True)
    ]


MADE = strategies.lists(
    strategies.tuples(strategies.lists(strategies.integers(0, 99), min_size=1, max_size=5), strategies.integers(0, 3)),
    min_size=1,
    max_size=8,
).map(
    lambda rows: examples(
        [text for text, _ in rows],
        np.unique([person for _, person in rows], return_inverse=True)[1].tolist(),
        [len(text) for text, _ in rows],
    )
)


def test_a_batch_is_padded_to_its_longest_row_with_the_pad_token() -> None:
    batch = three_rows().batch(np.array([1, 2]))
    input_ids, mask, types = padded(three_rows(), np.array([1, 2]))

    assert input_ids.tolist() == [[4, PAD], [5, 6]]
    assert mask.tolist() == [[1, 0], [1, 1]]
    assert batch.labels.tolist() == [0, 2]
    assert {array.dtype for array in (input_ids, mask, types)} == {np.dtype(np.int64)}
    assert batch.targets is None
    assert batch.pixels is None


def test_token_types_are_one_from_the_second_text_on_and_zero_on_padding() -> None:
    _, _, types = padded(three_rows(), np.array([0, 1, 2]))

    assert types.tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_a_batch_may_repeat_and_reorder_rows() -> None:
    input_ids, _, _ = padded(three_rows(), np.array([2, 0, 2]))

    assert input_ids.tolist() == [[5, 6, PAD], [1, 2, 3], [5, 6, PAD]]


@given(MADE, strategies.data())
def test_a_batch_holds_the_texts_of_its_rows(rows: Examples, data: strategies.DataObject) -> None:
    chosen = np.array(data.draw(strategies.lists(strategies.integers(0, len(rows) - 1), min_size=1, max_size=6)))

    input_ids, mask, _ = padded(rows, chosen)

    texts = texts_of(rows)
    for line, row in enumerate(chosen):
        assert input_ids[line][mask[line] == 1].tolist() == texts[row]
        assert (input_ids[line][mask[line] == 0] == PAD).all()
    assert mask.sum(axis=1).max() == input_ids.shape[1]


def test_targets_stand_at_their_tokens_and_padding_is_ignored() -> None:
    targets = tagged_rows().batch(np.array([2, 0])).targets

    assert targets is not None
    assert targets.tolist() == [[IGNORED, 60, IGNORED], [IGNORED, 20, 30]]
    assert targets.dtype == np.int64


def test_what_a_batch_holds_of_a_row_depends_on_that_row_only() -> None:
    rows = tagged_rows()

    alone, together = rows.batch(np.array([2])), rows.batch(np.array([1, 0, 2]))

    for name in ("input_ids", "attention_mask", "token_type_ids", "targets"):
        assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[2, :2])


def test_answers_that_are_numbers_stay_so_in_batches_subsets_and_unions() -> None:
    rows = dataclasses.replace(three_rows(), labels=np.array([0.5, -1.25, 3], np.float32))

    joined = union([rows, rows.subset(np.array([1]))])

    assert joined.batch(np.array([3, 0])).labels.tolist() == [-1.25, 0.5]
    assert joined.labels.dtype == np.float32


def test_a_batch_of_images_holds_their_pixels_and_no_tokens() -> None:
    batch = union([images(2), images(1, first=50)]).batch(np.array([2, 0]))

    assert batch.pixels is not None
    assert batch.pixels.tolist() == [[[[50, 51, 52], [53, 54, 55]]], [[[0, 1, 2], [3, 4, 5]]]]
    assert batch.pixels.dtype == np.uint8
    assert batch.labels.tolist() == [0, 0]
    assert batch.input_ids is batch.attention_mask is batch.token_type_ids is batch.targets is None


def test_a_subset_keeps_the_order_asked_for_and_numbers_persons_anew() -> None:
    rows = examples([[1], [2], [3], [4]], persons=[0, 1, 2, 1], labels=[0, 1, 2, 3])

    part = rows.subset(np.array([3, 2, 1]))

    assert texts_of(part) == [[4], [3], [2]]
    assert part.labels.tolist() == [3, 2, 1]
    assert part.persons.tolist() == [0, 1, 0]
    assert part.person_count == 2
    assert rows.person_count == 3


@given(MADE, strategies.data())
def test_a_subset_keeps_who_shares_a_person_and_numbers_them_from_zero(
    rows: Examples, data: strategies.DataObject
) -> None:
    chosen = np.array(data.draw(strategies.lists(strategies.integers(0, len(rows) - 1), max_size=8)), np.int64)

    part = rows.subset(chosen)

    before = rows.persons[chosen]
    assert np.array_equal(before[:, None] == before, part.persons[:, None] == part.persons)
    assert sorted(set(part.persons.tolist())) == list(range(part.person_count))
    assert texts_of(part) == [texts_of(rows)[row] for row in chosen]


def test_an_empty_subset_has_no_persons() -> None:
    part = three_rows().subset(np.array([], np.int64))

    assert len(part) == 0
    assert part.person_count == 0


@given(strategies.lists(MADE, min_size=1, max_size=4))
def test_a_union_holds_all_rows_in_order_and_keeps_persons_of_different_parts_apart(parts: list[Examples]) -> None:
    joined = union(parts)

    assert texts_of(joined) == [text for part in parts for text in texts_of(part)]
    assert joined.labels.tolist() == [label for part in parts for label in part.labels]
    assert joined.person_count == sum(part.person_count for part in parts)
    places = np.split(joined.persons, np.cumsum([len(part) for part in parts])[:-1])
    for part, persons in zip(parts, places, strict=True):
        assert np.array_equal(part.persons[:, None] == part.persons, persons[:, None] == persons)
    for one, other in itertools.combinations(places, 2):
        assert not set(one.tolist()) & set(other.tolist())


def test_a_union_of_unions_and_subsets_finds_its_tokens() -> None:
    first, second = three_rows(), examples([[7, 7]], persons=[0], labels=[1])

    joined = union([union([first, second]), second.subset(np.array([0])), first.subset(np.array([1]))])

    assert texts_of(joined) == [[1, 2, 3], [4], [5, 6], [7, 7], [7, 7], [4]]
    assert padded(joined, np.array([3, 5]))[0].tolist() == [[7, 7], [4, PAD]]


def test_a_union_finds_the_targets_of_its_parts() -> None:
    rows = tagged_rows()

    joined = union([rows.subset(np.array([1])), union([rows, rows.subset(np.array([2]))])])

    targets = joined.batch(np.array([4, 1])).targets
    assert targets is not None
    assert targets.tolist() == [[IGNORED, 60, IGNORED], [IGNORED, 20, 30]]


@pytest.mark.parametrize("other", [tagged_rows(), images(1)])
def test_examples_of_different_kinds_cannot_be_joined(other: Examples) -> None:
    with pytest.raises(ValueError, match="Read all of them with one plan"):
        union([three_rows(), other])


def test_a_union_copies_no_text() -> None:
    rows = three_rows()

    joined = union([rows, rows.subset(np.array([0]))])

    assert all(np.shares_memory(store, rows.tokens[0]) for store in joined.tokens)


@pytest.mark.parametrize("rows", [three_rows(), union([three_rows(), three_rows()])])
def test_what_is_shown_of_examples_is_their_number_only(rows: Examples) -> None:
    assert repr(rows) == f"<Examples: {len(rows)} rows of {rows.person_count} persons>"
