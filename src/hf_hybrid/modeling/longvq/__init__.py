"""LongVQ: layers, quantizer, stack and heads."""
