"""
hellaswag.py against the plain way: transformers' GPT2LMHeadModel, an item at a time, logits of all four rows.

    python benchmarks/hellaswag.py                 # GPT-2 124M with random weights, made-up items
    python benchmarks/hellaswag.py --items 32 --rounds 5 --dtype bfloat16

Prints items a second of both, medians of alternating rounds, and their ratio. In float32, guesses that differ
are an error. Then tokens a second of --contamination, for 10,000 items in four shards of random tokens. Takes
some five minutes on two cores, and needs GPT-2's tokenizer, a download (offline: --tokenizer bytes).
"""

import sys
from pathlib import Path

# Import from the project's folder, not from benchmarks/, which has a hellaswag.py of its own.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import statistics
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from benchmarks.machine import machine
from fineweb import get_tokenizer, make_parser
from train_gpt2 import GPT, GPTConfig, transpose_conv1d


def made_up_items(n, n_vocab=50256):
    """Contexts of 20 to 100 random tokens, endings of 10 to 40, much as HellaSwag's are."""
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.integers(0, n_vocab, rng.integers(low, high)).tolist()

    return [(tokens(20, 100), [tokens(10, 40) for _ in range(4)], 0) for _ in range(n)]


@torch.no_grad()
def plain(model, items, device):
    guesses = {}
    for i, (context, endings, _) in enumerate(items):
        rows = [context + ending for ending in endings]
        idx = torch.zeros(4, max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(idx)
        for r, row in enumerate(rows):
            idx[r, : len(row)] = torch.tensor(row)
            mask[r, len(context) : len(row)] = 1
        idx, mask = idx.to(device), mask.to(device)
        logits, targets = model(idx).logits[:, :-1].flatten(0, 1).float(), idx[:, 1:].flatten()
        losses = F.cross_entropy(logits, targets, reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(dim=1)
        guesses[i] = sums.argmin().item(), (sums / mask.sum(dim=1)).argmin().item()
    return guesses


def scan(tokens, tokenizer):
    """Tokens a second of a search for 10,000 items in four shards of random tokens. tokens: of all shards."""
    rng, items = np.random.default_rng(1), made_up_items(10_000, tokenizer.eot_token)
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, f"{i}.npy") for i in range(4)]
        for path in paths:
            np.save(path, rng.integers(0, tokenizer.n_vocab, tokens // 4, dtype=np.uint16))
        start = time.perf_counter()
        hellaswag.contamination(items, paths, tokenizer)
        return tokens / (time.perf_counter() - start)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--items", type=int, default=64, help="number of made-up items (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measured; the median counts (%(default)s)")
    parser.add_argument("--scan", type=int, default=400_000_000, help="tokens to scan (%(default)s)")
    parser.add_argument("--tokenizer", default="gpt2", help="whose tokens are scanned (%(default)s)")
    parser.add_argument("--n_layer", type=int, default=12, help="layers of the model (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)")
    args = parser.parse_args()
    tokenizer = get_tokenizer(args.tokenizer)
    print(machine(args.device))
    model = GPT(GPTConfig(n_layer=args.n_layer)).to(args.device).eval()
    hf = GPT2LMHeadModel(GPT2Config(n_layer=args.n_layer)).to(args.device).eval()
    hf.load_state_dict(transpose_conv1d(model.state_dict()))
    items, seconds = made_up_items(args.items), {"plain": [], "ours": []}
    for _ in range(args.rounds + 1):  # the first is to warm up
        guesses = []
        for way in seconds:
            start = time.perf_counter()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                if way == "plain":
                    guesses.append(plain(hf, items, args.device))
                else:
                    guesses.append(hellaswag.evaluate(model, items))
            seconds[way].append(time.perf_counter() - start)
        assert args.dtype != "float32" or guesses[0] == guesses[1]
    a, b = (args.items / statistics.median(times[1:]) for times in seconds.values())
    print(f"{args.device}, {args.dtype}: {a:.2f} items a second one at a time with transformers, "
          f"{b:.2f} with hellaswag.py: {b / a:.2f} times")  # fmt: skip
    speed = scan(args.scan, tokenizer)
    print(f"--contamination: {speed / 1e6:.0f} million tokens a second")


if __name__ == "__main__":
    main()
