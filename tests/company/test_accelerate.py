"""accelerate: weights kept on disk or on the CPU until their module runs give what weights in memory give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from factories import Case, all_heads, main_output, parametrize
from works_with import working

pytestmark = pytest.mark.company

HEADS = working("accelerate", all_heads() + all_heads(other_inputs=True))


@parametrize(HEADS)
def test_weights_on_disk(case: Case, tmp_path: Path) -> None:
    model, inputs = case.model(), case.inputs()
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    offloaded = case.model_class.from_pretrained(tmp_path / "model", **options).eval()
    with torch.no_grad():
        expected, found = main_output(model(**inputs)), main_output(offloaded(**inputs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@parametrize(HEADS)
def test_weights_elsewhere_until_their_module_runs(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    with torch.no_grad():
        expected = main_output(model(**inputs))
        found = main_output(cpu_offload(model, execution_device=torch.device("cpu"))(**inputs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
