"""What averaging costs, beside what else averages and beside the limit that memory sets.

    python -m benchmarks                       # everything, on the backends that are installed
    python -m benchmarks --quick               # a look, in a few minutes
    python -m benchmarks --backend torch --parts steps swaps --sizes 1000000x10 50000000x208

Each part runs in a process of its own on each backend. Within a part all that is compared takes
turns, round after round, so that a busy machine slows all of it down alike; what is reported are
medians over the rounds of ratios within a round. Results go to `results/`, one JSON file for each
kind of hardware, with pictures and tables made from it.

| part | measures |
|---|---|
| `steps` | optimizer steps on bare tensors: the limit, the bare step, each average, each rival |
| `fits` | whole training steps in `fit`, of small models and of tiny ones |
| `swaps` | the averages into the model and the raw weights back |
| `memory` | peak resident memory in training and while swapped |
| `batch_norm` | `update_batch_norm` beside `predict` on the same batches |
| `workers` | a round of two workers beside the engine's bare sum |
"""
