#!/usr/bin/env bash
# Everything that wants a GPU, in at most nine minutes: its tests, its benchmarks, and compute-sanitizer where it is
# installed. JSON, PNG, gpu.log and gpu-summary.txt come to lie in one folder; nothing is fetched.
#
#   benchmarks/gpu.sh FOLDER        FOLDER is $OUT if left out
#
# A part that fails or takes too long does not stop the others. The exit status is the number of those that did.
#
#   PYTHON          the interpreter; lowbit_optim must be importable by it (default python3)
#   LOWBIT_DEVICE   cuda (default) or cpu, where tiny sizes show only that all of it runs
#   GPU_MINUTES     for everything (default 9)
#   SANITIZE        which tests of tests/test_*gpu*.py compute-sanitizer watches, as pytest's -k has it
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-${OUT:-}}
if [ -z "$out" ]; then
    echo "usage: benchmarks/gpu.sh FOLDER" >&2
    exit 64
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 73
python=${PYTHON:-python3}
export LOWBIT_DEVICE=${LOWBIT_DEVICE:-cuda} LOWBIT_RESULTS=$out PYTHONUNBUFFERED=1 COLUMNS=200
log=$out/gpu.log summary=$out/gpu-summary.txt
end=$((SECONDS + ${GPU_MINUTES:-9} * 60)) failed=0
sanitize=${SANITIZE:-several_parameters or row_lengths}
: >"$log" && : >"$summary"

if ! "$python" -c "import torch, lowbit_optim.kernels; assert '$LOWBIT_DEVICE' != 'cuda' or torch.cuda.is_available()" \
    2>>"$log"; then
    tail -n 1 "$log" >&2
    echo "$python needs lowbit_optim (pip install -e .) and, unless LOWBIT_DEVICE=cpu, a GPU" >&2
    exit 69
fi

# part NAME SECONDS COMMAND...: its output in the log, a line in the summary.
part() {
    local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS status
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
    if [ "$limit" -lt 5 ]; then
        status=124
    else
        timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
        status=$?
    fi
    case $status in
        0) said="passed" ;;
        124 | 137) said="ran out of time" ;;
        *) said="failed ($status)" ;;
    esac
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    printf '%-28s %-18s %4d s of %d\n' "$name" "$said" $((SECONDS - start)) "$limit" | tee -a "$summary"
}

mapfile -t tests < <(grep -l "cuda" tests/test_*.py)
mapfile -t kernel_tests < <(ls tests/test_*gpu*.py)
pytest=("$python" -m pytest -q -p no:cacheprovider)
steps=("$python" -m benchmarks.steps)
if [ "$LOWBIT_DEVICE" = cuda ]; then
    gpt=(--limits 1200 --rounds 15 --updates 3 --budget 1.5)
    models=(--sets gpt2 resnet50 vit-s "llama-1b layer" --limits 1200 --rounds 15 --updates 3 --budget 1.5)
    roots=(--sets gpt gpt2 --budget 2)
    worst=()
    scaling=()
else
    gpt=(--sets tiny --rounds 1 --updates 1)
    models=(--sets tiny --few --rounds 1 --updates 1)
    roots=(--sets tiny)
    worst=(--sets tiny)
    scaling=(--layers 2 4 --widths 32 64 --rounds 1 --updates 1)
fi

part "GPU tests" 110 "${pytest[@]}" -k "cuda or gpu" "${tests[@]}"
if [ -f benchmarks/kernels.py ]; then
    part "kernels" 60 "$python" -m benchmarks.kernels
fi
part "steps of gpt" 80 "${steps[@]}" --only second-order "${gpt[@]}"
part "steps of models" 80 "${steps[@]}" --only second-order "${models[@]}"
part "roots" 60 "${steps[@]}" --only roots "${roots[@]}"
part "worst step" 20 "${steps[@]}" --only worst "${worst[@]}"
part "scaling" 35 "$python" -m benchmarks.scaling "${scaling[@]}"
if command -v compute-sanitizer >/dev/null && [ "$LOWBIT_DEVICE" = cuda ]; then
    # Without torch's cache of memory, so that a byte too far is somebody else's.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        part "$tool" 45 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
            "${pytest[@]}" -k "$sanitize" "${kernel_tests[@]}"
    done
else
    echo "compute-sanitizer is not used" | tee -a "$summary"
fi
echo "$failed failed" | tee -a "$summary"
exit "$failed"
