"""ModelAverage: rounds of several workers. Here the workers are threads."""

import fake_workers
import keras
import numpy as np
import pytest
import small_training as small
from fake_workers import Twin
from keras import ops, optimizers

import keras_avg
from keras_avg import SWA, ModelAverage, MovingAverage, _backend

TOLERANCE = 1e-6  # float32, over two dozen steps of variables of order 1
OUTER_TOLERANCE = 2e-6  # with a momentum of rounds on top
RANDOM = np.random.default_rng(5)
STARTS = [RANDOM.normal(size=(3,)).astype("float32") for _ in range(2)]
GRADS = RANDOM.normal(size=(3, 24, 3)).astype("float32")  # by worker and step

of_schedule_free = pytest.mark.skipif(
    not hasattr(optimizers, "ScheduleFreeAdamW"), reason="of a later Keras"
)


def simulated(steps, interval, outer=None, start_step=0):
    """Local SGD(0.1, momentum=0.9) of workers with these numbers of steps, in NumPy float64.

    `outer` has the rate and the momentum of Nesterov's method for the center. Returns the workers'
    values and the center.
    """
    size = len(steps)
    values = np.array([STARTS[0]] * size, "float64")
    momenta, center, velocity = np.zeros_like(values), values[0].copy(), 0.0

    def round_of(weights):
        nonlocal center, velocity
        mean = np.average(values, axis=0, weights=weights)
        if outer is None:
            center = mean
        else:
            rate, momentum = outer
            gradient = center - mean
            velocity = momentum * velocity - rate * gradient
            center = center + momentum * velocity - rate * gradient
        values[:] = center

    done = [0] * size
    while any(d < s for d, s in zip(done, steps, strict=True)):
        at_round = []
        for worker in range(size):
            meets = False
            while done[worker] < steps[worker] and not meets:
                momenta[worker] = 0.9 * momenta[worker] - 0.1 * GRADS[worker, done[worker]]
                values[worker] += momenta[worker]
                done[worker] += 1
                t = done[worker]
                meets = t <= start_step or (t - start_step) % interval == 0
            at_round.append(float(meets))
        if any(at_round):
            round_of(at_round)
    return values, center


def steps_of(communicator, optimizer, variable, steps):
    for grad in GRADS[communicator.rank, :steps]:
        small.apply(optimizer, [variable], [grad])
    return small.numpy(variable), small.numpy(optimizer.get_slot(variable, "average"))


def inner():
    return optimizers.SGD(0.1, momentum=0.9)


