"""The laboratory: equal sizes, the mask of the text, entropies by hand, every contender and optimizer, stopped and continued runs."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_hybrid.training.text_tokens import text_mask

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "hidden_size": 16,
    "head_dim": 8,
    "layers": 2,
    "decoder_layers": 1,
    "feed_forward": 32,
    "window": 8,
    "vocab_size": 300,
    "length": 32,
    "batch_size": 2,
}
NAMES = (
    "SPADE",
    "T5",
    "LongT5-local",
    "BART",
    "SPADE-LM",
    "Mega",
    "SeqBoat",
    "BST",
    "LongVQ",
    "Llama",
    "Mistral",
    "Mamba2",
)


@pytest.fixture(scope="module")
def lab():
    pytest.importorskip("sentencepiece")
    pytest.importorskip("datasets")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(
            command=importlib.import_module("learning"),
            **{
                name: importlib.import_module(f"laboratory.{name}")
                for name in ("cases", "contenders", "optimizers", "peer_classifiers", "settings", "text", "training")
            },
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Documents of a small made-up language."""
    chooser = random.Random(0)
    words = ["".join(chooser.choice("aeioubdgklmnrst") for _ in range(chooser.randint(2, 6))) for _ in range(60)]
    data = tmp_path_factory.mktemp("learning") / "data"
    data.mkdir()
    for split, documents in (("train", 30), ("validation", 6)):
        rows = [{"text": " ".join(chooser.choice(words) for _ in range(80))} for _ in range(documents)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.fixture(scope="module")
def text(lab, folder):
    return lab.text.prepare_text([str(folder)], TINY["vocab_size"], folder.parent)


def test_all_contenders_have_equal_parameters(lab):
    for objective in (lab.settings.SPAN_CORRUPTION, lab.settings.NEXT_TOKEN):
        names = [name for name in NAMES if lab.contenders.CONTENDERS[name].objective == objective]
        settings = lab.settings.Settings(hidden_size=64, head_dim=16, feed_forward=192, layers=2, decoder_layers=2)
        widths = lab.contenders.widths(names, settings, 2304)
        counts = [lab.contenders.CONTENDERS[name].count(settings, 2304, widths[name]) for name in names]
        assert len(counts) >= 4 and max(abs(count / counts[0] - 1) for count in counts) <= 0.03
    assert set(NAMES) == set(lab.contenders.CONTENDERS)


def test_contender_that_cannot_be_as_small_is_refused(lab):
    settings = lab.settings.Settings(**{"vocab_size": 64, "hidden_size": 32, "head_dim": 16, "feed_forward": 4})
    with pytest.raises(ValueError, match="more than 3% off .*: change its depth or width"):
        lab.contenders.widths(["BART"], settings.changed({"length": 4096}), 64)


def test_nats_per_byte_count_text_alone(lab):
    labels = np.array([[99, 5, 6, 98, 7, 1, 0, -100]])  # sentinels 99 and 98, `</s>` 1, padding 0
    results = np.stack([np.arange(8.0)[None], np.ones((1, 8))], axis=-1)
    metrics = lab.training.held_out_metrics(results, labels, [99, 98, 97, 1, 0], np.full(100, 2))
    assert metrics["text_loss"] == pytest.approx((1 + 2 + 4) / 3)
    assert metrics["nats_per_byte"] == pytest.approx((1 + 2 + 4) / 6)


def test_hidden_tokens_follow_the_token_before_them(lab, text):
    row = {"input_ids": torch.tensor([4, 99, 5, 98, 1]), "labels": torch.tensor([99, 6, 7, 98, 8, 1])}
    assert lab.text.hidden_tokens(row, [99, 98, 97], [99, 98, 97, 1, 0]) == [(4, 6), (6, 7), (5, 8)]
    ids = torch.tensor([4, 5, 1, 6])
    row = {"input_ids": ids, "labels": ids.clone()}
    assert lab.text.hidden_tokens(row, [], [99, 1, 0]) == [(4, 5), (1, 6)]
    settings = lab.settings.Settings(**TINY)
    _, held_out = lab.text.datasets_of(text, settings, lab.settings.SPAN_CORRUPTION, 5)
    for index in range(5):
        labels = held_out[index]["labels"].numpy()
        pairs = lab.text.hidden_tokens(held_out[index], text.special_ids[:-2], text.special_ids)
        assert [token for _, token in pairs] == labels[text_mask(labels, text.special_ids)].tolist()


def test_entropies_by_hand(lab):
    pairs = [(0, 1), (0, 1), (0, 2), (3, 2)]  # 3 never occurs in the training text
    counts = lab.text.word_counts(pairs, np.array([0, 1, 0, 1, 0, 2]), np.array([1, 2, 4, 8]))
    assert counts.unigram == pytest.approx(math.log(2)) and counts.most_frequent == 0.5
    # Training counts: 0 three times, 1 twice, 2 once, plus one each: (4, 3, 2, 1) / 10. After 0: 1 twice, 2 once.
    after_zero = {1: (2 - 0.75) / 3 + 0.75 * 2 / 3 * 0.3, 2: (1 - 0.75) / 3 + 0.75 * 2 / 3 * 0.2}
    expected = -(2 * math.log(after_zero[1]) + math.log(after_zero[2]) + math.log(0.2)) / 4
    assert counts.bigram == pytest.approx(expected)
    assert counts.tokens == 4 and counts.bytes_per_token == 3


def test_byte_lengths(lab, text):
    lengths = lab.text.byte_lengths(text.tokenizer, text.vocab_size)
    ids = text.tokenizer("aba do é", add_special_tokens=False)["input_ids"]
    assert lengths[ids].sum() == len(" aba do é".encode())  # the tokenizer adds a space in front


def make(lab, text, name: str, folder: Path, **changes):
    settings = lab.settings.Settings(**TINY).changed(changes)
    contender = lab.contenders.CONTENDERS[name]
    return lab.training.make_trainer(
        contender, settings, text, 32, folder=folder, seed=3, steps=2, evaluations=1, rows=4
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_takes_two_steps(lab, text, tmp_path, name):
    settings, contender = lab.settings.Settings(**TINY), lab.contenders.CONTENDERS[name]
    result = lab.training.train_contender(
        contender, settings, text, 32, folder=tmp_path, seed=0, steps=2, evaluations=1, rows=4
    )
    (point,) = result["curve"]
    assert result["steps"] == 2 and not result["diverged"] and result["parameters"] > 1000
    assert point["tokens"] == 2 * 2 * 32 and 0 < point["seconds"] == result["seconds"]
    assert 1 < point["text_loss"] < 15 and 0 <= point["text_accuracy"] <= 1


def test_contenders_see_the_same_tokens_in_the_same_order(lab, text, tmp_path):
    first, second = (
        [batch["input_ids"] for batch, _ in zip(make(lab, text, name, tmp_path).get_train_dataloader(), range(5))]
        for name in ("SPADE", "BART")
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second))
    assert not torch.equal(first[0], first[1])


def test_loss_of_text_is_that_of_the_model(lab, text, tmp_path):
    """For both objectives, against the loss that the model itself computes."""
    for name in ("SPADE", "Llama"):
        trainer = make(lab, text, name, tmp_path)
        metrics = trainer.evaluate()
        # Every input has the same number of labels, so the loss of `Trainer` is the mean over all labels.
        assert metrics["eval_all_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [*(pytest.param(name, marks=pytest.mark.wide) for name in ("adamw", "muon")), "adafactor", "rms_adamw", "lion"],
)
def test_every_optimizer_lowers_the_loss(lab, text, tmp_path, optimizer):
    changes = {"optimizer": optimizer, "learning_rate": 1e-3 if optimizer == "lion" else 1e-2}
    changes |= {"matrix_learning_rate": 1e-2} if optimizer == "muon" else {}
    trainer = make(lab, text, "SPADE", tmp_path, **changes)
    trainer.args.max_steps = 8
    before = trainer.evaluate()["eval_text_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_text_loss"] < before
    assert type(trainer.optimizer.optimizer).__name__.lower().replace("adamw", "") in optimizer.replace("_adamw", "")


def test_batches_grow(lab, text, tmp_path):
    changes = {**TINY, "batch_growth": 4}
    settings, contender = lab.settings.Settings(**changes), lab.contenders.CONTENDERS["SPADE"]
    assert settings.batch_sizes(7) == [2, 2, 2, 4, 4, 8, 8]
    batches = list(lab.training.GrowingBatches(10, [2, 4, 8], seed=0))
    assert [len(batch) for batch in batches] == [2, 4, 8] and sorted(sum(batches, [])[:10]) == list(range(10))
    result = lab.training.train_contender(
        contender, settings, text, 32, folder=tmp_path, seed=0, steps=3, evaluations=1, rows=4
    )
    assert result["steps"] == 3 and result["curve"][-1]["tokens"] == (2 + 4 + 8) * 32


def batches_of(lab, text, tmp_path, **changes):
    loader = make(lab, text, "SPADE", tmp_path, **changes).get_train_dataloader()
    return [batch for batch, _ in zip(loader, range(8))]


def test_every_batch_has_one_noise_of_the_mixture(lab, text, tmp_path):
    mixture = ((0.15, 3.0), (0.3, 3.0), (0.5, 8.0))
    alone = [
        batches_of(lab, text, tmp_path, noise_density=density, mean_span_length=span)[0]["labels"].shape[1]
        for density, span in mixture
    ]
    lengths = {batch["labels"].shape[1] for batch in batches_of(lab, text, tmp_path, noise_mixture=mixture)}
    assert len(lengths) > 1 and lengths <= set(alone) and len(set(alone)) == 3


def test_orders_of_the_text(lab, text, tmp_path):
    settings = lab.settings.Settings(**TINY)
    as_it_stands = batches_of(lab, text, tmp_path, order="as it stands")
    first, _ = lab.text.datasets_of(text, settings, lab.settings.SPAN_CORRUPTION, 4, seed=3)
    assert torch.equal(as_it_stands[0]["input_ids"], first.batch([0, 1])["input_ids"])
    eos = text.tokenizer.eos_token_id
    shuffled = lab.text.shuffled_documents(text.train, eos, seed=3)

    def documents(tokens):
        return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == eos) + 1) if len(part)]

    assert documents(shuffled) != documents(text.train)
    assert sorted(documents(shuffled)) == sorted(documents(text.train))
    with pytest.raises(ValueError, match="`order` must be one of random rows, .*; got 'backwards'"):
        lab.settings.Settings(order="backwards")


