"""Reads the recorded trajectories of other libraries in `tests/golden`. The README there says more.

A recording is a list over steps (step 0 is the first). Each element is a list over variables, of
float32 arrays.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class SparseRows:
    """A gradient of some rows of a variable. The same row may occur several times."""

    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]

    def summed(self) -> "SparseRows":
        """The same gradient, in which each row occurs only once."""
        indices, places = np.unique(self.indices, return_inverse=True)
        values = np.zeros((len(indices), *self.shape[1:]), np.float32)
        np.add.at(values, places, self.values)
        return SparseRows(indices, values, self.shape)

    def dense(self) -> np.ndarray:
        """The same gradient with all rows."""
        values = np.zeros(self.shape, np.float32)
        np.add.at(values, self.indices, self.values)
        return values


@dataclasses.dataclass(frozen=True, repr=False)
class Training:
    """A training run with an averaging optimizer of TensorFlow Addons."""

    id: str
    wrapper: str
    arguments: dict[str, Any]
    inner: dict[str, Any]
    initial_values: Arrays
    gradients: list[list[np.ndarray | SparseRows]]
    values: list[Arrays]
    averages: list[Arrays]
    #: The variables after `assign_average_vars` at the end, or None if it was not called.
    assigned: Arrays | None


@dataclasses.dataclass(frozen=True, repr=False)
class AveragedModel:
    """A model whose weights were set by hand, and were averaged by torch's `AveragedModel`.

    `weights` begins with the first weights of the model. The first average comes one step later.
    """

    id: str
    function: str
    update_after: int
    update_every: int
    weights: list[Arrays]
    averages: list[Arrays]
    num_averaged: list[int]


@dataclasses.dataclass(frozen=True, repr=False)
class CyclicalRates:
    """The rates of a cyclical schedule of TensorFlow Addons for the steps 0, 1, 2, ...

    If it has a scale function, the arguments contain its name.
    """

    id: str
    schedule: str
    arguments: dict[str, Any]
    rates: np.ndarray
    rates_of_python_steps: np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class AnnealedRates:
    """The learning rate of one parameter group under torch's `SWALR`.

    `decayed` has the rate after each step of an `ExponentialLR(gamma=0.9)`; it may be empty.
    `annealed` has the rate after each step of the `SWALR` that followed.
    """

    id: str
    anneal_strategy: str
    anneal_steps: int
    learning_rate: float
    swa_learning_rate: float
    decayed: list[float]
    annealed: list[float]


def trainings(family: str) -> list[Training]:
    """The cases of one of the Addons files."""
    document = _read(family)
    return [_training(document, entry) for entry in document["cases"]]


def averaged_models() -> list[AveragedModel]:
    """The cases of `AveragedModel` in `torch_swa`."""
    document = _read("torch_swa")
    return [_averaged_model(document, entry) for entry in document["averaged_model"]]


def cyclical_rates() -> list[CyclicalRates]:
    """The cases of `clr`."""
    return [_cyclical_rates(entry) for entry in _read("clr")["cases"]]


def annealed_rates() -> list[AnnealedRates]:
    """The cases of `SWALR` in `torch_swa`, one for each parameter group."""
    return [
        _annealed_rates(entry, group)
        for entry in _read("torch_swa")["swalr"]
        for group in range(len(entry["case"]["base_lr"]))
    ]


@functools.cache
def _read(family: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{family}.json").read_text())


def _training(document: dict[str, Any], entry: dict[str, Any]) -> Training:
    case, pool = entry["case"], document["pool"]
    inputs = document["inputs"][case["inputs"]]
    shapes = inputs["shapes"]
    gradients = _dense_gradients(inputs) | _sparse_gradients(inputs, case.get("densify", False))
    assigned = entry["final"].get("assign_average_vars")
    return Training(
        id=case["id"],
        wrapper=case["wrapper"],
        arguments=case["args"],
        inner=case["inner"],
        initial_values=_arrays(inputs["init"], shapes),
        # Inputs may be longer than the training.
        gradients=[[gradients[name][t] for name in shapes] for t in range(case["steps"])],
        values=_trajectory(pool[entry["raw"]], shapes),
        averages=_trajectory(pool[entry["avg"]], shapes),
        assigned=_arrays(assigned["raw"], shapes) if assigned else None,
    )


def _averaged_model(document: dict[str, Any], entry: dict[str, Any]) -> AveragedModel:
    case = entry["case"]
    inputs = document["inputs"][case["inputs"]]
    return AveragedModel(
        id=case["id"],
        function=case["fn"],
        update_after=case["update_after"],
        update_every=case["update_every"],
        weights=_trajectory(inputs["weights"], inputs["shapes"]),
        averages=_trajectory(document["pool"][entry["avg"]], inputs["shapes"]),
        num_averaged=entry["n_averaged"],
    )


def _cyclical_rates(entry: dict[str, Any]) -> CyclicalRates:
    case, rates = entry["case"], entry["values_float32_step"]
    assert entry["steps"] == list(range(len(rates)))
    return CyclicalRates(
        id=case["id"],
        schedule=case["class"],
        arguments=case["args"],
        rates=np.array(rates, np.float32),
        # The rates for Python integers were recorded only where they differ.
        rates_of_python_steps=np.array(entry.get("values_python_int_step", rates), np.float32),
    )


def _annealed_rates(entry: dict[str, Any], group: int) -> AnnealedRates:
    case = entry["case"]
    swa_rates = case["swa_lr"]
    return AnnealedRates(
        id=f"{case['id']}/{group}",
        anneal_strategy=case["anneal_strategy"],
        anneal_steps=case["anneal_epochs"],
        learning_rate=case["base_lr"][group],
        swa_learning_rate=swa_rates[group] if isinstance(swa_rates, list) else swa_rates,
        decayed=[rates[group] for rates in entry["lr_after_each_exponential_step"]],
        annealed=[rates[group] for rates in entry["lr_after_each_swalr_step"]],
    )


def _dense_gradients(inputs: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    return {
        name: [_array(step, inputs["shapes"][name]) for step in steps]
        for name, steps in inputs["grads"].items()
    }


def _sparse_gradients(inputs: dict[str, Any], densify: bool) -> dict[str, list[Any]]:
    gradients = {}
    for name, recorded in inputs.get("sparse", {}).items():
        shape = tuple(inputs["shapes"][name])
        rows = [
            SparseRows(np.array(indices), np.array(values, np.float32), shape)
            for indices, values in zip(recorded["indices"], recorded["values"], strict=True)
        ]
        gradients[name] = [r.dense() for r in rows] if densify else rows
    return gradients


def _trajectory(recorded: dict[str, list], shapes: dict[str, list[int]]) -> list[Arrays]:
    steps = zip(*(recorded[name] for name in shapes), strict=True)
    return [_arrays(dict(zip(shapes, step, strict=True)), shapes) for step in steps]


def _arrays(recorded: dict[str, list], shapes: dict[str, list[int]]) -> Arrays:
    return [_array(recorded[name], shape) for name, shape in shapes.items()]


def _array(numbers: list[float], shape: list[int]) -> np.ndarray:
    return np.array(numbers, np.float32).reshape(shape)
