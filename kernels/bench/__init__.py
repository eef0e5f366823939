"""Time every kernel on this GPU, next to the limits of the GPU, yardsticks and goals.

    python -m dsv3_ref.kernels.bench                     time all kernels
    python -m dsv3_ref.kernels.bench --dry-run           list the cases; needs no GPU
    python -m dsv3_ref.kernels.bench --only fp8 wgrad    cases whose name contains one of these

Times are medians of interleaved rounds, taken by CUDA events with a cold L2. The limit of a case is
the larger of two lower bounds: its bytes (each input read once, each output written once) over the
rate of a copy, and its FLOPs over the rate of cuBLAS. Both rates are measured here; FP8 may reach
twice that of bf16. Results are compared with those of the first yardstick. A case that fails or is
wrong is reported as a row, and the exit status is then 1. `smoke` calls every kernel without timing
it, `end_to_end` trains and decodes with a model, and tools/gpu.sh does all of it, with the tests.
"""
