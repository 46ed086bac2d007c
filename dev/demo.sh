#!/usr/bin/env bash
# The whole cake, baked on this machine: raw pages -> corpus -> tokenizer -> token shards -> base
# model -> assistant -> reward model -> assistants that learned from rewards, each by one command that
# is printed before it runs, then what each model has learned, on one page. `make run` calls it. Run it
# from the repository's root.
#
#   RUN=dir      where everything goes, a folder a stage (default runs/demo)
#   TEXT=path    your own text in place of the demo's closed world: a file of text or JSON lines as it
#                is, or raw pages, which are cleaned first: a folder, HTML, WARC or parquet
#   MINUTES=n    of pretraining (default 3), and half as many of fine-tuning; the closed world and
#                what is learned from rewards grow with them
set -euo pipefail

RUN=${RUN:-runs/demo}
TEXT=${TEXT:-}
MINUTES=${MINUTES:-3}
BIN=${BIN:-.}          # where the stages' binaries are
BUILD=${BUILD:-build}  # where build/world and build/report are

fail() { echo "error: $*" >&2; exit 1; }

# ------------------------------------------------------------------------------------------------
# What was asked for

[[ $MINUTES =~ ^[0-9]*\.?[0-9]+$ && $MINUTES =~ [1-9] ]] ||
  fail "MINUTES: found '$MINUTES', expected a number above 0"
if [[ -n $TEXT ]]; then
  [[ -e $TEXT ]] || fail "TEXT: $TEXT: not found, expected a file of text or pages, or a folder"
  [[ ( -f $TEXT || -d $TEXT ) && -r $TEXT ]] ||
    fail "TEXT: $TEXT: cannot be read, expected a file of text or pages, or a folder"
  [[ -d $TEXT || -s $TEXT ]] || fail "TEXT: $TEXT: found an empty file, expected text"
fi
mark=$RUN/.made-by-the-demo
if [[ -e $RUN && ! -e $mark ]] && ! rmdir "$RUN" 2>/dev/null; then
  fail "RUN: $RUN: found something that the demo did not make, expected a new directory:" \
    "make run RUN=another"
fi
rm -rf -- "$RUN"
mkdir -p -- "$RUN"
touch -- "$mark"

# ------------------------------------------------------------------------------------------------
# A stage: its command is printed, run, and timed

seconds=()
show() {  # a command as one would type it
  local word line='$'
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '\n%s\n' "$line"
}
stage() {  # name command...
  local name=$1 began=${EPOCHREALTIME/[.,]/} took
  shift
  show "$@"
  "$@" || fail "the stage '$name' failed; what it wrote is in $RUN"
  took=$(((${EPOCHREALTIME/[.,]/} - began) / 1000))
  seconds+=("$(printf '"%s": %d.%03d' "$name" $((took / 1000)) $((took % 1000)))")
}
compute() { awk "BEGIN { $1 }"; }
finished() {  # stage command...: one that a signal stopped has no summary
  local name=$1
  shift
  [[ ! -e $RUN/$name/summary.json ]] || return 0
  [[ -e $RUN/$name/model ]] || fail "'$name' was stopped before it had saved anything"
  fail "'$name' was stopped; go on with: $* -o $RUN/$name --resume"
}

# Raw pages have to be cleaned, text has not: told apart by the name, else by the first bytes.
is_raw_pages() {
  local name=${1%.gz} first
  name=${name%.zst} name=${name,,}
  [[ ! -d $1 ]] || return 0
  [[ ! $name =~ \.(html?|xhtml|warc|wet|parquet)$ ]] || return 0
  [[ ! $name =~ \.(txt|text|md|jsonl|ndjson)$ ]] || return 1
  first=$(head -c 200 -- "$1" | tr -d '\0' | tr 'A-Z\n' 'a-z ')
  [[ $first =~ ^(par1|warc/|[[:space:]]*\<(!doctype html|html)) ]]
}

# ------------------------------------------------------------------------------------------------
# The corpus. FineWeb's recipe was made for articles. This world is a school's: its thresholds are
# others where its clean pages are not like articles, and FineWeb's where nothing is said here.

