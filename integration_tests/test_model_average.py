"""ModelAverage on the backend's own engine, with real processes on the loopback interface."""

import functools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import workers
from programs.train import BATCH, DEFAULTS, FEATURES, shard

TOLERANCE = 1e-6  # float32, over some 20 steps of weights of order 1
OUTER_TOLERANCE = 2e-6  # with the momentum of rounds on top
NESTEROV = {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}
COMPILED = keras.backend.backend() != "torch"


def train(size, **options):
    return workers.run("train.py", size, json.dumps(options))


def simulated(initial, batches, interval=3, epochs=1, learning_rate=0.05, momentum=0.9, outer=None):
    """The weights of each worker and the center after the same training in NumPy float64."""
    size = len(batches)
    data = [shard(rank, n) for rank, n in enumerate(batches)]
    start = np.concatenate([np.ravel(w) for w in initial]).astype("float64")
    values, momenta = np.tile(start, (size, 1)), np.zeros((size, len(start)))
    center, velocity, done = start, 0.0, [0] * size

    def step(rank):
        first = BATCH * (done[rank] % batches[rank])
        x, y = (array[first : first + BATCH].astype("float64") for array in data[rank])
        error = x @ values[rank, :FEATURES, None] + values[rank, FEATURES] - y
        gradient = 2 * np.append(x.T @ error, error.sum()) / BATCH
        momenta[rank] = momentum * momenta[rank] - learning_rate * gradient
        values[rank] += momenta[rank]
        done[rank] += 1

    while any(d < epochs * n for d, n in zip(done, batches, strict=True)):
        meeting = []
        for rank in range(size):
            steps = min(interval, epochs * batches[rank] - done[rank])
            for _ in range(steps):
                step(rank)
            meeting.append(float(steps == interval))
        if any(meeting):
            mean = np.average(values, axis=0, weights=meeting)
            if outer:
                gradient = center - mean
                velocity = outer["momentum"] * velocity - outer["learning_rate"] * gradient
                center = center + outer["momentum"] * velocity - outer["learning_rate"] * gradient
            else:
                center = mean
            values[:] = center
    return values, center


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def largest_deviation(results, batches, **arguments):
    values, center = simulated(results[0]["initial"], batches, **arguments)
    deviations = [np.abs(flat(r["weights"]) - v) for r, v in zip(results, values, strict=True)]
    deviations += [np.abs(flat(r["center"]) - center) for r in results]
    return float(np.max(deviations))


THREE_WORKERS = [
    pytest.param(batches, marks=pytest.mark.thorough) for batches in ([20, 20, 20], [10, 16, 13])
]


@pytest.mark.slow_on("jax", "tensorflow")
def test_workers_give_the_numbers_of_the_original_check_and_of_bmuf():
    chief, worker = workers.run("check_original.py", 2)
    assert chief["steps"] == [
        [[1.0, 2.0], [0.0, 1.0], 0],
        [[3.0, 4.0], [3.0, 4.0], 1],
        [[4.0, 5.0], [3.0, 4.0], 1],
    ]
    assert worker["steps"] == [[[2.0, 3.0], [0.0, 1.0], 0], [[3.0, 4.0], [3.0, 4.0], 1]]
    # These are the slopes of BMUF's own test, which computed them in float32.
    np.testing.assert_allclose(chief["slope"], [14.00279999, 35.284214], rtol=TOLERANCE)
    np.testing.assert_allclose(worker["slope"], [56.56562805, 35.284214], rtol=TOLERANCE)


