"""A language model on your own text, whose memory does not grow while it writes.

python examples/language_model_with_constant_state.py                # trained on Python's language reference
python examples/language_model_with_constant_state.py my_text.txt    # on your own text
"""

# %%
import os
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer

from hf_hybrid import HybridTrainer, HybridTrainingArguments, byte_tokenizer, embedded_text_corpus

QUICK = bool(os.environ.get("EXAMPLES_QUICK"))  # seconds instead of minutes: shows that everything runs
OUTPUT = Path("examples-output")

# %% The text, as bytes: a byte tokenizer needs no training.
if len(sys.argv) > 1:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
else:
    text = "\n\n".join(embedded_text_corpus(families=("python",), max_source_bytes=10_000))
tokenizer = byte_tokenizer()
tokens = np.array(tokenizer(text)["input_ids"])
block = 256
rows = [{"input_ids": part, "labels": part} for part in tokens[: len(tokens) // block * block].reshape(-1, block)]
print(f"{len(tokens):,} bytes of text")

# %% A small SPADE language model: windows of 64 bytes, and one state space that remembers what lies before them.
config = AutoConfig.for_model(
    "spade_lm",
    vocab_size=len(tokenizer),
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    window_size=64,
    ssm_state_size=16,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config)
arguments = HybridTrainingArguments(
    output_dir=str(OUTPUT / "language-model"),
    max_steps=2 if QUICK else 300,
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

# %% It writes, and the text appears as it is written.
prompt = tokenizer("The ", return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
print("\nThe model writes:\n")
torch.manual_seed(1)
streamer = TextStreamer(tokenizer)
model.generate(
    **prompt,
    max_new_tokens=20 if QUICK else 400,
    do_sample=True,
    temperature=0.7,
    streamer=streamer,
    eos_token_id=None,
)


# %% What it has to remember after texts of growing length, beside the keys and values of a Transformer of this size.
def state_bytes(length: int) -> int:
    """Bytes of everything that is kept to write on, after `length` tokens."""
    ids = torch.tensor(tokens[:length])[None]
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    kept = tree_leaves([vars(layer) for layer in cache.layers])
    return sum(item.untyped_storage().nbytes() for item in kept if isinstance(item, torch.Tensor))


lengths = [256, 1024, 4096] if QUICK else [256, 1024, 4096, 16384, 65536]
ours = [state_bytes(length) for length in lengths]
transformer = [2 * 4 * config.num_hidden_layers * config.hidden_size * length for length in lengths]
print("\n\n  tokens   this model   keys and values of a Transformer")
for length, own, other in zip(lengths, ours, transformer):
    print(f"{length:8,} {own / 1e3:9.1f} kB {other / 1e3:12,.1f} kB")

figure = Figure(figsize=(6, 3.6), layout="constrained")
axes = figure.add_subplot()
axes.plot(
    lengths, [size / 1e6 for size in transformer], "--", color="0.5", marker="o", label="Transformer: keys and values"
)
axes.plot(lengths, [size / 1e6 for size in ours], marker="o", label="this model: its whole state")
axes.set(xscale="log", yscale="log", xlabel="tokens written", ylabel="memory (MB)")
axes.legend(frameon=False)
OUTPUT.mkdir(exist_ok=True)
figure.savefig(OUTPUT / "language_model_with_constant_state.png", dpi=110)
