"""SPADE: the encoder-decoder and the language model."""
