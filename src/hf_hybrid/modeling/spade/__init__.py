"""SPADE (arXiv 2212.08136): the encoder-decoder, and the decoder-only language model.

Both use `local_self_attention`, `feed_forward`, the mixer in `spade_layers` and the states in `spade_cache`.
Encoder-decoder: layers in `spade_layers`, stacks in `modeling_spade`, heads in `spade_heads`.
Language model: layers and stack in `modeling_spade_lm`, heads in `spade_lm_heads`.
"""
