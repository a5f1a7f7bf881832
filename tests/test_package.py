"""The installed package: quick to import, and at work with nothing but torch, transformers and safetensors."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hf_hybrid
from hf_hybrid import public_names

EXTRAS = [
    "accelerate",
    "datasets",
    "evaluate",
    "google.protobuf",
    "hypothesis",
    "lm_eval",
    "matplotlib",
    "onnx",
    "pandas",
    "peft",
    "rouge_score",
    "sacrebleu",
    "scipy",
    "sentencepiece",
    "sklearn",
]


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def import_milliseconds() -> float:
    """Processor time that `import hf_hybrid` adds to `import transformers`, with what it pulls in."""
    code = (
        "import time, transformers; start = time.process_time(); import hf_hybrid; print(time.process_time() - start)"
    )
    return 1000 * float(run(code).stdout)


def test_import_is_quick() -> None:
    """Below 50 ms of the processor; the best of a few runs, as other work slows its caches."""
    best = float("inf")
    for _ in range(8):
        best = min(best, import_milliseconds())
        if best < 50:
            return
    pytest.fail(f"`import hf_hybrid` takes {best:.0f} ms beyond transformers")


def test_import_does_not_load_torch() -> None:
    code = """
import sys, transformers
before = set(sys.modules)
import hf_hybrid
new = set(sys.modules) - before
assert "torch" not in new, "torch"
assert not [name for name in new if name.startswith("transformers.models")], sorted(new)
ours = {name for name in new if name.startswith("hf_hybrid.")}
assert ours == {"hf_hybrid.auto", "hf_hybrid.public_names"}, ours
"""
    run(code)


@pytest.fixture(scope="module")
def bare_interpreter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Code that makes all optional packages impossible to import, and invisible to the library's own look-ups."""
    return f"""
import importlib.abc, importlib.metadata, importlib.util, sys
BLOCKED = {EXTRAS!r}

def is_blocked(name):
    return any(name == blocked or name.startswith(blocked + ".") for blocked in BLOCKED)

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if is_blocked(fullname):
            raise ModuleNotFoundError(f"No module named {{fullname!r}} (blocked)", name=fullname)

sys.meta_path.insert(0, Blocker())
real_find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if is_blocked(name) else real_find_spec(name, package)
"""


def test_works_without_any_extra(bare_interpreter: str, tmp_path: Path) -> None:
    """Build, train a step, generate, save and load with the three required packages alone."""
    code = f"""
{bare_interpreter}
import torch
import hf_hybrid
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
small = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_attention_heads=2, window_size=4, ssm_state_size=4)
seq2seq = hf_hybrid.SpadeConfig(**small, head_dim=8, num_hidden_layers=1, decoder_layers=1)
lm = hf_hybrid.SpadeLMConfig(**small, num_hidden_layers=1)
ids = torch.randint(3, 30, (2, 8))
for config, auto, name in ((seq2seq, AutoModelForSeq2SeqLM, "a"), (lm, AutoModelForCausalLM, "b")):
    model = auto.from_config(config)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained({str(tmp_path)!r} + name)
    loaded = auto.from_pretrained({str(tmp_path)!r} + name)
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
    assert type(AutoConfig.from_pretrained({str(tmp_path)!r} + name)) is type(config)
loaded = [name for name in sys.modules if is_blocked(name)]
assert not loaded, loaded
"""
    run(code)


def test_every_module_of_the_core_imports_without_extras(bare_interpreter: str) -> None:
    code = f"""
{bare_interpreter}
import importlib, pkgutil
import hf_hybrid
for area in ("ops", "layers", "configuration", "modeling", "conversion", "data", "tokenization", "training"):
    package = importlib.import_module(f"hf_hybrid.{{area}}")
    for module in pkgutil.walk_packages(package.__path__, f"hf_hybrid.{{area}}."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            # Modules for training may need their extra; they have to say which.
            assert area in ("data", "tokenization", "training") and "hf_hybrid[" in str(error), f"{{module.name}}: {{error}}"
"""
    run(code)


