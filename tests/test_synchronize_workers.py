"""SynchronizeWorkers: each worker runs `fit` on its own shard. Here the workers are threads."""

import contextlib
import json
import shutil
import time

import fake_workers
import keras
import numpy as np
import pytest
import small_training as small
from fake_workers import Twin
from keras import optimizers
from test_model_average import TOLERANCE, inner

import keras_avg
from keras_avg import SWA, Lookahead, ModelAverage, _keras_internals
from keras_avg.callbacks import SwapAverageWeights, SynchronizeWorkers


class TestInFit:
    """Workers in threads run `fit`, each on its own shard."""

    def fit_shards(self, sizes, make_optimizer, *more_callbacks, epochs=2, **compile_arguments):
        models = [small.model() for _ in sizes]
        if len(sizes) > 1:
            # These values must not matter, because all workers take the chief's.
            models[1].set_weights([w + 1 for w in models[1].get_weights()])

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
        """The same training with plain models, and with rounds in NumPy."""
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

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize("sizes", [(16, 16), (16, 8, 12)], ids=["even", "uneven"])
    def test_workers_end_with_the_weights_of_the_numpy_oracle(self, sizes):
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

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_one_worker_needs_no_callback(self):
        (alone,) = self.fit_shards((16,), self.optimizer)
        plain = small.model(inner())
        plain.fit(small.X[:16], small.Y[:16], batch_size=4, epochs=2, shuffle=False, verbose=0)
        small.assert_same_bits(alone.get_weights(), plain.get_weights())
        assert alone.optimizer.num_snapshots == 2

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_one_worker_with_an_outer_optimizer_trains_like_lookahead(self):
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

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_the_center_is_evaluated_and_saved(self, tmp_path):
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

    def test_statistics_are_averaged_unless_the_argument_says_no(self):
        models = self.fit_shards((12, 12), self.optimizer, epochs=1)
        small.assert_same_bits(*(m.get_weights() for m in models))

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("swap_first", [True, False], ids=["before", "behind"])
    @pytest.mark.parametrize("sizes", [(2, 6), (9, 3)], ids=["before a round", "after some"])
    def test_a_worker_that_finishes_first_ends_with_the_last_center_and_its_statistics(
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

    @pytest.mark.slow_on("jax")
    def test_a_worker_that_finishes_first_ends_with_the_average_of_use_ema(self):
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
    def test_variables_that_are_not_trained_start_with_the_chiefs_values(
        self, average_non_trainable
    ):
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

    @pytest.mark.slow_on("jax")
    def test_frozen_variables_keep_their_bits(self):
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

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs step by step")
    def test_rounds_work_with_several_steps_per_execution(self):
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
    def test_a_missing_callback_is_an_error_when_the_step_is_traced(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            small.fit(model)

        with pytest.raises(RuntimeError, match=r"2 workers.*SynchronizeWorkers"):
            fake_workers.run(2, work)

    @pytest.mark.slow_on("jax")
    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch trains eagerly")
    def test_a_callback_that_is_missing_in_the_second_fit_is_an_error_at_its_end(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            small.fit(model, epochs=1, callbacks=[SynchronizeWorkers()])
            small.fit(model, epochs=1)

        with pytest.raises(RuntimeError, match=r"no round since step 6.*SynchronizeWorkers"):
            fake_workers.run(2, work)

    @pytest.mark.slow_on("tensorflow")
    def test_a_state_that_is_loaded_between_two_fits_is_not_a_missed_round(self, tmp_path):
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

    @pytest.mark.slow_on("tensorflow")
    def test_a_loop_that_calls_the_callback_by_hand_gives_the_weights_of_fit(self):
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

    @pytest.mark.slow_on("tensorflow")
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

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_chief_that_has_trained_alone_is_an_error_on_every_worker(self, tmp_path):
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

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch trains eagerly")
    def test_a_callback_that_is_missing_after_a_failed_fit_is_an_error_at_the_end(self):
        class Fails(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                raise KeyError

        model = small.model(self.optimizer(Twin()))
        with pytest.raises(KeyError):
            small.fit(model, callbacks=[Fails(), SynchronizeWorkers()])
        with pytest.raises(RuntimeError, match=r"no round since step 0.*SynchronizeWorkers"):
            small.fit(model)

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize("epochs", [2, 3])
    def test_training_goes_on_from_a_state_that_another_callback_loads(self, epochs, tmp_path):
        class Returns(keras.callbacks.Callback):
            """At the end of the second epoch, it loads the state of the end of the first."""

            def on_epoch_end(self, epoch, logs=None):
                if epoch == 0:
                    self.model.save_weights(tmp_path / "first.weights.h5")
                elif epoch == 1:
                    self.model.load_weights(tmp_path / "first.weights.h5")

        def trained(epochs, *callbacks):
            model = small.model(self.optimizer(Twin()))
            callbacks = [SynchronizeWorkers(), *callbacks]
            # An epoch has four batches.
            return small.fit(model, epochs, batch_size=12, callbacks=callbacks)

        model = trained(epochs, Returns())
        expected = trained(epochs - 1)
        small.assert_same_bits(model.get_weights(), expected.get_weights())
        assert model.optimizer.num_snapshots == epochs - 1  # The rounds are after steps 3 and 6.

    def test_a_worker_without_an_epoch_left_joins_the_rounds_of_the_others(self):
        models = [small.model() for _ in range(2)]

        def work(communicator):
            model = models[communicator.rank]
            model.compile(self.optimizer(communicator), "mse")
            epochs = 1 if communicator.is_chief else 0
            small.fit(model, epochs=epochs, callbacks=[SynchronizeWorkers()])
            return [small.numpy(a) for a in small.slots(model.optimizer, model.trainable_variables)]

        small.assert_same_bits(*fake_workers.run(2, work))

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_inner_averages_have_the_same_number_of_snapshots_on_all_workers(self):
        def optimizer(communicator):
            inside = SWA(inner(), start_averaging=4, average_period=1)
            return ModelAverage(inside, interval_steps=3, communicator=communicator)

        models = self.fit_shards((24, 12), optimizer, epochs=1)  # The workers take 6 and 3 steps.
        wrappers = [model.optimizer.inner_optimizer for model in models]
        assert [wrapper.num_snapshots for wrapper in wrappers] == [2, 2]
        averages = (
            small.slots(w, m.trainable_variables) for w, m in zip(wrappers, models, strict=True)
        )
        small.assert_same_bits(*averages)

    def test_the_callback_without_a_model_average_is_refused(self):
        with pytest.raises(ValueError, match=r"one keras_avg.ModelAverage.*Received: 0"):
            small.fit(small.model(SWA("sgd")), callbacks=[SynchronizeWorkers()])


class TestBackups:
    """Backups in epochs of four batches, with a round after every third batch."""

    @staticmethod
    def fit(communicator, model, folder, *callbacks, batches=4):
        model.compile(TestInFit.optimizer(communicator), "mse")
        backup = keras.callbacks.BackupAndRestore(str(folder / str(communicator.rank)))
        callbacks = [SynchronizeWorkers(), backup, *callbacks]
        x, y = small.X[: 4 * batches], small.Y[: 4 * batches]
        model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)

    @pytest.mark.slow_on("tensorflow")
    def test_a_worker_that_has_finished_keeps_its_backup_while_others_train(self, tmp_path):
        models, seen = [small.model() for _ in range(2)], []

        class Looks(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                seen.append((tmp_path / "0" / "latest.weights.h5").exists())

        def work(communicator):
            model = models[communicator.rank]
            if communicator.is_chief:  # It ends with the first round.
                self.fit(communicator, model, tmp_path, batches=1)
            else:
                self.fit(communicator, model, tmp_path, Looks())

        fake_workers.run(2, work)
        assert seen[2]  # This was after two rounds.
        assert not any((tmp_path / rank).exists() for rank in "01")

    @pytest.mark.slow_on("tensorflow")
    def test_backups_of_different_epochs_are_refused_and_one_workers_backup_serves_all(
        self, tmp_path
    ):
        class Dies(keras.callbacks.Callback):
            """Dies after step 8. Only the chief makes a backup of this step."""

            def on_train_batch_end(self, batch, logs=None):
                if int(self.model.optimizer.iterations) == 8:
                    while not self.chief_is_ahead():
                        time.sleep(0.01)
                    raise KeyError("killed")

            def chief_is_ahead(self):
                # The file may not exist yet, or may be written just now.
                with contextlib.suppress(OSError, ValueError):
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


class MovesTheClock(keras.callbacks.Callback):
    """Moves the optimizer's counter by a step, without a call of the other callbacks."""

    def __init__(self, at_end_of_epoch):
        super().__init__()
        self.at_end_of_epoch = at_end_of_epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.at_end_of_epoch:
            self.model.optimizer.inner_optimizer.iterations.assign_add(1)


@pytest.mark.parametrize(("epoch", "due"), [(0, 7), (1, 13)])
def test_a_due_round_that_did_not_take_place_is_an_error(epoch, due):
    optimizer = ModelAverage(inner(), interval_steps=due, communicator=Twin())
    callbacks = [SynchronizeWorkers(), MovesTheClock(epoch)]
    with pytest.raises(RuntimeError, match=f"was due after step {due} and did not take place"):
        small.fit(small.model(optimizer), epochs=2, callbacks=callbacks)
