"""Computes the mean of the snapshots between two files of one run."""

import os
from typing import Any

import keras
import numpy as np

from keras_avg._optimizers.swa import SWA
from keras_avg._types import Path
from keras_avg._wrapping import nesting
from keras_avg.checkpoints import _files, _weights
from keras_avg.checkpoints._averages_in_file import AveragesInFile, averages_in
from keras_avg.checkpoints._contents import opened, read_array
from keras_avg.checkpoints._places import places_in


def window(model: keras.Model, earlier: Path, later: Path) -> None:
    """Give a model the mean of the snapshots that `SWA` took between two files of one run.

    The earlier file has `n1` snapshots with the mean `a1`, the later one `n2` snapshots with the
    mean `a2`. The function computes in float64

        variable <- (n2 * a2 - n1 * a1) / (n2 - n1)

    This is the mean of snapshots `n1 + 1` to `n2`, up to rounding. So a run that averages from its
    beginning can be examined afterwards: two of its files give the mean of the part between them.
    The averages are stored in float32, and the difference loses some of their digits. It loses more
    digits if the window is short.

    The means are read from the optimizer's part of the files. So it does not matter which copy was
    in the model when they were written. The model's own optimizer may differ from that of the
    files, and does not change. Variables without an average (statistics of batch normalization,
    excluded variables) come from the later file. Call `keras_avg.update_batch_norm(model, x)`
    afterwards to compute statistics that fit.

    Args:
        model: A `keras.Model` that is built.
        earlier: Path of a file that was saved while training with `keras_avg.SWA`: `.keras`,
            `.weights.h5` or `.weights.json`. It may have been written before the first snapshot.
        later: Path of a file that the same run saved later.

    Returns:
        None. The model is changed in place.

    Raises:
        ValueError: If a file is missing, cut short, or of another model. If it has no averages of
            `SWA`, or does not say which averages are of `SWA`. If the later file does not have more
            snapshots than the earlier one. The model's weights do not change then.
        RuntimeError: If the model holds the averages of its optimizer now.

    Example:

    ```python
    keras_avg.checkpoints.window(model, "run/20.keras", "run/30.keras")
    ```

    Reference:
        The running mean of icefall's checkpoints, https://github.com/k2-fsa/icefall,
        `average_checkpoints_with_averaged_model`.
    """
    _weights.refuse_unless_ready(model, "averaging files into it")
    with opened(earlier) as first, opened(later) as second:
        before, after = _swas(model, first, earlier), _swas(model, second, later)
        if before.keys() != after.keys():
            raise ValueError(
                f"{os.fspath(earlier)!r} and {os.fspath(later)!r} are not of one run. Received: "
                f"averages of SWA in {list(before)} and in {list(after)}."
            )
        values = _files.read(model, later)
        for path, theirs in after.items():
            for place, mean in _means(model, before[path], theirs, earlier, later).items():
                values[place] = mean
    with _weights.all_or_none(model):
        _weights.put_in(model, values)


def _means(
    model: Any, before: AveragesInFile, after: AveragesInFile, earlier: Any, later: Any
) -> dict[int, Any]:
    """A dict of the means of the window, by the places of their variables in the model."""
    n1, n2 = before.counter("snapshots"), after.counter("snapshots")
    if n2 <= n1:
        raise ValueError(
            f"The later file must have more snapshots than the earlier one. Received: {n1} in "
            f"{os.fspath(earlier)!r} and {n2} in {os.fspath(later)!r}.{after.why_none()}"
        )
    a1, a2 = _averages(model, before, earlier), _averages(model, after, later)
    if a1.keys() != a2.keys() and n1:
        raise ValueError(
            f"{os.fspath(earlier)!r} and {os.fspath(later)!r} have averages of other variables. "
            f"Received: {len(a1)} and {len(a2)} averages. They are not of one run."
        )
    means = {}
    for place, array in a2.items():
        mean = n2 * _float64(array)
        if n1:
            mean -= n1 * _float64(a1[place])
        means[place] = (mean / (n2 - n1)).astype(model.variables[place].dtype)
    return means


def _float64(array: Any) -> Any:
    return read_array(array).astype(np.float64)


def _swas(model: Any, contents: Any, file: Any) -> dict[str, AveragesInFile]:
    """The averages of `SWA` in a file, by their paths. If they are nested, only the outermost."""
    found = averages_in(contents)
    swas = [each for each in found if _is_swa(each, model)]
    if not swas and all(_kind(each, model) is None for each in found):  # No class is known.
        plain = [each for each in found if each.stores().keys() == {"average"}]
        swas = plain if len(plain) == 1 else []
    outermost = {
        each.path: each
        for each in swas
        if not any(each.path.startswith(f"{other.path}/") for other in swas)
    }
    if not outermost:
        names = [getattr(_kind(each, model), "__name__", "unknown") for each in found]
        raise ValueError(
            f"{os.fspath(file)!r} has no averages of SWA. Received: averages of "
            f"{names or 'nobody'}. Save files while training with keras_avg.SWA: `.keras` files "
            "say by themselves of which wrapper their averages are; for others compile the model "
            "as it was trained."
        )
    return outermost


def _is_swa(averages: AveragesInFile, model: Any) -> bool:
    kind = _kind(averages, model)
    return kind is not None and issubclass(kind, SWA)


def _kind(averages: AveragesInFile, model: Any) -> Any:
    """The class of a wrapper in a file. If the file does not say it, the model's optimizer does."""
    if averages.config is not None:
        return averages.kind() or object  # An unknown class is not a class of keras_avg.
    first, *rest = averages.path.split("/")
    optimizer = getattr(model, first, None)
    for attribute in rest:
        optimizer = getattr(optimizer, attribute, None)
    return type(optimizer) if optimizer in _wrappers(model) else None


def _wrappers(model: Any) -> list[Any]:
    return [each for optimizer in nesting.optimizers_of(model) for each in nesting.walk(optimizer)]


def _averages(model: Any, averages: AveragesInFile, file: Any) -> dict[int, Any]:
    """The averages in a file, by the places of their variables in the model."""
    stored = averages.stores().get("average", {})
    trained = [i for i, variable in enumerate(model.variables) if variable.trainable]
    places = places_in(model, stored, otherwise=trained)
    if places is None:
        raise ValueError(
            f"The averages in {os.fspath(file)!r} are not of the model {model.name!r}. Received: "
            f"{len(stored)} averages, whose variables' paths or shapes the model does not have."
            f"{averages.why_none()}"
        )
    return {place: stored[number] for number, place in places.items()}