TRAINING_OPTIONS = {"output_dir": "run", "data": "text.txt"}
NEEDS_AN_EXTRA = {
    "demo": {"output_dir": "demo"},
    "evaluate": {**TRAINING_OPTIONS, "kind": "clm", "model_name_or_path": "model"},
    "generate": {"model_name_or_path": "model", "input_file": "text.csv"},
    "generate_lra": {"task": "listops", "output_dir": "listops"},
    "inspect_activations": {"model_name_or_path": "model", "output_dir": "pictures", "prompts": ["a"]},
    "lm_eval": ["--tasks", "blimp"],
    "train_synthetic": {"output_dir": "run", "arch": "mega"},
    "tokenize_text": {"data": "text.txt", "tokenizer": "tokenizer", "output_dir": "tokens"},
    "train_tokenizer": {"data": "text.txt", "output_dir": "tokenizer"},
    **dict.fromkeys(("finetune_glue", "finetune_summarization"), {**TRAINING_OPTIONS, "model_name_or_path": "model"}),
    **dict.fromkeys(("train_lra", "classify_image", "classify_audio"), {**TRAINING_OPTIONS, "arch": "mega"}),
    **dict.fromkeys(
        ("pretrain_clm", "pretrain_mlm", "pretrain_span_corruption", "finetune_translation"), TRAINING_OPTIONS
    ),
}


def test_recipes_explain_themselves_without_extras_and_name_the_missing_one(
    bare_interpreter: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("a b c\n" * 20)
    code = f"""
{bare_interpreter}
import contextlib, importlib, io, os
from hf_hybrid.recipes import list_recipes
os.chdir({str(tmp_path)!r})
for item in list_recipes():
    main = importlib.import_module(f"hf_hybrid.recipes.{{item.name}}").main
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(["--help"])
    except SystemExit as stopped:
        assert stopped.code == 0 and item.summary in printed.getvalue(), item.name
    options = {NEEDS_AN_EXTRA!r}.get(item.name)
    try:
        assert options is None or main(options) is None, item.name
    except ImportError as error:
        assert 'pip install "hf_hybrid[' in str(error), f"{{item.name}}: {{error}}"
assert os.listdir(".") == ["text.txt"], "something was begun"
"""
    run(code)


ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "model_cards").glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_public_names() -> None:
    """All of `__all__` exists, under its own name, and `dir` shows it; the documents use nothing else."""
    assert set(hf_hybrid.__all__) <= set(dir(hf_hybrid))
    for name in hf_hybrid.__all__:
        value = getattr(hf_hybrid, name)
        assert name == "__version__" or (value.__name__ == name and value.__doc__), name
    for path in DOCUMENTS:
        for names in re.findall(r"^\s*from hf_hybrid import ([^\n#]+)", path.read_text("utf-8"), flags=re.MULTILINE):
            assert set(re.findall(r"\w+", names)) <= set(hf_hybrid.__all__), path.name


def test_documents_import_from_the_package_itself() -> None:
    """Recipes are modules; only the page on benchmarks times parts of the library where they stand."""
    inner = re.compile(r"^\s*from hf_hybrid\.(?!recipes\b)[\w.]+ import [^\n]*", flags=re.MULTILINE)
    for path in DOCUMENTS:
        assert path.name == "all_benchmarks.md" or not inner.findall(path.read_text("utf-8")), path.name


def test_a_misspelt_name_is_recognised() -> None:
    for wrong, right in [
        ("HybridTrainr", "HybridTrainer"),
        ("hybridtrainer", "HybridTrainer"),
        ("add_loras", "add_lora"),
    ]:
        with pytest.raises(AttributeError, match=f"no attribute '{wrong}'. Did you mean '{right}'"):
            getattr(hf_hybrid, wrong)
    with pytest.raises(AttributeError, match="`dir.hf_hybrid.` lists"):
        hf_hybrid.something_else  # noqa: B018
    assert not hasattr(hf_hybrid, "__wrapped__")


def test_type_checkers_see_the_same_names() -> None:
    file = Path(hf_hybrid.__file__).with_suffix(".pyi")
    assert file.read_text("utf-8") == public_names.stub(), "run hf_hybrid.public_names.write_stub()"


def test_dependencies_are_few() -> None:
    required = {Requirement(line).name for line in requires("hf_hybrid") if "extra ==" not in line}
    assert required == {"torch", "transformers", "safetensors"}


def test_typed_and_versioned() -> None:
    assert (Path(hf_hybrid.__file__).parent / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", hf_hybrid.__version__)


def test_the_version_is_the_same_everywhere() -> None:
    root = Path(__file__).parents[1]
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text("utf-8"), flags=re.MULTILINE)
    newest = re.search(r"^## (\S+) \((.+)\)$", (root / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert cited and newest and cited[1] == newest[1] == hf_hybrid.__version__
    assert newest[2] == "unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", newest[2])
