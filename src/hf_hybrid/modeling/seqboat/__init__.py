"""SeqBoat: layers, router, stack and heads."""
