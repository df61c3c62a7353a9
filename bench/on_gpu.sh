#!/usr/bin/env bash
# What a GPU has to show beyond bench/first_contact.py, in under 500 seconds: the goals' benchmarks,
# tests/gpu, compute-sanitizer on a small run, further benchmarks. For a bare machine with torch,
# triton, numpy and pytest and no network; nothing is installed, the package is imported from this
# checkout. Stages come in the order of their worth, each has its own time limit, and one that fails
# loses none of those after it.
#
#   bench/on_gpu.sh              run; results in $OUT, or else bench/results/<device name>
#   bench/on_gpu.sh --bench      the benchmarks alone, with all of the time for them
#   bench/on_gpu.sh --dry-run    say which stages would run, and with what
#   bench/on_gpu.sh --rehearse   run small parts on a CPU, in Triton's interpreter
#
# $OUT gets log.txt, results.tgz (CSV and plots, renewed after each stage) and triton-cache.tgz (the
# kernels that Triton has compiled). What failed and what was measured is also printed last, in under
# 100 lines: if files are lost on their way, that remains. What an earlier call left is used
# if the folder .gpu holds it: first_contact.jsonl (what failed there is tried first),
# triton-cache.tgz, and launches.jsonl of `python -m tests.gpu.launches list`.
#
# PYTHON names the interpreter (python3), COMMIT the commit if there is no git.
# Exit status: 0, or the worst of the stages' (124: a stage ran out of time), or 2: no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
mode=${1:-run}
total=470 # seconds for all stages; what is between them comes on top
began=$SECONDS
worst=0
summary=()
carried=.gpu
# The rows that the goals are about.
goals='(t5-base or llama-8b) and not max-autotune'
goals_files=(bench/test_prompt_path.py bench/test_splice.py bench/test_reconstruct.py)

case $mode in run | --bench | --dry-run | --rehearse) ;; *)
  sed -n '2,/^set/p' bench/on_gpu.sh | grep '^#' >&2
  exit 2
  ;;
esac

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
# Another project's pytest plugins stay out; ours are named.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
unset EPT_FAST_BACKEND EPT_FAST_CHECK TRITON_INTERPRET EPT_FAST_TEST_DEVICE PYTEST_ADDOPTS PYTEST_XDIST_WORKER

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

note() { # a line of the summary
  summary+=("$(printf '%-14s %s' "$1" "$2")")
  printf '== %s: %s\n' "$1" "$2"
}

stage() { # NAME LIMIT COMMAND...: run it within its limit and what is left of the total
  local name=$1 limit=$2 status left
  shift 2
  if [[ $mode == --dry-run ]]; then
    printf '%-14s %4d s  %s\n' "$name" "$limit" "$*"
    return 0
  fi
  left=$((total - (SECONDS - began)))
  if ((left < limit)); then limit=$left; fi
  if ((limit < 10)); then
    note "$name" "not run: no time left"
    if ((worst < 124)); then worst=124; fi
    return 0
  fi
  printf '== %s (at most %d s): %s\n' "$name" "$limit" "$*"
  local start=$SECONDS
  # The interrupt lets pytest still say what failed, and the benchmark draw what it has.
  timeout -s INT -k 10 "$limit" "$@" </dev/null
  status=$?
  case $status in
  0) note "$name" "passed in $((SECONDS - start)) s" ;;
  124 | 137)
    status=124
    note "$name" "OUT OF TIME after $limit s"
    ;;
  *) note "$name" "FAILED with status $status in $((SECONDS - start)) s" ;;
  esac
  if ((status > worst)); then worst=$status; fi
  keep
  return "$status"
}

keep() { # renew the archive of what there is
  tar -czf "$scratch/results.tgz" --exclude='*.tgz' --exclude=log.txt -C "$results" . &&
    mv "$scratch/results.tgz" "$out/results.tgz"
}

keep_kernels() { "$python" -m bench.triton_cache pack "$out/triton-cache.tgz"; }

remains() { # what failed, and what was measured
  echo
  # pytest's short summary, and the lines of compilers and sanitizers.
  grep -aE '^(FAILED|ERROR) |^E   |^========= (Invalid|Error|ERROR)' "$out/log.txt" | cut -c 1-200 | sort -u | head -24
  if [[ -s $results/compile.txt ]]; then tail -n 4 "$results/compile.txt" | cut -c 1-200; fi
  "$python" -m bench.rows "$results" 2>/dev/null | head -60
}

