"""
Short trainings of the tiny preset, on 8 x 128 bytes of text a step, with AdamW and Muon at several learning
rates, three seeds each.

    python benchmarks/learning_rate.py     # Python's standard library as text, 10 to 30 minutes
    python benchmarks/learning_rate.py --data input.txt --steps 100 --seeds 1 --out chart.png

Prints the validation loss at the end, mean and standard deviation over seeds, and after what share of the
steps each setting has reached, for good, the final loss of AdamW at the lowest rate and at its best one. A
difference that is smaller than the standard deviations is no evidence that a setting is better. Trainings run
side by side, one on each core.
"""

import sys
from pathlib import Path

# Import from the project's folder, not from benchmarks/, which has a hellaswag.py of its own.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from benchmarks.machine import machine
from fineweb import make_parser

RATES = 6e-4, 1.8e-3, 5.4e-3, 1.62e-2  # the lecture's, and 3, 9 and 27 times that


def text_file(args, directory):
    """The path of --data, or of a new file: the modules of Python's standard library, shuffled."""
    if args.data:
        return Path(args.data).resolve()
    path, files = Path(directory, "stdlib.txt"), sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    text = "<|endoftext|>".join(files[i].read_text(encoding="utf-8") for i in order)
    path.write_text(text, encoding="utf-8")
    return path


def train(log_dir, steps, **flags):
    """Train the tiny preset, changed by these flags, in a process of one thread. Returns {step: validation
    loss} at step 0, about 25 times during the run, and at the end."""
    flags |= {"model": "tiny", "B": 8, "total_batch_size": 1024, "device": "cpu", "log_dir": log_dir,
              "max_steps": steps, "warmup_steps": steps // 10, "val_every": max(steps // 25, 1),
              "val_tokens": 4096, "sample_every": 0, "checkpoint_every": steps}  # fmt: skip
    command = [sys.executable, Path(__file__).resolve().parent.parent / "train_gpt2.py"]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    lines = (line.split() for line in Path(log_dir, "log.txt").read_text().splitlines())
    return {int(step): float(value) for step, stream, value in lines if stream == "val"}


def reached(steps, losses, mark):
    """The first of the steps from which on no loss is above the mark; None if the last loss is."""
    above = np.flatnonzero(losses > mark)
    first = above[-1] + 1 if len(above) else 0
    return steps[first] if first < len(steps) else None


def draw(ax, steps, losses, label, **style):
    """A line, the mean of losses (seeds, validations), in a band from the lowest to the highest seed."""
    ax.plot(steps, losses.mean(axis=0), label=f"{label}: {losses[:, -1].mean():.3f}", **style)
    ax.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15, lw=0)


def save_chart(fig, ax, path, title):
    ax.set_ylabel("validation loss (nats a token)")
    ax.spines[["top", "right"]].set_visible(False)
    title = f"{title}: final loss\n(band: range over seeds)"
    fig.legend(loc="outside right upper", frameon=False, title=title)
    fig.savefig(path, dpi=110)
    print(f"chart in {path}")


def add_flags(parser, chart):
    parser.add_argument("--data", help="text file or directory of shards (Python's standard library)")
    parser.add_argument("--tokenizer", default="bytes", help="of a text file (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each setting (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of each training (%(default)s)")
    out = Path(__file__).resolve().parent / "figures" / chart
    parser.add_argument("--out", default=out, help="the chart")


def main():
    parser = make_parser(__doc__)
    add_flags(parser, "learning_rate.png")
    parser.add_argument("--lrs", type=float, nargs="+", default=RATES, help="rates to try %(default)s")
    args = parser.parse_args()
    print(machine())
    settings = [(optimizer, lr) for optimizer in ("adamw", "muon") for lr in args.lrs]
    jobs = [(*setting, seed) for seed in range(args.seeds) for setting in settings]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        common = {"data": text_file(args, directory), "tokenizer": args.tokenizer}

        def run(job):
            optimizer, lr, seed = job
            log_dir = Path(directory, f"{optimizer}-{lr}-{seed}")
            return train(log_dir, args.steps, optimizer=optimizer, max_lr=lr, seed=seed, **common)

        runs = dict(zip(jobs, tqdm(pool.map(run, jobs), total=len(jobs))))
    steps = np.array(list(runs[jobs[0]]))
    losses = {}  # {setting: (seeds, validations)}
    for setting in settings:
        losses[setting] = np.array([list(runs[*setting, seed].values()) for seed in range(args.seeds)])
    final = {setting: curves[:, -1].mean() for setting, curves in losses.items()}
    lowest = "adamw", min(args.lrs)
    best = min((setting for setting in settings if setting[0] == "adamw"), key=final.get)

    print(f"{'optimizer':9} {'max_lr':>8} {'final loss':>10} {'std':>6}   share of the steps until AdamW's "
          f"final loss at {lowest[1]:.1e}, at {best[1]:.1e}")  # fmt: skip
    for (optimizer, lr), curves in losses.items():
        shares = []
        for mark in final[lowest], final[best]:
            step = reached(steps, curves.mean(axis=0), mark)
            shares.append("never" if step is None else f"{step / args.steps:.0%}")
        std = curves[:, -1].std(ddof=1) if args.seeds > 1 else np.nan
        mean = final[optimizer, lr]
        print(f"{optimizer:9} {lr:8.1e} {mean:10.4f} {std:6.4f}   {shares[0]:>5} {shares[1]:>5}")

    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(10, 4.5), layout="constrained")
    shades = np.linspace(0.4, 0.95, len(args.lrs))
    colors = [*plt.cm.Blues(shades), *plt.cm.Oranges(shades)]
    for i, ((optimizer, lr), curves) in enumerate(losses.items()):
        marker = "os^D"[i % len(args.lrs) % 4]  # a marker for each rate, every fifth validation
        style = {"color": colors[i], "marker": marker, "markersize": 4, "markevery": 5}
        draw(ax, steps, curves, f"{optimizer} {lr:.1e}", **style)
    top = np.median([curves.mean(axis=0)[len(steps) // 5] for curves in losses.values()])
    ax.set(xlabel="steps", ylim=(min(final.values()) - 0.1, top + 0.5))
    save_chart(fig, ax, args.out, "optimizer, max_lr")


if __name__ == "__main__":
    main()
