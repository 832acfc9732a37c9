"""Tests that need processes of their own: a process is killed, or has several devices."""

import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

PROGRAMS = pathlib.Path(__file__).parent / "programs"


def run(program, *arguments):
    command = [sys.executable, PROGRAMS / program, *map(str, arguments)]
    return subprocess.run(command, timeout=300, capture_output=True, text=True, check=False)


WITH_A_RING = [pytest.param(name, marks=pytest.mark.thorough) for name in ("LAWA", "SWAG")]


@pytest.mark.parametrize("wrapper", ["SWA", *WITH_A_RING])
def test_training_killed_in_the_middle_of_an_epoch_ends_where_it_would_have(wrapper, tmp_path):
    program = ("train_and_be_killed.py", wrapper)
    undisturbed = run(*program, tmp_path / "one", tmp_path / "one.npz")
    assert undisturbed.returncode == 0, undisturbed.stderr

    killed = run(*program, tmp_path / "two", tmp_path / "two.npz", 2, 3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    restarted = run(*program, tmp_path / "two", tmp_path / "two.npz")
    assert restarted.returncode == 0, restarted.stderr

    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert len(one.files) == len(two.files) > 0
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.sample(1)
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution is for JAX")
@pytest.mark.parametrize("kind", ["data", "model"])
def test_sharded_averages_stay_on_their_devices_when_swapped_and_saved(kind, tmp_path):
    finished = run("swap_sharded.py", tmp_path, kind)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow_on("tensorflow")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strategies are TensorFlow's")
def test_gradients_of_two_replicas_are_summed_once_by_keras_or_by_the_caller():
    finished = run("apply_aggregated.py")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["4.0", "8.0"]
