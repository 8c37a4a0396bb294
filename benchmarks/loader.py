"""
What DataLoaderLite delivers, on one core: batches of 64 x 1024 from shards of 100 million tokens, shuffled.

    python benchmarks/loader.py

Prints tokens a second over one epoch; the time of next_batch, median and longest (a call that opens a new
shard and puts its documents in order); and the memory that the loader added at its peak, which includes pages
of the mapped shards. Takes a minute, 1 GB of disk, and Linux or macOS.
"""

import sys
from pathlib import Path

# Import from the project's folder, not from benchmarks/, which has a hellaswag.py of its own.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import multiprocessing
import os
import resource
import tempfile
import time

import numpy as np
import torch

from benchmarks.machine import machine
from fineweb import make_parser
from train_gpt2 import DataLoaderLite

B, T, EOT = 64, 1024, 50256


def make_shards(directory, count, size):
    """Random tokens, in documents of 1,000 on average."""
    for i in range(count):
        rng = np.random.default_rng(i)
        tokens = rng.integers(0, EOT, size, dtype=np.uint16)
        tokens[rng.integers(0, size, size // 1000)] = EOT
        np.save(Path(directory, f"{i}.npy"), tokens)


def peak():
    """MB of this process at its peak so far. ru_maxrss is in bytes on macOS, and in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--shards", type=int, default=5, help="number of shards (%(default)s)")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens in a shard (%(default)s)")
    args = parser.parse_args()
    print(machine())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        making = multiprocessing.Process(target=make_shards, args=(tmp, args.shards, args.shard_size))
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
          f"{added:.0f} MB added, a shard is {2 * args.shard_size / 2**20:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
