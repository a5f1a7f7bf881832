"""Our metrics against the libraries that compute them, through the `evaluate` interface, without a network."""

from __future__ import annotations

import math
import socket

import evaluate
import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics as sklearn_metrics

from hf_hybrid.metrics import GLUE_TASKS, ROUGE_TYPES, bits_per_byte, load, metric_names, perplexity

rng = np.random.default_rng(0)
CLASSES = rng.integers(0, 2, (2, 50))
NUMBERS = rng.normal(size=(2, 50))
PREDICTIONS = ["the cat sat on the mat", "a dog barks. it is loud", "nothing", "one two three four five"]
REFERENCES = [
    ["a cat sat on a mat", "the cat is on the mat"],
    ["the dog barks loudly"],
    ["something else", "nothing"],
    ["one two three five four"],
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", sklearn_metrics.accuracy_score(CLASSES[1], CLASSES[0])),
        ("f1", sklearn_metrics.f1_score(CLASSES[1], CLASSES[0])),
        ("matthews_correlation", sklearn_metrics.matthews_corrcoef(CLASSES[1], CLASSES[0])),
    ],
)
def test_class_metrics(name, expected):
    assert load(name).compute(predictions=CLASSES[0], references=CLASSES[1]) == {name: pytest.approx(expected)}


def test_macro_f1():
    predictions, references = rng.integers(0, 3, (2, 40))
    expected = sklearn_metrics.f1_score(references, predictions, average="macro")
    actual = load("f1").compute(predictions=predictions, references=references, average="macro")
    assert actual["f1"] == pytest.approx(expected)


@pytest.mark.parametrize(("name", "function"), [("pearson", stats.pearsonr), ("spearmanr", stats.spearmanr)])
def test_correlations(name, function):
    expected = function(NUMBERS[0], NUMBERS[1])[0]
    assert load(name).compute(predictions=NUMBERS[0], references=NUMBERS[1])[name] == pytest.approx(expected)
    assert load(name).compute(predictions=[1.0, 1.0], references=[0.0, 1.0]) == {name: 0.0}


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_glue_tasks_have_their_own_metrics(task):
    expected = {
        "cola": {"matthews_correlation"},
        "stsb": {"pearson", "spearmanr"},
        "mrpc": {"accuracy", "f1"},
        "qqp": {"accuracy", "f1"},
    }.get(task, {"accuracy"})
    values = NUMBERS if task == "stsb" else CLASSES
    result = load("glue", task).compute(predictions=values[0], references=values[1])
    assert result.keys() == expected
    for name, value in result.items():
        assert value == load(name).compute(predictions=values[0], references=values[1])[name]


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_with_one_reference(stemmer):
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=stemmer)
    references = [row[0] for row in REFERENCES]
    result = load("rouge").compute(predictions=PREDICTIONS, references=references, use_stemmer=stemmer)
    for name in ROUGE_TYPES:
        scores = [scorer.score(target, text)[name].fmeasure for target, text in zip(references, PREDICTIONS)]
        assert result[name] == pytest.approx(np.mean(scores))


def test_rouge_takes_the_best_reference():
    scorer = RougeScorer(list(ROUGE_TYPES))
    result = load("rouge").compute(predictions=PREDICTIONS, references=REFERENCES, use_aggregator=False)
    for name in ROUGE_TYPES:
        for text, targets, value in zip(PREDICTIONS, REFERENCES, result[name]):
            assert value == pytest.approx(max(scorer.score(target, text)[name].fmeasure for target in targets))


def test_rouge_lsum_on_sentences():
    text, target = "It rains. The sun shines.", "The sun shines. It rains."
    metric = load("rouge")
    split = metric.compute(predictions=[text], references=[target], split_sentences=True)
    whole = metric.compute(predictions=[text], references=[target])
    assert split["rougeLsum"] == pytest.approx(1.0) and whole["rougeLsum"] < 1.0
    assert split["rouge1"] == whole["rouge1"]


def test_bleu_and_chrf():
    streams = [["a cat sat on a mat", "b c d e"], ["the cat is on the mat", "b c d f"]]
    predictions = ["the cat sat on the mat", "b c d e f"]
    rows = [list(row) for row in zip(*streams)]
    assert load("sacrebleu").compute(predictions=predictions, references=rows)["score"] == pytest.approx(
        sacrebleu.corpus_bleu(predictions, streams).score
    )
    assert load("chrf").compute(predictions=predictions, references=rows, word_order=2)["score"] == pytest.approx(
        sacrebleu.corpus_chrf(predictions, streams, word_order=2).score
    )


def test_rows_may_have_different_numbers_of_references():
    assert load("sacrebleu").compute(predictions=PREDICTIONS, references=REFERENCES)["score"] > 0
    with pytest.raises(ValueError, match="at least one reference"):
        load("rouge").compute(predictions=["a", "b"], references=[["a"], []])


def test_metrics_combine():
    combined = evaluate.combine([load("accuracy"), load("f1"), load("matthews_correlation")])
    result = combined.compute(predictions=CLASSES[0].tolist(), references=CLASSES[1].tolist())
    assert result.keys() == {"accuracy", "f1", "matthews_correlation"}
    assert result["accuracy"] == load("accuracy").compute(predictions=CLASSES[0], references=CLASSES[1])["accuracy"]


def test_batches_add_up():
    metric = load("accuracy")
    for start in range(0, 50, 20):
        metric.add_batch(predictions=CLASSES[0][start : start + 20], references=CLASSES[1][start : start + 20])
    assert metric.compute() == load("accuracy").compute(predictions=CLASSES[0], references=CLASSES[1])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="accepted are accuracy"):
        load("acuracy")
    with pytest.raises(ValueError, match="cola.*got 'snli'"):
        load("glue", "snli")
    assert set(metric_names()) >= {"rouge", "sacrebleu", "glue"}


@given(st.floats(0, 20), st.integers(1, 1000), st.integers(1, 1000))
def test_code_length(loss, tokens, size):
    # The cost of the text in bits is the same number, per byte or as log2 of the perplexity per token.
    assert bits_per_byte(loss, tokens, size) * size == pytest.approx(math.log2(perplexity(loss)) * tokens, abs=1e-9)


def test_perplexity_overflows_to_infinity():
    assert perplexity(1e6) == math.inf
