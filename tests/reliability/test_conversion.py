"""What if a published checkpoint holds more than tensors: it is refused, and nobody is told to execute it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from hf_hybrid.conversion.common import read_checkpoint_file


class Payload:
    """Creates a file when a pickle of it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle", "truncated", "text"])
def test_no_advice_to_execute_a_pickle(tmp_path, how):
    path, mark = tmp_path / "model.pt", tmp_path / "executed"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    elif how == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"weight": torch.zeros(3), "payload": Payload(mark)}, path)
        if how == "truncated":
            path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"model\.pt cannot be read as tensors and plain values") as caught:
        read_checkpoint_file(path)
    assert not mark.exists()
    for advice in ("weights_only", "add_safe_globals", "trusted source", "arbitrary code"):
        assert advice not in str(caught.value)
