"""Continue, fine-tune and use a small checkpoint, in about five minutes.

A small pretrained SPADE reads new documentation, learns to tell libraries apart, and writes summary lines.

    python -m hf_hybrid.recipes.demo --output_dir demo-output

In about five minutes on two processor cores, without a download: open `checkpoints/spade-small`, see what it fills in, continue
its pretraining on the documentation of libraries that it has not seen, fine-tune it to tell libraries apart and to write summary
lines (each compared with simple baselines), generate, and load the checkpoint in a fresh process. The folder then holds the
checkpoints with their model cards, `metrics.json` and `report.html`. All training uses the same recipes as any other run. With
`--from_scratch` a tokenizer and a smaller model are trained from nothing instead.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, EvalPrediction

from ..training.callbacks import TimeLimitCallback
from ..training.run_folder import describe_environment, write_json
from ..viz import plot_loss_curves, plot_state_space_channels, state_space_layers
from . import finetune_glue, finetune_summarization, pretrain_span_corruption, train_tokenizer
from .support.console import set_quiet
from .support.demo_console import Phase, PhaseProgress, running, say
from .support.demo_data import (
    CLASSIFICATION,
    CORPUS,
    SUMMARIZATION,
    classification_baselines,
    first_words,
    read_rows,
    rouge,
    summary_words,
    write_data,
)
from .support.demo_pictures import plot_confusions, plot_overview, plot_text_loss
from .support.demo_plans import free_threads, plan_of, precision_options
from .support.demo_report import PICTURES, summary_lines, write_report
from .support.demo_samples import (
    classify_examples,
    fill_in,
    fill_in_examples,
    generate_texts,
    reload_in_clean_process,
    text_references,
)
from .support.finetuning_data import PREDICTIONS_FILE
from .support.models import load_model, load_tokenizer
from .support.options import parse_arguments, require
from .support.recipe import Recipe
from .support.runs import Job, set_up_logging

CHECKPOINT = Path("checkpoints", "spade-small")  # in the repository
OWN_DOCUMENT = (
    "read lines: The file is opened for reading and every line is passed to the function. Lines that are empty are skipped. "
    "If the file does not exist, an error is raised."
)
PROMPTS = (
    "Return the number of <extra_id_0> in the array.",
    "If the file does not <extra_id_0>, an error is raised.",
    "She had never <extra_id_0> before in her life.",
)
SHOWN = 6  # examples of each task in the report


@dataclass
class DemoArguments:
    """The demonstration."""

    output_dir: str = field(default="demo-output", metadata={"help": "Folder to write; it must be new or empty."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained encoder-decoder to start from (folder or Hub name). Default: checkpoints/spade-small of the repository."
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Train a tokenizer and a smaller model from random weights instead."}
    )
    seed: int = field(default=42, metadata={"help": "Random seed."})
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Time limit in minutes; training phases end early to meet it. Default: 5.5 (quick: 1.1), 5.3 from scratch (quick: 1)."
        },
    )
    quick: bool = field(
        default=False, metadata={"help": "A minute instead of five: shows that everything works, learns little."}
    )

    def __post_init__(self) -> None:
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"`max_minutes` must be positive; got {self.max_minutes}.")
        if self.from_scratch and self.model_name_or_path is not None:
            raise ValueError(
                f"`from_scratch` starts from random weights, but `model_name_or_path` names {self.model_name_or_path!r}: drop "
                "one of them."
            )


class Clock:
    """The time that is left, and its division among the phases."""

    def __init__(self, minutes: float, shares: Mapping[str, float]) -> None:
        self.minutes = minutes
        self.start = time.monotonic()
        self._shares = dict(shares)

    def elapsed(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.start) / 60

    def limit(self, phase: str) -> float:
        """Minutes that a phase may take, always more than zero: its share of the time left among it and the phases after it."""
        names = list(self._shares)
        ahead = sum(self._shares[name] for name in names[names.index(phase) :])
        return max(self._shares[phase] / ahead * (self.minutes - self.elapsed()), 0.05)


def find_checkpoint(given: str | None) -> str:
    """The checkpoint to start from: the given one, or that of the repository.

    Raises:
        FileNotFoundError: none is given, and this is no checkout of the repository.
    """
    if given is not None:
        return given
    for folder in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (folder / CHECKPOINT / "config.json").is_file():
            return str(folder / CHECKPOINT)
    raise FileNotFoundError(
        f"`{CHECKPOINT.as_posix()}` is not here: it is part of the repository, not of the installed package. Run the demonstration in a "
        "checkout of the repository, pass `--model_name_or_path` with a pretrained encoder-decoder, or train from random weights "
        "with `--from_scratch`."
    )


class Demo:
    """One demonstration: its folder, its clock and its measurements.

    Args:
        args: see `DemoArguments`.

    Raises:
        FileExistsError: the output folder is not empty.
        FileNotFoundError: see `find_checkpoint`.
    """

    def __init__(self, args: DemoArguments) -> None:
        self.args = args
        self.plan = plan_of(quick=args.quick, from_scratch=args.from_scratch)
        self.path = Path(args.output_dir)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(
                f"{self.path} exists and is not an empty folder. Remove it (rm -r {self.path}), or choose another one: "
                "`make demo DEMO_OUTPUT=another-folder`, or `--output_dir another-folder`."
            )
        self.checkpoint = None if args.from_scratch else find_checkpoint(args.model_name_or_path)
        self.clock = Clock(args.max_minutes or self.plan.minutes, self.plan.shares)
        self.precision, name = precision_options()
        self.metrics: dict[str, Any] = {
            "seed": args.seed,
            "quick": args.quick,
            "from_scratch": args.from_scratch,
            "checkpoint": None if self.checkpoint is None else Path(self.checkpoint).name,
            "precision": name,
            "environment": describe_environment(),
        }
        self.samples: dict[str, Any] = {"fill_ins_before": None, "prompts": []}
        self.phases: list[dict[str, Any]] = []
        self.phase: Phase | None = None  # the one that runs
        self.pretrained: Job | None = None
        self.summarizer: Job | None = None

    def run(self) -> dict[str, Any]:
        """Run all phases; returns what `metrics.json` holds."""
        start: tuple[str, Callable[[], str]]
        if self.args.from_scratch:
            start, training = ("Train a tokenizer", self.train_tokenizer), "Pretrain a SPADE by span corruption"
        else:
            start, training = (
                ("Open the checkpoint", self.open_checkpoint),
                "Continue its pretraining on new documents",
            )
        steps: list[tuple[str, Callable[[], str]]] = [
            ("Collect documentation", self.collect),
            start,
            (training, self.pretrain),
            ("Fine-tune: which library is it from?", self.classify),
            ("Fine-tune: write the summary line", self.summarize),
            ("Generate", self.generate),
            ("Load the checkpoint in a fresh process", self.reload),
            ("Write the report", self.report),
        ]
        self.path.mkdir(parents=True, exist_ok=True)
        for number, (title, step) in enumerate(steps, start=1):
            self.phases.append({"name": title})
            started = time.monotonic()
            with running(f"{number}/{len(steps)} {title}") as self.phase:
                self.phase.result = step()
            self.phases[-1]["seconds"] = round(time.monotonic() - started, 1)
        self.metrics["minutes"] = round(self.clock.elapsed(), 2)
        write_json(self.path / "metrics.json", self.metrics)
        say("\n" + "\n".join(summary_lines(self.metrics, self.samples)))
        say(f"\nReport: {(self.path / 'report.html').resolve()}")
        return self.metrics

    # ---------------------------------------------------------------------------------------------------- phases

    def collect(self) -> str:
        """Writes the data files of all three tasks."""
        assert self.phase is not None
        data = self.metrics["data"] = write_data(self.path / "data", self.plan.data, self.phase.advance)
        return (
            f"{data['documents']['train']:,} documents, {data['classification_rows']['train']:,} docstrings to classify, "
            f"{data['summarization_pairs']['train']:,} to summarize"
        )

    def train_tokenizer(self) -> str:
        """Trains a SentencePiece tokenizer on the pretraining text."""
        options = {"data": self.path / "data" / CORPUS / "train.jsonl", "num_threads": torch.get_num_threads()}
        self.metrics["tokenizer"] = train_tokenizer.main(
            {**options, "output_dir": self.path / "tokenizer", "quiet": True, **self.plan.new_tokenizer}
        )
        return f"{self.plan.new_tokenizer['vocab_size']:,} pieces"

    def open_checkpoint(self) -> str:
        """Loads the checkpoint and lets it fill in some sentences."""
        assert self.checkpoint is not None
        tokenizer = load_tokenizer(self.checkpoint)
        model = load_model(AutoModelForSeq2SeqLM, self.checkpoint)
        self.samples["prompts"] = [{"text": text, "filled": fill_in(model, tokenizer, text)} for text in PROMPTS]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return f"{parameters / 1e6:.1f} M parameters; {self.samples['prompts'][0]['filled']}"

    def pretrain(self) -> str:
        """Pretrains by span corruption, from the checkpoint or from random weights; measures the hidden text of held-out documents."""
        start: dict[str, Any]
        if self.checkpoint is None:
            start = {"tokenizer": self.path / "tokenizer", "config_overrides": self.plan.new_model}
        else:
            start = {"model_name_or_path": self.checkpoint, "eval_on_start": True}
        job, metrics = self._run_recipe(
            pretrain_span_corruption.RECIPE,
            "pretrained",
            "pretraining",
            self._prepare_pretraining,
            data=self.path / "data" / CORPUS,
            prediction_loss_only=False,
            **start,
            **self.plan.pretraining,
        )
        self.pretrained = job
        figures = {name: metrics[f"eval_{name}"] for name in ("text_loss", "text_accuracy")}
        metrics.update(figures, **text_references(job), noise_density=self.plan.pretraining["noise_density"])
        metrics["window_size"] = job.model.config.window_size
        history = job.trainer.state.log_history
        if self.checkpoint is not None:
            before = next(entry for entry in history if "eval_text_loss" in entry)
            metrics.update({f"{name}_before": before[f"eval_{name}"] for name in figures})
        plot_text_loss(history, self._picture("pretraining"), entropy=metrics["text_entropy"])
        torch.manual_seed(self.args.seed)
        fresh = AutoModelForSeq2SeqLM.from_config(job.model.config)
        plot_state_space_channels(
            {"new layer": _first_ssm(fresh), "after pretraining": _first_ssm(job.model)}, self._picture("state_space")
        )
        self.metrics["pretraining"] = metrics
        self.samples["fill_ins"] = fill_in_examples(job)
        earlier = f"{metrics['text_loss_before']:.3f} -> " if "text_loss_before" in metrics else ""
        return f"loss of hidden text {earlier}{metrics['text_loss']:.3f} (its entropy {metrics['text_entropy']:.3f})"

    def _prepare_pretraining(self, job: Job) -> None:
        if self.checkpoint is not None:
            for module in job.model.modules():
                if isinstance(
                    module, torch.nn.Dropout
                ):  # see `NO_DROPOUT`; the configuration keeps that of fine-tuning
                    module.p = 0.0
            self.samples["fill_ins_before"] = fill_in_examples(job)

    def classify(self) -> str:
        """Classification with the GLUE recipe, compared with the majority class and Naive Bayes on the same text."""
        folder = self.path / "data" / CLASSIFICATION
        found: list[EvalPrediction] = []

        def keep_predictions(job: Job) -> None:
            compute = job.trainer.compute_metrics
            assert compute is not None

            def computed(prediction: EvalPrediction) -> dict[str, float]:
                found[:] = [prediction]
                return compute(prediction)

            job.trainer.compute_metrics = computed

        job, metrics = self._run_recipe(
            finetune_glue.RECIPE,
            "classifier",
            "classification",
            keep_predictions,
            data=folder,
            model_name_or_path=self._start_of_tasks(),
            **self.plan.classification,
        )
        metrics["baselines"] = classification_baselines(folder, self.args.seed)
        names = [name for _, name in sorted((job.model.config.id2label or {}).items())]
        predicted = np.asarray(found[-1].predictions).argmax(-1)
        plot_confusions(np.asarray(found[-1].label_ids), predicted, names, self._picture("confusions"))
        plot_loss_curves(job.trainer.state.log_history, self._picture("classification"), title="Classification")
        self.metrics["classification"] = metrics
        rows = _spread_out(read_rows(folder / "validation.jsonl"))
        guesses = classify_examples(job, [row["sentence"] for row in rows], self.plan.classification["max_length"])
        self.samples["classes"] = [{**row, "guess": guess} for row, guess in zip(rows, guesses)]
        return f"accuracy {metrics['eval_accuracy']:.1%} (Naive Bayes {_naive_bayes(metrics):.1%})"

    def summarize(self) -> str:
        """Summarization with its recipe, compared with the first words of the docstring."""
        folder = self.path / "data" / SUMMARIZATION
        job, metrics = self._run_recipe(
            finetune_summarization.RECIPE,
            "summarizer",
            "summarization",
            data=folder,
            model_name_or_path=self._start_of_tasks(),
            **self.plan.summarization,
        )
        self.summarizer = job
        held_out = read_rows(folder / "validation.jsonl")
        rows = [{"document": row["document"], "summary": row["targets"][0]} for row in held_out]
        references, words = [row["summary"] for row in rows], summary_words(folder)
        leads, named_leads = ([first_words(row[name], words) for row in held_out] for name in ("text", "document"))
        metrics["baselines"] = {
            "lead_words": words,
            **rouge(leads, references),
            "named": rouge(named_leads, references),
        }
        plot_loss_curves(job.trainer.state.log_history, self._picture("summarization"), title="Summarization")
        self.metrics["summarization"] = metrics
        written = read_rows(self.path / "summarizer" / PREDICTIONS_FILE)
        self.samples["summaries"] = _spread_out(
            [
                {**row, "lead": lead, "generated": prediction["prediction"]}
                for row, lead, prediction in zip(rows, leads, written)
            ]
        )
        plain, named_lead = metrics["baselines"]["rougeL"], metrics["baselines"]["named"]["rougeL"]
        return (
            f"ROUGE-L {metrics['eval_rougeL']:.1f} (first {words} words {plain:.1f}, with the name {named_lead:.1f})"
        )

    def generate(self) -> str:
        """Summaries by greedy search, by beam search and by sampling."""
        assert self.summarizer is not None
        document = next((row["document"] for row in self.samples["summaries"]), OWN_DOCUMENT)
        self.samples["generated"] = []
        for name, options in (
            ("greedy", {"num_beams": 1}),
            ("4 beams", {"num_beams": 4}),
            ("sampling", {"num_beams": 1, "do_sample": True, "top_p": 0.9}),
        ):
            torch.manual_seed(self.args.seed)
            texts = generate_texts(self.summarizer, [OWN_DOCUMENT, document], **options)
            self.samples["generated"] += [
                {"method": name, "document": source, "text": text} for source, text in zip([OWN_DOCUMENT, document], texts)
            ]  # fmt: skip
        return self.samples["generated"][2]["text"]

    def reload(self) -> str:
        """Save and load: compares logits and generated ids of a fresh process with those of the model in memory."""
        assert self.summarizer is not None
        documents = [OWN_DOCUMENT, *(row["document"] for row in self.samples["summaries"][:3])]
        found = self.metrics["reload"] = reload_in_clean_process(self.summarizer, documents, self.path / "reload")
        return "the same logits, bit for bit" if found["logits_equal"] else found["description"]

    def report(self) -> str:
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
        plot_overview(self.metrics, self._picture("overview"))
        write_json(self.path / "metrics.json", self.metrics)
        write_json(self.path / "samples.json", self.samples)
        write_report(self.path, self.metrics, self.samples)
        passed = sum(check["passed"] for check in self.metrics["checks"])
        return f"{passed} of {len(self.metrics['checks'])} checks passed"

    # ---------------------------------------------------------------------------------------------------- helpers

    def _start_of_tasks(self) -> str | Path:
        """The checkpoint itself: the tasks are about the libraries that it knows, not about those that it has just read."""
        return self.path / "pretrained" if self.checkpoint is None else self.checkpoint

    def _picture(self, name: str) -> Path:
        return self.path / PICTURES / f"{name}.png"

    def _run_recipe(
        self,
        recipe: Recipe,
        folder: str,
        phase: str,
        prepare: Callable[[Job], None] = lambda job: None,
        **options: Any,
    ) -> tuple[Job, dict[str, Any]]:
        """Runs a training recipe as its `main` does, under the time limit of the phase, and returns its job.

        Args:
            recipe: the recipe.
            folder: name of the output folder.
            phase: name of its share of the time.
            prepare: called with the job before the training.
            options: of the recipe.
        """
        jobs: list[Job] = []

        def build(*groups: Any) -> Job:
            assert self.phase is not None
            started = time.monotonic()
            jobs.append(recipe.build(*groups))
            prepare(jobs[0])
            for callback in jobs[0].trainer.callback_handler.callbacks:
                if isinstance(callback, TimeLimitCallback):  # reading and tokenizing count towards the phase
                    callback.seconds = max(3.0, callback.seconds - (time.monotonic() - started))
                    jobs[0].trainer.add_callback(PhaseProgress(self.phase, callback.seconds))
            return jobs[0]

        options = {
            "output_dir": self.path / folder,
            "seed": self.args.seed,
            "max_minutes": self.clock.limit(phase),
            "save_strategy": "no",
            "report_to": "none",
            "log_level": "error",
            "quiet": True,
            **self.precision,
            **options,
        }
        metrics = replace(recipe, build=build).train(options)
        state = jobs[0].trainer.state
        cut_short = state.global_step < state.max_steps
        metrics.update(planned_steps=state.max_steps, cut_short=cut_short)
        self.phases[-1].update(
            steps=state.global_step,
            planned_steps=state.max_steps,
            cut_short=cut_short,
            seconds_per_step=metrics["train_runtime"] / max(1, state.global_step),
            tokens_per_second=metrics["input_tokens_seen"] / max(metrics["train_runtime"], 1e-9),
        )
        return jobs[0], metrics


def _spread_out(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that the report shows, evenly spaced."""
    return list(rows[:: max(1, len(rows) // SHOWN)][:SHOWN])


def _naive_bayes(classification: Mapping[str, Any]) -> float:
    """The better of the two baselines."""
    return max(classification["baselines"][name] for name in ("naive_bayes", "naive_bayes_default"))


def _checks(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims of the demonstration, each with its measurement."""
    text = metrics["pretraining"]
    accuracy, baselines = metrics["classification"]["eval_accuracy"], metrics["classification"]["baselines"]
    summaries = metrics["summarization"]
    lead = summaries["baselines"]["rougeL"]
    checks = [
        {
            "claim": "On held-out documents the loss of the hidden text, without sentinels, is below the unigram entropy of that text",
            "passed": text["text_loss"] < text["text_entropy"],
            "measured": f"{text['text_loss']:.3f} against {text['text_entropy']:.3f} nats per token",
        },
        {
            "claim": "The classifier beats the majority class",
            "passed": accuracy > baselines["majority"],
            "measured": f"{accuracy:.1%} against {baselines['majority']:.1%}",
        },
        {
            "claim": "The classifier beats Naive Bayes on words and pairs of words",
            "passed": accuracy > _naive_bayes(metrics["classification"]),
            "measured": f"{accuracy:.1%} against {baselines['naive_bayes']:.1%} (smoothing chosen by cross-validation) "
            f"and {baselines['naive_bayes_default']:.1%} (default smoothing)",
        },
        {
            "claim": "The summaries beat the first words of the docstring (ROUGE-L)",
            "passed": summaries["eval_rougeL"] > lead,
            "measured": f"{summaries['eval_rougeL']:.1f} against {lead:.1f}; {summaries['baselines']['named']['rougeL']:.1f} where they "
            "begin with the name, which the model reads too",
        },
        {
            "claim": "A fresh process loads the checkpoint and computes the same logits, bit for bit",
            "passed": metrics["reload"]["logits_equal"] and metrics["reload"]["generated_equal"],
            "measured": metrics["reload"]["description"],
        },
    ]
    if "text_loss_before" in text:
        falls = {
            "claim": "Pretraining on new documents lowers the loss of the hidden text of held-out ones, by 1 % or more",
            "passed": text["text_loss"] < 0.99 * text["text_loss_before"],
            "measured": f"{text['text_loss']:.3f} after {text['text_loss_before']:.3f} nats per token",
        }
        checks.insert(0, falls)
    return checks


def _first_ssm(model: torch.nn.Module) -> torch.nn.Module:
    return next(iter(state_space_layers(model).values()))


def _peak_memory_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (1e6 if sys.platform == "darwin" else 1e3), 1)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps messages of libraries off the console, and the tables that `datasets` prepares out of the user's cache."""
    import datasets

    verbosity, threads = transformers.utils.logging.get_verbosity(), torch.get_num_threads()
    set_quiet(True)
    set_up_logging()
    transformers.utils.logging.set_verbosity_error()

    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="hf_hybrid-demo-", ignore_cleanup_errors=True) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before
            datasets.enable_progress_bars()
            transformers.utils.logging.set_verbosity(verbosity)
            torch.set_num_threads(threads)
            set_quiet(False)


def main(args: DemoArguments | Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        args: command-line arguments, a mapping of options, a `DemoArguments`, or None for `sys.argv`.

    Returns:
        The content of `metrics.json`.

    Raises:
        FileExistsError: the output folder is not empty.
        FileNotFoundError: the package is installed without its repository, and no checkpoint is named.
        ValueError: an option is out of range, or the installation contains too little text.
        ImportError: a package of the extra `train` is missing.
    """
    options = args if isinstance(args, DemoArguments) else parse_arguments((DemoArguments,), args, __doc__)[0]
    require("The demonstration", "accelerate", "datasets", "matplotlib", "sentencepiece", "sklearn", extra="train")
    with _quiet_libraries():
        torch.set_num_threads(free_threads())
        return Demo(options).run()


def command_line() -> None:
    """`main` for a shell: a folder that is not empty and a missing checkpoint end in a message instead of a traceback."""
    try:
        main()
    except (FileExistsError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    command_line()
