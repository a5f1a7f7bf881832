"""Pure tensor functions: the numerical core. Depends on torch alone."""
