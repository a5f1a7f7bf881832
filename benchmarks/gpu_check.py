"""Checks this library on an accelerator and measures it against its peers, in one command and at most eight minutes.

    python benchmarks/gpu_check.py                                # on the accelerator of this machine
    python benchmarks/gpu_check.py --device cpu --small --no-page # the CPU stands in: tries the check itself

First the tests with the marker `gpu` (results of the CPU in float32 and bfloat16, generation, memory, compiled decoding steps),
then training steps and generation in bfloat16, in a process of their own. Writes `gpu_check.json` and the page
`docs/guides/gpu.md`. Exit status 1: a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 1024
SHARE_OF_TESTS = 0.5  # of the time, at most
SECONDS_PER_CASE = 60  # a contender that takes longer is given up
OUTCOME = re.compile(r"\S+\.py::(?P<name>test_.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b")

SIZES = {"hidden": 512, "layers": 4, "batch": 4, "length": 8192, "prompt": 2048, "new": 64, "repeats": 5}
SMALL_SIZES = {"hidden": 64, "layers": 1, "batch": 1, "length": 256, "prompt": 64, "new": 8, "repeats": 1}

INTRODUCTION = """# On a GPU

`make gpu-check` runs what this page is made from, in at most eight minutes: the tests with the marker `gpu`, at most half of the time, then training
steps and generation in bfloat16 against models of Transformers and, where it is installed, of flash-linear-attention, each at most a minute. It writes
`benchmarks/results/gpu/gpu_check.json`, after every result, and this page; what fails, hangs or is missing is named there, and the rest still runs.

