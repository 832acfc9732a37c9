"""A short mode of the campaign, on PyTorch. `nox -s "campaign(jax)"` runs the long one on JAX.

On JAX and TensorFlow the short mode would take as long as all other thorough tests.
"""

import json
import pathlib
import subprocess
import sys

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the short mode runs on torch, where it is fastest"
)
CAMPAIGN = pathlib.Path(__file__).parents[1] / "campaign"


def run(program, *arguments):
    """The figures that a program of the campaign prints at its end."""
    command = [sys.executable, CAMPAIGN / program, *map(str, arguments)]
    done = subprocess.run(command, timeout=900, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.thorough
def test_every_law_holds_on_random_walks():
    assert run("walks.py", "--walks", 60, "--steps", 8)["broken"] == 0


@pytest.mark.thorough
def test_hostile_files_are_refused_or_harmless():
    assert run("hostile.py", "--files", 150)["faults"] == 0


@pytest.mark.thorough
def test_whole_files_survive_kills():
    outcomes = run("kills.py", "--kills", 8)["outcomes"]
    for kind, found in outcomes.items():
        if not kind.startswith("Keras"):
            assert not {"cannot be opened", "ends elsewhere", "hangs"} & set(found), kind


@pytest.mark.thorough
def test_memory_and_open_files_do_not_grow_in_long_runs():
    figures = run("long_runs.py", "--steps", 2000)
    assert figures["arrays more"] <= 0
    assert figures["files more"] <= 0


@pytest.mark.thorough
def test_threads_do_not_disturb_each_other():
    assert run("threads.py", "--times", 1)["times"] == 1
