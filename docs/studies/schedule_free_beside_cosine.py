"""ScheduleFree at a constant rate beside SGD with a cosine schedule.

One training with `ScheduleFree(SGD)` is tested after 5, 10 and 20 epochs. A cosine schedule is made
for one length, so there is one training with it for each length. Five networks with other seeds
chose the rates, on pictures that are not in the test. The cosine has one rate for each length.
ScheduleFree has one rate for all lengths.

    KERAS_BACKEND=jax python docs/studies/schedule_free_beside_cosine.py --seeds 10
"""

import argparse
import pathlib

import digits
import numpy as np
import report

LENGTHS = (5, 10, 20)  # epochs
RATES = {"SGD, cosine": (0.03, 0.1, 0.3, 1.0), "ScheduleFree(SGD), constant": (0.3, 1.0, 3.0, 10.0)}
COSINE, FREE = RATES
OTHER_SEEDS = {"seeds": 5, "first_seed": 1000}
LIKELIHOOD = "negative log-likelihood"


def schedule_free(rate, lengths, known, unseen, seeds, first_seed=0):
    """The scores of one training at each length."""
    model = digits.compiled(digits.schedule_free(rate), seeds, first_seed)
    found, done = {}, 0
    for length in lengths:
        digits.fit(model, known, length, first_seed, initial_epoch=done)
        found[length], done = digits.average_scores(model, unseen), length
    return found


def cosine(rate, length, known, unseen, seeds, first_seed=0):
    optimizer = digits.cosine(rate, digits.steps(known, length))
    model = digits.compiled(optimizer, seeds, first_seed)
    return digits.scores(digits.fit(model, known, length, first_seed), unseen)


def chosen_rates(lengths):
    """For the cosine a rate for each length, for ScheduleFree one; and the whole search."""
    known, unseen, _ = digits.parts()

    def free(rate):
        found = schedule_free(rate, lengths, known, unseen, **OTHER_SEEDS)
        return [np.mean(each[LIKELIHOOD]) for each in found.values()]

    rate, search = digits.best(RATES[FREE], free)
    rates, searches = {FREE: rate}, {FREE: search}
    for length in lengths:
        name = f"{COSINE} over {length} epochs"
        rates[name], searches[name] = digits.best(
            RATES[COSINE],
            lambda rate, length=length: cosine(rate, length, known, unseen, **OTHER_SEEDS)[
                LIKELIHOOD
            ],
        )
    return rates, searches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    rates, searches = chosen_rates(arguments.lengths)
    print(f"Rates: {rates}", flush=True)
    known, test = digits.to_train_on_all()
    free = schedule_free(rates[FREE], arguments.lengths, known, test, arguments.seeds)
    found = {}
    for length in arguments.lengths:
        name = f"{COSINE} over {length} epochs"
        scores = cosine(rates[name], length, known, test, arguments.seeds)
        found[f"After {length} epochs"] = {COSINE: scores, FREE: free[length]}
    settings = {"rates": rates, "search": searches, "lengths": arguments.lengths}
    report.save(arguments.out, __doc__, settings, arguments.seeds, found, COSINE)


if __name__ == "__main__":
    main()
