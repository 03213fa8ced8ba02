"""The offline data: deterministic, of the right schema, and without leaks from the held-out split."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from offline_data import CHAT_TEMPLATE, _answers, _matches, _unique
from stdlib_corpus import SourceFile, conversations, fraction, is_held_out, source_files

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "offline_data.py"

MODULE = '''"""Tools for tests.

More about them.
"""

def double(x: int, *, twice: bool = False) -> int:
    """Return x doubled.

    >>> y = 2
    >>> double(y)
    4
    """
    return 2 * x

def _private():
    """Hidden."""

class Box:
    """A box."""

    def open(self):
        """Open the box."""
        return self
'''


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("offline")
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(out)], check=True, capture_output=True, timeout=120)
    return out


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_conversations_hold_what_the_module_says():
    talks = list(conversations(SourceFile("tools.py", MODULE, held_out=False)))
    answers = {message["content"] for talk in talks for message in talk if message["role"] == "assistant"}
    assert "Tools for tests." in answers
    assert "```python\ndef double(x: int, *, twice: bool=False) -> int\n```" in answers
    assert "```python\ndef double(x: int, *, twice: bool=False) -> int:\n    return 2 * x\n```" in answers
    assert "```\n4\n```" in answers
    assert "Return x doubled." in answers
    assert "A box." in answers
    assert "Open the box." in answers
    assert not any("Hidden" in answer for answer in answers)


@pytest.mark.parametrize("text", ["def broken(:\n", "x = 1\n", "'''\\x00'''\n", "def f():\n    'doc'\n"])
def test_awkward_modules_give_conversations_or_none_but_no_error(text):
    for talk in conversations(SourceFile("odd.py", text, held_out=False)):
        assert talk[-1]["role"] == "assistant"


def test_every_source_file_gives_alternating_turns_with_content():
    for file in source_files()[::10]:
        for talk in conversations(file):
            turns = [message["role"] for message in talk if message["role"] != "system"]
            assert turns == ["user", "assistant"] * (len(turns) // 2)
            assert all(message["content"].strip() for message in talk), file.path


def test_split_depends_on_the_path_alone_and_keeps_c_and_python_twins_together():
    assert fraction("a") == fraction("a") != fraction("b")
    assert is_held_out("_pydecimal.py") == is_held_out("decimal.py")
    assert is_held_out("json/__init__.py") == is_held_out("json.py")


def test_tests_tables_and_machine_made_files_are_left_out():
    paths = [file.path for file in source_files()]
    assert "json/decoder.py" in paths
    assert not [p for p in paths if "/test/" in p or p.startswith(("test/", "encodings/")) or "_sysconfigdata" in p]


def test_repeated_answers_are_dropped():
    file = SourceFile("tools.py", MODULE, held_out=False)
    assert len(list(_unique([file, file]))) == len({_answers(row) for row in _unique([file])})


def test_nothing_of_the_held_out_modules_is_in_the_training_data(built):
    texts = {split: {row["text"] for row in read(built / "pretrain" / f"{split}.jsonl")} for split in ("train", "test")}
    talks = {split: read(built / "sft" / f"{split}.jsonl") for split in ("train", "test")}
    assert not texts["train"] & texts["test"]
    assert not {row["source"] for row in talks["train"]} & {row["source"] for row in talks["test"]}
    assert not {_answers(row) for row in talks["train"]} & {_answers(row) for row in talks["test"]}
    # A module held out of one corpus is held out of the other: a pretrained model has not read its answers.
    assert all(is_held_out(row["source"].removeprefix("python-stdlib/")) for row in talks["test"])
    assert len(talks["test"]) > 100
    assert len(talks["train"]) > 10 * len(talks["test"])


def test_every_question_has_its_own_answer_among_four_of_held_out_modules(built):
    rows, talks = read(built / "benchmarks" / "offline_choice" / "test.jsonl"), read(built / "sft" / "test.jsonl")
    answers = {talk["messages"][0]["content"]: talk["messages"][1]["content"] for talk in talks}
    assert len(rows) > 100
    for row in rows:
        assert row["choices"][row["answer"]] == answers[row["question"]]
        assert len(set(row["choices"])) == 4 and set(row["choices"]) <= set(answers.values())
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_rows_have_tulu_3s_schema(built):
    from datasets import load_dataset

    splits = load_dataset(str(built / "sft"))
    assert sorted(splits) == ["test", "train"]
    assert splits["train"].column_names == ["id", "messages", "source"]
    assert len(set(splits["train"]["id"])) == len(splits["train"])


def test_tokenizer_loads_as_it_was_trained_and_masks_assistant_turns_with_their_end(built):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    saved = Tokenizer.from_file(str(built / "model" / "tokenizer.json"))
    text = read(built / "pretrain" / "test.jsonl")[0]["text"]
    tokens = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 4096
    assert tokens == saved.encode(text).ids
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == CHAT_TEMPLATE

    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(masked) == "Me.<|im_end|>"


def test_a_second_build_is_skipped_and_a_forced_one_is_identical(built, tmp_path):
    before = {path: path.read_bytes() for path in sorted(built.rglob("*")) if path.is_file()}
    command = [sys.executable, str(SCRIPT), "--out", str(built)]
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "nothing to do" in again.stdout
    subprocess.run([*command, "--force"], check=True, capture_output=True, timeout=120)
    assert {path: path.read_bytes() for path in sorted(built.rglob("*")) if path.is_file()} == before


def test_a_broken_manifest_or_another_version_is_not_taken_for_complete(tmp_path):
    manifest = tmp_path / "manifest.json"
    assert not _matches(manifest, {"data_version": 1})
    manifest.write_text("{")
    assert not _matches(manifest, {"data_version": 1})
    manifest.write_text('{"data_version": 2}')
    assert not _matches(manifest, {"data_version": 1})
    assert _matches(manifest, {"data_version": 2})
