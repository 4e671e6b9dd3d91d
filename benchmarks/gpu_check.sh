#!/bin/sh
# Correctness, then speed, on the first CUDA device that comes along: twelve minutes, three more with a reference. Results go
# beside this script.
# `sh benchmarks/gpu_check.sh [PYTHON]`, from an installation with `.[dev]`.
set -u

cd "$(dirname "$0")/.." || exit 1
python=${1:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out="benchmarks/gpu-$(date -u +%Y%m%dT%H%M%SZ)"
status=0

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no CUDA device")' || exit 1
mkdir -p "$out" || exit 1

# step NAME SECONDS COMMAND...: its output to a file, its outcome to summary.txt.
step() {
    name=$1 seconds=$2
    shift 2
    echo "== $name"
    if timeout "$seconds" "$@" >"$out/$name" 2>"$out/$name.log"; then
        echo "$name: passed" >>"$out/summary.txt"
    else
        echo "$name: FAILED or out of time (exit $?), see $name and $name.log" >>"$out/summary.txt"
        status=1
    fi
}

{
    nvidia-smi --query-gpu=name,driver_version,memory.used,utilization.gpu,clocks.sm --format=csv
    nvidia-smi --query-compute-apps=pid,used_memory --format=csv
    git rev-parse HEAD
    git status --porcelain --untracked-files=no
    "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'
} >"$out/machine.txt" 2>&1

step tests.txt 270 "$python" -m pytest -m gpu tests/test_gpu.py -q --maxfail=20 --durations=10
step runs.json 120 "$python" benchmarks/gpu_runs.py
step runs-5-students.json 90 "$python" benchmarks/gpu_runs.py --pairs res32x4:mv2 --students 5 --epochs 3
if "$python" -m icdctl bench --help >"$out/bench-help.txt" 2>&1; then
    rm "$out/bench-help.txt"
    step bench.json 110 "$python" -m icdctl bench --device cuda --seconds 12 --json \
        --pairs res32x4:mv2,res32x4:shuv1,wrn40_2:vgg8
    step compiled.json 110 "$python" -m icdctl bench --device cuda --seconds 8 --json --compile --pairs res32x4:mv2
    # A checkout of the reference, where one is named: REFERENCE=DIR sh benchmarks/gpu_check.sh
    if [ -n "${REFERENCE:-}" ]; then
        step against.json 200 "$python" -m icdctl bench --device cuda --against "$REFERENCE" --pairs res32x4:mv2 \
            --reference-variants published,workers,autocast --budget 150 --json
    fi
fi

cat "$out/machine.txt" "$out/summary.txt"
exit $status
