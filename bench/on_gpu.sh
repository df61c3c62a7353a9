#!/usr/bin/env bash
# Everything that needs a GPU, in at most nine minutes: tests/gpu, compute-sanitizer on a small run,
# the benchmarks. For a bare machine with torch, triton, numpy and pytest and no network; nothing is
# installed, the package is imported from this checkout. Stages come in the order of their worth,
# each has its own time limit, and one that fails loses none of those after it.
#
#   bench/on_gpu.sh              run; results in $OUT, or else bench/results/<device name>
#   bench/on_gpu.sh --bench      the benchmarks alone, with all of the time for them
#   bench/on_gpu.sh --dry-run    say which stages would run, and with what
#   bench/on_gpu.sh --rehearse   run small parts on a CPU, in Triton's interpreter
#
# PYTHON names the interpreter (python3), COMMIT the commit where there is no git.
# Exit status: 0, or the worst of the stages' (124: a stage ran out of time), or 2: no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
mode=${1:-run}
total=530   # seconds for all stages
reserve=150 # of them for the benchmarks, which come last
began=$SECONDS
worst=0
summary=()

case $mode in run | --bench | --dry-run | --rehearse) ;; *)
  sed -n '2,/^set/p' bench/on_gpu.sh | grep '^#' >&2
  exit 2
  ;;
esac

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
# Another project's pytest plugins stay out; ours are named.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
unset EPT_FAST_BACKEND EPT_FAST_CHECK EPT_FAST_TUNED TRITON_INTERPRET EPT_FAST_TEST_DEVICE PYTEST_ADDOPTS PYTEST_XDIST_WORKER

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
  left=$((total - reserve - (SECONDS - began)))
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
  return "$status"
}

gpu_tests() { # NAME LIMIT PROCESSES PYTEST-ARGUMENTS...
  local name=$1 limit=$2 processes=$3
  shift 3
  local several=()
  # Compiling the kernels takes longer than running them.
  if ((processes > 1)) && has xdist; then several=(-p xdist -n "$processes"); fi
  stage "$name" "$limit" "$python" -m pytest -c tests/gpu/pytest.ini --rootdir tests/gpu \
    --confcutdir tests/gpu "${several[@]}" -v --durations=5 --tb=short "$@"
}

benchmark() { # LIMIT SECONDS PYTEST-ARGUMENTS...: start no row after SECONDS
  local limit=$1 seconds=$2
  shift 2
  if ! has pytest_benchmark; then
    note benchmark "NOT RUN: pytest-benchmark is missing"
    if ((worst < 1)); then worst=1; fi
    return 0
  fi
  stage benchmark "$limit" "$python" -m pytest -p pytest_benchmark.plugin bench/ -v --tb=short \
    --out "$out" --seconds "$seconds" "$@"
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
    # ept_fast.checkpoint imports it; nothing here saves or loads.
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
  [[ -d ../shared/golden ]] || echo "../shared/golden is missing: the golden vectors are skipped"

  if [[ $mode == --rehearse ]]; then
    export EPT_FAST_TEST_DEVICE=cpu TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    gpu_tests parity 200 1 tests/gpu/test_parity.py -k 'odd and float32 and not parts'
    gpu_tests modes 60 1 tests/gpu/test_modes.py -k 'checked or autocast'
    stage small-run 60 "$python" -m tests.gpu.small_run
    EPT_FAST_BACKEND=triton benchmark 100 15 --device cpu --quick --no-compiled -k 'splice'
  elif [[ $mode == --bench ]]; then
    reserve=0
    benchmark 500 450
  else
    # Where this fails, the tests of the CUDA backend are skipped and say why.
    export EPT_FAST_CACHE=${EPT_FAST_CACHE:-$scratch/cache}
    stage extension 120 "$python" -c 'from ept_fast.extension import library; library.load(); print(library.state().text)'
    gpu_tests parity 150 10 tests/gpu/test_parity.py
    gpu_tests behaviour 90 6 tests/gpu/test_determinism.py tests/gpu/test_modes.py
    gpu_tests cost 60 1 tests/gpu/test_cost.py
    gpu_tests large 50 1 tests/gpu/test_large.py
    gpu_tests compile 80 4 tests/gpu/test_compile.py
    sanitizer memcheck 45
    sanitizer racecheck 30
    sanitizer initcheck 30
    reserve=0
    local left=$((total - (SECONDS - began)))
    benchmark "$left" "$((left - 45))"
  fi

  [[ $mode == --dry-run ]] && return 0
  echo
  printf '%s\n' "${summary[@]}"
  echo "$((SECONDS - began)) s, results in $out"
  return "$worst"
}

scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
if [[ $mode == --dry-run ]]; then
  out=${OUT:-'bench/results/<device name>'}
  main
  exit
fi
if [[ $mode == --rehearse ]]; then
  device=rehearsal
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
mkdir -p "$out" || exit 2
main 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
