"""`hf-hybrid finetune glue` for a T5 or LongT5 of Transformers, with the classification heads of SPADE on their encoders.

    python benchmarks/finetune_peer.py --model_name_or_path runs/longt5 --data data/qnli --output_dir runs/longt5-qnli ...

All options are those of `hf-hybrid finetune glue`; `hf-hybrid finetune summarization` reads these models as they are.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from laboratory.peer_classifiers import as_classifier

from hf_hybrid.recipes import finetune_glue


def main(arguments: list[str]) -> None:
    """Runs the recipe on the classifier of the checkpoint that `--model_name_or_path` names."""
    if "--model_name_or_path" not in arguments[:-1]:
        raise SystemExit("--model_name_or_path: name the checkpoint of a T5 or LongT5.")
    place = arguments.index("--model_name_or_path") + 1
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        arguments[place] = str(as_classifier(Path(arguments[place]), Path(folder) / Path(arguments[place]).name))
        finetune_glue.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
