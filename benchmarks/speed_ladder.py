"""
How fast is a training step, and where does its time go? Each rung of the lecture's ladder, 1000 to 90 ms a
step on an A100, on your own machine.

    python benchmarks/speed_ladder.py                      # GPT-2 124M; B=4 on a CPU, 16 on a GPU; T=1024
    python benchmarks/speed_ladder.py --n_layer 2 --T 256  # in a few minutes

Each rung keeps what the rungs before it have. A rung is a process of its own, started once a round, so that
each has its own memory, and a slow minute of the machine is shared by all. Its figure is the median over the
rounds of all steps but the first. A step is forward, backward, clipping and the optimizer's step on the same
B x T random tokens. The last rung that is compiled is measured again with other B, and PyTorch's profiler
divides the time of its step. A rung that does not fit into memory is left out.
"""

import sys
from pathlib import Path

# Import from the project's folder, not from benchmarks/, which has a hellaswag.py of its own.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import ctypes
import json
import math
import resource
import statistics
import subprocess
import time
from collections import Counter

import torch
import torch.nn.functional as F

from benchmarks.machine import machine
from fineweb import make_parser
from train_gpt2 import GPT, GPTConfig

# Name, what it adds to the one before, the lecture's ms on an A100 (B=16, T=1024), the devices that have it.
RUNGS = [
    ("float32", {}, 1000, ("cpu", "cuda")),
    ("TF32", {"tf32": True}, 333, ("cuda",)),
    ("bfloat16 autocast", {"bfloat16": True}, 300, ("cpu", "cuda")),
    ("torch.compile", {"compile": True}, 130, ("cpu", "cuda")),
    ("flash attention", {"flash": True}, 96, ("cpu", "cuda")),
    ("vocabulary 50,304", {"vocab_size": 50304}, 93, ("cpu", "cuda")),
    ("fused AdamW", {"fused": True}, 90, ("cpu", "cuda")),
    ("freed memory kept", {"keep": True}, None, ("cpu",)),
    ("not compiled", {"compile": False}, None, ("cpu", "cuda")),
]
# FLOP/s of dense matrix products, from NVIDIA's data sheets and white papers: in bfloat16, added up in
# float32; in float32 for T4 and V100, which have no bfloat16. The first that is part of a GPU's name is used.
PEAK_FLOPS = {
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "T4": 8.1e12, "V100": 15.7e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12,
}  # fmt: skip
# Words in the profiler's names of a GPU's kernels and a CPU's functions. The first match counts.
KINDS = {
    "compiled": ("triton_", "compiled"),
    "attention": ("flash", "fmha", "sdpa", "cudnn", "scaled_dot"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "splitk", "::mm", "addmm", "mkldnn"),
    "clipping and AdamW": ("adam", "multi_tensor", "foreach", "vector_norm"),
}


def rungs(device):
    """{name: options}, options accumulated, without rungs that this device does not have."""
    ladder, options = {}, {"vocab_size": 50257}
    for name, more, _, devices in RUNGS:
        if device in devices:
            options = options | more
            ladder[name] = options
    return ladder


def plain_attention(q, k, v, dropout_p, is_causal):
    """Takes the place of F.scaled_dot_product_attention, and stores the (T, T) scores. Dropout is 0 here."""
    att = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
    att = att.masked_fill(~torch.ones(att.shape[-2:], dtype=torch.bool, device=q.device).tril(), -math.inf)
    return att.softmax(dim=-1) @ v


def keep_freed_memory():
    """As train_gpt2.py does at its start: glibc keeps freed memory, and does not give it back."""
    with contextlib.suppress(OSError, AttributeError):  # not every system has glibc
        ctypes.CDLL("libc.so.6").mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL("libc.so.6").mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def flops_per_token(n_params, n_layer, n_embd, T):
    """Forward and backward (PaLM paper, appendix B): 6 for each weight in a matrix product (the position
    embedding is in none), and 12 * T * n_embd in each layer for attention."""
    return 6 * (n_params - T * n_embd) + 12 * n_layer * n_embd * T


