"""SPADE against the local-attention encoders of Transformers, its growth with length, and its decoding step.

Encoders: hidden 512, 4 layers, 8 heads of 64, feed-forward 2,048 without gate, dropout 0, batch 1, float32. A train step
is forward and backward of the sum of the last hidden states.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

VOCABULARY = 1000


def _token_ids(length: int):
    import torch

    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def _spade_encoder(**overrides):
    import torch

    from hf_hybrid.configuration.configuration_spade import SpadeConfig
    from hf_hybrid.modeling.spade.modeling_spade import SpadeEncoderModel

    torch.manual_seed(0)
    config = SpadeConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "head_dim": 64,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "decoder_layers": 1,
            "num_attention_heads": 8,
            "window_size": 128,
            "feed_forward_proj": "relu",
            "ssm_max_length": 65536,
            "hidden_dropout": 0.0,
            **overrides,
        }
    )
    return SpadeEncoderModel(config)


def _train_step(model, length: int) -> Callable[[], object]:
    model.train()
    token_ids = _token_ids(length)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(token_ids).last_hidden_state.sum().backward()

    return step


def spade_train(length: int) -> Callable[[], object]:
    return _train_step(_spade_encoder(), length)


def spade_train_checkpointed(length: int) -> Callable[[], object]:
    model = _spade_encoder()
    model.activation_checkpointing_enable()
    return _train_step(model, length)


def spade_forward(length: int) -> Callable[[], object]:
    import torch

    model, token_ids = _spade_encoder().eval(), _token_ids(length)

    def step() -> object:
        with torch.no_grad():
            return model(token_ids).last_hidden_state

    return step


def _longt5(kind: str):
    from transformers import LongT5Config, LongT5EncoderModel

    config = LongT5Config(
        vocab_size=VOCABULARY,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=4,
        num_heads=8,
        local_radius=127,
        global_block_size=16,
        encoder_attention_type=kind,
        feed_forward_proj="relu",
        dropout_rate=0.0,
    )
    return LongT5EncoderModel(config)


def longt5_local(length: int) -> Callable[[], object]:
    return _train_step(_longt5("local"), length)


def longt5_transient_global(length: int) -> Callable[[], object]:
    return _train_step(_longt5("transient-global"), length)


def led(length: int) -> Callable[[], object]:
    from transformers import LEDConfig, LEDModel

    config = LEDConfig(
        vocab_size=VOCABULARY,
        d_model=512,
        encoder_layers=4,
        decoder_layers=1,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        attention_window=[256] * 4,
        max_encoder_position_embeddings=length,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    return _train_step(LEDModel(config).encoder, length)


def check_encoder(length: int) -> None:
    """With dense attention in place of the blocked form, the encoder gives the same."""
    from unittest import mock

    import torch

    from hf_hybrid.modeling.spade import local_self_attention as layer
    from hf_hybrid.ops.local_attention import local_attention_reference

    def dense(*states, dropout_p, **options):
        return local_attention_reference(*states, **options)

    model, token_ids = _spade_encoder().eval(), _token_ids(min(length, 1024))
    with torch.no_grad():
        actual = model(token_ids).last_hidden_state
        with mock.patch.object(layer, "local_attention", dense):
            expected = model(token_ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _spade_lm():
    import torch

    from hf_hybrid.configuration.configuration_spade import SpadeLMConfig
    from hf_hybrid.modeling.spade.spade_lm_heads import SpadeLMForCausalLM

    torch.manual_seed(0)
    config = SpadeLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        window_size=128,
        hidden_dropout=0.0,
    )
    return SpadeLMForCausalLM(config).eval()


def _prefill(model, token_ids):
    """Cache after a prompt, read in pieces of bounded size."""
    cache = None
    for piece in token_ids.split(2048, dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
    return cache


def decode_step(context: int) -> Callable[[], object]:
    import torch

    model = _spade_lm()
    with torch.no_grad():
        cache = _prefill(model, _token_ids(context))
    token = torch.full((1, 1), 5)

    def step() -> object:
        with torch.no_grad():
            return model(token, past_key_values=cache, use_cache=True).logits

    return step


def check_decode(context: int) -> None:
    import torch

    model, token_ids = _spade_lm(), _token_ids(context)
    with torch.no_grad():
        expected = model(token_ids).logits[:, -1]
        cache = _prefill(model, token_ids[:, :-1])
        actual = model(token_ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def tokens(length: int) -> tuple[int, str]:
    return length, "tokens"


CASES = (
    Case(
        name="spade-encoder-train",
        timed="train step of the SPADE encoder (S4D in the bottom layer), radius 127",
        build="spade_train",
        sizes=({"length": 2048}, {"length": 8192}),
        check="check_encoder",
        work="tokens",
        peers=(
            Peer("LongT5 local, radius 127", "longt5_local", at_least=1.0),
            Peer("LongT5 transient-global", "longt5_transient_global", at_least=2.2),
            Peer("LED, window 256", "led", at_least=1.3),
        ),
    ),
    Case(
        name="spade-encoder-growth",
        timed="forward of the SPADE encoder without gradient, against the half length",
        build="spade_forward",
        sizes=tuple({"length": 2**power} for power in range(11, 17)),
        check="check_encoder",
        work="tokens",
        growth_at_most=2.2,
    ),
    Case(
        name="spade-encoder-train-growth",
        timed="train step of the SPADE encoder with gradient checkpointing, against the half length",
        build="spade_train_checkpointed",
        sizes=tuple({"length": 2**power} for power in range(12, 17)),
        check="check_encoder",
        work="tokens",
        growth_at_most=2.2,
    ),
    Case(
        name="spade-lm-decode",
        timed="one decoding step of a SPADE language model (hidden 512, 4 layers, radius 127) after a context",
        build="decode_step",
        sizes=({"context": 512}, {"context": 32768}),
        check="check_decode",
        growth_at_most=1.15,
    ),
)
