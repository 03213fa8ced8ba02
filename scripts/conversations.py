"""Conversations in ``messages`` are checked row by row before training; a row that fails is kept out and reported.

Nothing is repaired or cut. What is wrong with a row is one line of text, ``KIND: DETAIL``, beside the row's number and
id in ``bad_rows.jsonl`` of the run's folder; the kinds are counted on the terminal.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, concatenate_datasets, load_dataset, load_dataset_builder
from datasets.features import Json
from datasets.packaged_modules.json.json import Json as JsonBuilder
from datasets.utils import tqdm
from jinja2.exceptions import TemplateError

ROLES = ("system", "user", "assistant")
ROW, PROBLEM = "row_number", "row_problem"  # columns while a split is being checked
TOO_LONG = "conversation too long"
SHOWN = 5
REPORT = "bad_rows.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a conversation must be like to be trained on."""

    tokenizer: Any
    template: str | None = None
    """The run's chat template, if it is not the tokenizer's own."""
    max_tokens: int | None = None
    """Of the whole conversation, special tokens included; None: any number, and TRL cuts what does not fit."""
    max_turn_characters: int = 100_000
    """A turn of as many or more is reported without being tokenized, whatever time that would take."""


def load(name: str, config: str | None = None, *, streaming: bool = False) -> Mapping[str, Any]:
    """``load_dataset``, except that a file of JSON lines with ``messages`` is parsed line by line.

    datasets infers types from the first rows: a later number among texts would silently become a text, a list among
    texts or a broken line end the run. Here the line alone is bad.
    """
    builder = load_dataset_builder(name, name=config)
    files = getattr(builder.config, "data_files", None)
    if not isinstance(builder, JsonBuilder) or not all(".jsonl" in file for paths in files.values() for file in paths):
        return load_dataset(name, name=config, streaming=streaming)
    # NamedSplit keys are no plain texts, which the text reader wants.
    source = {"path": "text", "data_files": {str(split): list(paths) for split, paths in files.items()}}
    some = next(iter(load_dataset(**source, streaming=True).values())).take(100)
    first = next((row for row in map(_parsed, some) if row["messages"] is not None), None)
    if first is None:
        return load_dataset(name, name=config, streaming=streaming)
    lines = load_dataset(**source, streaming=streaming)
    features = Features({column: Json() for column in first})
    options = {"fn_kwargs": {"columns": list(first)}, "remove_columns": ["text"], "features": features}
    return {split: part.map(_parsed, **options) for split, part in lines.items()}


def _parsed(line: Mapping[str, str], columns: Iterable[str] = ()) -> dict[str, Any]:
    try:
        row = json.loads(line["text"])
    except ValueError:
        row = None
    row = row if isinstance(row, dict) else {}
    return {column: row.get(column) for column in columns or {"messages": None, **row}}


def problem(row: Mapping[str, Any], rules: Rules) -> str:
    """What is wrong with a row, as ``KIND: DETAIL``; empty if nothing is."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return f"messages is not a list: {type(messages).__name__}"
    for number, turn in enumerate(messages, start=1):
        wrong = _problem_of_turn(turn, rules)
        if wrong:
            kind, _, detail = wrong.partition(": ")
            return f"{kind}: turn {number}" + (f", {detail}" if detail else "")
    if not any(turn["role"] == "assistant" for turn in messages):
        return f"no assistant turn: {len(messages)} turns"
    return _problem_of_whole(messages, rules)


def _problem_of_turn(turn: Any, rules: Rules) -> str:
    if not isinstance(turn, Mapping):
        return f"turn is not a mapping: {type(turn).__name__}"
    role, content = turn.get("role"), turn.get("content")
    if role is None:
        return "missing role"
    if role not in ROLES:
        return f"unknown role: {role!r:.50}, expected one of {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"content is not text: {type(content).__name__}"
    if not content.strip():
        return "empty content"
    if len(content) >= rules.max_turn_characters:
        return f"turn too long: {len(content):,} characters, the limit is {rules.max_turn_characters:,}"
    return ""


def _problem_of_whole(messages: list[Any], rules: Rules) -> str:
    try:
        encoded = rules.tokenizer.apply_chat_template(messages, chat_template=rules.template, return_dict=True)
    # Templates raise for what they cannot render (two user turns in a row, a system turn), tokenizers for characters.
    except (TemplateError, ValueError, TypeError) as error:
        return f"refused by the chat template or tokenizer: {error!r:.200}"
    if rules.max_tokens is not None and len(encoded["input_ids"]) > rules.max_tokens:
        return f"{TOO_LONG}: {len(encoded['input_ids']):,} tokens, max_length is {rules.max_tokens:,}"
    return ""


def check(split: Any, rules: Rules, *, processes: int | None = None, name: str = "") -> Any:
    """``split`` with two more columns: every row's number and its problem. A stream is checked as it is read."""
    options: dict[str, Any] = {"with_indices": True, "fn_kwargs": {"rules": rules}}
    if not isinstance(split, Dataset):
        return split.map(_checked, **options)
    options |= {"num_proc": processes, "desc": f"Checking the conversations of the {name} dataset"}
    columns = split.map(_checked, remove_columns=split.column_names, **options)
    return concatenate_datasets([split, columns], axis=1)


