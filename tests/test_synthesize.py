"""Averages whose length is chosen after training are computed from snapshots of other averages."""

import os
import signal
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import small_training as small

from keras_avg import SWA, MovingAverage, averaging_optimizers, checkpoints, swap_weights
from keras_avg.callbacks import SaveAverages
from keras_avg.checkpoints._profiles import Profile, combine
from keras_avg.checkpoints._snapshot_files import described
from keras_avg.decays import PowerFunction

KEPT = (0.05, 0.10)
TARGETS = (0.05, 0.06, 0.075, 0.10, 0.125, 0.15)
STORED = 1e-3  # Relative error: twice the rounding of float16.
PROFILE = 3e-3  # Relative error of an average from 32 snapshots of two lengths.


def optimizer(sigmas=KEPT, **arguments):
    nested = keras.optimizers.Adam(0.01)
    for sigma in sigmas:
        nested = MovingAverage(nested, average_decay=PowerFunction(sigma), **arguments)
    return nested


def trained(folder, epochs=8, every_steps=None, dtype="float16", **arguments):
    model = small.model(optimizer(**arguments))
    saved = SaveAverages(folder, every_steps, dtype)
    return small.fit(model, epochs=epochs, callbacks=[saved])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flat(values):
    return np.concatenate([small.numpy(value).astype("float64").ravel() for value in values])


def values_of(model):
    return [small.numpy(variable) for variable in model.variables]


