#!/usr/bin/env bash
# Everything about speed that needs an NVIDIA GPU; each step leaves one file in OUT.
#
#     benchmarks/on_gpu.sh OUT [STEP ...]
#
# Steps: tests decode prefill suite batches steps router experts; all of them without a choice, in this
# order, which is that of what can least be missed. A step that fails doesn't stop the next.
set -uo pipefail

out=$1
shift
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests decode prefill suite batches steps router experts)
mkdir -p "$out"

bench() { python3 -m bh_routing bench "$@" --device cuda --json; }

for step in "${steps[@]}"; do
    start=$SECONDS
    case $step in
        tests) timeout 300 python3 -m pytest -q -m gpu -p no:cacheprovider >"$out/tests.txt" ;;
        decode) bench decode --compiled >"$out/decode.json" ;;
        prefill) bench prefill >"$out/prefill.json" ;;
        suite) bench suite >"$out/suite.json" ;;
        batches) bench decode --batches 4,16,64 --tokens 100 >"$out/batches.json" ;;
        steps) python3 -m benchmarks.step_rules_speed >"$out/step_rules_speed.txt" ;;
        router) python3 benchmarks/router_kernel.py --json "$out/router.json" ;;
        experts) python3 benchmarks/experts_kernel.py "$out/experts.json" ;;
        *) echo "no step $step" >&2 && exit 2 ;;
    esac
    echo "$step: exit code $?, $((SECONDS - start)) s"
done
