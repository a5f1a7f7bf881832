"""LoRA on a checkpoint: teach the small SPADE a new task by training a few per cent of its parameters.

    python examples/lora_on_a_checkpoint.py    # from which library does a docstring come?

The adapter is a small file beside the checkpoint; merged into it, the result is an ordinary model. Needs peft.
"""

# %%
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_hybrid import HybridTrainer, HybridTrainingArguments, add_lora, embedded_classification_examples

QUICK = bool(os.environ.get("EXAMPLES_QUICK"))  # seconds instead of minutes: shows that everything runs
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "spade-small"
OUTPUT = Path("examples-output")

# %% Docstrings, with the names of the libraries taken out.
FAMILIES = ("python", "torch", "transformers")
size = 400_000 if QUICK else 4_000_000
examples = embedded_classification_examples(families=FAMILIES, max_source_bytes=size, max_per_class=500)
names = dict(sorted({example["label"]: example["label_name"] for example in examples}.items()))
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)


def rows_of(split: str) -> list[dict]:
    chosen = [example for example in examples if example["split"] == split]
    return [
        {
            **tokenizer(row["sentence"], truncation=True, max_length=96, return_token_type_ids=False),
            "labels": row["label"],
        }
        for row in chosen
    ]


training, validation = rows_of("train"), rows_of("validation")[: 8 if QUICK else 240]
print(f"{len(training)} docstrings of {', '.join(names.values())} to learn from, {len(validation)} to be tested on")

# %% Freeze the checkpoint, and add two thin matrices to each of its linear maps. The new classifier is trained in full.
torch.manual_seed(0)
model = add_lora(AutoModelForSequenceClassification.from_pretrained(CHECKPOINT, num_labels=len(names)), rank=8)
trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
total = sum(parameter.numel() for parameter in model.parameters())
print(f"trained: {trained:,} of {total:,} parameters ({100 * trained / total:.1f} %)")
arguments = HybridTrainingArguments(
    output_dir=str(OUTPUT / "lora"),
    max_steps=2 if QUICK else 120,
    per_device_train_batch_size=4 if QUICK else 16,
    per_device_eval_batch_size=32,
    learning_rate=3e-3,
    warmup_steps=10,
    logging_steps=20,
    disable_tqdm=True,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
)
trainer = HybridTrainer(
    model=model,
    args=arguments,
    train_dataset=training,
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
)


def confusion() -> torch.Tensor:
    """True class by predicted class."""
    output = trainer.predict(validation)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    table = torch.zeros(len(names), len(names), dtype=torch.long)
    for label, guess in zip(output.label_ids, logits.argmax(-1)):
        table[label, guess] += 1
    return table


before = confusion()
trainer.train()
after = confusion()
for when, table in (("before", before), ("after", after)):
    print(f"right {when}: {100 * float(table.diagonal().sum() / table.sum()):.1f} %")

# %% Save the adapter alone; merge it for use without peft. The merged model says the same.
model.save_pretrained(OUTPUT / "lora" / "adapter")
adapter = sum(path.stat().st_size for path in (OUTPUT / "lora" / "adapter").glob("*.safetensors"))
batch = DataCollatorWithPadding(tokenizer)([{"input_ids": row["input_ids"]} for row in validation[:8]])
with torch.inference_mode():
    adapted = model.eval()(**batch).logits
    merged = model.merge_and_unload().eval()(**batch).logits
print(
    f"adapter {adapter / 1e6:.1f} MB; merged into the checkpoint, logits differ by {(adapted - merged).abs().max():.0e}"
)

# %%
figure = Figure(figsize=(6.4, 3.2), layout="constrained")
for place, (when, table) in enumerate((("before", before), ("after", after)), start=1):
    axes = figure.add_subplot(1, 2, place)
    axes.imshow(table, cmap="Blues")
    axes.set_xticks(range(len(names)), names.values())
    axes.set_yticks(range(len(names)), names.values() if place == 1 else [])
    axes.set(title=when, xlabel="predicted")
    for row, column in ((row, column) for row in range(len(names)) for column in range(len(names))):
        colour = "white" if table[row, column] > table.max() / 2 else "black"
        axes.text(column, row, int(table[row, column]), ha="center", va="center", color=colour)
figure.savefig(OUTPUT / "lora_on_a_checkpoint.png", dpi=110)
