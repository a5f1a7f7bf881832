"""Conversion of official checkpoints to this library and back, one module per architecture."""
