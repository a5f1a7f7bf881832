"""Official checkpoints to ours and back, one module per architecture."""
