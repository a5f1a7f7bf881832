"""The lm-evaluation-harness, unmodified, on every generative head with minimal pairs made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from factories import Case, all_heads, parametrize
from word_tokenizer import word_tokenizer

from hf_hybrid.data.blimp import GROUP, read_minimal_pairs, write_blimp_tasks
from hf_hybrid.recipes import lm_eval as recipe

GENERATIVE = [case for case in all_heads() if case.auto_name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]
PARADIGMS = {"island-a": 5, "island_b": 3}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "blimp"
    folder.mkdir()
    rows, generator = [], torch.Generator().manual_seed(0)
    for paradigm, count in PARADIGMS.items():
        for number in range(count):
            words = [f"w{index}" for index in torch.randint(3, 40, (6 + number,), generator=generator).tolist()]
            good, bad = " ".join(words), " ".join(words[::-1])
            rows.append(
                {"paradigm": paradigm, "field": "x", "sentence_good": good, "sentence_bad": bad, "pair_id": number}
            )
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def log_probability(case: Case, model: torch.nn.Module, ids: list[int]) -> float:
    """Of a sentence after the end-of-sequence token, or from an encoder-decoder that read that token alone."""
    labels = torch.tensor([ids])
    if case.is_seq2seq:
        logits = model(input_ids=torch.tensor([[1]]), labels=labels).logits
    else:
        logits = model(input_ids=torch.tensor([[1, *ids]])).logits[:, :-1]
    return float(logits.log_softmax(-1).gather(2, labels[..., None]).sum())


def own_scores(case: Case, model: torch.nn.Module, pairs: Path, rows: int) -> dict[str, float]:
    """Accuracy by paradigm, without the harness."""
    scores, tokenizer = {}, word_tokenizer(ends=True)
    for paradigm, several in read_minimal_pairs(str(pairs)).items():
        right = 0
        for row in several[:rows]:
            good, bad = (
                log_probability(case, model, tokenizer(row[name], add_special_tokens=False)["input_ids"])
                for name in ("sentence_good", "sentence_bad")
            )
            assert abs(good - bad) > 1e-3, "this pair would not tell a right score from a wrong one"
            right += good > bad
        scores[f"{GROUP}_{paradigm}"] = right / len(several[:rows])
    scores[GROUP] = sum(scores.values()) / len(scores)
    return scores


def save(case: Case, folder: Path) -> torch.nn.Module:
    model = case.model()
    model.save_pretrained(folder)
    word_tokenizer(ends=True).save_pretrained(folder)
    return model


@parametrize(GENERATIVE)
def test_the_harness_scores_what_the_model_says(case: Case, pairs: Path, tmp_path: Path) -> None:
    harness = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager  # without the thousands of tasks that come with it, which take long to list

    model, folder = save(case, tmp_path / "model"), tmp_path / "model"
    write_blimp_tasks(read_minimal_pairs(str(pairs)), tmp_path / "tasks", rows=4)
    words = recipe.with_backend(["--model_args", f"pretrained={folder}"])
    found = harness.simple_evaluate(
        model="hf",
        model_args=words[1],
        tasks=[GROUP],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )["results"]
    for name, score in own_scores(case, model, pairs, 4).items():
        assert found[name]["acc,none"] == pytest.approx(score), name


def test_the_command_line_of_the_harness(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    case = next(case for case in GENERATIVE if case.is_seq2seq)
    model = save(case, tmp_path / "model")
    results = recipe.main(
        ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}", "--device", "cpu", "--batch_size", "4"]
        + ["--blimp_data", str(pairs), "--blimp_rows", "3", "--output_path", str(tmp_path / "out")]
    )
    for name, score in own_scores(case, model, pairs, 3).items():
        assert results[name]["acc,none"] == pytest.approx(score), name


def test_tasks_are_written_once(pairs: Path, tmp_path: Path) -> None:
    read = read_minimal_pairs([str(pairs / "validation.jsonl")])
    assert {name: len(rows) for name, rows in read.items()} == {"island_a": 5, "island_b": 3}
    names = write_blimp_tasks(read, tmp_path / "tasks", rows=2, context="<extra_id_0>")
    assert names == [f"{GROUP}_island_a", f"{GROUP}_island_b", GROUP]
    assert len((tmp_path / "tasks" / "island_a.jsonl").read_text().splitlines()) == 2
    with pytest.raises(FileExistsError, match="not empty"):
        write_blimp_tasks(read, tmp_path / "tasks")
    with pytest.raises(ValueError, match="must be positive; got 0"):
        write_blimp_tasks(read, tmp_path / "more", rows=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence_good": "a"}, "need the column 'sentence_bad'"),
        ({"sentence_good": "a", "sentence_bad": " "}, "line 1: a sentence is missing, empty"),
    ],
)
def test_bad_pairs(row: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        recipe.main(["--blimp_data", str(tmp_path), "--model", "hf"])


def test_the_backend_is_added_for_encoder_decoders(tmp_path: Path) -> None:
    case = next(case for case in GENERATIVE if case.is_seq2seq)
    case.config().save_pretrained(tmp_path)
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path},dtype=float32", "--tasks", "x"]
    assert recipe.with_backend(words)[3].startswith(f"pretrained={tmp_path},dtype=float32,backend=seq2seq,max_length=")
    named = [*words[:3], f"pretrained={tmp_path},backend=causal,max_length=9"]
    assert recipe.with_backend(named) == named
    assert recipe.with_backend(["--help"]) == ["--help"]


@parametrize(GENERATIVE)
def test_no_text_is_cut_at_a_length_that_is_none(case: Case, tmp_path: Path) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface")
    model = save(case, tmp_path)
    words = recipe.with_backend(["--model_args", f"pretrained={tmp_path}"])
    options = dict(option.split("=") for option in words[1].split(","))
    options["max_length"] = int(options["max_length"])
    longest = harness.HFLM(**options, device="cpu", batch_size=1).max_length
    assert longest == (model.config.max_source_length() or 1 << 30)
    if model.config.max_source_length() is None:
        with pytest.raises(ValueError, match="`--batch_size auto`.*`max_length"):
            recipe.with_backend([*words[:1], f"pretrained={tmp_path}", "--batch_size", "auto:4"])
