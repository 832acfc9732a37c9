"""One process tests one backend, which KERAS_BACKEND names. Each test starts with the same seed."""

import keras
import pytest

keras.config.disable_traceback_filtering()  # Keras hides the frames in which most tests fail.


@pytest.fixture(autouse=True)
def fresh_seed():
    keras.utils.set_random_seed(1234)


@pytest.fixture
def dtype_policy():
    """Sets Keras' global dtype policy for one test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)