def test_the_check_of_the_original_gives_the_same_numbers():
    def work(communicator):
        optimizer = ModelAverage(optimizers.SGD(1.0), interval_steps=2, communicator=communicator)
        variables = [keras.Variable(0.0), keras.Variable(1.0)]
        grad = -1.0 if communicator.is_chief else -2.0
        seen = []
        for step in range(3):
            if step == 2 and not communicator.is_chief:
                break
            small.apply(optimizer, variables, [grad, grad])
            values = [float(small.numpy(v)) for v in variables]
            center = [float(c) for c in small.slots(optimizer, variables)]
            seen.append((values, center, optimizer.num_snapshots))
        return seen

    chief, worker = fake_workers.run(2, work)
    assert chief == [
        ([1.0, 2.0], [0.0, 1.0], 0),
        ([3.0, 4.0], [3.0, 4.0], 1),
        ([4.0, 5.0], [3.0, 4.0], 1),
    ]
    assert worker == [([2.0, 3.0], [0.0, 1.0], 0), ([3.0, 4.0], [3.0, 4.0], 1)]


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("arguments", "outer"),
    [
        ({"interval_steps": 3}, None),
        ({"interval_steps": 1}, None),
        ({"interval_steps": 4, "start_step": 5}, None),
        (
            {
                "interval_steps": 3,
                "outer_optimizer": {
                    "class_name": "SGD",
                    "config": {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True},
                },
            },
            (0.7, 0.9),
        ),
    ],
    ids=["", "every step", "start step", "DiLoCo"],
)
def test_local_steps_and_rounds_equal_those_in_numpy(size, arguments, outer):
    def work(communicator):
        optimizer = ModelAverage(inner(), communicator=communicator, **arguments)
        start = STARTS[min(communicator.rank, 1)]  # All workers take the chief's value.
        return steps_of(communicator, optimizer, keras.Variable(start), steps=20)

    results = fake_workers.run(size, work)

    rule = {k: v for k, v in arguments.items() if k != "outer_optimizer"}
    values, center = simulated(
        [20] * size, rule["interval_steps"], outer, rule.get("start_step", 0)
    )
    tolerance = OUTER_TOLERANCE if outer else TOLERANCE
    for (value, slot), expected in zip(results, values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(slot, center, rtol=tolerance, atol=tolerance)


def test_rounds_at_every_step_of_plain_sgd_equal_data_parallel_training():
    def work(communicator):
        optimizer = ModelAverage(optimizers.SGD(0.1), interval_steps=1, communicator=communicator)
        return steps_of(communicator, optimizer, keras.Variable(STARTS[0]), steps=20)[0]

    together = STARTS[0] - 0.1 * GRADS[:2, :20].mean(axis=0, dtype="float64").sum(axis=0)
    for value in fake_workers.run(2, work):
        np.testing.assert_allclose(value, together, rtol=TOLERANCE, atol=TOLERANCE)


class TestInnerState:
    def momenta(self, inner_state, optimizer=inner, size=2):
        def work(communicator):
            wrapper = ModelAverage(
                optimizer(), interval_steps=2, inner_state=inner_state, communicator=communicator
            )
            variable = keras.Variable(STARTS[0])
            steps_of(communicator, wrapper, variable, steps=2)
            return small.numpy(wrapper.inner_optimizer.variables[-1])

        return fake_workers.run(size, work)

    def test_kept_inner_state_is_different_on_each_worker(self):
        own = -0.1 * (0.9 * GRADS[:2, 0] + GRADS[:2, 1])
        np.testing.assert_allclose(self.momenta("keep"), own, rtol=TOLERANCE)

    def test_averaged_inner_state_is_the_mean_over_the_workers(self):
        own = -0.1 * (0.9 * GRADS[:2, 0] + GRADS[:2, 1])
        for momentum in self.momenta("average"):
            np.testing.assert_allclose(momentum, own.mean(axis=0), rtol=TOLERANCE)

    @pytest.mark.parametrize("size", [1, 2])
    def test_reset_inner_state_has_its_initial_values(self, size):
        def adagrad():
            return optimizers.Adagrad(0.1, initial_accumulator_value=0.25)

        for accumulator in self.momenta("reset", adagrad, size):
            np.testing.assert_array_equal(accumulator, np.full(3, 0.25, "float32"))

    @of_schedule_free
    @pytest.mark.parametrize("outer", [None, "sgd"])
    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_reset_slot_that_begins_with_the_variable_equals_it_again(self, dtype, size, outer):
        def work(communicator):
            wrapper = ModelAverage(
                optimizers.ScheduleFreeAdamW(0.01, beta_2=0.9),  # bfloat16 cannot hold 0.999.
                interval_steps=2,
                inner_state="reset",
                outer_optimizer=outer,
                communicator=communicator,
            )
            variable = keras.Variable(STARTS[0], dtype=dtype)
            steps_of(communicator, wrapper, variable, steps=2)
            slots = (wrapper.get_slot(variable, name) for name in ("momentum", "velocity"))
            return [small.numpy(v) for v in (variable, *slots)]

        for variable, momentum, velocity in fake_workers.run(size, work):
            np.testing.assert_array_equal(momentum, variable)
            np.testing.assert_array_equal(velocity, np.zeros(3))

    @pytest.mark.slow_on("jax", "tensorflow")
    @of_schedule_free
    def test_a_slot_that_begins_with_the_variable_is_reset_in_fit_of_one_worker(self):
        inner = optimizers.ScheduleFreeAdamW(0.01)
        model = small.fit(
            small.model(ModelAverage(inner, interval_steps=3, inner_state="reset")), epochs=1
        )
        variables = model.trainable_variables
        momenta = [small.numpy(model.optimizer.get_slot(v, "momentum")) for v in variables]
        small.assert_same_bits(momenta, [small.numpy(v) for v in variables])
        small.fit(model)  # On JAX this fails if variables share memory.

    @pytest.mark.slow_on("jax")
    @pytest.mark.skipif(not hasattr(optimizers, "Muon"), reason="of a later Keras")
    def test_inner_state_is_reset_for_an_optimizer_that_uses_paths(self):
        wrapper = ModelAverage(optimizers.Muon(0.1), interval_steps=1, inner_state="reset")
        start = np.eye(3, dtype="float32")
        variables = [keras.Variable(start, name=name) for name in ("kernel", "embeddings")]
        small.apply(wrapper, variables, [start, start])
        slots = [small.numpy(wrapper.get_slot(v, "momentum")) for v in variables]
        slots.append(small.numpy(wrapper.get_slot(variables[1], "velocity")))
        small.assert_same_bits(slots, [np.zeros((3, 3))] * 3)

    @pytest.mark.skipif(not hasattr(optimizers, "MultiOptimizer"), reason="of a later Keras")
    @pytest.mark.parametrize("inner_state", ["average", "reset"])
    def test_inner_state_of_members_is_averaged_and_reset_too(self, inner_state):
        def work(communicator):
            averaged = MovingAverage(inner(), average_decay=0.5)
            members = optimizers.OptimizerMap(averaged, {".*other": inner()})
            wrapper = ModelAverage(
                optimizers.MultiOptimizer(members),
                interval_steps=2,
                inner_state=inner_state,
                communicator=communicator,
            )
            variables = [keras.Variable(STARTS[0], name=name) for name in ("one", "other")]
            for grad in GRADS[communicator.rank, :2]:
                small.apply(wrapper, variables, [grad, grad])
            return [small.numpy(v) for v in wrapper.variables]

        small.assert_same_bits(*fake_workers.run(2, work))

    def test_the_average_of_use_ema_is_not_reset(self):
        def ema():
            return optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.5)

        def work(communicator):
            wrapper = ModelAverage(
                ema(), interval_steps=2, inner_state="reset", communicator=communicator
            )
            variable = keras.Variable(STARTS[0])
            steps_of(communicator, wrapper, variable, steps=2)
            wrapper.finalize_variable_values([variable])
            return small.numpy(variable)

        assert all(np.all(value != 0) for value in fake_workers.run(2, work))

    @pytest.mark.slow_on("jax")
    def test_inner_state_is_reset_in_fit_of_one_worker(self):
        model = small.model(ModelAverage(inner(), interval_steps=3, inner_state="reset"))
        small.fit(model, epochs=1)
        momenta = model.optimizer.inner_optimizer.variables[2:]
        # In six steps there are two rounds, the last of them after step 6.
        assert not any(np.any(small.numpy(m)) for m in momenta)

    def test_counters_in_the_inner_state_do_not_change(self):
        def work(communicator):
            wrapper = ModelAverage(
                optimizers.Adam(), interval_steps=2, inner_state="reset", communicator=communicator
            )
            steps_of(communicator, wrapper, keras.Variable(STARTS[0]), steps=2)
            return int(wrapper.iterations), float(wrapper.learning_rate)

        for iterations, rate in fake_workers.run(2, work):
            assert iterations == 2
            np.testing.assert_allclose(rate, 0.001, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 0.9),
        ({"outer_optimizer": {"class_name": "SGD", "config": {"learning_rate": 0.5}}}, 0.95),
        ({"inner_state": "reset"}, 0.9),
    ],
    ids=["", "outer optimizer", "reset"],
)
def test_an_optimizer_built_for_no_variables_is_built_again_for_some(arguments, expected):
    optimizer = ModelAverage(inner(), interval_steps=1, **arguments)
    optimizer.build([])
    variable = keras.Variable([1.0])
    small.apply(optimizer, [variable], [[1.0]])
    assert optimizer.num_snapshots == 1
    np.testing.assert_allclose(small.numpy(variable), [expected], rtol=TOLERANCE)
    np.testing.assert_array_equal(small.slots(optimizer, [variable])[0], small.numpy(variable))


