"""Configuration classes, one module per architecture, and what they share: base class, checks and lengths."""