class TestProfiles:
    def test_a_profile_that_was_kept_is_its_own_best_combination(self):
        profiles = [Profile(7.0, 50), Profile(7.0, 100), Profile(17.0, 100)]
        found = combine(profiles, Profile(7.0, 100))
        np.testing.assert_allclose(found.weights, [0, 1, 0], atol=1e-9)
        assert found.relative_error < 1e-6
        assert found.sigma_rel == pytest.approx(PowerFunction(gamma=7.0).sigma_rel)

    @pytest.mark.parametrize("sigma_rel", TARGETS)
    def test_the_relative_error_equals_the_error_on_a_fine_grid(self, sigma_rel):
        gammas = [PowerFunction(sigma).gamma for sigma in KEPT]
        profiles = [Profile(gamma, time) for time in (250, 500, 750, 1000) for gamma in gammas]
        target = Profile(PowerFunction(sigma_rel).gamma, 1000)
        tau = (np.arange(200_000) + 0.5) / 200

        def density(profile):
            values = (profile.gamma + 1) * (tau / profile.time) ** profile.gamma / profile.time
            return np.where(tau <= profile.time, values, 0)

        found = combine(profiles, target)
        assert found.weights.sum() == pytest.approx(1)
        total = sum(w * density(p) for w, p in zip(found.weights, profiles, strict=True))
        error = np.linalg.norm(total - density(target)) / np.linalg.norm(density(target))
        assert found.relative_error == pytest.approx(error, abs=1e-4)
        spread = np.sqrt(np.mean(total * tau**2) * 1000 - (np.mean(total * tau) * 1000) ** 2)
        assert found.sigma_rel == pytest.approx(spread / 1000, rel=1e-3)

    def test_more_snapshots_reduce_the_relative_error(self):
        gammas = [PowerFunction(sigma).gamma for sigma in KEPT]
        target = Profile(PowerFunction(0.07).gamma, 1.0)
        errors = [
            combine([Profile(g, t / n) for t in range(1, n + 1) for g in gammas], target)[1]
            for n in (1, 4, 16, 64)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 3e-4 < 3e-2 < errors[0]


def test_the_result_is_the_average_that_training_would_have_kept(tmp_path):
    trained(tmp_path, epochs=32)
    exact = small.fit(small.model(optimizer(TARGETS)), epochs=32)
    model = small.model("sgd")
    for sigma, wrapper in zip(TARGETS, reversed(averaging_optimizers(exact)), strict=True):
        row = checkpoints.synthesize(model, tmp_path, sigma, verbose=0)
        wanted, reached = flat(wrapper.averages()), flat(model.trainable_variables)
        assert np.linalg.norm(reached - wanted) < STORED * np.linalg.norm(wanted)
        assert row["relative_error"] < PROFILE
        assert row["sigma_rel"] == sigma
        assert row["reached_sigma_rel"] == pytest.approx(sigma, rel=PROFILE)
        assert row["snapshots"] == 64
        raw = flat(exact.trainable_variables)
        assert np.linalg.norm(raw - wanted) > 4 * STORED * np.linalg.norm(wanted)
    small.assert_same_bits(
        [small.numpy(v) for v in model.non_trainable_variables],
        [small.numpy(v) for v in exact.non_trainable_variables],
    )


@pytest.mark.slow_on("jax", "tensorflow")
def test_averages_may_begin_late_and_have_a_period(tmp_path):
    arguments = {"start_step": 6, "average_period": 3}
    trained(tmp_path, epochs=12, every_steps=2, dtype="float32", **arguments)
    exact = small.fit(small.model(optimizer((0.07,), **arguments)), epochs=12)
    model = small.model()
    checkpoints.synthesize(model, tmp_path, 0.07, verbose=0)
    wanted, reached = flat(exact.optimizer.averages()), flat(model.trainable_variables)
    assert np.linalg.norm(reached - wanted) < PROFILE * np.linalg.norm(wanted)


class TestSaveAverages:
    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_snapshot_is_saved_at_the_end_of_each_epoch(self, tmp_path):
        trained(tmp_path / "run" / "averages", epochs=3)
        expected = [f"averages-{6 * epoch:010d}.h5" for epoch in (1, 2, 3)]
        assert names(tmp_path / "run" / "averages") == expected

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_snapshots_are_saved_every_few_steps_over_epochs_and_runs(self, tmp_path):
        model = trained(tmp_path, epochs=2, every_steps=4)
        assert names(tmp_path) == [f"averages-{n:010d}.h5" for n in (4, 8, 12)]
        small.fit(model, callbacks=[SaveAverages(tmp_path, 4)])
        assert names(tmp_path) == [f"averages-{n:010d}.h5" for n in range(4, 25, 4)]

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_the_time_of_a_profile_is_that_of_the_last_averaging_since_the_start(self, tmp_path):
        trained(tmp_path, epochs=2, start_step=2, average_period=5)
        found = [described(tmp_path / name).averages for name in names(tmp_path)]
        # After 6 and 12 updates, the last averagings were after 5 and 10.
        assert [[each.profile.time for each in averages] for averages in found] == [[3, 3], [8, 8]]

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_snapshots_count_only_real_updates(self, tmp_path):
        inner = keras.optimizers.SGD(0.01, gradient_accumulation_steps=2)
        model = small.model(MovingAverage(inner, average_decay=PowerFunction(0.1)))
        small.fit(model, epochs=4, callbacks=[SaveAverages(tmp_path, every_steps=5)])
        assert names(tmp_path) == [f"averages-{n:010d}.h5" for n in (5, 10)]

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_saving_snapshots_does_not_change_training(self, tmp_path):
        with_it = trained(tmp_path, epochs=2, every_steps=1)
        without = small.fit(small.model(optimizer()), epochs=2)
        small.assert_same_bits(values_of(with_it), values_of(without))

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_numbers_too_large_for_float16_are_saved_in_float32(self, tmp_path):
        model = small.model(optimizer())
        bias = model.layers[0].bias
        bias.assign(np.full(bias.shape, 1e6))
        small.fit(model, callbacks=[SaveAverages(tmp_path)])
        other = small.model()
        checkpoints.synthesize(other, tmp_path, 0.1, verbose=0)
        np.testing.assert_allclose(small.numpy(other.layers[0].bias), 1e6, rtol=1e-3)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_an_error_while_writing_leaves_no_file(self, tmp_path, monkeypatch):
        def fails(*_):
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="no space"):
            trained(tmp_path)
        assert names(tmp_path) == []

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize("wrap", [lambda o: o, SWA, MovingAverage])
    def test_training_is_refused_without_power_function_averages(self, tmp_path, wrap):
        model = small.model(wrap(keras.optimizers.Adam()))
        with pytest.raises(ValueError, match=r"PowerFunction.*Received: optimizer="):
            small.fit(model, callbacks=[SaveAverages(tmp_path)])

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"directory": None}, "directory"),
            ({"every_steps": 0}, "every_steps"),
            ({"every_steps": 0.5}, "every_steps"),
            ({"dtype": "int8"}, "dtype"),
            ({"dtype": None}, "dtype"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, tmp_path, arguments, match):
        with pytest.raises(ValueError, match=match):
            SaveAverages(**{"directory": tmp_path} | arguments)


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
import h5py, test_synthesize as tests
from keras_avg.checkpoints import _snapshot_files
fill, written = _snapshot_files._fill, []

