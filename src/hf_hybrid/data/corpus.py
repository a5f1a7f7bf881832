"""The embedded corpus: English prose from every Python installation, for demonstrations and tests without a download.

Its sources are the language reference in `pydoc_data.topics` and the docstrings of the standard library and of installed
libraries, read from their files with `ast` without importing them. They give documents for pretraining, (document,
summary) pairs (the body of a docstring and its first sentence), and a classification task (the library that a
docstring is from).

The result depends only on the installed versions: files are visited in the order of their names, and a hash of these
names selects files and splits. It is real text of a narrow kind; figures obtained on it say little about other text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tqdm.auto import tqdm

STANDARD_LIBRARY = "python"
FAMILIES = (STANDARD_LIBRARY, "numpy", "torch", "transformers", "sklearn", "scipy", "matplotlib", "pandas")

_SKIPPED_FOLDERS = frozenset(
    (
        "test",
        "tests",
        "testing",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "idlelib",
        "lib2to3",
        "_vendor",
        "pydoc_data",
    )
)
_SECTION = re.compile(
    r"^(?:(?:Args?|Arguments?|Parameters?|Returns?|Yields?|Raises?|Examples?|Notes?|References?|Attributes|See Also|Shape|Inputs?|"
    r"Outputs?|Usage|Keyword [Aa]rguments|Warns?|Methods|Other Parameters)\s*:{0,2}\s*$|[-=~^]{3,}\s*$|>>> |\.\. |```|[:@]\w+)"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_INNER_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LETTER_OR_SPACE = re.compile(r"[^\W\d_]| ")
_ALIASES = {"numpy": ("np",), "torch": ("pytorch",), "sklearn": ("scikit-learn", "scikit"), "matplotlib": ("mpl", "pyplot", "plt"), "pandas": ("pd",)}  # fmt: skip


@dataclass(frozen=True)
class Docstring:
    """One docstring: the library, the file inside it, the qualified name and the dedented text."""

    family: str
    module: str
    name: str
    text: str


def _share(text: str, salt: str = "") -> float:
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.blake2b((salt + text).encode(), digest_size=6).digest(), "big") / 2**48


def _root(family: str) -> Path | None:
    """Folder of a library, found without importing it."""
    if family == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    try:
        spec = importlib.util.find_spec(family)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _source_files(root: Path, max_bytes: int) -> list[Path]:
    """Source files of a library in the order of their names; if there are too many, those with the smallest hashes."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    named = [(path.relative_to(root).as_posix(), path) for path in files]
    chosen: list[tuple[str, Path]] = []
    size = 0
    for name, path in sorted(named, key=lambda item: (_share(item[0]), item[0])):
        size += path.stat().st_size
        if size > max_bytes and chosen:
            break
        chosen.append((name, path))
    return [path for _, path in sorted(chosen)]


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, class or function, and of the classes and functions in its body."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield prefix, inspect.cleandoc(text).strip()
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _definitions(child, f"{prefix}.{child.name}" if prefix else child.name)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _definitions(child, prefix)


def _parse(path: Path) -> ast.Module | None:
    """Syntax tree of a file, or None if it cannot be read (test data for other Python versions, unusual encodings)."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def collect_docstrings(
    families: Sequence[str] = FAMILIES, max_source_bytes: int = 3_000_000, progress: bool = False
) -> tuple[Docstring, ...]:
    """Docstrings of the installed libraries without exact duplicates. Read once per process.

    Args:
        families: top-level package names; `"python"` is the standard library. Packages that are not installed are left
            out.
        max_source_bytes: bytes of source code read per library (four times as much for the standard library).
        progress: show a progress bar.

    Returns:
        Docstrings in the order of families, files and definitions.
    """
    return _collect(tuple(families), max_source_bytes, progress)


@lru_cache(maxsize=2)
def _collect(families: tuple[str, ...], max_source_bytes: int, progress: bool) -> tuple[Docstring, ...]:
    files = []
    for family in families:
        if (root := _root(family)) is not None and root.is_dir():
            limit = 4 * max_source_bytes if family == STANDARD_LIBRARY else max_source_bytes
            files += [(family, root, path) for path in _source_files(root, limit)]
    found, seen = [], set()
    for family, root, path in tqdm(
        files, desc="Reading docstrings", unit=" files", disable=None if progress else True
    ):
        tree = _parse(path)
        if tree is None:
            continue
        module = path.relative_to(root).as_posix()
        for name, text in _definitions(tree, ""):
            key = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=12).digest()
            if len(text) >= 20 and key not in seen and not _SURROGATE.search(text):
                seen.add(key)
                found.append(Docstring(family, module, name, text))
    return tuple(found)


def language_reference() -> list[str]:
    """The pages of `pydoc_data.topics`, in the order of their names; empty if they are not installed."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError):
        return []
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return [topics[name].strip() for name in sorted(topics)]
    return []


