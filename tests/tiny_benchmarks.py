"""A few rows for a task of every benchmark of the suites, with the columns of the real data sets."""

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
OPTIONS = {"A": "3", "B": "4", "C": "5", "D": "6"}
MMLU_PRO = {
    **{"question_id": 1, "category": "math", "src": "local", "question": "2 + 2 = ?", "options": list("3456789")},
    **{"answer": "B", "answer_index": 1, "cot_content": "A: Let's think step by step. It is 4. The answer is (B)."},
}
MATH = {"problem": "1 + 1 = ?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."}
# The harness leaves the question itself out of the examples that it shows.
TRIVIA = [{"question": f"What is {i}", "answer": {"aliases": [str(i), f"no. {i}"], "value": str(i)}} for i in range(7)]
ROWS = {
    "gsm8k": {"train": [WORD_PROBLEM] * 6, "test": [WORD_PROBLEM] * 3},
    "mmlu_cot_llama_abstract_algebra": {"test": [QUESTION] * 3},
    "mmlu_abstract_algebra": {"dev": [QUESTION] * 5, "test": [QUESTION] * 3},
    "humaneval": {"test": [HUMANEVAL] * 2},
    "humaneval_instruct": {"test": [HUMANEVAL] * 2},
    "mbpp": {"test": [MBPP] * 2},
    "mbpp_instruct": {"test": [MBPP] * 2},
    "mmlu_pro_math": {"validation": [MMLU_PRO] * 5, "test": [MMLU_PRO] * 2},
    "bbh_cot_fewshot_boolean_expressions": {"test": [{"input": "not True is", "target": "False"}] * 2},
    "triviaqa": {"train": TRIVIA, "validation": [TRIVIA[1]] * 2},
    "minerva_math_algebra": {"train": [MATH] * 2, "test": [MATH] * 2},
    "ceval-valid_law": {
        split: [{"id": 1, "question": "2 + 2 = ?", **OPTIONS, "answer": "B", "explanation": ""}] * 5
        for split in ("dev", "val")
    },
    "cmmlu_anatomy": {split: [{"Question": "2 + 2 = ?", **OPTIONS, "Answer": "B"}] * 5 for split in ("dev", "test")},
    "cmath": {"validation": [CMATH] * 3, "test": [CMATH] * 2},
}


def write(folder: Path, tasks=tuple(ROWS)) -> Path:
    """``folder/TASK/SPLIT.jsonl`` for each of the tasks."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, rows in ROWS[task].items():
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