def test_averages_of_inner_wrappers_are_the_same_on_all_workers():
    def work(communicator):
        moving = MovingAverage(inner(), average_decay=0.5)
        optimizer = ModelAverage(moving, interval_steps=3, communicator=communicator)
        variable = keras.Variable(STARTS[0])
        steps_of(communicator, optimizer, variable, steps=6)
        return small.numpy(moving.get_slot(variable, "average"))

    first, second = fake_workers.run(2, work)
    np.testing.assert_array_equal(first, second)


def test_a_worker_without_snapshots_adds_nothing_to_inner_averages():
    def work(communicator):
        inside = SWA(optimizers.SGD(1.0), start_averaging=10 * communicator.rank, average_period=1)
        optimizer = ModelAverage(inside, interval_steps=2, communicator=communicator)
        variable = keras.Variable([0.0])
        small.apply(optimizer, [variable], [[-1.0]], times=2)
        return inside.num_snapshots, float(small.numpy(inside.get_slot(variable, "average"))[0])

    assert fake_workers.run(2, work) == [(2, 1.5), (2, 1.5)]


def test_inner_snapshots_are_counted_beyond_the_integers_of_float32():
    def work(communicator):
        inside = MovingAverage("sgd")
        optimizer = ModelAverage(inside, communicator=communicator)
        optimizer.build([keras.Variable([1.0])])
        inside._own_variables["snapshots"].assign(2**28 + 1)
        optimizer.meet()
        return inside.num_snapshots

    assert fake_workers.run(3, work) == [2**28 + 1] * 3


