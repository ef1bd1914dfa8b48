#!/usr/bin/env bash
# What only a machine with a CUDA card can show: golden and kernel tests, compute-sanitizer, the
# example at LLM size, and the benches. Runs binaries that were built elsewhere.
#
# usage: gpu-check.sh BINARY_DIR [STEP...]
#        steps: tests sanitizer example decode bench (default: all)
set -uo pipefail
bin=$(cd "$1" && pwd)
shift
steps=${*:-tests sanitizer example decode bench}
failed=0

run() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tail -n "${TAIL:-40}"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || {
        failed=1
        echo "== $name FAILED ($status)"
    }
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
for step in $steps; do
    case $step in
    tests)
        for tests in kernels matmul ops modules; do
            [ -x "$bin/$tests" ] && run "$tests" "$bin/$tests" cuda
        done
        # Built with `cublaslt`.
        for tests in dense dense_graph dense_provider; do
            [ -x "$bin/$tests" ] && run "$tests" "$bin/$tests"
        done
        ;;
    sanitizer)
        for tool in memcheck racecheck; do
            run "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$bin/kernels" --test-threads 1 \
                cuda::shapes cuda::ranges cuda::values cuda::quantize_like_reference
            # Products and branches: each kernel, with cubes that share sums.
            run "compute-sanitizer $tool, products" \
                compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$bin/matmul" --test-threads 1 \
                cuda::gemv_shapes cuda::gemv_branches cuda::default_shapes \
                cuda_tensor_core_branches::rank_3 cuda_tensor_core_tiles::row_tiles_2 \
                cuda_levels::row_tiles_1::planes_3
        done
        for tool in memcheck racecheck synccheck; do
            [ -x "$bin/dense" ] || break
            run "compute-sanitizer $tool, dense products" \
                compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$bin/dense" --test-threads 1 cuda_random cuda_operands cuda_bad
        done
        ;;
    example)
        run "qlora_linear" "$bin/qlora_linear" --device cuda
        run "qlora_linear 14336x4096" "$bin/qlora_linear" --device cuda --size 14336x4096
        ;;
    decode)
        run "burn-nf4 bench" "$bin/burn-nf4" bench --device cuda --size llama8b
        run "burn-nf4 bench, branches" "$bin/burn-nf4" bench --device cuda --size llama8b --rank 16
        ;;
    bench)
        TAIL=200 run "bench" "$bin/dequantize"
        ;;
    *)
        echo "unknown step: $step"
        failed=1
        ;;
    esac
done
exit $failed
