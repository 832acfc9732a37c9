"""One process tests one backend, which KERAS_BACKEND names. Each test starts with the same seed."""

import keras
import pytest
import small_training

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


@pytest.hookimpl(tryfirst=True)  # The fixtures of the test may train a model.
def pytest_runtest_setup(item):
    """Let thorough tests on TensorFlow build the optimizers of small models before they train.

    If Keras makes an optimizer's variables in the first step, TensorFlow traces this step twice.
    That is what users see, so the quick tests train like this. The thorough tests repeat them in
    other combinations, and save the time.
    """
    is_thorough = item.get_closest_marker("thorough") is not None
    on_tensorflow = keras.backend.backend() == "tensorflow"
    small_training.builds_first = on_tensorflow and is_thorough
