"""
What DataLoaderLite delivers, on one core: batches of 64 x 1024 from shards of 100 million tokens, shuffled.

    python benchmarks/loader.py

Prints tokens a second over one epoch, the median and the longest call of next_batch (in which a shard begins,
whose documents have to be found), and the memory that the loader added at its peak, which includes pages of
the mapped shards.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import multiprocessing
import os
import resource
import tempfile
import time

import numpy as np
import torch

from train_gpt2 import DataLoaderLite

B, T, EOT = 64, 1024, 50256


def make_shards(directory, count, size, document):
    for i in range(count):
        rng = np.random.default_rng(i)
        tokens = rng.integers(0, EOT, size, dtype=np.uint16)
        tokens[rng.integers(0, size, size // document)] = EOT
        np.save(Path(directory, f"{i}.npy"), tokens)


def peak():
    """MB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens (%(default)s)")
    parser.add_argument("--document", type=int, default=1000, help="mean tokens of a document (%(default)s)")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        words = tmp, args.shards, args.shard_size, args.document
        making = multiprocessing.Process(target=make_shards, args=words)
        making.start()  # in a process of its own, so that its memory is not counted
        making.join()
        before, seconds = peak(), []
        shards = {path.name: path for path in sorted(Path(tmp).iterdir())}
        loader = DataLoaderLite(shards, B, T, seed=1, shuffle=True, eot=EOT)
        for _ in range(loader.rows_per_epoch // B):
            start = time.perf_counter()
            loader.next_batch()
            seconds.append(time.perf_counter() - start)
        added = peak() - before
    print(f"{B * T / np.mean(seconds) / 1e6:.0f} million tokens a second; next_batch: median "
          f"{1e3 * np.median(seconds):.1f} ms, longest {1e3 * max(seconds):.1f} ms; "
          f"{added:.0f} MB added, a shard is {2 * args.shard_size / 2**20:.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
