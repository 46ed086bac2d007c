#!/usr/bin/env bash
# Applies each deliberate fault of test/faults.txt to a copy of train_gpt.cu, compiles
# test/test_cuda.cpp with the copy for the CPU and expects the named test to fail: a red test, or a
# report of test/cuda_on_cpu/. `make test-faults` calls it.
#
#   CXX FLAGS OBJECTS LIBRARIES   in the environment, as the Makefile has them
#   ONLY=text                     the faults alone whose names contain it
#
# A fault takes 20 seconds of one core, most of which the compiler takes.
set -euo pipefail
export LC_ALL=C
faults=test/faults.txt
source=$(<train_gpt.cu)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# ------------------------------------------------------------------------------------------------
# The faults: names, tests, old and new texts

names=() tests=() olds=() news=()
while IFS= read -r line; do
  last=$((${#names[@]} - 1))
  case $line in
    '== '*) names+=("${line#== }") tests+=('') olds+=('') news+=('') ;;
    'test '*) tests[last]=$(sed 's/^test *//' <<<"$line") ;;
    '- '*) olds[last]+=${olds[last]:+$'\n'}${line#- } ;;
    '+ '*) news[last]+=${news[last]:+$'\n'}${line#+ } ;;
    '#'* | '') ;;
    *) echo "error: $faults: found '$line', expected ==, test, - or +" >&2; exit 1 ;;
  esac
done <$faults
wrong=0
for i in "${!names[@]}"; do
  old=${olds[i]}
  [[ -n $old && -n ${tests[i]} ]] || { echo "error: $faults: ${names[i]}: incomplete" >&2; exit 1; }
  without=${source//"$old"/}
  count=$(((${#source} - ${#without}) / ${#old}))
  ((count == 1)) && continue
  echo "does not apply: ${names[i]}: train_gpt.cu has its old text $count times, expected once"
  wrong=$((wrong + 1))
done
((wrong == 0)) || exit 1

# ------------------------------------------------------------------------------------------------
# One program for each

# Everything before train_gpt.cu is compiled once.
{ echo '#include <doctest/doctest.h>'
  sed -n '/^#include </p' train_gpt.cu test/test_cuda.cpp | sort -u
  echo '#include "cake/gpt.h"'
  echo '#include "cake/json.h"'
  echo '#include "cake/layers.h"'
  echo '#include "test/support.h"'
  echo '#include "test/cuda_on_cpu/control.h"'
  echo '#include "test/cuda_on_cpu/device.h"'
} >"$work/before.h"
# shellcheck disable=SC2086  # flags are words
compile() { nice $CXX -I"$work" $FLAGS -O0 -w "$@"; }
compile -x c++-header "$work/before.h" -o "$work/before.h.gch"

build() {  # text of train_gpt.cu
  printf '%s\n' "$1" >"$work/train_gpt.cu"
  # shellcheck disable=SC2086
  compile -include "$work/before.h" -c test/test_cuda.cpp -o "$work/test.o" 2>"$work/log" &&
    $CXX $FLAGS "$work/test.o" "$OBJECTS/test/main.o" "$OBJECTS/test/cuda_on_cpu/runtime.o" \
      "$OBJECTS/train_gpt.lib.o" "$OBJECTS/bpe.lib.o" $LIBRARIES -pthread -o "$work/test" \
      2>>"$work/log" && return
  cat "$work/log" >&2
  return 1
}
run() {  # doctest's pattern, seconds
  nice timeout "$2" "$work/test" --abort-after=1 --test-case="$1" >"$work/log" 2>&1
}

build "$source"
printf -v all '%s,' "${tests[@]}"
run "${all%,}" 1800 || { cat "$work/log"; echo "error: without a fault these tests must pass" >&2; exit 1; }
red=0 tried=0
for i in "${!names[@]}"; do
  [[ ${names[i]} == *"${ONLY:-}"* ]] || continue
  tried=$((tried + 1))
  if ! build "${source/"${olds[i]}"/"${news[i]}"}"; then
    echo "does not compile: ${names[i]}"
    continue
  fi
  status=0
  run "${tests[i]}" 300 2>/dev/null || status=$?  # the shell, too, tells of an abort
  report=$(grep -m1 -o 'cuda_on_cpu: .*' "$work/log" | cut -c1-100) || true
  [[ -n $report ]] || report=$(grep -m1 '^TEST CASE:' "$work/log" | sed 's/^TEST CASE: *//') || true
  case $status in
    0) echo "GREEN  ${names[i]}" ;;
    124) echo "no end in 300 s: ${names[i]}" ;;
    *) echo "red    ${names[i]}: $report"; red=$((red + 1)) ;;
  esac
done
echo "$red of $tried faults turned their tests red"
((red == tried && tried > 0))
