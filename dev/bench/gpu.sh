#!/usr/bin/env bash
# All that a machine with a GPU is asked, in one call under eight minutes: builds the CUDA engine,
# runs its tests on the GPU, times products, attention and whole steps, times the same steps in
# PyTorch, looks for races and bad accesses, and prints one table. From the repository's root:
#
#   dev/bench/gpu.sh [--smoke | --build | --built] [PYTHON]
#
#   PYTHON    one that has PyTorch with CUDA: its speed stands beside ours
#   --build   only builds, where nvcc and the packages are but no GPU; for another machine's, as in
#             CUDA_ARCHS=90a MARCH=x86-64-v3
#   --built   uses build/gpu/ and build/test_gpu of --build, where a GPU is but no package
#   --smoke   tiny sizes and no GPU: the same timing code over test/cuda_on_cpu/, PyTorch on the CPU;
#             its figures say nothing
#
# What each part printed is in build/gpu/. A part that fails or takes too long is named; the others
# run, each for as long as eight minutes allow.
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
  local name=$1 limit=$2 began=$SECONDS status=0 left=$((470 - SECONDS))
  shift 2
  ((limit < left)) || limit=$left
  ((limit > 0)) || { echo "$name: no time left"; failed+=("$name"); return 1; }
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

home=$(dirname "$(dirname "$(realpath "$nvcc")")")
if [[ $smoke ]]; then
  build_bench() {
    $cxx -std=c++20 -O1 -march=native -fopenmp -I. -DCAKE_CUDA_ON_CPU -Itest/cuda_on_cpu/include \
      -fno-strict-aliasing -Wno-unknown-pragmas -pthread dev/bench/bench_gpu.cpp \
      test/cuda_on_cpu/runtime.cpp -o $out/bench_gpu
  }
else
  build_bench() {
    local arch flags=()
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
  [[ $smoke ]] || part packages 30 make --no-print-directory build/packages ||
    { echo "where they cannot be installed: --build elsewhere, --built here"; exit 1; }
  export -f build_bench
  export smoke nvcc cxx out home
  part build-bench 150 bash -c build_bench &
  bench=$!
  peer=''
  if [[ $python && $measure && ! $smoke ]]; then  # meanwhile PyTorch fills its compiler's cache
    part torch-compile 150 "$python" dev/bench/gpu_torch.py --seconds 0 &
    peer=$!
  fi
  if [[ ! $smoke ]]; then
    part build-tests 150 make --no-print-directory CUDA=1 NVCC="$nvcc" \
      ${CUDA_ARCHS:+CUDA_ARCHS="$CUDA_ARCHS"} ${MARCH:+MARCH="$MARCH"} build/test_gpu
  fi
  wait $bench || failed+=(build-bench)
  [[ -z $peer ]] || wait $peer  # what fails there fails again where it counts
fi
if [[ ! $measure ]]; then
  ((${#failed[@]} == 0))
  exit
fi

# ------------------------------------------------------------------------------------------------
# Test, then measure

if [[ ! $smoke ]]; then
  export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$home/lib64"
  for program in build/test_gpu $out/bench_gpu; do
    [[ -x $program ]] || { echo "$program: not there: was it built?"; continue; }
    ldd "$program" 2>/dev/null | sed -n "s|^\s*\(.*\) => not found|error: $program needs \1, which is not here|p"
  done
  part test 100 build/test_gpu
fi
part bench 150 $out/bench_gpu $smoke
if [[ -n $python ]]; then
  part torch 200 "$python" dev/bench/gpu_torch.py $smoke
fi
if [[ ! $smoke ]] && command -v compute-sanitizer >/dev/null; then
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
      printf "%-44s " (value[n] < 1000 ? "%12.5g" : "%12.0f") " %-9s %s\n", n, value[n], unit[n], beside
    }
  }' $out/figures.txt
[[ $smoke ]] && printf '\nSizes were tiny and nothing ran on a GPU: no figure above says anything.\n'
echo
echo "$SECONDS s in all${failed[*]:+; not done: ${failed[*]}}"
((${#failed[@]} == 0))
