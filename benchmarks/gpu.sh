#!/usr/bin/env bash
# Builds, tests, sanitizes, measures and profiles ddpm_fast on the GPU of this machine; benchmarks/README.md has more.
#
#   bash benchmarks/gpu.sh --out DIR [--minutes 8] [--wheels DIR] [--max-autotune] [--quick] [SECTION ...]
#
# SECTION: build, warm, tests, sanitizer, headline, convolutions, trace, profile, ops, network, loops, growth; all by
# default. DIR gets gpu.log and the results.
# --minutes: of each section; two minutes before the end no new case is started. What was measured is kept.
# --wheels: a folder with wheels of diffusers and importlib_metadata, which build installs without a network.
# --max-autotune: also time diffusers' networks compiled by that mode, which takes minutes a case to start.
# --quick: tiny sizes and few rounds, on the CPU where there is no GPU: does all of it run?
set -uo pipefail
self=$(realpath "$0")
cd "$(dirname "$self")/.." || exit 2

SECTIONS=(build warm tests sanitizer headline convolutions trace profile ops network loops growth)
SKIPPED=77

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$self"; }
has() { command -v "$1" >/dev/null; }
has_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
skip() { echo "skipped: $*"; exit "$SKIPPED"; }
need_gpu() { has_gpu || skip "no CUDA device"; }

build() {
    if has nvidia-smi; then nvidia-smi; else echo "nvidia-smi is not on the PATH"; fi
    if [[ -n $wheels ]]; then
        "$PYTHON" -m pip install --no-index --no-deps --find-links "$wheels" importlib_metadata diffusers || exit 1
    fi
    need_gpu
    : "${DDPM_FAST_CUDA_ARCHS:=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}"
    export DDPM_FAST_CUDA_ARCHS
    "$PYTHON" -m pip install -e . --no-deps --no-build-isolation || exit 1
    "$PYTHON" -m ddpm_fast.info || exit 1
    "$PYTHON" -c 'import ddpm_fast; ddpm_fast.use_backend("cuda")' # fails, with the reason, if it is not there
}

