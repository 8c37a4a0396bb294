"""
What DataLoaderLite alone delivers, on one core: batches of 64 x 1024 from shards of 100 million tokens, with shuffling.

    python benchmarks/loader.py

Prints tokens a second, the median and the longest calls of next_batch, and the memory that the loader added at its peak.
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

from train_gpt2 import EOT, DataLoaderLite


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=5, help="(5)")
    parser.add_argument("--rounds", type=int, default=4, help="(4)")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens (100000000)")
    parser.add_argument("--document", type=int, default=1000, help="mean tokens of a document (1000)")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, for the thread that reads ahead too
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        making = multiprocessing.Process(target=make_shards, args=(tmp, args.shards, args.shard_size, args.document))
        making.start()  # in a process of its own, so that its memory is not counted
        making.join()
        shards = {path.name: path for path in sorted(Path(tmp).iterdir())}
        before = peak()
        rounds = []
        for _ in range(args.rounds):
            loader = DataLoaderLite(shards, 64, 1024, seed=1, shuffle=True)
            loader.next_batch()  # waits for the first shard
            calls, border, reading = [], [], []
            for _ in range(args.shards * args.shard_size // (64 * 1024) - 2):
                shard = next(iter(loader.visits))
                start = time.perf_counter()
                loader.next_batch()
                calls.append(time.perf_counter() - start)
                border.append(next(iter(loader.visits)) != shard)
                reading.append(not all(visit.done() for visit in loader.visits.values()))
            rounds.append((calls, border, reading))
    calls, border, reading = np.array(rounds).transpose(1, 0, 2)
    best = calls.min(axis=0)  # the machine's own pauses hit a call in one round, what the loader does in every one
    ms = [f"{1000 * t:.1f} ms" for t in (np.median(calls), best[border[0] > 0].max(), best.max(), calls.max())]
    print(f"{64 * 1024 / calls.mean() / 1e6:.0f} million tokens a second; next_batch: median {ms[0]}; best of {args.rounds} "
          f"rounds: longest at a shard border {ms[1]}, anywhere {ms[2]}; longest in any round {ms[3]}; next shard being read "
          f"during {reading.mean():.0%} of the calls; {peak() - before:.0f} MB, a shard is {2 * args.shard_size / 2**20:.0f}")


if __name__ == "__main__":
    main()
