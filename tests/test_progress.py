"""Long phases show a bar, one process draws it, and ``disable_tqdm`` silences it."""

import datasets
import generate
import lifecycle
import pytest
import sandbox
import torch
from continuation import Streamed
from conversations import PROBLEM, ROW, Reporter, keep_good
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.utils import logging

from . import tiny


@pytest.fixture
def bars():
    """Bars are the process's own state, and recipes that other tests ran in it may have silenced them."""
    datasets.enable_progress_bars()
    logging.enable_progress_bar()
    yield
    datasets.enable_progress_bars()
    logging.enable_progress_bar()


def arguments(tmp_path, **changes):
    return TrainingArguments(**tiny.arguments(tmp_path, **changes))


def read_over():
    stream = Dataset.from_list([{"input_ids": [i]} for i in range(6)]).to_iterable_dataset()
    next(Streamed(stream).rows(4))


def refuse(tmp_path):
    rows = Dataset.from_list([{"messages": "x", ROW: i, PROBLEM: ""} for i in range(3)]).to_iterable_dataset()
    keep_good(rows, Reporter(tmp_path), name="train", refuse=True)


@pytest.mark.parametrize("quiet", [False, True])
def test_reading_over_a_stream_and_checking_one_draw_bars_unless_told_not_to(tmp_path, capsys, bars, quiet):
    lifecycle.progress_bars(arguments(tmp_path, disable_tqdm=quiet))
    read_over()
    refuse(tmp_path)
    drawn = capsys.readouterr().err
    assert ("reading over: 100%" in drawn) == ("4/4" in drawn) == (not quiet)
    assert ("Checking the conversations of the train dataset: 3 rows" in drawn) == (not quiet)


def test_other_ranks_draw_nothing(tmp_path, capsys, bars, monkeypatch):
    args = arguments(tmp_path, disable_tqdm=False)
    monkeypatch.setattr(TrainingArguments, "local_process_index", 1)
    lifecycle.progress_bars(args)
    read_over()
    assert capsys.readouterr().err == ""


def test_programs_of_a_model_are_counted_as_they_end(capsys):
    references, predictions = ["assert f() == 1"] * 2, [["def f(): return 1"], ["def f(): return 2"]]
    scores, _ = sandbox.CodeEval().compute(references=references, predictions=predictions, k=[1])
    assert scores == {"pass@1": 0.5}
    assert "running programs: 100%" in capsys.readouterr().err


def test_generation_counts_new_tokens_without_those_of_the_prompt(monkeypatch):
    # As on a terminal.
    monkeypatch.setattr(generate, "tqdm", lambda **options: tqdm(**{**options, "disable": False}))
    bar = generate.Bar(8)
    bar.put(torch.arange(5))
    for _ in range(3):
        bar.put(torch.tensor([1]))
    assert bar.bar.n == 3
    bar.end()
