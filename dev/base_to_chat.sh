#!/usr/bin/env bash
# Can reinforcement learning alone turn a base model into a chat model? GRPO on word problems, from
# the base model with solved problems before each question, beside the same from the assistant: equal
# problems, steps and rollouts, both curves on one page. Then both are asked as one asks an assistant.
# `make base-to-chat` calls it, after `make run`. Run it from the repository's root.
#
#   FROM=dir     a demo's folder (default runs/demo): its base model, assistant and world
#   RUN=dir      where everything goes (default runs/base-to-chat)
#   STEPS=n      of each (default 60)
set -euo pipefail

FROM=${FROM:-runs/demo}
RUN=${RUN:-runs/base-to-chat}
STEPS=${STEPS:-60}
BIN=${BIN:-.}
BUILD=${BUILD:-build}

fail() { echo "error: $*" >&2; exit 1; }
run() { printf '\n$ %s\n' "$*"; "$@"; }

for needed in base/model/config.json sft/model/config.json world/problems_rl.jsonl; do
  [[ -e $FROM/$needed ]] || fail "FROM: $FROM/$needed is missing, expected what make run made: FROM=folder"
done
[[ ! -e $RUN ]] || fail "RUN: $RUN: exists, expected a new directory: make base-to-chat RUN=another"
mkdir -p -- "$RUN"

# The documents solve problems so: what a base model is to go on with.
cat >"$RUN/form.txt" <<'END'
Ada has 12 cups. Ada finds 5 more. How many cups does Ada have now?
Steps: 12 + 5 = 17
Answer: 17.
Ben starts with 9 keys. Ben gives 4 away. How many keys does Ben have?
Answer: 5.
{question}
END

train=(--reward number --prompts "$FROM/world/problems_rl.jsonl" --val "$FROM/world/problems_test.jsonl"
  --max-tokens 90 --steps "$STEPS")
run "$BIN/rlhf" grpo --model "$FROM/base" --form "$RUN/form.txt" --stop $'.\n' "${train[@]}" -o "$RUN/from_base"
run "$BIN/rlhf" grpo --model "$FROM/sft" "${train[@]}" -o "$RUN/from_assistant"

beside=()
for name in from_base from_assistant; do
  run "$BIN/chat" eval "$RUN/$name" --tasks "$FROM/world/eval.jsonl" --documents "$FROM/world/pages.jsonl" \
    ${beside[@]+"${beside[@]}"} --json "$RUN/$name/evaluation.json" -o "$RUN/$name/answers.jsonl"
  beside+=(--beside "$name=$RUN/$name/evaluation.json")
done
run "$BUILD/report" "$RUN" --title 'Reinforcement learning alone, and after fine-tuning'