gpu_tests() { # NAME LIMIT PROCESSES PYTEST-ARGUMENTS...
  local name=$1 limit=$2 processes=$3
  shift 3
  local several=()
  # A worker whose context is dead, or whose test hangs, ends, and another takes its place.
  if has xdist; then several=(-p xdist -n "$processes" --max-worker-restart 20); fi
  if has pytest_timeout; then several+=(-p pytest_timeout --timeout 60 --timeout-method thread); fi
  COLUMNS=240 stage "$name" "$limit" "$python" -m pytest -c tests/gpu/pytest.ini --rootdir tests/gpu \
    --confcutdir tests/gpu "${several[@]}" -v --durations=5 --tb=short "$@"
}

benchmark() { # NAME LIMIT PYTEST-ARGUMENTS...: no row is started in the last seconds
  local name=$1 limit=$2 left=$((total - (SECONDS - began)))
  shift 2
  if ((left < limit)); then limit=$left; fi
  if ! has pytest_benchmark; then
    note "$name" "NOT RUN: pytest-benchmark is missing"
    if ((worst < 1)); then worst=1; fi
    return 0
  fi
  COLUMNS=240 stage "$name" "$limit" "$python" -m pytest -p pytest_benchmark.plugin -v --tb=short \
    --out "$results" --seconds "$((limit > 50 ? limit - 30 : limit / 2))" "$@"
}

sanitizer() { # TOOL LIMIT
  local name=$1 limit=$2 status
  local -a command=(compute-sanitizer --tool "$name" --error-exitcode 9
    "$python" -m tests.gpu.small_run)
  if [[ $mode == --dry-run ]]; then
    stage "$name" "$limit" "${command[@]}"
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    note "$name" "skipped: compute-sanitizer is not on the PATH"
    return
  fi
  local before=$worst
  # Without PyTorch's allocator every tensor is an allocation that the tool knows the end of.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$name" "$limit" "${command[@]}" > >(tee "$scratch/$name") 2>&1
  status=$?
  sleep 1 # for tee
  if ((status != 0)) && ! grep -q '^the device answers' "$scratch/$name"; then
    worst=$before
    unset 'summary[-1]'
    note "$name" "skipped: compute-sanitizer does not work on this machine"
  fi
}

compile_kernels() { # each of the tests' launches once, before workers that start together need it
  local launches=$carried/launches.jsonl
  if [[ ! -f $launches ]]; then
    launches=$scratch/launches.jsonl
    "$python" -m tests.gpu.launches list "$launches" >"$scratch/listed.txt" || tail "$scratch/listed.txt"
  fi
  nice timeout 120 "$python" -m tests.gpu.launches compile "$launches" --jobs 10
}

