"""Exports load, compute, save and run in pipelines where this package does not exist; what was tampered with is refused."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from clean_process import run_without_package
from factories import VARIANTS, VOCABULARY, Case, all_heads, main_output, one_of_each_kind, parametrize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, pipeline

from hf_hybrid import remote_code
from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.hub import MANIFEST_FILE, export_remote_code, push_folder, verify_export
from hf_hybrid.processing.audio_processing import WaveformFeatureExtractor
from hf_hybrid.processing.image_processing import PixelSequenceImageProcessor

HEADS = all_heads() + all_heads(other_inputs=True)
KEPT = one_of_each_kind(HEADS)  # the default suite; the others are marked as wide
PROCESSORS = {
    "AutoModelForImageClassification": PixelSequenceImageProcessor,
    "AutoModelForAudioClassification": WaveformFeatureExtractor,
}
# Head -> pipeline, what it reads, how it is called.
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 2, "do_sample": False}
PIPELINES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "AutoModelForCausalLM": ("text-generation", ["w3 w4 w5", "w8"], SETTINGS),
    "AutoModelForMaskedLM": ("fill-mask", "w3 w4 <mask> w6", {"top_k": 2}),
    "AutoModelForSequenceClassification": ("text-classification", ["w3 w4 w5", "w8"], {"top_k": None}),
    "AutoModelForTokenClassification": ("token-classification", "w3 w4 w5", {"ignore_labels": []}),
    "AutoModel": ("feature-extraction", "w3 w4 w5", {}),
    "AutoModelForImageClassification": ("image-classification", None, {"top_k": 2}),
    "AutoModelForAudioClassification": ("audio-classification", None, {"top_k": 2}),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<mask>": 3} | {f"w{index}": index for index in range(4, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def name_of(case: Case) -> str:
    return f"{case.model_type}-{case.auto_name}"


def export(case: Case, folder: Path, tokenizer: Any = None) -> Path:
    processor = PROCESSORS.get(case.auto_name)
    return export_remote_code(
        case.model(), folder, None if processor else tokenizer, processor=processor() if processor else None
    )


@pytest.fixture(scope="module")
def heads(request: pytest.FixtureRequest) -> list[Case]:
    """The heads that the selected tests ask for, so that none is exported in vain."""
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    asked = {call["case"] for call in calls if "case" in call}
    asked |= {case for call in calls for case in call.get("cases", ())}
    return [case for case in HEADS if case in asked]


@pytest.fixture(scope="module")
def exports(
    heads: list[Case], tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """An export of each head, with inputs and what the package computes from them."""
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for case in heads:
        found[name_of(case)] = export(case, folder / name_of(case), tokenizer)
        inputs = case.inputs()
        # Loaded from the same file: where weights lie in memory can change the order of a sum.
        model = getattr(transformers, case.auto_name).from_pretrained(found[name_of(case)])
        assert type(model) is case.model_class
        with torch.no_grad():
            torch.save((inputs, main_output(model(**inputs))), folder / f"{name_of(case)}.pt")
    return found


IN_CLEAN_PROCESS = """
import torch, transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
def compute(folder, auto_name, inputs):
    model = getattr(transformers, auto_name).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        outputs = model(**inputs)
    if "start_logits" in outputs:
        return model, torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)
    return model, outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]

answer = {}
for name, (folder, auto_name) in arguments.items():
    inputs, expected = torch.load(folder + ".pt")
    model, computed = compute(folder, auto_name, inputs)
    again = folder + "-again"
    model.save_pretrained(again)
    references = transformers.AutoConfig.from_pretrained(again, trust_remote_code=True).auto_map
    classes = {auto: get_class_from_dynamic_module(reference, again) for auto, reference in references.items()}
    answer[name] = {
        "same": torch.equal(computed, expected),
        "again": torch.equal(compute(again, auto_name, inputs)[1], expected),
        "heads": sorted(found.__name__ for auto, found in classes.items() if auto != "AutoConfig"),
    }
