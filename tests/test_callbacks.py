"""Callbacks evaluate and save the averages, and training of the raw weights does not change."""

import warnings

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

import keras_avg
from keras_avg import SWA, MovingAverage
from keras_avg.callbacks import AverageModelCheckpoint, SwapAverageWeights, swap_average_weights

VALIDATION = (small.X[:20], small.Y[:20])
TOLERANCE = 1e-6  # of a loss on the same weights, computed with batches of two sizes


def swa():
    return SWA(MovingAverage(optimizers.Adam(0.02)), start_averaging=3, average_period=2)


def fit(model, *callbacks, epochs=3, **arguments):
    arguments = {"validation_data": VALIDATION} | arguments
    return small.fit(model, epochs=epochs, callbacks=list(callbacks), **arguments)


def trainable(model):
    return [small.numpy(v) for v in model.trainable_variables]


def averages(model):
    return small.slots(keras_avg.averaging_optimizers(model)[0], model.trainable_variables)


def loss(model):
    return model.evaluate(*VALIDATION, verbose=0)


class Records(keras.callbacks.Callback):
    """Records at each hook which values the model holds."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _see(self, hook):
        (wrapper, *_) = keras_avg.averaging_optimizers(self.model)
        self.seen.append((hook, wrapper.averages_in_model))

    def on_epoch_begin(self, epoch, logs=None):
        self._see("epoch begins")

    def on_test_begin(self, logs=None):
        self._see("validation begins")

    def on_test_end(self, logs=None):
        self._see("validation ends")

    def on_epoch_end(self, epoch, logs=None):
        self._see("epoch ends")

    def on_train_end(self, logs=None):
        self._see("training ends")


class TestWhatTheModelHolds:
    @pytest.mark.slow_on("jax")
    def test_the_model_holds_averages_from_validation_to_the_next_epoch(self):
        records = Records()
        fit(small.model(swa()), SwapAverageWeights(), records, epochs=2)
        epoch = [
            ("epoch begins", False),
            ("validation begins", True),
            ("validation ends", True),
            ("epoch ends", True),
        ]
        assert records.seen == [*epoch, *epoch, ("training ends", True)]

    @pytest.mark.slow_on("tensorflow")
    def test_raw_weights_come_back_after_validation_if_asked(self):
        records = Records()
        fit(small.model(swa()), SwapAverageWeights(swap_on_epoch=False), records, epochs=1)
        assert records.seen == [
            ("epoch begins", False),
            ("validation begins", True),
            ("validation ends", False),
            ("epoch ends", False),
            ("training ends", True),
        ]

    @pytest.mark.slow_on("tensorflow")
    def test_the_model_holds_averages_from_the_end_of_an_epoch_without_validation(self):
        records = Records()
        callbacks = [SwapAverageWeights(), records]
        fit(small.model(swa()), *callbacks, epochs=2, validation_data=None)
        epoch = [("epoch begins", False), ("epoch ends", True)]
        assert records.seen == [*epoch, *epoch, ("training ends", True)]

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_validation_metrics_are_those_of_the_averages(self):
        model = fit(small.model(swa()), SwapAverageWeights())
        assert model.optimizer.averages_in_model
        small.assert_same_bits(trainable(model), averages(model))
        logged = model.history.history["val_loss"][-1]
        np.testing.assert_allclose(logged, loss(model), rtol=TOLERANCE)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_the_next_fit_goes_on_from_the_raw_weights(self):
        through, twice = small.model(swa()), small.model(swa())
        fit(through, SwapAverageWeights(), epochs=4)
        for _ in range(2):
            fit(twice, SwapAverageWeights(), epochs=2)
        small.assert_same_bits(twice.get_weights(), through.get_weights())


@pytest.mark.sample(2)
@pytest.mark.parametrize("epoch_end", [True, False])
@pytest.mark.parametrize("validation", [VALIDATION, None], ids=["validated", "not validated"])
def test_training_is_the_same_with_and_without_swap_average_weights(epoch_end, validation):
    plain = fit(small.model(swa()), validation_data=validation)
    callback = SwapAverageWeights(swap_on_epoch=epoch_end, batch_norm_data=small.X)
    judged = fit(small.model(swa()), callback, validation_data=validation)

    judged.optimizer.swap_weights()

    small.assert_same_bits(judged.get_weights(), plain.get_weights())
    small.assert_same_bits(judged.optimizer.get_weights(), plain.optimizer.get_weights())


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize("arguments", [{"batch_norm_data": small.X}, {"log_raw": True}])
def test_recomputed_statistics_do_not_change_the_order_of_later_batches(arguments):
    plain = fit(small.model(swa()), shuffle=True)
    judged = fit(small.model(swa()), SwapAverageWeights(**arguments), shuffle=True)
    judged.optimizer.swap_weights()
    small.assert_same_bits(judged.get_weights(), plain.get_weights())


class TestStandAlone:
    def test_evaluate_and_predict_use_averages_and_restore_raw_weights(self):
        model = fit(small.model(swa()))
        raw, raw_loss = model.get_weights(), loss(model)
        with model.optimizer.average_weights():
            average_loss = loss(model)
            average_prediction = model.predict(small.X, verbose=0)
        assert abs(average_loss - raw_loss) > 1e-4

        callback = SwapAverageWeights()
        seen = model.evaluate(*VALIDATION, verbose=0, callbacks=[callback])
        prediction = model.predict(small.X, verbose=0, callbacks=[callback])

        assert seen == average_loss
        np.testing.assert_array_equal(prediction, average_prediction)
        assert not model.optimizer.averages_in_model
        small.assert_same_bits(model.get_weights(), raw)

    def test_evaluate_leaves_averages_that_were_in_the_model(self):
        model = fit(small.model(swa()), SwapAverageWeights())
        model.evaluate(*VALIDATION, verbose=0, callbacks=[SwapAverageWeights()])
        model.predict(small.X, verbose=0, callbacks=[SwapAverageWeights()])
        assert model.optimizer.averages_in_model

    def test_the_next_evaluate_after_an_exception_restores_the_raw_weights(self):
        model = fit(small.model(swa()))
        raw = model.get_weights()
        callback = SwapAverageWeights()

        class Fails(keras.callbacks.Callback):
            def on_test_batch_end(self, batch, logs=None):
                raise KeyError

        with pytest.raises(KeyError):
            model.evaluate(*VALIDATION, verbose=0, callbacks=[callback, Fails()])
        if keras.backend.backend() == "jax":  # Keras leaves the model without values there.
            model.jax_state_sync()
        assert model.optimizer.averages_in_model

        model.evaluate(*VALIDATION, verbose=0, callbacks=[callback])

        assert not model.optimizer.averages_in_model
        small.assert_same_bits(model.get_weights(), raw)


class TestBeforeTheFirstSnapshot:
    @pytest.mark.slow_on("tensorflow")
    def test_callbacks_see_raw_weights_before_the_first_snapshot(self):
        model = small.model(SWA("adam", start_averaging=1000))
        records = Records()
        with pytest.warns(UserWarning, match=r"without a snapshot.*=1000.*6 updates"):
            fit(model, SwapAverageWeights(), records, epochs=1)
        assert not any(averages_in for _, averages_in in records.seen)

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize(
        ("optimizer", "epochs", "is_too_short"),
        [
            (lambda: SWA("sgd", start_averaging=12), 2, True),
            (lambda: SWA("sgd", start_averaging=11), 2, False),
            (lambda: SWA("sgd", start_averaging=12), 3, False),
            (lambda: SWA(optimizers.SGD(gradient_accumulation_steps=2), 6), 2, True),
            (lambda: SWA(optimizers.SGD(gradient_accumulation_steps=2), 5), 2, False),
            (lambda: MovingAverage("sgd", average_period=13), 2, True),
            (lambda: SWA(MovingAverage("sgd", average_period=12), start_averaging=99), 2, False),
        ],
    )
    def test_training_that_is_too_short_gives_a_warning_when_it_begins(
        self, optimizer, epochs, is_too_short
    ):
        model, told_after = small.model(optimizer()), []

        class Notes(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                told_after.append(len(caught))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model, SwapAverageWeights(), Notes(), epochs=epochs)
        ours = [str(w.message) for w in caught if "without a snapshot" in str(w.message)]
        assert len(ours) == is_too_short
        if is_too_short:
            assert told_after[0] > 0
            assert "Training will end without a snapshot" in ours[0]
            assert f"after {int(model.optimizer.iterations)} updates" in ours[0]

    @pytest.mark.slow_on("jax")
    def test_updates_of_a_loaded_optimizer_count_for_the_warning(self):
        model = small.fit(small.model(SWA("sgd", start_averaging=12)), epochs=2)
        fit(model, SwapAverageWeights(), epochs=1)
        assert model.optimizer.num_snapshots == 1

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_the_outermost_wrapper_with_a_snapshot_is_used(self):
        moving_average = MovingAverage("adam")
        model = small.model(SWA(moving_average, start_averaging=8))
        seen = []

        class Looks(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                seen.append((moving_average.averages_in_model, model.optimizer.averages_in_model))

        fit(model, SwapAverageWeights(), Looks(), epochs=2)
        assert seen == [(True, False), (False, True)]

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_the_wrapper_given_as_argument_is_used(self):
        moving_average = MovingAverage("adam")
        model = small.model(SWA(moving_average, 0, 1))
        fit(model, SwapAverageWeights(optimizer=moving_average))
        assert moving_average.averages_in_model
        assert not model.optimizer.averages_in_model


class TestWrappersAreFound:
    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_wrapper_under_a_loss_scale_optimizer_is_found(self, dtype_policy):
        dtype_policy("mixed_float16")
        model = fit(small.model(SWA("adam", 0, 1)), SwapAverageWeights())
        assert isinstance(model.optimizer, optimizers.LossScaleOptimizer)
        assert model.optimizer.inner_optimizer.averages_in_model

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.skipif(
        not hasattr(optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
    )
    def test_wrappers_among_the_members_of_a_multi_optimizer_are_found(self):
        members = optimizers.OptimizerMap(SWA("sgd", 0, 1), {".*bias": MovingAverage("adam")})
        model = fit(small.model(optimizers.MultiOptimizer(members)), SwapAverageWeights())
        assert all(w.averages_in_model for w in keras_avg.averaging_optimizers(model))

    def test_a_model_without_a_wrapper_is_an_error(self):
        with pytest.raises(ValueError, match="SwapAverageWeights needs a model whose optimizer"):
            fit(small.model("sgd"), SwapAverageWeights())
        with pytest.raises(ValueError, match="is not at work in the model"):
            fit(small.model(SWA("sgd")), SwapAverageWeights(optimizer=SWA("sgd")))


class TestTogetherWithOtherCallbacks:
    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("first", [True, False])
    def test_the_best_checkpoint_has_the_loss_that_was_logged(self, first, tmp_path):
        path = tmp_path / "best.keras"
        checkpoint = keras.callbacks.ModelCheckpoint(str(path), save_best_only=True)
        callbacks = [SwapAverageWeights(), checkpoint]
        model = fit(small.model(swa()), *(callbacks if first else callbacks[::-1]), epochs=4)

        loaded = keras.saving.load_model(path)

        best = min(model.history.history["val_loss"])
        np.testing.assert_allclose(loss(loaded), best, rtol=TOLERANCE)
        assert loaded.optimizer.averages_in_model
        small.assert_same_bits(trainable(loaded), averages(loaded))
        fit(loaded, SwapAverageWeights())  # training goes on

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("first", [True, False])
    def test_early_stopping_restores_the_averages_that_were_best(self, first):
        stopping = keras.callbacks.EarlyStopping(
            patience=1, restore_best_weights=True, baseline=None, min_delta=0.0
        )
        rising = keras.callbacks.LearningRateScheduler(lambda epoch: 0.001 * 30.0**epoch)
        callbacks = [SwapAverageWeights(), stopping]
        optimizer = MovingAverage(optimizers.SGD(0.001), average_decay=0.5)
        model = small.model(optimizer)

        fit(model, rising, *(callbacks if first else callbacks[::-1]), epochs=10)

        history = model.history.history["val_loss"]
        assert len(history) < 10
        np.testing.assert_allclose(loss(model), min(history), rtol=TOLERANCE)

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.sample(2)
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("arguments", [{}, {"batch_norm_data": small.X}])
    def test_without_validation_early_stopping_leaves_averages_too(self, first, arguments):
        stopping = keras.callbacks.EarlyStopping(
            monitor="loss", mode="max", patience=1, restore_best_weights=True
        )
        callbacks = [SwapAverageWeights(**arguments), stopping]
        seen = []

        class Looks(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                seen.append(averages(self.model))

        model = small.model(swa())
        callbacks = callbacks if first else callbacks[::-1]
        fit(model, *callbacks, Looks(), epochs=4, validation_data=None)

        assert len(seen) == 2
        assert model.optimizer.averages_in_model
        small.assert_same_bits(trainable(model), seen[0] if first else seen[1])
        plain = fit(small.model(swa()), epochs=2)
        model.optimizer.swap_weights()
        small.assert_same_bits(trainable(model), trainable(plain))

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("first", [True, False])
    def test_a_backup_resumes_from_the_raw_weights(self, first, tmp_path):
        class Dies(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                if self.epoch == 2 and batch == 3:
                    raise KeyboardInterrupt

            def on_epoch_begin(self, epoch, logs=None):
                self.epoch = epoch

        def callbacks():
            backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
            pair = [SwapAverageWeights(batch_norm_data=small.X), backup]
            return pair if first else pair[::-1]

        undisturbed = fit(small.model(swa()), SwapAverageWeights(batch_norm_data=small.X), epochs=4)
        with pytest.raises(KeyboardInterrupt):
            fit(small.model(swa()), *callbacks(), Dies(), epochs=4)
        resumed = fit(small.model(swa()), *callbacks(), epochs=4)

        for model in (undisturbed, resumed):
            model.optimizer.swap_weights()
        small.assert_same_bits(resumed.get_weights(), undisturbed.get_weights())
        small.assert_same_bits(resumed.optimizer.get_weights(), undisturbed.optimizer.get_weights())

    def test_reduce_lr_on_plateau_follows_the_averages(self):
        plateau = keras.callbacks.ReduceLROnPlateau(patience=0, min_delta=1e9, factor=0.5)
        model = small.model(MovingAverage(optimizers.SGD(0.1)))
        fit(model, SwapAverageWeights(), plateau, epochs=3)
        np.testing.assert_allclose(model.optimizer.learning_rate, 0.1 * 0.5**2)

    @pytest.mark.slow_on("tensorflow")
    def test_swap_average_weights_works_with_several_steps_per_execution(self):
        if keras.backend.backend() == "torch":
            pytest.skip("torch runs one step per execution")
        one = fit(small.model(swa()), SwapAverageWeights())
        three = fit(small.model(swa(), steps_per_execution=3), SwapAverageWeights())
        assert three.optimizer.num_snapshots == one.optimizer.num_snapshots
        small.assert_same_bits(averages(three), averages(one))


@pytest.mark.slow_on("tensorflow")
def test_the_callback_may_be_used_inside_its_own_fit():
    seen = []
    callback = SwapAverageWeights()

    class Predicts(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(keras_avg.averaging_optimizers(self.model)[0].averages_in_model)
            self.model.predict(small.X, verbose=0, callbacks=[callback])

    fit(small.model(SWA("sgd", 0, 1)), callback, Predicts())
    assert seen == [True, True, True]


@pytest.mark.slow_on("tensorflow")
def test_statistics_are_recomputed_after_other_weights_were_loaded(tmp_path):
    def trained_after(callback):
        model = small.model(MovingAverage("sgd"))
        model.optimizer.build(model.trainable_variables)
        model.save_weights(tmp_path / "initial.weights.h5")
        fit(model, callback, epochs=1)
        model.load_weights(tmp_path / "initial.weights.h5")
        model.fit(
            -3 * small.X, small.Y, batch_size=8, verbose=0, shuffle=False, callbacks=[callback]
        )
        return model.get_weights()

    class Forgets(SwapAverageWeights):
        def on_epoch_begin(self, epoch, logs=None):
            super().on_epoch_begin(epoch, logs)
            self._recomputed = None

    small.assert_same_bits(
        trained_after(SwapAverageWeights(batch_norm_data=small.X)),
        trained_after(Forgets(batch_norm_data=small.X)),
    )


class TestLogRaw:
    @pytest.mark.slow_on("tensorflow")
    def test_log_raw_logs_metrics_of_both_copies(self):
        raw = fit(small.model(swa())).history.history
        model = fit(small.model(swa()), SwapAverageWeights(log_raw=True))
        both = model.history.history

        assert set(both) == {"loss", "val_loss", "val_raw_loss"}
        np.testing.assert_allclose(both["val_raw_loss"], raw["val_loss"], rtol=TOLERANCE)
        assert np.all(np.abs(np.subtract(both["val_loss"], both["val_raw_loss"]))[1:] > 0)
        assert model.optimizer.averages_in_model

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_logged_metrics_of_both_copies_are_equal_before_the_first_snapshot(self):
        model = small.model(SWA("adam", start_averaging=8))
        history = fit(model, SwapAverageWeights(log_raw=True), epochs=2).history.history
        assert history["val_loss"][0] == history["val_raw_loss"][0]
        assert history["val_loss"][1] != history["val_raw_loss"][1]

    @pytest.mark.slow_on("tensorflow")
    def test_the_progress_bar_shows_metrics_of_both_copies(self, capsys):
        fit(small.model(swa()), SwapAverageWeights(log_raw=True), verbose=2)
        lines = [line for line in capsys.readouterr().out.splitlines() if "val_loss" in line]
        assert len(lines) == 3
        assert all("val_raw_loss" in line for line in lines)

    def test_log_raw_refuses_validation_data_from_a_generator(self):
        def batches():
            while True:
                yield VALIDATION

        callback = SwapAverageWeights(log_raw=True)
        with pytest.raises(ValueError, match=r"twice.*Received: validation data from a Python gen"):
            fit(small.model(swa()), callback, validation_data=batches(), validation_steps=1)

    @pytest.mark.slow_on("tensorflow")
    def test_log_raw_logs_nothing_without_validation(self):
        model = small.model(swa())
        fit(model, SwapAverageWeights(log_raw=True), validation_data=None)
        assert set(model.history.history) == {"loss"}


class TestBatchNormalization:
    @pytest.mark.slow_on("tensorflow")
    def test_statistics_of_the_averages_are_swapped_together_with_them(self):
        model = fit(small.model(swa()), SwapAverageWeights(batch_norm_data=small.X))
        norm = model.get_layer("norm")
        seen = [small.numpy(norm.moving_mean), small.numpy(norm.moving_variance)]

        keras_avg.update_batch_norm(model, small.X)
        expected = [small.numpy(norm.moving_mean), small.numpy(norm.moving_variance)]
        small.assert_same_bits(seen, expected)

        model.optimizer.swap_weights()
        plain = fit(small.model(swa()))
        small.assert_same_bits(model.get_weights(), plain.get_weights())

    @pytest.mark.slow_on("tensorflow")
    def test_statistics_are_recomputed_once_for_each_average(self, monkeypatch):
        passes = []

        def counted(*args, **kwargs):
            passes.append(1)
            keras_avg.update_batch_norm(*args, **kwargs)

        monkeypatch.setattr(swap_average_weights, "update_batch_norm", counted)
        callback = SwapAverageWeights(batch_norm_data=small.X)
        model = fit(small.model(swa()), callback, epochs=2)
        assert len(passes) == 2
        for _ in range(2):
            model.evaluate(*VALIDATION, verbose=0, callbacks=[callback])
        assert len(passes) == 2

    @pytest.mark.slow_on("tensorflow")
    def test_statistics_are_recomputed_for_averages_that_were_loaded(self):
        model, other = fit(small.model(swa())), fit(small.model(swa()), shuffle=True)
        assert model.optimizer.num_snapshots == other.optimizer.num_snapshots
        callback = SwapAverageWeights(batch_norm_data=small.X)
        model.evaluate(*VALIDATION, verbose=0, callbacks=[callback])

        model.set_weights(other.get_weights())
        model.optimizer.set_weights(other.optimizer.get_weights())

        afresh = SwapAverageWeights(batch_norm_data=small.X)
        expected = other.evaluate(*VALIDATION, verbose=0, callbacks=[afresh])
        assert model.evaluate(*VALIDATION, verbose=0, callbacks=[callback]) == expected

    def test_batch_norm_data_that_can_be_read_only_once_is_refused(self):
        class Endless(keras.utils.PyDataset):
            num_batches = None

        for data in ((small.X,) for _ in range(3)), Endless():
            kind = type(data).__name__
            with pytest.raises(ValueError, match=f"Received: batch_norm_data of type {kind}"):
                SwapAverageWeights(batch_norm_data=data)

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.sample(1)
    @pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
    def test_a_file_restores_the_statistics_of_the_raw_weights(self, name, tmp_path):
        model = fit(small.model(swa()), SwapAverageWeights(batch_norm_data=small.X))
        if name == "model.keras":
            model.save(tmp_path / name)
            loaded = keras.saving.load_model(tmp_path / name)
        else:
            model.save_weights(tmp_path / name)
            loaded = small.model(swa())
            loaded.optimizer.build(loaded.trainable_variables)
            loaded.load_weights(tmp_path / name)
        small.assert_same_bits(loaded.get_weights(), model.get_weights())

        for each in (model, loaded):
            each.optimizer.swap_weights()
        small.assert_same_bits(loaded.get_weights(), model.get_weights())

        for each in (model, loaded):
            fit(each)
        small.assert_same_bits(loaded.get_weights(), model.get_weights())
        small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_the_callback_swaps_back_a_state_that_was_loaded_without_its_model(self):
        model = fit(small.model(swa()), SwapAverageWeights(batch_norm_data=small.X))
        store, loaded = {}, small.model(swa())
        model.optimizer.save_own_variables(store)
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.set_weights(model.get_weights())
        loaded.optimizer.set_weights(model.optimizer.get_weights())
        loaded.optimizer.load_own_variables(store)
        with pytest.raises(RuntimeError, match=r"let .*SwapAverageWeights swap back"):
            loaded.optimizer.swap_weights()

        for each in (model, loaded):
            fit(each, SwapAverageWeights(batch_norm_data=small.X))

        small.assert_same_bits(loaded.get_weights(), model.get_weights())
        small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("jax", "tensorflow")
def test_use_ema_writes_its_average_into_the_raw_weights():
    def trained(*callbacks):
        inner = optimizers.Adam(0.02, use_ema=True, ema_momentum=0.5)
        return fit(small.model(SWA(inner, 3, 2)), *callbacks)

    plain, model = trained(), trained(SwapAverageWeights())

    small.assert_same_bits(trainable(model), averages(model))
    model.optimizer.swap_weights()
    small.assert_same_bits(model.get_weights(), plain.get_weights())
    small.assert_same_bits(model.optimizer.get_weights(), plain.optimizer.get_weights())


class TestAverageModelCheckpoint:
    def test_average_model_checkpoint_without_an_averaging_optimizer_is_a_type_error(
        self, tmp_path
    ):
        callback = AverageModelCheckpoint(True, str(tmp_path / "m.keras"))
        with pytest.raises(TypeError, match="AverageModelCheckpoint is only used when training"):
            fit(small.model("rmsprop"), callback)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_checkpoint_holds_the_averages_while_training_goes_on_from_raw_weights(
        self, tmp_path
    ):
        plain = fit(small.model(swa()))
        callback = AverageModelCheckpoint(False, tmp_path / "m.{epoch}.keras")

        model = fit(small.model(swa()), callback)

        small.assert_same_bits(model.get_weights(), plain.get_weights())
        saved = keras.saving.load_model(tmp_path / "m.3.keras")
        small.assert_same_bits(trainable(saved), averages(model))
        saved.optimizer.swap_weights()
        small.assert_same_bits(saved.get_weights(), model.get_weights())

    @pytest.mark.slow_on("tensorflow")
    def test_training_goes_on_from_the_averages_with_update_weights(self, tmp_path):
        callback = AverageModelCheckpoint(True, tmp_path / "m.{epoch}.keras")

        model = fit(small.model(swa()), callback, epochs=1)

        small.assert_same_bits(trainable(model), averages(model))
        saved = keras.saving.load_model(tmp_path / "m.1.keras")
        small.assert_same_bits(saved.get_weights(), model.get_weights())
        assert not saved.optimizer.averages_in_model

    @pytest.mark.slow_on("tensorflow")
    def test_no_average_is_assigned_when_no_file_is_written(self, tmp_path):
        plain = fit(small.model(swa()))
        callback = AverageModelCheckpoint(
            True, tmp_path / "m.keras", save_best_only=True, initial_value_threshold=-1.0
        )
        model = fit(small.model(swa()), callback)
        small.assert_same_bits(model.get_weights(), plain.get_weights())
        assert not (tmp_path / "m.keras").exists()

    @pytest.mark.slow_on("tensorflow")
    def test_before_the_first_snapshot_raw_weights_are_saved_with_one_warning(self, tmp_path):
        callback = AverageModelCheckpoint(False, tmp_path / "m.{epoch}.keras")
        with pytest.warns(UserWarning, match="raw weights until there is a first") as warned:
            model = fit(small.model(SWA("adam", 1000)), callback)
        assert len([w for w in warned if "first snapshot" in str(w.message)]) == 1
        saved = keras.saving.load_model(tmp_path / "m.3.keras")
        small.assert_same_bits(saved.get_weights(), model.get_weights())

    @pytest.mark.slow_on("tensorflow")
    def test_a_checkpoint_every_few_batches_does_not_change_training(self, tmp_path):
        callback = AverageModelCheckpoint(
            False, tmp_path / "m.weights.h5", save_freq=4, save_weights_only=True
        )
        plain = fit(small.model(swa()), epochs=1)
        model = fit(small.model(swa()), callback, epochs=1)
        assert (tmp_path / "m.weights.h5").exists()
        small.assert_same_bits(model.get_weights(), plain.get_weights())

    @pytest.mark.slow_on("tensorflow")
    def test_a_checkpoint_saves_the_averages_that_were_evaluated(self, tmp_path):
        callback = AverageModelCheckpoint(False, tmp_path / "m.keras", save_best_only=True)
        model = fit(small.model(swa()), callback, SwapAverageWeights(), epochs=3)
        saved = keras.saving.load_model(tmp_path / "m.keras")
        best = min(model.history.history["val_loss"])
        np.testing.assert_allclose(loss(saved), best, rtol=TOLERANCE)

    def test_an_unknown_save_frequency_is_refused_as_in_keras(self):
        with pytest.raises(ValueError, match="Unrecognized save_freq"):
            AverageModelCheckpoint(True, "m.keras", save_freq="batch")


@pytest.mark.skipif(
    keras.backend.backend() != "jax" or not hasattr(keras.callbacks, "OrbaxCheckpoint"),
    reason="Orbax is installed where JAX is, and came with a later Keras",
)
class TestOrbax:
    def restored(self, folder, swap_on_epoch):
        """A model that was trained with Orbax checkpoints, and the model of the last one."""
        orbax = keras.callbacks.OrbaxCheckpoint(
            str(folder), save_freq="epoch", save_on_background=False
        )
        swap = SwapAverageWeights(swap_on_epoch=swap_on_epoch)
        # Not a Sequential model: Keras 3.15 gives its variables other names when it loads one from
        # Orbax. Then it finds none of them in the checkpoint, and does not say so.
        inputs = keras.Input((5,))
        trained = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(6)(inputs)))
        trained.compile(swa(), "mse")
        fit(trained, swap, orbax, epochs=2)
        return trained, keras.saving.load_model(str(folder))

    @pytest.mark.slow_on("jax")
    def test_training_resumes_from_an_orbax_checkpoint_of_raw_weights(self, tmp_path):
        trained, other = self.restored(tmp_path / "orbax", swap_on_epoch=False)
        trained.optimizer.swap_weights()
        small.assert_same_bits(other.get_weights(), trained.get_weights())
        small.assert_same_bits(other.optimizer.get_weights(), trained.optimizer.get_weights())

    def test_an_orbax_checkpoint_of_averages_says_that_it_lost_the_raw_weights(self, tmp_path):
        _, other = self.restored(tmp_path / "orbax", swap_on_epoch=True)
        assert other.optimizer.averages_in_model
        with pytest.raises(RuntimeError, match="does not carry them"):
            fit(other, SwapAverageWeights())


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorBoard writes through TensorFlow"
)
def test_tensorboard_shows_metrics_of_both_copies(tmp_path):
    pytest.importorskip("tensorboard")
    import tensorflow as tf

    board = keras.callbacks.TensorBoard(str(tmp_path))
    model = fit(small.model(swa()), SwapAverageWeights(log_raw=True), board)

    shown = {}
    for file in tmp_path.glob("validation/*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))

    history = model.history.history
    np.testing.assert_allclose(shown["epoch_loss"], history["val_loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(shown["epoch_raw_loss"], history["val_raw_loss"], rtol=TOLERANCE)
