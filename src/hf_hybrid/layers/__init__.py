"""Modules with plain arguments, shared by several architectures. No module here sees a configuration class."""