def test_lines_that_occurred_before_are_left_out(lab, folder, text, tmp_path):
    line = "a line of more than forty characters, as they come"
    assert lab.text.without_repeated_lines([f"{line}\nshort\n  {line}", f"short\n{line}\nnew"]) == [
        f"{line}\nshort",
        "short\nnew",
    ]
    unique = lab.text.prepare_text([str(folder)], TINY["vocab_size"], folder.parent, deduplicated=True)
    assert np.array_equal(unique.train, text.train)  # no two documents are the same here
    assert np.array_equal(unique.held_out, text.held_out) and unique.vocab_size == text.vocab_size


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_rounded_and_parameters_are_not(lab, text, tmp_path, optimizer):
    changes = {"matrix_learning_rate": 1e-2} if optimizer == "muon" else {}
    trainer = make(lab, text, "SPADE", tmp_path, optimizer=optimizer, rounded_moments=True, **changes)
    trainer.train()
    kept = [
        value
        for state in trainer.optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    ]
    assert len(kept) > 10 and all(torch.equal(value, value.bfloat16().float()) for value in kept)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trainer.model.parameters())


def test_steps_of_lion_and_scaled_adamw(lab):
    def step(optimizer_class, **options):
        parameter = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        parameter.grad = torch.tensor([0.5, -2.0])
        optimizer_class([{"params": [parameter], "lr": 0.1, "weight_decay": 0.01}], lr=1.0, **options).step()
        return parameter.detach()

    decayed = torch.tensor([3.0, -4.0]) * (1 - 0.1 * 0.01)
    torch.testing.assert_close(step(lab.optimizers.Lion), decayed - torch.tensor([0.1, -0.1]))
    rms = (25 / 2) ** 0.5  # the first step of Adam has the size of the learning rate
    torch.testing.assert_close(step(lab.optimizers.RmsAdamW), decayed - rms * torch.tensor([0.1, -0.1]))


