"""Demonstration: from the text that every Python installation contains to a pretrained, fine-tuned and reloaded SPADE.

    python -m hf_hybrid.recipes.demo --output_dir demo-output

In about five minutes on two processor cores, without a download: collect docstrings and the language reference, train a
tokenizer, pretrain a small encoder-decoder by span corruption, fine-tune it to tell libraries apart and to write
summary lines (each compared with simple baselines), generate, and load the checkpoint in a fresh process. The folder
then holds the checkpoints with their model cards, `metrics.json` and `report.html`. All training uses the same recipes
as any other run.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from ..training.callbacks import TimeLimitCallback
from ..training.run_folder import describe_environment, write_json
from ..viz import plot_loss_curves, plot_state_space_channels
from . import finetune_glue, finetune_summarization, pretrain_span_corruption, train_tokenizer
from .support.demo_data import (
    CLASSIFICATION,
    CORPUS,
    SUMMARIZATION,
    DataPlan,
    classification_baselines,
    lead_summaries,
    read_rows,
    rouge,
    write_data,
)
from .support.demo_report import PICTURES, summary_lines, write_report
from .support.demo_samples import fill_in_examples, generate_texts, reload_in_clean_process, span_corruption_figures
from .support.finetuning_data import PREDICTIONS_FILE
from .support.options import parse_arguments, require
from .support.recipe import Recipe
from .support.runs import Job

logger = logging.getLogger(__name__)

OWN_DOCUMENT = (
    "The file is opened for reading and every line is passed to the function. Lines that are empty are skipped. "
    "If the file does not exist, an error is raised."
)


@dataclass
class DemoArguments:
    """The demonstration."""

    output_dir: str = field(default="demo-output", metadata={"help": "Folder to write; it must be new or empty."})
    seed: int = field(default=42, metadata={"help": "Random seed."})
    max_minutes: float = field(
        default=5.5,
        metadata={"help": "Time limit in minutes. On a slow machine training phases are cut short to meet it."},
    )
    quick: bool = field(
        default=False, metadata={"help": "Seconds instead of minutes: shows that everything works, learns nothing."}
    )

    def __post_init__(self) -> None:
        if not self.max_minutes > 0:
            raise ValueError(f"`max_minutes` must be positive; got {self.max_minutes}.")


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of one demonstration; the options of the phases are those of the recipes."""

    data: DataPlan
    tokenizer: Mapping[str, Any]
    model: Mapping[str, Any]
    pretraining: Mapping[str, Any]
    classification: Mapping[str, Any]
    summarization: Mapping[str, Any]


FULL_PLAN = DemoPlan(
    data=DataPlan(),
    tokenizer={"vocab_size": 2000, "num_sentinels": 48, "max_sentences": 30_000},
    model={
        "hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "intermediate_size": 384, "num_hidden_layers": 3, "decoder_layers": 1,
        "window_size": 17, "ssm_state_size": 16, "hidden_dropout": 0.0, "classifier_dropout": 0.3, "initializer_range": 0.08,
        "max_target_positions": 160,
    },
    pretraining={
        "input_length": 256, "noise_density": 0.3, "max_steps": 700, "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16, "max_validation_segments": 128, "learning_rate": 2e-3,
        "ssm_learning_rate": 2e-3, "eval_steps": 175, "logging_steps": 25,
    },
    classification={
        "max_length": 80, "num_train_epochs": 4, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3, "logging_steps": 50, "eval_strategy": "steps", "eval_steps": 200,
    },
    summarization={
        "max_source_length": 128, "max_target_length": 32, "num_train_epochs": 3, "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 48, "learning_rate": 2e-3, "logging_steps": 50, "no_repeat_ngram_size": 3,
        "eval_strategy": "no",
    },
)  # fmt: skip

