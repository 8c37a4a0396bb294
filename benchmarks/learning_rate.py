"""
What a step teaches: short trainings of the tiny preset, on 8 x 128 bytes of text a step, with AdamW and Muon
at several learning rates, three seeds each.

    python benchmarks/learning_rate.py         # Python's standard library as text, ten minutes on 2 cores
    python benchmarks/learning_rate.py --data input.txt --steps 100 --seeds 1

Prints the validation loss at the end, mean and standard deviation over seeds, and after what share of the
steps each setting has reached, for good, the final loss of AdamW at the lecture's rate and at its best one.
Losses that differ by less than their deviations are no evidence. Trainings run side by side, one a core.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

LECTURE = 6e-4


def standard_library(path):
    """The modules of this Python's standard library, shuffled, in one text, <|endoftext|> between them."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    text = "<|endoftext|>".join(files[i].read_text(encoding="utf-8") for i in order)
    path.write_text(text, encoding="utf-8")


def train(log_dir, steps, device="cpu", **flags):
    """
    One training of the tiny preset, or what the flags make of it, in a process of one thread. Returns {step:
    validation loss} for 25 steps, the first and the last.
    """
    flags |= {"model": "tiny", "B": 8, "total_batch_size": 1024, "device": device, "log_dir": log_dir,
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="text file or directory of shards (Python's standard library)")
    parser.add_argument("--tokenizer", default="bytes", help="of a text file (%(default)s)")
    parser.add_argument("--lrs", type=float, nargs="+", default=[k * LECTURE for k in (1, 3, 9, 27)])
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--out", default="learning_rate.png", help="the chart (%(default)s)")
    args = parser.parse_args()
    settings = [(optimizer, lr) for optimizer in ("adamw", "muon") for lr in args.lrs]
    jobs = [(*setting, seed) for seed in range(args.seeds) for setting in settings]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        data = Path(args.data or Path(directory, "stdlib.txt")).resolve()
        if not args.data:
            standard_library(data)

        def job(setting):
            optimizer, lr, seed = setting
            log_dir = Path(directory, f"{optimizer}-{lr}-{seed}")
            more = {"optimizer": optimizer, "max_lr": lr, "seed": seed}
            return train(log_dir, args.steps, args.device, data=data, tokenizer=args.tokenizer, **more)

        runs = [*tqdm(pool.map(job, jobs), total=len(jobs))]
    steps = np.array(list(runs[0]))
    losses = {}  # {setting: (seeds, validations)}
    for s in settings:
        losses[s] = np.array([list(run.values()) for job, run in zip(jobs, runs) if job[:2] == s])
    final = {s: curves[:, -1].mean() for s, curves in losses.items()}
    best = min((s for s in settings if s[0] == "adamw"), key=final.get)
    marks = {"lecture": final["adamw", args.lrs[0]], "best": final[best]}

    print(f"{'optimizer':9} {'max_lr':>8} {'final loss':>10} {'std':>6}   steps to AdamW's final loss: "
          f"at {args.lrs[0]:g}, at {best[1]:g}")  # fmt: skip
    for setting, curves in losses.items():
        mean, shares = curves.mean(axis=0), []
        for mark in marks.values():
            step = reached(steps, mean, mark)
            shares.append(f"{'never':>6}" if step is None else f"{step / args.steps:6.0%}")
        std = curves[:, -1].std()
        print(f"{setting[0]:9} {setting[1]:8.2g} {mean[-1]:10.4f} {std:6.4f}   {'  '.join(shares)}")

    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    shades = np.linspace(0.4, 0.95, len(args.lrs))
    for (name, lr), color in zip(settings, np.concatenate((plt.cm.Blues(shades), plt.cm.Oranges(shades)))):
        curves = losses[name, lr]
        ax.plot(steps, curves.mean(axis=0), color=color, label=f"{name} {lr:.2g}: {curves[:, -1].mean():.3f}")
        ax.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.15, lw=0)
    top = np.median([curves.mean(axis=0)[len(steps) // 5] for curves in losses.values()])
    ax.set(xlabel="steps", ylabel="validation loss (nats a token)")
    ax.set_ylim(min(final.values()) - 0.1, top + 0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, ncols=2, title="optimizer, max_lr: final loss")
    fig.savefig(args.out, dpi=110)
    print(f"chart in {args.out}")


if __name__ == "__main__":
    main()
