"""The Block-State Transformer: layers, context filters, stack and heads."""
