#!/usr/bin/env bash
# The same bytes, before and after a change that shall change no result: every stage trains in a
# small fixed run, and the SHA-256 of all it wrote is printed: tokenizer, shards, weights, the
# optimizer's state half-way, the weights of the run that was killed there and resumed, answers.
#
#     BIN=before BUILD=before/build test/same_bytes.sh > before.txt
#     test/same_bytes.sh > after.txt
#     diff before.txt after.txt
#
#   BIN=dir       where the stages' binaries are (default: here)
#   BUILD=dir     where build/world is (default: build)
#   THREADS=n     of each run (default 2); the bytes are the same for any number
#   ONLY=pattern  only the parts whose name matches, in bash's patterns: ONLY='grpo*'. What they are
#                 made from (world, base, sft, reward, reward_labels) runs all the same
#   METRICS=1     also prints the last two lines of each run's metrics.jsonl, without what a clock said
#   KEEP=dir      leaves what was written there, in place of a directory that is removed
#
# Compare on one machine, with one compiler: another instruction set rounds differently. It takes
# about a minute on two cores. Preferences are learned by `reward train` and `reward dpo`, or, where
# there is no such binary, by `rlhf reward` and `rlhf dpo`, their names before they were a stage of
# their own.
set -euo pipefail

BIN=$(realpath "${BIN:-$(dirname "$0")/..}")
BUILD=$(realpath "${BUILD:-$(dirname "$0")/../build}")
THREADS=${THREADS:-2}
ONLY=${ONLY:-*}

# Relative paths, so that no file that is written tells where it was made.
if [[ ${KEEP:-} ]]; then
  mkdir -p "$KEEP"
  cd "$KEEP"
else
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  cd "$scratch"
fi

fail() { echo "error: $*" >&2; exit 1; }
wanted() { # shellcheck disable=SC2053  # ONLY is a pattern
  [[ $1 == $ONLY ]]
}
# Runs a command; what it says is shown only when it fails.
quiet() { # COMMAND...
  "$@" >log.txt 2>&1 || { tail -n 20 log.txt >&2; fail "failed: $*"; }
}
# Prints the hash of each file, or of each file of weights or moments below a directory.
hashes() { # PATH...
  local path
  for path; do
    [[ -e $path ]] || fail "$path: missing, expected the run to write it"
    if [[ -d $path ]]; then
      find "$path" -name '*.safetensors' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    else
      sha256sum "$path"
    fi
  done
}
metrics() { # RUN
  [[ ${METRICS:-} && -e $1/metrics.jsonl ]] || return 0
  tail -n 2 "$1/metrics.jsonl" |
    sed -E 's/,"seconds":(\{[^}]*\}|[^,}]*)//; s/,"(tokens_per_second|peak_share)":[^,}]*//g' |
    sed "s|^|$1  |"
}
# A run: NAME COMMAND... writes to the directory NAME.
run() {
  local name=$1
  shift
  quiet "$@" -o "$name" --threads "$THREADS"
  ! wanted "$name" || { hashes "$name" && metrics "$name"; }
}
# The same for what no other part is made from: passed over when it is not wanted.
only() { ! wanted "$1" || run "$@"; }

# The run NAME that COMMAND makes is killed when it has saved for the first time, with more steps to
# come, and resumed. A process that was too fast for the eye finishes: then another try.
resumed() { # NAME COMMAND...
  local name=$1 try process
  shift
  wanted "$name" || return 0
  for try in {1..50}; do
    rm -rf "$name"
    "$@" -o "$name" --threads "$THREADS" >log.txt 2>&1 &
    process=$!
    while [[ ! -e $name/model/trainer_state.json ]] && kill -0 $process 2>/dev/null; do :; done
    kill -STOP $process 2>/dev/null || true
    if grep -q '"finished": false' "$name/model/trainer_state.json" 2>/dev/null; then break; fi
    kill -KILL $process 2>/dev/null || true
    wait $process 2>/dev/null || { tail -n 20 log.txt >&2; fail "failed: $*"; }
  done
  kill -KILL $process
  wait $process 2>/dev/null || true
  grep -q '"finished": false' "$name/model/trainer_state.json" ||
    fail "$name: found no checkpoint of an unfinished run in $try tries"
  rm -rf "$name.killed"
  cp -r "$name/model" "$name.killed"
  hashes "$name.killed"
  quiet "${@:1:STAGE_WORDS}" --resume -o "$name" --threads "$THREADS"
  hashes "$name"
  metrics "$name"
}
STAGE_WORDS=2 # of COMMAND: the binary and its subcommand

