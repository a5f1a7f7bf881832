"""Generation: whatever the strategy and the way the text is cut, the cached run equals the run without a cache."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_variants, main_output, parametrize, random_ids
from hypothesis import given
from hypothesis import strategies as st
from transformers import set_seed

STRATEGIES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 10},
    "beam": {"num_beams": 3},
    "beam_returns": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam_sample": {"num_beams": 3, "do_sample": True},
}
SEQ2SEQ = all_variants("AutoModelForSeq2SeqLM")
CAUSAL = all_variants("AutoModelForCausalLM")
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int = 12, **kwargs) -> torch.Tensor:
    set_seed(3)
    return model.generate(**inputs, max_new_tokens=new_tokens, **kwargs)


def left_pad(rows: list[torch.Tensor], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch with padding in front, and its mask."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), pad), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask


class TestStrategies:
    @parametrize(SEQ2SEQ + CAUSAL)
    def test_cached_equals_uncached(self, case: Case) -> None:
        model = case.model()
        inputs = {"input_ids": random_ids(2, 9)}
        for name, strategy in STRATEGIES.items():
            cached = generate(model, inputs, use_cache=True, **strategy)
            uncached = generate(model, inputs, use_cache=False, **strategy)
            assert cached.tolist() == uncached.tolist(), name
            assert cached.shape[0] == 2 * strategy.get("num_return_sequences", 1)

    @parametrize(SEQ2SEQ + CAUSAL)
    def test_scores_of_each_step_equal_one_forward_pass(self, case: Case) -> None:
        """The scores `generate` works with are the logits of the whole text in one pass."""
        model = case.model()
        inputs = {"input_ids": random_ids(2, 9)}
        result = generate(
            model, inputs, return_dict_in_generate=True, output_logits=True, eos_token_id=None, do_sample=True
        )
        steps = torch.stack(result.logits, dim=1)
        if case.is_seq2seq:
            whole = model(**inputs, decoder_input_ids=result.sequences[:, :-1]).logits
        else:
            whole = model(input_ids=result.sequences[:, :-1]).logits[:, -steps.shape[1] :]
        torch.testing.assert_close(steps, whole, rtol=1e-5, atol=2e-5)


@parametrize(CAUSAL)
class TestLanguageModel:
    def test_any_split_of_the_text(self, case: Case) -> None:
        model = case.model()
        ids = random_ids(2, 21)
        expected = model(ids).logits

        @given(cuts=st.sets(st.integers(1, 20), max_size=6))
        def check(cuts: set[int]) -> None:
            past, parts = None, []
            for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 21]):
                outputs = model(ids[:, start:end], past_key_values=past, use_cache=True)
                past = outputs.past_key_values
                parts.append(outputs.logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)
            assert past.get_seq_length() == 21

        with torch.no_grad():
            check()

    def test_any_split_with_left_padding(self, case: Case) -> None:
        model = case.model()
        rows = [random_ids(1, length)[0] for length in (13, 8, 3)]
        ids, mask = left_pad(rows)
        expected = [model(row.unsqueeze(0)).logits[0] for row in rows]
        for cuts in ([], [1, 2, 7], [6, 12], list(range(1, 13))):
            past, parts = None, []
            for start, end in zip([0, *cuts], [*cuts, 13]):
                outputs = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
                past = outputs.past_key_values
                parts.append(outputs.logits)
            logits = torch.cat(parts, dim=1)
            for row, single in zip(logits, expected):
                torch.testing.assert_close(row[-len(single) :], single, **EXACT)

    def test_left_padded_batch_generates_like_single_rows(self, case: Case) -> None:
        model = case.model()
        rows = [random_ids(1, length)[0] for length in (9, 4, 1)]
        ids, mask = left_pad(rows)
        for beams in (1, 3):
            strategy = {"num_beams": beams, "eos_token_id": None}
            batch = generate(model, {"input_ids": ids, "attention_mask": mask}, 8, **strategy)
            for row, generated in zip(rows, batch):
                single = generate(model, {"input_ids": row.unsqueeze(0)}, 8, **strategy)
                assert generated[9:].tolist() == single[0, len(row) :].tolist()

    def test_chunked_prefill(self, case: Case) -> None:
        model = case.model()
        ids, mask = left_pad([random_ids(1, length)[0] for length in (17, 11)])
        inputs = {"input_ids": ids, "attention_mask": mask}
        expected = generate(model, inputs)
        for size in (1, 4, 16):
            assert generate(model, inputs, prefill_chunk_size=size).tolist() == expected.tolist()

    def test_continuation_with_the_returned_cache(self, case: Case) -> None:
        model = case.model()
        inputs = {"input_ids": random_ids(2, 7)}
        first = generate(model, inputs, 5, return_dict_in_generate=True, eos_token_id=None)
        turn = {"input_ids": torch.cat([first.sequences, random_ids(2, 3)], dim=1)}
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])  # a generated pad token is no padding
        continued = generate(model, turn, 6, past_key_values=first.past_key_values, eos_token_id=None)
        assert continued.tolist() == generate(model, turn, 6, eos_token_id=None).tolist()

    def test_inputs_embeds(self, case: Case) -> None:
        model = case.model()
        ids = random_ids(2, 7)
        embeds = model.get_input_embeddings()(ids)
        generated = generate(model, {"inputs_embeds": embeds})
        assert generated.tolist() == generate(model, {"input_ids": ids})[:, 7:].tolist()

    def test_logits_to_keep(self, case: Case) -> None:
        model = case.model()
        ids = random_ids(2, 7)
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])

    def test_size_of_the_state_is_constant(self, case: Case) -> None:
        model = case.model()
        if not getattr(model.config, "use_chunking", True) or getattr(model.config, "window_size", 1) is None:
            pytest.skip("attention to all past tokens keeps all of them")
        past, sizes = None, {}
        with torch.no_grad():
            for seen in range(
                10, 301, 10
            ):  # ends of the segments; a single token each compacts what prefill kept alive
                for length in (9, 1):
                    past = model(random_ids(2, length), past_key_values=past, use_cache=True).past_key_values
                sizes[seen] = cache_bytes(past)
        assert past.get_seq_length() == 300
        assert sizes[50] == sizes[300] > 0

    def test_what_cannot_be_rolled_back_is_refused(self, case: Case) -> None:
        model = case.model()
        inputs = {"input_ids": random_ids(1, 9)}
        with pytest.raises(ValueError, match="stateful"):
            generate(model, inputs, assistant_model=case.model())
        with pytest.raises(ValueError, match="stateful"):
            generate(model, inputs, prompt_lookup_num_tokens=2)
        for kind in ("quantized", "offloaded"):
            with pytest.raises(ValueError, match="`cache_implementation='.*constant size"):
                generate(model, inputs, cache_implementation=kind)


def cache_bytes(cache: object) -> int:
    """Bytes of all storages that the layers of a cache keep alive."""
    tensors = []
    for layer in cache.layers:
        tensors += [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        for states in vars(layer).values():
            if isinstance(states, dict):
                tensors += [value for value in states.values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@parametrize(SEQ2SEQ)
class TestEncoderDecoder:
    def test_incremental_logits_equal_teacher_forcing(self, case: Case) -> None:
        model = case.model()
        inputs, target = {"input_ids": random_ids(2, 9)}, random_ids(2, 14)
        expected = model(**inputs, decoder_input_ids=target).logits
        for cuts in (list(range(1, 14)), [5, 6, 11]):
            encoder_outputs, past, parts = model.get_encoder()(**inputs), None, []
            for start, end in zip([0, *cuts], [*cuts, 14]):
                outputs = model(
                    encoder_outputs=encoder_outputs,
                    decoder_input_ids=target[:, start:end],
                    past_key_values=past,
                    use_cache=True,
                )
                past = outputs.past_key_values
                parts.append(outputs.logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)

    def test_padded_sources_generate_like_single_rows(self, case: Case) -> None:
        model = case.model()
        rows = [random_ids(1, length)[0] for length in (9, 4, 1)]
        ids, mask = left_pad(rows)
        for side_ids, side_mask, beams in ((ids, mask, 1), (ids.flip(1), mask.flip(1), 3)):
            inputs = {"input_ids": side_ids, "attention_mask": side_mask}
            batch = generate(model, inputs, 6, eos_token_id=None, num_beams=beams)
            for row, keep, generated in zip(side_ids, side_mask.bool(), batch):
                single = generate(model, {"input_ids": row[keep].unsqueeze(0)}, 6, eos_token_id=None, num_beams=beams)
                assert generated.tolist() == single[0].tolist()

    def test_left_padded_decoder_prompts(self, case: Case) -> None:
        model = case.model()
        source = random_ids(2, 9)
        start = torch.tensor([model.config.decoder_start_token_id])
        rows = [torch.cat([start, random_ids(1, length)[0]]) for length in (5, 2)]
        prompts, mask = left_pad(rows, pad=model.config.pad_token_id)
        inputs = {"input_ids": source, "decoder_input_ids": prompts, "decoder_attention_mask": mask}
        batch = generate(model, inputs, eos_token_id=None)
        for index, row in enumerate(rows):
            single = {"input_ids": source[index : index + 1], "decoder_input_ids": row.unsqueeze(0)}
            logits = model(**{name: value[index : index + 1] for name, value in inputs.items()}).logits
            torch.testing.assert_close(logits[:, -len(row) :], model(**single).logits, **EXACT)
            generated = generate(model, single)
            length = generated.shape[1] - len(row)
            assert batch[index, 6 : 6 + length].tolist() == generated[0, len(row) :].tolist()

    def test_a_missing_start_token_stands_behind_the_padding(self, case: Case) -> None:
        """Transformers puts it in front of everything, where a state would go on through the padding."""
        model = case.model()
        source, start = random_ids(2, 9), model.config.decoder_start_token_id
        rows = [torch.tensor([start + 2, start + 3, start + 2]), torch.tensor([start + 3])]
        prompts, mask = left_pad(rows, pad=start + 1)
        inputs = {"input_ids": source, "decoder_input_ids": prompts, "decoder_attention_mask": mask}
        batch = generate(model, inputs, eos_token_id=None)
        for index, row in enumerate(rows):
            single = {"input_ids": source[index : index + 1], "decoder_input_ids": row.unsqueeze(0)}
            generated = generate(model, single, eos_token_id=None)[0]
            assert generated[0] == start and batch[index, 3 - len(row) :].tolist() == generated.tolist()

    def test_inputs_embeds(self, case: Case) -> None:
        model = case.model()
        ids = random_ids(2, 7)
        embeds = model.get_input_embeddings()(ids)
        assert generate(model, {"inputs_embeds": embeds}).tolist() == generate(model, {"input_ids": ids}).tolist()

    def test_candidates_of_prompt_lookup_and_assistant(self, case: Case) -> None:
        model = case.model()
        inputs = {"input_ids": random_ids(1, 9)}
        if not model._is_stateful:
            # Transformers 5.17 takes a start token that is also the end token for the end of the text.
            options = (
                {"eos_token_id": None} if model.config.decoder_start_token_id == model.config.eos_token_id else {}
            )
            expected = generate(model, inputs, **options).tolist()
            assert generate(model, inputs, prompt_lookup_num_tokens=3, **options).tolist() == expected
            assert generate(model, inputs, assistant_model=case.model(), **options).tolist() == expected
            return
        with pytest.raises(ValueError, match="stateful"):
            generate(model, inputs, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="stateful"):
            generate(model, inputs, assistant_model=case.model())

    def test_targets_longer_than_the_position_table(self, case: Case) -> None:
        if case.model_type != "spade":
            pytest.skip("only SPADE has a table of positions")
        has_table = case.config().max_target_positions is not None
        model = case.model(max_target_positions=16 if has_table else None)
        inputs = {"input_ids": random_ids(1, 5)}
        assert generate(model, inputs, 16, eos_token_id=None).shape[1] == 17
        if has_table:
            with pytest.raises(ValueError, match="max_target_positions"):
                generate(model, inputs, 17, eos_token_id=None)


@parametrize([case for case in SEQ2SEQ if case.variant.startswith("local_decoder")])
def test_size_of_a_local_decoder_state_is_constant(case: Case) -> None:
    model = case.model()
    encoder_outputs, past, sizes = model.get_encoder()(random_ids(2, 9)), None, {}
    with torch.no_grad():
        for seen in range(10, 301, 10):
            for length in (9, 1):
                target = random_ids(2, length)
                outputs = model(
                    encoder_outputs=encoder_outputs, decoder_input_ids=target, past_key_values=past, use_cache=True
                )
                past = outputs.past_key_values
            sizes[seen] = cache_bytes(past.self_attention_cache) + cache_bytes(past.cross_attention_cache)
    assert past.get_seq_length() == 300
    assert sizes[50] == sizes[300] > 0


@parametrize([case for case in SEQ2SEQ if not case.variant.startswith("local_decoder")][:2])
def test_static_cache_of_a_full_attention_decoder(case: Case) -> None:
    model = case.model()
    start = torch.tensor([model.config.decoder_start_token_id])
    rows = [torch.cat([start, random_ids(1, length)[0]]) for length in (5, 2)]
    prompts, mask = left_pad(rows, pad=model.config.pad_token_id)
    for inputs in ({}, {"decoder_input_ids": prompts, "decoder_attention_mask": mask}):
        inputs = inputs | {"input_ids": random_ids(2, 5)}
        assert generate(model, inputs, cache_implementation="static").tolist() == generate(model, inputs).tolist()


def test_perturbed_models_do_not_all_say_the_same() -> None:
    """The comparisons above mean something only if the outputs depend on the inputs."""
    for case in SEQ2SEQ + CAUSAL:
        model = case.model()
        inputs = case.inputs(batch=3)
        outputs = main_output(model(**inputs))
        assert (outputs[0] - outputs[1]).abs().max() > 0.1
        assert outputs.isfinite().all()
