#!/usr/bin/env bash
# Reward hacking, made visible: reward models of several sizes (the proxies) learn from labellers who
# like long answers. Each proxy chooses the best of n answers, and trains a policy by PPO. The proxies'
# rewards rise, while the true reward, which the closed world knows, rises and then falls.
# `make overoptimize` calls this script, after `make run`. Run it from the repository's root. After
# Ctrl+C the same command resumes.
#
#   FROM=dir     a demo's folder (default runs/demo): its assistant and its world
#   RUN=dir      where everything goes (default runs/overoptimize)
#   STEPS=n      of PPO against each proxy, at most (default 120)
#   SIZES=list   prompts that each proxy learns from (default "64 256 1024")
#   PROMPTS=n    held-out prompts by which everything is measured (default 128)
#   N=n          answers to each of them, for best of n (default 150: sqrt KL up to 2)
set -euo pipefail

FROM=${FROM:-runs/demo}
RUN=${RUN:-runs/overoptimize}
STEPS=${STEPS:-120}
SIZES=${SIZES:-64 256 1024}
PROMPTS=${PROMPTS:-128}
N=${N:-150}
BIN=${BIN:-.}
BUILD=${BUILD:-build}

fail() { echo "error: $*" >&2; exit 1; }
run() { printf '\n$ %s\n' "$*"; "$@"; }

# Distances from the first policy at which proxies and true reward are measured: sqrt of the KL in nats
# per answer.
distances=.5,1,1.5,2,3,4,6,8,12

for needed in sft/model/config.json world/world.json; do
  [[ -e $FROM/$needed ]] || fail "FROM: $FROM/$needed is missing, expected what make run made: FROM=folder"
done
sizes=()  # smallest first: the order in which build/overoptimize expects the proxies' rewards
while read -r size; do sizes+=("$size"); done < <(tr -s ' ,' '\n' <<<"$SIZES" | sed '/^$/d' | sort -nu)
for size in "${sizes[@]}"; do
  [[ $size =~ ^[1-9][0-9]*$ ]] || fail "SIZES: found '$size', expected numbers of prompts"
done

# A folder that exists is resumed, with the settings that it was begun with.
settings="FROM=$FROM STEPS=$STEPS SIZES=${sizes[*]} PROMPTS=$PROMPTS N=$N"
if [[ -e $RUN ]]; then
  [[ -e $RUN/settings.txt ]] ||
    fail "RUN: $RUN: found something else, expected a new directory: make overoptimize RUN=another"
  [[ $(<"$RUN/settings.txt") == "$settings" ]] ||
    fail "RUN: $RUN: found a run of $(<"$RUN/settings.txt"), expected $settings"
fi
mkdir -p -- "$RUN"
echo "$settings" >"$RUN/settings.txt"

# ------------------------------------------------------------------------------------------------
# A part of the experiment: skipped if it is finished, resumed if it was begun. One that is stopped by
# a signal has saved; its status, which is not 0, ends this script.

part() {  # DIR command...
  local out=$1 state=$1/model/trainer_state.json
  shift
  if [[ -e $state ]]; then  # a model's
    ! grep -q '"finished": *true' "$state" || return 0
    run "$1" "$2" -o "$out" --resume
  elif [[ -e $out/state.json ]]; then  # best of n's
    [[ ! -e $out/summary.json ]] || return 0
    run "$1" "$2" -o "$out" --resume
  else
    rm -rf -- "$out"
    run "$@" -o "$out"
  fi
}

# Ten more words are worth .03 of a reward from 0 to 1 to these labellers: a hundred words make up
# for the cast that was asked for.
run "$BUILD/world" preferences "$FROM/world" -o "$RUN/world" --length-bias .03
policy=(--model "$FROM/sft")
measured=(--gold rubric --max-tokens 200)
held_out=$RUN/world/prompts_heldout.jsonl

proxies=()
for size in "${sizes[@]}"; do
  part "$RUN/proxy-$size/reward" "$BIN/reward" train "${policy[@]}" --data "$RUN/world/preferences.jsonl" \
    --limit "$size" --epochs 2
  proxies+=(--reward "model:$RUN/proxy-$size/reward")
done

# All proxies score the same answers of the first policy.
part "$RUN/best-of-n" "$BIN/rlhf" best-of-n "${policy[@]}" --prompts "$held_out" --limit "$PROMPTS" --samples "$N" \
  "${proxies[@]}" "${measured[@]}"

# Nothing holds the policy near the first one: no price of the KL, no penalty of an answer that does not
# end. The learning rate rises slowly, so that the first steps are small enough to measure .5 and 1.
for size in "${sizes[@]}"; do
  part "$RUN/proxy-$size/ppo" "$BIN/rlhf" ppo "${policy[@]}" --reward "model:$RUN/proxy-$size/reward" \
    --prompts "$RUN/world/prompts.jsonl" --val "$held_out" "${measured[@]}" --beta 0 --truncated keep --keep last \
    --steps "$STEPS" --rollouts 64 --schedule constant --warmup 40 --eval-at-kl "$distances" \
    --eval-every "$STEPS" --eval-some "$PROMPTS" --limit "$PROMPTS" --samples 1
done

# One answer of each last policy to the same prompts: what a hacked reward looks like.
for size in "${sizes[@]}"; do
  part "$RUN/proxy-$size/answers" "$BIN/rlhf" best-of-n --model "$RUN/proxy-$size/ppo" --prompts "$held_out" \
    --limit "$PROMPTS" --samples 1 --reward "model:$RUN/proxy-$size/reward" "${measured[@]}"
done

run "$BUILD/overoptimize" "$RUN" --sqrt-kl "$distances"