# -------------------------------------------------------------------------------------------------
# Documents, tokenizer, tokens

quiet "$BUILD/world" -o world --tokens 200000 --people 12 --pairs 120 --rankings 30
quiet "$BIN/bpe" train world/documents.jsonl world/conversations_sample.jsonl --vocab-size 512 \
  --pattern qwen2 --val-fraction .05 -o tokenizer
quiet "$BIN/bpe" encode tokenizer world/documents.jsonl --val-fraction .05 -o tokens/world
quiet "$BUILD/world" conversations world
if wanted tokens; then
  hashes world/documents.jsonl world/conversations.jsonl world/preferences.jsonl \
    tokenizer/tokenizer.json tokens/world_*.bin
fi

# -------------------------------------------------------------------------------------------------
# Base models: three shapes, two optimizers

pretrain=("$BIN/train_gpt" --data tokens/world --layers 2 --channels 64 --heads 2 --context 256
  --batch-tokens 1024 --micro-batch-tokens 512)
run base "${pretrain[@]}" --steps 150
only base_gpt2 "${pretrain[@]}" --family gpt2 --optimizer adamw --steps 8 --weight-decay .1
only base_llama "${pretrain[@]}" --family llama --kv-heads 1 --tied 1 --optimizer muon --steps 8 \
  --schedule cosine --warmup 3
STAGE_WORDS=1
resumed base_resumed "${pretrain[@]}" --steps 12 --save-every 7
resumed base_adamw_resumed "${pretrain[@]}" --optimizer adamw --steps 12 --save-every 7
only base_more "$BIN/train_gpt" --data tokens/world --init-from base --steps 4 --batch-tokens 1024

# -------------------------------------------------------------------------------------------------
# Assistants: all weights, or adapters

finetune=("$BIN/sft" --model base --data world/conversations.jsonl --val
  world/conversations_heldout.jsonl --batch-tokens 1024 --micro-batch-tokens 512)
run sft "${finetune[@]}" --steps 80
only sft_adamw "${finetune[@]}" --optimizer adamw --steps 6 --weight-decay .1
resumed sft_resumed "${finetune[@]}" --steps 12 --save-every 7
resumed sft_lora_resumed "${finetune[@]}" --lora 4 --steps 12 --save-every 7
if wanted sft_merged; then
  only sft_lora "${finetune[@]}" --lora 4 --steps 6
  [[ -e sft_lora ]] || quiet "${finetune[@]}" --lora 4 --steps 6 -o sft_lora --threads "$THREADS"
  quiet "$BIN/sft" --merge sft_lora -o sft_merged
  hashes sft_merged
fi
only sft_epochs "$BIN/sft" --model base --data world/conversations.jsonl:.2 --val-fraction .1 \
  --epochs 1 --eval-every 3 --patience 1 --batch-tokens 4096 --micro-batch-tokens 1024

# -------------------------------------------------------------------------------------------------
# Preferences: reward models, and policies that learn from them directly

STAGE_WORDS=2
if [[ -x $BIN/reward ]]; then
  reward=("$BIN/reward" train) dpo=("$BIN/reward" dpo)
else
  reward=("$BIN/rlhf" reward) dpo=("$BIN/rlhf" dpo)
fi
preferences=(--model sft --data world/preferences.jsonl --batch 16 --micro-batch-tokens 1024)
run reward "${reward[@]}" "${preferences[@]}" --epochs 2
only reward_margin "${reward[@]}" "${preferences[@]}" --steps 4 --margin .5 --head-lr .01 \
  --normalise-on none --val world/preferences_heldout.jsonl --seed 7
only reward_folds "${reward[@]}" "${preferences[@]}" --epochs 1 --folds 2
sed -n '1,150s/^.*"kind":"\([a-z ]*\)".*"text":/{"label":"\1","text":/p' world/documents.jsonl |
  sed 's/"label":"word problems"/"label":"pos"/; t; s/"label":"[a-z ]*"/"label":"neg"/' >labels.jsonl
run reward_labels "${reward[@]}" --model base --data labels.jsonl --epochs 1 --batch 16 \
  --micro-batch-tokens 2048 --normalise-on none
resumed reward_resumed "${reward[@]}" "${preferences[@]}" --steps 10 --save-every 6

only dpo "${dpo[@]}" "${preferences[@]}" --epochs 1
only dpo_smooth "${dpo[@]}" "${preferences[@]}" --steps 4 --label-smoothing .1 --reference base --beta .3
only dpo_lora "${dpo[@]}" "${preferences[@]}" --steps 4 --lora 4
for loss in ipo kto orpo; do
  only "dpo_$loss" "${dpo[@]}" "${preferences[@]}" --steps 4 --loss $loss
