"""Configuration of the gated moving average."""

from huggingface_hub.dataclasses import strict

from hf_hybrid.configuration.hybrid_config import HybridConfig


@strict
class GatedAverageConfig(HybridConfig):
    """A decoder of any length; `ema_size` is the number of averages per feature."""

    model_type = "gated_average"

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    ema_size: int = 4
    initializer_range: float = 0.02
    classifier_dropout: float | int = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
