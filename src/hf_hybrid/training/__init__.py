"""Training helpers: parameter groups, Trainer subclasses, run folders."""
