"""Programs that a model wrote: what passes, what is stopped, and what they cannot reach."""

import os
import sys
import time
from pathlib import Path

import pytest
from sandbox import CodeEval, Limits, Outcome, protections, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are Linux's")
LIMITS = Limits(cpu_seconds=1, wall_seconds=8.0, memory_bytes=1 << 28)


def needs(protection):
    return pytest.mark.skipif(
        not protections()[protection], reason=f"this kernel does not allow a process to have {protection}"
    )


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("assert sum(range(5)) == 10", True),
        ("import math, re, collections, heapq, hashlib\nassert hashlib.md5(b'').hexdigest()", True),
        ("open('mine.txt', 'w').write('a')\nassert open('mine.txt').read() == 'a'", True),
        ("print('x' * 10**6)", True),
        ("assert False", False),
        ("def broken(:", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import os\nos.write(1, b'passed')\nos._exit(0)", False),
        ("import ctypes\nctypes.string_at(0)", False),
    ],
)
def test_a_program_passes_if_it_runs_to_its_end(program, passes):
    assert run(program, LIMITS).passed is passes


def test_an_infinite_loop_is_stopped_by_its_cpu_time():
    start = time.monotonic()
    assert not run("while True: pass", LIMITS).passed
    assert time.monotonic() - start < LIMITS.wall_seconds - 1, "by the wall time instead"


def test_a_sleeper_is_stopped_by_the_wall_time():
    limits = Limits(wall_seconds=2.0)
    assert run("import time\ntime.sleep(60)", limits) == Outcome(False, "timed out after 2 s")


def test_a_memory_hog_is_stopped():
    assert run("a = bytearray(1 << 30)", LIMITS) == Outcome(False, "failed: MemoryError()")
    assert run("a = bytearray(1 << 30)", Limits(memory_bytes=1 << 32)).passed


def test_a_writer_of_large_files_is_stopped(tmp_path):
    program = "with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))"
    assert "File too large" in run(program, LIMITS).reason


@needs("no files outside of its folder")
def test_files_of_others_can_be_neither_written_nor_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(secret)!r}, 'a')",
        f"open({str(secret)!r}).read()",
        f"import os\nos.remove({str(secret)!r})",
        f"import os\nos.truncate({str(secret)!r}, 0)",
        f"import os\nos.listdir({str(tmp_path)!r})",
        f"import subprocess\nsubprocess.run(['cat', {str(secret)!r}], check=True)",
    ):
        assert not run(program, LIMITS).passed, program
        assert [file.name for file in tmp_path.iterdir()] == ["secret"]
        assert secret.read_text() == "s"


@needs("no network")
def test_there_is_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        assert "Error(" in run(program, LIMITS).reason
        exec(program, {})  # gets through outside, so the line above can fail


def test_nothing_survives_a_program():
    mark = f"sandbox-test-{os.getpid()}-{time.monotonic_ns()}"
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}])"
    assert run(child, LIMITS).passed
    time.sleep(0.3)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if mark.encode() in command]


def test_the_environment_and_folder_are_empty(monkeypatch):
    monkeypatch.setenv("A_SECRET", "s")
    assert run("import os\nassert 'A_SECRET' not in os.environ\nassert os.listdir() == []", LIMITS).passed


def test_pass_at_k_is_the_unbiased_estimate():
    good, bad = "def f(): return 1", "def f(): return 2"
    predictions = [[good, bad, bad, bad], [good, good, good, good]]
    scores, outcomes = CodeEval(LIMITS).compute(references=["assert f() == 1"] * 2, predictions=predictions, k=[1, 2])
    assert scores == {"pass@1": (0.25 + 1) / 2, "pass@2": (0.5 + 1) / 2}
    assert [[outcome.passed for outcome in task] for task in outcomes.values()] == [[True] + [False] * 3, [True] * 4]
