"""Which settings learn fastest: contenders on the same tokens in the same order, by their loss on held-out text.

    python benchmarks/learning.py --list
    python benchmarks/learning.py --data data/novels docstrings --case optimizers --seconds 150 --seeds 0 1 2
    python benchmarks/learning.py --case language-models --only Llama Mega --steps 200 --set length=1024 batch_size=4

All models of a comparison have as many parameters (within 3 %). The loss is that of text tokens: sentinels, `</s>` and padding,
which are easy to guess, are left out. It is reported beside what word counts reach, against tokens seen and against processor
seconds of one thread. Each run is stored when it ends; the same command again continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; its threads would make processor seconds mean less
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from harness import BENCHMARKS
from laboratory.cases import CASES, Case, Variant
from laboratory.contenders import CONTENDERS, widths
from laboratory.report import draw, table
from laboratory.settings import NEXT_TOKEN, Settings
from laboratory.text import Text, byte_lengths, datasets_of, hidden_tokens, prepare_text, word_counts
from laboratory.training import seconds_per_step, train_contender
from run import machine
from transformers.utils.logging import disable_progress_bar

from hf_hybrid.recipes.support.models import parse_overrides
from hf_hybrid.tokenization.special_tokens import sentinel_ids


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the cases and leave")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases to run")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only the variants with one of these names, or parts of names"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=["docstrings"],
        help="text: files, folders with the splits train and validation, Hub data sets, or `docstrings`, those of the installed "
        "libraries (default)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="processor seconds of every run; default 120")
    length.add_argument("--steps", type=int, help="steps of every run: the same tokens for all, whatever they cost")
    parser.add_argument("--length", type=int, help="tokens of an input; default: that of the case")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="settings of all variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed; default 0")
    parser.add_argument("--evaluations", type=int, default=6, help="points of a curve; default 6")
    parser.add_argument("--rows", type=int, default=256, help="held-out inputs; default 256")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "learning", help="folder of the results")
    return parser.parse_args(arguments)


def select(case: Case, words: list[str] | None) -> list[Variant]:
    """Variants of a case that the words name: by their whole name, or by a part of it."""
    names = {variant.name for variant in case.variants}
    chosen = [
        variant
        for variant in case.variants
        if not words or any(word == variant.name or (word not in names and word in variant.name) for word in words)
    ]
    if not chosen:
        raise SystemExit(f"--only: no variant of {case.name!r} is called {words}; it has {', '.join(sorted(names))}.")
    return chosen


class Laboratory:
    """Texts and results of one invocation.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.texts: dict[tuple[int, bool], Text] = {}
        self.common = {item.partition("=")[0]: next(iter(parse_overrides(item).values())) for item in options.set}
        if options.length is not None:
            self.common["length"] = options.length

    def text(self, vocab_size: int, deduplicated: bool = False) -> Text:
        """The text in tokens of a vocabulary; see `prepare_text`."""
        key = vocab_size, deduplicated
        if key not in self.texts:
            self.options.out.mkdir(parents=True, exist_ok=True)
            self.texts[key] = prepare_text(self.options.data, vocab_size, self.options.out, deduplicated=deduplicated)
        return self.texts[key]

    def run_case(self, case: Case) -> dict[str, Any]:
        """Runs what has not been run; the report is written after every run."""
        folder = self.options.out / case.name
        folder.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {
            "case": case.name,
            "question": case.question,
            "command": ["python", "benchmarks/learning.py", *sys.argv[1:]],
            "machine": machine(),
            "versions": {"torch": torch.__version__},
            "word_counts": {},
            "runs": [],
        }
        variants = select(case, self.options.only)
        self._check_common(variants)
        for seed in self.options.seeds:
            for variant in variants:
                settings = Settings().changed({**case.changes, **variant.changes, **self.common})
                text = self.text(settings.vocab_size)
                name, counts = self._count_words(settings, text, CONTENDERS[variant.contender].objective)
                report["word_counts"][name] = counts
                report["runs"].append(self._run(case, variant, settings, seed, folder))
                (folder / "results.json").write_text(json.dumps(report, indent=1))
                (folder / "table.md").write_text(table(report) + "\n")
        draw(report, folder / "curves.png")
        return report

    def _check_common(self, variants: list[Variant]) -> None:
        """A setting in which variants differ cannot be common to all: they would be the same under other names."""
        for variant in variants:
            differing = sorted(set(variant.changes) & set(self.common))
            if differing:
                raise SystemExit(
                    f"--set {', '.join(differing)}: the variant {variant.name!r} has a value of its own. Leave it out, or choose other "
                    "variants with --only."
                )

    def _count_words(self, settings: Settings, text: Text, objective: str) -> tuple[str, dict[str, float]]:
        _, held_out = datasets_of(text, settings, objective, self.options.rows)
        sentinels = [] if objective == NEXT_TOKEN else sentinel_ids(text.tokenizer)
        pairs = [
            pair
            for index in range(len(held_out))  # type: ignore[arg-type]
            for pair in hidden_tokens(held_out[index], sentinels, text.special_ids)
        ]
        counts = word_counts(pairs, text.train, byte_lengths(text.tokenizer, text.vocab_size))
        return f"{objective}, {settings.length} tokens, {settings.vocab_size:,} pieces", asdict(counts)

    def _run(self, case: Case, variant: Variant, settings: Settings, seed: int, parent: Path) -> dict[str, Any]:
        options, contender = self.options, CONTENDERS[variant.contender]
        folder = parent / f"{''.join(c if c.isalnum() else '-' for c in variant.name)}-seed{seed}"
        asked = json.loads(
            json.dumps(
                {
                    "contender": contender.name,
                    "seed": seed,
                    "settings": asdict(settings) | {"model": dict(settings.model)},
                    "data": [Path(source).name for source in options.data],
                    "rows": options.rows,
                    "length_of_run": {"seconds": options.seconds, "steps": options.steps},
                }
            )
        )
        record = folder / "run.json"
        earlier = json.loads(record.read_text()) if record.exists() else {"asked": asked}
        if earlier["asked"] != asked:
            raise SystemExit(f"{folder} holds a run with other options: choose another --out, or remove the folder.")
        if "curve" in earlier:
            return earlier
        text = self.text(settings.vocab_size, settings.deduplicated)
        width = widths([contender.name], settings, text.vocab_size)[contender.name]
        if "steps" not in earlier:
            steps = options.steps
            if steps is None:
                rate = seconds_per_step(contender, settings, text, width)
                steps = max(2, round((options.seconds or 120.0) / rate))
            earlier |= {"variant": variant.name, "steps": steps, "width": width}
            folder.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(earlier))
        say(f"{case.name}: {variant.name}, seed {seed}, {earlier['steps']} steps")
        result = train_contender(
            contender,
            settings,
            text,
            width,
            folder=folder / "checkpoints",
            seed=seed,
            steps=earlier["steps"],
            evaluations=options.evaluations,
            rows=options.rows,
        )
        finished = earlier | result
        record.write_text(json.dumps(finished))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        last = finished["curve"][-1] if finished["curve"] else {"text_loss": float("nan")}
        say(f"    text loss {last['text_loss']:.3f} after {finished['seconds']:.0f} s of the processor")
        return finished


def say(line: str) -> None:
    """Prints a line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = parse(arguments)
    if options.list:
        for case in CASES.values():
            print(f"{case.name:<18} {case.question}  ({', '.join(variant.name for variant in case.variants)})")
        return 0
    unknown = [name for name in options.case or () if name not in CASES]
    if not options.case or unknown:
        raise SystemExit(f"--case: {', '.join(unknown) or 'name at least one'}; known: {', '.join(CASES)}.")
    logging.getLogger("hf_hybrid").setLevel(logging.ERROR)
    disable_progress_bar()  # one per checkpoint
    torch.set_num_threads(1)
    laboratory = Laboratory(options)
    for name in options.case:
        report = laboratory.run_case(CASES[name])
        print(f"\n{name}: {report['question']}\n\n{table(report)}\n\nwritten to {options.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
