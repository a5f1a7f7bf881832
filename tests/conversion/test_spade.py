"""Conversion of official SPADE checkpoints: lossless both ways, and clear about what cannot be converted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official_spade import (
    ADAPTIVE,
    ENCODER_DECODER,
    LANGUAGE_MODEL,
    VARIANTS,
    random_official,
    stored_parameters,
    variant_config,
)

from hf_hybrid.configuration.configuration_spade import SpadeConfig, SpadeLMConfig
from hf_hybrid.conversion.common import same_bytes
from hf_hybrid.conversion.spade import (
    config_from_official,
    config_to_official,
    is_language_model,
    model_class,
    state_dict_from_official,
    state_dict_to_official,
    tensor_names,
    vocabulary_size,
)

ENCODER_DECODER_VECTORS = ("encdec_postnorm_relu", "encdec_prenorm_gated_bias")


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not same_bytes(actual[name], expected[name])]
    assert not different


# ---------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_official_to_ours_to_official_is_bitwise(name):
    config, official = variant_config(VARIANTS[name]), random_official(VARIANTS[name])
    ours = state_dict_from_official(official, config)
    assert_same_state(state_dict_to_official(ours, config), official)
    assert_same_state(state_dict_from_official(state_dict_to_official(ours, config), config), ours)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_of_the_model_is_named_once(name):
    config = variant_config(VARIANTS[name])
    names = tensor_names(config)
    model = model_class(config)(config)
    assert len(set(names.ours.values())) == len(names.ours)
    assert set(names.ours.values()) == model.state_dict().keys() - names.our_aliases.keys()
    assert set(names.aliases.values()) <= names.ours.keys()
    assert not names.ours.keys() & (names.aliases.keys() | names.constants.keys())


@pytest.mark.parametrize("after_forward", [False, True], ids=["raw_c", "c_tilde"])
@pytest.mark.parametrize("name", ENCODER_DECODER_VECTORS)
def test_stored_parameters_survive_bitwise(name, after_forward):
    options, official = stored_parameters(name, after_forward=after_forward)
    config = config_from_official(options)
    ours = state_dict_from_official(official, config)
    lengths = [int(tensor) for key, tensor in ours.items() if key.endswith("kernel_length")]
    assert lengths and all(length == (config.ssm_max_length if after_forward else 0) for length in lengths)
    assert_same_state(state_dict_to_official(ours, config, with_copies=False), official)


@pytest.mark.parametrize("name", ENCODER_DECODER_VECTORS)
def test_raw_and_truncated_output_matrices_give_the_same_model(name):
    logits = []
    for after_forward in (False, True):
        options, official = stored_parameters(name, after_forward=after_forward)
        config = config_from_official(options)
        model = model_class(config)(config).eval()
        model.load_state_dict(state_dict_from_official(official, config), strict=False)
        ids = torch.arange(4, 24).unsqueeze(0)
        with torch.no_grad():
            logits.append(model(ids, decoder_input_ids=ids[:, :5]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)  # the stored C-tilde is rounded to float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_kept(dtype):
    config = variant_config(ENCODER_DECODER)
    official = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in random_official(ENCODER_DECODER).items()
    }
    ours = state_dict_from_official(official, config)
    assert ours["model.encoder.embed_tokens.weight"].dtype == dtype
    assert_same_state(state_dict_to_official(ours, config), official)


def test_copies_of_tied_tensors():
    config, official = variant_config(ENCODER_DECODER), random_official(ENCODER_DECODER)
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert copies < official.keys()
    without = {name: tensor for name, tensor in official.items() if name not in copies}
    assert_same_state(state_dict_from_official(without, config), state_dict_from_official(official, config))
    without["encoder.embed_tokens.weight"] = without.pop("shared.weight")  # a copy may stand for the original
    assert_same_state(state_dict_from_official(without, config), state_dict_from_official(official, config))
    ours = state_dict_from_official(official, config)
    ours["lm_head.weight"] = ours["model.encoder.embed_tokens.weight"].clone()  # our own tied copy may be there
    assert_same_state(state_dict_to_official(ours, config), official)


def test_names_of_the_adaptive_softmax():
    official = random_official(LANGUAGE_MODEL | ADAPTIVE)
    table = "decoder.embed_tokens.embeddings"
    softmax = "decoder.adaptive_softmax"
    assert {name for name in official if name.startswith((table, softmax))} == {
        *(f"{table}.{band}.{part}.weight" for band in range(3) for part in (0, 1)),
        f"{softmax}.head.word_proj.weight",
        f"{softmax}.head.class_proj.weight",
        f"{softmax}.head._float_tensor",
        *(f"{softmax}.tail.{tail}.{part}.weight" for tail in range(2) for part in (0, 2)),
        f"{softmax}.version",
    }
    assert same_bytes(official[f"{softmax}.tail.1.0.weight"], official[f"{table}.2.1.weight"])
    assert official[f"{softmax}.tail.1.0.weight"].shape == (8, 2)
    assert same_bytes(official[f"{softmax}.head.word_proj.weight"], official[f"{table}.0.0.weight"])
    assert vocabulary_size(official) == 20


def test_names_of_the_normformer_options():
    official = random_official(VARIANTS["lm_normformer"])
    layer = {name.removeprefix("decoder.layers.1.") for name in official if name.startswith("decoder.layers.1.")}
    norms = ("attn_ln", "ffn_layernorm", "self_attn_layer_norm", "final_layer_norm")
    assert {f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")} | {"w_resid"} < layer
    assert official["decoder.layers.1.ffn_layernorm.weight"].shape == (12,)
    assert {"decoder.layer_norm.weight", "decoder.layer_norm.bias"} < official.keys()


@pytest.mark.parametrize("name", ["encdec", "lm_adaptive"])
def test_tied_copies_that_differ_are_refused(name):
    config, official = variant_config(VARIANTS[name]), random_official(VARIANTS[name])
    alias, original = next(iter(tensor_names(config).aliases.items()))
    official[alias] = official[alias] + 1
    with pytest.raises(ValueError, match=f"`{alias}` and `{original}` are tied"):
        state_dict_from_official(official, config)


def test_missing_superfluous_and_misshapen_tensors_are_named():
    config, official = variant_config(ENCODER_DECODER), random_official(ENCODER_DECODER)
    del official["encoder.block.0.layer.0.aggregate.bias"]
    official["encoder.final_layer_norm.weight"] = torch.ones(8)
    official["decoder.pos_embed.weight"] = torch.ones(5, 8)
    with pytest.raises(ValueError) as caught:
        state_dict_from_official(official, config)
    message = str(caught.value)
    assert "missing: `encoder.block.0.layer.0.aggregate.bias`" in message
    assert "unexpected: `encoder.final_layer_norm.weight`" in message
    assert "`decoder.pos_embed.weight` has shape (5, 8), expected (18, 8)" in message


def test_our_tensors_that_do_not_fit_are_named():
    config = variant_config(LANGUAGE_MODEL)
    ours = state_dict_from_official(random_official(LANGUAGE_MODEL), config)
    ours["score.weight"] = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"unexpected: `score\.weight`"):
        state_dict_to_official(ours, config)


def test_vocabulary_size_needs_embeddings():
    with pytest.raises(ValueError, match="embed_tokens"):
        vocabulary_size({"encoder.weight": torch.ones(1)})


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", VARIANTS)
def test_options_survive(name):
    options = VARIANTS[name]
    config = variant_config(options)
    assert config_to_official(config, options) == options  # training options and all
    again = config_to_official(config)
    restored = config_from_official(again, vocab_size=config.vocab_size)
    assert restored.to_dict() == config.to_dict()


def test_published_settings():
    config = SpadeLMConfig.official()
    official = config_to_official(config)
    assert official["decoder_layers"] == 16 and official["adaptive_softmax_cutoff"] == "20000,60000"
    assert official["s4_every_n_layers"] == 100 and official["decoder_ffn_embed_dim"] == 4096
    assert config_from_official(official, vocab_size=config.vocab_size).to_dict() == config.to_dict()
    encoder_decoder = SpadeConfig.official()
    official = config_to_official(encoder_decoder)
    assert official["model_type"] == "msrlongt5" and official["s4_every_n_layers"] == 1000
    assert config_from_official(official).to_dict() == encoder_decoder.to_dict()


def test_defaults_of_the_official_encoder_decoder():
    config = config_from_official({"model_type": "msrlongt5", "s4_n_ssm": 512})
    assert config.decoder_layers == config.encoder_layers == 6
    assert (config.window_size, config.ssm_max_length, config.max_target_positions) == (129, 512, 512)
    assert config.decoder_start_token_id == config.eos_token_id == 2
    assert not config.norm_first and config.ssm_stop_gradient and not config.ssm_trainable
    assert config.ssm_layers == [0] and config.ssm_type == "s4" and not config.use_final_norm


def test_changed_fields_override_the_base():
    config = variant_config(LANGUAGE_MODEL)
    config.window_size = 6
    official = config_to_official(config, LANGUAGE_MODEL)
    assert official["local_radius"] == 5 and official["optimizer"] == "nag"
    assert config_from_official(official, vocab_size=20).window_size == 6


def test_fairseq_spellings():
    options = (
        LANGUAGE_MODEL | ADAPTIVE | {"adaptive_input_cutoff": [6, 12, 20], "adaptive_softmax_cutoff": [6, 12, 20]}
    )
    assert variant_config(options).adaptive_cutoffs == [6, 12]  # the last may be the vocabulary size
    del options["max_target_positions"]
    assert variant_config(options).ssm_max_length == 1024
    assert variant_config(options | {"tokens_per_sample": 64}).ssm_max_length == 64
    assert variant_config(options | {"relu_dropout": 0.2}).activation_dropout == 0.2


@given(
    every=st.integers(1, 7),
    depth=st.integers(1, 6),
    radius=st.integers(1, 300),
    pre_norm=st.booleans(),
    bias=st.booleans(),
    tied=st.booleans(),
    kind=st.sampled_from(["relu", "gelu", "gated-gelu", "gated-silu"]),
    copies=st.sampled_from([1, 2, 4, 8]),
)
def test_encoder_decoder_options_survive(every, depth, radius, pre_norm, bias, tied, kind, copies):
    options = ENCODER_DECODER | {
        "s4_every_n_layers": every,
        "num_layers": depth,
        "local_radius": radius,
        "normalize_before": pre_norm,
        "have_bias": bias,
        "tie_word_embeddings": tied,
        "feed_forward_proj": kind,
        "s4_n_ssm": copies,
    }
    config = config_from_official(options)
    assert config.ssm_layers == list(range(0, depth, every))
    assert config_from_official(config_to_official(config)).to_dict() == config.to_dict()
    assert config_to_official(config, options) == options


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (ENCODER_DECODER, {"s4_channels": 2}, "s4_channels"),
        (ENCODER_DECODER, {"s4_use_residual_dropout": True}, "s4_use_residual_dropout"),
        (ENCODER_DECODER, {"decoder_roberta_lm_head": True}, "decoder_roberta_lm_head"),
        (ENCODER_DECODER, {"feed_forward_proj": "tanh"}, "feed_forward_proj"),
        (ENCODER_DECODER, {"s4_every_n_layers": 0}, "s4_every_n_layers"),
        (ENCODER_DECODER, {"d_kv": 3}, "head_dim"),
        (ENCODER_DECODER, {"d_model": "wide"}, "d_model"),
        (LANGUAGE_MODEL, {"attention_type": "full"}, "attention_type"),
        (LANGUAGE_MODEL, {"decoder_normalize_before": False}, "decoder_normalize_before"),
        (LANGUAGE_MODEL, {"no_token_positional_embeddings": False}, "no_token_positional_embeddings"),
        (LANGUAGE_MODEL, {"layernorm_embedding": True}, "layernorm_embedding"),
        (LANGUAGE_MODEL, {"decoder_input_dim": 4}, "decoder_input_dim"),
        (LANGUAGE_MODEL, {"activation_fn": "gated-gelu"}, "activation_fn"),
        (LANGUAGE_MODEL, {"s4_local_combine": "gated"}, "s4_local_combine"),
        (LANGUAGE_MODEL, {"scale_heads": True}, "scale_heads"),
        (LANGUAGE_MODEL, {"adaptive_input": True}, "adaptive_softmax_cutoff"),
        (LANGUAGE_MODEL, ADAPTIVE | {"tie_adaptive_weights": False}, "tie_adaptive_weights"),
        (LANGUAGE_MODEL, ADAPTIVE | {"adaptive_input_cutoff": "6"}, "adaptive_input_cutoff"),
        (LANGUAGE_MODEL, ADAPTIVE | {"adaptive_softmax_cutoff": "six"}, "adaptive_softmax_cutoff"),
    ],
)
def test_unsupported_official_options_are_named(base, change, named):
    with pytest.raises(ValueError, match=named):
        variant_config(base | change)


def test_foreign_options_are_refused():
    with pytest.raises(ValueError, match="neither those of the official SPADE encoder-decoder"):
        config_from_official({"hidden_size": 8})
    with pytest.raises(ValueError, match="`vocab_size` is needed"):
        config_from_official(LANGUAGE_MODEL)
    assert is_language_model(LANGUAGE_MODEL) and not is_language_model(ENCODER_DECODER)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ssm_type", "s4d"),
        ("norm_type", "rmsnorm"),
        ("position_encoding", "rotary"),
        ("local_attention_type", "chunk"),
        ("ssm_combine", "gated"),
        ("ssm_combine", "add"),
        ("use_final_norm", True),
        ("embedding_norm", False),
        ("logits_scaling", 4.0),
        ("share_relative_bias", True),
        ("ssm_layers", []),
        ("ssm_layers", [1]),
        ("ssm_layers", [0, 1, 3]),
        ("ssm_max_length", 99),
        ("attention_dropout", 0.3),
        ("feed_forward_bias", False),
        ("decoder_window_size", 5),
    ],
)
def test_encoder_decoders_without_official_form_are_named(field, value):
    config = SpadeConfig.official(**{field: value})
    with pytest.raises(ValueError, match=f"`{field}="):
        config_to_official(config)
    with pytest.raises(ValueError, match=f"`{field}="):
        tensor_names(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ssm_type", "s4d"),
        ("ssm_combine", "gated"),
        ("norm_type", "rmsnorm"),
        ("share_relative_bias", False),
        ("norm_eps", 1e-6),
        ("pad_token_id", 0),
        ("logits_scaling", 4.0),
        ("ssm_stop_gradient", True),
    ],
)
def test_language_models_without_official_form_are_named(field, value):
    needed = {"ssm_stop_gradient": {"ssm_trainable": False}, "logits_scaling": {"adaptive_cutoffs": None}}
    extra = needed.get(field, {})
    config = SpadeLMConfig.official(**{field: value}, **extra)
    with pytest.raises(ValueError, match=f"`({field}|ssm_trainable)="):
        config_to_official(config)


def test_new_models_have_no_official_form():
    with pytest.raises(ValueError, match="no counterpart in the official SPADE"):
        config_to_official(SpadeConfig())
    with pytest.raises(ValueError, match="no"):
        config_to_official(SpadeLMConfig())