"""


@pytest.fixture(scope="module")
def elsewhere(heads: list[Case], exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = {name_of(case): (str(exports[name_of(case)]), case.auto_name) for case in heads}
    return run_without_package(IN_CLEAN_PROCESS, tmp_path_factory.mktemp("modules"), arguments)


@parametrize(HEADS, kept=KEPT)
def test_an_export_computes_the_same_without_the_package(case: Case, elsewhere: dict[str, Any]) -> None:
    """Bitwise equal; saved again from there and reloaded, still, and no head is lost on that way."""
    expected = {"same": True, "again": True, "heads": sorted(case.architecture.heads.values())}
    assert elsewhere[name_of(case)] == expected


@parametrize(HEADS, kept=KEPT)
def test_an_export_holds_what_it_needs_and_no_more(case: Case, exports: dict[str, Path]) -> None:
    folder = exports[name_of(case)]
    files = {path.name for path in folder.iterdir()}
    assert all(path.is_file() for path in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *case.architecture.heads}
    assert "_name_or_path" not in config and "README.md" in files
    roots = {reference.split(".")[0] for reference in config["auto_map"].values()}
    if case.auto_name in PROCESSORS:
        (reference,) = json.loads((folder / "preprocessor_config.json").read_text())["auto_map"].values()
        roots.add(reference.split(".")[0])
    reached, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            text = (folder / f"{name}.py").read_text()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1 and node.module and "." not in node.module
                    waiting.append(node.module)
            assert not re.search(r"^\s*(from|import) hf_hybrid", text, flags=re.MULTILINE)
    assert {f"{name}.py" for name in reached} == {name for name in files if name.endswith(".py")}
    assert verify_export(folder) == verify_export(folder)


def test_files_that_end_alike_get_names_of_their_own() -> None:
    files = remote_code.remote_code(SMALL.architecture).files
    assert {"local_attention.py", "local_self_attention.py"} <= files.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: found.model_type)
def test_code_is_the_same_each_time(architecture: Any) -> None:
    assert remote_code.remote_code(architecture) == remote_code.remote_code(architecture)


# ----------------------------------------------------------------------------------------------------------- pipelines


def pipeline_input(case: Case) -> tuple[str, Any, dict[str, Any]]:
    task, text, settings = PIPELINES[case.auto_name]
    generator = np.random.default_rng(0)
    if case.auto_name == "AutoModelForImageClassification":
        return task, generator.integers(0, 255, (6, 7)).tolist(), settings
    if case.auto_name == "AutoModelForAudioClassification":
        return task, generator.normal(size=50).tolist(), settings
    return task, text, settings


PIPELINES_IN_CLEAN_PROCESS = """
import numpy, transformers
answer = {}
for name, (folder, task, given, settings) in arguments.items():
    if task in ("image-classification", "audio-classification"):
        given = numpy.array(given, dtype="uint8" if task.startswith("image") else "float32")
    if task == "image-classification":
        from PIL import Image
        given = Image.fromarray(given)
    run = transformers.pipeline(task, model=folder, trust_remote_code=True)
    assert type(run.model).__module__.startswith("transformers_modules.")
    answer[name] = run(given, **settings)
"""


# The stock pipelines know no encoder-decoders but those that classify.
IN_PIPELINES = [
    case for case in HEADS if case.auto_name in PIPELINES and not (case.is_seq2seq and case.auto_name == "AutoModel")
]


@pytest.mark.parametrize(
    "cases",
    [
        [case for case in IN_PIPELINES if case in KEPT],
        pytest.param([case for case in IN_PIPELINES if case not in KEPT], marks=pytest.mark.wide),
    ],
    ids=["kept", "wide"],
)
def test_pipelines_run_without_the_package(cases: list[Case], exports: dict[str, Path], tmp_path: Path) -> None:
    arguments = {name_of(case): (str(exports[name_of(case)]), *pipeline_input(case)) for case in cases}
    found = run_without_package(PIPELINES_IN_CLEAN_PROCESS, tmp_path, arguments)
    for name, (folder, task, given, settings) in arguments.items():
        if task == "image-classification":
            from PIL import Image

            given = Image.fromarray(np.array(given, dtype="uint8"))
        elif task == "audio-classification":
            given = np.array(given, dtype="float32")
        expected = json.loads(json.dumps(pipeline(task, model=folder)(given, **settings), default=float))
        assert found[name] == expected, name


# ----------------------------------------------------------------------------------------------------------- bad input

SMALL = Case("spade_lm", "AutoModelForCausalLM", next(iter(VARIANTS["spade_lm"])))

WITHOUT_TRUST = """
import sys, transformers
answer = []
for auto_name in ("AutoModelForCausalLM", "AutoConfig"):
    for trust in (None, False):
        try:
            getattr(transformers, auto_name).from_pretrained(arguments, trust_remote_code=trust)
        except ValueError as error:
            answer.append("trust_remote_code=True" in str(error))
