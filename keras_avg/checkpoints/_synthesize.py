"""Computes an average whose length is chosen after training."""

import os
import pathlib
import warnings
from typing import Any

import h5py
import keras
import numpy as np

from keras_avg import _checks
from keras_avg._types import Path
from keras_avg.checkpoints import _files, _runs, _snapshot_files, _weights
from keras_avg.checkpoints._places import places_in
from keras_avg.checkpoints._profiles import Combination, Profile, combine
from keras_avg.checkpoints._snapshot_files import REST, Stored
from keras_avg.decays import PowerFunction

# If the relative error of the profile is larger, a warning says so. Beyond the lengths of the
# stored averages the error grows fast, so the warning comes earlier there.
ENOUGH, ENOUGH_BEYOND = 0.05, 0.01


def synthesize(
    model: keras.Model, directory: Path, sigma_rel: float, verbose: int | str = "auto"
) -> dict[str, float]:
    """Give a model, after training, the average that `PowerFunction(sigma_rel)` would have kept.

    `keras_avg.callbacks.SaveAverages` wrote snapshots of one or more power-function averages during
    training. This function computes a weighted sum of these snapshots. It chooses the weights by
    least squares in float64. The profile of the sum is then the nearest one to the wanted profile
    at the time of the last snapshot:

        minimize || profile(sigma_rel) - sum(weight_i * profile_i) ||,   sum(weight_i) = 1

    So one run is enough to find the best length of the average. The optimizer does not change.
    Variables without an average, such as statistics of batch normalization, come from the last
    file. Call `keras_avg.update_batch_norm(model, x)` afterwards to compute statistics that fit.
    One file and one float64 copy of the weights are in memory at a time.

    Args:
        model: A `keras.Model` that is built.
        directory: Path of the directory of `SaveAverages`. If several runs wrote into it one after
            the other, the newest run is used, together with the snapshots from which it went on.
        sigma_rel: Number in (0, 12 ** -0.5], as for `keras_avg.decays.PowerFunction`. The result is
            good between the lengths in the snapshots, and somewhat beyond them.
        verbose: `"auto"` or 1 for a progress bar and a table of the result, 2 for a line and the
            table, 0 for silence. Default `"auto"`.

    Returns:
        Dict, the row of the table. `"sigma_rel"` is the argument, and `"reached_sigma_rel"` is that
        of the weighted sum. `"relative_error"` is the distance between the two profiles, divided by
        the length of the wanted one. `"snapshots"` is the number of averages in the sum. The model
        is changed in place.

    Warns:
        UserWarning: If the relative error is above 5 %, or above 1 % for a length beyond those of
            the snapshots. Then there are too few snapshots, or the wanted length is too far from
            theirs. Also if snapshots of an earlier run are left out.

    Raises:
        ValueError: If `sigma_rel` is out of range. If the directory or a snapshot in it is missing.
            If a file is damaged, of another model, or of averages that began at other steps. If
            two runs wrote into the directory at the same time, or files were copied into it. The
            model's weights do not change then.
        RuntimeError: If the model holds the averages of its optimizer now.

    Example:

    ```python
    for sigma_rel in (0.05, 0.075, 0.10, 0.15):
        keras_avg.checkpoints.synthesize(model, "run/averages", sigma_rel)
        print(sigma_rel, model.evaluate(x_val, y_val, verbose=0))
    ```

    Reference:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
        https://arxiv.org/abs/2312.02696, section 3.2, algorithm 3 and equation 151.
    """
    verbose = _checks.verbosity(verbose)
    gamma = PowerFunction(sigma_rel).gamma
    _weights.refuse_unless_ready(model, "averaging files into it")
    stored = _stored(directory)
    last = max(each.profile.time for each in stored)
    found = combine([each.profile for each in stored], Profile(gamma, last))
    values = _weighted(model, stored, found, verbose)
    with _weights.all_or_none(model):
        _weights.put_in(model, values)
    row = {
        "sigma_rel": float(sigma_rel),
        "reached_sigma_rel": found.sigma_rel,
        "relative_error": found.relative_error,
        "snapshots": len(stored),
    }
    if verbose:
        print("  ".join(f"{name:>17}" for name in row))
        print("  ".join(f"{value:>17.4g}" for value in row.values()))
    _warn_of_error(row, stored)
    return row


