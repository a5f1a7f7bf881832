"""What only Mega has: old checkpoints, cross-attention in a language model, attention weights, classifiers, chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from check import read_vectors
from factories import Case, all_variants, parametrize, random_ids
from safetensors.torch import load_file, save_file

from hf_hybrid.layers.dropout import SequenceDropout
from hf_hybrid.modeling.mega import mega_heads

EXACT = {"rtol": 1e-5, "atol": 1e-5}
OLD_FILES = sorted((Path(__file__).parents[1] / "parity" / "vectors" / "mega").glob("hf_*.safetensors"))
CAUSAL = Case("mega", "AutoModelForCausalLM", "default")
CLASSIFIER = Case("mega", "AutoModelForSequenceClassification", "default")
SEQ2SEQ = [case for case in all_variants("AutoModelForSeq2SeqLM") if case.model_type == "mega"]
LRA = {"classifier_type": "lra", "pooling_type": "mean", "num_labels": 3, "classifier_hidden_size": 7}


# ----------------------------------------------------------------------------------------------------- old checkpoints


def write_old_checkpoint(folder: Path, source: Path, **changes: object) -> tuple[dict, dict[str, torch.Tensor]]:
    """A folder as Transformers 4.57.6 wrote it, and its configuration and tensors."""
    config, tensors = read_vectors(source)
    config |= changes
    state = {name[6:]: value.contiguous() for name, value in tensors.items() if name.startswith("param.")}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return config, state


@pytest.mark.parametrize("source", OLD_FILES, ids=lambda path: path.stem)
def test_old_checkpoint_loads_and_is_saved_under_the_same_names(source: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    config, state = write_old_checkpoint(tmp_path, source)
    model_class = getattr(mega_heads, config["architectures"][0])
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(
        getattr(model.config, name) == value
        for name, value in config.items()
        if "label" not in name and name != "transformers_version"
    )
    model.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    tied = set(model.all_tied_weights_keys)
    assert saved.keys() == {name for name in state if not name.endswith("_float_tensor")} - tied
    for name, value in saved.items():
        assert torch.equal(value, state[name]), name


def test_two_tensors_for_tied_embedding_and_head(tmp_path: Path) -> None:
    """By default both are kept, as they were trained; on request the embedding wins, as in Transformers 4.x."""
    source = next(path for path in OLD_FILES if path.stem == "hf_clm_laplace_simple_cache")
    _, state = write_old_checkpoint(tmp_path, source, tie_word_embeddings=True)
    head, table = state["lm_head.weight"], state["mega.embedding_layer.word_embeddings.weight"]
    assert not torch.equal(head, table)
    kept = mega_heads.MegaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(kept.lm_head.weight, head) and torch.equal(kept.get_input_embeddings().weight, table)
    tied = mega_heads.MegaForCausalLM.from_pretrained(tmp_path, tied_weights_conflict="embedding")
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert torch.equal(tied.lm_head.weight, table)
    untied = mega_heads.MegaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert torch.equal(untied.lm_head.weight, head)


# --------------------------------------------------------------------------- cross-attention inside a language model


def cross_case(activation: str, bias: str) -> torch.nn.Module:
    chunks = {"use_chunking": True, "chunk_size": 4, "rel_bias_table_size": 4, "cross_bias_table_size": 64}
    return CAUSAL.model(
        add_cross_attention=True, attention_activation=activation, relative_positional_bias=bias, **chunks
    )


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("bias", ["simple", "rotary"])
class TestCrossAttention:
    @torch.no_grad()
    def test_steps_equal_one_pass(self, activation: str, bias: str) -> None:
        model, ids = cross_case(activation, bias), random_ids(2, 11)
        source = {"encoder_hidden_states": torch.randn(2, 7, 16), "encoder_attention_mask": torch.ones(2, 7)}
        source["encoder_attention_mask"][1, 4:] = 0
        expected = model(ids, **source).logits
        for cuts in (range(1, 11), [3, 5], [4, 8]):
            past, parts = None, []
            for start, end in zip([0, *cuts], [*cuts, 11]):
                outputs = model(ids[:, start:end], past_key_values=past, use_cache=True, **source)
                past = outputs.past_key_values
                parts.append(outputs.logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)

    @torch.no_grad()
    def test_left_padding_of_source_and_target(self, activation: str, bias: str) -> None:
        model, ids, states = cross_case(activation, bias), random_ids(1, 6), torch.randn(1, 5, 16)
        expected = model(ids, encoder_hidden_states=states).logits
        padded = {
            "input_ids": torch.cat([random_ids(1, 3), ids], dim=1),
            "attention_mask": torch.tensor([[0] * 3 + [1] * 6]),
            "encoder_hidden_states": torch.cat([torch.randn(1, 2, 16), states], dim=1),
            "encoder_attention_mask": torch.tensor([[0] * 2 + [1] * 5]),
        }
        torch.testing.assert_close(model(**padded).logits[:, 3:], expected, **EXACT)

    def test_generation(self, activation: str, bias: str) -> None:
        model, ids = cross_case(activation, bias), random_ids(2, 5)
        source = {"encoder_hidden_states": torch.randn(2, 7, 16), "eos_token_id": None}
        for strategy in ({}, {"num_beams": 3}):
            cached = model.generate(ids, max_new_tokens=9, **source, **strategy)
            uncached = model.generate(ids, max_new_tokens=9, use_cache=False, **source, **strategy)
            assert cached.tolist() == uncached.tolist()


# ---------------------------------------------------------------------------------------------------- attention weights


@torch.no_grad()
@parametrize([case for case in all_variants() if case.model_type == "mega"])
def test_attention_weights(case: Case) -> None:
    model, ids = case.model(), random_ids(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    outputs = model(ids, attention_mask=mask, output_attentions=True, use_cache=False)
    chunk = model.config.attention_chunk or 11
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for weights in outputs.attentions:
        assert weights.shape == (2, -(-11 // chunk), chunk, chunk)
        assert not weights.triu(1).any()
        assert (weights >= 0).all()
        if model.config.attention_activation == "softmax":
            torch.testing.assert_close(weights[0, 0].sum(-1), torch.ones(chunk))
    assert "attentions" not in model(ids) or not model(ids).attentions


@torch.no_grad()
@parametrize(SEQ2SEQ)
def test_cross_attention_weights(case: Case) -> None:
    model, inputs = case.model(), case.inputs(batch=2, length=11, target=6)
    inputs["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
    inputs["attention_mask"][1, 8:] = 0
    outputs = model(**inputs, output_attentions=True)
    assert len(outputs.cross_attentions) == model.config.decoder_layers
    for weights in outputs.cross_attentions:
        assert weights.shape == (2, 1, 6, 11)
        assert not weights[1, ..., 8:].any()
    assert len(outputs.encoder_attentions) == model.config.num_hidden_layers
    assert len(outputs.decoder_attentions) == model.config.decoder_layers
    encoder_outputs = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    given = {"attention_mask": inputs["attention_mask"], "decoder_input_ids": inputs["decoder_input_ids"]}
    for form in (encoder_outputs, (encoder_outputs.last_hidden_state,)):
        torch.testing.assert_close(model(encoder_outputs=form, **given).logits, outputs.logits)


# --------------------------------------------------------------------------------------------------------- classifiers


@torch.no_grad()
def test_published_classifier_reads_the_mean_of_real_tokens() -> None:
    model = CLASSIFIER.model(**LRA, mask_padded_states=True, num_classifier_layers=2)
    inputs = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9)}
    inputs["attention_mask"][1, 5:] = 0
    states = model.mega(**inputs).last_hidden_state
    assert not states[1, 5:].any()
    pooled = torch.stack([states[0].mean(0), states[1, :5].mean(0)])
    for layer in model.classifier.layers:
        pooled = torch.nn.functional.gelu(layer(pooled))
    torch.testing.assert_close(model(**inputs).logits, pooled @ model.classifier.out_proj.weight.T, **EXACT)


class TestPairs:
    def test_second_text_stands_first(self) -> None:
        model = CLASSIFIER.model(**LRA, dual_encoder=True)
        first, second = random_ids(2, 9), random_ids(2, 6)
        inputs = {"input_ids": first, "pair_input_ids": second}
        pooled = [model.mega(ids).last_hidden_state.mean(1) for ids in (second, first)]
        expected = model.classifier(torch.cat(pooled, dim=-1))
        torch.testing.assert_close(model(**inputs).logits, expected, **EXACT)
        padded = torch.cat([second, random_ids(2, 4)], dim=1)
        mask = torch.tensor([[1] * 6 + [0] * 4]).expand(2, -1)
        torch.testing.assert_close(
            model(first, pair_input_ids=padded, pair_attention_mask=mask).logits, expected, **EXACT
        )
        model.train()(**inputs, labels=torch.tensor([0, 2])).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_bad_pairs(self) -> None:
        pairs, single = CLASSIFIER.model(**LRA, dual_encoder=True), CLASSIFIER.model()
        with pytest.raises(ValueError, match="classifies pairs.*pass `pair_input_ids`"):
            pairs(random_ids(2, 5))
        with pytest.raises(ValueError, match="classifies single texts"):
            single(random_ids(2, 5), pair_input_ids=random_ids(2, 5))
        with pytest.raises(ValueError, match="`pair_input_ids` has 3 rows but `input_ids` has 2"):
            pairs(random_ids(2, 5), pair_input_ids=random_ids(3, 5))


class TestPixelsAndWaveforms:
    IMAGE = Case("mega", "AutoModelForImageClassification", "default")
    AUDIO = Case("mega", "AutoModelForAudioClassification", "default")

    @torch.no_grad()
    def test_an_image_is_its_pixels_row_by_row(self) -> None:
        model = self.IMAGE.model(image_size=4)
        pixels = torch.randn(2, 1, 4, 4)
        expected = model(pixels).logits
        for form in (pixels[:, 0], pixels.view(2, 16)):
            torch.testing.assert_close(model(form).logits, expected)
        assert (model(pixels.transpose(2, 3)).logits - expected).abs().max() > 1e-3

    def test_wrong_pixels(self) -> None:
        model = self.IMAGE.model(image_size=4)
        for shape in ((2, 1, 5, 4), (2, 5, 5), (2, 15)):
            with pytest.raises(ValueError, match=r"images of 4 by 4 pixels \(`image_size`\)"):
                model(torch.randn(shape))
        with pytest.raises(ValueError, match=r"`pixel_values` must be grey images.*\(2, 3, 4, 4\)"):
            model(torch.randn(2, 3, 4, 4))
        with pytest.raises(ValueError, match="Pass `pixel_values`"):
            model()
        with pytest.raises(ValueError, match="must hold floating-point numbers.*int64"):
            model(torch.zeros(2, 16, dtype=torch.long))
        with pytest.raises(ValueError, match="`labels` contain 2; accepted are 0 to 1"):
            model(torch.randn(2, 16), labels=torch.tensor([0, 2]))

    @torch.no_grad()
    def test_padded_waveforms(self) -> None:
        for pooling in ("first", "mean"):
            model = self.AUDIO.model(pooling_type=pooling)
            values = torch.randn(2, 12)
            expected = model(values).logits
            mask = torch.tensor([[1] * 12 + [0] * 5]).expand(2, -1)
            padded = torch.cat([values, torch.randn(2, 5)], dim=1)
            torch.testing.assert_close(model(padded, attention_mask=mask).logits, expected, **EXACT)

    def test_wrong_waveforms(self) -> None:
        model = self.AUDIO.model()
        with pytest.raises(ValueError, match=r"`input_values` must be real numbers \(batch, length\).*\(12,\)"):
            model(torch.randn(12))
        with pytest.raises(ValueError, match=r"\(2, 3, 12\)"):
            model(torch.randn(2, 3, 12))
        with pytest.raises(ValueError, match="exactly one of `input_values` and `inputs_embeds`"):
            model()
        with pytest.raises(ValueError, match="`input_values` is empty"):
            model(torch.randn(2, 0))
        with pytest.raises(ValueError, match="`attention_mask` has shape"):
            model(torch.randn(2, 12), attention_mask=torch.ones(2, 11))

    def test_input_type_must_fit_the_head(self) -> None:
        with pytest.raises(ValueError, match="needs a configuration with `input_type='values'`"):
            self.IMAGE.model(input_type="tokens")
        with pytest.raises(ValueError, match="needs a configuration with `input_type='values'`"):
            self.AUDIO.model(input_type="tokens")
        with pytest.raises(ValueError, match="needs a configuration with `input_type='tokens'`"):
            Case("mega", "AutoModelForMaskedLM", "default").model(input_type="values")


class TestMultipleChoice:
    CASE = Case("mega", "AutoModelForMultipleChoice", "default")

    @torch.no_grad()
    def test_every_choice_is_scored_alone(self) -> None:
        model, ids = self.CASE.model(), random_ids(6, 8).view(2, 3, 8)
        mask = torch.ones(2, 3, 8)
        mask[0, 1, 5:] = 0
        logits = model(ids, attention_mask=mask).logits
        assert logits.shape == (2, 3)
        torch.testing.assert_close(model(ids[:1, 1:2, :5]).logits[0, 0], logits[0, 1], **EXACT)
        loss = model(ids, attention_mask=mask, labels=torch.tensor([2, 0])).loss
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0])))
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, logits)

    def test_bad_input(self) -> None:
        model = self.CASE.model()
        with pytest.raises(ValueError, match=r"`input_ids` \(batch, choices, length\).*got \(2, 8\)"):
            model(random_ids(2, 8))
        with pytest.raises(ValueError, match="`labels` contain 3; accepted are 0 to 2"):
            model(random_ids(6, 8).view(2, 3, 8), labels=torch.tensor([0, 3]))


# ------------------------------------------------------------------------------------------------------ reach and length


class TestChunks:
    @torch.no_grad()
    def test_without_an_average_nothing_crosses_a_chunk(self) -> None:
        case = Case("mega", "AutoModelForMaskedLM", "default")
        model = case.model(use_chunking=True, chunk_size=4).double()
        for layer in model.mega.layers:
            layer.mega_layer.ema_gate.ema_expansion_matrix.zero_()
        ids = random_ids(1, 14)
        changed = ids.clone()
        changed[:, 4:8] = (ids[:, 4:8] - 3 + 1) % 37 + 3
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
        assert difference[:4].max() <= 1e-12 and difference[8:].max() <= 1e-12 and difference[4:8].min() > 1e-4

    @torch.no_grad()
    @pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
    def test_one_chunk_is_full_attention(self, activation: str) -> None:
        full = CAUSAL.model(attention_activation=activation)
        chunked = CAUSAL.model(attention_activation=activation, use_chunking=True, chunk_size=12)
        ids = random_ids(2, 12)
        torch.testing.assert_close(chunked(ids).logits, full(ids).logits, **EXACT)
        assert (chunked(random_ids(1, 20)).logits).isfinite().all()

    def test_lengths_that_are_no_multiple_can_be_refused(self) -> None:
        model = CAUSAL.model(use_chunking=True, chunk_size=4, auto_pad_to_chunk=False)
        for length in (3, 4, 8):
            model(random_ids(1, length))
        with pytest.raises(
            ValueError, match="10 tokens, not a multiple of `chunk_size` = 4.*`auto_pad_to_chunk=True`"
        ):
            model(random_ids(1, 10))


@torch.no_grad()
def test_texts_longer_than_max_positions() -> None:
    rotary, simple = (
        CAUSAL.model(max_positions=8, relative_positional_bias=kind, add_token_type_embeddings=True)
        for kind in ("rotary", "simple")
    )
    assert rotary(random_ids(1, 40)).logits.isfinite().all()
    simple(random_ids(1, 8))
    with pytest.raises(ValueError, match="9 tokens exceeds the table.*covers 8.*`relative_positional_bias='rotary'`"):
        simple(random_ids(1, 9))
    past = simple(random_ids(1, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="9 tokens exceeds"):
        simple(random_ids(1, 1), past_key_values=past)


def test_feature_dropout_is_constant_over_positions() -> None:
    states = SequenceDropout(0.5, by_feature=True)(torch.ones(3, 7, 40))
    assert ((states == 0) == (states[:, :1] == 0)).all()
    dropped = (states[:, 0] == 0).float().mean()
    assert 0.3 < dropped < 0.7 and states.max() == 2.0
    single = SequenceDropout(0.25)(torch.ones(3, 70, 40))
    assert not ((single == 0) == (single[:, :1] == 0)).all()
    assert 0.22 < (single == 0).float().mean() < 0.28 and single.max() == torch.tensor(1 / 0.75)
    assert torch.equal(SequenceDropout(0.25).eval()(states), states)
    model = CAUSAL.model(use_feature_dropout=True, dropout_prob=0.3, hidden_dropout_prob=0.3).train()
    assert model(random_ids(2, 6), labels=random_ids(2, 6)).loss.isfinite()


@pytest.mark.parametrize("kind", ["batchnorm", "syncbatchnorm"])
def test_batch_norms(kind: str) -> None:
    model = Case("mega", "AutoModelForMaskedLM", "default").model(normalization_type=kind)
    ids = random_ids(4, 12)
    before = model(ids).logits
    model.train()(ids, labels=ids).loss.backward()
    assert (model.eval()(ids).logits - before).abs().max() > 1e-4  # the running statistics moved


# ---------------------------------------------------------------------------------------------------------- bad input


class TestBadInput:
    def test_cross_attention_without_encoder_states(self) -> None:
        model = CAUSAL.model(add_cross_attention=True)
        with pytest.raises(ValueError, match="pass `encoder_hidden_states`"):
            model(random_ids(2, 5))
        with pytest.raises(ValueError, match="has 2 rows but the encoder output has 3"):
            model(random_ids(2, 5), encoder_hidden_states=torch.randn(3, 4, 16))
        with pytest.raises(ValueError, match="`encoder_attention_mask` has shape"):
            model(
                random_ids(2, 5),
                encoder_hidden_states=torch.randn(2, 4, 16),
                encoder_attention_mask=torch.ones(2, 5),
            )
        with pytest.raises(ValueError, match="`encoder_hidden_states` need a decoder with cross-attention"):
            CAUSAL.model()(random_ids(2, 5), encoder_hidden_states=torch.randn(2, 4, 16))

    def test_cache_of_another_model(self) -> None:
        past = CAUSAL.model(use_chunking=True, chunk_size=4)(random_ids(2, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="made by a model with `chunk_size` = 4, but this one has None"):
            CAUSAL.model()(random_ids(2, 1), past_key_values=past)
        past = CAUSAL.model(num_hidden_layers=1)(random_ids(2, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="Cache of 1 layers.*2 layers of gated attention"):
            CAUSAL.model()(random_ids(2, 1), past_key_values=past)
        past = CAUSAL.model()(random_ids(2, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 rows but `past_key_values` holds 2"):
            CAUSAL.model()(random_ids(3, 1), past_key_values=past)
        with pytest.raises(ValueError, match="`past_key_values` need a decoder"):
            Case("mega", "AutoModel", "default").model()(random_ids(2, 1), past_key_values=past)

    def test_heads_that_do_not_fit_the_configuration(self) -> None:
        with pytest.raises(ValueError, match="got False. Set .*is_decoder=True, bidirectional=False"):
            CAUSAL.model(is_decoder=False, bidirectional=True)
        with pytest.raises(ValueError, match="got True. Set .*is_decoder=False, adaptive_cutoffs=None"):
            Case("mega", "AutoModelForMaskedLM", "default").model(is_decoder=True, bidirectional=False)
        with pytest.raises(ValueError, match="needs `is_encoder_decoder=True`"):
            SEQ2SEQ[0].model(is_encoder_decoder=False)
        with pytest.raises(ValueError, match="describes two stacks"):
            Case("mega", "AutoModel", "default").model(is_encoder_decoder=True)
        with pytest.raises(ValueError, match="`activation` must be one of.*got 'cubic'"):
            CAUSAL.model(activation="cubic")

    def test_decoder_inputs(self) -> None:
        model, inputs = SEQ2SEQ[0].model(), SEQ2SEQ[0].inputs()
        source = {"input_ids": inputs["input_ids"]}
        with pytest.raises(ValueError, match="exactly one of `decoder_input_ids` and `decoder_inputs_embeds`"):
            model(**source)
        with pytest.raises(ValueError, match="`decoder_input_ids` contains the id 99"):
            model(**source, decoder_input_ids=torch.full((2, 3), 99))
        with pytest.raises(ValueError, match="`decoder_attention_mask` has shape"):
            model(**inputs, decoder_attention_mask=torch.ones(2, 2))
        with pytest.raises(ValueError, match="has 3 rows but the encoder output has 2"):
            model(**source, decoder_input_ids=random_ids(3, 4))
        with pytest.raises(ValueError, match="`decoder_start_token_id` and `pad_token_id`"):
            SEQ2SEQ[0].model(pad_token_id=None)(**source, labels=random_ids(2, 4))


@pytest.mark.parametrize(("shared", "tied"), [(None, True), (False, True), (None, False)], ids=["one", "two", "three"])
def test_resizing_one_two_or_three_embedding_matrices(shared: bool | None, tied: bool) -> None:
    """Both sides and the head know the new vocabulary, and what was tied stays tied."""
    case = Case("mega", "AutoModelForSeq2SeqLM", "default")
    model = case.model(share_encoder_decoder_embeddings=shared, tie_word_embeddings=tied)
    inputs = case.inputs()
    expected = model(**inputs).logits
    model.resize_token_embeddings(50)
    torch.testing.assert_close(model(**inputs).logits[..., :40], expected)
    new = {name: torch.full_like(ids, 49) for name, ids in inputs.items()}
    assert model(**new).logits.shape[-1] == 50
    source, target = model.encoder.get_input_embeddings().weight, model.decoder.get_input_embeddings().weight
    assert (source is target) == (shared is not False and tied)
    assert (model.lm_head.weight is target) == tied
