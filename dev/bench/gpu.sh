#!/usr/bin/env bash
# All that a machine with a GPU is asked, in one call under eight minutes: builds the CUDA engine,
# runs its tests on the GPU, times products, attention and whole steps, times the same steps in
# PyTorch, looks for races and bad accesses, and prints one table. From the repository's root:
#
#   dev/bench/gpu.sh [--smoke | --build | --built] [PYTHON]
#
#   PYTHON    one that has PyTorch with CUDA: its speed stands beside ours
#   --build   only builds, where nvcc is but no GPU: for CUDA_ARCHS, as in CUDA_ARCHS=90a
#   --built   uses what --build left in build/, where a GPU is but no compiler
#   --smoke   tiny sizes and no GPU: the same timing code over test/cuda_on_cpu/, PyTorch on the CPU;
#             its figures say nothing
#
# What each part printed is in build/gpu/. A part that fails or takes too long is named; the others
# run.
set -uo pipefail

smoke='' build=1 measure=1
case ${1:-} in
  --smoke) smoke=--smoke; shift ;;
  --build) measure=''; shift ;;
  --built) build=''; shift ;;
esac
python=${1:-}
[[ -z $python ]] || command -v "$python" >/dev/null ||
  { echo "error: $python: not found, expected a Python with PyTorch" >&2; exit 1; }
[[ -f train_gpt.cu ]] || { echo "error: run this from the repository's root" >&2; exit 1; }
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
cxx=${CXX:-g++}
out=build/gpu
mkdir -p $out
rm -f $out/*.log $out/figures.txt

failed=()
part() {  # name seconds command...
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) echo "$name: $((SECONDS - began)) s" ;;
    124) echo "$name: no end in $limit s; see $out/$name.log"; failed+=("$name") ;;
    *) echo "$name: failed; see $out/$name.log"; tail -n 3 "$out/$name.log"; failed+=("$name") ;;
  esac
  return $status
}

# ------------------------------------------------------------------------------------------------
# Build: the tests and the benchmark at once

if [[ $smoke ]]; then
  build_bench() {
    $cxx -std=c++20 -O1 -march=native -fopenmp -I. -DCAKE_CUDA_ON_CPU -Itest/cuda_on_cpu/include \
      -fno-strict-aliasing -Wno-unknown-pragmas -pthread dev/bench/bench_gpu.cpp \
      test/cuda_on_cpu/runtime.cpp -o $out/bench_gpu
  }
else
  build_bench() {
    local home arch flags=()
    home=$(dirname "$(dirname "$(realpath "$nvcc")")")
    for arch in ${CUDA_ARCHS:-}; do flags+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
    "$nvcc" -std=c++20 -O3 -I. -lineinfo "${flags[@]:--arch=native}" --diag-suppress=177 \
      -Xcompiler="-march=${MARCH:-native},-fopenmp" -x cu dev/bench/bench_gpu.cpp \
      -o $out/bench_gpu -L"$home/lib64" -Xlinker -rpath="$home/lib64" -lcublasLt
  }
  if [[ $measure ]]; then
    part device 20 nvidia-smi --format=csv \
      --query-gpu=name,driver_version,clocks.max.sm,power.limit || exit 1
    tail -n +2 $out/device.log
  fi
fi
if [[ $build ]]; then
  export -f build_bench
  export smoke nvcc cxx out
  part build-bench 150 bash -c build_bench &
  bench=$!
  if [[ ! $smoke ]]; then
    part build-tests 150 make --no-print-directory CUDA=1 NVCC="$nvcc" \
      ${CUDA_ARCHS:+CUDA_ARCHS="$CUDA_ARCHS"} ${MARCH:+MARCH="$MARCH"} build/test_gpu
  fi
  wait $bench || failed+=(build-bench)
fi
if [[ ! $measure ]]; then
  ((${#failed[@]} == 0))
  exit
fi

# ------------------------------------------------------------------------------------------------
# Test, then measure

[[ $smoke ]] || part test 100 build/test_gpu
part bench 150 $out/bench_gpu $smoke
if [[ -n $python ]]; then
  part torch 130 "$python" dev/bench/gpu_torch.py $smoke
fi
if [[ ! $smoke ]] && command -v compute-sanitizer >/dev/null && ((SECONDS < 380)); then
  for tool in memcheck racecheck; do
    part $tool 45 compute-sanitizer --tool $tool --error-exitcode 1 build/test_gpu \
      --test-case='*norm backward adds*,*bias*,*the same bits*'
  done
fi

# ------------------------------------------------------------------------------------------------
# The table: products and attention with their share of the peak, steps with PyTorch's beside them

cat $out/bench.log $out/torch.log 2>/dev/null | grep -P '^[^\t ]+\t[0-9.e+-]+\t\S+$' >$out/figures.txt
awk -F '\t' '
  { name[NR] = $1; value[$1] = $2; unit[$1] = $3 }
  /^torch/ { sub(/\.B[0-9]+$/, "", $1); peer[$1] = $2 }
  END {
    print ""
    for (i = 1; i <= NR; i++) {
      n = name[i]
      beside = ""
      if (unit[n] == "TFLOP/s" && n != "peak" && value["peak"] > 0)
        beside = sprintf("%5.1f %% of the peak", 100 * value[n] / value["peak"])
      if (n ~ /^tokens/ && ("torch." n) in peer)
        beside = sprintf("%5.2f x PyTorch", value[n] / peer["torch." n])
      printf "%-44s %12.5g %-9s %s\n", n, value[n], unit[n], beside
    }
  }' $out/figures.txt
[[ $smoke ]] && printf '\nSizes were tiny and nothing ran on a GPU: no figure above says anything.\n'
echo
echo "$SECONDS s in all${failed[*]:+; not done: ${failed[*]}}"
((${#failed[@]} == 0))
