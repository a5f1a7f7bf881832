"""Streams: the samples of the map-style data set, sharding without loss, and resuming bit for bit."""

from __future__ import annotations

import itertools
import json

import datasets
import pytest
import torch
from factories import Case
from torch.utils.data import DataLoader

from hf_hybrid.data import streaming
from hf_hybrid.data.packing import CausalBlockDataset
from hf_hybrid.data.span_corruption import restore_segment
from hf_hybrid.data.streaming import CausalBlockStream, SpanCorruptionStream
from hf_hybrid.data.token_corpus import tokenize_corpus
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.tokenization.special_tokens import sentinel_ids


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(streaming, "_BATCH_CHARACTERS", 8000)
    monkeypatch.setattr(streaming, "_CHUNK", 8)


@pytest.fixture
def sources(documents):
    rows = [{"text": text} for text in documents]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    return {
        "list": documents,
        "function": lambda: iter(documents),
        "dataset": datasets.Dataset.from_list(rows),
        "stream": stream,
        "shuffled stream": stream.shuffle(seed=3, buffer_size=7),
        "mapped stream": stream.map(lambda row: {"text": row["text"].lower()}),
    }


def make(source, tokenizer, **options):
    return SpanCorruptionStream(source, tokenizer, input_length=64, **{"seed": 5, **options})


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in ("input_ids", "labels"))


def test_stream_packs_like_the_map_style_data_set(documents, tokenizer):
    dataset = CausalBlockDataset(tokenize_corpus(documents, tokenizer, progress=False), 50)
    samples = list(CausalBlockStream(documents, tokenizer, block_length=50))
    assert len(samples) == len(dataset)
    assert all(map(same, samples, dataset))


def test_samples_are_the_text(documents, tokenizer):
    sentinels = sentinel_ids(tokenizer)
    stream = make(documents, tokenizer)
    blocks = list(CausalBlockStream(documents, tokenizer, block_length=stream.block_length))
    samples = list(stream)
    assert len(samples) == len(blocks)
    for sample, block in zip(samples, blocks):
        assert sample["input_ids"].shape == (64,)
        restored = restore_segment(sample["input_ids"], sample["labels"], sentinel_ids=sentinels)
        assert restored == block["input_ids"].tolist()


def test_window_shuffles_and_epochs_differ(documents, tokenizer):
    plain = [tuple(s["input_ids"].tolist()) for s in CausalBlockStream(documents, tokenizer, block_length=50)]
    stream = CausalBlockStream(documents, tokenizer, block_length=50, shuffle_window=100)
    first = [tuple(sample["input_ids"].tolist()) for sample in stream]
    stream.set_epoch(1)
    second = [tuple(sample["input_ids"].tolist()) for sample in stream]
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != plain and second != first
    noisy = make(documents, tokenizer)
    one = next(iter(noisy))
    assert same(one, next(iter(noisy)))
    noisy.set_epoch(1)
    assert not same(one, next(iter(noisy)))


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("name", ["list", "function", "dataset", "stream", "shuffled stream", "mapped stream"])
def test_resume_continues_at_the_same_sample(sources, tokenizer, name, window):
    options = {"shuffle_window": window, "repeat": True}
    stream = make(sources[name], tokenizer, **options)
    samples, states = [], {}
    for number, sample in enumerate(itertools.islice(stream, 1800)):
        samples.append(sample)
        if number % 331 == 0 or number in (7, 8):
            states[number] = json.dumps(stream.state_dict())
    assert stream.state_dict()["epoch"] >= 1
    for number, state in states.items():
        resumed = make(sources[name], tokenizer, **options)
        resumed.load_state_dict(json.loads(state))
        assert resumed.state_dict() == json.loads(state)
        assert all(map(same, itertools.islice(resumed, 12), samples[number + 1 : number + 13])), number
    fresh = make(sources[name], tokenizer, **options)
    assert all(map(same, itertools.islice(fresh, 20), samples))


