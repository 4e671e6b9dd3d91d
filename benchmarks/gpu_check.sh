#!/bin/sh
# Checks correctness, then measures speed, on the first CUDA device, in ten minutes, three more with a reference. Results go
# beside this script, or into FOLDER: eight files, complete up to the point where the script is stopped.
# Usage: `sh benchmarks/gpu_check.sh [PYTHON [FOLDER]]`, from an installation with `.[dev]`.
set -u

cd "$(dirname "$0")/.." || exit 1
python=${1:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out=${2:-benchmarks/gpu-$(date -u +%Y%m%dT%H%M%SZ)}
status=0

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no CUDA device")' || exit 1
mkdir -p "$out" || exit 1

# step NAME SECONDS COMMAND...: writes stdout to the file NAME, stderr to log.txt, the outcome to summary.txt.
step() {
    name=$1 seconds=$2
    shift 2
    echo "== $name" | tee -a "$out/log.txt"
    if timeout "$seconds" "$@" >"$out/$name" 2>>"$out/log.txt"; then
        echo "$name: passed" >>"$out/summary.txt"
    else
        echo "$name: FAILED or out of time (exit $?), see $name and log.txt" >>"$out/summary.txt"
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

# The limits add up to 580 s. Four processes share the device; pytest plugins of other packages are not loaded.
step tests.txt 220 env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=4 "$python" -m pytest -p xdist -n 4 -m gpu \
    tests/test_gpu.py -q --maxfail=20 --durations=10
step bench.json 120 "$python" -m icdctl bench --device cuda --seconds 6 --json \
    --pairs res32x4:mv2,res32x4:shuv1,wrn40_2:vgg8
step runs.json 85 "$python" benchmarks/gpu_runs.py
step runs-5-students.json 60 "$python" benchmarks/gpu_runs.py --pairs res32x4:mv2 --students 5 --epochs 3
step compiled.json 95 "$python" -m icdctl bench --device cuda --seconds 4 --json --compile --pairs res32x4:mv2
# With a checkout of the reference: REFERENCE=DIR sh benchmarks/gpu_check.sh
if [ -n "${REFERENCE:-}" ]; then
    step against.json 200 "$python" -m icdctl bench --device cuda --against "$REFERENCE" --pairs res32x4:mv2 \
        --reference-variants published,workers,autocast --budget 150 --json
fi

cat "$out/machine.txt" "$out/summary.txt"
exit $status
