"""Code shared by several recipes; the commands themselves are the modules of `hf_hybrid.recipes`."""
