#!/usr/bin/env bash
# All that a machine with a GPU is asked, in one call of at most seven minutes, in the order in which
# a cut loses least: the CUDA engine's tests on the GPU, both engines compared on one model, products,
# attention and whole steps, the same steps in PyTorch, decoding and a step of GRPO, bad accesses and
# races; then one table. From the repository's root:
#
#   dev/bench/gpu.sh [--smoke | --build | --built] [PYTHON]
#
#   PYTHON    one that has PyTorch with CUDA: its speed stands beside ours
#   --build   only builds, where nvcc and the packages are but no GPU; for another machine's, as in
#             CUDA_ARCHS=90a MARCH=x86-64-v3. All that has to be carried there is in build/gpu/carry:
#             programs, a small model, and the shared libraries that a machine may lack
#   --built   uses build/gpu/carry of --build, where a GPU is but no package. libcublasLt is too
#             large to be carried: it is looked for, and where there is none nothing begins
#   --smoke   tiny sizes and no GPU: the same timing code over test/cuda_on_cpu/, PyTorch on the CPU;
#             its figures say nothing
#
# What each part printed is in build/gpu/. A part that fails or takes too long is named; the others
# run, each for as long as seven minutes allow.
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
carry=$out/carry
mkdir -p $carry
rm -f $out/*.log $out/figures.txt
all_seconds=410 slower=1
[[ $measure && ! $smoke ]] || all_seconds=7200 slower=20  # no GPU waits

failed=()
part() {  # name seconds command...
  local name=$1 limit=$(($2 * slower)) began=$SECONDS status=0 left=$((all_seconds - SECONDS))
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
# Build: the tests, the benchmark, and a small model on which --check compares the engines

home=$(dirname "$(dirname "$(realpath -m "$nvcc")")")
if [[ $smoke ]]; then
  build_bench() {
    $cxx -std=c++20 -O1 -march=native -fopenmp -I. -DCAKE_CUDA_ON_CPU -Itest/cuda_on_cpu/include \
      -fno-strict-aliasing -Wno-unknown-pragmas -pthread dev/bench/bench_gpu.cpp \
      test/cuda_on_cpu/runtime.cpp -o $carry/bench_gpu
  }
else
  build_bench() {
    local arch flags=()
    for arch in ${CUDA_ARCHS:-}; do flags+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
    "$nvcc" -std=c++20 -O3 -I. -lineinfo "${flags[@]:--arch=native}" --diag-suppress=177 \
      -Xcompiler="-march=${MARCH:-native},-fopenmp" -x cu dev/bench/bench_gpu.cpp \
      -o $carry/bench_gpu -L"$home/lib64" -Xlinker -rpath="$home/lib64" -lcublasLt
  }
fi
build_tests() {
  make --no-print-directory CUDA=1 NVCC="$nvcc" BIN=$carry ${CUDA_ARCHS:+CUDA_ARCHS="$CUDA_ARCHS"} \
    ${MARCH:+MARCH="$MARCH"} build/test_gpu $carry/train_gpt $carry/bpe && cp build/test_gpu $carry/
}
make_model() {
  $carry/bpe train README.md --vocab-size 1024 -o $out/tokenizer &&
    $carry/bpe encode $out/tokenizer README.md --val-fraction 0 -o $out/data &&
    $carry/train_gpt --data $out/data --device cpu --family gpt2 --layers 3 --channels 128 \
      --context 256 --steps 1 --overwrite -o $out/run && rm -rf $carry/model &&
    cp -r $out/run/model $carry/model
}
# What the programs need beside the C and C++ libraries, CUDA's driver and cuBLASLt.
copy_libraries() {
  mkdir -p $carry/lib
  ldd $carry/{test_gpu,bench_gpu,train_gpt} | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    grep -Ev '/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libcuda|libcublas|libcublasLt)\.so' |
    xargs -r cp -Lt $carry/lib
  local mebibytes
  mebibytes=$(du -sm $carry | cut -f1)
  echo "carry $carry, $mebibytes MiB"
  ((mebibytes <= 64)) || { echo "expected 64 MiB at most"; return 1; }
}
if [[ $measure && ! $smoke ]]; then
  part device 20 nvidia-smi --format=csv \
    --query-gpu=name,driver_version,memory.free,clocks.max.sm,power.limit || exit 1
  tail -n +2 $out/device.log
fi
# Without a GPU's figures, PyTorch fills its compiler's cache meanwhile.
peer=''
if [[ $python && $measure && ! $smoke ]]; then
  part torch-compile 150 "$python" dev/bench/gpu_torch.py --seconds 0 &
  peer=$!
fi
if [[ $build ]]; then
  [[ $smoke ]] || part packages 30 make --no-print-directory build/packages ||
    { echo "where they cannot be installed: --build elsewhere, --built here"; exit 1; }
  export -f build_bench build_tests make_model copy_libraries
  export smoke nvcc cxx out carry home
  part build-bench 150 bash -c build_bench &
  bench=$!
  if [[ ! $smoke ]]; then
    part build-tests 150 bash -c build_tests && part model 20 bash -c make_model
  fi
  wait $bench || failed+=(build-bench)
fi
if [[ ! $measure ]]; then
  part libraries 20 bash -c copy_libraries
  cat $out/libraries.log
  ((${#failed[@]} == 0))
  exit
fi

# ------------------------------------------------------------------------------------------------
# The libraries of the programs: those that were carried, and cuBLASLt where it is on this machine

nvidia=''  # PyTorch's own folder of CUDA's libraries
[[ -z $python ]] || nvidia=$("$python" -c 'import importlib.util as u
spec = u.find_spec("nvidia")
print(list(spec.submodule_search_locations)[0] if spec else "")' 2>/dev/null)
find_library() {  # its folder
  local path
  path=$({ ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | awk -v name="$1" '$1 == name { print $NF; exit }')
  [[ $path ]] || path=$(find -L "$home/lib64" "$home/lib" "$home/targets" /usr/local/cuda*/ \
    ${nvidia:+"$nvidia"} -name "$1" -print -quit 2>/dev/null)
  [[ -z $path ]] || dirname "$path"
}
libraries=$carry/lib
if [[ ! $smoke ]]; then
  for program in $carry/{test_gpu,bench_gpu,train_gpt}; do
    [[ -x $program ]] || { echo "error: $program: not there: was it built?" >&2; exit 1; }
    for name in $(LD_LIBRARY_PATH=$libraries ldd $program | awk '/not found/ { print $1 }' | sort -u); do
      folder=$(find_library "$name")
      [[ $folder ]] || { echo "error: $program needs $name, which is not here: looked in $libraries," \
        "ldconfig's list, $home, /usr/local/cuda*${nvidia:+ and $nvidia}" >&2; exit 1; }
      libraries+=:$folder
    done
  done
