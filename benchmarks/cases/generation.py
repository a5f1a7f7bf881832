"""Decoding after a long source, greedily and with beams, against the local-attention encoder-decoder of Transformers.

Encoder-decoders: hidden 512, 1 encoder and 4 decoder layers, 8 heads of 64 (Mega: one of 128), feed-forward 2,048, vocabulary 8,000,
float32. A step decodes 48 tokens for 2 sources of 4,096 tokens, which were encoded before.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

VOCABULARY, ROWS, SOURCE, NEW = 8000, 2, 4096, 48


def _spade():
    import torch

    from hf_hybrid.configuration.configuration_spade import SpadeConfig
    from hf_hybrid.modeling.spade.spade_heads import SpadeForConditionalGeneration

    torch.manual_seed(0)
    config = SpadeConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        head_dim=64,
        intermediate_size=2048,
        num_hidden_layers=1,
        decoder_layers=4,
        num_attention_heads=8,
        window_size=128,
        feed_forward_proj="relu",
        ssm_max_length=SOURCE,
    )
    return SpadeForConditionalGeneration(config).eval()


def _mega():
    import torch

    from hf_hybrid.configuration.configuration_mega import MegaConfig
    from hf_hybrid.modeling.mega.mega_seq2seq import MegaForConditionalGeneration

    torch.manual_seed(0)
    config = MegaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=1,
        decoder_layers=4,
        intermediate_size=1024,
        nffn_hidden_size=2048,
        shared_representation_size=128,
        is_encoder_decoder=True,
        use_chunking=True,
        chunk_size=128,
        decoder_start_token_id=2,
        pad_token_id=0,
    )
    return MegaForConditionalGeneration(config).eval()


def _longt5():
    import torch
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    torch.manual_seed(0)
    config = LongT5Config(
        vocab_size=VOCABULARY,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=4,  # not timed; Transformers takes it for the number of layers of the cache
        num_decoder_layers=4,
        num_heads=8,
        local_radius=127,
        encoder_attention_type="local",
        feed_forward_proj="relu",
        decoder_start_token_id=0,
    )
    return LongT5ForConditionalGeneration(config).eval()


def _decoding(model, beams: int, rows: int = ROWS, source: int = SOURCE, new: int = NEW, **options):
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    ids = torch.randint(3, VOCABULARY, (rows, source), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_states = model.get_encoder()(ids).last_hidden_state

    def step() -> object:
        return model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden_states),
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            **options,
        )

    return step


def spade(beams: int) -> Callable[[], object]:
    return _decoding(_spade(), beams)


def mega(beams: int) -> Callable[[], object]:
    return _decoding(_mega(), beams)


def longt5(beams: int) -> Callable[[], object]:
    return _decoding(_longt5(), beams)


def _check(model) -> None:
    """Tokens and scores equal those with a source that is repeated for every beam and reordered with them."""
    from unittest import mock

    import torch
    from transformers.generation import GenerationMixin

    step = _decoding(model, 4, source=512, new=12, return_dict_in_generate=True, output_scores=True)
    found = step()

    def reorder(cache, indices):
        cache.reorder_cache(indices)
        return cache

    expand = GenerationMixin._expand_inputs_for_generation.__get__(model)
    with (
        mock.patch.object(model, "_expand_inputs_for_generation", expand),
        mock.patch.object(model, "_reorder_cache", reorder, create=True),
    ):
        expected = step()
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


def check_spade(beams: int) -> None:
    _check(_spade())


def check_mega(beams: int) -> None:
    _check(_mega())


def tokens(beams: int) -> tuple[int, str]:
    return ROWS * NEW, "tokens"


def memory_of_spade(beams: int) -> int:
    """Keys and values of the source in 4 layers, once per source, and half as much for everything else."""
    return ROWS * SOURCE * 512 * 2 * 4 * 4 * 3 // 2


CASES = (
    Case(
        name="spade-beams",
        timed="48 tokens for 2 encoded sources of 4,096 tokens, SPADE, 4 decoder layers",
        build="spade",
        sizes=({"beams": 1}, {"beams": 4}),
        check="check_spade",
        work="tokens",
        memory_at_most="memory_of_spade",
        peers=(Peer("LongT5 local, radius 127", "longt5", at_least=5.0, floor_from=2),),
    ),
    Case(
        name="spade-beams-growth",
        timed="48 tokens for 2 encoded sources of 4,096 tokens, SPADE: 4 beams against greedy",
        build="spade",
        sizes=({"beams": 1}, {"beams": 4}),
        check="check_spade",
        work="tokens",
        growth_at_most=2.0,
    ),
    Case(
        name="mega-beams-growth",
        timed="48 tokens for 2 encoded sources of 4,096 tokens, Mega: 4 beams against greedy",
        build="mega",
        sizes=({"beams": 1}, {"beams": 4}),
        check="check_mega",
        work="tokens",
        growth_at_most=2.0,
    ),
)
