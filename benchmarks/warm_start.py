"""
What is a finished small model worth to a larger one? The tiny preset with 3 layers, on 8 x 128 bytes of
text a step, is trained to the end, grown to 4 layers (layer j begins as layer floor(j * 3 / 4)) and trained
on. Beside it, one of 4 layers is trained from scratch, and the 3 layers are trained on for as long, which is
the control: what more training alone would have given. Three seeds.

    python benchmarks/warm_start.py            # Python's standard library as text, five minutes on 2 cores
    python benchmarks/warm_start.py --data input.txt --steps 100 --seeds 1

Prints the losses and how many steps the grown model needs for the final loss of the one from scratch, and
draws both.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from benchmarks.learning_rate import reached, standard_library, train


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="text file or directory of shards (Python's standard library)")
    parser.add_argument("--tokenizer", default="bytes", help="of a text file (%(default)s)")
    parser.add_argument("--layers", type=int, nargs=2, default=[3, 4], help="of the two models (%(default)s)")
    parser.add_argument("--max_lr", type=float, default=2e-3, help="of all trainings (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of each training (%(default)s)")
    parser.add_argument("--out", default="warm_start.png", help="the chart (%(default)s)")
    args = parser.parse_args()
    small, large = args.layers
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        data = Path(args.data or Path(directory, "stdlib.txt")).resolve()
        if not args.data:
            standard_library(data)
        common = {"data": data, "tokenizer": args.tokenizer, "max_lr": args.max_lr}

        def grown(seed):  # the small one first
            first, second = Path(directory, f"small-{seed}"), Path(directory, f"grown-{seed}")
            before = train(first, args.steps, seed=seed, n_layer=small, **common)
            more = {"init_from": first / "latest.pt", "seed": seed} | common
            after = train(second, args.steps, n_layer=large, **more)
            return before, after, train(Path(directory, f"on-{seed}"), args.steps, n_layer=small, **more)

        def scratch(seed):
            return train(Path(directory, f"scratch-{seed}"), args.steps, seed=seed, n_layer=large, **common)

        jobs = [pool.submit(way, seed) for seed in range(args.seeds) for way in (grown, scratch)]
        runs = [job.result() for job in tqdm(jobs)]
    steps = np.array(list(runs[1]))
    befores, afters, controls = zip(*runs[::2])
    grown_name, scratch_name = f"{large} layers, grown", f"{large} layers, from scratch"
    names = f"{small} layers", grown_name, scratch_name, f"{small} layers, on"
    four = zip(names, (befores, afters, runs[1::2], controls))
    curves = {name: np.array([list(run.values()) for run in seeds]) for name, seeds in four}
    print(f"{'validation loss':24} {'at step 0':>9} {'at the end':>10} {'std':>6}")
    for name, losses in curves.items():
        print(f"{name:24} {losses[:, 0].mean():9.4f} {losses[:, -1].mean():10.4f} {losses[:, -1].std():6.4f}")
    _, after, fresh, _ = (losses.mean(axis=0) for losses in curves.values())
    step = reached(steps, after, fresh[-1])
    when = "never" if step is None else f"after {step} of {args.steps} steps"
    print(f"the grown model reaches the final loss of the one from scratch, for good: {when}")

    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, losses), color in zip(curves.items(), ("#999999", "#d0701c", "#3465a4", "#444444")):
        at = steps - args.steps if name == f"{small} layers" else steps
        ax.plot(at, losses.mean(axis=0), color=color, label=f"{name}: {losses[:, -1].mean():.3f}")
        ax.fill_between(at, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.2, lw=0)
    ax.axhline(fresh[-1], color="#3465a4", ls=":", lw=1)
    ax.axvline(0, color="black", lw=0.8)
    ax.set(xlabel="steps of the larger model", ylabel="validation loss (nats a token)")
    ax.set_ylim(min(after.min(), fresh.min()) - 0.2, fresh[len(steps) // 8] + 0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, title="mean and range over seeds; final loss")
    fig.savefig(args.out, dpi=110)
    print(f"chart in {args.out}")


if __name__ == "__main__":
    main()
