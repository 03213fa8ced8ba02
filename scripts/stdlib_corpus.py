"""Texts and conversations from the running Python's standard library: pure reading, nothing is imported or executed.

The same rule decides for both corpora whether a source file is held out, so a model pretrained on the training texts
has never seen a module that its fine-tuning is tested on.
"""

from __future__ import annotations

import ast
import doctest
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests are repetitive and not shipped everywhere (Debian, slim images); site-packages is not the standard library.
SKIPPED_DIRECTORIES = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Character maps and key tables: numbers, nearly equal to each other, so a held-out one would be known by heart.
SKIPPED_PREFIXES = ("encodings/", "idlelib/Icons", "lib2to3/pgen2/literals", "html/entities", "pydoc_data/")
HELD_OUT_SHARE = 0.06
MAX_ANSWER_CHARS = 1200
MAX_CODE_CHARS = 900
SYSTEM_PROMPTS = ("You are a concise Python tutor.", "You answer questions about Python's standard library.")


@dataclass(frozen=True)
class SourceFile:
    """One source file of the standard library."""

    path: str
    text: str
    held_out: bool

    @property
    def module(self) -> str:
        """Dotted name: ``json/__init__.py`` is ``json``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Entry:
    """A documented function, method or class."""

    name: str
    kind: str
    signature: str
    doc: str
    code: str


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but ``key``: ``hash()`` differs from process to process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def is_held_out(path: str) -> bool:
    """Whether this file is in the held-out split. ``_pydecimal`` goes with ``decimal``: they share their docstrings."""
    stem = path.removesuffix(".py").removesuffix("/__init__")
    return fraction("held-out " + stem.removeprefix("_").removeprefix("py")) < HELD_OUT_SHARE


def source_files(root: Path | None = None) -> list[SourceFile]:
    """All usable source files in path order.

    Raises:
        FileNotFoundError: no standard library sources at ``root`` (some embedded Pythons ship only bytecode).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        machine_made = file.name.startswith("_sysconfigdata")
        if machine_made or path.startswith(SKIPPED_PREFIXES) or SKIPPED_DIRECTORIES.intersection(path.split("/")):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 200:
            found.append(SourceFile(path, text, is_held_out(path)))
    if not found:
        raise FileNotFoundError(f"no Python sources under {root}: use a Python that ships its standard library as .py")
    return found


def conversations(file: SourceFile) -> Iterator[list[dict[str, str]]]:
    """Conversations about one module: what things do, their signatures, their code, what their doctests print."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):  # bad_grammar samples that lib2to3 ships, null bytes
        return
    summary = _paragraph(ast.get_docstring(tree) or "")
    if summary:
        yield _talk(file.module, (f"What is the Python module `{file.module}` for?", summary))
    for entry in _entries(file, tree):
        yield from _about(file.module, entry)


def _entries(file: SourceFile, tree: ast.Module) -> Iterator[Entry]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _entry(file.text, node, "")
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield from _entry(file.text, child, node.name + ".")


def _entry(text: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    doc = ast.get_docstring(node)
    if not doc or node.name.startswith("_"):
        return
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        kind, signature = "class", f"class {node.name}({bases})" if bases else f"class {node.name}"
    else:
        kind = "method" if prefix else "function"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        signature = f"{word} {node.name}({ast.unparse(node.args)}){returns}"
    code = "" if isinstance(node, ast.ClassDef) else _code_without_docstring(node)
    yield Entry(prefix + node.name, kind, signature, doc, code)


def _code_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The function's source, normalised; empty when there is nothing but the docstring."""
    body = node.body[1:]
    if not body:
        return ""
    bare = type(node)(**{field: getattr(node, field, None) for field in node._fields})
    bare.body, bare.decorator_list = body, []
    return ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, node)))


def _about(module: str, entry: Entry) -> Iterator[list[dict[str, str]]]:
    """Several question forms per entry; which wording is used depends on the name alone."""
    name, pick = f"{module}.{entry.name}", int(fraction(f"form {module}.{entry.name}") * 1000)
    summary, full = _paragraph(entry.doc), entry.doc if len(entry.doc) <= MAX_ANSWER_CHARS else ""
    wordings = (
        f"What does the {entry.kind} `{name}` do?",
        f"Explain `{name}` from Python's standard library.",
        f"I found `{entry.name}` in the module `{module}`. What is it for?",
    )
    what = (wordings[pick % 3], full or summary)
    how = (f"How is `{name}` declared?", f"```python\n{entry.signature}\n```")
    if pick % 4 == 0:
        yield _talk(name, what, ("And how is it declared?", how[1]))
    else:
        yield _talk(name, what)
        yield _talk(name, how)
    if entry.code and len(entry.code) <= MAX_CODE_CHARS:
        block = f"```python\n{entry.code}\n```"
        yield _talk(name, (f"Summarize this function in one sentence.\n\n{block}", summary))
        task = f"Write the body of this Python {entry.kind}.\n\n```python\n{entry.signature}:\n    '''{summary}'''\n```"
        yield _talk(name, (task, block))
    yield from _from_doctest(name, entry.doc)


def _from_doctest(name: str, doc: str) -> Iterator[list[dict[str, str]]]:
    """One conversation per docstring with examples: a turn for each example that prints something."""
    try:
        examples = doctest.DocTestParser().get_examples(doc)
    except ValueError:  # inconsistent indentation, e.g. in doctest's own docstrings
        return
    turns: list[tuple[str, str]] = []
    unseen: list[str] = []
    for example in examples:
        unseen.append(example.source.strip())
        if example.want and len(turns) < 4:
            code = "\n".join(unseen)
            turns.append((f"What does this print?\n\n```python\n{code}\n```", f"```\n{example.want.strip()}\n```"))
            unseen = []
    if turns and sum(len(question) + len(answer) for question, answer in turns) <= 2 * MAX_ANSWER_CHARS:
        yield _talk(f"doctest {name}", *turns)


def _talk(key: str, *turns: tuple[str, str]) -> list[dict[str, str]]:
    """Messages of alternating user and assistant turns; one conversation in five opens with a system prompt."""
    pick = int(fraction("system " + key + turns[0][0]) * 1000)
    messages = [{"role": "system", "content": SYSTEM_PROMPTS[pick % 2]}] if pick % 5 == 0 else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _paragraph(doc: str) -> str:
    """The first paragraph on one line: the summary by PEP 257."""
    return " ".join(doc.strip().split("\n\n")[0].split())[:MAX_ANSWER_CHARS]
