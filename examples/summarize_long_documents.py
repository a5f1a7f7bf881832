"""Summarise long documents with SPADE: fine-tune the small checkpoint on documents and their summaries, then read longer and longer ones.

python examples/summarize_long_documents.py                  # documents: docstrings without their first sentence
python examples/summarize_long_documents.py articles.jsonl   # your own, with "document" and "summary" in each line
"""

# %%
import json
import os
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from hf_hybrid import HybridSeq2SeqTrainer, HybridSeq2SeqTrainingArguments, embedded_summarization_pairs

QUICK = bool(os.environ.get("EXAMPLES_QUICK"))  # seconds instead of minutes: shows that everything runs
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "spade-small"
OUTPUT = Path("examples-output")

# %% Documents and summaries; a tenth is kept to look at.
if len(sys.argv) > 1:
    pairs = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
else:
    size = 100_000 if QUICK else 3_000_000
    pairs = embedded_summarization_pairs(families=("python", "torch", "transformers"), max_source_bytes=size)
held_out, training = pairs[::10], [pair for number, pair in enumerate(pairs) if number % 10]
print(f"{len(training)} documents to learn from, {len(held_out)} to look at")

# %% Fine-tune. Documents of up to 256 tokens are enough: nothing in the model depends on the length.
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = AutoModelForSeq2SeqLM.from_pretrained(CHECKPOINT)
rows = [
    {
        **tokenizer(pair["document"], truncation=True, max_length=256, return_token_type_ids=False),
        "labels": tokenizer(pair["summary"], truncation=True, max_length=40)["input_ids"],
    }
    for pair in training
]
arguments = HybridSeq2SeqTrainingArguments(
    output_dir=str(OUTPUT / "summaries"),
    max_steps=2 if QUICK else 120,
    per_device_train_batch_size=2 if QUICK else 8,
    learning_rate=1e-3,
    warmup_steps=10,
    logging_steps=20,
    disable_tqdm=True,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    train_sampling_strategy="group_by_length",
)
HybridSeq2SeqTrainer(
    model=model,
    args=arguments,
    train_dataset=rows,
    processing_class=tokenizer,
    data_collator=DataCollatorForSeq2Seq(tokenizer, model),
).train()
model.eval()


# %% Summaries of documents that it has not seen.
def summarize(document: str) -> str:
    inputs = tokenizer(document, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=32, num_beams=4, no_repeat_ngram_size=3)
    return tokenizer.decode(written[0], skip_special_tokens=True)


for pair in held_out[: 1 if QUICK else 4]:
    print(f"\ndocument: {pair['document'][:200]} ...")
    print(f"  author: {pair['summary']}\n   model: {summarize(pair['document'])}")

# %% The same model on documents of growing length: the time to read one grows in proportion, and no length is too long.
whole = tokenizer(" ".join(pair["document"] for pair in pairs), return_tensors="pt")["input_ids"]
lengths = [length for length in (512, 1024, 2048, 4096, 8192, 16384) if length <= whole.shape[1]][: 2 if QUICK else 6]
seconds = []
for length in lengths:
    passes = []
    for _ in range(2):
        start = time.process_time()
        with torch.inference_mode():
            model.get_encoder()(input_ids=whole[:, :length])
        passes.append(time.process_time() - start)
    seconds.append(min(passes))
    print(f"{length:6} tokens read in {seconds[-1]:.2f} s of processor time")

figure = Figure(figsize=(6, 3.6), layout="constrained")
axes = figure.add_subplot()
axes.plot(lengths, seconds, marker="o")
axes.plot(
    lengths, [seconds[-1] * length / lengths[-1] for length in lengths], "--", color="0.5", label="in proportion"
)
axes.set(xscale="log", yscale="log", xlabel="tokens of the document", ylabel="processor seconds to read it")
axes.legend(frameon=False)
OUTPUT.mkdir(exist_ok=True)
figure.savefig(OUTPUT / "summarize_long_documents.png", dpi=110)
