"""The activated state space against its recurrence: both directions, padding, pieces, precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_hybrid.modeling.longvq import s4d
from hf_hybrid.modeling.longvq.s4d import ActivatedS4D

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def recurrence(layer: ActivatedS4D, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token by token in complex numbers."""
    rate = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    decay = (layer.log_dt.exp().unsqueeze(-1) * rate).exp()
    drive, output = (decay - 1) / rate, torch.view_as_complex(layer.C.detach())
    inputs = states * mask.unsqueeze(-1)

    def run(sequence: torch.Tensor, rows: slice) -> torch.Tensor:
        state, found = torch.zeros(states.shape[0], layer.hidden_size, layer.state_size // 2, dtype=decay.dtype), []
        for token in sequence.unbind(1):
            state = decay[rows] * state + drive[rows] * token.unsqueeze(-1)
            found.append(2 * (output[rows] * state).real.sum(-1))
        return torch.stack(found, dim=1)

    size = layer.hidden_size
    total = run(inputs, slice(0, size))
    if layer.bidirectional:
        total = total + run(inputs.flip(1), slice(size, None)).flip(1)
    return F.silu(total + layer.omega * states)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("scan_length", [10**6, 4])
def test_follows_the_recurrence(bidirectional: bool, scan_length: int, monkeypatch) -> None:
    monkeypatch.setattr(s4d, "_SCAN_LENGTH", scan_length)
    layer = ActivatedS4D(3, 6, bidirectional=bidirectional).double()
    states, mask = torch.randn(2, 37, 3, dtype=torch.float64), torch.rand(2, 37) > 0.2
    expected = recurrence(layer, states, mask)
    torch.testing.assert_close(layer(states, mask)[0], expected, **TIGHT)
    whole = recurrence(layer, states, torch.ones(2, 37))
    torch.testing.assert_close(layer(states)[0], whole, **TIGHT)


@pytest.mark.parametrize("scan_length", [10**6, 4])
def test_pieces_equal_the_whole(scan_length: int, monkeypatch) -> None:
    monkeypatch.setattr(s4d, "_SCAN_LENGTH", scan_length)
    layer = ActivatedS4D(3, 4).double()
    states = torch.randn(2, 20, 3, dtype=torch.float64)
    expected, final = layer(states, return_state=True)
    state, parts = None, []
    for start, stop in ((0, 1), (1, 7), (7, 8), (8, 20)):
        output, state = layer(states[:, start:stop], initial_state=state, return_state=True)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **TIGHT)
    torch.testing.assert_close(state, final, **TIGHT)
    assert final.shape == (2, 3, 2, 2)


def test_precision_and_bad_arguments() -> None:
    layer = ActivatedS4D(4, 4).bfloat16()
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    states = torch.randn(1, 9, 4)
    output = layer(states.bfloat16())[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(states)[0], rtol=3e-2, atol=3e-2)
    with pytest.raises(ValueError, match="`state_size` even"):
        ActivatedS4D(4, 3)
    with pytest.raises(ValueError, match="has no state"):
        ActivatedS4D(4, 4, bidirectional=True)(states, return_state=True)
