"""A worker that cannot join the others. It comes too late, or the others do not come at all.

python join.py late|alone TIMEOUT
"""

import json
import sys
import time

import keras

import keras_avg


def main(fault, timeout):
    if fault == "late":
        keras.Variable([1.0])
    began = time.perf_counter()
    try:
        keras_avg.distributed.initialize(float(timeout))
    except RuntimeError as error:
        print(json.dumps({"waited": time.perf_counter() - began, "error": str(error)}))


main(*sys.argv[1:])