def embedded_text_corpus(
    split: str | None = None,
    *,
    families: Sequence[str] = FAMILIES,
    max_source_bytes: int = 3_000_000,
    max_characters: int | None = None,
    validation_share: float = 0.05,
    with_reference: bool = True,
    progress: bool = False,
) -> list[str]:
    """Documents for pretraining: the pages of the language reference, and the docstrings of each file joined.

    Args:
        split: `"train"`, `"validation"` (about one document in twenty), or None for both.
        families: see `collect_docstrings`.
        max_source_bytes: see `collect_docstrings`.
        max_characters: approximate number of characters to stop after; documents are taken evenly from all sources.
        validation_share: share of the documents in `"validation"`. A smaller share is a subset of a larger one, here
            and in the two tasks below: `"train"` with a share of 0.2 contains no file that is validation in any of
            them.
        with_reference: include the language reference.
        progress: show a progress bar.

    Raises:
        ValueError: unknown split, or nothing found.
    """
    _check_split(split)
    pages = language_reference() if with_reference else []
    documents = [(f"topics/{index:03}", page) for index, page in enumerate(pages)]
    by_file: dict[str, list[str]] = {}
    for item in collect_docstrings(families, max_source_bytes, progress):
        by_file.setdefault(f"{item.family}/{item.module}", []).append(item.text)
    documents += [(name, "\n\n".join(texts)) for name, texts in by_file.items()]
    if split is not None:
        documents = [item for item in documents if _split_of(item[0], validation_share) == split]
    if max_characters is not None:
        chosen, size = set(), 0
        for name, text in sorted(documents, key=lambda item: _share(item[0], "order")):
            if size >= max_characters:
                break
            chosen.add(name)
            size += len(text)
        documents = [item for item in documents if item[0] in chosen]
    if not documents:
        raise ValueError(
            "No embedded text was found: this installation has neither docstrings nor `pydoc_data.topics`."
        )
    return [text for _, text in documents]


def embedded_summarization_pairs(
    split: str | None = None,
    *,
    families: Sequence[str] = FAMILIES,
    max_source_bytes: int = 3_000_000,
    progress: bool = False,
) -> list[dict[str, str]]:
    """Pairs of `document`, the prose of a docstring after its first sentence, and `summary`, that sentence.

    Files, not docstrings, are assigned to the splits (one in ten to `validation`), and a text that shares half of its
    6-word sequences with an earlier one is left out, so that validation does not repeat training.

    Args:
        split: `"train"`, `"validation"`, or None for both.
        families: see `collect_docstrings`.
        max_source_bytes: see `collect_docstrings`.
        progress: show a progress bar.

    Returns:
        Rows with `name` (of the class or function itself, in words; that of the class before it for special methods; empty for
        modules), `document`, `summary`, `family`, `module` and `split`.
    """
    _check_split(split)
    rows = []
    for item in collect_docstrings(families, max_source_bytes, progress):
        summary, body = _summary_and_body(item.text)
        if (
            3 <= len(summary.split()) <= 40
            and 15 <= len(body.split()) <= 400
            and _is_prose(body)
            and _is_prose(summary)
        ):
            rows.append(
                {
                    "name": name_in_words(_own_name(item.name)),
                    "document": body,
                    "summary": summary,
                    "family": item.family,
                    "module": item.module,
                    "split": _split_of(f"{item.family}/{item.module}", 0.1),
                }
            )
    rows = _without_repetitions(rows, "document")
    return [row for row in rows if split is None or row["split"] == split]


