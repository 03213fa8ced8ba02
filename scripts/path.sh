#!/usr/bin/env bash
# The whole path in miniature with Muon: pretrain, fine-tune what came of it, evaluate, ask. `bash scripts/path.sh`
#
# Like scripts/demo.sh it needs bash and Python 3.11+ and makes an environment in .venv (or HF_MUON_VENV); nothing but
# packages is downloaded. Some minutes on 2 cores after the installation. Start it again at will: what is done is skipped,
# and a training that was interrupted goes on. PATH_DIR (default runs/path) takes the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

OUT="${PATH_DIR:-runs/path}"
PRETRAIN_STEPS="${PATH_PRETRAIN_STEPS:-300}"
SFT_STEPS="${PATH_SFT_STEPS:-150}"

make_environment "${HF_MUON_VENV:-.venv}" recipes,eval
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

launch() { accelerate launch --config_file recipes/accelerate_configs/cpu.yaml "$@"; }

say "1/5 data from the standard library"
python scripts/offline_data.py

say "2/5 pretraining, $PRETRAIN_STEPS steps"
launch scripts/pretrain.py --config recipes/offline/pretrain/config_muon.yaml --output_dir "$OUT/pretrain" \
    --max_steps "$PRETRAIN_STEPS" --max_test_blocks 128

say "3/5 fine-tuning, $SFT_STEPS steps"
launch scripts/sft.py --config recipes/offline/sft/config_muon.yaml --output_dir "$OUT/sft" \
    --model_name_or_path "$OUT/pretrain" --max_steps "$SFT_STEPS"

say "4/5 evaluation on questions about modules that training never saw"
python scripts/evaluate.py "$OUT/sft" --suite offline_choice --data_dir data/offline/benchmarks --chat_template \
    --device cpu --batch_size 16 --out "$OUT/evaluation"

say "5/5 a question"
python scripts/generate.py "$OUT/sft" --chat "What does the function \`json.dumps\` do?" --max_new_tokens 40