QUICK_PLAN = DemoPlan(
    data=DataPlan(
        families=("numpy", "sklearn"), max_source_bytes=1_000_000, max_characters=60_000, max_per_class=75,
        max_pairs=24, max_evaluation=8,
    ),
    tokenizer={"vocab_size": 500, "num_sentinels": 32, "max_sentences": 1000},
    model={
        "hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1, "decoder_layers": 1,
        "window_size": 9, "ssm_state_size": 4, "hidden_dropout": 0.0, "max_target_positions": 64,
    },
    pretraining={
        "input_length": 64, "noise_density": 0.15, "max_steps": 4, "per_device_train_batch_size": 4,
        "max_validation_segments": 8, "eval_steps": 2, "logging_steps": 1,
    },
    classification={"max_length": 32, "max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1},
    summarization={
        "max_source_length": 64, "max_target_length": 12, "max_steps": 3, "per_device_train_batch_size": 8,
        "logging_steps": 1,
    },
)  # fmt: skip


class Clock:
    """The time that is left, and its division among the phases."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.start = time.monotonic()

    def elapsed(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.start) / 60

    def limit(self, share: float) -> float:
        """Minutes that a phase may take: a share of the time left, and always more than zero."""
        return max(share * (self.minutes - self.elapsed()), 0.05)


class Demo:
    """One demonstration: its folder, its clock and its measurements.

    Args:
        args: see `DemoArguments`.

    Raises:
        FileExistsError: the output folder is not empty.
    """

    def __init__(self, args: DemoArguments) -> None:
        self.args = args
        self.plan = QUICK_PLAN if args.quick else FULL_PLAN
        self.path = Path(args.output_dir)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(
                f"{self.path} exists and is not an empty folder. Remove it (rm -r {self.path}), or choose another one: "
                "`make demo DEMO_OUTPUT=another-folder`, or `--output_dir another-folder`."
            )
        self.clock = Clock(args.max_minutes)
        self.metrics: dict[str, Any] = {"seed": args.seed, "quick": args.quick, "environment": describe_environment()}
        self.samples: dict[str, Any] = {}
        self.phases: list[dict[str, Any]] = []
        self.pretrained: Job | None = None
        self.summarizer: Job | None = None

    def run(self) -> dict[str, Any]:
        """Run all phases; returns what `metrics.json` holds."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("Collect the embedded corpus", self.collect),
            ("Train a tokenizer", self.train_tokenizer),
            ("Pretrain a SPADE by span corruption", self.pretrain),
            ("Fine-tune: which library is this docstring from?", self.classify),
            ("Fine-tune: write the summary line of a docstring", self.summarize),
            ("Generate", self.generate),
            ("Load the checkpoint in a fresh process", self.reload),
            ("Write the report", self.report),
        ]
        self.path.mkdir(parents=True, exist_ok=True)
        for number, (title, step) in enumerate(steps, start=1):
            _say(f"\n=== {number}/{len(steps)}  {title}  [{60 * self.clock.elapsed():.0f} s] ".ljust(100, "="))
            self.phases.append({"name": title})
            started = time.monotonic()
            step()
            self.phases[-1]["seconds"] = round(time.monotonic() - started, 1)
        self.metrics["minutes"] = round(self.clock.elapsed(), 2)
        write_json(self.path / "metrics.json", self.metrics)
        _say("\n" + "\n".join(summary_lines(self.metrics, self.samples)))
        _say(f"\nReport: {(self.path / 'report.html').resolve()}")
        return self.metrics

    # ---------------------------------------------------------------------------------------------------- phases

    def collect(self) -> None:
        """Writes the data files of all three tasks."""
        self.metrics["data"] = write_data(self.path / "data", self.plan.data)
        _say(_indented(self.metrics["data"]))

    def train_tokenizer(self) -> None:
        """Trains a SentencePiece tokenizer on the pretraining text."""
        options = {"data": self.path / "data" / CORPUS / "train.jsonl", "num_threads": torch.get_num_threads()}
        self.metrics["tokenizer"] = train_tokenizer.main(
            {**options, "output_dir": self.path / "tokenizer", **self.plan.tokenizer}
        )
        _say(_indented(self.metrics["tokenizer"]))

    def pretrain(self) -> None:
        """Pretrains by span corruption; compares the loss with the entropy of the targets."""
        job, metrics = self._run_recipe(
            pretrain_span_corruption.RECIPE,
            "pretrained",
            0.5,
            data=self.path / "data" / CORPUS,
            tokenizer=self.path / "tokenizer",
            config_overrides=self.plan.model,
            **self.plan.pretraining,
        )
        self.pretrained = job
        metrics.update(span_corruption_figures(job))
        metrics["noise_density"] = self.plan.pretraining["noise_density"]
        metrics["window_size"] = job.model.config.window_size
        lines = {"unigram entropy of the targets": metrics["unigram_entropy"]}
        history = job.trainer.state.log_history
        plot_loss_curves(history, self._picture("pretraining"), reference_lines=lines, title="Span corruption")
        torch.manual_seed(self.args.seed)
        fresh = AutoModelForSeq2SeqLM.from_config(job.model.config)
        plot_state_space_channels(
            {"new layer": _first_ssm(fresh), "after pretraining": _first_ssm(job.model)}, self._picture("state_space")
        )
        self.metrics["pretraining"] = metrics
        _say(_indented({k: metrics[k] for k in ("eval_loss", "unigram_entropy", "text_loss", "text_entropy")}))

    def classify(self) -> None:
        """Classification with the GLUE recipe, compared with the majority class and Naive Bayes on the same text."""
        folder = self.path / "data" / CLASSIFICATION
        job, metrics = self._run_recipe(
            finetune_glue.RECIPE,
            "classifier",
            0.45,
            data=folder,
            model_name_or_path=self.path / "pretrained",
            **self.plan.classification,
        )
        metrics["baselines"] = classification_baselines(folder, self.args.seed)
        plot_loss_curves(job.trainer.state.log_history, self._picture("classification"), title="Classification")
        self.metrics["classification"] = metrics
        _say(_indented({"accuracy": metrics["eval_accuracy"], **metrics["baselines"]}))

    def summarize(self) -> None:
        """Summarization with its recipe, compared with the first words of the document."""
        folder = self.path / "data" / SUMMARIZATION
        job, metrics = self._run_recipe(
            finetune_summarization.RECIPE,
            "summarizer",
            0.5,
            data=folder,
            model_name_or_path=self.path / "pretrained",
            **self.plan.summarization,
        )
        self.summarizer = job
        leads, words = lead_summaries(folder)
        rows = read_rows(folder / "validation.jsonl")
        metrics["baselines"] = {"lead_words": words, **rouge(leads, [row["summary"] for row in rows])}
        plot_loss_curves(job.trainer.state.log_history, self._picture("summarization"), title="Summarization")
        self.metrics["summarization"] = metrics
        written = read_rows(self.path / "summarizer" / PREDICTIONS_FILE)
        self.samples["summaries"] = [
            {**row, "lead": lead, "generated": prediction["prediction"]}
            for row, lead, prediction in list(zip(rows, leads, written))[:: max(1, len(rows) // 6)][:6]
        ]
        scores = {"model": metrics["eval_rougeL"], f"first {words} words": metrics["baselines"]["rougeL"]}
        _say(_indented({f"ROUGE-L, {name}": value for name, value in scores.items()}))

    def generate(self) -> None:
        """Hidden spans filled in by the pretrained model; summaries by beam search and by sampling."""
        assert self.pretrained is not None and self.summarizer is not None
        self.samples["fill_ins"] = fill_in_examples(self.pretrained, count=3)
        document = next((row["document"] for row in self.samples["summaries"]), OWN_DOCUMENT)
        self.samples["generated"] = []
        for name, options in (
            ("greedy", {}),
            ("4 beams", {"num_beams": 4}),
            ("sampling", {"do_sample": True, "top_p": 0.9}),
        ):
            torch.manual_seed(self.args.seed)
            texts = generate_texts(self.summarizer, [OWN_DOCUMENT, document], **options)
            self.samples["generated"] += [
                {"method": name, "document": source, "text": text} for source, text in zip([OWN_DOCUMENT, document], texts)
            ]  # fmt: skip
        for sample in self.samples["generated"]:
            _say(f"  [{sample['method']}] {sample['document'][:70]}... -> {sample['text']}")

    def reload(self) -> None:
        """Save and load: compares logits and generated ids of a fresh process with those of the model in memory."""
        assert self.summarizer is not None
        documents = [OWN_DOCUMENT, *(row["document"] for row in self.samples["summaries"][:3])]
        self.metrics["reload"] = reload_in_clean_process(self.summarizer, documents, self.path / "reload")
        _say(_indented({k: self.metrics["reload"][k] for k in ("logits_equal", "generated_equal")}))

    def report(self) -> None:
        """Checks, sizes, `metrics.json` and `report.html`."""
        self.metrics["phases"] = self.phases
        self.metrics["peak_memory_mb"] = _peak_memory_mb()
        self.metrics["folder_megabytes"] = {
            folder.name: round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 2)
            for folder in sorted(self.path.iterdir())
            if folder.is_dir()
        }
        self.metrics["checks"] = _checks(self.metrics)
        self.metrics["minutes"] = round(self.clock.elapsed(), 2)
        write_json(self.path / "metrics.json", self.metrics)
        write_json(self.path / "samples.json", self.samples)
        write_report(self.path, self.metrics, self.samples)

    # ---------------------------------------------------------------------------------------------------- helpers

    def _picture(self, name: str) -> Path:
        return self.path / PICTURES / f"{name}.png"

    def _run_recipe(self, recipe: Recipe, folder: str, share: float, **options: Any) -> tuple[Job, dict[str, Any]]:
        """Runs a training recipe as its `main` does, and returns its job."""
        jobs: list[Job] = []

        def build(*groups: Any) -> Job:
            started = time.monotonic()
            jobs.append(recipe.build(*groups))
            for callback in jobs[0].trainer.callback_handler.callbacks:
                if isinstance(callback, TimeLimitCallback):  # reading and tokenizing count towards the phase
                    callback.seconds = max(3.0, callback.seconds - (time.monotonic() - started))
            return jobs[0]

        options = {
            "output_dir": self.path / folder,
            "seed": self.args.seed,
            "max_minutes": self.clock.limit(share),
            "save_strategy": "no",
            "report_to": "none",
            "log_level": "warning",
            **options,
        }
        metrics = replace(recipe, build=build).train(options)
        state = jobs[0].trainer.state
        cut_short = state.global_step < state.max_steps
        if cut_short:
            _say(f"  cut short by the time limit: {state.global_step} of {state.max_steps} steps")
        metrics.update(planned_steps=state.max_steps, cut_short=cut_short)
        self.phases[-1].update(
            steps=state.global_step,
            planned_steps=state.max_steps,
            cut_short=cut_short,
            seconds_per_step=metrics["train_runtime"] / max(1, state.global_step),
            tokens_per_second=metrics["input_tokens_seen"] / max(metrics["train_runtime"], 1e-9),
        )
        return jobs[0], metrics


def _checks(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims of the demonstration, each with its measurement."""
    loss, entropy = metrics["pretraining"]["eval_loss"], metrics["pretraining"]["unigram_entropy"]
    accuracy, baselines = metrics["classification"]["eval_accuracy"], metrics["classification"]["baselines"]
    summaries = metrics["summarization"]
    lead = summaries["baselines"]["rougeL"]
    return [
        {
            "claim": "The span-corruption loss is clearly below the unigram entropy of the targets (by 10 % or more)",
            "passed": loss < 0.9 * entropy,
            "measured": f"{loss:.3f} against {entropy:.3f} nats per token",
        },
        {
            "claim": "The classifier beats the majority class",
            "passed": accuracy > baselines["majority"],
            "measured": f"{accuracy:.1%} against {baselines['majority']:.1%}",
        },
        {
            "claim": "The classifier beats Naive Bayes on words and pairs of words",
            "passed": accuracy > max(baselines["naive_bayes"], baselines["naive_bayes_default"]),
            "measured": f"{accuracy:.1%} against {baselines['naive_bayes']:.1%} (smoothing chosen by cross-validation) "
            f"and {baselines['naive_bayes_default']:.1%} (default smoothing)",
        },
        {
            "claim": "The summaries beat the first words of the document (ROUGE-L)",
            "passed": summaries["eval_rougeL"] > lead,
            "measured": f"{summaries['eval_rougeL']:.1f} against {lead:.1f}",
        },
        {
            "claim": "A fresh process loads the checkpoint and computes the same logits, bit for bit",
            "passed": metrics["reload"]["logits_equal"] and metrics["reload"]["generated_equal"],
            "measured": metrics["reload"]["description"],
        },
    ]


def _first_ssm(model: torch.nn.Module) -> torch.nn.Module:
    from ..layers.ssm import StateSpaceLayer

    return next(module for module in model.modules() if isinstance(module, StateSpaceLayer)).cpu()


def _peak_memory_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (1e6 if sys.platform == "darwin" else 1e3), 1)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _indented(values: Mapping[str, Any]) -> str:
    return "\n".join(
        f"  {name.replace('_', ' ')}: {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )


@contextlib.contextmanager
def _temporary_dataset_cache() -> Iterator[None]:
    """Keeps the tables that `datasets` prepares out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="hf_hybrid-demo-", ignore_cleanup_errors=True) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before
            datasets.enable_progress_bars()


def main(args: DemoArguments | Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        args: command-line arguments, a mapping of options, a `DemoArguments`, or None for `sys.argv`.

    Returns:
        The content of `metrics.json`.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError: an option is out of range, or the installation contains too little text.
        ImportError: a package of the extra `train` is missing.
    """
    options = args if isinstance(args, DemoArguments) else parse_arguments((DemoArguments,), args, __doc__)[0]
    require("The demonstration", "accelerate", "datasets", "matplotlib", "sentencepiece", "sklearn", extra="train")
    demo = Demo(options)
    with _temporary_dataset_cache():
        return demo.run()


def command_line() -> None:
    """`main` for a shell: a folder that is not empty ends in a message instead of a traceback."""
    try:
        main()
    except FileExistsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    command_line()