def dies(*arguments):
    fill(*arguments)
    written.append(1)
    if len(written) == 3:
        arguments[0].flush()
        os.kill(os.getpid(), signal.SIGKILL)

_snapshot_files._fill = dies
tests.trained(pathlib.Path(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_kill_during_writing_leaves_only_whole_files_to_read(tmp_path):
    here = os.path.dirname(__file__)
    program = [sys.executable, "-c", KILLED, str(tmp_path), here]
    done = subprocess.run(program, timeout=600, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = [f"averages-{n:010d}.h5" for n in (6, 12)]
    unfinished, *others = names(tmp_path)
    assert unfinished.startswith(".aside-averages-0000000018.h5-")
    assert others == whole
    row = checkpoints.synthesize(small.model(), tmp_path, 0.1, verbose=0)
    assert row["snapshots"] == 4
    with pytest.warns(UserWarning, match="an earlier run"):
        trained(tmp_path, epochs=3)
    assert names(tmp_path) == [*whole, "averages-0000000018.h5"]


class TestSeveralRuns:
    def exact(self, epochs, sigma=0.1):
        """The average that a run without interruption keeps."""
        model = small.fit(small.model(optimizer((sigma,))), epochs=epochs)
        return flat(model.optimizer.averages())

    def synthesized(self, folder, sigma=0.1):
        model = small.model()
        checkpoints.synthesize(model, folder, sigma, verbose=0)
        return flat(model.trainable_variables)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_resumed_run_goes_on_in_its_directory(self, tmp_path):
        model = trained(tmp_path / "averages", epochs=3)
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras")
        small.fit(loaded, epochs=2, callbacks=[SaveAverages(tmp_path / "averages")])
        found = self.synthesized(tmp_path / "averages")
        wanted = self.exact(5)
        assert np.linalg.norm(found - wanted) < STORED * np.linalg.norm(wanted)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_updates_after_the_backup_are_left_out_until_they_are_written_again(self, tmp_path):
        model = trained(tmp_path / "averages", epochs=1)
        model.save(tmp_path / "backup.keras")
        small.fit(model, epochs=3, callbacks=[SaveAverages(tmp_path / "averages")])
        loaded = keras.saving.load_model(tmp_path / "backup.keras")
        small.fit(loaded, epochs=1, callbacks=[SaveAverages(tmp_path / "averages")])
        assert len(names(tmp_path / "averages")) == 4
        wanted = self.exact(2)
        with pytest.warns(UserWarning, match=r"left out: averages-0000000018\.h5, averages-"):
            found = self.synthesized(tmp_path / "averages")
        assert np.linalg.norm(found - wanted) < STORED * np.linalg.norm(wanted)
        small.fit(loaded, epochs=2, callbacks=[SaveAverages(tmp_path / "averages")])
        assert self.synthesized(tmp_path / "averages") is not None  # and no warning

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_new_run_causes_a_warning_and_is_not_mixed_with_the_old_one(self, tmp_path):
        trained(tmp_path, epochs=4)
        model = small.model(optimizer((0.1,)))
        model.optimizer.learning_rate = 0.5
        with pytest.warns(UserWarning, match=r"an earlier run: averages-.*another directory"):
            small.fit(model, epochs=2, callbacks=[SaveAverages(tmp_path)])
        with pytest.warns(UserWarning, match="left out: averages-0000000018"):
            found = self.synthesized(tmp_path)
        wanted = flat(model.optimizer.averages())
        assert np.linalg.norm(found - wanted) < STORED * np.linalg.norm(wanted)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_model_of_another_run_cannot_go_on(self, tmp_path):
        trained(tmp_path / "run", epochs=2)
        before = (tmp_path / "run" / "averages-0000000012.h5").read_bytes()
        other = small.model(optimizer())
        other.optimizer.learning_rate = 0.5
        small.fit(other)
        with pytest.raises(ValueError, match="its averages differ, though both are of 12 updates"):
            small.fit(other, callbacks=[SaveAverages(tmp_path / "run")])
        longer = small.fit(small.model(optimizer((0.2,))), epochs=3)
        with pytest.raises(ValueError, match=r"average of gamma=.*Use one directory for each run"):
            small.fit(longer, callbacks=[SaveAverages(tmp_path / "run")])
        assert (tmp_path / "run" / "averages-0000000012.h5").read_bytes() == before

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_files_of_runs_that_did_not_know_of_each_other_are_refused(self, tmp_path):
        model = trained(tmp_path / "one", epochs=2)
        trained(tmp_path / "two", epochs=3)
        last = "averages-0000000018.h5"
        os.replace(tmp_path / "two" / last, tmp_path / "one" / last)
        match = r"several runs.*Received: averages-0000000006\.h5, averages-0000000018\.h5"
        with pytest.raises(ValueError, match=match):
            self.synthesized(tmp_path / "one")
        with pytest.raises(ValueError, match=match):
            small.fit(model, callbacks=[SaveAverages(tmp_path / "one")])


class TestRefused:
    def expect(self, model, directory, sigma_rel, match):
        before = values_of(model)
        with pytest.raises(ValueError, match=match):
            checkpoints.synthesize(model, directory, sigma_rel, verbose=0)
        small.assert_same_bits(values_of(model), before)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_missing_directory_and_an_empty_one_are_refused(self, tmp_path):
        self.expect(small.model(), tmp_path / "none", 0.1, "no averages in.*none")
        self.expect(small.model(), tmp_path, 0.1, "SaveAverages")

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize("sigma_rel", [0, 0.3, -0.1, np.nan, "0.1", None])
    def test_a_length_out_of_range_is_refused(self, tmp_path, sigma_rel):
        self.expect(small.model(), tmp_path, sigma_rel, "sigma_rel|exactly one")

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_cut_file_a_foreign_file_and_another_model_are_refused(self, tmp_path):
        trained(tmp_path, epochs=3)
        layers = [keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dense(1)]
        self.expect(keras.Sequential(layers), tmp_path, 0.1, r"averages-0000000006\.h5")
        second = tmp_path / "averages-0000000012.h5"
        whole = second.read_bytes()
        second.write_bytes(whole[:-1000])
        self.expect(small.model(), tmp_path, 0.1, r"averages-0000000012\.h5")
        small.model().save_weights(tmp_path / "m.weights.h5")
        os.replace(tmp_path / "m.weights.h5", second)
        self.expect(small.model(), tmp_path, 0.1, r"averages-0000000012\.h5.*not written by")

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_averages_that_began_at_different_steps_are_refused(self, tmp_path):
        inner = MovingAverage("adam", average_decay=PowerFunction(0.05), start_step=3)
        model = small.model(MovingAverage(inner, average_decay=PowerFunction(0.1)))
        small.fit(model, callbacks=[SaveAverages(tmp_path)])
        self.expect(small.model(), tmp_path, 0.1, r"different steps.*\[0, 3\]")

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_model_that_holds_averages_takes_no_synthesis(self, tmp_path):
        model = trained(tmp_path, epochs=2)
        swap_weights(model)
        with pytest.raises(RuntimeError, match="holds the averages"):
            checkpoints.synthesize(model, tmp_path, 0.1, verbose=0)


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_length_far_from_the_snapshots_causes_a_warning(tmp_path):
    trained(tmp_path, epochs=3)
    with pytest.warns(UserWarning, match=r"sigma_rel=0\.25 is made up with a relative error of"):
        row = checkpoints.synthesize(small.model(), tmp_path, 0.25, verbose=0)
    assert row["relative_error"] > 0.05


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize(("sigma_rel", "warns"), [(0.02, True), (0.08, False), (0.25, True)])
def test_a_length_beyond_many_snapshots_causes_a_warning_sooner(tmp_path, sigma_rel, warns):
    trained(tmp_path, epochs=32)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        row = checkpoints.synthesize(small.model(), tmp_path, sigma_rel, verbose=0)
    assert row["relative_error"] < 0.05
    assert any("of lengths 0.05 to 0.1" in str(each.message) for each in found) == warns


@pytest.mark.slow_on("jax", "tensorflow")
def test_the_result_is_printed_as_a_table(tmp_path, capsys):
    trained(tmp_path, epochs=2)
    checkpoints.synthesize(small.model(), tmp_path, 0.1, verbose=2)
    printed = capsys.readouterr().out
    assert "reached_sigma_rel" in printed
    assert "relative_error" in printed
    checkpoints.synthesize(small.model(), tmp_path, 0.1, verbose=0)
    assert capsys.readouterr().out == ""
