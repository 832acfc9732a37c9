"""Whether numbers are the same on all workers, by nothing but sums."""

import numpy as np

DIGITS = 12  # hexadecimal ones, of each number


def digits(numbers: list[int]) -> np.ndarray:
    """The hexadecimal digits of whole numbers, as float32, which holds sums of them exactly."""
    return np.array([n >> 4 * place & 15 for n in numbers for place in range(DIGITS)], "float32")


def with_squares(numbers: list[int]) -> np.ndarray:
    """What a worker adds to the sum by which `are_equal` tells."""
    found = digits(numbers)
    return np.stack([found, found**2])


def are_equal(sums: np.ndarray, workers: float) -> bool:
    """Whether all workers have brought the same `with_squares`, from the sum of them.

    Equal numbers are those without variance:  N * sum(d^2) == sum(d)^2.  Of hexadecimal digits both
    are exact in float32, for more workers than there will be.
    """
    first, second = np.asarray(sums, "float64")
    return bool(np.all(workers * second == first**2))


def numbers_in(sum_of_digits: np.ndarray) -> np.ndarray:
    """Numbers from their digits, or from sums of digits: the sums of the numbers."""
    rows = np.asarray(sum_of_digits, "float64").reshape(*np.shape(sum_of_digits)[:-1], -1, DIGITS)
    return rows @ 16.0 ** np.arange(DIGITS)