def test_a_worker_with_infinite_weights_adds_nothing_to_the_mean():
    def work(communicator):
        optimizer = ModelAverage(
            optimizers.SGD(1.0), interval_steps=1, skip_nonfinite=True, communicator=communicator
        )
        variable = keras.Variable([1.0])
        small.apply(optimizer, [variable], [[0.5 if communicator.is_chief else np.inf]])
        return small.numpy(variable)

    for value in fake_workers.run(2, work):
        np.testing.assert_array_equal(value, [0.5])


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_means_are_rounded_once(workers):
    """The mean is rounded to the center's dtype, and from there to the variables' dtype."""
    sums = np.random.default_rng(workers).normal(size=(50, 20)).astype("float32")
    center, low = keras.Variable(np.zeros_like(sums)), keras.Variable(sums, dtype="bfloat16")
    variable = keras.Variable(np.zeros_like(sums))

    _backend.assign_quotients([sums], float(workers), [center], [low], [variable])

    np.testing.assert_array_equal(center, sums / np.float32(workers))
    np.testing.assert_array_equal(small.numpy(low), small.numpy(ops.cast(center, "bfloat16")))
    np.testing.assert_array_equal(variable, small.numpy(low).astype("float32"))


@pytest.mark.parametrize("size", [0, 1, 2**15 - 1, 2**15, 2**16, 2**16 + 1, 3 * 2**16 - 1])
@pytest.mark.parametrize("workers", [2, 3])
def test_means_are_exact_for_arrays_of_any_size(size, workers):
    sums = np.random.default_rng(size).normal(size=(1, size)).astype("float32")
    center, variable = keras.Variable(np.zeros_like(sums)), keras.Variable(np.ones_like(sums))

    _backend.assign_quotients([sums], float(workers), [center], [variable])

    for each in (center, variable):
        np.testing.assert_array_equal(small.numpy(each), sums / np.float32(workers))
    variable.assign(np.zeros_like(sums))  # The center does not change with the variable.
    np.testing.assert_array_equal(small.numpy(center), sums / np.float32(workers))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_means_of_many_small_arrays_are_those_of_each(workers):
    random = np.random.default_rng(workers)
    sums = [random.normal(size=(size,)).astype("float32") for size in range(1, 200, 7)]
    sums[5:5] = random.normal(size=(20, 2**14)).astype("float32")  # more than go together
    centers, variables = ([keras.Variable(np.zeros_like(a)) for a in sums] for _ in range(2))

    _backend.assign_quotients(sums, float(workers), centers, variables)

    for array, center, variable in zip(sums, centers, variables, strict=True):
        np.testing.assert_array_equal(small.numpy(center), array / np.float32(workers))
        np.testing.assert_array_equal(small.numpy(variable), array / np.float32(workers))


