"""The report of the demonstration: one HTML file with embedded pictures, and the printed summary."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .demo_samples import fill_in_html

PICTURES = "pictures"
_FIRST_PARTS = 9  # of a filled-in text: what is shown at the top
REPORT_FILE = "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
table { border-collapse: collapse; margin: .8rem 0 } th, td { padding: .3rem .7rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } th { background: #f5f5f5 }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption, .note { color: #555; font-size: .9rem }
.yes { color: #00694a; font-weight: 600 } .no { color: #a63c00; font-weight: 600 }
blockquote { margin: .8rem 0; padding: .6rem 1rem; background: #f7f7f7; border-left: 3px solid #bbb }
del { background: #e8e8e8; color: #444 } ins { text-decoration: none; font-weight: 600 } ins.right { background: #c9efdf } ins.wrong { background: #fbdcc8 }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto }
"""


def write_report(folder: Path, metrics: Mapping[str, Any], samples: Mapping[str, Any]) -> Path:
    """Writes `report.html`, which needs no other file.

    Args:
        folder: folder of the demonstration, with its pictures.
        metrics: the content of `metrics.json`.
        samples: fill-ins, summaries and generated texts.
    """
    sections = [
        _opening(folder, metrics, samples),
        "<h2>Results</h2>" + _results(metrics),
        "<h2>What was checked</h2>" + _checks(metrics["checks"]),
        "<h2>Filling in hidden text</h2>" + _pretraining(folder, metrics, samples),
        "<h2>The state space layer</h2>" + _state_space(folder, metrics),
        "<h2>Classification: which library is this docstring from?</h2>" + _classification(folder, metrics, samples),
        "<h2>Summarization: the first sentence of a docstring from the rest</h2>"
        + _summarization(folder, metrics, samples),
        "<h2>Save and load</h2>" + _reload(metrics),
        "<h2>The run</h2>" + _run(metrics) + _times(metrics),
        "<h2>Next steps</h2>" + _next_steps(folder),
    ]
    title = "A small SPADE, from new documents to summaries"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style></head>'
        f"<body>\n<h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    path = folder / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def summary_lines(metrics: Mapping[str, Any], samples: Mapping[str, Any]) -> list[str]:
    """The closing lines of the run, for the terminal."""
    lines = [f"Done in {metrics['minutes']:.1f} minutes ({metrics['precision']}). What was checked:"]
    for check in metrics["checks"]:
        lines.append(f"  {'yes' if check['passed'] else 'NO '}  {check['claim']}: {check['measured']}")
    lines.append("Summary lines that the model wrote:")
    for sample in samples["summaries"][:3]:
        lines.append(f"  {_shortened(sample['document'], 100)}\n      -> {sample['generated']}")
    return lines


