"""Malformed conversations never reach a trainer: which rows are kept, what is reported, and what a run trains on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import conversations
import pytest
from conversations import PROBLEM, ROW, Reporter, Rules, check, has_messages, keep_good, load, problem
from datasets import Dataset

from . import tiny

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 96  # tokens; one per byte in the tiny tokenizer


def turn(role, content):
    return {"role": role, "content": content}


def good(number):
    return [turn("system", "short"), turn("user", f"n {number}?"), turn("assistant", f"it is {number}")]


ASK = turn("user", "hi")
# What is in the file, in order: the messages of a row, and what must be said about it (None: it is trained on).
ROWS = [
    (good(0), None),
    ([{"content": "no role"}, turn("assistant", "a")], "missing role: turn 1"),
    ([ASK, turn(None, "null role")], "missing role: turn 2"),
    ([ASK, turn("tool", "a")], "unknown role: turn 2, 'tool', expected one of system, user, assistant"),
    (good(4), None),
    ([ASK, turn("assistant", "")], "empty content: turn 2"),
    ([turn("user", " \n"), turn("assistant", "a")], "empty content: turn 1"),
    ([ASK, ASK], "no assistant turn: 2 turns"),
    ([], "no assistant turn: 0 turns"),
    ([ASK, turn("assistant", 5)], "content is not text: turn 2, int"),
    ([ASK, turn("assistant", None)], "content is not text: turn 2, NoneType"),
    ([ASK, turn("assistant", [{"type": "text", "text": "a"}])], "content is not text: turn 2, list"),
    ([ASK, {"role": "assistant"}], "content is not text: turn 2, NoneType"),
    ("user: hi", "messages is not a list: str"),
    (None, "messages is not a list: NoneType"),
    (["hi", "a"], "turn is not a mapping: turn 1, str"),
    ([ASK, turn("assistant", "x" * 100_000)], "turn too long: turn 2, 100,000 characters, the limit is 100,000"),
    ([ASK, turn("assistant", "x" * 99_999)], "conversation too long: 100,020 tokens, max_length is 96"),
    ([ASK, turn("assistant", "x" * 75)], None),  # 96 tokens: exactly what fits
    ([ASK, turn("assistant", "x" * 76)], "conversation too long: 97 tokens, max_length is 96"),
    (good(20), None),
]
KEPT = [number for number, (_, wrong) in enumerate(ROWS) if wrong is None]
BAD = [
    {"split": "train", "row": number, "id": f"row_{number}", "problem": wrong}
    for number, (_, wrong) in enumerate(ROWS)
    if wrong is not None
]


def write(folder, rows, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"row_{i}", "messages": messages, "source": "here"}) for i, messages in enumerate(rows)]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return write(tmp_path / "data", [messages for messages, _ in ROWS])


def rules(**changes):
    return Rules(**{"tokenizer": tiny.tokenizer(), "max_tokens": LIMIT, **changes})


def report(out):
    return [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_exactly_the_good_rows_are_kept_and_each_bad_one_is_reported_once(folder, tmp_path, streaming, capsys):
    split = load(folder, streaming=streaming)["train"]
    assert has_messages(split)
    kept = keep_good(check(split, rules()), Reporter(tmp_path / "run"), name="train")
    for _ in range(2):  # a second epoch reports nothing twice
        rows = list(kept)
        assert [row["id"] for row in rows] == [f"row_{number}" for number in KEPT]
        assert [row["messages"] for row in rows] == [ROWS[number][0] for number in KEPT]
        assert set(rows[0]) == {"id", "messages", "source"}
    assert report(tmp_path / "run") == BAD
    if not streaming:
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(
            f"train: {len(BAD)} of 21 rows are not trained on (4 content is not text, 2 missing role, "
        )
        assert said[1] == "  row 1 (id row_1): missing role: turn 1"
        assert len(said) == 2 + conversations.SHOWN


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_refusing_stops_before_training_and_names_rows_but_not_for_length_alone(folder, tmp_path, streaming):
    split = check(load(folder, streaming=streaming)["train"], rules())
    with pytest.raises(ValueError, match=rf"{len(BAD)} .*rows.*\n  row 1 \(id row_1\): missing role: turn 1"):
        keep_good(split, Reporter(tmp_path / "run"), name="train", refuse=True)
    assert report(tmp_path / "run") == BAD
    long = write(tmp_path / "long", [good(0), [ASK, turn("assistant", "x" * 200)]])
    split = check(load(long, streaming=streaming)["train"], rules())
    kept = keep_good(split, Reporter(tmp_path / "other"), name="train", refuse=True)
    assert [row["id"] for row in kept] == ["row_0"]
    assert [row["row"] for row in report(tmp_path / "other")] == [1]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_nothing_left_is_an_error(tmp_path, streaming):
    folder = write(tmp_path / "data", [[ASK], None])
    split = check(load(folder, streaming=streaming)["train"], rules())
    with pytest.raises(ValueError, match="nothing is left of the train data"):
        keep_good(split, Reporter(tmp_path / "run"), name="train")
    assert len(report(tmp_path / "run")) == 2


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_types_that_change_late_in_a_file_are_still_seen(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    many = [[turn("user", "x" * 50_000), turn("assistant", "a")]] * 230  # more than the 10 MB whose types count for all
    folder = write(tmp_path / "data", [good(0), *many, [ASK, turn("assistant", 5)], "text", good(1)])
    split = check(load(folder, streaming=streaming)["train"], rules(max_turn_characters=10_000))
    kept = keep_good(split, Reporter(tmp_path / "run"), name="train")
    assert [row["id"] for row in kept] == ["row_0", "row_233"]
    assert [row["problem"] for row in report(tmp_path / "run")[-2:]] == [
        "content is not text: turn 2, int",
        "messages is not a list: str",
    ]


def test_what_a_template_or_tokenizer_refuses_is_a_bad_row():
    template = "{{ raise_exception('system turns are not supported') }}"
    wrong = problem({"messages": good(0)}, rules(template=template))
    assert wrong.startswith("refused by the chat template or tokenizer: TemplateError('system turns are not supp")
    surrogate = [ASK, turn("assistant", "\ud800")]
    assert problem({"messages": surrogate}, rules()).startswith("refused by the chat template or tokenizer")


def test_without_a_length_limit_only_malformed_rows_go():
    assert not problem({"messages": [ASK, turn("assistant", "x" * 99_999)]}, rules(max_tokens=None))
    assert problem({"messages": [ASK]}, rules(max_tokens=None))


def test_rows_keep_their_numbers_when_some_are_held_out_first(tmp_path):
    import sft

    split = check(Dataset.from_list([{"messages": good(i) if i % 2 else [ASK]} for i in range(8)]), rules())
    train, test = sft.hold_out(split, None, 2)
    reporter = Reporter(tmp_path)
    train = keep_good(train, reporter, name="train")
    assert [row["row"] for row in report(tmp_path)] == [2, 6]
    assert len(train) == 4 and test[ROW] == [0, 4] and all(test[PROBLEM])


def test_another_process_than_the_first_writes_nothing(folder, tmp_path):
    reporter = Reporter(tmp_path / "run", writes=False)
    assert len(keep_good(check(load(folder)["train"], rules()), reporter, name="train")) == len(KEPT)
    assert not (tmp_path / "run").exists()


def test_lines_that_are_no_json_objects_are_bad_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = Path(write(tmp_path / "data", [good(0), good(1)])) / "train.jsonl"
    first, last = file.read_text().splitlines()
    file.write_text("\n".join([first[:-9], first, "[1]", last]))
    kept = keep_good(check(load(str(file.parent))["train"], rules()), Reporter(tmp_path / "run"), name="train")
    assert [row["id"] for row in kept] == ["row_0", "row_1"]
    assert [row["row"] for row in report(tmp_path / "run")] == [0, 2]


@pytest.fixture
def model(tmp_path):
    tiny.qwen2(max_position_embeddings=LIMIT).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def options(model, folder, out, *more):
    named = {"model_name_or_path": model, "dataset_name": folder, "output_dir": str(out), "max_length": str(LIMIT)}
    named |= {"optim": "muon", "learning_rate": "1e-3", "max_steps": "4", "per_device_train_batch_size": "2"}
    named |= {"use_cpu": "true", "bf16": "false", "report_to": "none", "save_strategy": "no"}
    named |= {"assistant_only_loss": "true", "eos_token": "<|im_end|>"}
    return [part for key, value in named.items() for part in (f"--{key}", value)] + list(more)


def without(text, parts):
    """What is left of a text when parts that must all be in it are taken out (packed rows are one sequence)."""
    for part in parts:
        assert part in text
        text = text.replace(part, "")
    return text


@pytest.mark.parametrize("extra", [[], ["--packing", "true"], ["--dataset_streaming", "true"]], ids=" ".join)
def test_a_run_trains_on_the_good_rows_alone_and_on_answers_with_their_end(model, folder, tmp_path, monkeypatch, extra):
    import sft

    inputs, answers = [], []
    tokenizer = tiny.tokenizer()

    class Recording(sft.FineTuner):
        def training_step(self, model, batch, *args, **kwargs):
            for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                inputs.append(tokenizer.decode([token for token in ids if token != tokenizer.pad_token_id]))
                answers.append(tokenizer.decode([token for token in labels if token != -100]))
            return super().training_step(model, batch, *args, **kwargs)

    monkeypatch.setattr(sft, "FineTuner", Recording)
    monkeypatch.setattr(sys, "argv", ["sft.py", *options(model, folder, tmp_path / "run", *extra)])
    sft.main()
    talks = [ROWS[number][0] for number in KEPT]
    rendered = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    expected = [talk[-1]["content"] + "<|im_end|>" for talk in talks]
    assert without("".join(inputs), rendered) == ""
    assert without("".join(answers), expected) == ""
    assert report(tmp_path / "run") == BAD


@pytest.mark.distributed
@pytest.mark.parametrize("extra", [[], ["--dataset_streaming", "true"]], ids=" ".join)
def test_two_ranks_agree_and_report_once(model, folder, tmp_path, extra):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "scripts/sft.py"), *options(model, folder, tmp_path / "run", *extra)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert report(tmp_path / "run") == BAD
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 4


def test_a_misspelt_choice_is_an_error_even_in_a_recipe(tmp_path):
    import sft

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bad_rows: refues\noutput_dir: x\n")
    with pytest.raises(ValueError, match="bad_rows='refues' must be skip or refuse"):
        sft.make_parser().parse_args_and_config(["--config", str(recipe)])
