"""The cost of averaging, compared with other libraries and with the limit that memory sets.

    python -m benchmarks                       # everything, on the backends that are installed
    python -m benchmarks --quick               # a few minutes
    python -m benchmarks --backend torch --parts steps swaps --sizes 1000000x10 50000000x208

Each part runs in a process of its own on each backend. In each round of a part, all contenders run
once. So a busy machine slows them down equally. The results are medians over the rounds of ratios
within a round. They go to `results/`: one JSON file for each kind of hardware, with pictures and
tables made from it.

| part | measures |
|---|---|
| `steps` | optimizer steps on bare tensors: the limit, the bare step, averages, other libraries |
| `fits` | whole training steps in `fit`, of small and tiny models |
| `swaps` | a swap of the averages into the model, and a swap back |
| `memory` | peak resident memory in training and after a swap |
| `batch_norm` | `update_batch_norm` compared with `predict` on the same batches |
| `workers` | a round of two workers compared with the engine's bare sum |
"""
