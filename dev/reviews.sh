#!/usr/bin/env bash
# A policy that learns a manner from labels alone (Stiennon et al. 2020's loop, on film reviews): a
# base model of the reviews, a reward model from their labels, PPO on 12 words that are to be gone on
# with for 100. What it reached is judged by a classifier of other reviews, which training never asks:
# the mean probability that the continuation of a held-out beginning is of a favourable review.
# `make reviews TEXT=file` calls it. Run it from the repository's root.
#
#   TEXT=file    JSON lines {"text", "label"} with the labels pos and neg (Pang and Lee's 2,000)
#   RUN=dir      where everything goes (default runs/reviews)
#   MINUTES=n    of pretraining (default 3)
#   STEPS=n      of PPO (default 20)
set -euo pipefail

TEXT=${TEXT:-}
RUN=${RUN:-runs/reviews}
MINUTES=${MINUTES:-3}
STEPS=${STEPS:-20}
BIN=${BIN:-.}

fail() { echo "error: $*" >&2; exit 1; }
run() { printf '\n$ %s\n' "$*"; "$@"; }

[[ $TEXT ]] || fail "TEXT: missing, expected a file of labelled reviews: make reviews TEXT=file"
[[ -r $TEXT ]] || fail "TEXT: $TEXT: cannot be read, expected a file of labelled reviews"
[[ ! -e $RUN ]] || fail "RUN: $RUN: exists, expected a new directory: make reviews RUN=another"
mkdir -p -- "$RUN/data"

# Six reviews in ten are trained on, three teach the judge, one begins what is judged. Labels are of
# pieces of 112 words, as long as what they will be asked for. Escapes hold no space: words stay whole.
split() {
  awk -v out="$RUN/data" '
    !/^\{"text": ?".*", ?"label": ?"(pos|neg)"\}$/ {
      printf "error: %s:%d: found %s, expected {\"text\": ..., \"label\": \"pos\" or \"neg\"}\n",
        FILENAME, FNR, substr($0, 1, 40) > "/dev/stderr"
      bad = 1
      exit 1
    }
    {
      label = $0 ~ /"pos"\}$/ ? "pos" : "neg"
      text = $0
      sub(/^\{"text": ?"/, "", text)
      sub(/", ?"label": ?"(pos|neg)"\}$/, "", text)
      part = seen[label]++ % 10
      name = part < 6 ? "train" : part < 9 ? "judge" : "heldout"
      if (name == "train") printf "{\"text\": \"%s\"}\n", text > (out "/train_text.jsonl")
      n = split(text, word, " ")
      for (at = 1; at + 111 <= n; at += 112) {
        begin = word[at]
        for (i = 1; i < 12; i++) begin = begin " " word[at + i]
        piece = begin
        for (i = 12; i < 112; i++) piece = piece " " word[at + i]
        printf "{\"text\": \"%s\", \"label\": \"%s\"}\n", piece, label > (out "/" name ".jsonl")
        if (name != "judge") printf "{\"prompt\": \"%s\"}\n", begin > (out "/" name "_prompts.jsonl")
      }
    }
    END {
      if (!bad && !NR) {
        print "error: " FILENAME ": found an empty file, expected labelled reviews" > "/dev/stderr"
        exit 1
      }
    }
  ' "$TEXT"
}
split || { rm -rf -- "$RUN"; exit 1; }

run "$BIN/bpe" train "$RUN/data/train_text.jsonl" --vocab-size 2048 --pattern qwen2 -o "$RUN/tokenizer"
run "$BIN/bpe" encode "$RUN/tokenizer" "$RUN/data/train_text.jsonl" --val-fraction .02 -o "$RUN/tokens/reviews"
# Pieces of 112 words are up to 250 tokens or so.
run "$BIN/train_gpt" --data "$RUN/tokens/reviews" -o "$RUN/base" --depth 4 --context 512 --minutes "$MINUTES"
run "$BIN/reward" train --model "$RUN/base" --data "$RUN/data/train.jsonl" --val "$RUN/data/heldout.jsonl" \
  --epochs 1 -o "$RUN/reward"
run "$BIN/reward" train --model "$RUN/base" --data "$RUN/data/judge.jsonl" --val "$RUN/data/heldout.jsonl" \
  --epochs 2 --normalize-on none -o "$RUN/judge"

# 100 words are about 160 tokens here. The judge alone decides nothing: the last weights are kept.
run "$BIN/rlhf" ppo --model "$RUN/base" --reward "model:$RUN/reward" --gold "probability:$RUN/judge" \
  --prompts "$RUN/data/train_prompts.jsonl" --val "$RUN/data/heldout_prompts.jsonl" --max-tokens 160 \
  --steps "$STEPS" --keep last -o "$RUN/ppo"