fi
ours=(env LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")

# ------------------------------------------------------------------------------------------------
# Test, then measure

if [[ ! $smoke ]]; then
  part test 100 "${ours[@]}" $carry/test_gpu
  for precision in f32 bf16; do
    part check-$precision 20 "${ours[@]}" $carry/train_gpt --check --model $carry/model \
      --precision $precision
  done
fi
[[ -z $peer ]] || wait $peer  # what fails there fails again where it counts
part bench 150 "${ours[@]}" $carry/bench_gpu $smoke
if [[ -n $python ]]; then
  part torch 120 "$python" dev/bench/gpu_torch.py $smoke
fi
part bench-decoding 60 "${ours[@]}" $carry/bench_gpu --decoding $smoke
if [[ ! $smoke ]] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part $tool 45 "${ours[@]}" compute-sanitizer --tool $tool --error-exitcode 1 $carry/test_gpu \
      --test-case='*norm backward adds*,*bias*,*the same bits*'
  done
fi

# ------------------------------------------------------------------------------------------------
# The table: products and attention with their share of the peak, steps with PyTorch's beside them

cat $out/bench.log $out/bench-decoding.log $out/torch.log 2>/dev/null | grep -P '^[^\t ]+\t[0-9.e+-]+\t\S+$' >$out/figures.txt
awk -F '\t' '
  { name[NR] = $1; value[$1] = $2; unit[$1] = $3 }
  /^torch/ { sub(/\.B[0-9]+$/, "", $1); peer[$1] = $2 }  # a speed; batches may differ, as the names say
  END {
    print ""
    for (i = 1; i <= NR; i++) {
      n = name[i]
      beside = ""
      if (unit[n] == "TFLOP/s" && n != "peak" && value["peak"] > 0)
        beside = sprintf("%5.1f %% of the peak", 100 * value[n] / value["peak"])
      model = n
      sub(/\.B[0-9]+$/, "", model)
      if (n ~ /^tokens/ && ("torch." model) in peer)
        beside = sprintf("%5.2f x PyTorch", value[n] / peer["torch." model])
      printf "%-44s " (value[n] < 1000 ? "%12.5g" : "%12.0f") " %-9s %s\n", n, value[n], unit[n], beside
    }
  }' $out/figures.txt
[[ $smoke ]] && printf '\nSizes were tiny and nothing ran on a GPU: no figure above says anything.\n'
echo
echo "$SECONDS s in all${failed[*]:+; not done: ${failed[*]}}"
((${#failed[@]} == 0))
