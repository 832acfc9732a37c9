"""The weighted mean of files."""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_avg import _checks
from keras_avg._types import Path
from keras_avg.checkpoints import _files, _weights
from keras_avg.checkpoints._weighted_sum import WeightedSum

ROUNDING = 1e-12  # A sum that should be 0 may differ from 0 by this part of its largest terms.


def average(
    model: keras.Model,
    filepaths: Iterable[Path],
    weights: Iterable[float] | None = None,
    verbose: int | str = "auto",
) -> None:
    """Give a model the mean of the weights in several files.

    The mean of each variable is computed in float64 and rounded once to the variable's dtype:

        variable <- sum(weight * value in the file) / sum(weight)

    The function needs no averaging wrapper. It also does not need the optimizer that wrote the
    files. The model's own optimizer does not change. Any backend may have written a file. For any
    number of files, one file and one float64 copy of the weights are in memory at a time.

    The function averages the copy that was in the model when the file was written. These are the
    averages if a wrapper of keras_avg had swapped them in, else the raw weights.
    `python -m keras_avg info FILE` says which copy it is.

    Values that are not floating-point numbers (seeds, counters) come from the last file. Statistics
    of batch normalization are averaged like weights. These are not the statistics of the mean, so
    call `keras_avg.update_batch_norm(model, x)` afterwards. Average models before you quantize
    them, because the integers of quantized kernels have no mean.

    Args:
        model: A `keras.Model` that is built.
        filepaths: List of files that `model.load_weights` takes: `.keras`, `.weights.h5` or
            `.weights.json`.
        weights: List of finite numbers, one for each file. They are divided by their sum. Default
            None: all files have the same weight. `keras_avg.checkpoints.merge_weights` gives
            weights that imitate an annealing of the learning rate.
        verbose: `"auto"` or 1 for a progress bar, 2 for one line, 0 for silence. Default `"auto"`.

    Returns:
        None. The model is changed in place.

    Raises:
        ValueError: If there is no file. If a file is missing, cut short, or of a model with other
            layers or shapes. If a weight is not finite, the number of weights is not the number of
            files, or the sum of the weights is 0. If the model is not built. The model's weights
            do not change then.
        RuntimeError: If the model holds the averages of its optimizer now.

    Example:

    ```python
    files = [f"run/{epoch:02d}.weights.h5" for epoch in range(11, 21)]
    keras_avg.checkpoints.average(model, files)
    keras_avg.update_batch_norm(model, x)
    ```

    Reference:
        Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482, the uniform soup;
        Li et al., Model Merging in Pre-training, https://arxiv.org/abs/2505.12082.
    """
    verbose = _checks.verbosity(verbose)
    files = _files.listed(filepaths)
    numbers = _numbers(weights, files)
    _weights.refuse_unless_ready(model, "averaging files into it")
    total = WeightedSum(model.variables)
    progress = _files.with_progress(files, verbose)
    for file, number in zip(progress, numbers, strict=True):
        total.add(_files.read(model, file), number)
    with _weights.all_or_none(model):
        _weights.put_in(model, total.mean(math.fsum(numbers)))


def _numbers(weights: Any, files: Sequence[Any]) -> list[float]:
    if weights is None:
        return [1.0] * len(files)
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise ValueError(
            f"`weights` must be a list of numbers, one a file. Received: weights={weights!r}."
        )
    given = list(weights)
    if len(given) != len(files):
        raise ValueError(
            f"`weights` must have one number for each of the {len(files)} files. Received: "
            f"{len(given)} numbers."
        )
    numbers = [_checks.number(weight) for weight in given]
    for file, number, received in zip(files, numbers, given, strict=True):
        if not math.isfinite(number):
            raise ValueError(
                f"The weight of {os.fspath(file)!r} must be a finite number. Received: "
                f"{received!r}."
            )
    _refuse_sum_of_zero(numbers, files)
    return numbers


def _refuse_sum_of_zero(numbers: Sequence[float], files: Sequence[Any]) -> None:
    if abs(math.fsum(numbers)) <= ROUNDING * math.fsum(map(abs, numbers)):
        names = ", ".join(repr(os.fspath(file)) for file in files[:3])
        raise ValueError(
            "The sum of `weights` must not be 0: they are divided by it. Received: "
            f"weights={numbers} of {names}{', ...' * (len(files) > 3)}."
        )