def test_stopped_run_continues_to_the_same_curve(lab, text, tmp_path, monkeypatch):
    settings, contender = lab.settings.Settings(**TINY), lab.contenders.CONTENDERS["SPADE"]

    def run(folder: Path):
        return lab.training.train_contender(
            contender, settings, text, 32, folder=folder, seed=1, steps=4, evaluations=2, rows=4
        )

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        end = lab.training.ProcessorClock.on_step_end

        def stop(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt
            end(self, args, state, control, **kwargs)

        patch.setattr(lab.training.ProcessorClock, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    continued = run(tmp_path / "stopped")
    assert [point["text_loss"] for point in continued["curve"]] == [point["text_loss"] for point in whole["curve"]]
    assert continued["curve"][0]["seconds"] < continued["curve"][1]["seconds"] == continued["seconds"]


def test_command_writes_a_table_and_curves_and_keeps_finished_runs(lab, folder, text, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    variant = lab.cases.Variant
    case = lab.cases.Case(
        "tiny", "which?", (variant("one", "SPADE"), variant("two", "SPADE", {"learning_rate": 1e-2})), TINY
    )
    monkeypatch.setitem(lab.cases.CASES, "tiny", case)
    options = ["--data", str(folder), "--case", "tiny", "--rows", "4", "--evaluations", "1", "--out", str(tmp_path)]
    assert lab.command.main([*options, "--seconds", "0.3"]) == 0
    report = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert [run["variant"] for run in report["runs"]] == ["one", "two"] and report["machine"]["cores"] >= 1
    assert report["runs"][0]["steps"] >= 2 and (tmp_path / "tiny" / "curves.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "| one | " in shown and "unigram entropy" in shown
    with monkeypatch.context() as patch:
        patch.setattr(lab.command, "train_contender", None)  # nothing is left to train
        assert lab.command.main([*options, "--seconds", "0.3"]) == 0
    with pytest.raises(SystemExit, match="other options: choose another --out"):
        lab.command.main([*options, "--steps", "5"])


def test_wrong_words_are_refused(lab, tmp_path, capsys):
    assert lab.command.main(["--list"]) == 0 and "optimizers" in capsys.readouterr().out
    for case in lab.cases.CASES.values():
        for variant in case.variants:
            lab.settings.Settings().changed({**case.changes, **variant.changes})
    with pytest.raises(SystemExit, match="nothing; known: optimizers"):
        lab.command.main(["--case", "nothing"])
    chosen = lab.command.select(
        lab.cases.CASES["optimizers"], ["Lion", "AdamW 3e-3"]
    )  # the second is a name, not a part
    assert [variant.name for variant in chosen] == ["AdamW 3e-3", "Lion 3e-4", "Lion 1e-3"]
    with pytest.raises(SystemExit, match="no variant of 'compile'"):
        lab.command.main(["--case", "compile", "--only", "nothing"])
    with pytest.raises(SystemExit, match="--set layers: the variant 'width 128, 6 \\+ 2' has a value of its own"):
        lab.command.main(["--case", "shapes", "--set", "layers=2", "--out", str(tmp_path / "runs")])
    with pytest.raises(ValueError, match="There is no setting 'widht'; known are"):
        lab.settings.Settings().changed({"widht": 1})
    with pytest.raises(ValueError, match="`matrix_learning_rate` is the learning rate of the matrices"):
        lab.settings.Settings(optimizer="muon")


@pytest.mark.parametrize("name", ["T5", "LongT5-local"])
def test_peers_classify_with_the_heads_of_spade(lab, name, tmp_path):
    """The folder opens as a classifier that has the weights of the encoder and does not look at padding."""
    torch.manual_seed(0)
    settings = lab.settings.Settings().changed(TINY)
    peer = lab.contenders.CONTENDERS[name].build(settings, 50, 32)
    peer.save_pretrained(tmp_path / "peer")
    folder = lab.peer_classifiers.as_classifier(tmp_path / "peer", tmp_path / "classifier")
    texts = {"input_ids": torch.randint(3, 50, (2, 20)), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    longer = {key: torch.nn.functional.pad(value, (0, 7)) for key, value in texts.items()}
    for dual_encoder in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dual_encoder=dual_encoder
        ).eval()
        assert torch.equal(model.shared.weight, peer.get_input_embeddings().weight)
        assert all(parameter.isfinite().all() for parameter in model.classifier.parameters())
        second = {f"pair_{key}": value.flip(0) for key, value in texts.items()} if dual_encoder else {}
        wanted = model(**texts, **second, labels=torch.tensor([0.5, 2.0]))
        torch.testing.assert_close(model(**longer, **second).logits, wanted.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wanted.loss, (wanted.logits[:, 0] - torch.tensor([0.5, 2.0])).square().mean())
    (tmp_path / "peer" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'; known are t5, longt5"):
        lab.peer_classifiers.as_classifier(tmp_path / "peer", tmp_path / "other")
