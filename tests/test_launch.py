"""Scripts that nobody edited, such as TRL's, with ``optim="muon"``: started by ``accelerate launch`` and torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch_of_trl_sft(tmp_path, processes):
    model, rows, out = tmp_path / "model", tmp_path / "rows", tmp_path / "out"
    tiny.qwen2().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    rows.mkdir()
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3"}]
    (rows / "train.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(16)))
    # accelerate starts several CPU processes only through MPI; torchrun does it everywhere.
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1", "-m"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [sys.executable, "-m", *launcher]
    command += ["hf_muon.run", "trl.scripts.sft", "--optim", "muon", "--optim_args", "momentum=0.9"]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(out)]
    command += ["--max_steps=2", "--per_device_train_batch_size=2", "--logging_steps=1", "--use_cpu", "--bf16=false"]
    command += ["--max_length=64", "--report_to=none", "--save_steps=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "The optimizer of this run is hf_muon.Muon" in done.stderr
        and done.stderr.count("trainable parameters: Muon") == 1
    )
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    # 16 rows, 2 per process and step: what two steps are of an epoch tells how many processes there were.
    assert state["epoch"] == pytest.approx(2 * 2 * processes / 16)
    assert [x["muon/update_rms"] > 0 for x in state["log_history"] if "loss" in x] == [True, True]


def test_a_rank_ends_after_gloos_threads(tmp_path):
    # What a loaded machine does to gloo's thread: still at the last collective when the script is done. Without the
    # pause one of its requests for the interpreter's lock meets the shutdown, and the process ends in a signal.
    script = tmp_path / "late.py"
    script.write_text(
        "import time, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "work = dist.all_reduce(torch.ones(1), async_op=True)\n"
        "work.get_future().then(lambda done: [time.sleep(0.005) for _ in range(60)])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "hf_muon.run", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
