"""One backend a process, chosen by KERAS_BACKEND; every test starts from the same seed."""

import keras
import pytest

keras.config.disable_traceback_filtering()  # what fails is mostly in the frames that Keras hides


@pytest.fixture(autouse=True)
def fresh_seed():
    keras.utils.set_random_seed(1234)


@pytest.fixture
def dtype_policy():
    """Sets Keras' global dtype policy for one test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)
