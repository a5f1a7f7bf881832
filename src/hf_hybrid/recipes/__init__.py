"""Complete tasks, each a `main(args) -> dict` that is also a command: `python -m hf_hybrid.recipes.<task>`."""
