"""Configuration classes, one module per architecture."""
