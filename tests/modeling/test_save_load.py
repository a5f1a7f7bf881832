"""Saving and loading: what comes back is what was saved, for every head, between heads, in every precision."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from factories import (
    GENERATIVE_HEADS,
    OTHER_INPUTS,
    VARIANTS,
    VOCABULARY,
    Case,
    all_heads,
    all_variants,
    main_output,
    parametrize,
    perturb,
    random_ids,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_hybrid.auto import ARCHITECTURES, Architecture, load_config_class, load_heads

EVERY_CASE = list(dict.fromkeys(all_heads() + all_variants()))
OTHER_CASES = all_heads(other_inputs=True)


def ssm_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point tensors of all state space layers."""
    return {name: value for name, value in model.state_dict().items() if ".ssm." in name and value.is_floating_point()}


def reload(model: PreTrainedModel, folder: Path, **kwargs) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **kwargs)


@parametrize(EVERY_CASE + OTHER_CASES)
def test_reloaded_model_is_the_same(case: Case, tmp_path: Path) -> None:
    """Weights bitwise equal through the Auto class; the folder holds safetensors and no pickle."""
    model = case.model()
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded, report = getattr(transformers, case.auto_name).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is case.model_class
    assert not loaded.training
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    inputs = case.inputs()
    with torch.no_grad():  # matrix products may sum in another order where weights lie elsewhere in memory
        torch.testing.assert_close(main_output(loaded(**inputs)), main_output(model(**inputs)), rtol=1e-5, atol=1e-5)


@parametrize(all_variants())
def test_every_tensor_is_saved(case: Case, tmp_path: Path) -> None:
    """Only tied tensors are left out of the file; no buffer is rebuilt by guesswork at load."""
    model = case.model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    left_out = model.state_dict().keys() - saved
    assert left_out == (set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set())
    assert not [name for name, _ in model.named_buffers() if name not in saved]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
class TestBetweenHeads:
    def test_from_base_to_head_and_back(self, architecture, tmp_path: Path) -> None:
        variant = next(iter(VARIANTS[architecture.model_type]))
        base_case = Case(architecture.model_type, "AutoModel", variant)
        inputs = base_case.inputs()
        for auto_name in architecture.heads:
            case = Case(architecture.model_type, auto_name, variant)
            if auto_name in OTHER_INPUTS or (case.is_seq2seq and not base_case.is_seq2seq):
                continue
            base = base_case.model(**case.head_settings)
            base.save_pretrained(tmp_path / "base")
            head, report = case.model_class.from_pretrained(tmp_path / "base", output_loading_info=True)
            shared = [name for name in head.state_dict() if name not in report["missing_keys"]]
            assert any(re.search(r"\.(ssm|ema|ema_gate)\.", name) for name in shared), "the encoder must be loaded"
            new = {"classifier", "qa_outputs", "score", "lm_head", "mlm_head", "dense"}
            assert {name.split(".")[0] for name in report["missing_keys"]} <= new
            assert not report["unexpected_keys"]
            if not case.is_seq2seq and "decoder_input_ids" in inputs:
                expected = base.encoder(inputs["input_ids"]).last_hidden_state
            else:
                expected = main_output(base(**inputs))
            states = head(**{name: inputs[name] for name in case.inputs()}, output_hidden_states=True)
            last = states.get("decoder_hidden_states") or states.hidden_states
            torch.testing.assert_close(last[-1], expected, rtol=1e-5, atol=1e-5)
            head.save_pretrained(tmp_path / auto_name)
            if case.is_seq2seq or case.is_causal:
                again = AutoModel.from_pretrained(tmp_path / auto_name)
                torch.testing.assert_close(main_output(again(**inputs)), main_output(base(**inputs)), rtol=0, atol=0)

    def test_new_parts_are_initialised(self, architecture, tmp_path: Path) -> None:
        """Tensors that a checkpoint lacks get their initial distribution, not what was in memory."""
        for variant in VARIANTS[architecture.model_type]:
            case = Case(architecture.model_type, "AutoModel", variant)
            model = case.model()
            state = model.state_dict()
            dropped = [name for name, value in state.items() if value.is_floating_point()][::2]
            folder = tmp_path / variant
            model.save_pretrained(folder, state_dict={k: v for k, v in state.items() if k not in dropped})
            loaded, report = AutoModel.from_pretrained(folder, output_loading_info=True)
            assert set(report["missing_keys"]) <= set(dropped)
            fresh = case.model_class(case.config())
            for name, value in loaded.state_dict().items():
                if name not in dropped:
                    assert torch.equal(value, state[name]), name
                    continue
                reference = fresh.state_dict()[name]
                assert value.isfinite().all(), name
                assert abs(float(value.mean() - reference.mean())) <= 0.6 + 0.3 * float(reference.abs().max()), name
                assert value.numel() < 24 or float(value.std()) <= 2 * float(reference.std()) + 1e-3, name


