"""Averages those files that make their mean better."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import keras

from keras_avg import _checks
from keras_avg._types import Path
from keras_avg.checkpoints import _files, _weights
from keras_avg.checkpoints._weighted_sum import WeightedSum

AnyPath = TypeVar("AnyPath", bound=Path)


def greedy_soup(
    model: keras.Model,
    filepaths: Iterable[AnyPath],
    score: Callable[[keras.Model], float],
    mode: str = "max",
    verbose: int | str = "auto",
) -> list[AnyPath]:
    """Give a model the mean of the best files. Each file that joins makes the mean no worse.

    First, every file is scored alone. Then the files are tried from the best to the worst. A file
    joins the soup if the mean with it scores at least as well as the mean without it. So the result
    scores at least as well as the best file on the data of `score`. Use data that was not trained
    on. Do not use the data that you report.

    The files may come from several runs with the same start, such as a search for
    hyper-parameters. As in `keras_avg.checkpoints.average`, the copy that was in the model when the
    file was written is used. Each file is read at most twice. One file and one float64 copy of the
    weights are in memory at a time.

    Statistics of batch normalization are averaged like weights. `score` may call
    `keras_avg.update_batch_norm(model, x)` first. Then call it once more for the result.

    Args:
        model: A `keras.Model` that is built.
        filepaths: List of files that `model.load_weights` takes.
        score: Function of the model that returns a number. The model holds the weights that are to
            be scored. If it returns NaN, these weights do not join the soup.
        mode: `"max"` if a higher score is better, `"min"` if a lower one is. Default `"max"`.
        verbose: `"auto"` or 1 for a progress bar, 2 for one line, 0 for silence. Default `"auto"`.

    Returns:
        List of the files in the soup, best first. They are the elements of `filepaths`. The model
        has their mean, the same as after `keras_avg.checkpoints.average(model, files)`.

    Raises:
        ValueError: If there is no file, or a file cannot be read. If `score` is not a function,
            does not return a number, or returns NaN for every file. If `mode` is something else.
            The model's weights do not change then, nor if `score` raises an error.
        RuntimeError: If the model holds the averages of its optimizer now.

    Example:

    ```python
    def accuracy(model):
        return model.evaluate(x_val, y_val, verbose=0, return_dict=True)["accuracy"]

    chosen = keras_avg.checkpoints.greedy_soup(model, files, accuracy)
    ```

    Reference:
        Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482, recipe 1.
    """
    verbose = _checks.verbosity(verbose)
    sign = {"max": 1.0, "min": -1.0}[_checks.one_of("mode", mode, ("max", "min"))]
    if not callable(score):
        raise ValueError(
            f"`score` must be a function of the model that returns a number. Received: {score!r}."
        )
    files = _files.listed(filepaths)
    _weights.refuse_unless_ready(model, "averaging files into it")

    def scored(values: Iterable[Any], file: Any) -> float:
        _weights.put_in(model, values)
        return sign * _number(score(model), file)

    with _weights.all_or_none(model):
        bar = _files.with_progress(files, verbose)
        scores = [scored(_files.read(model, file), file) for file in bar]
        ranked = _best_first(scores, files)
        soup, best = WeightedSum(model.variables), scores[ranked[0]]
        chosen: list[AnyPath] = []
        for file in _files.with_progress([files[i] for i in ranked], verbose):
            values = _files.read(model, file)
            mean = soup.mean(len(chosen) + 1, more=values)
            reached = scored(mean, file) if chosen else best
            if reached >= best:
                soup.add(values)
                chosen.append(file)
                best = reached
        _weights.put_in(model, soup.mean(len(chosen)))  # `score` may have changed the weights.
    return chosen


def _best_first(scores: Sequence[float], files: Sequence[Any]) -> list[int]:
    """The places of the files that have a score, best first. Equal ones keep their order."""
    places = [i for i, score in enumerate(scores) if score == score]
    if not places:
        raise ValueError(
            f"`score` returned NaN for every file. Received: {[os.fspath(f) for f in files[:3]]}"
            f"{', ...' * (len(files) > 3)}."
        )
    return sorted(places, key=lambda i: -scores[i])


def _number(received: Any, file: Any) -> float:
    value = _checks.number(received)
    if value != value and not _is_nan(received):
        raise ValueError(
            f"`score` must return a number. Received: {received!r} for {os.fspath(file)!r}."
        )
    return value


def _is_nan(received: Any) -> bool:
    try:
        return not isinstance(received, str | bool) and float(received) != float(received)
    except (TypeError, ValueError):
        return False