def wait(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def make_step(
    args, vocab_size, tf32=False, bfloat16=False, compile=False, flash=False, fused=False, keep=False
):
    """A function that does a training step and returns its loss, a tensor."""
    if keep:
        keep_freed_memory()
    if not flash:
        F.scaled_dot_product_attention = plain_attention  # train_gpt2.py finds it there
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.manual_seed(42)
    # The weights are the same with and without the padding of the vocabulary.
    drawn = GPT(GPTConfig(args.T, 50304, args.n_layer, args.n_head, args.n_embd)).state_dict()
    for name in "transformer.wte.weight", "lm_head.weight":
        drawn[name] = drawn[name][:vocab_size]
    model = GPT(GPTConfig(args.T, vocab_size, args.n_layer, args.n_head, args.n_embd))
    model.load_state_dict(drawn)
    model.to(args.device)
    how = {"fused": True} if fused else {"foreach": False}  # foreach=False: a tensor at a time
    how |= {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    train_model = torch.compile(model) if compile else model
    torch.manual_seed(0)
    tokens = torch.randint(50257, (args.B, args.T + 1)).to(args.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=bfloat16):
            loss = train_model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(args, options):
    """{"loss": before the first step, "first": its seconds, "ms": of each other step, "MB": peak memory}."""
    step, times = make_step(args, **options), []
    for i in range(args.steps + 1):
        wait(args)
        start = time.perf_counter()
        loss = step()
        wait(args)
        times.append(time.perf_counter() - start)
        if i == 0:
            first_loss = loss.item()
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"loss": first_loss, "first": times[0], "ms": [1000 * t for t in times[1:]], "MB": peak}


def measure_matmul(args):
    """ms of a step's matrix products alone, in bfloat16: each weight's in forward, and two in backward."""
    if args.device == "cpu":
        keep_freed_memory()
    C, N, total = args.n_embd, args.B * args.T, 0
    weights = [(args.n_layer, n, k) for n, k in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))]
    for count, n, k in [*weights, (1, 50304, C)]:
        w, x = (torch.randn(shape, device=args.device).bfloat16() for shape in ((n, k), (N, k)))
        y, times = F.linear(x, w), []
        for _ in range(args.steps + 1):
            wait(args)
            start = time.perf_counter()
            F.linear(x, w), y @ w, y.t() @ x
            wait(args)
            times.append(time.perf_counter() - start)
        total += count * statistics.median(times[1:]) * 1000
    return {"ms": [total]}


