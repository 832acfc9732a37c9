"""Keras' own optimizer tests pass with every optimizer wrapped. Keras' wheel contains these tests.

Tests of the optimizers' classes themselves are excluded. `EXCLUDED` in `wrapped_optimizers.py` has
their names and the reasons. An excluded test must fail with a wrapper, and pass without it. So no
test stays excluded if the reason is gone or wrong.

Each run is a process of its own, because Keras' test case clears the session, and its distribution
tests make new devices.
"""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_avg

pytestmark = pytest.mark.thorough
HERE = pathlib.Path(__file__).parent
KERAS = pathlib.Path(keras.__file__).parent / "src"
ON_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="MirroredStrategy is TensorFlow's"
)
PARTS = {
    "each": sorted(KERAS.glob("optimizers/*_test.py")),
    "multi": ["--around-multi", KERAS / "optimizers/multi_optimizer_test.py"],
    "mirrored": [KERAS / "backend/tensorflow/optimizer_distribute_test.py"],
}
part = pytest.mark.parametrize(
    "part", ["each", "multi", pytest.param("mirrored", marks=ON_TENSORFLOW)]
)


@pytest.fixture
def run(tmp_path, capsys):
    def run(part, wrapper):
        options = ["-p", "wrapped_optimizers", "-p", "no:cacheprovider", "-c", os.devnull]
        options += ["--rootdir", KERAS, "--disable-warnings", "--tb=short", "--wrapper", wrapper]
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *PARTS[part]],
            cwd=tmp_path,  # The sources of keras_avg must not be in the working folder.
            env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{installed(keras_avg)}"},
            timeout=600,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr[-2_000:]
        [counts] = [line for line in finished.stdout.splitlines() if "excluded by name" in line]
        with capsys.disabled():
            print(f"\nKeras' own tests, {part}, {wrapper}, {keras.backend.backend()}: {counts}")

    return run


def installed(package):
    return pathlib.Path(package.__file__).parents[1]


@pytest.mark.complete
@part
@pytest.mark.parametrize("wrapper", ["SWA", "MovingAverage"])
def test_keras_own_tests_pass_with_optimizers_wrapped(part, wrapper, run):
    run(part, wrapper)


@pytest.mark.complete
@part
def test_excluded_tests_pass_unwrapped(part, run):
    run(part, "none")