main() {
  echo "$(date -u '+%Y-%m-%d %H:%M UTC'), commit ${COMMIT:-$(git describe --always --dirty --exclude='*' 2>/dev/null || echo unknown)}"
  "$python" - <<'EOF'
import importlib.metadata, platform, torch
print("python", platform.python_version(), " torch", torch.__version__, " cuda", torch.version.cuda)
for name in ("triton", "numpy", "pytest", "pytest-benchmark", "pytest-xdist", "peft", "transformers", "safetensors", "matplotlib", "hypothesis"):
    try:
        print(name, importlib.metadata.version(name), end="  ")
    except importlib.metadata.PackageNotFoundError:
        print(name, "missing", end="  ")
print()
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "SMs", p.total_memory >> 20, "MiB")
EOF
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader
  fi
  if ! has safetensors; then
    # ept_fast.storage.files imports it; nothing here saves or loads.
    echo "safetensors is missing: an empty stand-in is imported, saving and loading are not run"
    mkdir -p "$scratch/safetensors"
    echo 'SafetensorError = ValueError; safe_open = None' >"$scratch/safetensors/__init__.py"
    echo 'save = None' >"$scratch/safetensors/torch.py"
    export PYTHONPATH="$PYTHONPATH:$scratch"
  fi
  if ! "$python" -c 'import bench.environment, tests.cases' 2>/dev/null; then
    # Installed packages of these names come before folders without an __init__.py.
    local name
    for name in bench tests; do
      mkdir -p "$scratch/$name"
      echo "__path__ = ['$PWD/$name']" >"$scratch/$name/__init__.py"
    done
    export PYTHONPATH="$scratch:$PYTHONPATH"
    "$python" -c 'import bench.environment, tests.cases' || echo "bench and tests cannot be imported"
  fi
  has peft || echo "peft is missing: its rows are left out"
  has matplotlib || echo "matplotlib is missing: there are no plots, the CSV is whole"
  has xdist || echo "pytest-xdist is missing: the tests run one after the other"
  has pytest_timeout || echo "pytest-timeout is missing: a test that hangs ends its stage"
  [[ -d ../shared/golden || -d shared/golden ]] ||
    echo "neither ../shared/golden nor shared/golden is there: the golden vectors are skipped"

  if [[ $mode == --rehearse ]]; then
    export EPT_FAST_TEST_DEVICE=cpu TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    EPT_FAST_BACKEND=triton benchmark goals 100 bench/test_splice.py --device cpu --quick --no-compiled
    gpu_tests parity 200 1 tests/gpu/test_parity.py -k 'odd and float32 and not parts'
    gpu_tests behaviour 60 1 tests/gpu/test_modes.py -k 'checked or autocast'
    stage small-run 60 "$python" -m tests.gpu.small_run
  elif [[ $mode == --bench ]]; then
    benchmark benchmarks 500 bench/
  else
    if [[ -f $carried/triton-cache.tgz ]]; then
      stage unpack 20 "$python" -m bench.triton_cache unpack "$carried/triton-cache.tgz"
    fi
    # If this fails, the tests of the CUDA backend are skipped and say why.
    export EPT_FAST_CACHE=${EPT_FAST_CACHE:-$scratch/cache}
    stage extension 120 "$python" -c 'from ept_fast.backends.cuda import library; library.load(); print(library.state().text)'
    if [[ -f $carried/first_contact.jsonl ]]; then
      stage again 60 "$python" -m bench.first_contact --out "$results" --seconds 55 \
        --again "$carried/first_contact.jsonl"
    fi
    # The tests' kernels are compiled meanwhile, by some of the cores.
    local compiling=''
    if [[ $mode == run ]]; then
      compile_kernels >"$results/compile.txt" 2>&1 &
      compiling=$!
    fi
    benchmark goals 130 "${goals_files[@]}" -k "$goals"
    if [[ -n $compiling ]]; then
      wait "$compiling"
      note kernels "$(tail -n 1 "$results/compile.txt")"
      keep_kernels
    fi
    gpu_tests parity 120 10 tests/gpu/test_parity.py
    gpu_tests behaviour 60 6 tests/gpu/test_determinism.py tests/gpu/test_modes.py
    gpu_tests cost 40 1 tests/gpu/test_cost.py
    sanitizer memcheck 45
    sanitizer racecheck 30
    sanitizer initcheck 30
    gpu_tests compile 60 4 tests/gpu/test_compile.py
    gpu_tests large 40 1 tests/gpu/test_large.py
    benchmark others 500 bench/ -k "not ((test_prompt_path or test_splice or test_reconstruct) and $goals)"
  fi

  [[ $mode == --dry-run ]] && return 0
  [[ $mode == run ]] && keep_kernels
  remains
  echo
  printf '%s\n' "${summary[@]}"
  echo "$((SECONDS - began)) s, results in $out"
  return "$worst"
}

scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
if [[ $mode == --dry-run ]]; then
  out=${OUT:-'bench/results/<device name>'} results=$out
  main
  exit
fi
if [[ $mode == --rehearse ]]; then
  out=${OUT:-$scratch/out}
else
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")' |
    tr '[:upper:] ' '[:lower:]-')
  if [[ -z $device ]]; then
    echo "no CUDA device on this machine (or $python has no torch)" >&2
    exit 2
  fi
  out=${OUT:-bench/results/$device}
fi
# $OUT may have room for a few files only: all others are in the archive.
results=$out
if [[ -n ${OUT:-} ]]; then results=$scratch/results; fi
# Named, since torch.compile would have Triton keep its kernels elsewhere.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/ept-fast-triton}
if [[ $mode == --rehearse ]]; then export TRITON_CACHE_DIR=$scratch/triton; fi
mkdir -p "$out" "$results" "$TRITON_CACHE_DIR" || exit 2
main 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