def _checked(row: dict[str, Any], index: int, rules: Rules) -> dict[str, Any]:
    return {ROW: index, PROBLEM: problem(row, rules)}


@dataclass
class Reporter:
    """Writes bad rows to ``bad_rows.jsonl``; only the process that ``writes`` does."""

    folder: Path
    writes: bool = True
    seen: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.writes:
            (self.folder / REPORT).unlink(missing_ok=True)

    def add(self, split: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Report each row once, however often a stream starts over."""
        new = [row for row in rows if (split, row[ROW]) not in self.seen]
        self.seen.update((split, row[ROW]) for row in new)
        if not new or not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / REPORT).open("a", encoding="utf-8") as stream:
            for row in new:
                line = {"split": split, "row": row[ROW], "id": row.get("id"), "problem": row[PROBLEM]}
                stream.write(json.dumps(line) + "\n")

    def summary(self, split: str, rows: list[Mapping[str, Any]], total: int | None = None) -> str:
        """How many rows of each kind, and the first few."""
        kinds = Counter(row[PROBLEM].partition(":")[0] for row in rows).most_common()
        counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
        lines = [f"{split}: {len(rows):,}{f' of {total:,}' if total else ''} rows are not trained on ({counted})"]
        lines += [describe(row) for row in rows[:SHOWN]]
        return "\n".join([*lines, f"  all of them: {self.folder / REPORT}"])


def describe(row: Mapping[str, Any]) -> str:
    """A bad row on the terminal."""
    return f"  row {row[ROW]} (id {row.get('id')}): {row[PROBLEM]}"


def keep_good(split: Any, reporter: Reporter, *, name: str, refuse: bool = False) -> Any:
    """The rows of a :func:`check`-ed split without a problem.

    A stream's bad rows are reported as they are met, after a first pass over all of it if they are to be refused.

    Raises:
        ValueError: no row is good, or one is malformed and they are to be refused. A conversation that is well-formed
            and merely too long is never refused: every large dataset has some.
    """
    bad, total = [], None
    if isinstance(split, Dataset):
        total = len(split)
        problems = list(split[PROBLEM])
        shown = [column for column in ("id", ROW, PROBLEM) if column in split.column_names]
        bad = list(split.select([i for i, text in enumerate(problems) if text]).select_columns(shown))
        kept = split.select([i for i, text in enumerate(problems) if not text])
    else:
        bar = tqdm(split, desc=f"Checking the conversations of the {name} dataset", unit=" rows", disable=not refuse)
        bad = [row for row in bar if row[PROBLEM]] if refuse else []
        kept = split.filter(_Good(reporter, name))
    reporter.add(name, bad)
    summary = reporter.summary(name, bad, total) if bad else ""
    if refuse and any(not row[PROBLEM].startswith(TOO_LONG) for row in bad):
        raise ValueError(f"{summary}\nbad_rows=refuse: mend or remove them, or set bad_rows=skip")
    if next(iter(kept), None) is None:
        raise ValueError(f"nothing is left of the {name} data.\n{summary or f'{reporter.folder / REPORT} says why'}")
    if summary and reporter.writes:
        print(summary, flush=True)
    return kept.remove_columns([ROW, PROBLEM])


@dataclass
class _Good:
    """A stream's filter, which reports what it drops."""

    reporter: Reporter
    name: str

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if row[PROBLEM] and (self.name, row[ROW]) not in self.reporter.seen:
            self.reporter.add(self.name, [row])
            if self.reporter.writes and len(self.reporter.seen) <= SHOWN:
                logger.warning("%s: not trained on, as all in %s:\n%s", self.name, REPORT, describe(row))
        return not row[PROBLEM]


def has_messages(split: Dataset | IterableDataset | None) -> bool:
    """Whether a split holds conversations; of a stream that does not know its columns the first row is asked."""
    if split is None:
        return False
    return "messages" in (split.column_names or next(iter(split), {}))
