"""What the comparison with stored SPADE outputs knows of the official module."""

from __future__ import annotations

import torch
from spade_vectors import _post_c

from hf_hybrid.configuration.configuration_spade import SpadeLMConfig
from hf_hybrid.modeling.spade.spade_lm_heads import SpadeLMForCausalLM
from hf_hybrid.ops.s4 import truncate_c


def test_a_truncated_matrix_is_doubled_like_the_official_one():
    config = SpadeLMConfig.official(
        vocab_size=20, d_model=4, d_ff=4, num_layers=1, num_heads=1, adaptive_cutoffs=None, ssm_state_size=8
    )
    layer = SpadeLMForCausalLM(config).double().model.layers[0].mixer.ssm
    system = layer.dplr_system(torch.float64)
    expected = truncate_c(layer.C, system, 40)
    with torch.no_grad():
        layer.C.copy_(truncate_c(layer.C, system, 10))
        layer.kernel_length.fill_(10)
        assert _post_c(layer, 64, 9)[1] == 10
        actual, length = _post_c(layer, 64, 33)
    assert length == 40
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-10, atol=1e-10)
