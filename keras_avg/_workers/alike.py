"""Finds out whether numbers are the same on all workers. It needs only sums over the workers."""

import numpy as np

DIGITS = 12  # hexadecimal digits for each number


def digits(numbers: list[int]) -> np.ndarray:
    """The hexadecimal digits of integers, as float32. Sums of digits are exact in float32."""
    return np.array([n >> 4 * place & 15 for n in numbers for place in range(DIGITS)], "float32")


def with_squares(numbers: list[int]) -> np.ndarray:
    """The digits of the numbers and their squares. `are_equal` takes the sum of these arrays."""
    found = digits(numbers)
    return np.stack([found, found**2])


def are_equal(sums: np.ndarray, workers: float) -> bool:
    """Whether the numbers are equal on all workers, from the sum of their `with_squares`.

    N numbers d are equal if their variance is 0:  N * sum(d^2) == sum(d)^2.  For hexadecimal digits
    both sides are exact in float32, up to a number of workers that no job has.
    """
    first, second = np.asarray(sums, "float64")
    return bool(np.all(workers * second == first**2))


def numbers_in(sum_of_digits: np.ndarray) -> np.ndarray:
    """Numbers from their digits. From sums of digits, it gives the sums of the numbers."""
    rows = np.asarray(sum_of_digits, "float64").reshape(*np.shape(sum_of_digits)[:-1], -1, DIGITS)
    return rows @ 16.0 ** np.arange(DIGITS)