def profile(args, options):
    """{kind: share of a step's time}, where a kind is one of KINDS, "rest" or "waiting"."""
    step, times = make_step(args, **options), Counter()  # microseconds
    for _ in range(3):
        step()
    wait(args)
    with torch.profiler.profile() as profiler:
        start = time.perf_counter()
        for _ in range(3):
            step()
        wait(args)
        total = (time.perf_counter() - start) * 1e6
    cuda = args.device == "cuda"
    for event in profiler.key_averages():
        # With a GPU, only what runs on it. An annotation is a range of time, whose kernels are events too.
        if event.is_user_annotation or (cuda and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "rest")
        times[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    times["waiting"] = total - times.total()
    return {kind: t / total for kind, t in times.most_common()}


def start_process(args, **flags):
    """Run this script in a new process, with its own flags and these. Returns what it measured, None if it
    failed."""
    more = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run([sys.executable, *sys.argv, *more], capture_output=True, text=True)
    print(" ".join(map(str, flags.values())), "failed" if done.returncode else "", file=sys.stderr)
    if done.returncode:
        print("  " + (done.stderr.splitlines() or ["killed"])[-1], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def report(args, medians, results, sweep):
    """Print a line for each rung, and for each other B."""
    with torch.device("meta"):  # parameters that have shapes but no memory
        model = GPT(GPTConfig(args.T, 50304, args.n_layer, args.n_head, args.n_embd))
    n_params = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(n_params, args.n_layer, args.n_embd, args.T)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
    matmul = medians.pop("matmul", math.nan)

    def line(name, B, result, ms):
        mfu = f"{flops * B * args.T / ms * 1000 / peak:.1%}" if peak else ""
        print(f"{name:18} {ms:7.0f} {B * args.T / ms * 1000:9,.0f} {mfu:>6} {result['MB']:7.0f} "
              f"{result['first']:6.1f} {result['loss']:8.4f}", end="")  # fmt: skip

    print(f"{n_params / 1e6:.0f}M parameters, {args.B} x {args.T} tokens a step")
    print(f"the bfloat16 matrix products of a step alone: {matmul:.0f} ms")
    print("MB: peak memory; first: seconds of the first step; gain: over the line above;")
    print("matmul: share of a step that its matrix products need; A100: the lecture's ms")
    print(f"{'':18} {'ms':>7} {'tokens/s':>9} {'MFU':>6} {'MB':>7} {'first':>6} {'loss':>8} {'gain':>6} "
          f"{'matmul':>6} {'A100':>5}")  # fmt: skip
    lecture, before = {name: ms for name, _, ms, _ in RUNGS}, None
    for name, ms in medians.items():
        line(name, args.B, results[name][0], ms)
        print(f" {before / ms if before else 1:6.2f} {matmul / ms:6.0%} {lecture[name] or '':>5}")
        before = ms
    for B, result in sweep.items():
        if result:
            line(f"compiled, B={B}", B, result, statistics.median(result["ms"]))
            print()


def main():
    parser = make_parser(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(%(default)s)")
    for name, default in ("n_layer", 12), ("n_head", 12), ("n_embd", 768), ("T", 1024):
        parser.add_argument(f"--{name}", type=int, default=default, help="as of train_gpt2.py (%(default)s)")
    parser.add_argument("--B", type=int, help="rows of a step (4 on a CPU, 16 on a GPU)")
    parser.add_argument("--sweep", type=int, nargs="*", help="other B, compiled (on a GPU 4 8 32 64)")
    parser.add_argument("--steps", type=int, help="measured in each round (3 on a CPU, 20 on a GPU)")
    parser.add_argument("--rounds", type=int, help="processes for each rung (3 on a CPU, 1 on a GPU)")
    parser.add_argument("--rung", help=argparse.SUPPRESS)  # what a process is told to measure
    args = parser.parse_args()
    cuda = args.device == "cuda"
    defaults = {"B": 16, "steps": 20, "rounds": 1} if cuda else {"B": 4, "steps": 3, "rounds": 3}
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name) or value)
    if args.sweep is None:
        args.sweep = [4, 8, 32, 64] if cuda else []
    ladder = rungs(args.device)
    compiled = list(ladder)[-2]  # the last rung that is: only "not compiled" comes after it

    if args.rung:
        if args.rung == "matmul":
            result = measure_matmul(args)
        elif args.rung == "profile":
            result = profile(args, ladder[compiled])
        else:
            result = measure(args, ladder[args.rung])
        print(json.dumps(result))
        return

    print(machine(args.device))
    names = *ladder, "matmul"
    rounds = [{name: start_process(args, rung=name) for name in names} for _ in range(args.rounds)]
    results = {name: [r[name] for r in rounds if r[name]] for name in names}
    results = {name: found for name, found in results.items() if found}
    medians = {name: statistics.median(ms for result in found for ms in result["ms"])
               for name, found in results.items()}  # fmt: skip
    sweep = {B: start_process(args, B=B, rung=compiled) for B in args.sweep}
    report(args, medians, results, sweep)
    if shares := start_process(args, rung="profile"):
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
        print(f"where the time goes in {compiled}: {shares}")


if __name__ == "__main__":
    main()
