"""Programs of their own for each backend: a process has one, and here all are installed.

They run on the installed package, outside the repository.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAMS = pathlib.Path(__file__).parent / "programs"


def _run_program(backend, program, *arguments, timeout=300, **environment):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    ran = subprocess.run(
        [sys.executable, str(PROGRAMS / program), *map(str, arguments)],
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        cwd=PROGRAMS,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ran.returncode == 0, f"{program} on {backend}:\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="session")
def run_program():
    """`run_program(backend, program, *arguments, timeout=300, **environment)`: what it prints.

    Runs a file of `programs/` with Keras on `backend`. Skips where that is not installed; fails
    with all that the program printed unless it ends with 0.
    """
    return _run_program
