#!/usr/bin/env bash
# From votes to a better assistant: a program that prefers by the rubric votes in the arena, over HTTP,
# on the assistant's answers to the world's open requests. From the votes alone, a reward model and a
# policy learn what it likes. `make arena-test` calls it, after `make run`. Run it from the repository's
# root. It prints a table, and fails where a target is missed.
#
#   FROM=dir     a demo's folder (default runs/demo): its assistant and its world
#   RUN=dir      where everything goes (default runs/arena-test)
#   VOTES=n      to cast (default 400)
#   ANSWERS=n    that each vote ranks, 2 to 9 (default 4)
set -euo pipefail

FROM=${FROM:-runs/demo}
RUN=${RUN:-runs/arena-test}
VOTES=${VOTES:-400}
ANSWERS=${ANSWERS:-4}
BIN=${BIN:-.}
BUILD=${BUILD:-build}

fail() { echo "error: $*" >&2; exit 1; }
run() { printf '\n$ %s\n' "$*"; "$@"; }

for needed in sft/model/config.json world/prompts_heldout.jsonl world/preferences_heldout.jsonl; do
  [[ -e $FROM/$needed ]] || fail "FROM: $FROM/$needed is missing, expected what make run made: FROM=folder"
done
[[ ! -e $RUN ]] || fail "RUN: $RUN: exists, expected a new directory: make arena-test RUN=another"
mkdir -p -- "$RUN"

# ------------------------------------------------------------------------------------------------
# The votes. The server says its address once it listens; it ends with this script.

prompts=$FROM/world/prompts.jsonl
command=("$BIN/serve" "sft=$FROM/sft" --port 0 --arena collect --votes "$RUN/votes.db" --prompts "$prompts"
  --answers "$ANSWERS")
printf '\n$ %s\n' "${command[*]}"
mkfifo -- "$RUN/server"
"${command[@]}" >"$RUN/server" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
exec {lines}<"$RUN/server"
port=
while read -r line <&"$lines"; do
  echo "$line"
  [[ $line =~ ^ready:\ http://127\.0\.0\.1:([0-9]+) ]] && port=${BASH_REMATCH[1]} && break
done
[[ $port ]] || fail "the server did not start"
cat <&"$lines" >"$RUN/server.log" &  # what it says later
run "$BUILD/arena_voter" vote "$port" --prompts "$prompts" --votes "$VOTES" --answers "$ANSWERS"
run "$BIN/serve" export "$RUN/votes.db" -o "$RUN/preferences.jsonl"  # while the server runs
kill "$server"
wait "$server" || true
rm -- "$RUN/server"

# ------------------------------------------------------------------------------------------------
# What is learned from them, and how good that is, by comparisons of stories of casts that no vote saw.

head -n 500 -- "$FROM/world/preferences_heldout.jsonl" >"$RUN/pairs_heldout.jsonl"
run "$BIN/reward" train --model "$FROM/sft" --data "$RUN/preferences.jsonl" --val "$RUN/pairs_heldout.jsonl" \
  --epochs 2 -o "$RUN/reward"
run "$BIN/reward" dpo --model "$FROM/sft" --data "$RUN/preferences.jsonl" --val "$RUN/pairs_heldout.jsonl" \
  --epochs 2 -o "$RUN/dpo"

# The true reward of one answer to each held-out prompt, sampled as for the voter.
sed 's/^{/{"task":"true_reward","temperature":1,"tokens":160,/' "$FROM/world/prompts_heldout.jsonl" \
  >"$RUN/prompts_heldout.jsonl"
run "$BIN/chat" eval "$FROM/sft" --tasks "$RUN/prompts_heldout.jsonl" --json "$RUN/assistant.json"
run "$BIN/chat" eval "$RUN/dpo" --tasks "$RUN/prompts_heldout.jsonl" --json "$RUN/dpo.json" \
  --beside "assistant=$RUN/assistant.json"
"$BUILD/arena_voter" table "$RUN"