def _stored(directory: Any) -> list[Stored]:
    folder = pathlib.Path(os.fspath(directory))
    found = _snapshot_files.all_described(folder)
    if not found:
        raise ValueError(
            f"There are no averages in the directory {str(folder)!r}. Train with "
            "keras_avg.callbacks.SaveAverages(directory), around a MovingAverage whose decay is "
            "a keras_avg.decays.PowerFunction."
        )
    run = _runs.newest(found, folder)
    if others := [each for each in found if not run.has(each)]:
        warnings.warn(
            f"The directory {str(folder)!r} has snapshots that are not part of the newest run, or "
            "that it has not reached again after a restart. They are left out: "
            f"{_runs.names(others)}.",
            stacklevel=3,
        )
    stored = [average for each in found if run.has(each) for average in each.averages]
    if len(starts := {each.start for each in stored}) > 1:
        raise ValueError(
            f"The averages in {str(folder)!r} began at different steps. Received: start_step="
            f"{sorted(starts)}. Their profiles do not add up: use one start_step for all averages."
        )
    return stored


def _weighted(model: Any, stored: list[Stored], found: Combination, verbose: int) -> list[Any]:
    """The weighted sum of all averages, for each of `model.variables`."""
    weights = {(s.file, s.group): w for s, w in zip(stored, found.weights, strict=True)}
    files = list(dict.fromkeys(each.file for each in stored))
    sums: dict[int, Any] = {}
    rest: dict[int, Any] = {}
    expected = None
    for file in _files.with_progress(files, verbose):
        try:
            with h5py.File(file, "r") as opened:
                for group in (name for name in opened if name != REST):
                    places = _places(model, opened[group], file)
                    expected = expected or set(places.values())
                    if set(places.values()) != expected:
                        raise ValueError(f"{str(file)!r} has averages of other variables.")
                    for number, place in places.items():
                        value = opened[group][str(number)][...].astype(np.float64)
                        value *= weights[file, group]
                        sums[place] = sums[place] + value if place in sums else value
                places = _places(model, opened[REST], file)
                rest = {i: opened[REST][str(n)][...] for n, i in places.items()}
        except (OSError, KeyError, RuntimeError) as error:
            raise _files.unreadable(str(file), error) from error
    dtypes = [variable.dtype for variable in model.variables]
    means = {place: value.astype(dtypes[place]) for place, value in sums.items()}
    return [means.get(i, rest.get(i)) for i in range(len(dtypes))]


def _places(model: Any, group: Any, file: Any) -> dict[int, int]:
    arrays = {int(number): group[number] for number in group}
    places = places_in(model, arrays, otherwise=_own_places(model, arrays))
    if places is None:
        raise ValueError(
            f"{str(file)!r} does not fit the model {model.name!r}. Received: {len(arrays)} arrays "
            "whose variables' paths or shapes the model does not have."
        )
    return places


def _own_places(model: Any, arrays: dict[int, Any]) -> list[int]:
    """The places that the variables had in the model that was saved."""
    return [number for number in sorted(arrays) if number < len(model.variables)]


def _warn_of_error(row: dict[str, float], stored: list[Stored]) -> None:
    lengths = [PowerFunction(gamma=each.profile.gamma).sigma_rel for each in stored]
    is_between = min(lengths) * (1 - ENOUGH) <= row["sigma_rel"] <= max(lengths) * (1 + ENOUGH)
    if row["relative_error"] > (ENOUGH if is_between else ENOUGH_BEYOND):
        warnings.warn(
            f"The average of sigma_rel={row['sigma_rel']:.4g} is made up with a relative error of "
            f"{row['relative_error']:.2g}, from {row['snapshots']} averages of lengths "
            f"{min(lengths):.4g} to {max(lengths):.4g}. Save snapshots more often, or keep "
            "averages whose lengths are on both sides of it.",
            stacklevel=3,
        )
