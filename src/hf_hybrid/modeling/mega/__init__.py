"""Mega: layers, stack, heads and encoder-decoder."""
