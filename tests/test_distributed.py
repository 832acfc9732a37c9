"""Communicators without a network: the launcher's environment, packing, and sums over threads."""

import json

import fake_workers
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_avg
from keras_avg._backend import communicators
from keras_avg.distributed import LocalCommunicator, _payload, initialization
from keras_avg.distributed._engine_communicator import EngineCommunicator
from keras_avg.distributed._weighted_sum import weighted_sum

BACKEND = keras.backend.backend()
CLUSTER = {"worker": ["10.0.0.1:5000", "10.0.0.2:5000"]}
VARIABLES = {
    "torch": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"},
    "jax": {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": "10.0.0.1:5000",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
        "KERAS_DISTRIBUTION_PROCESS_ID": "1",
    },
    "tensorflow": {
        "TF_CONFIG": json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 1}})
    },
}
RANK, SIZE = {
    "torch": ("RANK", "WORLD_SIZE"),
    "jax": ("KERAS_DISTRIBUTION_PROCESS_ID", "KERAS_DISTRIBUTION_NUM_PROCESSES"),
    "tensorflow": ("TF_CONFIG", "TF_CONFIG"),
}[BACKEND]

only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TF_CONFIG is TensorFlow's")
not_tensorflow = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="TensorFlow has one variable for all"
)


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch):
    """Removes the variables of launchers, and the communicator of an earlier test."""
    for names in VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(initialization, "_of_this_process", None)


@pytest.fixture
def launcher(monkeypatch):
    """Sets the launcher's variables, with some changes. The value None leaves a variable out."""

    def sets(changes):
        for name, value in (VARIABLES[BACKEND] | changes).items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return sets


def numpy(array):
    return np.array(ops.convert_to_numpy(array), copy=True)


@pytest.mark.slow_on("tensorflow")
def test_without_a_launcher_the_worker_is_alone():
    communicator = keras_avg.distributed.initialize()
    assert isinstance(communicator, LocalCommunicator)
    assert (communicator.rank, communicator.size, communicator.is_chief) == (0, 1, True)
    communicator.barrier()


def test_initialize_gives_the_same_communicator_again():
    first = keras_avg.distributed.initialize()
    assert keras_avg.distributed.initialize(timeout=5) is first


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, None, "600"])
def test_a_timeout_that_is_not_a_positive_number_is_refused(timeout):
    with pytest.raises(ValueError, match="`timeout` must be a positive number, in seconds"):
        keras_avg.distributed.initialize(timeout)


def test_the_launcher_says_which_worker_this_is(launcher):
    launcher({})
    assert communicators.of_backend().launched() == (1, 2)


@not_tensorflow
def test_a_job_of_one_worker_needs_no_engine(launcher):
    launcher({RANK: "0", SIZE: "1"})
    assert isinstance(keras_avg.distributed.initialize(), LocalCommunicator)


@not_tensorflow
@pytest.mark.parametrize("missing", VARIABLES[BACKEND])
def test_a_job_with_missing_variables_is_refused(launcher, missing):
    launcher({missing: None})
    with pytest.raises(ValueError, match=f"not set: {missing}. Start the program by its launcher"):
        keras_avg.distributed.initialize()


@not_tensorflow
@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "two")])
def test_a_rank_that_does_not_fit_the_size_is_refused(launcher, rank, size):
    launcher({RANK: rank, SIZE: size})
    with pytest.raises(ValueError, match=f"Received: {RANK}={rank}, {SIZE}={size}"):
        keras_avg.distributed.initialize()


@only_tensorflow
@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("worker 1 of 2", "Expecting value"),
        ("[1, 2]", "list indices"),
        ("{}", "'cluster' is missing"),
        (json.dumps({"cluster": CLUSTER}), "'task' is missing"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "worker"}}), "'index' is missing"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "ps", "index": 0}}), "task type 'ps'"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 2}}), "index=2"),
    ],
)
def test_a_tf_config_that_names_no_worker_is_refused(launcher, config, complaint):
    launcher({"TF_CONFIG": config})
    with pytest.raises(ValueError, match=complaint):
        keras_avg.distributed.initialize()


@only_tensorflow
@pytest.mark.parametrize(("task", "place"), [(("chief", 0), (0, 3)), (("worker", 1), (2, 3))])
def test_the_chief_of_a_tf_config_is_worker_0(launcher, task, place):
    cluster = CLUSTER | {"chief": ["10.0.0.3:5000"]}
    job = {"cluster": cluster, "task": {"type": task[0], "index": task[1]}}
    launcher({"TF_CONFIG": json.dumps(job)})
    assert communicators.of_backend().launched() == place


@only_tensorflow
def test_an_evaluator_is_not_a_worker_of_the_job(launcher):
    task = {"type": "evaluator", "index": 0}
    launcher({"TF_CONFIG": json.dumps({"cluster": CLUSTER, "task": task})})
    assert isinstance(keras_avg.distributed.initialize(), LocalCommunicator)


class Pair(keras_avg.distributed.Communicator):
    """One of two workers with the same values. It is the shortest possible subclass."""

    def __init__(self, rank):
        self.rank, self.size = rank, 2
        self.brought = []

    def all_reduce_sum(self, arrays):
        self.brought += arrays
        return [2 * numpy(array) for array in arrays]


