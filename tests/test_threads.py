"""Models in several threads do not disturb each other."""

import sys
import threading

import pytest
import small_training as small

import keras_avg
from keras_avg import SWA
from keras_avg._wrapping.weak import WeakList


class Thing:
    pass


@pytest.fixture
def hurry():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*functions):
    """Run functions in threads. If one of them raises, raise its error."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class TestAWeakList:
    def test_a_weak_list_keeps_no_object_alive(self):
        things, found = [Thing(), Thing()], WeakList()
        for thing in (*things, *things):
            found.add(thing)
        assert sorted(map(id, found)) == sorted(map(id, things))
        found.discard(things[0])
        assert list(found) == [things[1]]
        assert things[0] not in found
        things.clear()
        del thing
        assert not found

    def test_a_loop_over_a_weak_list_allows_another_thread_to_add(self, hurry):
        found, things = WeakList(), [Thing() for _ in range(300)]

        def add():
            for _ in range(20):
                for thing in things:
                    found.add(thing)
                for thing in things:
                    found.discard(thing)

        def look():
            for _ in range(300):
                assert len(list(found)) <= len(things)

        together(add, look)


@pytest.mark.slow_on("tensorflow")
def test_two_threads_can_swap_their_models_at_once(hurry):
    models = [small.fit(small.model(SWA("sgd", 0, 1)), epochs=1) for _ in range(6)]
    before = [[small.numpy(v) for v in m.variables] for m in models]

    def swap(several):
        for _ in range(20):
            for model in several:
                keras_avg.swap_weights(model)
            for model in several:
                keras_avg.swap_weights(model)

    together(lambda: swap(models[:3]), lambda: swap(models[3:]))
    for model, values in zip(models, before, strict=True):
        small.assert_same_bits([small.numpy(v) for v in model.variables], values)
