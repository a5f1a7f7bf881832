"""Memory grows linearly with the length of the input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from factories import Case, all_heads

MEASURE = """
import sys
sys.path.insert(0, {folder!r})
import torch
from factories import Case
torch.set_num_threads(2)
model = Case(*{case!r}).model({settings}).train()

def peak_of(length):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far, that of the imports included
    ids = torch.randint(3, 40, (1, length))
    target = dict(decoder_input_ids=ids[:, :8]) if {is_seq2seq} else {{}}
    outputs = model(input_ids=ids, **target)
    outputs[0].float().square().mean().backward()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))

base, short, long = (peak_of(length) for length in (1024, 16384, 65536))
print((long - base) / (short - base))
"""


SETTINGS = {
    "spade": ["intermediate_size=48", "ssm_type='s4', ssm_max_length=32768", "local_attention_type='chunk'"],
    "mega": [
        "use_chunking=True, chunk_size=64",
        "use_chunking=True, chunk_size=64, attention_activation='laplace', bidirectional=False, is_decoder=True",
    ],
}
SETTINGS["bst"] = [
    "block_size=64, context_variant='mf'",
    "block_size=64, ssm_type='unstructured', ssm_filter_length=1024",
]
SETTINGS["seqboat"] = ["window_size=64", "is_decoder=True, position_bias='distance', attention_activation='relu2'"]
SETTINGS["longvq"] = ["window_size=32, chunk_size=64, codebook_size=64"]
SETTINGS["spade_lm"] = SETTINGS["spade"]
CASES = [(case, text) for case in all_heads() if case.auto_name == "AutoModel" for text in SETTINGS[case.model_type]]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "settings"), CASES, ids=lambda value: getattr(value, "model_type", value))
def test_training_memory_is_linear_in_the_length(case: Case, settings: str) -> None:
    """Four times the input, from 16,384 to 65,536 tokens, takes at most 4.4 times the memory above that of 1,024."""
    code = MEASURE.format(
        folder=str(Path(__file__).parent),
        case=(case.model_type, case.auto_name, case.variant),
        settings=settings,
        is_seq2seq=case.is_seq2seq,
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 4.4
