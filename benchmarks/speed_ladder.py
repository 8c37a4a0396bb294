"""
The lecture's ladder, 1000 to 90 ms a step on an A100, on your own machine, and this project's rungs above.

    python benchmarks/speed_ladder.py                          # GPT-2 124M; B=4 on a CPU, 64 on a GPU; T=1024
    python benchmarks/speed_ladder.py --n_layer 2 --T 256      # in a few minutes

Each rung keeps what the one below it brought. A rung is a process of its own, started once a round, so that
each has its own memory and the machine's moods are shared; its figure is the median over rounds of all steps
but the first of each. A step is forward, backward, clipping and the optimizer's step on the same B x T random
tokens.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import resource
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F

from train_gpt2 import GPT, PEAK_FLOPS, GPTConfig, set_up_process

# Name, what it adds to the one above, and the lecture's ms on one A100 (B=16, T=1024).
RUNGS = [
    ("float32", {}, 1000),
    ("TF32", {"tf32": True}, 333),
    ("bfloat16 autocast", {"bfloat16": True}, 300),
    ("torch.compile", {"compile": True}, 130),
    ("flash attention", {"flash": True}, 96),
    ("vocabulary 50,304", {"vocab_size": 50304}, 93),
    ("fused AdamW", {"fused": True}, 90),
    ("freed memory kept", {"keep": True}, None),
    ("all but compile", {"compile": False}, None),
]
# What the last two are compared with: AdamW a parameter at a time, nothing compiled.
PLAIN = "plain eager"


def rungs(device):
    """{name: (options, lecture's ms)}, options accumulated, without the rungs that this device has not."""
    ladder, options = {}, {"vocab_size": 50257}
    for name, more, lecture in RUNGS:
        if not ("tf32" in more and device != "cuda" or "keep" in more and device != "cpu"):
            options = options | more
            ladder[name] = options, lecture
    ladder[PLAIN] = {"vocab_size": 50304, "tf32": device == "cuda", "bfloat16": True, "flash": True}, None
    return ladder


def four_line_attention(q, k, v, dropout_p, is_causal):
    att = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
    att = att.masked_fill(~torch.ones(att.shape[-2:], dtype=torch.bool, device=q.device).tril(), -math.inf)
    return att.softmax(dim=-1) @ v


def measure(args, vocab_size, **options):
    """One rung, in this process: {"ms": of each step, "loss": before the first one, "MB": peak memory}."""
    names = "tf32", "bfloat16", "compile", "flash", "fused", "keep"
    tf32, bfloat16, compile, flash, fused, keep = (options.get(name, False) for name in names)
    if keep:
        set_up_process()  # and TF32, which is set for each rung below
    if not flash:
        F.scaled_dot_product_attention = four_line_attention
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.manual_seed(42)
    drawn = GPT(GPTConfig(args.T, 50304, args.n_layer, args.n_head, args.n_embd)).state_dict()
    model = GPT(GPTConfig(args.T, vocab_size, args.n_layer, args.n_head, args.n_embd))
    for name in "transformer.wte.weight", "lm_head.weight":
        drawn[name] = drawn[name][:vocab_size]
    model.load_state_dict(drawn)
    del drawn
    model.to(args.device)
    how = {"fused": True} if fused else {"foreach": False}
    how |= {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    train_model = torch.compile(model) if compile else model
    torch.manual_seed(0)
    tokens = torch.randint(50257, (args.B, args.T + 1)).to(args.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    ms, losses = [], []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=bfloat16):
            _, loss = train_model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        ms.append((time.perf_counter() - start) * 1000)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"ms": ms[1:], "loss": losses[0], "MB": peak}


def measure_matmul(args):
    """ms of a step's matrix products alone, in bfloat16: each weight's in forward, and two in backward."""
    set_up_process()
    C, N, total = args.n_embd, args.B * args.T, 0
    weights = [(args.n_layer, n, k) for n, k in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))]
    weights.append((1, 50304, C))
    for count, n, k in weights:
        w, x = (torch.randn(shape, device=args.device).bfloat16() for shape in ((n, k), (N, k)))
        y, times = F.linear(x, w), []
        for _ in range(args.steps + 1):
            if args.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            F.linear(x, w), y @ w, y.t() @ x
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        total += count * statistics.median(times[1:]) * 1000
    return {"ms": [total]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in ("n_layer", 12), ("n_head", 12), ("n_embd", 768), ("T", 1024):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--B", type=int, help="rows of a step (4 on a CPU, 64 on a GPU)")
    parser.add_argument("--steps", type=int, default=3, help="measured in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", default="speed_ladder.png", help="the chart (%(default)s)")
    parser.add_argument("--rung", help=argparse.SUPPRESS)  # what a process is told to measure
    args = parser.parse_args()
    args.B = args.B or (64 if args.device == "cuda" else 4)
    ladder = rungs(args.device)
    if args.rung:
        one = measure_matmul(args) if args.rung == "matmul" else measure(args, **ladder[args.rung][0])
        print(json.dumps(one))
        return

    results = {rung: [] for rung in (*ladder, "matmul")}
    for number in range(args.rounds):
        for rung in results:
            done = subprocess.run([sys.executable, *sys.argv, "--rung", rung], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{rung}: {done.stderr}")
            results[rung].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} of {args.rounds}: {rung}", file=sys.stderr)
    times = {rung: [ms for result in rounds for ms in result["ms"]] for rung, rounds in results.items()}
    medians = {rung: statistics.median(ms) for rung, ms in times.items()}
    matmul = medians.pop("matmul")
    model = GPT(GPTConfig(args.T, 50304, args.n_layer, args.n_head, args.n_embd))
    n_params = sum(p.numel() for p in model.parameters())
    a_token = 6 * (n_params - args.T * args.n_embd) + 12 * args.n_layer * args.n_embd * args.T
    flops = a_token * args.B * args.T
    kind = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    peak = next((v for k, v in PEAK_FLOPS.items() if k in kind), None)
    print(f"GPT-2 with {n_params:,} parameters, B={args.B}, T={args.T}, {kind}, torch {torch.__version__}")
    print(f"The bfloat16 matrix products of a step alone: {matmul:.0f} ms; `matmul` is its share of a rung.")
    print(f"{'':24} {'ms':>7} {'tokens/s':>9} {'gain':>6} {'in all':>6} {'matmul':>7} {'MFU':>6} {'MB':>6} "
          f"{'loss':>8} {'A100':>6}")  # fmt: skip
    before = first = medians["float32"]
    for rung, ms in medians.items():
        gain = "" if rung == PLAIN else f"{before / ms:.2f}"
        mfu = f"{flops / ms * 1000 / peak:.1%}" if peak else ""
        memory, loss = max(result["MB"] for result in results[rung]), results[rung][0]["loss"]
        print(
            f"{rung:24} {ms:7.0f} {args.B * args.T / ms * 1000:9,.0f} {gain:>6} {first / ms:6.2f} "
            f"{matmul / ms:7.0%} {mfu:>6} {memory:6.0f} {loss:8.4f} {ladder[rung][1] or '':>6}"
        )
        before = ms

    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 0.4 * len(medians) + 1), layout="constrained")
    colors = ["#3465a4" if rung != PLAIN else "#999999" for rung in medians]
    ax.barh(medians.keys(), medians.values(), color=colors)
    for i, ms in enumerate(medians.values()):
        ax.text(ms, i, f" {ms:,.0f}", va="center")
    ax.axvline(matmul, color="#c03030", ls="--", lw=1)
    ax.text(matmul, -0.55, " matrix products alone", color="#c03030", size=8, va="bottom")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    title = f"{n_params / 1e6:.0f}M parameters, {args.B} x {args.T} tokens, {kind}"
    ax.set(xlabel="ms a step", xlim=(0, 1.12 * max(medians.values())))
    ax.set_title(title, pad=18)
    fig.savefig(args.out, dpi=110)
    print(f"chart in {args.out}")


if __name__ == "__main__":
    main()
