"""Model classes, one module per architecture."""