@pytest.mark.parametrize("low", ["float32", "bfloat16"])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_means_of_many_arrays_of_one_shape_are_those_of_each(workers, low):
    sums = list(np.random.default_rng(workers).normal(size=(37, 5, 3)).astype("float32"))
    columns = [
        [keras.Variable(np.zeros_like(array), dtype=dtype) for array in sums]
        for dtype in ("float32", low, "float32")
    ]

    _backend.assign_quotients(sums, float(workers), *columns)

    for array, center, rounded, variable in zip(sums, *columns, strict=True):
        mean = array / np.float32(workers)
        np.testing.assert_array_equal(small.numpy(center), mean)
        expected = small.numpy(ops.cast(mean, low)).astype("float32")
        np.testing.assert_array_equal(small.numpy(rounded).astype("float32"), expected)
        np.testing.assert_array_equal(small.numpy(variable), expected)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="buffers are donated on JAX")
def test_means_have_buffers_of_their_own():
    sums = [np.full(2**14, number, "float32") for number in range(64)]  # Some of them are aligned.
    centers = [keras.Variable(array) for array in sums]
    variables = [keras.Variable(array) for array in sums]

    _backend.assign_quotients(sums, 2.0, centers, variables)

    both = [*centers, *variables]
    assert len({v.value.unsafe_buffer_pointer() for v in both}) == len(both)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch broadcasts what fits")
def test_means_of_another_shape_are_refused():
    variable = keras.Variable([1.0, 2.0])
    with pytest.raises(ValueError, match="shape"):
        _backend.assign_quotients([np.ones((1, 2), "float32")], 2.0, [variable])
    np.testing.assert_array_equal(variable, [1.0, 2.0])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="about memory layouts of torch")
def test_means_are_written_into_memory_that_is_not_contiguous():
    import torch

    sums = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    memory = torch.zeros(6, 4)
    variable = torch.nn.Parameter(memory.T, requires_grad=False)

    _backend.assign_quotients([sums], 2.0, [variable])

    np.testing.assert_array_equal(memory.numpy(), sums.T / 2)


def test_any_object_with_the_methods_of_a_communicator_is_accepted():
    optimizer = ModelAverage(inner(), interval_steps=2, communicator=Twin())
    variable = keras.Variable(STARTS[0])
    plain = keras.Variable(STARTS[0])
    for grad in GRADS[0, :5]:
        small.apply(optimizer, [variable], [grad])
    plain_optimizer = inner()
    for grad in GRADS[0, :5]:
        small.apply(plain_optimizer, [plain], [grad])
    np.testing.assert_array_equal(small.numpy(variable), small.numpy(plain))
    assert optimizer.num_snapshots == 2