def _shortened(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Html(str):
    """Text that is HTML already; any other is escaped."""


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers are set to the right."""

    def cell(value: Any) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return (
                f'<td class="number">{value:,.4g}</td>'
                if isinstance(value, float)
                else f'<td class="number">{value:,}</td>'
            )
        return f"<td>{value if isinstance(value, _Html) else html.escape(str(value))}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def _picture(folder: Path, name: str, caption: str) -> str:
    path = folder / PICTURES / f"{name}.png"
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _opening(folder: Path, metrics: Mapping[str, Any], samples: Mapping[str, Any]) -> str:
    """What this is, the results at a glance, and one sample of each task."""
    start = (
        "was trained from random weights on the docstrings and the language reference that this Python installation contains"
        if metrics["from_scratch"]
        else f"of {metrics['pretraining']['num_parameters'] / 1e6:.1f} M parameters, the pretrained checkpoint "
        f"<code>{html.escape(str(metrics['checkpoint']))}</code>, read documentation of libraries that it had not seen, and was "
        "fine-tuned for two tasks"
    )
    quick = (
        "<p class='note'>This is the quick run: it shows that everything works, and learns little.</p>"
        if metrics["quick"]
        else ""
    )
    return (
        "<p>A small SPADE encoder-decoder (a state space model combined with local attention, "
        f'<a href="https://arxiv.org/abs/2212.08136">arXiv 2212.08136</a>) {start}, in {metrics["minutes"]:.1f} minutes.</p>'
        + quick
        + _picture(folder, "overview", "Results on held-out text; grey: what each is compared with")
        + _three_samples(samples)
    )


def _three_samples(samples: Mapping[str, Any]) -> str:
    """The first of the evenly spaced samples of each task, whatever it is."""
    fill_ins, earlier = samples["fill_ins"], samples["fill_ins_before"]
    classified, summary = samples["classes"][0], samples["summaries"][0]
    guess = classified["guess"]
    kind = "right" if guess["label"] == classified["label"] else "wrong"
    before = earlier[0][:_FIRST_PARTS] if earlier else None
    quoted = [
        ("Fills in", fill_in_html(fill_ins[0][:_FIRST_PARTS], before)),
        (
            "Tells libraries apart",
            f"{html.escape(_shortened(classified['sentence'], 260))} <del>{html.escape(classified['label'])}</del>"
            f"<ins class='{kind}'>{html.escape(guess['label'])}, {guess['probability']:.0%}</ins>",
        ),
        (
            "Summarizes",
            f"{html.escape(_shortened(summary['document'], 260))} <del>{html.escape(summary['summary'])}</del>"
            f"<ins>{html.escape(summary['generated'])}</ins>",
        ),
    ]
    legend = "<p class='note'>The first sample of each task below. Grey is what was hidden, coloured or bold what the model wrote.</p>"
    return "".join(f"<blockquote><b>{name}.</b> {text}</blockquote>" for name, text in quoted) + legend


def _run(metrics: Mapping[str, Any]) -> str:
    environment = metrics["environment"]
    versions = ", ".join(
        f"{name} {environment['versions'].get(name)}" for name in ("hf_hybrid", "torch", "transformers")
    )
    device = (
        ", ".join(environment["accelerators"]) or f"{environment['processor']}, {environment['torch_threads']} threads"
    )
    cut = [phase["name"] for phase in metrics["phases"] if phase.get("cut_short")]
    ended = (
        f"<p>Ended by the time limit, with the learning rate at its end: {html.escape('; '.join(cut))}. With more time "
        "(<code>--max_minutes</code>) these phases would have learned more.</p>"
        if cut
        else ""
    )
    return (
        f"<p>Seed {metrics['seed']}, training in {html.escape(metrics['precision'])}, {html.escape(device)}; {html.escape(versions)}; "
        f"started {html.escape(environment['started'])}.</p>{ended}"
    )


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            _Html("<span class='yes'>yes</span>" if check["passed"] else "<span class='no'>no, it did not</span>"),
            check["claim"],
            check["measured"],
        ]
        for check in checks
    ]
    return _table(["", "claim", "measured"], rows)


def _results(metrics: Mapping[str, Any]) -> str:
    pretraining, classification, summaries = (
        metrics[name] for name in ("pretraining", "classification", "summarization")
    )
    naive, lead = classification["baselines"], summaries["baselines"]
    guessed = 100 * pretraining["text_most_frequent"]
    rows: list[list[Any]] = []
    for name, suffix in (("before", "_before"), ("after", "")):
        if f"text_loss{suffix}" in pretraining:
            task = "hidden text" if metrics["from_scratch"] else f"hidden text, {name} the pretraining here"
            loss, accuracy = pretraining[f"text_loss{suffix}"], 100 * pretraining[f"text_accuracy{suffix}"]
            rows.append([task, "loss (nats per token)", loss, pretraining["text_entropy"], "its unigram entropy"])
            rows.append(["", "tokens guessed (%)", accuracy, guessed, "the most frequent token"])
    rows += [
        ["classification", "accuracy (%)", 100 * classification["eval_accuracy"], 100 * naive["majority"], "largest class"],
        ["", "", "", 100 * naive["naive_bayes_default"], "Naive Bayes, 1- and 2-grams, default smoothing"],
        ["", "", "", 100 * naive["naive_bayes"], f"the same, smoothing {naive['naive_bayes_alpha']} by cross-validation"],
    ]  # fmt: skip
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        rows.append(
            ["summarization", f"ROUGE-{name[5:]}", summaries[f"eval_{name}"], lead[name], f"first {lead['lead_words']} words"]
        )  # fmt: skip
        rows.append(["", "", "", lead["named"][name], "the same, beginning with the name"])
    return _table(["task", "measure", "model", "baseline", "which baseline"], rows) + (
        "<p class='note'>All on held-out files. For losses lower is better, for everything else higher. Hidden text is counted without "
        "sentinels and <code>&lt;/s&gt;</code>, whose places are easy to learn. The model is pretrained on no validation text of either "
        "task; Naive Bayes reads exactly the same text as the classifier.</p>"
    )


def _pretraining(folder: Path, metrics: Mapping[str, Any], samples: Mapping[str, Any]) -> str:
    figures, data = metrics["pretraining"], metrics["data"]
    libraries = html.escape(", ".join(data["libraries"]))
    text = (
        f"<p>{figures['num_parameters']:,} parameters, {figures['steps']:,} steps here, {figures['input_tokens_seen']:,} input tokens; "
        f"{data['documents']['train']:,} documents and {data['characters']['train']:,} characters of {libraries}. Of each segment "
        f"{figures['noise_density']:.0%} of the tokens are hidden, in spans of three on average; the decoder has to write them.</p>"
    )
    prompts = "".join(
        f"<tr><td>{html.escape(one['text'])}</td><td>{html.escape(one['filled'])}</td></tr>"
        for one in samples["prompts"]
    )
    if prompts:
        prompts = f"<table><tr><th>prompt</th><th>filled in by the checkpoint, before any training here</th></tr>{prompts}</table>"
    earlier = samples["fill_ins_before"]
    pairs = zip(samples["fill_ins"], earlier or [None] * len(samples["fill_ins"]))
    examples = "".join(f"<blockquote>{fill_in_html(parts, before)}</blockquote>" for parts, before in pairs)
    order = "before and after the pretraining here " if earlier else ""
    legend = (
        f"<p>Held-out text with the masked spans (<del>grey</del>) and what the model writes in their place {order}"
        '(<ins class="right">right</ins>, <ins class="wrong">something else</ins>; greedy, beginnings of segments):</p>'
    )
    return (
        prompts
        + text
        + _picture(
            folder,
            "pretraining",
            "Loss of the hidden text over the steps; dashed: the best loss without looking at the input",
        )
        + legend
        + examples
    )


def _state_space(folder: Path, metrics: Mapping[str, Any]) -> str:
    return (
        "<p>The bottom encoder layer has a two-sided state space model next to its local attention. Left: how fast "
        "single states "
        "forget. Right: over how many tokens the kernel of each channel spreads; attention in this model looks "
        f"{metrics['pretraining']['window_size'] - 1} tokens to each side.</p>"
        + _picture(folder, "state_space", "Decay spectrum and effective memory of the state space channels")
    )


def _classification(folder: Path, metrics: Mapping[str, Any], samples: Mapping[str, Any]) -> str:
    figures, data = metrics["classification"], metrics["data"]
    rows = data["classification_rows"]
    classes = ", ".join(f"{name} ({count})" for name, count in data["classes"].items())
    passed = figures["eval_accuracy"] > max(
        figures["baselines"][k] for k in ("majority", "naive_bayes", "naive_bayes_default")
    )
    verdict = (
        "The fine-tuned model beats all baselines."
        if passed
        else "The fine-tuned model does <b>not</b> beat all baselines in this run."
    )
    return (
        f"<p>{rows['train']:,} training and {rows['validation']:,} validation docstrings, from different files. Names of the "
        f"libraries, code and lists of parameters are removed. Classes: {html.escape(classes)}. {verdict}</p>"
        + _picture(folder, "confusions", "Which libraries are taken for which")
        + _picture(folder, "classification", "Fine-tuning for classification")
        + _table(
            ["docstring", "from", "model", "sure (%)"],
            [
                [
                    _shortened(row["sentence"], 260),
                    row["label"],
                    row["guess"]["label"],
                    100 * row["guess"]["probability"],
                ]
                for row in samples["classes"]
            ],
        )
    )


def _summarization(folder: Path, metrics: Mapping[str, Any], samples: Mapping[str, Any]) -> str:
    pairs = metrics["data"]["summarization_pairs"]
    rows = [
        [_shortened(row["document"], 260), row["summary"], row["generated"], row["lead"]] for row in samples["summaries"]
    ]  # fmt: skip
    generated = [[s["method"], _shortened(s["document"], 200), s["text"]] for s in samples["generated"]]
    return (
        f"<p>{pairs['train']:,} training and {pairs['validation']:,} validation pairs. The input is the docstring with its first line hidden, "
        "as in pretraining: <code>&lt;extra_id_0&gt;</code>, then the name of the class or function in words, and the rest.</p>"
        + _picture(folder, "summarization", "Fine-tuning for summarization")
        + _table(["document", "its own first sentence", "model", "first words"], rows)
        + "<p>Other ways to decode:</p>"
        + _table(["method", "document", "model"], generated)
    )


def _reload(metrics: Mapping[str, Any]) -> str:
    reload = metrics["reload"]
    texts = "".join(f"<li>{html.escape(text)}</li>" for text in reload["texts"])
    same = "the same, bit for bit" if reload["logits_equal"] else "<b>not</b> the same"
    return (
        "<p>A new Python process imported the package, loaded the summarizer with "
        f"<code>AutoModelForSeq2SeqLM.from_pretrained</code> and computed {same}: {html.escape(reload['description'])}. The script is "
        f"<code>reload/reload.py</code>. It generated:</p><ul>{texts}</ul>"
    )


def _times(metrics: Mapping[str, Any]) -> str:
    rows = []
    for phase in metrics["phases"]:
        trained = "steps" in phase
        rows.append(
            [
                phase["name"],
                phase.get("seconds", ""),
                f"{phase['steps']:,} of {phase['planned_steps']:,}" + (" (cut short)" if phase["cut_short"] else "") if trained else "",
                phase["seconds_per_step"] if trained else "",
                f"{phase['tokens_per_second']:,.0f}" if trained else "",
            ]
        )  # fmt: skip
    memory = metrics["peak_memory_mb"]
    sizes = [[name, size] for name, size in metrics["folder_megabytes"].items()]
    return (
        _table(["phase", "seconds", "steps", "seconds per step", "input tokens per second"], rows)
        + f"<p>Peak memory: {'not measured' if memory is None else f'{memory:,.0f} MB'}. Training times include evaluation.</p>"
        + _table(["folder", "MB"], sizes)
    )


def _next_steps(folder: Path) -> str:
    name = html.escape(folder.name)
    return f"""<p>The checkpoints are ordinary Transformers checkpoints; each folder has a model card.</p>
<pre>import hf_hybrid
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}/summarizer")
model = AutoModelForSeq2SeqLM.from_pretrained("{name}/summarizer")
inputs = tokenizer("&lt;extra_id_0&gt; The file is opened and every line is passed to the function.", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_length=32, num_beams=4), skip_special_tokens=True))</pre>
<p>Pretrain on your own text (<code>--help</code> explains the options of every recipe):</p>
<pre>python -m hf_hybrid.recipes.train_tokenizer --data my_texts/ --vocab_size 16000 --output_dir tokenizer
python -m hf_hybrid.recipes.pretrain_span_corruption --data my_texts/ --tokenizer tokenizer --input_length 1024 \\
    --config_overrides "hidden_size=512,num_attention_heads=8,intermediate_size=1408,num_hidden_layers=6,decoder_layers=6" --max_steps 20000 --output_dir pretrained
python -m hf_hybrid.recipes.finetune_glue --model_name_or_path {name}/pretrained --data {name}/data/classification \\
    --from_scratch True --output_dir without-pretraining     # what is pretraining worth?</pre>
"""
