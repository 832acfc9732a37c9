"""Communicators between two or three processes on the loopback interface. Some processes fail."""

import itertools
import signal
import threading
import time

import keras
import numpy as np
import pytest
import workers

BACKEND = keras.backend.backend()
TIMEOUT = 6  # of the communicators that must fail, in seconds
# The time that a failure may take beyond the timeout, in seconds. The machine may be busy, the last
# heartbeat may be recent, and the workers save their weights.
SLACK = 10


def check(results):
    size = len(results)
    ranks = np.arange(size)
    assert [r["rank"] for r in results] == list(ranks)
    assert [r["chief"] for r in results] == [True] + [False] * (size - 1)
    for rank, result in enumerate(results):
        assert result["size"] == size
        assert result["same"], "`initialize` made a second communicator"
        full, half, empty, tensor, scalar = result["sums"]
        np.testing.assert_array_equal(full, np.full((2, 3), (ranks + 1).sum()))
        assert half == (ranks * 0.5).sum()
        assert empty == []
        np.testing.assert_array_equal(tensor, sum(np.arange(3) * 10.0**r for r in ranks))
        assert scalar == ranks.sum()
        assert result["shapes"] == [[2, 3], [], [0, 4], [3], []]
        assert result["dtypes"] == ["float32"] * 5 + ["float64"] * 2
        assert result["wide"] == (1 + 2.0**-40 * ranks).sum()  # float32 would lose the small part.
        assert result["own"][0] == np.full((2, 3), rank + 1.0).tolist()
        assert result["digest"] == results[0]["digest"], "not the same bits on every worker"
        assert result["broadcast"] == [np.ones((2, 3)).tolist(), [3.0, 3.0]]
        weights = ranks + 1.0
        assert result["total"] == [1.0, weights.sum()]
        expected = np.full((2, 3), (weights * (ranks + 1)).sum() / weights.sum())
        np.testing.assert_allclose(result["mean"], expected, rtol=1e-6)
        assert result["nobody"] == 0.0
        other_sizes, other_shapes, other_calls = result["refusals"]
        assert "worker 0: 1 arrays of 5 float32 in all" in other_sizes
        assert "worker 1: 1 arrays of 6 float32 in all" in other_sizes
        assert "nothing was summed" in other_shapes
        assert "worker 0: a barrier; worker 1: 0 arrays" in other_calls
        assert result["empty"] == []


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_workers_sum_arrays_and_refuse_arrays_that_do_not_fit(size):
    check(workers.run("sums.py", size))


@pytest.mark.thorough
def test_a_worker_may_start_late():
    check(workers.run("sums.py", 2, 1, 5))


@pytest.mark.skipif(BACKEND != "torch", reason="torchrun is torch's launcher")
def test_workers_can_be_started_by_torchrun():
    check(workers.torchrun("sums.py", 2))


@pytest.mark.thorough
@pytest.mark.sample(1)
@pytest.mark.parametrize("fault", ["kill", "stall"])
@pytest.mark.parametrize("failing", [1, 0])
def test_a_worker_that_dies_or_hangs_is_an_error_on_the_others(fault, failing, tmp_path):
    if BACKEND == "jax" and failing == 0 and fault == "kill":
        pytest.skip("JAX aborts the others when the process with its coordination service dies")
    results = workers.finish(workers.start("fail.py", 3, failing, fault, TIMEOUT, tmp_path))
    survivors = [r for rank, r in enumerate(results) if rank != failing]
    for code, result, err in survivors:
        assert code == 0, err
        assert "has lost" in result["error"]
        assert result["waited"] < TIMEOUT + SLACK
        assert result["kept"], "the weights changed, or could not be saved"
        assert "has failed before" in result["again"]
    if names_the_missing(failing):
        named = survivors[:1] if BACKEND == "torch" else survivors
        assert all(f"worker(s) {failing}:" in result["error"] for _, result, _ in named)


def names_the_missing(rank):
    return rank != 0 if BACKEND in ("torch", "tensorflow") else True


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND == "torch", reason="a frozen process looks like a stalled one to gloo")
def test_a_frozen_worker_is_an_error_on_the_others(tmp_path):
    processes = workers.start("fail.py", 3, 1, "stop", TIMEOUT, tmp_path)
    end = threading.Timer(100, processes[1].send_signal, [signal.SIGKILL])
    end.start()
    for rank in (0, 2):
        processes[rank].wait(timeout=90)
    end.cancel()
    processes[1].kill()
    for code, result, err in itertools.compress(workers.finish(processes), [1, 0, 1]):
        assert code == 0, err
        assert "worker(s) 1:" in result["error"]
        assert result["waited"] < TIMEOUT + SLACK


@pytest.mark.thorough
def test_a_worker_that_freezes_in_a_large_sum_is_an_error_on_the_others(tmp_path):
    """It reads nothing any more, so the network buffers of the others fill up."""
    processes = workers.start("large_sums.py", 2, 64, TIMEOUT, tmp_path)
    while not (tmp_path / "summed_1").exists():
        assert processes[1].poll() is None, processes[1].communicate()
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGSTOP)
    ((code, result, err),) = workers.finish(processes[:1])
    processes[1].kill()
    processes[1].communicate()
    assert code == 0, err
    assert "has lost" in result["error"]
    assert result["kept"], "the arrays of the caller changed"
    assert result["waited"] < TIMEOUT + SLACK


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.skipif(BACKEND == "torch", reason="torch.distributed can be started at any time")
def test_joining_after_the_first_variable_is_refused():
    ((code, result, err),) = workers.finish(workers.start("join.py", 2, "late", 60, absent=[1]))
    assert code == 0, err
    assert "call keras_avg.distributed.initialize() at the start" in result["error"]


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow waits as long as it likes")
@pytest.mark.sample(1)
@pytest.mark.parametrize("absent", [1, 0])
def test_waiting_for_a_worker_that_never_comes_ends_with_an_error(absent):
    processes = workers.start("join.py", 2, "alone", TIMEOUT, absent=[absent])
    ((code, result, err),) = workers.finish(processes)
    if BACKEND == "jax":
        assert code == -signal.SIGABRT, err
        assert "DEADLINE_EXCEEDED" in err
    else:
        assert code == 0, err
        assert "The 2 workers did not all come within 6 s" in result["error"]
        assert result["waited"] < TIMEOUT + SLACK
