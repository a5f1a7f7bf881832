"""What several recipes share; the commands themselves are the modules of `hf_hybrid.recipes`."""
