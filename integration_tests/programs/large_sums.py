"""A worker that takes part in sums of large arrays until another worker is lost.

python large_sums.py MEGABYTES TIMEOUT FOLDER
"""

import json
import os
import pathlib
import sys
import time

import numpy as np

import keras_avg


def main(megabytes, timeout, folder):
    communicator = keras_avg.distributed.initialize(float(timeout))
    arrays = [np.full(int(megabytes) * 2**18, communicator.rank, "float32")]
    right = communicator.size * (communicator.size - 1) / 2
    for number in range(1_000_000):
        began = time.perf_counter()
        try:
            (found,) = communicator.all_reduce_sum(arrays)
        except RuntimeError as error:
            waited = time.perf_counter() - began
            is_kept = bool(np.all(arrays[0] == communicator.rank))
            result = {"waited": waited, "sums": number, "error": str(error), "kept": is_kept}
            print(json.dumps(result), flush=True)
            time.sleep(3 * (communicator.rank == 0))  # On JAX the others need process 0.
            os._exit(0)
        assert np.all(np.asarray(found) == right)
        pathlib.Path(folder, f"summed_{communicator.rank}").touch()


main(*sys.argv[1:])