def test_state_of_a_mapped_stream(sources, tokenizer):
    """Rows behind a function are counted; only a stream that shuffles is read again from its beginning."""
    joined = datasets.concatenate_datasets([sources["stream"], sources["mapped stream"]])
    for source in (sources["stream"], sources["mapped stream"], joined):
        assert make(source, tokenizer).source.has_state
    assert not make(joined.shuffle(seed=0, buffer_size=4), tokenizer).source.has_state
    stream, resumed = (make(sources["mapped stream"], tokenizer) for _ in range(2))
    samples = list(itertools.islice(stream, 31))
    resumed.load_state_dict(stream.state_dict())
    assert all(map(same, itertools.islice(resumed, 3), itertools.islice(stream, 31, 34))) and len(samples) == 31


def test_state_is_used_once(documents, tokenizer):
    stream = make(documents, tokenizer)
    first = next(iter(stream))
    state = stream.state_dict()
    second = next(itertools.islice(stream, 1, None))
    stream.load_state_dict(state)
    assert same(next(iter(stream)), second)
    assert same(next(iter(stream)), first)


def blocks_of(loader):
    return [tuple(row.tolist()) for batch in loader for row in batch["input_ids"]]


@pytest.mark.parametrize("name", ["list", "function", "stream"])
def test_order_is_independent_of_the_workers(sources, name):
    """Blocks of one token: every token of every document comes exactly once, in one order, whoever reads it."""
    tokenizer = byte_tokenizer()
    texts = ["abc" * 3 + str(index) for index in range(16)]
    rows = datasets.Dataset.from_list([{"text": text} for text in texts])
    source = {"list": texts, "function": lambda: iter(texts), "stream": rows.to_iterable_dataset(num_shards=8)}[name]
    options = {"block_length": 1, "shuffle_window": 20}
    expected = blocks_of(DataLoader(CausalBlockStream(source, tokenizer, **options), batch_size=4))
    assert len(expected) == sum(len(text) + 1 for text in texts)
    loader = DataLoader(CausalBlockStream(source, tokenizer, **options), batch_size=4, num_workers=3)
    assert blocks_of(loader) == expected
    parts = []
    for rank in range(2):
        stream = CausalBlockStream(source, tokenizer, **options, rank=rank, world_size=2)
        parts += blocks_of(DataLoader(stream, batch_size=4, num_workers=2))
    assert sorted(parts) == sorted(expected)


def test_noise_of_shards_is_independent(tokenizer):
    texts = ["the same words again and again " * 30] * 2
    samples = [next(iter(make(texts, tokenizer, rank=rank, world_size=2))) for rank in range(2)]
    assert not same(*samples)


def test_trainer_resumes_bitwise(documents, tokenizer, tmp_path):
    """With `repeat`, the Trainer's own skipping of samples continues exactly, over the end of an epoch too."""
    from transformers import Trainer, TrainingArguments

    case = Case("spade", "AutoModelForSeq2SeqLM", "default")
    sizes = {"vocab_size": 512, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

    def run(folder, resume=None):
        torch.manual_seed(0)
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=12,
            save_steps=8,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=0,
        )
        stream = make(documents[:1], tokenizer, repeat=True, shuffle_window=10)
        trainer = Trainer(case.model(**sizes), args, train_dataset=stream)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model

    losses, model = run(tmp_path / "a")
    assert len(losses) == 12
    resumed, again = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-8"))
    assert resumed[-4:] == losses[-4:]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_bad_input(documents, tokenizer):
    with pytest.raises(ValueError, match="can be read only once"):
        make(iter(documents), tokenizer)
    with pytest.raises(ValueError, match="a single string"):
        make("text", tokenizer)
    with pytest.raises(ValueError, match="no sentinel tokens"):
        make(documents, byte_tokenizer())
    with pytest.raises(ValueError, match="only 64.*`num_sentinels` >= 114"):
        SpanCorruptionStream(documents, tokenizer, input_length=2048)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        CausalBlockStream(documents, byte_tokenizer(eos=False), block_length=8)
    for options in ({"shuffle_window": -1}, {"rank": 2, "world_size": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(documents, tokenizer, **options)
    for texts in ([], ["", " "], ["short"]):
        with pytest.raises(ValueError, match="fewer tokens than one block"):
            next(iter(make(texts, tokenizer, repeat=True)))
    with pytest.raises(ValueError, match="`state` must be"):
        make(documents, tokenizer).load_state_dict({"epoch": 1})
    with pytest.raises(ValueError, match="column `text`"):
        next(iter(make([3, 4], tokenizer)))
