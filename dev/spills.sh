#!/usr/bin/env bash
# Compiles the kernels of train_gpt.cu, prints the registers of those that take the most, and fails
# with the names of those that spill: whose threads keep values in memory for want of registers.
#
#   dev/spills.sh NVCC FLAGS...     `make spills CUDA_ARCHS="80 90a"` calls it; no GPU is needed
set -euo pipefail

nvcc=${1:-}
if ! command -v "$nvcc" >/dev/null; then
  echo "error: nvcc is missing: install the CUDA toolkit, or set NVCC" >&2
  exit 1
fi
shift
[[ " $* " == *" -gencode "* ]] ||
  { echo "error: no GPU is here to build for: set CUDA_ARCHS, as in CUDA_ARCHS='80 90a'" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! "$nvcc" "$@" -Xptxas -v -fatbin train_gpt.cu -o "$work/kernels" >"$work/log" 2>&1; then
  grep -v '^ptxas info' "$work/log" >&2 || true
  exit 1
fi

# A line for each kernel and GPU: registers, bytes spilled, sm_XY, mangled name
awk '
  /Compiling entry function/ { split($0, quoted, "\047"); name = quoted[2]; sm = quoted[4] }
  /bytes spill stores/ { spilled = $5 + $9 }
  /Used [0-9]+ registers/ { for (i = 1; i < NF; i++) if ($i == "Used") print $(i + 1), spilled, sm, name }
' "$work/log" | sort -k1,1nr -k4 >"$work/kernels.txt"
[[ -s $work/kernels.txt ]] || { echo "error: the compiler reported no kernel" >&2; exit 1; }

readable() {  # without namespaces and parameters
  if command -v c++filt >/dev/null; then c++filt; else cat; fi |
    sed -E 's/void //; s/cake::gpu:://g; s/__nv_bfloat16/bf16/g; s/\(anonymous namespace\):://g; s/\((int|bool)\)//g; s/\(.*//'
}
for sm in $(cut -d' ' -f3 "$work/kernels.txt" | sort -uV); do
  count=$(grep -c " $sm " "$work/kernels.txt")
  echo "$sm: $count kernels, of which these take the most registers"
  grep " $sm " "$work/kernels.txt" | sed -n 1,8p | while read -r registers _ _ name; do
    printf '  %4d  %s\n' "$registers" "$(readable <<<"$name")"
  done
done
spills=$(awk '$2 > 0' "$work/kernels.txt")
[[ -z $spills ]] && { echo "no kernel spills"; exit 0; }
while read -r _ bytes sm name; do
  echo "error: $(readable <<<"$name") for $sm spills $bytes bytes" >&2
done <<<"$spills"
exit 1
