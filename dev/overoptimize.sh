#!/usr/bin/env bash
# Reward hacking, made visible: reward models of several sizes learn from labellers who like long
# answers; a policy is pushed by each, with PPO and with the best of n; the proxies rise while the
# true reward, which the closed world knows, peaks and falls. `make overoptimize` calls it, after
# `make run`. Run it from the repository's root.
#
#   FROM=dir     a demo's folder (default runs/demo): its assistant and its world
#   RUN=dir      where everything goes (default runs/overoptimize)
#   STEPS=n      of PPO against each proxy (default 80)
set -euo pipefail

FROM=${FROM:-runs/demo}
RUN=${RUN:-runs/overoptimize}
STEPS=${STEPS:-80}
BIN=${BIN:-.}
BUILD=${BUILD:-build}

fail() { echo "error: $*" >&2; exit 1; }
run() { printf '\n$ %s\n' "$*"; "$@"; }

for needed in sft/model/config.json world/world.json; do
  [[ -e $FROM/$needed ]] || fail "FROM: $FROM/$needed is missing, expected what make run made: FROM=folder"
done
[[ ! -e $RUN ]] || fail "RUN: $RUN: exists, expected a new directory: make overoptimize RUN=another"

# Ten more words are worth .03 of a reward from 0 to 1 to these labellers: a hundred words make up
# for the cast that was asked for.
run "$BUILD/world" preferences "$FROM/world" -o "$RUN/world" --length-bias .03
run "$BIN/rlhf" overoptimize --model "$FROM/sft" --data "$RUN/world/preferences.jsonl" \
  --prompts "$RUN/world/prompts.jsonl" --val "$RUN/world/prompts_heldout.jsonl" \
  --max-tokens 200 --steps "$STEPS" -o "$RUN/curves"
