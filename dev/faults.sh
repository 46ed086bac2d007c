#!/usr/bin/env bash
# Applies each deliberate fault of test/faults.txt to a copy of train_gpt.cu, compiles
# test/test_cuda.cpp with the copy for the CPU and expects the named test to fail: a red test, or a
# report of test/cuda_on_cpu/. `make test-faults` calls it.
#
#   CXX FLAGS OBJECTS LIBRARIES   in the environment, as the Makefile has them
#   ONLY=text                     the faults alone whose names contain it
#   FROM=n                        goes on with the nth, and skips the run without a fault
#
# A fault takes 5 to 10 seconds of one core, most of which the compiler takes.
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
selected=() patterns=() wrong=0
for i in "${!names[@]}"; do
  old=${olds[i]}
  [[ -n $old && -n ${tests[i]} ]] || { echo "error: $faults: ${names[i]}: incomplete" >&2; exit 1; }
  without=${source//"$old"/}
  count=$(((${#source} - ${#without}) / ${#old}))
  if ((i + 1 >= ${FROM:-1})) && [[ ${names[i]} == *"${ONLY:-}"* ]]; then
    selected+=("$i") patterns+=("${tests[i]}")
  fi
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

# Nothing else is compiled than what is tested: of test_cuda.cpp the test cases whose names match
# (those end with a brace in the first column), without its tests of models where a kernel is tested;
# then train_gpt.cu goes without its entry points, so that the compiler makes no model of the
# templates. Both parts begin with a title.
tests_named() {  # doctest's pattern
  awk -v patterns="$1" -v engine_at="$engine_tests" '
    BEGIN {
      gsub(/[][().+?|^$\\]/, "\\\\&", patterns)
      gsub(/\*/, ".*", patterns)
      gsub(/,/, "|", patterns)
    }
    /^(KERNEL_TEST|TEST_CASE)\(/ { text = ""; reading = 1 }
    reading == 1 { text = text $0 "\n"; if (/{$/) reading = 2; else next }
    reading == 2 {
      name = text
      gsub(/"[ \n]*"/, "", name)
      sub(/^[^"]*"/, "", name)
      sub(/".*/, "", name)
      keep = name ~ "^(" patterns ")$"
      if (keep && NR >= engine_at) engine = 1
      if (keep) printf "%s", text
      reading = 3
      next
    }
    reading == 3 { if (keep) print; if (/^}/) reading = 0; next }
    { print }
    END { exit !engine }' test/test_cuda.cpp
}
title_line() { grep -n "$2" "$1" | cut -d: -f1; }
engine_tests=$(title_line test/test_cuda.cpp '^// CudaGpt against CpuGpt')
[[ -n $engine_tests ]] || { echo "error: test/test_cuda.cpp: where do its models begin?" >&2; exit 1; }

build() {  # text of train_gpt.cu, doctest's pattern
  printf '%s\n' "$1" >"$work/train_gpt.cu"
  if ! tests_named "$2" >"$work/test.cpp"; then  # of kernels
    sed -i "/^\/\/ CudaGpt against CpuGpt/,\$d" "$work/test.cpp"
    sed -i '/^\/\/ 7. Entry points/,$d' "$work/train_gpt.cu"
    echo '}  // namespace cake::gpu' >>"$work/train_gpt.cu"
  fi
  # shellcheck disable=SC2086
  compile -include "$work/before.h" -c "$work/test.cpp" -o "$work/test.o" 2>"$work/log" &&
    $CXX $FLAGS "$work/test.o" $OBJECTS $LIBRARIES -pthread -o "$work/test" \
      2>>"$work/log" && return
  cat "$work/log" >&2
  return 1
}
run() {  # doctest's pattern, seconds
  nice timeout "$2" "$work/test" --abort-after=1 --test-case="$1" >"$work/log" 2>&1
}

((${#selected[@]} > 0)) || { echo "error: $faults has no such fault" >&2; exit 1; }
if [[ -z ${FROM:-} ]]; then
  printf -v all '%s,' "${patterns[@]}"
  build "$source" "${all%,}"
  run "${all%,}" 1800 ||
    { cat "$work/log"; echo "error: without a fault these tests must pass" >&2; exit 1; }
fi
red=0
for i in "${selected[@]}"; do
  if ! build "${source/"${olds[i]}"/"${news[i]}"}" "${tests[i]}"; then
    echo "does not compile: $((i + 1)) ${names[i]}"
    continue
  fi
  status=0
  run "${tests[i]}" 300 2>/dev/null || status=$?  # the shell, too, tells of an abort
  report=$(grep -m1 -o 'cuda_on_cpu: .*' "$work/log" | cut -c1-100) || true
  [[ -n $report ]] || report=$(grep -m1 '^TEST CASE:' "$work/log" | sed 's/^TEST CASE: *//') || true
  case $status in
    0) echo "GREEN  $((i + 1)) ${names[i]}" ;;
    124) echo "no end in 300 s: $((i + 1)) ${names[i]}" ;;
    *) echo "red    $((i + 1)) ${names[i]}: $report"; red=$((red + 1)) ;;
  esac
done
echo "$red of ${#selected[@]} faults turned their tests red"
((red == ${#selected[@]}))
