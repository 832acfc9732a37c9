"""ModelAverage: rounds of several workers, who are threads here."""

import contextlib
import json
import shutil
import time

import fake_workers
import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

import keras_avg
from keras_avg import SWA, Lookahead, ModelAverage, MovingAverage, _backend, _keras_internals
from keras_avg.callbacks import SwapAverageWeights, SynchronizeWorkers

TOLERANCE = 1e-6  # float32, over two dozen steps of variables of order 1
OUTER_TOLERANCE = 2e-6  # with a momentum of rounds on top
RANDOM = np.random.default_rng(5)
STARTS = [RANDOM.normal(size=(3,)).astype("float32") for _ in range(2)]
GRADS = RANDOM.normal(size=(3, 24, 3)).astype("float32")  # of worker, step

of_schedule_free = pytest.mark.skipif(
    not hasattr(optimizers, "ScheduleFreeAdamW"), reason="of a later Keras"
)


def simulated(steps, interval, outer=None, start_step=0):
    """Local SGD(0.1, momentum=0.9) of workers with these numbers of steps, in NumPy float64.

    `outer`: rate, momentum of Nesterov's method for the center. Returns the workers' values and
    the center.
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


class Twin:
    """A communicator whose other worker always has what this one has."""

    rank, size, is_chief = 1, 2, False

    def all_reduce_sum(self, arrays):
        return [2 * keras.ops.convert_to_numpy(array) for array in arrays]

    def barrier(self):
        pass


def steps_of(communicator, optimizer, variable, steps):
    for grad in GRADS[communicator.rank, :steps]:
        small.apply(optimizer, [variable], [grad])
    return small.numpy(variable), small.numpy(optimizer.get_slot(variable, "average"))


def inner():
    return optimizers.SGD(0.1, momentum=0.9)


def test_the_original_check_of_two_workers_and_interval_two():
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
def test_local_steps_and_rounds_are_those_of_numpy(size, arguments, outer):
    def work(communicator):
        optimizer = ModelAverage(inner(), communicator=communicator, **arguments)
        start = STARTS[min(communicator.rank, 1)]  # all take the chief's
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


def test_rounds_every_step_of_plain_sgd_are_synchronous_data_parallel_training():
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

    def test_kept_it_is_each_workers_own(self):
        own = -0.1 * (0.9 * GRADS[:2, 0] + GRADS[:2, 1])
        np.testing.assert_allclose(self.momenta("keep"), own, rtol=TOLERANCE)

    def test_averaged_it_is_the_mean(self):
        own = -0.1 * (0.9 * GRADS[:2, 0] + GRADS[:2, 1])
        for momentum in self.momenta("average"):
            np.testing.assert_allclose(momentum, own.mean(axis=0), rtol=TOLERANCE)

    @pytest.mark.parametrize("size", [1, 2])
    def test_reset_it_is_the_initial_one(self, size):
        def adagrad():
            return optimizers.Adagrad(0.1, initial_accumulator_value=0.25)

        for accumulator in self.momenta("reset", adagrad, size):
            np.testing.assert_array_equal(accumulator, np.full(3, 0.25, "float32"))

    @of_schedule_free
    @pytest.mark.parametrize("outer", [None, "sgd"])
    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_reset_a_slot_that_begins_at_the_variable_is_there_again(self, dtype, size, outer):
        def work(communicator):
            wrapper = ModelAverage(
                optimizers.ScheduleFreeAdamW(0.01, beta_2=0.9),  # bfloat16 has no 0.999
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

    @of_schedule_free
    def test_such_a_slot_is_reset_in_fit_of_one_worker(self):
        inner = optimizers.ScheduleFreeAdamW(0.01)
        model = small.fit(
            small.model(ModelAverage(inner, interval_steps=3, inner_state="reset")), epochs=1
        )
        variables = model.trainable_variables
        momenta = [small.numpy(model.optimizer.get_slot(v, "momentum")) for v in variables]
        small.assert_same_bits(momenta, [small.numpy(v) for v in variables])
        small.fit(model)  # on JAX, variables that share memory could not be trained on

    @pytest.mark.skipif(not hasattr(optimizers, "Muon"), reason="of a later Keras")
    def test_reset_it_is_that_of_an_optimizer_that_goes_by_paths(self):
        wrapper = ModelAverage(optimizers.Muon(0.1), interval_steps=1, inner_state="reset")
        start = np.eye(3, dtype="float32")
        variables = [keras.Variable(start, name=name) for name in ("kernel", "embeddings")]
        small.apply(wrapper, variables, [start, start])
        slots = [small.numpy(wrapper.get_slot(v, "momentum")) for v in variables]
        slots.append(small.numpy(wrapper.get_slot(variables[1], "velocity")))
        small.assert_same_bits(slots, [np.zeros((3, 3))] * 3)

    @pytest.mark.skipif(not hasattr(optimizers, "MultiOptimizer"), reason="of a later Keras")
    @pytest.mark.parametrize("inner_state", ["average", "reset"])
    def test_it_is_that_of_members_too(self, inner_state):
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

    def test_keras_own_average_is_not_reset(self):
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

    def test_it_is_reset_in_fit_of_one_worker(self):
        model = small.model(ModelAverage(inner(), interval_steps=3, inner_state="reset"))
        small.fit(model, epochs=1)
        momenta = model.optimizer.inner_optimizer.variables[2:]
        assert not any(np.any(small.numpy(m)) for m in momenta)  # six steps, two rounds

    def test_counters_are_left_alone(self):
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
def test_built_for_no_variables_it_is_built_for_those_that_come(arguments, expected):
    optimizer = ModelAverage(inner(), interval_steps=1, **arguments)
    optimizer.build([])
    variable = keras.Variable([1.0])
    small.apply(optimizer, [variable], [[1.0]])
    assert optimizer.num_snapshots == 1
    np.testing.assert_allclose(small.numpy(variable), [expected], rtol=TOLERANCE)
    np.testing.assert_array_equal(small.slots(optimizer, [variable])[0], small.numpy(variable))


def test_averages_kept_inside_are_the_same_on_all_workers():
    def work(communicator):
        moving = MovingAverage(inner(), average_decay=0.5)
        optimizer = ModelAverage(moving, interval_steps=3, communicator=communicator)
        variable = keras.Variable(STARTS[0])
        steps_of(communicator, optimizer, variable, steps=6)
        return small.numpy(moving.get_slot(variable, "average"))

    first, second = fake_workers.run(2, work)
    np.testing.assert_array_equal(first, second)


def test_a_worker_without_snapshots_adds_nothing_to_the_averages_inside():
    def work(communicator):
        inside = SWA(optimizers.SGD(1.0), start_averaging=10 * communicator.rank, average_period=1)
        optimizer = ModelAverage(inside, interval_steps=2, communicator=communicator)
        variable = keras.Variable([0.0])
        small.apply(optimizer, [variable], [[-1.0]], times=2)
        return inside.num_snapshots, float(small.numpy(inside.get_slot(variable, "average"))[0])

    assert fake_workers.run(2, work) == [(2, 1.5), (2, 1.5)]


def test_snapshots_inside_are_counted_beyond_float32():
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


class TestInFit:
    """`fit` of workers in threads, each on its shard."""

    def fit_shards(self, sizes, make_optimizer, *more_callbacks, epochs=2, **compile_arguments):
        models = [small.model() for _ in sizes]
        if len(sizes) > 1:
            models[1].set_weights([w + 1 for w in models[1].get_weights()])  # the chief's count

        def work(communicator):
            model, size = models[communicator.rank], sizes[communicator.rank]
            model.compile(make_optimizer(communicator), "mse", **compile_arguments)
            first = 16 * communicator.rank
            x, y = small.X[first : first + size], small.Y[first : first + size]
            callbacks = [SynchronizeWorkers(), *(make() for make in more_callbacks)]
            model.fit(
                x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
            )
            return model

        return fake_workers.run(len(sizes), work)

    @staticmethod
    def optimizer(communicator):
        return ModelAverage(inner(), interval_steps=3, communicator=communicator)

    def by_hand(self, sizes, epochs=2):
        """The same with plain models and rounds in NumPy."""
        models = [small.model(inner()) for _ in sizes]
        steps = [epochs * size // 4 for size in sizes]
        done = [0] * len(sizes)
        center = [small.numpy(v) for v in models[0].trainable_variables]
        while any(d < s for d, s in zip(done, steps, strict=True)):
            met = []
            for worker, model in enumerate(models):
                for _ in range(min(3, steps[worker] - done[worker])):
                    first = 16 * worker + 4 * (done[worker] % (sizes[worker] // 4))
                    model.train_on_batch(small.X[first : first + 4], small.Y[first : first + 4])
                    done[worker] += 1
                    if done[worker] % 3 == 0:
                        met.append(model)
            if met:
                weights = [
                    np.mean(column, axis=0, dtype="float64")
                    for column in zip(*(m.get_weights() for m in met), strict=True)
                ]
                for model in models:
                    model.set_weights(weights)
                center = [small.numpy(v) for v in models[0].trainable_variables]
        return models, center

    @pytest.mark.parametrize("sizes", [(16, 16), (16, 8, 12)], ids=["even", "uneven"])
    def test_workers_end_where_numpy_ends(self, sizes):
        models = self.fit_shards(sizes, self.optimizer)

        expected, center = self.by_hand(sizes)
        for model, other in zip(models, expected, strict=True):
            for value, target in zip(model.get_weights(), other.get_weights(), strict=True):
                np.testing.assert_allclose(value, target, rtol=1e-5, atol=1e-5)
            for slot, target in zip(
                small.slots(model.optimizer, model.trainable_variables), center, strict=True
            ):
                np.testing.assert_allclose(slot, target, rtol=1e-5, atol=1e-5)
        assert len({model.optimizer.num_snapshots for model in models}) == 1

    def test_one_worker_needs_no_callback(self):
        (alone,) = self.fit_shards((16,), self.optimizer)
        plain = small.model(inner())
        plain.fit(small.X[:16], small.Y[:16], batch_size=4, epochs=2, shuffle=False, verbose=0)
        small.assert_same_bits(alone.get_weights(), plain.get_weights())
        assert alone.optimizer.num_snapshots == 2

    def test_one_worker_with_an_outer_optimizer(self):
        def optimizer(communicator=None):
            return ModelAverage(
                inner(),
                interval_steps=3,
                outer_optimizer=optimizers.SGD(0.5),
                communicator=communicator,
            )

        (alone,) = self.fit_shards((16,), optimizer)
        by_hand = small.model(Lookahead(inner(), sync_period=3, slow_step_size=0.5))
        by_hand.fit(small.X[:16], small.Y[:16], batch_size=4, epochs=2, shuffle=False, verbose=0)
        for value, expected in zip(alone.get_weights(), by_hand.get_weights(), strict=True):
            np.testing.assert_allclose(value, expected, rtol=TOLERANCE, atol=TOLERANCE)

    def test_the_center_is_judged_and_saved(self, tmp_path):
        models = self.fit_shards((16, 12), self.optimizer, SwapAverageWeights)
        for model in models:
            assert model.optimizer.averages_in_model
            centers = small.slots(model.optimizer, model.trainable_variables)
            small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], centers)
        small.assert_same_bits(*([small.numpy(v) for v in m.trainable_variables] for m in models))
        models[0].save(tmp_path / "center.keras")
        loaded = keras.saving.load_model(tmp_path / "center.keras")
        small.assert_same_bits(loaded.get_weights(), models[0].get_weights())
        assert loaded.optimizer.communicator.size == 1

    def test_statistics_are_averaged_unless_told_not_to(self):
        models = self.fit_shards((12, 12), self.optimizer, epochs=1)
        small.assert_same_bits(*(m.get_weights() for m in models))

    @pytest.mark.parametrize("swap_first", [True, False], ids=["before", "behind"])
    @pytest.mark.parametrize("sizes", [(2, 6), (9, 3)], ids=["before a round", "after some"])
    def test_who_finishes_first_ends_with_the_last_center_and_its_statistics(
        self, sizes, swap_first
    ):
        models = [small.model() for _ in sizes]

        def work(communicator):
            model, size = models[communicator.rank], 4 * sizes[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            callbacks = [SynchronizeWorkers(), SwapAverageWeights(batch_norm_data=small.X)]
            callbacks = callbacks[::-1] if swap_first else callbacks
            model.fit(small.X[:size], small.Y[:size], batch_size=4, verbose=0, callbacks=callbacks)
            assert model.optimizer.averages_in_model
            return model

        models = fake_workers.run(2, work)
        small.assert_same_bits(*(m.get_weights() for m in models))
        ended = models[0].get_weights()
        keras_avg.update_batch_norm(models[0], small.X, verbose=0)
        small.assert_same_bits(ended, models[0].get_weights())
        for model in models:
            model.optimizer.swap_weights()
        small.assert_same_bits(*(m.get_weights() for m in models))

    def test_who_finishes_first_ends_with_keras_own_average_too(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model, size = models[communicator.rank], 12 if communicator.is_chief else 24
            ema = optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
            optimizer = ModelAverage(ema, interval_steps=3, communicator=communicator)
            model.compile(optimizer, "mse")
            callbacks = [SynchronizeWorkers()]
            x, y = small.X[:size], small.Y[:size]
            model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks)
            slots = [_keras_internals.slots(ema, v) for v in model.trainable_variables]
            averages = [small.numpy(slot["average"]) for slot in slots]
            small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], averages)

        fake_workers.run(2, work)

    @pytest.mark.parametrize("average_non_trainable", [True, False])
    def test_all_that_is_not_trained_starts_as_the_chiefs(self, average_non_trainable):
        models = [small.model() for _ in range(2)]
        models[0].layers[0].trainable = models[1].layers[0].trainable = False
        models[1].set_weights([w + 1 for w in models[1].get_weights()])
        chiefs = models[0].get_weights()

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            small.fit(model, epochs=0, callbacks=[SynchronizeWorkers(average_non_trainable)])
            return model.get_weights()

        for weights in fake_workers.run(2, work):
            small.assert_same_bits(weights, chiefs)

    def test_what_is_frozen_keeps_its_bits(self):
        models = [small.model() for _ in range(3)]
        for model in models:
            model.layers[0].trainable = model.layers[1].trainable = False
            model.set_weights([w + 1.4 for w in model.get_weights()])
        before = [w for layer in models[0].layers[:2] for w in layer.get_weights()]

        def work(communicator):
            model = models[communicator.rank]
            optimizer = ModelAverage(inner(), interval_steps=1, communicator=communicator)
            model.compile(optimizer, "mse")
            small.fit(model, epochs=1, callbacks=[SynchronizeWorkers()])
            return [w for layer in model.layers[:2] for w in layer.get_weights()]

        for weights in fake_workers.run(3, work):
            small.assert_same_bits(weights, before)

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs step by step")
    def test_executions_of_several_steps(self):
        def optimizer(communicator):
            return ModelAverage(inner(), interval_steps=4, communicator=communicator)

        one = self.fit_shards((16, 16), optimizer)
        two = self.fit_shards((16, 16), optimizer, steps_per_execution=2)
        for a, b in zip(one, two, strict=True):
            for value, expected in zip(a.get_weights(), b.get_weights(), strict=True):
                np.testing.assert_allclose(value, expected, rtol=TOLERANCE, atol=TOLERANCE)

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs step by step")
    def test_an_interval_that_ends_within_an_execution_is_refused(self):
        with pytest.raises(
            ValueError, match=r"multiple of `steps_per_execution`.*interval_steps=3"
        ):
            self.fit_shards((16, 16), self.optimizer, steps_per_execution=2)

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs step by step")
    def test_executions_of_several_steps_under_loss_scaling_are_refused(self):
        optimizer = ModelAverage(inner(), interval_steps=4, communicator=Twin())
        scaled = optimizers.LossScaleOptimizer(optimizer)
        model = small.model(scaled, steps_per_execution=2)
        with pytest.raises(ValueError, match=r"loss scaling skips.*steps_per_execution=2"):
            small.fit(model, callbacks=[SynchronizeWorkers()])

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch trains eagerly")
    def test_a_forgotten_callback_is_noticed_at_the_trace(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            small.fit(model)

        with pytest.raises(RuntimeError, match=r"2 workers.*SynchronizeWorkers"):
            fake_workers.run(2, work)

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch trains eagerly")
    def test_a_callback_forgotten_the_second_time_is_noticed_at_the_end(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            small.fit(model, epochs=1, callbacks=[SynchronizeWorkers()])
            small.fit(model, epochs=1)

        with pytest.raises(RuntimeError, match=r"no round since step 6.*SynchronizeWorkers"):
            fake_workers.run(2, work)

    def test_a_state_loaded_between_two_fits_is_no_missed_round(self, tmp_path):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            small.fit(model, epochs=2, callbacks=[SynchronizeWorkers()])
            model.save_weights(tmp_path / f"{communicator.rank}.weights.h5")
            small.fit(model, epochs=1, callbacks=[SynchronizeWorkers()])
            model.load_weights(tmp_path / f"{communicator.rank}.weights.h5")
            small.fit(model, epochs=2, callbacks=[SynchronizeWorkers()])
            return int(model.optimizer.iterations), model.optimizer.num_snapshots

        assert fake_workers.run(2, work) == [(24, 8), (24, 8)]

    def test_a_loop_that_calls_the_callback_by_hand_ends_where_fit_ends(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model, first = models[communicator.rank], 16 * communicator.rank
            model.compile(self.optimizer(communicator), "mse")
            workers = SynchronizeWorkers()
            workers.set_model(model)
            workers.on_train_begin()
            for epoch in range(2):
                workers.on_epoch_begin(epoch)
                for batch in range(4):
                    part = slice(first + 4 * batch, first + 4 * batch + 4)
                    workers.on_train_batch_begin(batch)
                    model.train_on_batch(small.X[part], small.Y[part])
                    workers.on_train_batch_end(batch)
                workers.on_epoch_end(epoch)
            workers.on_train_end()
            return [small.numpy(w) for w in model.weights]

        results = fake_workers.run(2, work)
        for model, weights in zip(self.fit_shards((16, 16), self.optimizer), results, strict=True):
            for value, target in zip(weights, model.weights, strict=True):
                np.testing.assert_array_equal(value, small.numpy(target))

    @pytest.mark.parametrize("first", [True, False], ids=["first in the list", "last in the list"])
    def test_an_eager_loop_meets_again_after_a_fit_that_failed(self, first):
        models = [small.model() for _ in range(2)]

        class Fails(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                raise KeyError

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse", run_eagerly=True)
            callbacks = [SynchronizeWorkers(), Fails()]
            with pytest.raises(KeyError):
                small.fit(model, epochs=1, callbacks=callbacks[::-1] if first else callbacks)
            variables = model.trainable_variables
            zeros = [np.zeros(v.shape) for v in variables]
            small.apply(model.optimizer, variables, zeros, times=2)
            return model.optimizer.num_snapshots

        assert fake_workers.run(2, work) == [1, 1]

    @pytest.mark.parametrize("first", [True, False], ids=["first in the list", "last in the list"])
    @pytest.mark.parametrize("mistake", [KeyError, KeyboardInterrupt])
    def test_an_error_after_a_batch_with_a_round_is_not_replaced(self, mistake, first):
        class Fails(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 2:
                    raise mistake("mine")

        model = small.model(self.optimizer(Twin()))
        callbacks = [SynchronizeWorkers(), Fails()]
        with pytest.raises(mistake, match="mine"):
            small.fit(model, callbacks=callbacks[::-1] if first else callbacks)

    @pytest.mark.parametrize("mistake", [ValueError, TimeoutError, RuntimeError])
    def test_an_error_of_the_communicator_is_not_replaced(self, mistake):
        class Gone(Twin):
            def all_reduce_sum(self, arrays):
                if len(arrays) > 1 and model.optimizer.iterations > 0:
                    raise mistake("gone")
                return super().all_reduce_sum(arrays)

        model = small.model(self.optimizer(Gone()))
        with pytest.raises(mistake, match="gone"):
            small.fit(model, callbacks=[SynchronizeWorkers()])

    def test_a_chief_that_alone_has_trained_before_sees_that_workers_differ(self, tmp_path):
        small.fit(small.model(self.optimizer(None))).save_weights(tmp_path / "m.weights.h5")
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            model.optimizer.build(model.trainable_variables)
            if communicator.is_chief:
                model.load_weights(tmp_path / "m.weights.h5")
            with pytest.raises(ValueError, match=r"step. Received, by rank: \[12, 0\]"):
                small.fit(model, callbacks=[SynchronizeWorkers()])

        fake_workers.run(2, work)

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch trains eagerly")
    def test_a_callback_forgotten_after_a_fit_that_failed_is_noticed_at_the_end(self):
        class Fails(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                raise KeyError

        model = small.model(self.optimizer(Twin()))
        with pytest.raises(KeyError):
            small.fit(model, callbacks=[Fails(), SynchronizeWorkers()])
        with pytest.raises(RuntimeError, match=r"no round since step 0.*SynchronizeWorkers"):
            small.fit(model)

    @pytest.mark.parametrize("epochs", [2, 3])
    def test_training_goes_on_from_a_state_that_a_callback_loads(self, epochs, tmp_path):
        class Returns(keras.callbacks.Callback):
            """To the end of the first epoch, at the end of the second."""

            def on_epoch_end(self, epoch, logs=None):
                if epoch == 0:
                    self.model.save_weights(tmp_path / "first.weights.h5")
                elif epoch == 1:
                    self.model.load_weights(tmp_path / "first.weights.h5")

        def trained(epochs, *callbacks):
            model = small.model(self.optimizer(Twin()))
            callbacks = [SynchronizeWorkers(), *callbacks]
            return small.fit(model, epochs, batch_size=12, callbacks=callbacks)  # four batches

        model = trained(epochs, Returns())
        expected = trained(epochs - 1)
        small.assert_same_bits(model.get_weights(), expected.get_weights())
        assert model.optimizer.num_snapshots == epochs - 1  # after steps 3 and 6

    def test_a_worker_without_an_epoch_left_keeps_the_others_company(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            epochs = 1 if communicator.is_chief else 0
            small.fit(model, epochs=epochs, callbacks=[SynchronizeWorkers()])
            return [small.numpy(a) for a in small.slots(model.optimizer, model.trainable_variables)]

        small.assert_same_bits(*fake_workers.run(2, work))

    def test_averages_inside_are_as_many_on_all_workers(self):
        def optimizer(communicator):
            inside = SWA(inner(), start_averaging=4, average_period=1)
            return ModelAverage(inside, interval_steps=3, communicator=communicator)

        models = self.fit_shards((24, 12), optimizer, epochs=1)  # 6 and 3 steps
        wrappers = [model.optimizer.inner_optimizer for model in models]
        assert [wrapper.num_snapshots for wrapper in wrappers] == [2, 2]
        averages = (
            small.slots(w, m.trainable_variables) for w, m in zip(wrappers, models, strict=True)
        )
        small.assert_same_bits(*averages)

    def test_the_callback_alone_is_refused(self):
        with pytest.raises(ValueError, match=r"one keras_avg.ModelAverage.*Received: 0"):
            small.fit(small.model(SWA("sgd")), callbacks=[SynchronizeWorkers()])


class TestBackups:
    """Of epochs of four batches, and rounds after every third."""

    @staticmethod
    def fit(communicator, model, folder, *callbacks, batches=4):
        model.compile(TestInFit.optimizer(communicator), "mse")
        backup = keras.callbacks.BackupAndRestore(str(folder / str(communicator.rank)))
        callbacks = [SynchronizeWorkers(), backup, *callbacks]
        x, y = small.X[: 4 * batches], small.Y[: 4 * batches]
        model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)

    def test_who_has_finished_keeps_its_own_while_others_train(self, tmp_path):
        models, seen = [small.model() for _ in range(2)], []

        class Looks(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                seen.append((tmp_path / "0" / "latest.weights.h5").exists())

        def work(communicator):
            model = models[communicator.rank]
            if communicator.is_chief:  # it ends with the first round
                self.fit(communicator, model, tmp_path, batches=1)
            else:
                self.fit(communicator, model, tmp_path, Looks())

        fake_workers.run(2, work)
        assert seen[2]  # after two rounds
        assert not any((tmp_path / rank).exists() for rank in "01")

    def test_of_different_epochs_are_refused_and_those_of_one_worker_serve_all(self, tmp_path):
        class Dies(keras.callbacks.Callback):
            """After step 8, of which only the chief makes a backup."""

            def on_train_batch_end(self, batch, logs=None):
                if int(self.model.optimizer.iterations) == 8:
                    while not self.chief_is_ahead():
                        time.sleep(0.01)
                    raise KeyError("killed")

            def chief_is_ahead(self):
                with contextlib.suppress(OSError, ValueError):  # not there, half written
                    return json.loads(metadata.read_text())["epoch"] == 2

        def start(*callbacks_of_the_other):
            models = [small.model() for _ in range(2)]

            def work(communicator):
                model = models[communicator.rank]
                callbacks = () if communicator.is_chief else callbacks_of_the_other
                self.fit(communicator, model, tmp_path, *callbacks)
                return model

            return fake_workers.run(2, work)

        metadata = tmp_path / "0" / "training_metadata.json"
        with pytest.raises(KeyError, match="killed"):
            start(Dies())
        with pytest.raises(ValueError, match=r"step. Received, by rank: \[8, 4\].*the same file"):
            start()
        shutil.copytree(tmp_path / "0", tmp_path / "1", dirs_exist_ok=True)
        models = start()

        assert [int(m.optimizer.iterations) for m in models] == [12, 12]
        assert [m.optimizer.num_snapshots for m in models] == [4, 4]
        small.assert_same_bits(*(m.get_weights() for m in models))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_means_are_rounded_once(workers):
    """To the center, and to the variables from there."""
    sums = np.random.default_rng(workers).normal(size=(50, 20)).astype("float32")
    center, low = keras.Variable(np.zeros_like(sums)), keras.Variable(sums, dtype="bfloat16")
    variable = keras.Variable(np.zeros_like(sums))

    _backend.assign_quotients([sums], float(workers), [center], [low], [variable])

    np.testing.assert_array_equal(center, sums / np.float32(workers))
    np.testing.assert_array_equal(small.numpy(low), small.numpy(ops.cast(center, "bfloat16")))
    np.testing.assert_array_equal(variable, small.numpy(low).astype("float32"))


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**16 + 1, 3 * 2**16 - 1])
@pytest.mark.parametrize("workers", [2, 3])
def test_means_of_arrays_of_any_size(size, workers):
    sums = np.random.default_rng(size).normal(size=(1, size)).astype("float32")
    center, variable = keras.Variable(np.zeros_like(sums)), keras.Variable(np.ones_like(sums))

    _backend.assign_quotients([sums], float(workers), [center], [variable])

    for each in (center, variable):
        np.testing.assert_array_equal(small.numpy(each), sums / np.float32(workers))
    variable.assign(np.zeros_like(sums))  # each has memory of its own
    np.testing.assert_array_equal(small.numpy(center), sums / np.float32(workers))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="buffers are donated on JAX")
def test_means_have_buffers_of_their_own():
    sums = [np.full(2**14, number, "float32") for number in range(64)]  # some of them aligned
    centers = [keras.Variable(array) for array in sums]
    variables = [keras.Variable(array) for array in sums]

    _backend.assign_quotients(sums, 2.0, centers, variables)

    both = [*centers, *variables]
    assert len({v.value.unsafe_buffer_pointer() for v in both}) == len(both)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="about memory layouts of torch")
def test_means_reach_memory_that_is_not_contiguous():
    import torch

    sums = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    memory = torch.zeros(6, 4)
    variable = torch.nn.Parameter(memory.T, requires_grad=False)

    _backend.assign_quotients([sums], 2.0, [variable])

    np.testing.assert_array_equal(memory.numpy(), sums.T / 2)


def test_any_communicator_will_do():
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

    def test_in_their_models(self):
        def make(communicator):
            shape = (3,) if communicator.is_chief else (4,)
            optimizer = ModelAverage("sgd", communicator=communicator)
            return optimizer, [keras.Variable(np.zeros(shape))]

        assert "number of elements. Received, by rank: [3, 4]" in self.run(make)

    def test_in_shapes_alone(self):
        def make(communicator):
            shape = (2, 3) if communicator.is_chief else (3, 2)
            optimizer = ModelAverage("sgd", communicator=communicator)
            return optimizer, [keras.Variable(np.zeros(shape))]

        assert "differ in their shapes" in self.run(make)

    def test_in_their_interval(self):
        def make(communicator):
            optimizer = ModelAverage(
                "sgd", interval_steps=5 + communicator.rank, communicator=communicator
            )
            return optimizer, [keras.Variable([1.0])]

        assert "interval_steps. Received, by rank: [5, 6]" in self.run(make)

    def test_in_their_step(self):
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
    def test_out_of_range_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ModelAverage("sgd", **arguments)

    def test_one_optimizer_inside_and_outside_is_refused(self):
        twice = optimizers.SGD(0.5)
        with pytest.raises(ValueError, match="must be another optimizer than"):
            ModelAverage(MovingAverage(twice), outer_optimizer=twice)

    def test_two_optimizers_of_one_name_are_refused(self):
        inside, outside = (optimizers.SGD(rate, name="mine") for rate in (0.1, 0.7))
        with pytest.raises(ValueError, match="named 'mine'"):
            ModelAverage(inside, outer_optimizer=outside)

    def test_an_outer_optimizer_of_another_model_is_refused(self):
        outer = optimizers.SGD(0.7)
        first, second = (ModelAverage(inner(), outer_optimizer=outer) for _ in range(2))
        first.build([keras.Variable([1.0])])
        with pytest.raises(ValueError, match="was built for other variables"):
            second.build([keras.Variable([1.0])])
        assert not second.built

    def test_what_the_communicator_says_is_accepted(self):
        assert ModelAverage("sgd", num_worker=1, is_chief=True).communicator.size == 1

    @pytest.mark.parametrize("wrapper", [SWA, MovingAverage, Lookahead, ModelAverage])
    def test_another_wrapper_around_it_is_refused(self, wrapper):
        with pytest.raises(ValueError, match="ModelAverage must be the outermost"):
            wrapper(ModelAverage("sgd"))

    def test_the_config_has_what_does_not_depend_on_the_machine(self):
        outer = optimizers.SGD(0.7, momentum=0.9, nesterov=True)
        optimizer = ModelAverage(
            "adam", 1, True, 7, outer_optimizer=outer, start_step=3, inner_state="average"
        )
        config = optimizer.get_config()
        assert not {"communicator", "num_worker", "is_chief"} & config.keys()
        again = ModelAverage.from_config(config)
        assert again.get_config() == config
        assert again.outer_optimizer.momentum == 0.9


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
def test_what_is_no_communicator_is_refused(communicator):
    with pytest.raises(TypeError, match="`communicator` must have rank, size"):
        ModelAverage("sgd", communicator=communicator)