def test_a_subclass_of_communicator_needs_only_a_rank_a_size_and_a_sum():
    chief, other = Pair(0), Pair(1)
    assert (chief.is_chief, other.is_chief) == (True, False)
    chief.barrier()
    assert [array.shape for array in chief.brought] == [()]
    other.is_chief = True
    assert other.is_chief
    with pytest.raises(TypeError, match="all_reduce_sum"):
        keras_avg.distributed.Communicator()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_communicator_is_given_arrays_and_not_variables(dtype):
    pair, variable = Pair(0), keras.Variable([1.0, 2.0], dtype=dtype)
    optimizer = keras_avg.ModelAverage("sgd", interval_steps=1, communicator=pair)
    optimizer.build([variable])
    optimizer.apply([ops.ones(2, dtype)], [variable])
    assert optimizer.num_snapshots == 1
    for array in pair.brought:
        assert not isinstance(array, keras.Variable)
        assert np.asarray(array).dtype == "float32"  # NumPy refuses a tensor that needs gradients.


def test_the_sum_of_one_worker_is_a_copy():
    variable = keras.Variable([[1.0, 2.0]])
    array = np.array([3.0], "float32")
    copies = LocalCommunicator().all_reduce_sum([variable, array, variable.value])
    variable.assign([[7.0, 7.0]])
    array[:] = 7
    for copy, expected in zip(copies, ([[1, 2]], [3], [[1, 2]]), strict=True):
        np.testing.assert_array_equal(numpy(copy), expected)
    assert LocalCommunicator().all_reduce_sum([]) == []


def test_later_sums_do_not_change_earlier_ones():
    communicator, results = LocalCommunicator(), []
    for step in range(4):
        if step == 3:
            del results[0]
        results.append(communicator.all_reduce_sum([np.full((2, 3), step, "float32")])[0][1])
    for expected, result in zip([1, 2, 3], results, strict=True):
        np.testing.assert_array_equal(numpy(result), np.full(3, expected))


@pytest.mark.skipif(BACKEND != "jax", reason="donated memory is JAX's")
def test_variables_assigned_from_a_sum_can_be_donated():
    import jax

    expected = np.arange(64 * 64, dtype="float32").reshape(64, 64)
    variables = [keras.Variable(expected) for _ in range(4)]
    results = LocalCommunicator().all_reduce_sum(variables)
    others = [keras.Variable(result) for result in results]
    for variable, result in zip(variables, results, strict=True):
        variable.assign(result)
    step = jax.jit(lambda values: [value + 1 for value in values], donate_argnums=0)
    jax.block_until_ready(step([variable.value for variable in variables]))
    for kept in [*results, *others]:
        np.testing.assert_array_equal(numpy(kept), expected)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], "float32"),
        (["bfloat16", "float16"], "float32"),
        (["float16", "float64"], "float64"),
    ],
)
def test_sums_are_in_float32_or_wider(dtypes, expected):
    arrays = [np.full(2, 0.1).astype(dtype) for dtype in map(numpy_dtype, dtypes)]
    sums = LocalCommunicator().all_reduce_sum(arrays)
    assert [keras.backend.standardize_dtype(s.dtype) for s in sums] == [expected] * len(dtypes)
    for array, copy in zip(arrays, sums, strict=True):
        np.testing.assert_array_equal(numpy(copy), array.astype(expected))


def numpy_dtype(name):
    return "float16" if name == "bfloat16" and BACKEND == "torch" else np.dtype(name)


def test_variables_in_half_precision_are_summed_in_float32():
    variable = keras.Variable([0.1, 2.0], dtype="bfloat16")
    (copy,) = LocalCommunicator().all_reduce_sum([variable])
    expected = numpy(ops.cast(variable, "float32"))
    assert numpy(copy).dtype == "float32"
    np.testing.assert_array_equal(numpy(copy), expected)


@pytest.mark.parametrize(
    "array", [np.arange(3), np.array([True]), np.ones(2, "complex64"), 1.0, [1.0]], ids=str
)
def test_arrays_that_are_not_of_floats_are_refused(array):
    with pytest.raises(ValueError, match="Only arrays of floats"):
        LocalCommunicator().all_reduce_sum([array])


shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(shapes, shapes)
def test_descriptions_are_equal_if_and_only_if_shapes_are_equal(shapes, others):
    first, second = (
        _payload.description([np.ones(shape, "float32") for shape in each], "float32")
        for each in (shapes, others)
    )
    assert (first == second) == (shapes == others)


def test_the_dtype_of_the_payload_is_part_of_its_description():
    arrays = [np.ones(2)]
    single, double = (_payload.description(arrays, dtype) for dtype in ("float32", "float64"))
    assert single != double


def test_the_payload_has_the_dtype_of_its_widest_array_and_at_least_float32():
    narrow = [keras.Variable(np.ones(2), dtype=dtype) for dtype in ("float16", "bfloat16")]
    assert _payload.payload_dtype(narrow) == "float32"
    assert _payload.payload_dtype([*narrow, np.ones(2, "float64")]) == "float64"


