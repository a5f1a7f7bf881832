"""A stand-in for the example scripts of Transformers: trains, evaluates, predicts, saves and reloads a checkpoint of one task.

It imports transformers and datasets (and what they stand on) alone, and knows nothing of any architecture: what `run_glue`, `run_clm`,
`run_mlm`, `run_qa`, `run_ner`, `run_swag`, `run_summarization` and `run_translation` do with a checkpoint, on rows made here.
"""

import json
import sys

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

ROWS = 12


def words(row: int, length: int) -> str:
    return " ".join(f"w{3 + (5 * row + 7 * place) % 30}" for place in range(length))


def glue(tokenizer):
    rows = [tokenizer(words(row, 4 + row % 5), words(row + 1, 3)) | {"labels": row % 2} for row in range(ROWS)]
    return rows, DataCollatorWithPadding(tokenizer)


def clm(tokenizer):
    rows = [{"input_ids": (ids := tokenizer(words(row, 16))["input_ids"][:16]), "labels": ids} for row in range(ROWS)]
    return rows, default_data_collator


def mlm(tokenizer):
    rows = [tokenizer(words(row, 8 + row % 5)) for row in range(ROWS)]
    return rows, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)


def qa(tokenizer):
    rows = [
        tokenizer(words(row, 3), words(row, 8), padding="max_length", max_length=16)
        | {"start_positions": 4 + row % 3, "end_positions": 5 + row % 3}
        for row in range(ROWS)
    ]
    return rows, default_data_collator


def ner(tokenizer):
    rows = []
    for row in range(ROWS):
        tokens = tokenizer(words(row, 4 + row % 5).split(), is_split_into_words=True)
        labels = [-100 if word is None else word % 2 for word in tokens.word_ids()]
        rows.append({**tokens, "labels": labels})
    return rows, DataCollatorForTokenClassification(tokenizer)


def swag(tokenizer):
    rows = []
    for row in range(ROWS):
        ends = [words(row + end, 2 + end) for end in range(4)]
        rows.append({**tokenizer([words(row, 4)] * 4, ends), "label": row % 4})
    return rows, DataCollatorForMultipleChoice(tokenizer)


def seq2seq(tokenizer, model):
    rows = [
        {**tokenizer(words(row, 6 + row % 5)), "labels": tokenizer(text_target=words(row, 3))["input_ids"]}
        for row in range(ROWS)
    ]
    return rows, DataCollatorForSeq2Seq(tokenizer, model=model)


TASKS = {
    "AutoModelForSequenceClassification": glue,
    "AutoModelForCausalLM": clm,
    "AutoModelForMaskedLM": mlm,
    "AutoModelForQuestionAnswering": qa,
    "AutoModelForTokenClassification": ner,
    "AutoModelForMultipleChoice": swag,
}


def run(folder: str, auto_name: str, output: str, smoothing: float) -> dict[str, float]:
    torch.manual_seed(0)
    auto_class = getattr(transformers, auto_name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = auto_class.from_pretrained(folder, config=config, trust_remote_code=True)
    settings = {
        "output_dir": output,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "label_smoothing_factor": smoothing,
        "save_steps": 20,
    }
    if auto_name == "AutoModelForSeq2SeqLM":
        rows, collator = seq2seq(tokenizer, model)
        trainer_class, generation = Seq2SeqTrainer, {"predict_with_generate": True, "generation_max_length": 6}
        args = Seq2SeqTrainingArguments(**settings, **generation)
    else:
        rows, collator = TASKS[auto_name](tokenizer)
        trainer_class, args = Trainer, TrainingArguments(**settings)
    data = Dataset.from_list([dict(row) for row in rows])
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        data_collator=collator,
    )
    losses = []
    for weight in (0.0, 1e-9):  # smoothing in name only
        args.label_smoothing_factor = weight
        other = trainer_class(
            model=model, args=args, eval_dataset=data, processing_class=tokenizer, data_collator=collator
        )
        torch.manual_seed(0)
        losses.append(other.evaluate()["eval_loss"])
    torch.manual_seed(0)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    torch.manual_seed(0)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    predictions = trainer.predict(data).predictions
    first = predictions[0] if isinstance(predictions, tuple) else predictions
    again = auto_class.from_pretrained(output, trust_remote_code=True)
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    finite = bool(np.isfinite(np.asarray(first, dtype=np.float64)).all())
    return {
        "before": before,
        "after": after,
        "same": same,
        "finite": finite,
        "rows": len(first),
        "smoothing": abs(losses[1] - losses[0]),
    }


if __name__ == "__main__":
    folder, auto_name, output, smoothing = sys.argv[1:]
    sys.stdout.write("\n" + json.dumps(run(folder, auto_name, output, float(smoothing))))
