"""The Block-State Transformer (arXiv 2306.09539).

`bst_layers` holds attention, context states and the layer that joins them; `context_filters` the filters that compute
the states; `bst_cache` the state kept between calls; `modeling_bst` the stack; `bst_heads` all heads.
"""
