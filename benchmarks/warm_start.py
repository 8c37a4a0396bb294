"""
What is a finished small model worth to a larger one? The tiny preset with 3 layers, on 8 x 128 bytes of
text a step, is trained to the end, grown to 4 layers (layer j begins as layer floor(j * 3 / 4)) and trained
on. Beside it, one of 4 layers is trained from scratch, and the 3 layers are trained on for as long, which is
the control: what more training alone would have given. Three seeds.

    python benchmarks/warm_start.py        # Python's standard library as text, 5 to 10 minutes
    python benchmarks/warm_start.py --data input.txt --steps 100 --seeds 1 --out chart.png

Prints the losses and how many steps the grown model needs for the final loss of the one from scratch, and
draws the validation losses of all four.
"""

import sys
from pathlib import Path

# Import from the project's folder, not from benchmarks/, which has a hellaswag.py of its own.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.learning_rate import add_flags, draw, reached, save_chart, text_file, train
from benchmarks.machine import machine
from fineweb import make_parser


def main():
    parser = make_parser(__doc__)
    add_flags(parser, "warm_start.png")
    parser.add_argument("--layers", type=int, nargs=2, default=[3, 4], help="of both models %(default)s")
    args = parser.parse_args()
    print(machine())
    small, large = args.layers
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        common = {"data": text_file(args, directory), "tokenizer": args.tokenizer, "max_lr": 2e-3}

        def run(name, seed, n_layer, **flags):
            return train(Path(directory, f"{name}-{seed}"), args.steps, seed=seed, n_layer=n_layer, **flags)

        def small_and_what_follows(seed):
            before = run("small", seed, small, **common)
            more = common | {"init_from": Path(directory, f"small-{seed}", "latest.pt")}
            return before, run("grown", seed, large, **more), run("control", seed, small, **more)

        grown = [pool.submit(small_and_what_follows, seed) for seed in range(args.seeds)]
        scratch = [pool.submit(run, "scratch", seed, large, **common) for seed in range(args.seeds)]
        befores, afters, controls = zip(*(job.result() for job in grown))
        scratches = [job.result() for job in scratch]
    steps = np.array(list(scratches[0]))
    curves = {
        f"{small} layers": befores,
        f"{large} layers, grown": afters,
        f"{large} layers, from scratch": scratches,
        f"{small} layers, trained on": controls,
    }
    curves = {name: np.array([list(run.values()) for run in runs]) for name, runs in curves.items()}
    print(f"{'validation loss':24} {'at step 0':>9} {'at the end':>10} {'std':>6}")
    for name, losses in curves.items():
        std = losses[:, -1].std(ddof=1) if args.seeds > 1 else np.nan
        print(f"{name:24} {losses[:, 0].mean():9.4f} {losses[:, -1].mean():10.4f} {std:6.4f}")
    _, after, fresh, _ = (losses.mean(axis=0) for losses in curves.values())
    step = reached(steps, after, fresh[-1])
    when = "never" if step is None else f"after {step} of {args.steps} steps"
    print(f"the grown model reaches the final loss of the one from scratch, for good: {when}")

    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(10, 4.5), layout="constrained")
    styles = ("#999999", "-"), ("#d0701c", "-"), ("#3465a4", "-"), ("#2e8b3d", "--")
    for (name, losses), (color, line) in zip(curves.items(), styles):
        begin = -args.steps if name == f"{small} layers" else 0  # the small model ends where the others begin
        draw(ax, steps + begin, losses, name, color=color, ls=line)
    ax.axhline(fresh[-1], color="#3465a4", ls=":", lw=1)
    ax.axvline(0, color="black", lw=0.8)
    ylim = min(after.min(), fresh.min()) - 0.2, fresh[len(steps) // 8] + 0.5
    ax.set(xlabel="steps after the small model's end", ylim=ylim)
    save_chart(fig, ax, args.out, "model")


if __name__ == "__main__":
    main()
