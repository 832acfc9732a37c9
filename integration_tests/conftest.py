"""Runs programs on each backend. All backends are installed here, but a process can use only one.

The programs use the installed package, and run outside the repository.
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
    """The function `run_program(backend, program, *arguments, timeout=300, **environment)`.

    It runs a file of `programs/` with Keras on `backend`, and returns what the program printed. The
    test is skipped if the backend is not installed. If the program does not end with 0, the test
    fails with the program's output.
    """
    return _run_program