done
resumed dpo_resumed "${dpo[@]}" "${preferences[@]}" --steps 10 --save-every 6
resumed dpo_lora_resumed "${dpo[@]}" "${preferences[@]}" --loss kto --lora 4 --steps 10 --save-every 6

# -------------------------------------------------------------------------------------------------
# Rollouts and rewards. Words that end soon or hold an e are rewarded, since so small a model never
# answers a question; `number` is there for its code.

easy=(--reward length:12 --reward '0.5*format:.*e.*' --reward number)
rollouts=(--model sft --max-tokens 24 --rollouts 32 --rows 16 --micro-batch-tokens 512 --steps 4
  --eval-prompts 8 --eval-samples 2 --eval-some 4 --eval-every 2)
stories=(--prompts world/prompts.jsonl --val world/prompts_heldout.jsonl)
sums=(--prompts world/problems_rl.jsonl --val world/problems_test.jsonl)

ppo=("$BIN/rlhf" ppo "${rollouts[@]}" "${stories[@]}" --lr 3e-4 --keep last)
only ppo "${ppo[@]}" --reward model:reward --gold rubric --minibatches 2 --epochs 2
only ppo_rubric "${ppo[@]}" --reward rubric --whiten-rewards --beta .1 --kl-target 2 --critic-warmup 1 \
  --entropy .01 --gamma .99 --value-clip 0
only ppo_lora "${ppo[@]}" --reward rubric --reward ended --critic reward --lora 4 \
  --ptx tokens/world --ptx-tokens 512
only ppo_best "$BIN/rlhf" ppo "${rollouts[@]}" "${stories[@]}" --lr 3e-4 --reward length:4 --keep best
resumed ppo_resumed "${ppo[@]}" --reward rubric --reward model:reward --minibatches 2 --save-every 2

grpo=("$BIN/rlhf" grpo "${rollouts[@]}" "${sums[@]}")
for method in cake grpo dr_grpo dapo rloo gspo; do
  only "grpo_$method" "${grpo[@]}" "${easy[@]}" --method $method --group 4 --minibatches 2
done
only grpo_beta "${grpo[@]}" "${easy[@]}" --beta .05 --entropy .01 --epochs 2 --truncated mask \
  --keep best
only grpo_lora "${grpo[@]}" "${easy[@]}" --lora 4 --beta .02 --truncated keep --tool calculator
only grpo_form "${grpo[@]}" --reward number --reward length:12 --form 'Q: {question}\nA:' --stop '\n' --resample 2 \
  --pass-rate 0:.9 --pass-samples 2 --pass-problems 64
only grpo_model "${grpo[@]}" --reward model:reward --reward '.5*probability:reward_labels' --ptx \
  tokens/world --ptx-tokens 512
# A program's reward: the number of e's in an answer.
cat >count_e.sh <<'END'
while IFS= read -r line; do
  id=${line##*\"id\":} completion=${line#*\"completion\":\"}
  id=${id%%[,\}]*} completion=${completion%%\"*}
  rest=${completion//e/}
  echo "{\"id\": $id, \"reward\": $((${#completion} - ${#rest}))}"
done
END
only grpo_command "${grpo[@]}" --reward 'command:bash count_e.sh'
resumed grpo_resumed "${grpo[@]}" "${easy[@]}" --minibatches 2 --beta .02 --save-every 2
resumed grpo_lora_resumed "${grpo[@]}" "${easy[@]}" --lora 4 --save-every 2

# -------------------------------------------------------------------------------------------------
# Answers: the best of several, and what ./chat makes and marks

if wanted best_of_n; then
  quiet "$BIN/rlhf" best-of-n --model sft "${stories[@]:0:2}" --reward model:reward --gold rubric \
    --most 24 --n 4 --max-tokens 24 --write best.jsonl -o best_of_n --threads "$THREADS"
  hashes best.jsonl
fi
if wanted chat; then
  head -n 40 world/probes.jsonl >probes.jsonl
  awk 'NR % 60 == 1' world/eval.jsonl >items.jsonl
  quiet "$BIN/chat" generate base --prompts probes.jsonl --tokens 16 --seed 1 -o completions.jsonl \
    --threads "$THREADS"
  quiet "$BIN/chat" eval sft --tasks items.jsonl --tokens 32 --documents world/pages.jsonl \
    -o answers.jsonl --threads "$THREADS"
  hashes completions.jsonl answers.jsonl
fi
