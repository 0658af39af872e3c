#!/usr/bin/env bash
# Everything that needs a GPU, in one call:  scripts/gpu_check.sh OUT [PYTHON]
# Builds the package with CUDA into PYTHON's environment (which has torch and the build tools), runs the
# gpu tests (a skip is a failure), then every microbenchmark, whose rows go to OUT/<op>_cuda.jsonl, and then
# ten steps of GRPO by a random model of 3B, whose rows go to OUT/grpo_step_cuda.jsonl, and then what needs
# vLLM, if that environment has it: equality, and throughput beside the hf engine. In between, where NVIDIA DALI
# is installed, its frames are compared with the CPU reader's (OUT/dali_reader_cuda.jsonl). Where the tree travels
# without its repository, name the commit: VRTHINKER_COMMIT=... scripts/gpu_check.sh OUT
set -euo pipefail
[[ $# -ge 1 ]] || { echo "usage: scripts/gpu_check.sh OUT [PYTHON]" >&2; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd)"
python="${2:-python3}"
cd "$(dirname "$0")/.."
if [[ -z ${VRTHINKER_COMMIT:-} ]] && commit="$(git rev-parse HEAD 2>/dev/null)"; then
    [[ -z $(git status --porcelain) ]] || commit+="-dirty"
    export VRTHINKER_COMMIT="$commit"
fi

echo "==> build"
"$python" -m pip install -q --no-build-isolation --no-deps -Ccmake.define.VRTHINKER_CUDA=ON .
# From outside the tree, so that the installed package is what is tested and measured.
run() { (cd "$out" && "$python" "$@"); }
run -c 'import json, vrthinker._core as core; print(json.dumps({"build": core.build_info(), "probe": core.cuda_probe()}, indent=1))' \
    | tee "$out/build.json"

echo "==> tests"
status=0
# Only the files that hold gpu tests: the others may want packages that a GPU machine has no use for.
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' "$PWD/tests")
VRTHINKER_REQUIRE_GPU=1 run -m pytest "${files[@]}" -c "$PWD/pyproject.toml" -m gpu -p no:cacheprovider \
    2>&1 | tee "$out/pytest.log" || status=$?

echo "==> microbenchmarks"
for bench in kernels/*/bench.py; do
    op="$(basename "$(dirname "$bench")")"
    # What `vrthinker bench OP --device cuda --out FILE` does, without the packages that the commands need.
    run - "$op" "$out/${op}_cuda.jsonl" <<'PY' || status=$?
import sys
import time

from vrthinker.kernels.measure import format_row, measure_op
from vrthinker.records.provenance import append_row

op, out = sys.argv[1:]
for row in measure_op(op, "cuda", rounds=25, seed=time.time_ns() % 2**31):
    print(format_row(row), flush=True)
    append_row(out, row, command=f"vrthinker bench {op} --device cuda --out {op}_cuda.jsonl")
PY
done

echo "==> DALI"
if run -c 'import sys; from vrthinker.video.dali.support import installed_version; sys.exit(installed_version() is None)'; then
    run "$PWD/benchmarks/dali_reader.py" --device gpu --codecs h264 hevc av1 vp9 \
        --out "$out/dali_reader_cuda.jsonl" || status=$?
else
    echo "skipped: NVIDIA DALI is not installed (pip install '.[dali]')"
fi

echo "==> GRPO"
# Only this part wants what training wants: pip install '.[train]' brings it.
run "$PWD/benchmarks/grpo_step.py" --model-size 3b --device cuda --packed both --refreshes 5 --groups 4 \
    --out "$out/grpo_step_cuda.jsonl" || status=$?

echo "==> vLLM"
if run -c 'import vllm' 2>/dev/null; then
    run -m pytest "$PWD/tests/engine/test_vllm_engine.py" -c "$PWD/pyproject.toml" -m vllm -p no:cacheprovider \
        2>&1 | tee "$out/pytest_vllm.log" || status=$?
    # A random model of 3B shapes beside the hf engine, and the time of a weight update.
    run "$PWD/benchmarks/vllm_throughput.py" --model 3b --dtype bfloat16 --side 616 --tokens 400 --weights \
        --out "$out/vllm_throughput_cuda.jsonl" || status=$?
else
    echo "vLLM is not installed in this environment: its part is left out"
fi
exit "$status"