@parametrize(
    [Case("spade", "AutoModelForSeq2SeqLM", "official"), Case("spade_lm", "AutoModelForCausalLM", "normformer")]
)
def test_frozen_state_spaces_stay_buffers(case: Case, tmp_path: Path) -> None:
    """`ssm_trainable=False` survives loading: the tensors are buffers, saved and loaded, and no optimizer sees them."""
    model = case.model()
    for _, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer) * 0.1)
    loaded = reload(model, tmp_path)
    names = ssm_tensors(loaded)
    assert names and not [name for name, _ in loaded.named_parameters() if ".ssm." in name]
    for name, value in ssm_tensors(model).items():
        assert torch.equal(names[name], value)
    thawed = type(model).from_pretrained(tmp_path, ssm_trainable=True, ssm_stop_gradient=False)
    assert any(".ssm." in name for name, _ in thawed.named_parameters())
    for name, value in ssm_tensors(model).items():
        assert torch.equal(ssm_tensors(thawed)[name], value)


@parametrize(
    [
        case
        for case in all_heads() + all_variants()
        if case.auto_name in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
    ]
)
class TestEmbeddings:
    def test_tied_weights(self, case: Case, tmp_path: Path) -> None:
        model = case.model()
        for candidate in (model, reload(model, tmp_path)):
            head, table = candidate.get_output_embeddings(), candidate.get_input_embeddings()
            if head is None:  # the adaptive softmax reads the tables of the embedding
                continue
            assert (head.weight is table.weight) == candidate.config.tie_word_embeddings

    def test_resizing(self, case: Case, tmp_path: Path) -> None:
        model = case.model()
        if getattr(model.config, "adaptive_cutoffs", None) is not None:
            with pytest.raises(ValueError, match="adaptive"):
                model.resize_token_embeddings(VOCABULARY + 9)
            return
        inputs = case.inputs()
        expected = model(**inputs).logits
        model.resize_token_embeddings(VOCABULARY + 9)
        assert model.config.vocab_size == VOCABULARY + 9
        loaded = reload(model, tmp_path)
        for candidate in (model, loaded):
            logits = candidate(**inputs).logits
            assert logits.shape[-1] == VOCABULARY + 9
            torch.testing.assert_close(logits[..., :VOCABULARY], expected, rtol=1e-5, atol=1e-5)
            tied = candidate.get_output_embeddings().weight is candidate.get_input_embeddings().weight
            assert tied == candidate.config.tie_word_embeddings
        ids = {name: torch.full_like(value, VOCABULARY + 5) for name, value in inputs.items()}
        assert model(**ids).logits.shape[-1] == VOCABULARY + 9
        loaded(**ids, labels=next(reversed(ids.values()))).loss.backward()
        model.resize_token_embeddings(VOCABULARY - 10)
        assert model(**{name: random_ids(1, 4) % 30 for name in inputs}).logits.shape[-1] == VOCABULARY - 10


