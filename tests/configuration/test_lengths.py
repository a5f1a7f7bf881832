"""The lengths that configurations state, against what their models do."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_heads, all_variants, parametrize, random_ids
from transformers import BertConfig, PreTrainedConfig, T5Config
from word_tokenizer import word_tokenizer

from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.configuration.lengths import (
    check_source_length,
    check_target_length,
    max_source_length,
    max_target_length,
    room_for,
)
from hf_hybrid.recipes.support.models import make_room, set_longest_input

CASES = all_variants()
SIMPLE = {"relative_positional_bias": "simple"}
DECODER = {"is_decoder": True, "bidirectional": False}


def runs(case: Case, model: torch.nn.Module, source: int, target: int) -> bool:
    """Whether the model accepts inputs and targets of these lengths; it refuses others by a ValueError."""
    inputs = {"input_ids": random_ids(1, source)}
    if case.is_seq2seq:
        inputs["decoder_input_ids"] = random_ids(1, target)
    try:
        with torch.no_grad():
            model(**inputs)
    except ValueError:
        return False
    return True


@parametrize(CASES)
def test_the_stated_lengths_are_those_of_the_model(case: Case) -> None:
    sizes = {"max_positions": 7, "max_target_positions": 7, "distance_table_size": 7}
    config = case.config()
    sizes = {name: size for name, size in sizes.items() if getattr(config, name, None) is not None}
    if getattr(config, "use_chunking", False):
        sizes["max_positions"] = config.chunk_size + 1
    model = case.model(**sizes)
    source, target = model.config.max_source_length(), model.config.max_target_length()
    assert runs(case, model, source or 50, target or 50)
    if source is not None:
        assert not runs(case, model, source + 1, target or 1)
    if case.is_seq2seq and target is not None:
        assert not runs(case, model, source or 1, target + 1)


@parametrize(all_heads() + all_heads(other_inputs=True))
def test_a_field_that_other_programs_take_for_a_limit_is_one(case: Case) -> None:
    config = case.config()
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    assert not any(hasattr(config, name) for name in names)


@pytest.mark.parametrize(
    ("fields", "source", "target"),
    [
        ({}, {}, {}),
        (SIMPLE, {"max_positions": 2048}, {"max_positions": 2048}),
        ({**SIMPLE, **DECODER, "max_positions": 30}, {"max_positions": 30}, {"max_positions": 30}),
        ({**SIMPLE, "use_chunking": True, "chunk_size": 16}, {}, {}),
        ({**SIMPLE, "chunk_size": 16}, {"rel_bias_table_size": 16}, {"rel_bias_table_size": 16}),
        ({**SIMPLE, "rel_bias_table_size": 40}, {"rel_bias_table_size": 40}, {"rel_bias_table_size": 40}),
        (
            {**SIMPLE, "is_encoder_decoder": True, "max_positions": 50, "max_target_positions": 20},
            {"max_positions": 50, "cross_bias_table_size": 50},
            {"max_target_positions": 20, "cross_bias_table_size": 50},
        ),
        (
            {**SIMPLE, "is_encoder_decoder": True, "max_positions": 50, "use_chunking": True, "chunk_size": 10},
            {"cross_bias_table_size": 50},
            {"cross_bias_table_size": 50},
        ),
        (
            {**SIMPLE, "is_encoder_decoder": True, "rel_bias_table_size": 30, "cross_bias_table_size": 20},
            {"rel_bias_table_size": 30, "cross_bias_table_size": 20},
            {"rel_bias_table_size": 30, "cross_bias_table_size": 20},
        ),
    ],
)
def test_tables_of_mega(fields: dict, source: dict[str, int], target: dict[str, int]) -> None:
    config = MegaConfig(**fields)
    assert (config.source_limits(), config.target_limits()) == (source, target)
    wider = MegaConfig(**fields | room_for(config, 3000))
    assert all(limit >= 3000 for limit in wider.source_limits().values())


@pytest.mark.parametrize(
    ("config", "source", "target"),
    [(BertConfig(max_position_embeddings=64), 64, 64), (T5Config(), None, None)],
)
def test_configurations_of_transformers(config: PreTrainedConfig, source: int | None, target: int | None) -> None:
    assert (max_source_length(config), max_target_length(config)) == (source, target)


def test_what_is_too_long_is_refused_by_the_field() -> None:
    config = MegaConfig(**SIMPLE, max_positions=30)
    check_source_length(config, 30, "Inputs", "block_length")
    with pytest.raises(ValueError, match="Texts have up to 31 tokens.*`max_positions`.*Lower `cut`.*max_positions=31"):
        check_source_length(config, 31, "Texts", "cut")
    with pytest.raises(ValueError, match="Texts have up to 31 tokens.*`max_positions`"):
        check_target_length(config, 31, "Texts", "cut")


def test_seqboat_reads_the_former_name_of_its_table() -> None:
    config = SeqBoatConfig.from_dict({"max_position_embeddings": 17, "position_bias": "distance"})
    assert config.distance_table_size == 17 and not hasattr(config, "max_position_embeddings")
    assert "max_position_embeddings" not in config.to_dict()


def test_a_new_model_gets_room_unless_the_user_chose_its_size() -> None:
    config = MegaConfig(**SIMPLE, max_positions=30)
    with pytest.raises(ValueError, match="`max_positions`"):
        make_room(config, 40, {"max_positions": 30}, "max_length")
    make_room(config, 40, {}, "max_length")
    assert config.max_source_length() == 40


@parametrize(CASES)
def test_saved_tokenizers_say_how_long_an_input_may_be(case: Case) -> None:
    tokenizer, config = word_tokenizer(model_max_length=3), case.config()
    set_longest_input(tokenizer, config)
    ids = tokenizer("w5 " * 600, truncation=True)["input_ids"]
    assert len(ids) == (config.max_source_length() or 600)
