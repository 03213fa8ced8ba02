#!/usr/bin/env bash
# Fine-tune a model with optim="muon" from a fresh clone, and compare with AdamW: `bash scripts/demo.sh`.
#
# Needs bash and Python 3.11+. Makes an environment in .venv (or HF_MUON_VENV), builds data from Python's own standard
# library, and trains: under 5 minutes on 2 cores, after the installation. Start it again at will: what is done is skipped,
# and a training that was interrupted goes on from its last checkpoint. DEMO_DIR (default runs/demo) takes the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

OUT="${DEMO_DIR:-runs/demo}"
DATA=data/offline
# 120 steps on plain text, so that fine-tuning starts from a model that has seen Python. By AdamW, as most public models.
BASE_STEPS="${DEMO_BASE_STEPS:-120}"
SFT_STEPS="${DEMO_SFT_STEPS:-150}"

make_environment "${HF_MUON_VENV:-.venv}" recipes

# The demo needs nothing from a hub and reports to nobody.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# One process with two threads; waiting threads sleep, or they would take the cores from those that compute.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

train() { # script, recipe, output folder, more options
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml "scripts/$1" --config "$2" --output_dir "$3" "${@:4}"
}

say "1/5 data from the standard library (15 s)"
python scripts/offline_data.py --out "$DATA"

start=$SECONDS
say "2/5 a little pretraining, $BASE_STEPS steps (about 1 min on 2 cores)"
train pretrain.py recipes/offline/pretrain/config_adamw.yaml "$OUT/base" --max_steps "$BASE_STEPS" \
    --eval_steps "$BASE_STEPS" --max_test_blocks 128

for optimizer in muon adamw; do
    [ "$optimizer" = muon ] && step=3 || step=4
    say "$step/5 fine-tuning with $optimizer, $SFT_STEPS steps (about 1.5 min on 2 cores)"
    train sft.py "recipes/offline/sft/config_$optimizer.yaml" "$OUT/sft-$optimizer" --model_name_or_path "$OUT/base" \
        --max_steps "$SFT_STEPS" --eval_steps $((SFT_STEPS / 3)) --save_steps $((SFT_STEPS / 3))
done
trained=$((SECONDS - start))

say "5/5 figure and results (training took $trained s in all)"
python scripts/plot.py "$OUT/sft-muon" "$OUT/sft-adamw" --out "$OUT/demo.png" \
    --title "Fine-tuning a 1.8M-parameter Qwen2 on conversations about Python, same budget"
python -m hf_muon explain "$OUT/sft-muon"
python - "$OUT" <<'PYTHON'
import json, sys
from pathlib import Path

print("\nheld-out loss (conversations about modules that training never saw)")
for name, label in (("sft-muon", "Muon"), ("sft-adamw", "AdamW")):
    results = json.loads((Path(sys.argv[1]) / name / "eval_results.json").read_text())
    print(f"  {label:6} {results['eval_loss_before']:.4f} before -> {results['eval_loss']:.4f} after")
print(f"figure: {Path(sys.argv[1]) / 'demo.png'}")
PYTHON
