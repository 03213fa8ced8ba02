"""A few rows for each of the fine-tuning suite's tasks, with the columns of the real data sets."""

import json
from pathlib import Path

QUESTION = {"question": "2 + 2 = ?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "abstract_algebra"}
WORD_PROBLEM = {"question": "Ann has 2 apples and buys 3. How many has she?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
HUMANEVAL = {
    "task_id": "local/0",
    "prompt": 'def one():\n    """Return 1."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function that returns one.",
    "code": "def one():\n    return 1",
    "test_list": ["assert one() == 1"] * 3,
    "test_setup_code": "",
    "challenge_test_list": [],
}
CMATH = {"question": "小明有2个苹果，又买了3个，一共有几个？", "golden": "5", "reasoning_step": 1, "num_digits": 1}
ROWS = {
    "gsm8k": {"train": [WORD_PROBLEM] * 6, "test": [WORD_PROBLEM] * 3},
    "mmlu_cot_llama_abstract_algebra": {"test": [QUESTION] * 3},
    "mmlu_abstract_algebra": {"dev": [QUESTION] * 5, "test": [QUESTION] * 3},
    "humaneval": {"test": [HUMANEVAL] * 2},
    "humaneval_instruct": {"test": [HUMANEVAL] * 2},
    "mbpp": {"test": [MBPP] * 2},
    "mbpp_instruct": {"test": [MBPP] * 2},
    "cmath": {"validation": [CMATH] * 3, "test": [CMATH] * 2},
}


def write(folder: Path, tasks=tuple(ROWS)) -> Path:
    """``folder/TASK/SPLIT.jsonl`` for each of the tasks."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, rows in ROWS[task].items():
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
