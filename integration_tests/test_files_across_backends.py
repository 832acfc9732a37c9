"""A file from one backend has the same meaning on every other: each bit, and later training."""

import concurrent.futures

import numpy as np
import pytest

TRAINING_BACKENDS = ("tensorflow", "jax", "torch")
LOADING_BACKENDS = (*TRAINING_BACKENDS, "numpy", "openvino")
PROGRAM = "files_across_backends.py"
# For two or eight steps of different backends, on float32 numbers of order 1. Adam divides by a
# root of squares. If gradients are small, this multiplies rounding errors.
TOLERANCE = 1e-4

# Kinds of averages, and how many snapshots each takes in 12 steps.
SNAPSHOTS = {
    "ModelAverage": 4,
    "Lookahead": 4,
    "LAWA": 4,
    "SWAG": 4,
    "BEMA": 4,
    "ScheduleFree": 12,
    "PrimalAverage": 12,
    "PowerFunction": 12,
}

backends = pytest.mark.parametrize("backend", LOADING_BACKENDS)
sources = pytest.mark.parametrize("source", TRAINING_BACKENDS)
names = pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
held_values = pytest.mark.parametrize("held", ["raw", "averages"])
policies = pytest.mark.parametrize("policy", ["float32", "bfloat16"])


@pytest.fixture(scope="session")
def two_at_a_time():
    """A pool of two threads. Each of them waits for a program of its own."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def saved(run_program, two_at_a_time, tmp_path_factory):
    """The folder of all saved files. It has a folder for each backend, with the backend's name."""
    folder = tmp_path_factory.mktemp("saved")

    def save(backend):
        (folder / backend).mkdir()
        run_program(backend, PROGRAM, "save", folder / backend)

    list(two_at_a_time.map(save, TRAINING_BACKENDS))
    return folder


@pytest.fixture(scope="session")
def loaded(run_program, two_at_a_time, saved, tmp_path_factory):
    """The function `loaded(backend)`. It returns a folder with what `backend` has read."""
    sources = [saved / source for source in TRAINING_BACKENDS]

    def load(backend, folder):
        run_program(backend, PROGRAM, "load", folder, *sources)
        return folder

    loads = {
        backend: two_at_a_time.submit(load, backend, tmp_path_factory.mktemp(backend))
        for backend in LOADING_BACKENDS
    }
    return lambda backend: loads[backend].result()


@backends
@sources
@names
@held_values
@policies
def test_a_file_from_another_backend_restores_every_bit(
    saved, loaded, backend, source, name, held, policy
):
    expected = np.load(saved / source / f"{policy}-{held}.npz")
    found = np.load(loaded(backend) / f"{source}-{policy}-{held}-{name}.npz")

    assert bool(found["averages_in_model"]) == (held == "averages")
    for key in expected.files:
        if key.startswith(("model", "optimizer", "raw")):
            np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    counted = [found[f"optimizer_{i}"] for i in (0, 1)]  # updates and snapshots of 12 steps
    np.testing.assert_array_equal(counted, [12, 6])


@backends
@sources
@held_values
@pytest.mark.parametrize(("name", "snapshots"), SNAPSHOTS.items())
def test_a_file_from_another_backend_restores_each_kind_of_average(
    saved, loaded, backend, source, held, name, snapshots
):
    expected = np.load(saved / source / f"{held}-{name}.npz")
    found = np.load(loaded(backend) / f"{source}-{held}-{name}.npz")

    for key in expected.files:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    counted = [found[f"optimizer_{i}"] for i in (0, 1)]  # updates and snapshots of 12 steps
    np.testing.assert_array_equal(counted, [12, snapshots])
    raw = np.load(saved / source / f"raw-{name}.npz")
    for key in raw.files:
        if key.startswith("model"):
            np.testing.assert_array_equal(found[key.replace("model", "raw")], raw[key])


@backends
@sources
@names
@held_values
def test_training_goes_on_from_a_file_of_another_backend(
    saved, loaded, backend, source, name, held
):
    expected = np.load(saved / source / f"float32-{held}.npz")
    found = np.load(loaded(backend) / f"{source}-float32-{held}-{name}.npz")

    np.testing.assert_allclose(found["predicted"], found["bare"], rtol=TOLERANCE, atol=TOLERANCE)
    compared = ["after_steps"]
    if backend != "openvino":  # It predicts in bfloat16 if the processor supports that.
        compared.append("predicted")
    if backend in TRAINING_BACKENDS:
        compared.append("after_fit")
    for key in expected.files:
        if key.startswith(tuple(compared)):
            np.testing.assert_allclose(
                found[key], expected[key], rtol=TOLERANCE, atol=TOLERANCE, err_msg=key
            )
    assert {key.rstrip("_0123456789") for key in found.files} >= set(compared)
