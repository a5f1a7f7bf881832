"""What all heads promise to the tools that call them."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from factories import Case, all_heads, all_variants, main_output, parametrize, random_ids
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.modeling.inputs import pool_tokens
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

EXACT = {"rtol": 1e-5, "atol": 1e-5}
EVERY_HEAD = all_heads() + all_heads(other_inputs=True)
LANGUAGE_MODELS = [case for case in all_heads() if case.auto_name == "AutoModelForCausalLM"]
READS_TEXT = [case for case in EVERY_HEAD if "input_ids" in case.inputs() and not case.is_seq2seq]
LABELS_INPUTS = [
    case for case in EVERY_HEAD if case.auto_name.endswith(("Classification", "QuestionAnswering", "MultipleChoice"))
]


def names_of(case: Case) -> set[str]:
    return set(inspect.signature(case.model_class.forward).parameters)


class TestTable:
    HEADS = {
        "spade": "Seq2SeqLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice TextEncoding",
        "spade_lm": "CausalLM SequenceClassification TokenClassification QuestionAnswering",
        "mega": "CausalLM Seq2SeqLM MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice "
        "ImageClassification AudioClassification",
        "seqboat": "CausalLM MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice "
        "ImageClassification AudioClassification",
        "bst": "CausalLM SequenceClassification TokenClassification QuestionAnswering",
        "longvq": "CausalLM MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice "
        "ImageClassification AudioClassification",
    }

    def test_it_is_complete(self) -> None:
        found = {
            architecture.model_type: set(architecture.heads)
            for architecture in ARCHITECTURES
            if architecture.model_type in self.HEADS
        }
        expected = {
            name: {"AutoModel"} | {f"AutoModelFor{head}" for head in heads.split()}
            for name, heads in self.HEADS.items()
        }
        assert found == expected


class TestSignatures:
    """`Trainer` drops the columns that a forward pass does not name, and evaluates only with all that are named like labels."""

    @parametrize(READS_TEXT)
    def test_positions_are_named(self, case: Case) -> None:
        assert {"input_ids", "attention_mask", "inputs_embeds", "position_ids"} <= names_of(case)

    @parametrize(LABELS_INPUTS)
    def test_use_cache_is_named(self, case: Case) -> None:
        assert "use_cache" in names_of(case)

    @parametrize(EVERY_HEAD)
    def test_labels(self, case: Case) -> None:
        assert set(find_labels(case.model_class)) == set(case.labels(case.inputs()))

    @parametrize(LANGUAGE_MODELS)
    def test_evaluation_with_plain_labels(self, case: Case, tmp_path: Path) -> None:
        """Also of packed documents, whose positions are a column; `shift_labels` are read where a collator makes them."""
        ids = random_ids(2, 8)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]])
        labels = ids.masked_fill(
            positions == 0, -100
        )  # as `DataCollatorWithFlattening` does; `Trainer` counts the others
        rows = {"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions.tolist()}
        model = case.model()
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        trainer = Trainer(model, arguments, eval_dataset=datasets.Dataset.from_dict(rows))
        with torch.no_grad():
            expected = model(ids, labels=labels, position_ids=positions).loss
            whole = model(ids, labels=labels).loss
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
        assert abs(float(expected - whole)) > 1e-4


class TestGeneration:
    @parametrize(LANGUAGE_MODELS)
    def test_no_positions_are_made_up(self, case: Case) -> None:
        """With padding in front they would restart; they mark documents."""
        model, ids = case.model(), random_ids(2, 9)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        seen: list[object] = []
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
        )
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        padded = model.generate(ids, attention_mask=mask, **options)
        assert seen and all(positions is None for positions in seen)
        alone = model.generate(ids[:1, 4:], **options)
        assert padded[0, 9:].tolist() == alone[0, 5:].tolist()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = model.generate(ids, attention_mask=mask, position_ids=positions, **options)
        assert given.tolist() == padded.tolist()


class TestOptions:
    @parametrize(LABELS_INPUTS)
    @torch.no_grad()
    def test_use_cache(self, case: Case) -> None:
        """Trainers pass it to every model (RewardTrainer of TRL: False)."""
        model, inputs = case.model(), case.inputs()
        expected = main_output(model(**inputs))
        for use_cache in (False, True, None):
            outputs = model(**inputs, use_cache=use_cache)
            torch.testing.assert_close(main_output(outputs), expected)
            if use_cache and "past_key_values" not in names_of(case):
                assert "past_key_values" not in outputs

    @parametrize(EVERY_HEAD)
    @torch.no_grad()
    def test_attentions_are_returned_or_their_absence_is_explained(
        self, case: Case, caplog: pytest.LogCaptureFixture
    ) -> None:
        transformers.utils.logging.enable_propagation()
        transformers.utils.logging.get_logger().warning_once.cache_clear()
        try:
            with caplog.at_level(logging.WARNING):
                outputs = case.model()(**case.inputs(), output_attentions=True)
        finally:
            transformers.utils.logging.disable_propagation()
        names = [name for name in type(outputs).__dataclass_fields__ if name.endswith("attentions")]
        if not case.is_seq2seq and "cross_attentions" in names:
            names.remove("cross_attentions")
        is_missing = any(not outputs.get(name) for name in names)
        assert is_missing == ("returns attention weights only" in caplog.text or "no attention" in caplog.text)

    @pytest.mark.parametrize("pooling", ["mean", "first", "last"])
    def test_masks_are_booleans(self, pooling: str) -> None:
        states = torch.randn(2, 5, 3)
        mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
        expected = pool_tokens(states, mask.bool(), pooling)
        for values in (mask * 3, mask * 0.5, -mask):
            torch.testing.assert_close(pool_tokens(states, values, pooling), expected)

    @parametrize(READS_TEXT)
    @torch.no_grad()
    def test_masks_of_heads_are_booleans(self, case: Case) -> None:
        model, inputs = case.model(), case.inputs()
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, ..., 6:] = 0
        expected = main_output(model(**inputs, attention_mask=mask))
        torch.testing.assert_close(main_output(model(**inputs, attention_mask=3 * mask)), expected)


class TestMegaEncoder:
    """Heads on the encoder of an encoder-decoder of Mega."""

    HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]

    @pytest.mark.parametrize("head", HEADS)
    @torch.no_grad()
    def test_is_loaded_from_the_whole_model(self, head: str, tmp_path: Path) -> None:
        whole = Case("mega", "AutoModelForSeq2SeqLM", "default").model()
        whole.save_pretrained(tmp_path / "whole")
        auto_class = getattr(transformers, f"AutoModelFor{head}")
        model, info = auto_class.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(name.startswith("mega.") for name in info["missing_keys"]) or head == "MultipleChoice"
        assert not info["unexpected_keys"]
        ids = random_ids(2, 7)
        torch.testing.assert_close(model.mega(ids).last_hidden_state, whole.encoder(ids).last_hidden_state)
        assert not model.config.is_encoder_decoder
        model.save_pretrained(tmp_path / "again")
        again = auto_class.from_pretrained(tmp_path / "again")
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_own_checkpoints_load_as_before(self, tmp_path: Path) -> None:
        model = Case("mega", "AutoModelForSequenceClassification", "default").model()
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


class TestSpadeEncoder:
    """The encoder alone is a model for every tool that opens checkpoints by `AutoModel`."""

    CASE = Case("spade", "AutoModelForTextEncoding", "default")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tokenizer = byte_tokenizer()
        self.CASE.model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    @torch.no_grad()
    def test_opens_by_auto_model(self, folder: Path) -> None:
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert type(model) is self.CASE.model_class
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids = random_ids(2, 7)
        expected = self.CASE.model_class.from_pretrained(folder)(ids).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, expected)

    def test_the_whole_model_still_does(self, tmp_path: Path) -> None:
        Case("spade", "AutoModelForSeq2SeqLM", "default").model().save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path)
        assert type(model).__name__ == "SpadeModel"
        assert type(AutoModel.from_config(self.CASE.config())).__name__ == "SpadeModel"

    def test_feature_extraction(self, folder: Path) -> None:
        extract = transformers.pipeline("feature-extraction", model=str(folder))
        features = np.array(extract("some text"))
        assert features.shape[0] == 1 and features.shape[2] == 16 and np.isfinite(features).all()


@parametrize([case for case in all_variants("AutoModelForCausalLM") if case.model_type == "mega"])
@torch.no_grad()
def test_attention_weights_with_a_cache(case: Case) -> None:
    """The rows of the new tokens, over the keys in sight: those of one pass."""
    model, ids = case.model(), random_ids(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    chunk = model.config.attention_chunk
    for padding in (None, mask):
        whole = model(ids, attention_mask=padding, output_attentions=True, use_cache=False).attentions
        cache = model(ids[:, :6], attention_mask=None if padding is None else padding[:, :6], use_cache=True)
        cache, seen = cache.past_key_values, 6
        for new in (1, 4, 2):
            part = None if padding is None else padding[:, : seen + new]
            outputs = model(
                ids[:, seen : seen + new], attention_mask=part, past_key_values=cache, output_attentions=True
            )
            for layer, (weights, expected) in enumerate(zip(outputs.attentions, whole)):
                keys = weights.shape[-1]
                assert weights.shape == (2, 1, new, keys) and keys <= seen + new, layer
                for row in range(2):
                    start = 0 if padding is None else int((mask[row] == 0).sum())
                    for place in range(seen, seen + new):
                        found = weights[row, 0, place - seen]
                        if chunk is None:
                            torch.testing.assert_close(found, expected[row, 0, place, :keys], **EXACT)
                            continue
                        block, inner = divmod(place - start, chunk)
                        first = start + block * chunk - (seen + new - keys)  # column of the first key of the chunk
                        assert not found[: max(first, 0)].any() and not found[first + inner + 1 :].any()
                        visible = expected[row, block, inner, : inner + 1]
                        torch.testing.assert_close(found[first : first + inner + 1], visible, **EXACT)
            seen += new
