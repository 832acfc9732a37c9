"""Communicators on JAX and torch use the same memory again."""

import numpy as np
import pytest

from keras_avg._backend.communicators import ALIGNMENT, host_memory


def address(array):
    return array.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_host_memory_is_aligned_and_has_the_requested_size(dtype):
    memory = host_memory(1001, dtype)
    assert (memory.shape, memory.dtype) == ((1001,), dtype)
    assert address(memory) % ALIGNMENT == 0
    memory[:] = np.arange(1001)
    np.testing.assert_array_equal(memory, np.arange(1001))


def test_host_memory_is_used_again_once_nothing_uses_it():
    memory = host_memory(10_000, "float32")
    first = address(memory)
    nbytes = memory.nbytes + ALIGNMENT
    del memory
    others = [np.empty(nbytes, "uint8") for _ in range(10)]  # They would get memory that is free.
    assert address(host_memory(10_000, "float32")) == first
    del others


def test_a_view_still_in_use_keeps_its_values():
    memory = host_memory(100, "float32")
    memory[:] = 1
    part = memory[10:20]
    del memory
    host_memory(100, "float32")[:] = 2
    np.testing.assert_array_equal(part, 1)


def test_another_size_gets_other_memory():
    memory = host_memory(100, "float32")
    assert host_memory(200, "float32").shape == (200,)
    assert memory.shape == (100,)
