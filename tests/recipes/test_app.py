"""The functions behind the buttons of the page, without the page: open, write, look inside, measure."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from factories import Case
from torch import nn
from word_tokenizer import word_tokenizer

from hf_hybrid.app.measuring import (
    active_tokens,
    draw_lengths,
    measure,
    measure_lengths,
    reach_of_states,
)
from hf_hybrid.app.opening import OpenCheckpoint, Shelf, open_checkpoint
from hf_hybrid.app.writing import Decoding, write
from hf_hybrid.recipes import app


def save(folder: Path, model_type: str, auto_name: str, variant: str = "default", **options: bool) -> str:
    Case(model_type, auto_name, variant).model().save_pretrained(folder)
    word_tokenizer(**options).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder_decoder(checkpoint: Path) -> OpenCheckpoint:
    return open_checkpoint(str(checkpoint))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> OpenCheckpoint:
    return open_checkpoint(save(tmp_path_factory.mktemp("lm"), "seqboat", "AutoModelForCausalLM"))


def written(pieces: list[tuple[str, bool]]) -> str:
    return "".join(piece for piece, is_new in pieces if is_new)


# ------------------------------------------------------------------------------------------------------------- opening


def test_what_is_open_is_described(encoder_decoder: OpenCheckpoint, language_model: OpenCheckpoint) -> None:
    assert encoder_decoder.task == "rewrite" and language_model.task == "continue"
    assert (
        "SpadeForConditionalGeneration" in encoder_decoder.describe() and " M parameters" in encoder_decoder.describe()
    )
    assert language_model.has_routers and not encoder_decoder.has_routers


@pytest.mark.parametrize("name", ["", "  ", "no/such/folder", "spade", "../../<b>"])
def test_no_such_checkpoint(name: str) -> None:
    with pytest.raises(ValueError, match="checkpoint|cannot be loaded"):
        open_checkpoint(name)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="type 'bert'; accepted are spade"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "spade", "architectures": ["SpadeForPoetry"]}')
    with pytest.raises(ValueError, match="class 'SpadeForPoetry'; accepted are"):
        open_checkpoint(str(tmp_path))


def test_code_of_a_checkpoint_never_runs_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "strange", "architectures": ["Strange"], "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}'
    )
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError):
        open_checkpoint(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_the_shelf_loads_once_and_has_an_end(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def open_it(name: str, **options: object) -> str:
        loaded.append(name)
        return name.upper()

    monkeypatch.setattr("hf_hybrid.app.opening.open_checkpoint", open_it)
    shelf = Shelf(2)
    assert [shelf.get(name) for name in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert loaded == ["a", "b", "c", "b"] and list(shelf.opened) == ["a", "b"]


# ------------------------------------------------------------------------------------------------------------- writing


def test_the_text_comes_as_it_is_written(encoder_decoder: OpenCheckpoint) -> None:
    """Each state continues the one before; the last is that of `generate`."""
    text, decoding = "The list is sorted in place.", Decoding(12)
    states = [written(pieces) for pieces in write(encoder_decoder, text, decoding)]
    assert states and all(after.startswith(before) for before, after in zip(states, states[1:]))
    inputs = encoder_decoder.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    ids = encoder_decoder.model.generate(**inputs, **decoding.options())[0]
    assert states[-1] == encoder_decoder.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_causal_model_continues(language_model: OpenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model.model.generation_config, "eos_token_id", None)  # no text ends before the limit
    *before, last = write(language_model, "w5 w6 w7", Decoding(6))
    assert len(before) > 2  # a state for every word
    assert last[0] == ("w5 w6 w7", False) and len(last[1][0].split()) <= 6 and last[1][1]
    sampled = [written(list(write(language_model, "w5 w6", Decoding(8, temperature=5.0)))[-1]) for _ in range(3)]
    assert len(set(sampled)) > 1


def test_gaps_are_filled_in_their_places(encoder_decoder: OpenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter(
        [
            "<extra_id_0> a",
            "<extra_id_0> a b<extra_id_1>",
            "<extra_id_0> a b<extra_id_1> c</s> <extra_id_0> d<extra_id_7> e",
        ]
    )
    asked = []

    def generated(opened: OpenCheckpoint, source: str, decoding: Decoding, **options: bool) -> object:
        asked.append(source)
        return told

    monkeypatch.setattr("hf_hybrid.app.writing._generated", generated)
    states = list(write(encoder_decoder, "One ____ two <extra_id_5>.", Decoding()))
    assert asked == ["One <extra_id_0> two <extra_id_1>."]
    assert states == [
        [("One ", False), (first, first != "___"), (" two ", False), (second, second != "___"), (".", False)]
        for first, second in (("a", "___"), ("a b", "___"), ("a b", "c"))
    ]


def test_gaps_by_the_model_itself(encoder_decoder: OpenCheckpoint) -> None:
    *_, last = write(encoder_decoder, "One ___ two <b>___</b>", Decoding(8))
    assert "".join(piece for piece, is_new in last if not is_new).replace("___", "").startswith("One  two <b>")
    with pytest.raises(ValueError, match="33 gaps, but the tokenizer of this model has 32"):
        list(write(encoder_decoder, "a ___ " * 33, Decoding(8)))


def test_masked_words_are_guessed(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path, "mega", "AutoModelForMaskedLM", mask=True))
    assert opened.task == "guess"
    (pieces,) = write(opened, "w5 ___ w6 ___", Decoding())
    assert [is_new for _, is_new in pieces] == [False, True, False, True, False] and written(pieces)
    with pytest.raises(ValueError, match="no gap"):
        list(write(opened, "w5 w6", Decoding()))


def test_what_cannot_be_written(
    encoder_decoder: OpenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no text yet"):
        list(write(encoder_decoder, " \n", Decoding()))
    with pytest.raises(ValueError, match="`max_new_tokens`"):
        Decoding(0)
    with pytest.raises(ValueError, match="`temperature`"):
        Decoding(temperature=-1)
    monkeypatch.setattr(encoder_decoder.model.generation_config, "eos_token_id", None)  # it never ends by itself
    with pytest.raises(ValueError, match="max_target_positions"):  # found while generating, in another thread
        list(write(encoder_decoder, "a list", Decoding(5000)))
    classifier = open_checkpoint(save(tmp_path, "bst", "AutoModelForSequenceClassification"))
    with pytest.raises(ValueError, match="does not write|not write"):
        list(write(classifier, "w5", Decoding()))
    limited = OpenCheckpoint("m", encoder_decoder.model, encoder_decoder.tokenizer, "rewrite")
    with pytest.raises(ValueError, match="at most 3 are accepted"):
        limited.encode("a list of many words", max_tokens=3)


def test_two_at_once_get_their_own(language_model: OpenCheckpoint) -> None:
    """As if each were alone, also while a third gives up half way."""
    texts = ["w5 w6 w7", "w20 w9 w8 w7"]
    alone = [list(write(language_model, text, Decoding(20)))[-1] for text in texts]
    together: dict[str, list] = {}

    def ask(text: str) -> None:
        together[text] = list(write(language_model, text, Decoding(20)))[-1]

    given_up = write(language_model, "w11 w12", Decoding(10_000))
    next(given_up)
    given_up.close()
    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[text] for text in texts] == alone


# -------------------------------------------------------------------------------------------------------------- inside


def test_active_tokens(language_model: OpenCheckpoint, encoder_decoder: OpenCheckpoint) -> None:
    found = active_tokens(language_model, "w5 w6 w7")
    assert [word for word, _ in found.words] == ["w5", "w6", "w7"] and len(found.figure.axes) == 2
    layers = [active_tokens(language_model, "w5 w6 w7", layer).words for layer in range(language_model.depth)]
    for place, (_, value) in enumerate(found.words):
        assert value == pytest.approx(sum(layer[place][1] for layer in layers) / len(layers))
    with pytest.raises(ValueError, match="`layer` must lie"):
        active_tokens(language_model, "w5", 99)
    with pytest.raises(ValueError, match="only SeqBoat models"):
        active_tokens(encoder_decoder, "a list")


@pytest.mark.parametrize("model_type", ["spade_lm", "mega", "seqboat", "bst", "longvq"])
def test_reach_of_every_architecture(model_type: str) -> None:
    model = Case(model_type, "AutoModelForCausalLM", "default").model()
    figure = reach_of_states(OpenCheckpoint("m", model, None, "continue"), length=64)
    spectrum, reach = figure.axes
    assert 1 <= len(reach.lines) <= 4 and reach.get_legend() is not None


def test_models_without_states_say_so() -> None:
    with pytest.raises(ValueError, match="no state space layers"):
        reach_of_states(OpenCheckpoint("m", nn.Linear(2, 2), None, "read"))


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("model_type", ["spade", "longvq"])
def test_lengths_double_within_the_limits(model_type: str) -> None:
    auto_name = "AutoModelForSeq2SeqLM" if model_type == "spade" else "AutoModelForCausalLM"
    opened = OpenCheckpoint("m", Case(model_type, auto_name, "default").model().eval(), None, "read")
    *_, rows = measure_lengths(opened, max_seconds=60, first=16, longest=50)
    assert [row.length for row in rows] == [16, 32] and all(row.seconds > 0 for row in rows)
    assert rows[0].bytes < rows[1].bytes < 4 * rows[0].bytes
    (single,) = measure_lengths(opened, max_seconds=0, first=16)
    assert len(single) == 1
    assert [axes.get_xscale() for axes in draw_lengths(rows).axes] == ["log", "log"]


def test_models_of_values_are_measured(tmp_path: Path) -> None:
    model = Case("mega", "AutoModelForAudioClassification", "default").model()
    model.save_pretrained(tmp_path)
    opened = open_checkpoint(str(tmp_path))
    assert not opened.reads_text and measure(opened, 32).bytes > 0
    with pytest.raises(ValueError, match="images or sounds"):
        opened.encode("text")


# ------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("wrong", [{"port": 0}, {"port": 70_000}, {"max_open": 0}, {"fixed": True}])
def test_options_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        app.main(wrong)


def test_gradio_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match=r"gradio.*hf_hybrid\[app\]"):
        app.main({})
