"""An architecture that this library has never heard of, registered by its record alone, passes the suites of the others.

`gated_average` is a package of its own, a moving average with a gate. The suites run as they are in a process in which it was
imported first: they find it in `ARCHITECTURES`, and nothing in `src/` knows it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent
# What the architecture gets -> the suite that checks it.
SUITES = {
    "conformance to Transformers": "conformance/test_models.py",
    "generation": "modeling/test_generation.py",
    "outputs of generation": "modeling/test_generation_outputs.py",
    "caches that it cannot take": "modeling/test_refused_caches.py",
    "segments of documents": "modeling/test_carried_state.py",
    "padding": "modeling/test_padding.py",
    "packed documents": "modeling/test_packed_documents.py",
    "outputs": "modeling/test_outputs.py",
    "bad input": "modeling/test_bad_input.py",
    "lengths": "configuration/test_lengths.py",
    "training": "modeling/test_training.py",
    "saving and loading": "modeling/test_save_load.py",
    "LoRA": "modeling/test_peft.py",
    "parameter groups and Trainer": "training/test_parameter_groups.py",
    "label smoothing": "training/test_label_smoothing.py",
    "recipes": "recipes/test_train_synthetic.py",
    "export with its code": "hub/test_remote_code.py",
    "model card": "test_model_card.py",
    "Auto classes": "test_auto.py",
}
RESULT = re.compile(r"^(PASSED|FAILED|ERROR) (?:\.\./)?(?:tests/)?([\w/]+\.py)::", re.MULTILINE)


def environment() -> dict[str, str]:
    """Variables of a process that finds the package."""
    paths = [str(FOLDER), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def report() -> str:
    """Output of the suites, for this architecture alone."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "--show-capture=no"]
    command += ["-p", "no:cacheprovider", "-p", "gated_average_plugin", "-k", "gated_average or GatedAverage"]
    command += ["-m", "not slow and not gpu and not network"]  # the wide cases too
    done = subprocess.run(
        [*command, *(str(TESTS / suite) for suite in SUITES.values())],
        env=environment(),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("what", SUITES)
def test_it_passes_the_suite(report: str, what: str) -> None:
    results = [result for result, suite in RESULT.findall(report) if SUITES[what] == suite.removeprefix("tests/")]
    assert results, "the suite has no test of it"
    assert set(results) == {"PASSED"}, report[-8000:]


def test_nothing_in_the_library_knows_it() -> None:
    sources = (TESTS.parent / "src").rglob("*.py")
    assert not [path for path in sources if re.search("gated_?average", path.read_text("utf-8"), re.IGNORECASE)]


@pytest.mark.parametrize(
    "imports",
    [
        "from gated_average.gated_average_heads import GatedAverageModel",
        "from transformers import AutoModel; import gated_average",
    ],
)
def test_registration_in_any_order_of_imports(imports: str) -> None:
    """In a fresh process, whichever module was imported first."""
    check = "from transformers import AutoConfig, AutoModel; config = AutoConfig.for_model('gated_average')"
    code = f"{imports}\n{check}\nassert type(AutoModel.from_config(config)).__module__.startswith('gated_average.')"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
