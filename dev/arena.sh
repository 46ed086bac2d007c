#!/usr/bin/env bash
# The arena on the demo's assistants: in the browser, one compares answers of two of them to the world's
# open requests without knowing whose they are, and the leaderboard says who is preferred. `make arena`
# calls it, after `make run`. Run it from the repository's root; Ctrl+C ends it, and the same command
# goes on with the votes that there are.
#
#   FROM=dir     a demo's folder (default runs/demo): its assistants and its world
#   RUN=dir      where the votes go (default runs/arena)
#   PORT=n       of the page (default 8080)
set -euo pipefail

FROM=${FROM:-runs/demo}
RUN=${RUN:-runs/arena}
PORT=${PORT:-8080}
BIN=${BIN:-.}

fail() { echo "error: $*" >&2; exit 1; }
for needed in sft/model/config.json ppo/model/config.json grpo/model/config.json world/prompts.jsonl; do
  [[ -e $FROM/$needed ]] || fail "FROM: $FROM/$needed is missing, expected what make run made: FROM=folder"
done
mkdir -p -- "$RUN"

cat <<END
Vote in the page's view Arena. What comes of the votes, while this runs or afterwards:

  $BIN/serve export $RUN/votes.db -o $RUN/preferences.jsonl
  $BIN/reward train --model $FROM/sft --data $RUN/preferences.jsonl -o $RUN/reward      a reward model
  $BIN/reward dpo --model $FROM/sft --data $RUN/preferences.jsonl -o $RUN/dpo           an assistant

END
exec "$BIN/serve" "sft=$FROM/sft" "ppo=$FROM/ppo" "grpo=$FROM/grpo" --port "$PORT" \
  --votes "$RUN/votes.db" --prompts "$FROM/world/prompts.jsonl"