What accelerators run is tested without one as well: every operation has its form for accelerators computed on a CPU
(`forced_branch("accelerator")`, [testing](../testing.md)), in all models, with the kernels and the values that a host would wait for
counted. A training or decoding step waits for none, and a compiled decoding step is one graph of fixed shapes and addresses in every model, as graphs
of CUDA need it ([generation](generation.md#compiled-steps)). Exceptions, once each: `generate` looks at the mask of the prompt, LongVQ asks in the
first two steps of a run whether its codebooks have started, and `position_ids` that mark several documents in a row are read.

`attn_implementation="flex_attention"` (SPADE, BST) uses FlexAttention for local attention; it has no dropout of attention weights.
Products inside state spaces are computed in float32, whatever `torch.set_float32_matmul_precision` says.

## Kernels

Operations that a step launches, as a multiple of those of Llama at the same depth (two layers; SPADE's encoder-decoder has three and two), without
padding. The numbers grow neither with the text nor with the batch, and tests hold them. The aims were 1.5 in training and 1.25 in decoding.

| model | training | decoding |
|---|---|---|
| SPADE encoder-decoder | 1.28 | 0.38 |
| with chunks, rotary positions and a local decoder with state spaces | 2.37 | 0.66 |
| SPADE-LM | 1.82 | 0.58 |
| SPADE-LM, published form (S4, adaptive softmax) | 1.85 | 1.04 |
| Mega | 1.84 | 0.74 |
| Mega in chunks, Laplace | 2.35 | 0.97 |
| SeqBoat | 2.10 | 1.17 |
| SeqBoat without a window, T5 buckets, feed-forward layers | 2.29 | 1.36 |
| LongVQ | 2.39 | 1.22 |
| LongVQ with two heads and S4D | 3.91 | 1.40 |
| BST | 2.00 | 1.08 |
| BST with learned filters | 1.36 | 0.79 |

Not reached in training, except by SPADE's encoder-decoder and by learned filters. What the mathematics needs there, per layer and with its
derivative (Llama has 105 kernels):

- A moving average (Mega, SeqBoat, LongVQ), about 85: 12 to discretise it in double precision, 13 for two levels of powers and their product, 9 for
  three transforms, their padding and layout; the rest is the derivative. A complex system (S4D in SPADE, BST and LongVQ) takes about 170: its discretisation
  has sines, its powers reduced phases.
- Gates of Mega and LongVQ, 20, of which 5 compute again what is not kept. Chunks and a Laplace function instead of a softmax, 65.
- SeqBoat packs tokens by their ranks, and unpacks their gradient, 30 (cumulative sums, a scatter, gathers); its attention pads and masks the stream, 48.
- LongVQ finds the nearest codewords and measures their use, 27; its attention takes 90, counts and means by code in each chunk twice, because they are not
  kept.

In decoding, SeqBoat without a window turns distances into buckets in every layer and has feed-forward layers besides its attention, and heads of LongVQ with S4D
step a complex state. A compiled step fuses most of these; what it launches has not been counted.

"""


# --------------------------------------------------------------------------------------------------------- contenders


def _spade_encoder(s: dict[str, int]) -> Any:
    from hf_hybrid import SpadeConfig
    from hf_hybrid.modeling.spade.modeling_spade import SpadeEncoderModel

    return SpadeEncoderModel(
        SpadeConfig(**_common(s), head_dim=64, decoder_layers=1, window_size=128, ssm_max_length=65536)
    )


def _longt5(s: dict[str, int]) -> Any:
    from transformers import LongT5Config, LongT5EncoderModel

    return LongT5EncoderModel(LongT5Config(**_t5(s), local_radius=127, encoder_attention_type="local"))


def _t5_encoder(s: dict[str, int]) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_t5(s)))


def _t5(s: dict[str, int]) -> dict[str, Any]:
    width, layers = s["hidden"], s["layers"]
    sizes = {"d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_layers": layers, "num_heads": max(1, width // 64)}
    return {"vocab_size": VOCABULARY, "dropout_rate": 0.0, **sizes}


def _common(s: dict[str, int]) -> dict[str, Any]:
    sizes = {"hidden_size": s["hidden"], "intermediate_size": 4 * s["hidden"], "num_hidden_layers": s["layers"]}
    return {"vocab_size": VOCABULARY, "num_attention_heads": max(1, s["hidden"] // 64), "hidden_dropout": 0.0, **sizes}


def _spade_lm(s: dict[str, int], implementation: str = "sdpa") -> Any:
    from hf_hybrid import SpadeLMConfig, SpadeLMForCausalLM

    model = SpadeLMForCausalLM(SpadeLMConfig(**_common(s), window_size=128))
    model.set_attn_implementation(implementation)
    return model


def _bst(s: dict[str, int], implementation: str = "sdpa") -> Any:
    from hf_hybrid import BstConfig, BstForCausalLM

    layers = {"bst_layers": [s["layers"] - 1]}
    model = BstForCausalLM(BstConfig(**_common(s), head_dim=64, block_size=128, attention_dropout=0.0, **layers))
    model.set_attn_implementation(implementation)
    return model


def _mega(s: dict[str, int]) -> Any:
    from hf_hybrid import MegaConfig, MegaForCausalLM

    sizes = {"hidden_size": s["hidden"], "intermediate_size": 2 * s["hidden"], "nffn_hidden_size": 2 * s["hidden"]}
    kind = {"is_decoder": True, "bidirectional": False, "use_chunking": True, "chunk_size": 128}
    return MegaForCausalLM(MegaConfig(vocab_size=VOCABULARY, num_hidden_layers=s["layers"], **sizes, **kind))


def _seqboat(s: dict[str, int]) -> Any:
    from hf_hybrid import SeqBoatConfig, SeqBoatForCausalLM

    sizes = {"hidden_size": s["hidden"], "value_dim": 2 * s["hidden"], "qk_dim": 128, "window_size": 128}
    return SeqBoatForCausalLM(
        SeqBoatConfig(vocab_size=VOCABULARY, num_hidden_layers=s["layers"], is_decoder=True, **sizes)
    )


def _longvq(s: dict[str, int]) -> Any:
    from hf_hybrid import LongVQConfig, LongVQForCausalLM

    sizes = {"hidden_size": s["hidden"], "value_size": 2 * s["hidden"], "intermediate_size": 2 * s["hidden"]}
    return LongVQForCausalLM(LongVQConfig(vocab_size=VOCABULARY, num_hidden_layers=s["layers"], **sizes))


def _llama(s: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlamaForCausalLM(LlamaConfig(**{name: _common(s)[name] for name in names}, max_position_embeddings=32768))


def _mamba2(s: dict[str, int]) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {
        "hidden_size": s["hidden"],
        "num_hidden_layers": s["layers"],
        "head_dim": 64,
        "state_size": 64,
        "n_groups": 1,
    }
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=VOCABULARY, num_heads=s["hidden"] * 2 // 64, **sizes))


def _fla(kind: str) -> Callable[[dict[str, int]], Any]:
    def build(s: dict[str, int]) -> Any:
        import fla.models as models

        sizes = {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"], "vocab_size": VOCABULARY}
        return getattr(models, f"{kind}ForCausalLM")(getattr(models, f"{kind}Config")(**sizes))

    return build


ENCODERS: dict[str, Callable[..., Any]] = {
    "SPADE encoder": _spade_encoder,
    "LongT5 local": _longt5,
    "T5, sdpa": _t5_encoder,
}
DECODERS: dict[str, Callable[..., Any]] = {
    "SPADE-LM": _spade_lm,
    "SPADE-LM, FlexAttention": lambda s: _spade_lm(s, "flex_attention"),
    "BST": _bst,
    "BST, FlexAttention": lambda s: _bst(s, "flex_attention"),
    "Mega, chunks of 128": _mega,
    "SeqBoat": _seqboat,
    "LongVQ": _longvq,
    "Llama, sdpa": _llama,
    "Mamba2 (Transformers)": _mamba2,
    "GLA (flash-linear-attention)": _fla("GLA"),
    "Mamba2 (flash-linear-attention)": _fla("Mamba2"),
}
CONTENDERS = ENCODERS | DECODERS


# -------------------------------------------------------------------------------------------------------- measurement


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a step, after two that are not counted."""
    times = []
    for number in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(
    build: Callable[..., Any], sizes: dict[str, int], device: torch.device, *, decodes: bool
) -> dict[str, Any]:
    """Tokens per second and bytes per token of a training step, and tokens per second of greedy generation."""
    torch.manual_seed(0)
    model = build(sizes).to(device, torch.bfloat16).train()
    ids = torch.randint(3, VOCABULARY, (sizes["batch"], sizes["length"]), device=device)
    labels = {"labels": ids} if decodes else {}

    def train() -> None:
        model.zero_grad(set_to_none=True)
        outputs = model(input_ids=ids, **labels)
        (outputs.loss if decodes else outputs.last_hidden_state.float().square().mean()).backward()

    has_memory = device.type == "cuda"
    if has_memory:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(train, device, sizes["repeats"])
    found: dict[str, Any] = {"train_tokens_per_second": ids.numel() / seconds}
    if has_memory:
        found["bytes_per_token"] = torch.cuda.max_memory_allocated(device) / ids.numel()
    if decodes:
        model.eval().zero_grad(set_to_none=True)
        prompt = ids[:, : sizes["prompt"]]
        settings: dict[str, Any] = {"max_new_tokens": sizes["new"], "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(prompt)
        with torch.no_grad():
            seconds = seconds_of(
                lambda: model.generate(prompt, attention_mask=mask, pad_token_id=0, **settings), device, 1
            )
        found["generated_tokens_per_second"] = len(prompt) * sizes["new"] / seconds
    return found


def measure_all(names: list[str], sizes: dict[str, int], device: torch.device) -> None:
    """The work of a process of its own: a line of JSON for each contender, in turn."""
    print(json.dumps({"ready": True}), flush=True)
    for name in names:
        try:
            if device.type == "cpu" and "FlexAttention" in name:
                found = {"not_measured": "FlexAttention has no gradients on a CPU"}
            else:
                found = measure(CONTENDERS[name], sizes, device, decodes=name in DECODERS)
        except ImportError as error:
            found = {"not_measured": f"{error.name or error} is not installed"}
        except Exception as error:  # one contender that fails does not hide the others
            message = str(error).splitlines()[0][:200] if str(error) else ""
            found = {"failed": f"{type(error).__name__}: {message}"}
        print(json.dumps({name: found}), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, which ends with the context, and so does everything that it has started."""
    settings = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **settings, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def lines_of(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """The lines that a process writes, as they come; None at their end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with suppress(ValueError):  # it is closed when the process is ended
            for line in process.stdout or ():
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run_cases(
    names: list[str], command: list[str], stop: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """All contenders, as long as there is time.

    Args:
        names: those to measure.
        command: program that measures the contenders whose names are appended; one that hangs or dies is started again
            with the next one.
        stop: moment at which nothing runs any more.
        keep: called with the results so far, whenever there is another one.
    """
    results: dict[str, dict[str, Any]] = {}
    while len(results) < len(names) and time.monotonic() < stop:
        left = [name for name in names if name not in results]
        with started([*command, *left]) as process:
            lines = lines_of(process)
            while left:
                limit = min(SECONDS_PER_CASE, stop - time.monotonic())
                try:
                    line = lines.get(timeout=max(0.0, limit))
                except queue.Empty:
                    if time.monotonic() < stop:
                        results[left[0]] = {"failed": f"took more than {SECONDS_PER_CASE} seconds"}
                    break
                if line is None:
                    results[left[0]] = {"failed": f"the process ended with status {process.wait()}"}
                    break
                if not line.startswith('{"'):
                    continue  # a library has something to say
                found = json.loads(line)
                if "ready" not in found:
                    results |= found
                    left.pop(0)
                    keep(results)
                    print(found, file=sys.stderr, flush=True)
        keep(results)
    return {name: results.get(name, {"not_measured": "the time was up"}) for name in names}


def run_tests(device: torch.device, seconds: float, chosen: str | None) -> dict[str, Any]:
    """The tests with the marker `gpu`: counts, and the names of those that failed; what ran before a stop counts too."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    command += ["tests/modeling/test_on_accelerator.py", *(["-k", chosen] if chosen else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if device.type == "cpu":
        environment["HF_HYBRID_CHECK_DEVICE"] = "cpu"
    start, outcomes, stopped = time.monotonic(), {}, None
    with started(command, env=environment) as process:
        lines = lines_of(process)
        while stopped is None:
            try:
                line = lines.get(timeout=max(0.0, start + seconds - time.monotonic()))
            except queue.Empty:
                stopped = f"after {seconds:.0f} seconds"
                break
            if line is None:
                break
            sys.stderr.write(line)
            found = OUTCOME.match(line)
            if found is not None:
                outcomes[found["name"]] = found["outcome"]
        if stopped is None:
            process.wait()
    if stopped is None and process.returncode not in (0, 1):
        stopped = f"as pytest ended with status {process.returncode}"
    record: dict[str, Any] = {
        "passed": sum(outcome == "PASSED" for outcome in outcomes.values()),
        "failed": [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")],
        "skipped": sum(outcome == "SKIPPED" for outcome in outcomes.values()),
        "seconds": round(time.monotonic() - start),
    }
    return record if stopped is None else record | {"stopped": stopped}


# ------------------------------------------------------------------------------------------------------------- report


def page_of(record: dict[str, Any] | None) -> str:
    """The page; None for the one that says that nothing was measured."""
    if record is None:
        return (
            INTRODUCTION + "**Not measured yet**: no figures of a GPU stand here, and there are no Triton kernels.\n"
        )
    tests, sizes = record["tests"], record["sizes"]
    outcome = f"{tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped"
    if "stopped" in tests:
        outcome += f", then stopped {tests['stopped']}"
    lines = [
        f"## {record['device']}",
        "",
        f"{record['time']}, PyTorch {record['torch']}, Transformers {record['transformers']}, commit {record['commit'][:10]}.",
        f"Tests: {outcome}, {tests['seconds']} s."
        + "".join(f"\n- failed: `{name}`" for name in tests.get("failed", ())),
        "",
        f"bfloat16, hidden {sizes['hidden']}, {sizes['layers']} layers, batch {sizes['batch']}, {sizes['length']} tokens; "
        f"generation of {sizes['new']} tokens after {sizes['prompt']}.",
        "",
        "| model | training, tokens/s | bytes per token | generation, tokens/s |",
        "|---|---|---|---|",
    ]
    for name, found in record["results"].items():
        reason = found.get("not_measured") or found.get("failed")
        keys = ("train_tokens_per_second", "bytes_per_token", "generated_tokens_per_second")
        cells = [f"{found[key]:,.0f}" if key in found else "–" for key in keys]
        lines.append(f"| {name} | {reason} | | |" if reason else f"| {name} | {' | '.join(cells)} |")
    return INTRODUCTION + "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the accelerator of this machine; cpu stands in for one")
    parser.add_argument("--seconds", type=float, default=460, help="time for everything; default 460")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the check itself")
    parser.add_argument("--tests", metavar="EXPRESSION", help="only the tests that match (pytest -k)")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "gpu", help="folder of the JSON file"
    )
    parser.add_argument("--no-page", action="store_true", help="leave docs/guides/gpu.md alone")
    parser.add_argument(
        "--cases", metavar="EXPRESSION", help="only the contenders whose names match (a regular expression)"
    )
    parser.add_argument("--measure", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device is None and not torch.accelerator.is_available():
        print("No accelerator was found. `--device cpu --small --no-page` tries the check itself.", file=sys.stderr)
        return 2
    begin = time.monotonic()
    device = torch.device(options.device) if options.device else torch.accelerator.current_accelerator()
    sizes = SMALL_SIZES if options.small else SIZES
    if options.measure:
        from hf_hybrid.ops.branches import forced_branch

        with forced_branch("accelerator") if device.type == "cpu" else nullcontext():
            measure_all(options.measure, sizes, device)
        return 0
    record = record_of(device, sizes)
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(results: dict[str, Any]) -> None:
        record["results"] = results
        (options.out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")

    record["tests"] = run_tests(device, SHARE_OF_TESTS * options.seconds, options.tests)
    keep({})
    command = [sys.executable, __file__, "--device", str(device), *(["--small"] if options.small else []), "--measure"]
    names = [name for name in CONTENDERS if re.search(options.cases or "", name)]
    keep(run_cases(names, command, begin + 0.95 * options.seconds, keep))
    if not options.no_page:
        (REPOSITORY / "docs" / "guides" / "gpu.md").write_text(page_of(record), encoding="utf-8")
    print(page_of(record).removeprefix(INTRODUCTION))
    return 1 if record["tests"]["failed"] or "stopped" in record["tests"] else 0


def record_of(device: torch.device, sizes: dict[str, int]) -> dict[str, Any]:
    """What is written beside the results: device, versions and sizes."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "time": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": commit,
        "sizes": sizes,
    }


if __name__ == "__main__":
    sys.exit(main())
