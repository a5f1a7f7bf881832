"""LongVQ (arXiv 2404.11163).

`longvq_layers` holds the gated mixer and the feed-forward layer; `quantizer` the codebooks; `s4d` the diagonal state
space; `longvq_cache` the state kept between calls; `longvq_outputs` the output classes; `modeling_longvq` the stack;
`longvq_heads` all heads.
"""
