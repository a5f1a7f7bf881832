"""Mega (arXiv 2209.10655).

`mega_layers` holds embeddings, gated attention, cross-attention and feed-forward layer; `mega_cache` the state kept
between calls; `modeling_mega` the stack; `mega_seq2seq` the encoder-decoder; `mega_heads` all other heads.
"""
