"""See what SeqBoat attends to: its layers choose the tokens that use attention, and the choice can be looked at.

python examples/see_what_seqboat_attends_to.py
python examples/see_what_seqboat_attends_to.py my_text.txt    # trained on your own text
"""

# %%
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_hybrid import (
    HybridTrainer,
    HybridTrainingArguments,
    activation_map,
    byte_tokenizer,
    embedded_text_corpus,
    record_activations,
)

QUICK = bool(os.environ.get("EXAMPLES_QUICK"))  # seconds instead of minutes: shows that everything runs
OUTPUT = Path("examples-output")

# %% A language model of bytes. The moving average reads every byte; attention is for those that a router lets through.
if len(sys.argv) > 1:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
else:
    text = "\n\n".join(embedded_text_corpus(families=("python",), max_source_bytes=10_000))
tokenizer = byte_tokenizer()
tokens = np.array(tokenizer(text)["input_ids"])
block = 256
rows = [{"input_ids": part, "labels": part} for part in tokens[: len(tokens) // block * block].reshape(-1, block)]

config = AutoConfig.for_model(
    "seqboat",
    is_decoder=True,
    vocab_size=len(tokenizer),
    hidden_size=96,
    num_hidden_layers=4,
    value_dim=192,
    qk_dim=32,
    window_size=64,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config)
arguments = HybridTrainingArguments(
    output_dir=str(OUTPUT / "seqboat"),
    max_steps=2 if QUICK else 250,
    per_device_train_batch_size=2 if QUICK else 8,
    learning_rate=4e-3,
    warmup_steps=20,
    lr_scheduler_type="cosine",
    logging_steps=50,
    disable_tqdm=True,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
)
HybridTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
model.eval()

# %% Which kinds of bytes are active, layer by layer.
sample = text[:2000] if QUICK else text[10_000:18_000]
inputs = tokenizer(sample, return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
with torch.inference_mode(), record_activations(model) as gates:
    model(**inputs)
characters = [tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
before = [" ", *characters[:-1]]
kinds = {
    "first letter of a word": [own.isalpha() and not last.isalpha() for own, last in zip(characters, before)],
    "other letter": [own.isalpha() and last.isalpha() for own, last in zip(characters, before)],
    "space": [own.isspace() for own in characters],
    "anything else": [not own.isalpha() and not own.isspace() for own in characters],
}
print(f"\n{'active (%)':24}" + "".join(f"layer {number:<4}" for number in range(len(gates))))
for kind, members in kinds.items():
    chosen = torch.tensor(members)
    rates = [float(layer[0][0, chosen].gt(0).float().mean()) for layer in gates]
    print(f"{kind:24}" + "".join(f"{100 * rate:<10.0f}" for rate in rates))

# %% The map: layers by bytes, darker where the gate is further open.
OUTPUT.mkdir(exist_ok=True)
line = " ".join(sample.split())[:191]
activation_map(model, tokenizer, line, OUTPUT / "see_what_seqboat_attends_to.png")
