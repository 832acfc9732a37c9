"""Tests that need a process of their own.

They use several devices, or settings that Keras reads when it is imported.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import pytest
from test_processes import run

HERE = pathlib.Path(__file__).parent

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="a setting of JAX")


def run_tests(tests, **settings):
    """Run tests in a process with `settings` in its environment.

    Each setting is the name of a variable, which becomes 1, and an expression that is true if Keras
    has used the variable.
    """
    checks = "; ".join(["import sys, keras, pytest", *(f"assert {c}" for c in settings.values())])
    command = [sys.executable, "-c", f"{checks}; sys.exit(pytest.main(sys.argv[1:]))"]
    arguments = ["-q", "-p", "no:cacheprovider", *(f"{HERE / test}" for test in tests)]
    finished = subprocess.run(
        [*command, *arguments],
        env=os.environ | dict.fromkeys(settings, "1"),
        cwd=HERE.parent,
        timeout=400,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(tests)} passed" in finished.stdout


@pytest.mark.sample(1)
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's")
@pytest.mark.parametrize("part", ["trained", "resumed"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_every_replica_of_a_mirrored_strategy_has_the_same_averages_as_one_device(
    policy, part, tmp_path
):
    finished = run("train_on_replicas.py", tmp_path, policy, part)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_workers_of_two_replicas_average_like_workers_of_one_device():
    finished = run("average_on_replicas.py")
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow_on("tensorflow")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_a_shadow_copy_can_be_made_in_the_scope_of_a_strategy():
    finished = run("shadow_copy_on_replicas.py")
    assert finished.returncode == 0, finished.stderr


@pytest.mark.sample(1)
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution is for JAX")
@pytest.mark.parametrize("kind", ["data", "model"])
def test_sharded_training_equals_that_of_the_bare_optimizer_and_moves_no_data(kind):
    finished = run("train_sharded.py", kind)
    assert finished.returncode == 0, finished.stderr


@on_jax
@pytest.mark.skipif(importlib.util.find_spec("flax") is None, reason="NNX is a part of flax")
def test_training_and_swaps_work_with_nnx_variables():
    contract, swapping = "test_wrapper_contract.py::", "test_swapping.py::"
    run_tests(
        [
            f"{contract}test_training_equals_that_of_the_inner_optimizer_bit_for_bit"
            "[SWA of MovingAverage-adam]",
            f"{contract}test_averages_equal_the_oracle[SWA of MovingAverage-accumulation]",
            f"{contract}test_a_loaded_model_trains_on_as_if_it_had_never_stopped"
            "[SWA of MovingAverage-adam]",
            f"{swapping}test_nan_and_infinity_survive_a_swap",
        ],
        KERAS_NNX_ENABLED="keras.config.is_nnx_enabled()",
    )


@on_jax
def test_float64_averages_work_on_jax_with_x64():
    run_tests(
        ["test_mixed_precision.py::test_float64_weights_have_float64_averages"],
        JAX_ENABLE_X64="keras.ops.ones((), 'float64').dtype == 'float64'",
    )
