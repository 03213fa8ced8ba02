"""Run a Python program that a model wrote, in a process of its own with limits: ``run(program).passed``.

What holds everywhere on Linux: CPU seconds, memory of a process, size of a file, wall time, an empty temporary folder
as working directory, an empty environment, no standard input. Where the kernel allows it, and :func:`protections`
says so: no network and no sight of other processes (namespaces of its own, and nothing in them survives the program),
and no file read or written outside of Python's and the system's folders and the temporary one (Landlock).

What it does not protect against: flaws of the kernel; many processes or many small files for as long as the wall time
lasts; reading what lies in the system's own folders; programs that guess how they are judged. It is no place for code
that somebody wrote to attack: use a virtual machine without secrets for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# util-linux: new user, network, System V and process namespaces; when their first process dies, so do all in them.
NAMESPACES = ("unshare", "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
# From linux/landlock.h: numbers of the three system calls, and of the rights that each ABI version has.
CREATE, ADD_RULE, RESTRICT = 444, 445, 446
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
READABLE = (sys.base_prefix, sys.prefix, "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/urandom")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    reason: str


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run ``program``; it passes if its last line is reached: no error, no exit before, no limit exceeded."""
    limits = limits or Limits()
    # Only who gets to the end writes the word back: a program that exits early with status 0 does not pass.
    word = secrets.token_hex(16)
    order = json.dumps({"program": program, "word": word, "limits": asdict(limits)})
    command = [*(NAMESPACES if namespaces() else ()), sys.executable, "-I", "-B", str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(order.encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"timed out after {limits.wall_seconds:g} s")
        finally:
            # The group, for children of the program outlive it where there are no namespaces.
            _kill(process)
        answer.seek(0)
        said = answer.read(1000).decode(errors="replace")
    if said == word:
        return Outcome(True, "passed")
    return Outcome(False, said or f"ended early with status {process.returncode}")


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def namespaces() -> bool:
    """Whether this machine lets a program have no network."""
    try:
        return subprocess.run([*NAMESPACES, "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def landlock_version() -> int:
    """Of the kernel's Landlock, 0 without."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, ctypes.CDLL(None, use_errno=True).syscall(CREATE, None, 0, 1))


def protections() -> dict[str, bool]:
    """What is enforced here beyond the limits on time, memory and file size."""
    return {"no network": namespaces(), "no files outside of its folder": landlock_version() > 0}


def _only_files_below(folder: str) -> None:
    """Take away all other files from this process and its children, for good."""
    version = landlock_version()
    if not version:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    every = (1 << RIGHTS[min(version, max(RIGHTS))]) - 1
    rules = _checked(libc, CREATE, struct.pack("Q", every), 8, 0)
    reading, of_a_file = EXECUTE | READ_FILE | READ_DIR, every & (EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE)
    allowed = [(path, reading) for path in READABLE] + [("/dev/null", every), (folder, every)]
    for path, rights in allowed:
        if Path(path).exists():
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = rights if Path(path).is_dir() else rights & of_a_file
            _checked(libc, ADD_RULE, rules, 1, struct.pack("=Qi", rights, handle), 0)
            os.close(handle)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, which Landlock asks for
        raise OSError(ctypes.get_errno(), "prctl")
    _checked(libc, RESTRICT, rules, 0)
    os.close(rules)


def _checked(libc: Any, *arguments: Any) -> int:
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {arguments[0]}")
    return result


def _limit(limits: Limits) -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _child() -> None:
    """In the new process: read the order, give up rights, run the program, and say how it ended."""
    order = json.loads(sys.stdin.read())
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    _limit(Limits(**order["limits"]))
    _only_files_below(os.getcwd())
    said = order["word"]
    try:
        exec(compile(order["program"], "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: whoever exits has not run to the end
        said = f"failed: {error!r}"
    os.write(answer, said.encode()[:1000])
    os._exit(0)  # no exit handlers of the program


@dataclass(frozen=True)
class CodeEval:
    """Stands in for the metric ``code_eval``, which runs programs with this process's rights."""

    limits: Limits = Limits()

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Iterable[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """pass@k as in "Evaluating Large Language Models Trained on Code", equation 1, and what became of each."""
        programs = [f"{code}\n{test}" for codes, test in zip(predictions, references, strict=True) for code in codes]
        from tqdm import tqdm  # not above: the new processes start with this file too

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            running = pool.map(lambda program: run(program, self.limits), programs)
            outcomes = iter(
                list(tqdm(running, total=len(programs), desc="running programs", disable=len(programs) < 2))
            )
        by_task = {i: [next(outcomes) for _ in codes] for i, codes in enumerate(predictions)}
        counts = [(len(task), sum(outcome.passed for outcome in task)) for task in by_task.values()]
        scores = {
            f"pass@{m}": sum(1 - math.comb(n - c, m) / math.comb(n, m) for n, c in counts) / len(counts)
            for m in k
            if counts and all(n >= m for n, _ in counts)
        }
        return scores, by_task


if __name__ == "__main__":
    _child()
