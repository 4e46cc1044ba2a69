#!/usr/bin/env bash
# Builds, tests, sanitizes, measures and profiles ddpm_fast on this machine's GPU:
#
#   bash benchmarks/gpu.sh --out DIR [--quick] [build] [tests] [sanitizer] [ops] [loop] [sizes] [profile]
#
# All sections, or those named, in this order; a fresh machine needs build first. It takes Python (python3, or $PYTHON)
# with torch and what the build needs, and no network; tools that are missing are said and left out. Each section ends
# within DDPM_FAST_SECTION_SECONDS (540). DIR gets gpu.log, tests.xml, and ops, loop, sizes and profile as .json and
# .md; the last lines printed are a summary.
# --quick: tiny sizes and few rounds, on the CPU too where there is no GPU: does all of it run?
# The GPU's settings are left as they are.
set -uo pipefail
self=$(realpath "$0")
cd "$(dirname "$self")/.." || exit 2

SECTIONS=(build tests sanitizer ops loop sizes profile)
SKIPPED=77
# Characters of each section that the summary repeats: no more than 12,000 in all.
declare -A SHOWN=([build]=400 [tests]=500 [sanitizer]=300 [ops]=6000 [loop]=1800 [sizes]=1000 [profile]=700)

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$self"; }
say() { printf '%s\n' "$*"; }
has() { command -v "$1" >/dev/null; }
has_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
skip() { say "skipped: $*"; exit "$SKIPPED"; }
need_gpu() { has_gpu || skip "no CUDA device"; }

build() {
    if has nvidia-smi; then nvidia-smi; else say "nvidia-smi is not on the PATH"; fi
    "$PYTHON" -m ddpm_fast.info || true # what was here before
    need_gpu
    if [[ -z ${DDPM_FAST_CUDA_ARCHS:-} ]]; then
        DDPM_FAST_CUDA_ARCHS=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 1
        export DDPM_FAST_CUDA_ARCHS
    fi
    say "DDPM_FAST_CUDA_ARCHS=$DDPM_FAST_CUDA_ARCHS"
    "$PYTHON" -m pip install -e . --no-deps --no-build-isolation || exit 1
    if has nvidia-smi; then nvidia-smi -q -d CLOCK; fi
    "$PYTHON" -m ddpm_fast.info || exit 1
    "$PYTHON" -c 'import ddpm_fast; ddpm_fast.use_backend("cuda")' # fails, with the reason, if it is not there
}

tests() {
    need_gpu
    local workers=() # most of the time goes into compiling Triton's kernels, on the CPU
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 6); fi
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${workers[@]}" --junitxml "$out/tests.xml"
    status=$?
    if [[ $status == 5 ]]; then say "no test is marked gpu"; fi
    return "$status"
}

sanitizer() {
    need_gpu
    has compute-sanitizer || skip "compute-sanitizer is not on the PATH"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local failed=0 tool
    for tool in memcheck racecheck; do
        say "--- $tool"
        # torch asks the driver for what some versions of it lack: such refusals are no error of a kernel's.
        local options=(--tool "$tool" --error-exitcode 9 --target-processes application-only)
        if [[ $tool == memcheck ]]; then options+=(--report-api-errors no); fi
        if ! compute-sanitizer "${options[@]}" "$PYTHON" -m benchmarks.sanitize --device cuda; then
            say "$tool: FAILED"
            failed=1
        fi
    done
    return "$failed"
}

count_kernels() {
    "$PYTHON" -m benchmarks.kernels "${quick[@]}" --out "$out/profile.json" --markdown "$out/profile.md"
}