world_rules=(
  --language-share .5                  # a list of names or nonsense syllables is half a page
  --min-line-words 0                   # "Answer: 12." is a line
  --min-alphabetic-words off           # sums are numbers
  --min-mean-word-length 2             # and numbers are short
  --min-stop-words off                 # nor have they an article
  --max-short-lines off                # a worked sum has three short lines
  --min-stop-character-lines .07       # "hot -> cold" ends with no point
  # A passage is asked about three times, in its own words: only what is said again and again goes.
  --max-duplicate-lines .8 --max-duplicate-line-characters .7 --max-duplicate-characters .7
  --max-top-2gram .4 --max-top-3gram .6 --max-top-4gram .4
  --max-duplicate-5gram .7 --max-duplicate-6gram .7 --max-duplicate-7gram .7
  --max-duplicate-8gram .7 --max-duplicate-9gram .7 --max-duplicate-10gram .7
)

# ------------------------------------------------------------------------------------------------
# The stages

if [[ -z $TEXT ]]; then
  # What three minutes on two cores read once; a world is never so small that it tells nothing.
  tokens=$(compute "t = $MINUTES / 3 * 5e6; printf \"%d\", t < 2e5 ? 2e5 : t")
  stage world "$BUILD/world" -o "$RUN/world" --tokens "$tokens"
  stage corpus "$BIN/corpus" clean "$RUN/world/pages" -o "$RUN/corpus" "${world_rules[@]}"
  stage score_corpus "$BUILD/world" score-corpus "$RUN/world" "$RUN/corpus" -o "$RUN/corpus/truth.json"
  input=$RUN/corpus/documents.jsonl.zst vocabulary=1536 held_out=.01 name=world
  more=("$RUN/world/conversations_sample.jsonl")  # its words are in the tokenizer from the start
else
  input=$TEXT held_out=.1 name=text more=()
  if is_raw_pages "$TEXT"; then
    stage corpus "$BIN/corpus" clean "$TEXT" -o "$RUN/corpus"
    input=$RUN/corpus/documents.jsonl.zst
    bytes=$(sed -n 's/.*"kept_bytes": \([0-9]*\).*/\1/p' "$RUN/corpus/summary.json")
    [[ $bytes -gt 0 ]] || fail "TEXT: $TEXT: no page was kept; $RUN/corpus/report.html says why"
  else
    bytes=$(wc -c <"$TEXT")
  fi
  # A small text has too few words to teach many tokens.
  vocabulary=$(compute "print $bytes < 4e6 ? 512 : $bytes < 4e7 ? 2048 : 8192")
fi
stage tokenizer "$BIN/bpe" train "$input" ${more[@]+"${more[@]}"} --vocab-size "$vocabulary" --pattern qwen2 \
  --val-fraction "$held_out" -o "$RUN/tokenizer"
stage tokens "$BIN/bpe" encode "$RUN/tokenizer" "$input" --val-fraction "$held_out" \
  -o "$RUN/tokens/$name"
stage base "$BIN/train_gpt" --data "$RUN/tokens/$name" -o "$RUN/base" --minutes "$MINUTES"
finished base "$BIN/train_gpt"

# ------------------------------------------------------------------------------------------------
# What the base model writes; then it is asked what it knows, and becomes an assistant that answers
# what it knows and says so where it does not

