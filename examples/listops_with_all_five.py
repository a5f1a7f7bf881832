"""Long-range classification with all five architectures: the value of nested lists, such as [MAX 4 [SM 7 8 ] 1 ] -> 5.

    python examples/listops_with_all_five.py

Small models and short lists, a few seconds of training each: this shows how to compare, not who wins. The lists of the
Long Range Arena are ten times as long: leave out `longer_than` to `max_args` (docs/guides/long_range_arena.md).
"""

# %%
import os
import shutil
from pathlib import Path

from matplotlib.figure import Figure

from hf_hybrid.recipes import train_lra

QUICK = bool(os.environ.get("EXAMPLES_QUICK"))  # seconds instead of minutes: shows that everything runs
OUTPUT = Path("examples-output")

# %% About 100,000 parameters each.
MODELS = {
    "spade": "hidden_size=64,head_dim=16,num_attention_heads=4,intermediate_size=128,num_hidden_layers=2,window_size=33",
    "mega": "hidden_size=64,num_hidden_layers=2,intermediate_size=128,shared_representation_size=32,nffn_hidden_size=128",
    "seqboat": "hidden_size=64,num_hidden_layers=2,value_dim=128,qk_dim=32,window_size=32",
    "longvq": "hidden_size=64,num_hidden_layers=2,value_size=64,shared_representation_size=32,intermediate_size=128,window_size=32,"
    "codebook_size=32",
    "bst": "hidden_size=64,num_hidden_layers=2,num_attention_heads=4,head_dim=16,intermediate_size=128,block_size=32",
}
TASK = {
    "task": "listops",
    "longer_than": 5,
    "shorter_than": 60,
    "max_depth": 3,
    "max_args": 5,
    "num_train": 64 if QUICK else 8000,
    "num_validation": 16 if QUICK else 500,
    "num_processes": 1,
}

# %% Train and evaluate each with the same recipe: `hf-hybrid train lra --task listops --arch mega ...`
shutil.rmtree(
    OUTPUT / "listops", ignore_errors=True
)  # an earlier run: recipes never write into a folder that is not empty
accuracies = {}
for name, sizes in MODELS.items():
    metrics = train_lra.main(
        {
            **TASK,
            "arch": name,
            "config_overrides": sizes,
            "max_steps": 2 if QUICK else 250,
            "per_device_train_batch_size": 8 if QUICK else 32,
            "learning_rate": 2e-3,
            "warmup_steps": 1 if QUICK else 25,
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": True,
            "quiet": True,
            "output_dir": str(OUTPUT / "listops" / name),
        }
    )
    accuracies[name] = 100 * metrics["eval_accuracy"]
    print(f"{name:8} {accuracies[name]:5.1f} % of the lists, {metrics['train_runtime']:4.0f} s of training")
guess = 100 * metrics["majority_accuracy"]
print(f"always the most frequent value: {guess:.1f} %")

# %%
figure = Figure(figsize=(6, 3.2), layout="constrained")
axes = figure.add_subplot()
bars = axes.bar(list(accuracies), list(accuracies.values()), width=0.6)
axes.bar_label(bars, fmt="%.0f")
axes.axhline(guess, color="0.4", linestyle="--", label="always the most frequent value")
axes.set(ylabel="lists with the right value (%)")
axes.set_ylim(0, 1.25 * max(accuracies.values()))
axes.legend(frameon=False, loc="upper left")
figure.savefig(OUTPUT / "listops_with_all_five.png", dpi=110)