def embedded_classification_examples(
    split: str | None = None,
    *,
    families: Sequence[str] = FAMILIES,
    max_per_class: int = 800,
    max_source_bytes: int = 3_000_000,
    progress: bool = False,
) -> list[dict[str, str | int]]:
    """Docstrings as `sentence`, with the library they come from as `label`.

    Code and parameter sections are removed, and the names of the libraries are replaced with "library". Classes with
    fewer than 100 rows are left out. Splits and duplicates are treated as in `embedded_summarization_pairs`; one file
    in five is validation.

    Args:
        split: `"train"`, `"validation"`, or None for both.
        families: see `collect_docstrings`.
        max_per_class: maximum number of rows per class, both splits together.
        max_source_bytes: see `collect_docstrings`.
        progress: show a progress bar.

    Returns:
        Rows with `sentence`, `label` (0, 1 ...), `label_name`, `module` and `split`.
    """
    _check_split(split)
    names = sorted({name for family in FAMILIES for name in (family, *_ALIASES.get(family, ()))} - {STANDARD_LIBRARY})
    own_names = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b", re.IGNORECASE)
    rows: list[dict[str, str]] = []
    for item in collect_docstrings(families, max_source_bytes, progress):
        text = " ".join(_prose(item.text)).strip()
        if len(text.split()) >= 12 and _is_prose(text):
            words = own_names.sub("library", text).split()[:120]
            key = f"{item.family}/{item.module}"
            rows.append(
                {
                    "sentence": " ".join(words),
                    "family": item.family,
                    "module": item.module,
                    "split": _split_of(key, 0.2),
                }
            )
    rows = _without_repetitions(rows, "sentence")
    chosen: list[dict[str, str | int]] = []
    label = 0
    for family in families:
        members = [row for row in rows if row["family"] == family]
        if len(members) < 100:
            continue
        members = sorted(members, key=lambda row: _share(row["sentence"], "choice"))[:max_per_class]
        chosen += [
            {
                "sentence": row["sentence"],
                "label": label,
                "label_name": family,
                "module": row["module"],
                "split": row["split"],
            }
            for row in members
        ]
        label += 1
    chosen.sort(key=lambda row: _share(str(row["sentence"]), "mix"))
    return [row for row in chosen if split is None or row["split"] == split]


def _own_name(name: str) -> str:
    """The last part of a qualified name; a special method (`__init__`) says nothing without its class."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].startswith("__") else parts[-1:])


def name_in_words(name: str) -> str:
    """A qualified name in lower-case words: `"XMLReader.get_feature"` becomes `"xml reader get feature"`."""
    return " ".join(_INNER_WORD.sub(" ", name).replace(".", " ").replace("_", " ").lower().split())


def _check_split(split: str | None) -> None:
    if split not in (None, "train", "validation"):
        raise ValueError(f"`split` is {split!r}; accepted are 'train', 'validation' and None for both.")


def _split_of(name: str, validation_share: float) -> str:
    return "validation" if _share(name, "split") < validation_share else "train"


def _prose(text: str) -> list[str]:
    """Paragraphs, each on one line, up to the first parameter section, example or directive."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if _SECTION.match(line.strip()):
            if re.match(r"[-=~^]{3,}", line.strip()) and paragraphs[-1]:
                paragraphs.pop()  # the underlined title
            break
        if line.strip():
            paragraphs[-1].append(line.strip())
        elif paragraphs[-1]:
            paragraphs.append([])
    return [" ".join(lines) for lines in paragraphs if lines]


def _summary_and_body(text: str) -> tuple[str, str]:
    """First sentence of a docstring, and the prose after its first paragraph; empty strings if there is none."""
    paragraphs = _prose(text)
    if len(paragraphs) < 2:
        return "", ""
    return paragraphs[0], "\n\n".join(paragraphs[1:])


def _is_prose(text: str) -> bool:
    """Whether the text is mostly words: at least four fifths letters and spaces, and hardly any markup."""
    plain = len(_LETTER_OR_SPACE.findall(text))
    return plain >= 0.8 * len(text) and text.count("`") <= 0.06 * len(text) and text.count("{") <= 2


def _without_repetitions(rows: Iterable[dict[str, str]], column: str) -> list[dict[str, str]]:
    """Drops rows that share half of their 6-word sequences with rows kept before."""
    seen: set[int] = set()
    kept = []
    for row in rows:
        words = re.findall(r"\w+", row[column].lower())
        sequences = {_hash_words(words[start : start + 6]) for start in range(max(1, len(words) - 5))}
        if 2 * len(sequences & seen) < len(sequences):
            kept.append(row)
        seen |= sequences
    return kept


def _hash_words(words: Sequence[str]) -> int:
    """A 64-bit number for a sequence of words, the same in every process."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")