def test_the_weighted_mean_of_two_workers_is_right():
    def work(communicator):
        array = np.array([1.0, 2.0], "float32") if communicator.rank else np.zeros(2, "float32")
        return weighted_sum(communicator, [array], 3.0 if communicator.rank else 1.0)

    for sums, total in fake_workers.run(2, work):
        assert total == 4.0
        np.testing.assert_array_equal(sums[0] / total, [0.75, 1.5])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_the_weighted_mean_equals_the_mean_of_repeated_arrays(weights, seed):
    arrays = np.random.default_rng(seed).normal(size=(len(weights), 2, 3)).astype("float32")
    repeated = np.repeat(arrays.astype("float64"), weights, axis=0)

    def work(communicator):
        rank = communicator.rank
        return weighted_sum(communicator, [arrays[rank], arrays[rank][0]], weights[rank])

    for sums, total in fake_workers.run(len(weights), work):
        assert total == sum(weights)
        if total == 0:
            assert not np.any(sums[0])
        else:  # float32 rounds each product and each sum.
            np.testing.assert_allclose(sums[0] / total, repeated.mean(0), rtol=0, atol=2e-6)
        np.testing.assert_array_equal(sums[1], sums[0][0])


def test_a_weight_of_zero_keeps_nonfinite_values_out_and_broadcasts_the_bits_of_others():
    def work(communicator):
        own = np.array([0.1, -0.0, np.pi]) if communicator.rank == 1 else np.array([np.nan] * 3)
        variable = keras.Variable(own, dtype="float32")
        return weighted_sum(communicator, [variable], float(communicator.rank == 1))

    expected = np.array([0.1, 0.0, np.pi], "float32")
    for sums, total in fake_workers.run(3, work):
        assert total == 1.0
        np.testing.assert_array_equal(sums[0], expected)


def test_half_precision_is_weighted_in_float32():
    variable = keras.Variable([0.1], dtype="bfloat16")
    sums, *_ = weighted_sum(LocalCommunicator(), [variable], 3)
    exact = 3 * numpy(ops.cast(variable, "float32"))
    np.testing.assert_allclose(numpy(sums[0]), exact, rtol=1e-7)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match="`weight` must be a finite number >= 0"):
        weighted_sum(LocalCommunicator(), [], weight)


class FakeEngine:
    """The engine of worker 1 of three. Its meetings return `brought`, or raise `error`."""

    rank, size = 1, 3

    def __init__(self, brought=None, error=None):
        self.brought, self.error, self.sums = brought, error, 0

    def meet(self, numbers):
        if self.error:
            raise self.error
        return [self.brought or numbers, numbers, numbers]

    def sum(self, arrays, dtype):
        self.sums += 1
        return arrays


def test_workers_that_bring_different_arrays_get_an_error_and_can_go_on():
    engine = FakeEngine(brought=[1, 2, 32, 0])
    communicator = EngineCommunicator(engine, 5.0)
    with pytest.raises(
        ValueError, match=r"worker 0: 1 arrays of 2 float32 .* worker 1: 1 arrays of"
    ):
        communicator.all_reduce_sum([np.ones(3, "float32")])
    with pytest.raises(ValueError, match="worker 1: a barrier"):
        communicator.barrier()
    assert engine.sums == 0
    engine.brought = None
    communicator.all_reduce_sum([np.ones(3, "float32")])
    assert engine.sums == 1


@pytest.mark.parametrize(
    ("missing", "who"),
    [((0, 2), r"has lost worker\(s\) 0, 2:"), ((), "has lost some"), ((1,), "has lost some")],
)
def test_a_lost_worker_is_an_error_in_this_call_and_all_later_ones(missing, who):
    engine = FakeEngine(error=communicators.UnreachableError("connection reset", missing))
    communicator = EngineCommunicator(engine, 5.0)
    with pytest.raises(RuntimeError, match=f"Worker 1 of 3 {who}.*said: connection reset") as first:
        communicator.barrier()
    assert "can be saved" in str(first.value)
    assert "launcher start the job again" in str(first.value)
    engine.error = None
    with pytest.raises(RuntimeError, match=r"has failed before\. Worker 1 of 3"):
        communicator.all_reduce_sum([np.ones(1, "float32")])


def test_fake_workers_sum_in_the_order_of_ranks():
    big = [1.0, 2.0**-24, 2.0**-24]  # The sum in float32 depends on the order.

    def work(communicator):
        array = np.array(big[communicator.rank], "float32")
        return communicator.all_reduce_sum([array])[0], communicator.is_chief

    assert fake_workers.run(3, work) == [(1.0, True), (1.0, False), (1.0, False)]


def test_fake_workers_fail_together():
    def work(communicator):
        if communicator.rank == 1:
            raise KeyError("of worker 1")
        communicator.barrier()

    with pytest.raises(KeyError, match="of worker 1"):
        fake_workers.run(3, work)

    with pytest.raises(ValueError, match="do not bring the same arrays"):
        fake_workers.run(2, lambda c: c.all_reduce_sum([np.ones(1 + c.rank)]))
