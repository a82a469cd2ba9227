#!/usr/bin/env bash
# The whole life of an adapter, one command a stage: make pairs, train, judge, report, merge, publish.
# Offline, on the bundled model; the answers are judged by the bundled task's true reward.
#
# GPU:      none
# Peak:     0.9 GiB of the machine's memory
# Time:     2.3 minutes of CPU time
# Command:  bash recipes/whole_life.sh [OUTPUT_FOLDER]        (with dpo-peft on the PATH: . .venv/bin/activate)
# Expected: 282 pairs of 300 prompts; held-out accuracy 0.99 after 18 steps ("the longer answer is better" scores 0.47);
#           a merged model that is 5e-7 nats per token from the adapter's; the files that would be published
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive

out=${1:-outputs/whole_life}
prompts=${PROMPTS:-300}   # how many prompts get answers
steps=${STEPS:--1}        # of training; -1: as many as the pairs give
model=dpo_peft/quickstart/model
held_out=${HELD_OUT:-dpo_peft/quickstart/data/test.jsonl}
mkdir -p "$out"

echo "== 1. Sample four answers to each prompt, and pair the best with the worst"
dpo-peft pairs "$model" --prompts dpo_peft/quickstart/data/train.jsonl --max_prompts "$prompts" \
    --num_candidates 4 --max_new_tokens 120 --dtype float32 --batch_size 128 \
    --reward dpo_peft.quickstart:review_reward --min_margin 0.5 --output "$out/pairs.jsonl" --overwrite

echo "== 2. Train a LoRA adapter on them"
dpo-peft train --config recipes/quickstart.yaml --model_name_or_path "$model" \
    --dataset_name "$out/pairs.jsonl" --eval_dataset_name "$held_out" \
    --max_steps "$steps" --output_dir "$out/adapter"

echo "== 3. Judge it as a reward model on held-out pairs"
dpo-peft score "$out/adapter" --dataset_name "$held_out" --output "$out/scores.jsonl" --worst 2

echo "== 4. One page about the run"
dpo-peft report "$out/adapter" --output "$out/report.html"

echo "== 5. Merge it into its base, and measure what that changes"
rm -rf "$out/merged"
dpo-peft merge "$out/adapter" --output_dir "$out/merged" --dataset_name "$held_out"

echo "== 6. Check what would be published (leave --dry_run out to publish it)"
dpo-peft push "$out/adapter" --repo_id me/positive-reviews --base_model me/review-writer --license apache-2.0 --dry_run
