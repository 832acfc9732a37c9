"""Twenty networks on the digits: raw, EMA, SWA and schedule-free, with intervals, and the cost.

Each method is trained at the learning rate that is best for it. Five networks with other seeds
chose the rates, on pictures that are not in the test. An average works best at a higher rate than
the raw weights. The rows "of that training" are averages of the training in the first row. SGD with
a cosine is the usual choice without an average. The cost is the processor time of `fit` for one
network, divided by the time of the bare optimizer. It is a median of ratios within a round.

    KERAS_BACKEND=jax python docs/studies/averages_on_digits.py --seeds 20
"""

import argparse
import pathlib
import statistics
import time

import digits
import keras
import report

import keras_avg

EPOCHS = 20
MOMENTUM_RATES = (0.03, 0.1, 0.3, 1.0)
FREE_RATES = (0.3, 1.0, 3.0, 10.0)
OTHER_SEEDS = {"seeds": 5, "first_seed": 1000}
LIKELIHOOD = "negative log-likelihood"
RAW, COSINE = "raw, constant rate", "raw, cosine"
COPIES = {"EMA": 1, "SWA": 0}  # places among the nested wrappers, outermost first
FREE = "ScheduleFree"


def one_constant_rate(rate, known, unseen, epochs, seeds, first_seed=0):
    """The scores of the three copies of one training."""
    optimizer = digits.ema_and_swa(rate, digits.steps(known, epochs))
    model = digits.compiled(optimizer, seeds, first_seed)
    digits.fit(model, known, epochs, first_seed)
    wrappers = keras_avg.averaging_optimizers(model)
    averages = {
        name: digits.average_scores(model, unseen, wrappers[place])
        for name, place in COPIES.items()
    }
    return {RAW: digits.scores(model, unseen)} | averages


def others(rates, known, unseen, epochs, seeds, first_seed=0):
    """The scores of the trainings with one copy of the weights, for each method with a rate."""
    found = {}
    if COSINE in rates:
        optimizer = digits.cosine(rates[COSINE], digits.steps(known, epochs))
        model = digits.compiled(optimizer, seeds, first_seed)
        found[COSINE] = digits.scores(digits.fit(model, known, epochs, first_seed), unseen)
    if FREE in rates:
        model = digits.compiled(digits.schedule_free(rates[FREE]), seeds, first_seed)
        digits.fit(model, known, epochs, first_seed)
        found[FREE] = digits.average_scores(model, unseen)
    return found


def chosen_rates(epochs):
    known, unseen, _ = digits.parts()
    at = {
        rate: one_constant_rate(rate, known, unseen, epochs, **OTHER_SEEDS)
        for rate in MOMENTUM_RATES
    }
    searches = {
        name: digits.best(MOMENTUM_RATES, lambda rate, name=name: at[rate][name][LIKELIHOOD])
        for name in (RAW, *COPIES)
    }
    for name, rates in ((COSINE, MOMENTUM_RATES), (FREE, FREE_RATES)):
        searches[name] = digits.best(
            rates,
            lambda rate, name=name: others({name: rate}, known, unseen, epochs, **OTHER_SEEDS)[
                name
            ][LIKELIHOOD],
        )
    return {name: rate for name, (rate, _) in searches.items()}, searches


def on_the_test(rates, epochs, seeds):
    """The scores of each copy at its own rate, trained on all pictures but those of the test."""
    known, test = digits.to_train_on_all()
    constant = sorted({rates[name] for name in (RAW, *COPIES)})
    at = {rate: one_constant_rate(rate, known, test, epochs, seeds) for rate in constant}
    found = {name: at[rates[name]][name] for name in (RAW, *COPIES)}
    beside = {
        f"{name} of that training": at[rates[RAW]][name]
        for name in COPIES
        if rates[name] != rates[RAW]
    }
    return found | beside | others(rates, known, test, epochs, seeds)


def cost(rounds):
    """Processor time of an epoch of one network, in units of the bare optimizer's: medians."""
    known, _ = digits.to_train_on_all()
    bare = "bare"
    contenders = {
        bare: digits.sgd(0.1),
        "EMA, every step": keras_avg.MovingAverage(digits.sgd(0.1)),
        "SWA, every tenth step": keras_avg.SWA(digits.sgd(0.1), 0, 10),
        FREE: digits.schedule_free(0.1),
    }
    models = {name: digits.compiled(optimizer, 1) for name, optimizer in contenders.items()}
    x, y = digits.in_own_order(known, 1, 0)
    seconds = {name: [] for name in models}
    for _ in range(rounds + 2):  # two to compile and to warm up
        for name, model in models.items():
            began = time.process_time()
            model.fit(x, y, batch_size=digits.BATCH_SIZE, verbose=0)
            seconds[name].append(time.process_time() - began)
    return {
        name: statistics.median(a / b for a, b in zip(found[2:], seconds[bare][2:], strict=True))
        for name, found in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    rates, searches = chosen_rates(arguments.epochs)
    print(f"Rates: {rates}", flush=True)
    found = on_the_test(rates, arguments.epochs, arguments.seeds)
    keras.backend.clear_session()
    costs = {"Processor time of an epoch, in units of the bare optimizer's": cost(arguments.rounds)}
    settings = {"rates": rates, "search": searches, "epochs": arguments.epochs}
    values = {f"After {arguments.epochs} epochs": found}
    report.save(arguments.out, __doc__, settings, arguments.seeds, values, RAW, **costs)


if __name__ == "__main__":
    main()