# The caches on disk are inductor's and Triton's own: another run, beside this one or after it, finds them there.
warm() {
    if [[ ${#quick[@]} == 0 ]]; then need_gpu; fi
    "$PYTHON" -m benchmarks warm --device "$device" "${quick[@]}" "${autotune[@]}" "${warming[@]}"
}

tests() {
    need_gpu
    local workers=() # most of the time goes into compiling Triton's kernels, on the CPU
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 6); fi
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${workers[@]}" --junitxml "$out/tests.xml"
}

sanitizer() {
    need_gpu
    has compute-sanitizer || skip "compute-sanitizer is not on the PATH"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local failed=0 tool
    for tool in memcheck racecheck; do
        # torch asks the driver for what some versions of it lack: such refusals are no error of a kernel's.
        local options=(--tool "$tool" --error-exitcode 9 --target-processes application-only)
        if [[ $tool == memcheck ]]; then options+=(--report-api-errors no); fi
        compute-sanitizer "${options[@]}" "$PYTHON" -m tests.support.every_op --device cuda || failed=1
    done
    return "$failed"
}

measure() { # SECTION OPTION ...
    if [[ ${#quick[@]} == 0 ]]; then need_gpu; fi
    "$PYTHON" -m benchmarks "$1" --out "$out/$1.json" "${quick[@]}" --minutes "$((minutes - 2))" "${@:2}"
}

# The counts of instructions, which the floors of the ops need; without them there are floors of bytes.
profile() {
    need_gpu
    has ncu || skip "ncu is not on the PATH"
    LC_ALL=C ncu --clock-control none --profile-from-start off --csv --print-units base \
        --metrics smsp__inst_executed.sum,gpu__time_duration.sum --log-file "$out/profile.csv" \
        "$PYTHON" -m benchmarks kernels "${quick[@]}"
}

ops() {
    local options=(--device "$device")
    if [[ ${#quick[@]} == 0 ]]; then options+=(--rounds 30); fi
    if grep -q smsp__inst "$out/profile.csv" 2>/dev/null; then options+=(--kernels "$out/profile.csv"); fi
    measure ops "${options[@]}"
}

# First what matters most: sampling and training of CIFAR-10's network in bf16.
headline() {
    if [[ ${#quick[@]} == 0 ]]; then need_gpu; fi
    local cases=(--size cifar10 --only bf16)
    if [[ ${#quick[@]} != 0 ]]; then cases=(--size quick --only "sampling quick bf16 2"); fi
    "$PYTHON" -m benchmarks loops --out "$out/headline.json" "${quick[@]}" --minutes "$((minutes - 2))" \
        "${compile[@]}" "${autotune[@]}" "${cases[@]}"
}
convolutions() { measure convolutions --device "$device"; }
trace() {
    if [[ ${#quick[@]} == 0 ]]; then need_gpu; fi
    "$PYTHON" -m benchmarks trace --device "$device" --out "$out/trace.txt" "${quick[@]}"
}

compile=(--compile) autotune=() points=() warming=()
network() { measure network "${compile[@]}" "${autotune[@]}"; }
loops() { measure loops "${compile[@]}" "${autotune[@]}"; }
growth() { measure growth "${points[@]}"; }

out="" wheels="" quick=() chosen=() inside="" minutes=8 PYTHON=${PYTHON:-python3}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc, ncu and compute-sanitizer, where the PATH lacks them
while (($#)); do
    case $1 in
        --out) out=${2:-}; shift ;;
        --wheels) wheels=${2:-}; shift ;;
        --minutes) minutes=${2:-}; shift ;;
        --max-autotune) autotune=(--max-autotune) ;;
        --quick) quick=(--quick) compile=() points=(--only "noise loss") warming=(--only "sampling quick bf16 2") ;;
        --inside) inside=${2:-}; shift ;; # one section, in a process that can be stopped
        -h | --help) usage; exit 0 ;;
        *) chosen+=("$1") ;;
    esac
    shift
done
for section in "${chosen[@]}"; do
    if [[ " ${SECTIONS[*]} " != *" $section "* ]]; then
        echo "$section is no section; expected some of: ${SECTIONS[*]} (see --help)" >&2
        exit 2
    fi
done
if [[ -z $out || ! $minutes =~ ^[0-9]+$ || $minutes -lt 3 ]]; then usage >&2; exit 2; fi
mkdir -p "$out" || exit 2
out=$(realpath "$out")
if [[ -n $inside ]]; then
    device=$(has_gpu && echo cuda || echo cpu)
    "$inside"
    exit
fi

if ((${#chosen[@]} == 0)); then chosen=("${SECTIONS[@]}"); fi
: >"$out/gpu.log"
summary="" failed=0
for section in "${SECTIONS[@]}"; do
    if [[ " ${chosen[*]} " != *" $section "* ]]; then continue; fi
    echo "=== $section ($SECONDS s so far)" | tee -a "$out/gpu.log"
    began=$SECONDS
    timeout -k 20 "$((60 * minutes))" bash "$self" --inside "$section" --out "$out" --wheels "$wheels" \
        --minutes "$minutes" "${autotune[@]}" "${quick[@]}" 2>&1 | tee -a "$out/gpu.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) said="passed" ;;
        "$SKIPPED") said=$(tail -n 1 "$out/gpu.log") ;;
        124 | 137) said="FAILED: stopped after $minutes minutes" ;;
        *) said="FAILED with status $status" ;;
    esac
    if [[ $status != 0 && $status != "$SKIPPED" ]]; then failed=1; fi
    summary+=$(printf '%-12s %s, %d s' "$section" "$said" "$((SECONDS - began))")$'\n'
done
printf '================ summary\n%sfiles in %s\n' "$summary" "$out" | tee -a "$out/gpu.log"
exit "$failed"
