"""LongVQ beyond the common tests: learning codebooks, their loss, decoding with them, heads for pairs, wrong calls."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from factories import Case, all_heads, all_variants, enable_checkpointing, main_output, parametrize, random_ids

from hf_hybrid.configuration.configuration_longvq import LongVQConfig
from hf_hybrid.modeling.longvq.longvq_heads import (
    LongVQForCausalLM,
    LongVQForMaskedLM,
    LongVQForSequenceClassification,
)

CAUSAL = Case("longvq", "AutoModelForCausalLM", "default")
PAIRS = Case("longvq", "AutoModelForSequenceClassification", "default")
HEADS = [
    case
    for case in all_heads() + all_heads(other_inputs=True)
    if case.model_type == "longvq" and case.auto_name != "AutoModel"
]
LEARNING = {"freeze_codebook": False, "commitment_loss_weight": 0.5}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "quantizer" in name}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def train_step(model: torch.nn.Module, ids: torch.Tensor, **inputs) -> torch.Tensor:
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach()


class TestLoss:
    def test_commitment_in_training_only(self) -> None:
        model, ids = CAUSAL.model(**LEARNING), random_ids(2, 21)
        evaluated = model(ids, labels=ids)
        trained = model.train()(ids, labels=ids)
        assert evaluated.commitment_loss > 0
        torch.testing.assert_close(trained.commitment_loss, evaluated.commitment_loss)
        torch.testing.assert_close(trained.loss, evaluated.loss + 0.5 * evaluated.commitment_loss)
        assert evaluated.codebook_perplexity.shape == (2, 1)
        assert ((evaluated.codebook_perplexity >= 1) & (evaluated.codebook_perplexity <= 6)).all()

    @parametrize([case for case in all_variants("AutoModelForMaskedLM") if case.model_type == "longvq"])
    def test_encoders_too(self, case: Case) -> None:
        model, ids = case.model(**LEARNING), random_ids(2, 9)
        evaluated = model(ids, labels=ids)
        trained = model.train()(ids, labels=ids)
        torch.testing.assert_close(trained.loss, evaluated.loss + 0.5 * evaluated.commitment_loss)

    @pytest.mark.parametrize(
        "head", ["AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification"]
    )
    def test_micro_batches_have_the_loss_of_the_batch(self, head: str) -> None:
        """Padding, few labels, and micro-batches of different sizes change nothing about the weight of the commitment loss."""
        model, ids = Case("longvq", head, "default").model(commitment_loss_weight=0.5), random_ids(4, 10)
        mask = torch.ones(4, 10, dtype=torch.long)
        mask[0, 6:] = 0
        labels = (ids % 2).masked_fill((mask == 0) | (torch.arange(10) % 4 > 1), -100)
        labels[3, 3:] = -100
        shift = 1 if head == "AutoModelForCausalLM" else 0
        items = int((labels[:, shift:] != -100).sum())
        expected, shares = torch.zeros(()), []
        for rows in (slice(0, 1), slice(1, 4)):
            inputs = {"input_ids": ids[rows], "attention_mask": mask[rows], "labels": labels[rows]}
            part = model.train()(**inputs, num_items_in_batch=torch.tensor(items))
            task = model.eval()(**inputs, num_items_in_batch=items).loss
            shares.append(float(((part.loss - task) / (0.5 * part.commitment_loss)).detach()))
            expected = expected + task
        assert sum(shares) == pytest.approx(1, rel=1e-4) and 0 < shares[0] < shares[1]
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        whole = model.train()(**inputs, num_items_in_batch=items)
        torch.testing.assert_close(whole.loss, expected + 0.5 * whole.commitment_loss)
        torch.testing.assert_close(model(**inputs).loss, whole.loss)

    def test_outputs_that_trainer_gathers(self) -> None:
        outputs = CAUSAL.model()(random_ids(2, 5), labels=random_ids(2, 5), use_cache=True)
        ignored = set(CAUSAL.config().keys_to_ignore_at_inference)
        assert set(outputs) - ignored == {"loss", "logits"}
        assert "commitment_loss" in outputs and "commitment_loss" not in CAUSAL.model()(random_ids(2, 5))


class TestLearningCodebooks:
    def test_applied_by_the_next_training_step(self) -> None:
        model, ids = CAUSAL.model(**LEARNING).train(), random_ids(2, 15)
        first = buffers(model)
        train_step(model, ids)
        assert same(buffers(model), first)
        with torch.no_grad():
            model(ids)
        assert same(buffers(model), first), "only training with gradients applies updates"
        train_step(model, ids)
        second = buffers(model)
        assert not same(second, first)
        assert all(value == 1 for name, value in second.items() if name.endswith("num_updates"))
        model.apply_codebook_updates()
        third = buffers(model)
        assert all(value == 2 for name, value in third.items() if name.endswith("num_updates"))
        model.apply_codebook_updates()
        assert same(buffers(model), third)

    @parametrize(HEADS)
    def test_what_is_evaluated_is_what_is_saved(self, case: Case, tmp_path: Path) -> None:
        model = case.model(**LEARNING).train()
        inputs = case.inputs(length=15)
        for _ in range(2):
            model(**inputs, **case.labels(inputs)).loss.backward()
        updates = [quantizer.num_updates.item() for quantizer in model._quantizers()]
        evaluated, kept = main_output(model.eval()(**inputs)), buffers(model)
        assert [quantizer.num_updates.item() for quantizer in model._quantizers()] == [
            number + 1 for number in updates
        ]
        model.save_pretrained(tmp_path)
        loaded = case.model_class.from_pretrained(tmp_path)
        assert same(buffers(loaded), kept) and torch.equal(main_output(loaded(**inputs)), evaluated)

    def test_training_and_evaluation_agree(self) -> None:
        model, ids = CAUSAL.model(**LEARNING).train(), random_ids(2, 29)
        train_step(model, ids)
        model.apply_codebook_updates()
        with torch.no_grad():  # otherwise it would be a training step, whose update the evaluation applies
            trained = model(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, trained, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing(self, use_reentrant: bool) -> None:
        """The same gradients and codebooks after some steps."""
        results, ids = [], random_ids(2, 15)
        for checkpointing in (False, True):
            model = CAUSAL.model(**LEARNING, hidden_dropout=0.1).train()
            if checkpointing:
                enable_checkpointing(model, {"use_reentrant": use_reentrant})
            torch.manual_seed(3)
            losses = [train_step(model, ids) for _ in range(3)]
            model.apply_codebook_updates()
            results.append((losses, buffers(model), {n: p.grad for n, p in model.named_parameters()}))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
        for plain, checkpointed in zip(results[0][1:], results[1][1:]):
            for name, value in plain.items():
                torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-5, msg=name)

    def test_pairs_update_once(self) -> None:
        model = PAIRS.model(**LEARNING, dual_encoder=True).train()
        ids, others = random_ids(2, 9), random_ids(2, 13)
        for number in range(3):
            assert all(v == max(number - 1, 0) for n, v in buffers(model).items() if n.endswith("num_updates"))
            model(ids, pair_input_ids=others, labels=torch.tensor([0, 1])).loss.backward()
        model.apply_codebook_updates()
        count = model.model.layers[0].mixer.quantizer
        assert count.num_updates == 3
        assert model.eval()(ids, pair_input_ids=others).logits.isfinite().all()
        with pytest.raises(ValueError, match="classifies pairs"):
            model(ids)
        with pytest.raises(ValueError, match="3 rows but `input_ids` has 2"):
            model(ids, pair_input_ids=random_ids(3, 4))

    def test_stats_tell_of_collapse(self) -> None:
        model, ids = CAUSAL.model(**LEARNING).train(), random_ids(4, 15)
        train_step(model, ids)
        train_step(model, ids)
        stats = model.codebook_stats()
        assert len(stats) == 2
        for layer, used in zip(stats, model.eval()(ids, output_quantization=True).codebook_perplexity.tolist()):
            assert set(layer) == {"perplexity", "active_fraction", "relative_error", "revived", "num_updates"}
            assert len(layer["perplexity"]) == len(used) == 1
            assert 0 < layer["active_fraction"] <= 1 and 0 <= layer["relative_error"]
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mixer.mx_proj.weight.zero_()
        model(ids)
        for layer in model.codebook_stats():
            assert layer["perplexity"] == [1.0]

    def test_saved_with_what_the_last_step_told(self, tmp_path: Path) -> None:
        model, ids = CAUSAL.model(**LEARNING).train(), random_ids(2, 15)
        train_step(model, ids)
        model.save_pretrained(tmp_path)
        loaded = LongVQForCausalLM.from_pretrained(tmp_path)
        assert same(buffers(loaded), buffers(model))
        assert all(value == 1 for name, value in buffers(loaded).items() if name.endswith("num_updates"))
        low = LongVQForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert same(buffers(low), buffers(model))
        assert {value.dtype for value in buffers(low).values()} == {torch.float32, torch.int64}
        assert low.lm_head.weight.dtype == torch.bfloat16
        again = loaded.train()
        train_step(again, ids)
        train_step(again, ids)
        assert all(value == 2 for name, value in buffers(again).items() if name.endswith("num_updates"))


@parametrize([case for case in all_variants("AutoModelForCausalLM") if case.model_type == "longvq"])
class TestDecoding:
    def test_any_prefill_then_steps(self, case: Case) -> None:
        """In float64, for prefixes shorter and longer than window and chunk."""
        model, ids = case.model().double(), random_ids(2, 19)
        with torch.no_grad():
            expected = model(ids).logits
            for prefix in (1, 2, 3, 5, 11, 18):
                outputs = model(ids[:, :prefix], use_cache=True)
                parts, past = [outputs.logits], outputs.past_key_values
                for position in range(prefix, 19):
                    outputs = model(ids[:, position : position + 1], past_key_values=past, use_cache=True)
                    parts.append(outputs.logits)
                torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)

    def test_causality(self, case: Case) -> None:
        model, ids = case.model().double(), random_ids(2, 19)
        changed = ids.clone()
        changed[:, 11] = (changed[:, 11] + 1) % 30 + 3
        before, after = model(ids).logits, model(changed).logits
        torch.testing.assert_close(before[:, :11], after[:, :11], rtol=1e-12, atol=1e-12)
        assert (before[:, 11:] != after[:, 11:]).any()

    def test_chunks_change_nothing(self, case: Case) -> None:
        ids = random_ids(2, 25)
        expected = case.model().double()(ids).logits
        for chunk_size in (4, 7, 64):
            torch.testing.assert_close(case.model(chunk_size=chunk_size).double()(ids).logits, expected, **EXACT)

    def test_gradients_with_one_chunk_are_those_of_the_definition(self, case: Case) -> None:
        """Only the gradients of keys depend on the chunks: those of values do not."""
        ids = random_ids(2, 25)
        found = []
        for chunk_size in (4, 64):
            model = case.model(chunk_size=chunk_size).double().train()
            train_step(model, ids)
            found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        last = "model.layers.1.mixer."
        for name in (last + "h_proj.weight", last + "v_proj.weight", last + "window_bias"):
            torch.testing.assert_close(found[0][name], found[1][name], **EXACT)
        assert not torch.allclose(found[0][last + "qk_gamma"][1], found[1][last + "qk_gamma"][1])


class TestBadInput:
    def test_state_of_older_codebooks(self) -> None:
        model, ids = CAUSAL.model(**LEARNING), random_ids(2, 6)
        past = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=past)
        train_step(model.train(), ids)
        model.apply_codebook_updates()
        with pytest.raises(ValueError, match="made with other codebooks"):
            model.eval()(ids[:, :1], past_key_values=past)
        past.reset()
        assert model(ids[:, :1], past_key_values=past).logits.isfinite().all()

    def test_foreign_cache(self) -> None:
        model, ids = CAUSAL.model(), random_ids(2, 6)
        other = CAUSAL.model(codebook_size=7)(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="`codebook_size` = 7, but this one has 6"):
            model(ids, past_key_values=other)
        past = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 rows but `past_key_values` holds 2"):
            model(random_ids(3, 1), past_key_values=past)
        encoder = Case("longvq", "AutoModelForMaskedLM", "default").model()
        with pytest.raises(ValueError, match="`past_key_values` need a decoder"):
            encoder(ids, past_key_values=past)

    @pytest.mark.parametrize("is_causal", [True, False])
    def test_rows_that_are_all_padding(self, is_causal: bool) -> None:
        case = CAUSAL if is_causal else Case("longvq", "AutoModelForMaskedLM", "default")
        model, ids = case.model(**LEARNING).train(), random_ids(2, 11)
        mask = torch.ones_like(ids)
        mask[1] = 0
        outputs = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        assert outputs.logits.isfinite().all() and outputs.loss.isfinite()
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        before = buffers(model)
        model.apply_codebook_updates()
        model.zero_grad()
        nothing = model(ids, attention_mask=torch.zeros_like(ids), labels=torch.full_like(ids, -100))
        assert nothing.loss == 0 and nothing.commitment_loss == 0
        nothing.loss.backward()
        assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
        kept = buffers(model)
        model.apply_codebook_updates()
        assert same(buffers(model), kept) and not same(kept, before)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window_size": 10, "chunk_size": 8}, "`chunk_size` must be at least `window_size` - 1 = 9"),
            ({"num_attention_heads": 3}, "`num_attention_heads` must divide `shared_representation_size`"),
            ({"num_attention_heads": 2, "value_size": 25}, "`num_attention_heads` must divide `value_size`"),
            ({"codebook_size": 0}, "`codebook_size` must be at least 1"),
            ({"window_size": 0}, "`window_size` must be at least 1"),
            ({"ssm_type": "s4d", "ssm_state_size": 3}, "even `ssm_state_size`"),
            ({"codebook_decay": 1.0}, "`codebook_decay` must lie in"),
            ({"dead_code_threshold": -0.1}, "`dead_code_threshold`"),
            ({"commitment_loss_weight": -1.0}, "`commitment_loss_weight` must not be negative"),
            ({"codebook_init": "zeros"}, "codebook_init"),
            ({"hidden_dropout": 1.0}, "`hidden_dropout` is a probability"),
            ({"eos_token_id": 40}, "outside the vocabulary of 40"),
            ({"norm_eps": 0.0}, "`norm_eps` must be greater than 0"),
        ],
    )
    def test_settings(self, settings: dict, message: str) -> None:
        with pytest.raises(Exception, match=message):
            CAUSAL.config(**settings)

    def test_heads_that_need_other_settings(self) -> None:
        with pytest.raises(ValueError, match="LongVQForMaskedLM needs a configuration with `is_decoder=False`"):
            LongVQForMaskedLM(CAUSAL.config())
        with pytest.raises(ValueError, match="LongVQForCausalLM needs .*`is_decoder=True`"):
            LongVQForCausalLM(CAUSAL.config(is_decoder=False))
        with pytest.raises(ValueError, match="`input_type='tokens'`"):
            LongVQForCausalLM(CAUSAL.config(input_type="values"))
        model = LongVQForSequenceClassification(CAUSAL.config())
        with pytest.raises(ValueError, match="classifies single texts"):
            model(random_ids(1, 4), pair_input_ids=random_ids(1, 4))


def test_defaults() -> None:
    config = LongVQConfig()
    assert config.value_size == 1024 and config.attention_chunk == 256 and config.classifier_pooling == "last"
    assert LongVQConfig(is_decoder=False).classifier_pooling == "mean"
    assert LongVQConfig(window_size=300, codebook_size=16).attention_chunk == 300
    assert LongVQConfig(window_size=16, codebook_size=16).attention_chunk == 64
    copied = copy.deepcopy(config)
    assert copied.to_dict() == config.to_dict()


@parametrize([CAUSAL, Case("longvq", "AutoModelForMaskedLM", "default")])
def test_no_square_of_the_length(case: Case) -> None:
    """No tensor of the forward and backward pass grows faster than the text."""
    model = case.model().train()
    largest = {}
    for length in (512, 1024):
        sizes: list[int] = []
        pack = lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1]  # noqa: E731
        ids = random_ids(1, length)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train_step(model, ids)
        largest[length] = max(sizes)
    assert largest[1024] <= 2.1 * largest[512] < 512 * 512