@pytest.mark.complete
@pytest.mark.sample(2, tensorflow=1)
@pytest.mark.parametrize("batches", [[20, 20], *THREE_WORKERS], ids=str)
@pytest.mark.parametrize("outer", [None, NESTEROV], ids=["mean", "DiLoCo"])
def test_fit_on_different_shards_equals_the_training_in_numpy(batches, outer, record_property):
    results = train(len(batches), batches=batches, outer=outer)

    deviation = largest_deviation(results, batches, outer=outer)
    record_property("largest_deviation", deviation)
    assert deviation <= (OUTER_TOLERANCE if outer else TOLERANCE)
    assert {r["rounds"] for r in results} == {max(batches) // 3}
    if COMPILED:
        assert all(1 <= r["traces"] <= alone_traces() for r in results)


@functools.cache
def alone_traces():
    """The number of times that one worker traces the loss in the same training, without rounds."""
    command = [sys.executable, str(workers.PROGRAMS / "train.py")]
    options = json.dumps({"batches": [10], "callback": False})
    done = subprocess.run([*command, options], capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout.strip().splitlines()[-1])["traces"]


@pytest.mark.thorough
def test_a_worker_without_data_joins_the_rounds_of_the_others():
    *_, without = results = train(3, batches=[9, 6, 0])
    assert largest_deviation(results, [9, 6, 0]) <= TOLERANCE
    assert (without["steps"], without["rounds"]) == (0, 3)


@pytest.mark.thorough
@pytest.mark.skipif(COMPILED, reason="torchrun is torch's launcher")
def test_torchrun_starts_a_job_again_and_it_ends_with_the_same_weights(tmp_path):
    options = {"batches": [9, 9], "epochs": 3, "timeout": 20}
    failing = {"failing": [1, "kill", 9 + 4], "folder": str(tmp_path)}
    again = workers.torchrun("train.py", 2, json.dumps(options | failing), restarts=1)

    assert (tmp_path / "failed_1").exists()
    for result, expected in zip(again, train(2, **options), strict=True):
        np.testing.assert_array_equal(flat(result["weights"]), flat(expected["weights"]))
        np.testing.assert_array_equal(flat(result["center"]), flat(expected["center"]))
        assert result["steps"] == 9 * 3


@pytest.mark.thorough
def test_a_round_at_every_step_of_plain_sgd_equals_data_parallel_training():
    results = train(2, interval=1, inner={"learning_rate": 0.05})

    (x0, y0), (x1, y1) = (shard(rank, 20) for rank in range(2))
    weights = flat(results[0]["initial"]).astype("float64")
    for step in range(20):
        batch = slice(BATCH * step, BATCH * (step + 1))
        x = np.concatenate([x0[batch], x1[batch]]).astype("float64")
        error = (
            x @ weights[:FEATURES, None]
            + weights[FEATURES]
            - np.concatenate([y0[batch], y1[batch]])
        )
        weights -= 0.05 * 2 * np.append(x.T @ error, error.sum()) / len(x)
    for result in results:
        np.testing.assert_allclose(flat(result["weights"]), weights, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.thorough
def test_the_center_is_in_the_model_after_training_with_both_callbacks():
    first, second = train(2, batches=[20, 13], swap=True)
    np.testing.assert_array_equal(flat(first["weights"]), flat(first["center"]))
    np.testing.assert_array_equal(flat(first["weights"]), flat(second["weights"]))


class TestFailure:
    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.sample(1)
    @pytest.mark.parametrize("fault", ["kill", "stall"])
    def test_the_failure_of_one_worker_is_an_error_on_the_others_within_the_timeout(
        self, fault, tmp_path
    ):
        options = {
            "batches": [20, 20, 20],
            "timeout": 10,
            "failing": [1, fault, 8],  # A round is due after batch 9.
            "folder": str(tmp_path),
        }
        processes = workers.start("train.py", 3, json.dumps(options))
        others = [processes[0], processes[2]]
        results = workers.finish(others, timeout=90)
        processes[1].kill()
        workers.finish([processes[1]])

        for rank, (code, result, err) in zip((0, 2), results, strict=True):
            assert code == 0, err
            assert result["error"].startswith("RuntimeError"), result
            assert result["seconds"] < 60
            assert (result["steps"], result["rounds"]) == (9, 2)
            assert np.all(np.isfinite(flat(result["weights"])))
            assert (tmp_path / f"{rank}.weights.h5").exists()

    @pytest.mark.thorough
    def test_a_restarted_job_ends_with_the_weights_of_an_undisturbed_one(self, tmp_path):
        batches, epochs = [9, 9], 4
        options = {
            "batches": batches,
            "epochs": epochs,
            "timeout": 10,
            "failing": [1, "kill", 9 * 2 + 4],
            "folder": str(tmp_path),
        }
        processes = workers.start("train.py", 2, json.dumps(options))
        (code, result, err), (killed, _, _) = workers.finish(processes, timeout=90)
        assert code == 0, err
        assert result["error"].startswith("RuntimeError")
        assert killed == -9

        again = train(2, **options)

        undisturbed = train(2, batches=batches, epochs=epochs)
        for result, expected in zip(again, undisturbed, strict=True):
            np.testing.assert_array_equal(flat(result["weights"]), flat(expected["weights"]))
            np.testing.assert_array_equal(flat(result["center"]), flat(expected["center"]))
            assert result["steps"] == 9 * epochs


class TestMistakes:
    """Each mistake is an error on every worker, before the first step."""

    def errors(self, size=2, **options):
        results = train(size, **options)
        assert all(result.get("steps", 0) == 0 for result in results)
        return [result["error"] for result in results]

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.skipif(not COMPILED, reason="torch trains eagerly, and averages in `apply`")
    def test_a_missing_callback_is_an_error_on_every_worker(self):
        for error in self.errors(callback=False):
            assert error.startswith("RuntimeError")
            assert "SynchronizeWorkers" in error

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.skipif(not COMPILED, reason="torch runs one step per execution")
    def test_an_interval_that_is_not_a_multiple_of_steps_per_execution_is_refused(self):
        for error in self.errors(steps_per_execution=2):
            assert error.startswith("ValueError")
            assert "interval_steps=3" in error
            assert "steps_per_execution=2" in error

    @pytest.mark.thorough
    def test_workers_with_different_models_are_refused(self):
        for error in self.errors(units=[1, 2]):
            assert error.startswith("ValueError")
            assert "number of elements. Received, by rank: [5, 10]" in error

    @pytest.mark.thorough
    def test_a_wrong_number_of_workers_is_refused(self):
        processes = workers.start("train.py", 2, json.dumps({"num_worker": 3}))
        for code, _, err in workers.finish(processes):
            assert code != 0
            assert "There are 2 workers. Received: num_worker=3" in err


def test_the_defaults_are_those_that_the_tests_above_assume():
    assert DEFAULTS["interval"] == 3
    assert DEFAULTS["inner"] == {"learning_rate": 0.05, "momentum": 0.9}
