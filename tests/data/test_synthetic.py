"""Synthetic tasks: what they ask can be answered from the text, by a rule, and only where labels are."""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.data.synthetic import IGNORED, SEPARATOR, TASKS, associative_recall, copying, induction, recall_accuracy


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_seed_and_index_alone(task: str) -> None:
    first, again, other = TASKS[task](20), TASKS[task](30), TASKS[task](20, seed=1)
    assert len(first) == 20
    for index in (0, 7, 19):
        for name in ("input_ids", "labels"):
            assert torch.equal(first[index][name], again[index][name])
        assert first[index]["input_ids"].dtype == first[index]["labels"].dtype == torch.int64
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])
    with pytest.raises(IndexError, match="20 examples"):
        first[20]


def test_associative_recall_repeats_what_followed() -> None:
    data = associative_recall(10, length=64, num_pairs=5, vocab_size=32, num_queries=3, distance=20)
    for example in data:
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        pairs = dict(zip(ids[0:10:2], ids[1:10:2]))
        assert len(pairs) == 5
        assert all(2 <= key < 17 and 17 <= value < 32 for key, value in pairs.items())
        asked = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(asked) == 3 and min(asked) > 30
        for place in asked:
            assert labels[place] == ids[place] == pairs[ids[place - 1]]
        assert len({ids[place - 1] for place in asked}) == 3
        rest = set(range(10, 64)) - set(asked) - {place - 1 for place in asked}
        assert {ids[place] for place in rest} == {SEPARATOR}


def test_copying() -> None:
    for example in copying(5, num_tokens=7, gap=3):
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == 18
        assert torch.equal(ids[:7], ids[-7:]) and torch.equal(labels[-7:], ids[-7:])
        assert (labels[:-7] == IGNORED).all() and (ids[7:11] == SEPARATOR).all()


def test_induction() -> None:
    for example in induction(20, length=12):
        ids, labels = example["input_ids"], example["labels"]
        first, second = (ids == SEPARATOR).nonzero().flatten().tolist()
        assert second == 10 and ids[first + 1] == ids[-1] == labels[-1]
        assert (labels[:-1] == IGNORED).all()


def test_accuracy_counts_what_could_be_known() -> None:
    batch = [copying(4, num_tokens=3)[index] for index in range(4)]
    ids, labels = (torch.stack([example[name] for example in batch]) for name in ("input_ids", "labels"))
    perfect = torch.nn.functional.one_hot(torch.cat([ids[:, 1:], ids[:, :1]], dim=1), 32).float()
    assert recall_accuracy(perfect, labels) == 1
    perfect[0, 3] = torch.nn.functional.one_hot(torch.tensor(0), 32).float()  # the first of its tokens
    assert recall_accuracy(perfect, labels) == pytest.approx(11 / 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: associative_recall(1, num_pairs=40), "`vocab_size` 64 has 31 keys.*at least 82"),
        (lambda: associative_recall(1, length=20), "`length` 20 is too short.*at least 32"),
        (lambda: associative_recall(1, num_queries=9), "`num_queries`"),
        (lambda: associative_recall(0), "`size` must be a positive"),
        (lambda: associative_recall(1, distance=-1), "`distance`"),
        (lambda: copying(1, num_tokens=0), "`num_tokens`"),
        (lambda: copying(1, vocab_size=2), "`vocab_size` must be at least 3"),
        (lambda: induction(1, length=3), "`length` must be at least 4"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
