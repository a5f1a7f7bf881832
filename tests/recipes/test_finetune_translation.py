"""Translation, end to end on toy rows: both forms of the data, learning, scores, bad input."""

from __future__ import annotations

import json

import pytest
import sacrebleu
from transformers import AutoModelForSeq2SeqLM

from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import evaluate
from hf_hybrid.recipes.finetune_translation import main, translation_scores

PAIRS = [("the list is sorted now", "die list of keys is there"), ("a dictionary", "the value of a key is not none")]
TINY = {
    "spade": "hidden_size=16,head_dim=8,intermediate_size=32,num_attention_heads=2,num_hidden_layers=1,decoder_layers=1,window_size=9,ssm_state_size=4,"
    "max_target_positions=64",
    "mega": "hidden_size=16,num_hidden_layers=1,intermediate_size=16,nffn_hidden_size=16,shared_representation_size=8",
}


def write_split(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def data(tmp_path):
    rows = [{"translation": {"en": source, "de": target}} for source, target in PAIRS * 4]
    write_split(tmp_path / "data", "train", rows)
    write_split(tmp_path / "data", "validation", rows[:3])
    return tmp_path / "data"


@pytest.fixture
def translating(options, checkpoint, data) -> dict:
    return {
        **options,
        "model_name_or_path": str(checkpoint),
        "data": [str(data)],
        "source_lang": "en",
        "target_lang": "de",
        "max_source_length": 24,
        # More than a target has letters: how many tokens it has depends on the vocabulary (see `documents`).
        "max_target_length": 40,
        "save_strategy": "no",
        "eval_strategy": "no",
    }


def test_pairs_are_learnt_and_scored(translating, tmp_path):
    changes = {"max_steps": 80, "learning_rate": 2e-2, "per_device_train_batch_size": 8}
    metrics = main({**translating, **changes, "generation_num_beams": 2})
    assert metrics["eval_sacrebleu"] == pytest.approx(100.0) and metrics["eval_chrf"] == pytest.approx(100.0)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows == [{"prediction": target, "references": [target]} for _, target in (PAIRS * 2)[:3]]
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == [] and "pipeline_tag: translation" in card and "en to de" in card
    again = {"kind": "translation", "model_name_or_path": str(run), "output_dir": str(tmp_path / "eval")}
    unused = ("output_dir", "model_name_or_path", "max_steps")
    options = {name: value for name, value in translating.items() if name not in unused}
    assert evaluate.main({**options, **again})["eval_chrf"] == pytest.approx(100.0)


@pytest.mark.parametrize("arch", TINY)
def test_a_new_model_on_two_columns(translating, tmp_path, tokenizer_folder, arch):
    rows = [{"source": "a b", "target": "c d", "id": 1}] * 4
    for split in ("train", "validation"):
        write_split(tmp_path / "columns", split, rows)
    changes = {
        "data": [str(tmp_path / "columns")],
        "source_lang": "target",
        "target_lang": "source",
        "model_name_or_path": None,
        "tokenizer": str(tokenizer_folder),
        "arch": arch,
        "config_overrides": TINY[arch],
    }
    metrics = main({**translating, **changes, "max_steps": 2, "source_prefix": "to English: "})
    assert metrics["eval_samples"] == 4 and metrics["from_scratch"] is True
    assert json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])["references"] == ["a b"]
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").config
    assert config.model_type == arch and config.is_encoder_decoder and config.hidden_size == 16


def test_scores_are_those_of_sacrebleu():
    predictions, references = ["the cat sat on the mat", "b c d e f"], ["a cat sat on a mat", "b c d e"]
    scores = translation_scores(predictions, [[text] for text in references])
    assert scores == {
        "sacrebleu": pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score),
        "chrf": pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_lang": None}, "`source_lang` and `target_lang` must name two of en, de"),
        ({"target_lang": "en"}, "got 'en' and 'en'"),
        ({"target_lang": "fr"}, "no column 'fr'"),
        ({"max_target_length": 65}, "accepts 64"),
        ({"data": None}, "`data` is required"),
        ({"arch": "spade"}, "drop either them or `model_name_or_path`"),
    ],
)
def test_bad_options_are_explained(translating, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main({**translating, **changes})
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_missing_texts_are_named(translating, data):
    write_split(data, "train", [{"translation": {"en": "a", "de": None}}, {"translation": {"en": "a", "de": "b"}}])
    with pytest.raises(ValueError, match="line 1 has no text in the column 'de'"):
        main(translating)