ops() {
    local options=(--out "$out/ops.json" --markdown "$out/ops.md" "${quick[@]}")
    if has_gpu; then
        # Counts of instructions, which the floors need; without them there are floors of bytes.
        if [[ ! -s $out/profile.json ]]; then count_kernels || say "the kernels could not be counted"; fi
        if [[ -s $out/profile.json ]]; then options+=(--kernels "$out/profile.json"); fi
        options+=(--device cuda --rounds 30 --minutes "$(((limit - SECONDS - 60) / 60))")
    elif [[ ${#quick[@]} == 0 ]]; then
        skip "no CUDA device (on the CPU: python -m benchmarks.ratios)"
    fi
    "$PYTHON" -m benchmarks.ratios "${options[@]}"
}

layers() { # NAME, then the sizes
    local options=(--out "$out/$1.json" --markdown "$out/$1.md" --minutes "$(((limit - 120) / 60))" "${quick[@]}") size
    if [[ ${#quick[@]} == 0 ]]; then
        need_gpu
        options+=(--compile)
        for size in "${@:2}"; do options+=(--size "$size"); done
    fi
    "$PYTHON" -m benchmarks.loop "${options[@]}"
}

loop() { layers loop cifar10 digits; }

sizes() {
    if [[ ${#quick[@]} != 0 ]]; then skip "--quick has one size, in loop"; fi
    layers sizes 64x64 256x256
}

profile() {
    need_gpu
    if [[ -s $out/profile.md ]]; then say "counted before, for ops"; else count_kernels || exit 1; fi
    cat "$out/profile.md"
}

out="" quick=() chosen=() inside=""
PYTHON=${PYTHON:-python3} limit=${DDPM_FAST_SECTION_SECONDS:-540}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc, ncu and compute-sanitizer, where the PATH lacks them
while (($#)); do
    case $1 in
        --out) out=${2:-}; shift ;;
        --quick) quick=(--quick) ;;
        --inside) inside=${2:-}; shift ;; # one section, in a process that can be stopped
        -h | --help) usage; exit 0 ;;
        *)
            if [[ " ${SECTIONS[*]} " != *" $1 "* ]]; then
                say "$1 is no section; expected some of: ${SECTIONS[*]} (see --help)" >&2
                exit 2
            fi
            chosen+=("$1")
            ;;
    esac
    shift
done
if [[ -z $out ]]; then
    usage >&2
    exit 2
fi
mkdir -p "$out" || exit 2
out=$(realpath "$out")
if [[ -n $inside ]]; then
    case $inside in
        build) build ;;
        tests) tests ;;
        sanitizer) sanitizer ;;
        ops) ops ;;
        loop) loop ;;
        sizes) sizes ;;
        profile) profile ;;
    esac
    exit
fi

if ((${#chosen[@]} == 0)); then chosen=("${SECTIONS[@]}"); fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$out/gpu.log"
declare -A result
failed=0
for section in "${SECTIONS[@]}"; do
    if [[ " ${chosen[*]} " != *" $section "* ]]; then continue; fi
    say "=== $section ($SECONDS s so far)" | tee -a "$out/gpu.log"
    began=$SECONDS
    timeout -k 20 "$limit" bash "$self" --inside "$section" --out "$out" "${quick[@]}" 2>&1 |
        tee -a "$out/gpu.log" "$work/$section"
    status=${PIPESTATUS[0]}
    took="$((SECONDS - began)) s"
    case $status in
        0) result[$section]="passed, $took" ;;
        "$SKIPPED") result[$section]=$(tail -n 1 "$work/$section") ;;
        124 | 137) result[$section]="FAILED: not done within $limit s" ;;
        *) result[$section]="FAILED with status $status, $took" ;;
    esac
    if [[ $status != 0 && $status != "$SKIPPED" ]]; then failed=1; fi
done

{
    say "================ summary"
    for section in "${SECTIONS[@]}"; do
        if [[ -z ${result[$section]:-} ]]; then continue; fi
        say "--- $section: ${result[$section]}"
        # The first of these lines is seldom a whole one.
        if [[ ${result[$section]} != skipped* ]]; then tail -c "${SHOWN[$section]}" "$work/$section" | tail -n +2; fi
    done
    say "---"
    for section in "${SECTIONS[@]}"; do
        if [[ -n ${result[$section]:-} ]]; then printf '%-10s %s\n' "$section" "${result[$section]}"; fi
    done
    say "files in $out: $(find "$out" -maxdepth 1 -type f -printf '%f\n' | sort | tr '\n' ' ')"
} | tee -a "$out/gpu.log"
exit "$failed"