class TestWorkersThatDiffer:
    def run(self, make):
        def work(communicator):
            optimizer, variables = make(communicator)
            before = [small.numpy(v) for v in variables]
            grads = [np.ones(v.shape) for v in variables]
            with pytest.raises(ValueError, match="differ in their") as caught:
                small.apply(optimizer, variables, grads)
            small.assert_same_bits([small.numpy(v) for v in variables], before)
            return str(caught.value)

        first, second = fake_workers.run(2, work)
        assert first == second
        return first

    def test_workers_with_different_models_are_refused(self):
        def make(communicator):
            shape = (3,) if communicator.is_chief else (4,)
            optimizer = ModelAverage("sgd", communicator=communicator)
            return optimizer, [keras.Variable(np.zeros(shape))]

        assert "number of elements. Received, by rank: [3, 4]" in self.run(make)

    def test_workers_whose_models_differ_only_in_shapes_are_refused(self):
        def make(communicator):
            shape = (2, 3) if communicator.is_chief else (3, 2)
            optimizer = ModelAverage("sgd", communicator=communicator)
            return optimizer, [keras.Variable(np.zeros(shape))]

        assert "differ in their shapes" in self.run(make)

    def test_workers_with_different_intervals_are_refused(self):
        def make(communicator):
            optimizer = ModelAverage(
                "sgd", interval_steps=5 + communicator.rank, communicator=communicator
            )
            return optimizer, [keras.Variable([1.0])]

        assert "interval_steps. Received, by rank: [5, 6]" in self.run(make)

    def test_workers_at_different_steps_are_refused(self):
        def make(communicator):
            optimizer = ModelAverage("sgd", communicator=communicator)
            variable = keras.Variable([1.0])
            optimizer.build([variable])
            optimizer.inner_optimizer.iterations.assign(7 * communicator.rank)
            return optimizer, [variable]

        assert "step. Received, by rank: [0, 7]" in self.run(make)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_worker": 3}, r"There are 1 workers.*Received: num_worker=3"),
            ({"is_chief": False}, r"this is rank 0.*Received: is_chief=False"),
            ({"interval_steps": 0}, "Received: interval_steps=0"),
            ({"start_step": -1}, "Received: start_step=-1"),
            (
                {"inner_state": "drop"},
                r"\('keep', 'average', 'reset'\).*Received: inner_state='drop'",
            ),
            ({"outer_optimizer": SWA("sgd")}, "Received: outer_optimizer="),
        ],
    )
    def test_arguments_of_model_average_out_of_range_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ModelAverage("sgd", **arguments)

    def test_the_same_optimizer_inside_and_outside_is_refused(self):
        twice = optimizers.SGD(0.5)
        with pytest.raises(ValueError, match="must be another optimizer than"):
            ModelAverage(MovingAverage(twice), outer_optimizer=twice)

    def test_two_optimizers_with_one_name_are_refused(self):
        inside, outside = (optimizers.SGD(rate, name="mine") for rate in (0.1, 0.7))
        with pytest.raises(ValueError, match="named 'mine'"):
            ModelAverage(inside, outer_optimizer=outside)

    def test_an_outer_optimizer_that_was_built_for_another_model_is_refused(self):
        outer = optimizers.SGD(0.7)
        first, second = (ModelAverage(inner(), outer_optimizer=outer) for _ in range(2))
        first.build([keras.Variable([1.0])])
        with pytest.raises(ValueError, match="was built for other variables"):
            second.build([keras.Variable([1.0])])
        assert not second.built

    def test_arguments_that_agree_with_the_communicator_are_accepted(self):
        assert ModelAverage("sgd", num_worker=1, is_chief=True).communicator.size == 1

    def test_the_config_has_only_arguments_that_do_not_depend_on_the_machine(self):
        outer = optimizers.SGD(0.7, momentum=0.9, nesterov=True)
        optimizer = ModelAverage(
            "adam", 1, True, 7, outer_optimizer=outer, start_step=3, inner_state="average"
        )
        config = optimizer.get_config()
        assert not {"communicator", "num_worker", "is_chief"} & config.keys()
        again = ModelAverage.from_config(config)
        assert again.get_config() == config
        assert again.outer_optimizer.momentum == 0.9


@pytest.mark.slow_on("jax", "tensorflow")
def test_the_outer_optimizers_state_is_saved_and_training_goes_on(tmp_path):
    def optimizer():
        outer = optimizers.SGD(0.7, momentum=0.9, nesterov=True)
        return ModelAverage(inner(), interval_steps=4, outer_optimizer=outer)

    model = small.fit(small.model(optimizer()), epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())
    for each in (model, loaded):
        small.fit(each)
    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())
    assert keras_avg.averaging_optimizers(loaded)[0].num_snapshots == 4


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize(
    ("written", "read"),
    [
        (None, optimizers.SGD(0.5, momentum=0.9)),
        (optimizers.Adam(0.5), optimizers.SGD(0.5, momentum=0.9)),
        (optimizers.SGD(0.5, momentum=0.9), None),
    ],
    ids=["none to some", "another", "some to none"],
)
def test_a_file_with_another_outer_optimizer_is_refused(written, read, tmp_path):
    def trained(outer):
        outer = outer and keras.optimizers.serialize(outer)
        return small.fit(small.model(ModelAverage(inner(), outer_optimizer=outer)), epochs=1)

    trained(written).save_weights(tmp_path / "model.weights.h5")
    model = trained(read)
    before = model.optimizer.get_weights()
    with pytest.raises(ValueError, match="does not fit optimizer"):
        model.load_weights(tmp_path / "model.weights.h5")
    small.assert_same_bits(model.optimizer.get_weights(), before)


@pytest.mark.parametrize("communicator", ["x", dict])
def test_an_object_that_is_not_a_communicator_is_refused(communicator):
    with pytest.raises(TypeError, match="`communicator` must have rank, size"):
        ModelAverage("sgd", communicator=communicator)
