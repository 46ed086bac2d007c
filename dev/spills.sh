#!/usr/bin/env bash
# Compiles the kernels of train_gpt.cu and prints the registers of those that take the most. It fails
# with the names of the kernels that
#
#   spill      their threads keep values in memory for want of registers
#   cannot run their block takes more than the 65,536 registers that a multiprocessor has, so that
#              every launch fails. The block's threads are those of __launch_bounds__; a kernel
#              without it counts as 1,024, the most that a launch may ask for
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
if ! "$nvcc" "$@" -Xptxas -v -fatbin --keep --keep-dir "$work" train_gpt.cu -o "$work/kernels" \
  >"$work/log" 2>&1; then
  grep -v '^ptxas info' "$work/log" >&2 || true
  exit 1
fi

# A line for each kernel and GPU: registers, bytes spilled, sm_XY, mangled name, threads of a block.
# PTX has the threads: .maxntid after the parameters of an .entry.
awk '
  FILENAME ~ /ptx$/ {
    if ($2 == ".entry") { name = $3; sub(/\(.*/, "", name) }
    if ($1 == ".maxntid") threads[name] = $2 * $3 * $4
    next
  }
  /Compiling entry function/ { split($0, quoted, "\047"); name = quoted[2]; sm = quoted[4] }
  /bytes spill stores/ { spilled = $5 + $9 }
  /Used [0-9]+ registers/ { for (i = 1; i < NF; i++) if ($i == "Used")
      print $(i + 1), spilled, sm, name, name in threads ? threads[name] : 1024 }
' "$work"/*.ptx "$work/log" | sort -k1,1nr -k4 >"$work/kernels.txt"
[[ -s $work/kernels.txt ]] || { echo "error: the compiler reported no kernel" >&2; exit 1; }

readable() {  # without namespaces and parameters
  if command -v c++filt >/dev/null; then c++filt; else cat; fi |
    sed -E 's/void //; s/cake::gpu:://g; s/__nv_bfloat16/bf16/g; s/\(anonymous namespace\):://g; s/\((int|bool)\)//g; s/\(.*//'
}
for sm in $(cut -d' ' -f3 "$work/kernels.txt" | sort -uV); do
  count=$(grep -c " $sm " "$work/kernels.txt")
  echo "$sm: $count kernels, of which these take the most registers"
  grep " $sm " "$work/kernels.txt" | sed -n 1,8p | while read -r registers _ _ name _; do
    printf '  %4d  %s\n' "$registers" "$(readable <<<"$name")"
  done
done
status=0
while read -r registers spilled sm name threads; do
  if ((spilled > 0)); then
    echo "error: $(readable <<<"$name") for $sm spills $spilled bytes" >&2 && status=1
  fi
  # a warp's registers are given out by 256: 8 a thread
  if (((registers + 7) / 8 * 8 * threads > 65536)); then
    echo "error: $(readable <<<"$name") for $sm takes $registers registers in each of $threads threads," \
      "expected at most 65536 in a block: set or lower its __launch_bounds__" >&2 && status=1
  fi
done <"$work/kernels.txt"
((status == 0)) && echo "no kernel spills, and every block's registers fit"
exit $status
