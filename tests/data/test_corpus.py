"""The embedded corpus: no import of what is read, deterministic, splits without repetitions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from hf_hybrid.data import corpus
from hf_hybrid.data.corpus import (
    collect_docstrings,
    embedded_classification_examples,
    embedded_summarization_pairs,
    embedded_text_corpus,
    language_reference,
    name_in_words,
)

SMALL = {"families": ("python", "torch", "numpy"), "max_source_bytes": 800_000}


def test_language_reference():
    pages = language_reference()
    assert len(pages) > 50 and sum(map(len, pages)) > 300_000
    assert pages == language_reference()


def test_documents_and_splits():
    train, validation = (embedded_text_corpus(split, **SMALL) for split in ("train", "validation"))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(embedded_text_corpus(**SMALL))
    assert sum(map(len, train)) > 800_000 and 0.01 < len(validation) / len(train) < 0.15
    small = embedded_text_corpus("train", max_characters=100_000, **SMALL)
    assert set(small) <= set(train) and 100_000 <= sum(map(len, small)) < 400_000


def test_order_does_not_depend_on_the_file_system(monkeypatch):
    import os

    expected = collect_docstrings(("numpy",), 300_000)
    original = os.walk

    def backwards(root):
        for folder, subfolders, names in original(root):
            subfolders.reverse()
            yield folder, subfolders, names[::-1]

    monkeypatch.setattr(corpus.os, "walk", backwards)
    corpus._collect.cache_clear()
    assert collect_docstrings(("numpy",), 300_000) == expected


def test_summarization_pairs():
    rows = embedded_summarization_pairs(**SMALL)
    assert len(rows) > 300
    assert set(rows[0]) == {"name", "document", "summary", "family", "module", "split"}
    modules = {
        split: {(r["family"], r["module"]) for r in rows if r["split"] == split} for split in ("train", "validation")
    }
    assert not modules["train"] & modules["validation"] and modules["validation"]
    assert len({row["document"] for row in rows}) == len(rows)
    assert all(row["summary"] not in row["document"] for row in rows[:200])
    assert [r for r in rows if r["split"] == "validation"] == embedded_summarization_pairs("validation", **SMALL)


def test_names_in_words():
    names = {
        "XMLReader.get_feature2": "xml reader get feature2",
        "__init__": "init",
        "DataFrame._größe": "data frame größe",
        "": "",
    }
    assert {name: name_in_words(name) for name in names} == names


def test_names_of_pairs_are_their_own():
    """A method is named without its class, a special one with it."""
    names = {
        "XMLReader.get_feature": "get_feature",
        "XMLReader.__init__": "XMLReader.__init__",
        "open": "open",
        "": "",
    }
    assert {name: corpus._own_name(name) for name in names} == names


def test_classification_examples():
    train, validation = (
        embedded_classification_examples(split, **SMALL, max_per_class=300) for split in ("train", "validation")
    )
    assert {row["label_name"] for row in train} == {"python", "torch", "numpy"}
    assert {row["label"] for row in train} == {row["label"] for row in validation} == {0, 1, 2}
    assert max(Counter(row["label"] for row in train + validation).values()) <= 300
    assert not {(r["label"], r["module"]) for r in train} & {(r["label"], r["module"]) for r in validation}
    assert not {row["sentence"] for row in train} & {row["sentence"] for row in validation}
    assert not any(re.search(r"\b(torch|numpy|np)\b", row["sentence"], re.IGNORECASE) for row in train + validation)
    sequences = {
        " ".join(words[i : i + 6])
        for r in train
        for words in [r["sentence"].lower().split()]
        for i in range(len(words) - 5)
    }
    for row in validation:
        words = row["sentence"].lower().split()
        own = [" ".join(words[i : i + 6]) for i in range(len(words) - 5)]
        assert sum(item in sequences for item in own) <= 0.7 * len(own)


def test_nothing_is_imported():
    code = (
        "import sys; from hf_hybrid.data.corpus import collect_docstrings; before = set(sys.modules); "
        "print(len(collect_docstrings(('matplotlib', 'scipy'), 200_000)) > 20, {'matplotlib', 'scipy'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "True set()"


def test_libraries_that_are_missing_are_left_out():
    assert collect_docstrings(("no_such_library_here",)) == ()
    assert embedded_summarization_pairs(families=("no_such_library_here",)) == []


@pytest.mark.parametrize(
    "function", [embedded_text_corpus, embedded_summarization_pairs, embedded_classification_examples]
)
def test_unknown_split(function):
    with pytest.raises(ValueError, match="`split` is 'test'"):
        function("test")
