"""The comparison with stored outputs of the official S4 and S4D code sees what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import s4_vectors
import torch
from check import read_vectors

FILES = sorted((Path(__file__).parent / "vectors" / "s4").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["output.unheard_of", "output64.kernel2"])
def test_unknown_output_is_refused(name: str) -> None:
    path = next(path for path in FILES if path.stem == "diag_lin_zoh")
    config, tensors = read_vectors(path)
    with pytest.raises(KeyError, match=name.partition(".")[2]):
        s4_vectors.check(path, config, {**tensors, name: torch.zeros(1)})


def test_wrong_value_is_seen() -> None:
    path = next(path for path in FILES if path.stem == "spade_causal")
    config, tensors = read_vectors(path)
    tensors["output64.kernel"] = tensors["output64.kernel"] + 1e-6
    rows = {name: (error, tolerance) for name, error, tolerance in s4_vectors.check(path, config, tensors)}
    assert rows["output64.kernel"][0] > rows["output64.kernel"][1]
    assert rows["output64.y64"][0] <= rows["output64.y64"][1]