if [[ -z $TEXT ]]; then
  world=$RUN/world tasks=$RUN/world/eval.jsonl
  stage story "$BIN/chat" generate "$RUN/base" --prompt 'One day' --max-tokens 120
  stage sum "$BIN/chat" generate "$RUN/base" --prompt $'27 + 45 = ?\nSteps:' --max-tokens 60 --temperature 0
  stage knows "$BIN/chat" generate "$RUN/base" --prompts "$world/questions.jsonl" --samples 8 \
    --max-tokens 16 --stop '?' --stop $'\n' --temperature 1 -o "$RUN/base/knows.jsonl"
  stage conversations "$BUILD/world" conversations "$world" --answers "$RUN/base/knows.jsonl"
  stage sft "$BIN/sft" --model "$RUN/base" --data "$world/conversations.jsonl" \
    --val "$world/conversations_heldout.jsonl" --minutes "$(compute "print $MINUTES / 2")" -o "$RUN/sft"
  finished sft "$BIN/sft"

  # Learning from rewards, twice from the same assistant. Steps in the time that three minutes of
  # pretraining leave: a minute, 80 seconds and 90.
  steps() { compute "n = $1 * $MINUTES / 3; printf \"%d\", n < 2 ? 2 : n"; }
  stage reward "$BIN/reward" train --model "$RUN/sft" --data "$world/preferences.jsonl" \
    --val "$world/preferences_heldout.jsonl" --steps "$(steps 84)" -o "$RUN/reward"
  finished reward "$BIN/reward train"
  # PPO keeps the weights that the reward model likes best within the KL budget. The true reward of
  # held-out answers, --gold, is only reported.
  stage ppo "$BIN/rlhf" ppo --model "$RUN/sft" --reward "model:$RUN/reward" --gold rubric \
    --prompts "$world/prompts.jsonl" --val "$world/prompts_heldout.jsonl" --max-tokens 160 \
    --kl-budget 25 --steps "$(steps 30)" -o "$RUN/ppo"
  finished ppo "$BIN/rlhf ppo"
  stage grpo "$BIN/rlhf" grpo --model "$RUN/sft" --reward number --prompts "$world/problems_rl.jsonl" \
    --val "$world/problems_test.jsonl" --max-tokens 90 --steps "$(steps 160)" -o "$RUN/grpo"
  finished grpo "$BIN/rlhf grpo"

  stage eval_base "$BIN/chat" eval "$RUN/base" --base --tasks "$tasks" \
    --json "$RUN/base/evaluation.json" -o "$RUN/base/answers.jsonl"
  beside=(--beside "base=$RUN/base/evaluation.json")
  evaluation="\"base\": $(<"$RUN/base/evaluation.json")" summaries="\"base\": $(<"$RUN/base/summary.json")"
  for name in sft ppo grpo; do
    stage "eval_$name" "$BIN/chat" eval "$RUN/$name" --tasks "$tasks" --documents "$world/pages.jsonl" \
      "${beside[@]}" --json "$RUN/$name/evaluation.json" -o "$RUN/$name/answers.jsonl"
    beside+=(--beside "$name=$RUN/$name/evaluation.json")
    evaluation+=", \"$name\": $(<"$RUN/$name/evaluation.json")"
    summaries+=", \"$name\": $(<"$RUN/$name/summary.json")"
  done
  evaluation="{$evaluation}"
  # What the labellers' noise leaves to be foretold stands beside the reward model's accuracy.
  best=$(grep -o '"best_possible": [0-9.]*' "$world/world.json")
  reward=$(<"$RUN/reward/summary.json")
  summaries+=", \"reward\": ${reward%\}}, $best}"
else
  stage generate "$BIN/chat" generate "$RUN/base" --max-tokens 400
  evaluation={}
  summaries="\"base\": $(<"$RUN/base/summary.json")"
fi

timings=$(IFS=,; echo "${seconds[*]}")
printf '{\n"minutes": %s,\n"seconds": {%s},\n%s,\n"evaluation": %s\n}\n' \
  "$(compute "print $MINUTES")" "${timings//,/, }" "$summaries" "$evaluation" \
  >"$RUN/results.json.partial"
mv -- "$RUN/results.json.partial" "$RUN/results.json"
stage report "$BUILD/report" "$RUN" --title "From text to assistant: $(compute "printf \"%g\", $MINUTES") minutes of pretraining"

# ------------------------------------------------------------------------------------------------
# What to try next

printf '\nEverything is in %s; what came of it on one page in %s, its figures in %s. What to try next:\n\n' \
  "$RUN" "$RUN/report.html" "$RUN/results.json"
if [[ -z $TEXT ]]; then
  cat <<END
  $BIN/chat $RUN/sft --calculator --documents $RUN/world/pages.jsonl     talk to it
  $BIN/chat $RUN/ppo                                            ask for a story about Ada and a dog
  $BIN/chat $RUN/grpo                                           ask what 27 apples and 15 more make
  $BIN/chat $RUN/base --base                                    talk to what it was made from
  $BIN/serve $RUN/grpo                                          in a browser: http://127.0.0.1:8080
  $BIN/serve base=$RUN/base sft=$RUN/sft ppo=$RUN/ppo           several; by API, as OpenAI's clients ask: http://127.0.0.1:8080/v1
  make arena FROM=$RUN                                          vote in the browser: which one answers better?
  $BIN/sft --data $RUN/world/conversations.jsonl --model $RUN/base --show 3      what it was taught
END
fi
cat <<END
  $BIN/chat generate $RUN/base --prompt 'Long ago' --temperature 1.2     wilder
  $BIN/bpe show $RUN/tokenizer 'Once there was a number, 1234.'          what the model reads
  make run MINUTES=15 RUN=runs/longer                           more training
END
if [[ -z $TEXT ]]; then
  echo "  make run TEXT=path/to/a/book.txt RUN=runs/book                a model of your own text"
else
  echo "  make run RUN=runs/world                                       a world whose facts are known"
fi