class TestPrecision:
    @parametrize(all_variants() + [Case("spade", "AutoModelForSequenceClassification", "default")])
    def test_state_spaces_stay_in_float32(self, case: Case, tmp_path: Path) -> None:
        """However the model gets its precision, the recurrence keeps float32, and its values."""
        dtype = torch.float16 if case.variant == "official" else torch.bfloat16
        model = case.model()
        expected = ssm_tensors(model)
        model.save_pretrained(tmp_path)
        loaded = case.model_class.from_pretrained(tmp_path, dtype=dtype)
        cast = case.model_class.from_pretrained(tmp_path).to(dtype)
        made = case.model_class._from_config(case.config(), dtype=dtype)
        for candidate in (loaded, cast, made):
            assert next(candidate.get_input_embeddings().parameters()).dtype == dtype
            tensors = ssm_tensors(candidate)
            assert not [name for name, value in candidate.state_dict().items() if value.dtype == torch.float64]
            assert tensors.keys() == expected.keys()
            assert {value.dtype for value in tensors.values()} <= {torch.float32}
        for candidate in (loaded, cast):
            for name, value in ssm_tensors(candidate).items():
                assert torch.equal(value, expected[name]), name
        again = reload(loaded, tmp_path / "again", dtype="auto")
        assert {value.dtype for value in ssm_tensors(again).values()} <= {torch.float32}
        assert again.dtype == dtype

    @parametrize(EVERY_CASE)
    def test_bf16_stays_close_to_float32(self, case: Case) -> None:
        """Forward and backward are finite and within 3e-2 of float32, relative to the size of the outputs."""
        model = case.model_class(case.config()).train()
        inputs = case.inputs(length=33)
        inputs |= case.labels(inputs)
        low = case.model_class(case.config()).train()
        low.load_state_dict(model.state_dict())
        low.to(torch.bfloat16)
        expected, actual = model(**inputs), low(**inputs)
        losses = [outputs.get("loss") for outputs in (expected, actual)]
        if set(expected) != {"loss"}:  # in training the adaptive softmax computes the loss alone
            reference, output = main_output(expected), main_output(actual).float()
            assert output.isfinite().all()
            assert (output - reference).abs().max() <= 3e-2 * reference.abs().max()
            if losses[0] is None:
                losses = [reference.square().mean(), output.square().mean()]
        torch.testing.assert_close(losses[1].float(), losses[0], rtol=3e-2, atol=3e-2)
        losses[1].backward()
        gradients = [parameter.grad for parameter in low.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)

    @parametrize([case for case in all_variants() if case.is_causal])
    def test_bf16_steps_equal_one_pass(self, case: Case) -> None:
        """The state keeps float32: a run in half precision does not drift away from the one without a cache."""
        model = case.model_class(case.config()).eval().to(torch.bfloat16)
        ids = random_ids(2, 24)
        with torch.no_grad():
            whole, past, parts = model(ids).logits, None, []
            for position in range(24):
                outputs = model(ids[:, position : position + 1], past_key_values=past, use_cache=True)
                past = outputs.past_key_values
                parts.append(outputs.logits)
        difference = (torch.cat(parts, dim=1).float() - whole.float()).abs().max()
        assert difference <= 2e-2 * whole.float().abs().max()
        states = [state for layer in past.layers for state in getattr(layer, "recurrent_states", {}).values()]
        assert all(state.dtype == torch.float32 for state in states)

    @pytest.mark.both_branches(wide=True)
    @parametrize([case for case in all_variants() if case.auto_name in GENERATIVE_HEADS])
    def test_autocast_steps_equal_one_pass(self, case: Case) -> None:
        """A text is continued under autocast, in pieces and token by token, beyond every window."""
        model = case.model_class(case.config()).eval()
        inputs = case.inputs(length=24, target=24)
        name = "decoder_input_ids" if case.is_seq2seq else "input_ids"
        ids = inputs.pop(name)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            whole, past, parts = model(**inputs, **{name: ids}).logits, None, []
            for piece in ids.split([9, *[1] * 7, 5, 1, 1, 1], dim=1):
                outputs = model(**inputs, **{name: piece}, past_key_values=past, use_cache=True)
                past = outputs.past_key_values
                parts.append(outputs.logits)
        difference = (torch.cat(parts, dim=1).float() - whole.float()).abs().max()
        assert difference <= 2e-2 * whole.float().abs().max()

    @parametrize(all_variants())
    def test_float64(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs()
        single = main_output(model(**inputs))
        double = main_output(model.double()(**inputs))
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@parametrize(all_heads() + OTHER_CASES)
def test_configuration_alone(case: Case, tmp_path: Path) -> None:
    """A saved configuration builds the same class through the Auto classes."""
    case.config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(case.config())
    assert config.to_diff_dict() == case.config().to_diff_dict()
    assert type(getattr(transformers, case.auto_name).from_config(config)) is case.model_class


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = all_variants()[0].model()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_corrupt_checkpoint(tmp_path: Path) -> None:
    model = all_variants()[0].model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match="(?i)header|safetensor"):
        type(model).from_pretrained(tmp_path)


def test_checkpoint_of_another_size(tmp_path: Path) -> None:
    model = all_variants()[0].model()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size|mismatch"):
        type(model).from_pretrained(tmp_path, intermediate_size=model.config.intermediate_size * 2)
    resized = type(model).from_pretrained(
        tmp_path, intermediate_size=model.config.intermediate_size * 2, ignore_mismatched_sizes=True
    )
    perturb(resized)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_checkpoint_of_another_architecture(architecture: Architecture, tmp_path: Path) -> None:
    """An error, not a warning and a model with random weights."""
    found = next(other for other in ARCHITECTURES if other is not architecture)
    Case(found.model_type, "AutoModel", next(iter(VARIANTS[found.model_type]))).model().save_pretrained(tmp_path)
    message = f"holds a model of type '{found.model_type}', .* reads '{architecture.model_type}'. Load it with an Auto"
    for reader in (load_config_class(architecture), *(model_class for _, model_class in load_heads(architecture))):
        with pytest.raises(ValueError, match=message):
            reader.from_pretrained(tmp_path)


def test_no_attribute_hides_a_method() -> None:
    """Of a subclass, which would find the value of its base class in its place. In every variant of every architecture."""
    for case in EVERY_CASE:
        for name, module in case.model().named_modules():
            hidden = [key for key in vars(module) if callable(getattr(type(module), key, None))]
            assert not hidden, f"{case}: {name} ({type(module).__name__}) hides {hidden}"
