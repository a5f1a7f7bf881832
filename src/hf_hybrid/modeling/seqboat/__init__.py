"""SeqBoat (arXiv 2306.11197).

`seqboat_layers` holds embeddings, the sparsely activated unit and the feed-forward layer; `router` decides which
tokens are active; `seqboat_cache` is the state kept between calls; `seqboat_outputs` the output classes;
`modeling_seqboat` the stack; `seqboat_heads` all heads.
"""