answer.append(not any(name.startswith("transformers_modules.") for name in sys.modules))
"""


def test_without_trust_nothing_is_executed(tmp_path: Path) -> None:
    folder = export(SMALL, tmp_path / "export")
    marker = tmp_path / "executed"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'w').close()\n" + path.read_text())
    modules = tmp_path / "modules"
    modules.mkdir()
    assert run_without_package(WITHOUT_TRUST, modules, str(folder)) == [True] * 5
    assert not marker.exists() and not list(modules.rglob("*.py"))


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"`folder` .* not an empty folder"):
        export(SMALL, tmp_path / "export")
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "notes.txt"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_code, "write_manifest", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export(SMALL, tmp_path / "export")
    assert not any(tmp_path.iterdir())


def test_models_of_others_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ValueError, match="must be a model of hf_hybrid .*spade.*BertModel"):
        export_remote_code(transformers.BertModel(config), tmp_path / "export")
    adapted = peft.get_peft_model(SMALL.model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="with adapters: merge them first"):
        export_remote_code(adapted, tmp_path / "export")
    with pytest.raises(ValueError, match="`processor` must be an image processor"):
        export_remote_code(SMALL.model(), tmp_path / "export", processor=object())
    with pytest.raises(ValueError, match="card is not valid"):
        export_remote_code(SMALL.model(), tmp_path / "export", card="# no header")
    assert not any(tmp_path.iterdir())


def test_only_shared_models_are_pushed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model folder"):
        push_folder(tmp_path, "somebody/name")
    folder = export(SMALL, tmp_path / "run")
    (folder / "checkpoint-1").mkdir()
    (folder / "training_args.bin").touch()
    with pytest.raises(ValueError, match="holds checkpoint-1, training_args.bin, which do not belong"):
        push_folder(folder, "somebody/name")


def tamper(folder: Path, how: str) -> None:
    name = "config.json"
    if how == "changed code":
        name = "modeling_spade_lm.py"
        (folder / name).write_text((folder / name).read_text() + "import os\n")
    elif how == "changed weights":
        contents = bytearray((folder / "model.safetensors").read_bytes())
        contents[-1] ^= 1
        (folder / "model.safetensors").write_bytes(contents)
    elif how == "added code":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text("")
    elif how == "missing":
        (folder / name).unlink()
    elif how == "manifest":
        path = folder / MANIFEST_FILE
        path.write_text(path.read_text() + "nonsense\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("changed code", "modeling_spade_lm.py was changed"),
        ("changed weights", "model.safetensors was changed"),
        ("added code", "custom_generate/generate.py was added"),
        ("missing", "config.json is missing"),
        ("manifest", "Line .* the manifest was changed"),
    ],
)
def test_a_tampered_export_is_refused(tmp_path: Path, how: str, message: str) -> None:
    folder = export(SMALL, tmp_path / "export")
    digest = verify_export(folder)
    assert verify_export(folder, digest) == digest
    tamper(folder, how)
    with pytest.raises(ValueError, match=message):
        verify_export(folder)


def test_the_digest_protects_the_manifest_and_the_card_may_change(tmp_path: Path, caplog: Any) -> None:
    folder = export(SMALL, tmp_path / "export")
    digest = verify_export(folder)
    (folder / "README.md").write_text("better words")
    assert verify_export(folder, digest) == digest and "model card" in caplog.text
    (folder / "config.json").write_text("{}")
    remote_code.write_manifest(folder)  # as somebody would who knows how
    verify_export(folder)
    with pytest.raises(ValueError, match="the manifest has the digest"):
        verify_export(folder, digest)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="has no manifest"):
        verify_export(folder)


def test_the_manifest_is_read_by_the_usual_command(tmp_path: Path) -> None:
    folder = export(SMALL, tmp_path / "export")
    if sys.platform != "linux":
        pytest.skip("sha256sum is a command of GNU")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST_FILE], cwd=folder, check=True)


def test_imports_that_cannot_be_flattened_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("from . import cache", "import hf_hybrid.modeling", "from ..ops import s4"):
        specification = remote_code.importlib.util.find_spec("hf_hybrid.modeling.cache")
        monkeypatch.setattr(type(specification.loader), "get_source", lambda self, name, text=text: f"\n{text}\n")
        with pytest.raises(RuntimeError, match=r"Line 2 of `hf_hybrid.modeling.cache` cannot be flattened"):
            remote_code._read_source("hf_hybrid.modeling.cache")
        monkeypatch.undo()
