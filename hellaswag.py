"""
HellaSwag (Zellers et al. 2019): which of four endings continues a text? Judged by the loss that a model has on each.

    python hellaswag.py -m gpt2 -d cuda                              # released weights
    python hellaswag.py -m log/model_19073.pt                        # a checkpoint of train_gpt2.py
    python hellaswag.py --contamination edu_fineweb10B               # which items occur in the training shards?
    python hellaswag.py -m gpt2 --clean hellaswag/contamination.json # and without them?

`acc` takes the ending with the lowest loss summed over its own tokens, `acc_norm` the one with the lowest mean.

Notable choices:
- An item is four rows, context + ending. They are computed as one, in which the context stands once and the endings
  behind it do not see each other; items of like length go together; and logits, a third of a small model's work, are
  made only where a token of an ending is predicted.
- Contamination is GPT-3's test (paper, appendix C): an item is found where 13 of its words in a row are. Words are
  tokens here, those with a letter or digit, since the shards are tokens: GPT-2's BPE never joins two words, so that the
  same words behind spaces are the same tokens. Case, punctuation and white space are ignored, token by token. Missed is
  what is cut into other tokens: a word in capitals, or one that begins a text or follows a quotation mark.
"""

import argparse
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from train_gpt2 import RANK, WORLD_SIZE, Parser, UserError, complete_file, print0, run
from train_gpt2 import find_shards, get_tokenizer, load_model, load_shard

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"


# ----------------------------------------------------------------------------------------------------------------------
# The items.


def download(split):
    """Path of the published file, in hellaswag/, fetched if it is not there. UserError if it can't be."""
    path, url = Path("hellaswag", f"hellaswag_{split}.jsonl"), URL.format(split)
    for wait in (0, 1, 3):
        if path.exists():
            return path
        time.sleep(wait)
        try:
            with urlopen(url, timeout=10) as response:
                size = int(response.headers["Content-Length"] or 0)
                with tqdm.wrapattr(response, "read", total=size, desc=path.name) as body:
                    content = b"".join(iter(lambda: body.read(2**16), b""))
            if len(content) < size:
                raise OSError(f"it broke off after {len(content)} of {size} bytes")
        except (OSError, HTTPException) as e:
            why = e
            continue
        path.parent.mkdir(exist_ok=True)
        with complete_file(path) as f:
            f.write(content)
    if path.exists():
        return path
    raise UserError(f"{url} can't be fetched ({why}): put the file at {path}, or try again")


def load_items(path, tokenizer, block_size=2**20, limit=None):
    """
    [(context, endings, label)] of a file in the published format, a JSON object a line: context a list of tokens,
    endings four of them, each with the space before it; label the number of the right one. What is longer than
    block_size loses the beginning of its context. UserError names a bad line.
    """
    if tokenizer is None:
        raise UserError("HellaSwag needs GPT-2's merges, which can't be downloaded: set TIKTOKEN_CACHE_DIR to a folder of them")
    items, cut = [], 0
    for number, line in enumerate(Path(path).read_bytes().splitlines()[:limit], 1):
        try:
            item = json.loads(line)
            label, texts = int(item["label"]), [item["ctx"], *(" " + ending for ending in item["endings"])]
            if len(texts) != 5 or not 0 <= label < 4:
                raise ValueError(f"label {label} of {len(texts) - 1} endings, there must be four")
            context, *endings = (tokenizer.encode_ordinary(text) for text in texts)
        except KeyError as e:
            raise UserError(f"{path} line {number} has no {e}: delete the file to fetch it again") from None
        except (ValueError, TypeError) as e:
            raise UserError(f"{path} line {number} is not an item ({e}): delete the file to fetch it again") from None
        endings = [ending[: block_size - 1] for ending in endings]
        room = block_size - max(map(len, endings))
        cut += len(context) > room
        items.append((context[-room:] or [tokenizer.eot_token], endings, label))
    if not items:
        raise UserError(f"{path} is empty: delete it to fetch it again")
    if cut:
        print0(f"{cut} items of {path} are longer than {block_size} tokens: their context is cut from the left")
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation.


def render(context, endings):
    """
    The four rows of an item, context + ending, as one: the context, then each ending but for its last token. Returns
    lists: tokens, their positions and segments (0: context, 1 to 4: endings); and the mask, as the places in the row
    from which the tokens of the endings are predicted, one ending after the other.
    """
    n = len(context)
    tokens, positions, segments, places = list(context), list(range(n)), [0] * n, []
    for segment, ending in enumerate(endings, 1):
        places += [n - 1, *range(len(tokens), len(tokens) + len(ending) - 1)]
        tokens += ending[:-1]
        positions += range(n, n + len(ending) - 1)
        segments += [segment] * (len(ending) - 1)
    return tokens, positions, segments, places


@torch.no_grad()
def evaluate(model, items, device, autocast, batch_size=None, progress=False):
    """
    {index: (guess by sum, guess by mean)} for the items of this rank, each guess 0 to 3: of all items, sorted by
    length, every WORLD_SIZE-th. model: a bare GPT; it is left in the mode in which it came. batch_size: items at a
    time, by default 4 on a CPU, else 32.
    """
    batch_size = batch_size or (4 if torch.device(device).type == "cpu" else 32)
    training = model.training
    model.eval()
    lengths = [len(context) + sum(map(len, endings)) for context, endings, _ in items]
    mine, guesses = sorted(range(len(items)), key=lengths.__getitem__)[RANK::WORLD_SIZE], {}
    for first in tqdm(range(0, len(mine), batch_size), disable=not progress):
        batch = mine[first : first + batch_size]
        rendered = [render(*items[i][:2]) for i in batch]
        T = max(len(tokens) for tokens, *_ in rendered)
        packed, where = torch.full((3, len(batch), T), -1), []  # tokens, positions, segments; -1: padding
        for b, (*columns, places) in enumerate(rendered):
            packed[:, b, : len(columns[0])] = torch.tensor(columns)
            where += [b * T + place for place in places]
        idx, pos, segment = packed.to(device)
        sees = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # the context, and its own kind
        mask = sees & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        with autocast:
            x = model.hidden(idx.clamp(min=0), pos.clamp(min=0), mask[:, None]).flatten(0, 1)
            logits = model.lm_head(x[torch.tensor(where, device=device)])[:, : model.config.n_tokens]
        endings = [ending for i in batch for ending in items[i][1]]
        targets = torch.tensor(sum(endings, []), device=device)
        losses = F.cross_entropy(logits.float(), targets, reduction="none").cpu().split([*map(len, endings)])
        by_sum, by_mean = (torch.stack([*map(score, losses)]).view(-1, 4).argmin(1) for score in (torch.sum, torch.mean))
        guesses |= dict(zip(batch, zip(by_sum.tolist(), by_mean.tolist())))
    model.train(training)
    return guesses


def accuracy(guesses, items, device="cpu"):
    """acc and acc_norm of the guesses of all ranks."""
    hits = [(by_sum == items[i][2], by_mean == items[i][2], True) for i, (by_sum, by_mean) in guesses.items()]
    counts = torch.tensor(hits, dtype=torch.int64).view(-1, 3).sum(dim=0).to(device)
    if WORLD_SIZE > 1:
        dist.all_reduce(counts)
    acc, acc_norm, n = counts.tolist()
    return acc / n, acc_norm / n


# ----------------------------------------------------------------------------------------------------------------------
# Contamination.

N = 13  # words in a row
CHUNK = 2**16  # tokens: what is computed from them stays in the cache


def word_codes(tokenizer):
    """For each token a random 64-bit number of its letters and digits, in lower case: uint64 (n_vocab,); 0 without."""
    tokens = map(tokenizer.decode_single_token_bytes, range(tokenizer.n_vocab))
    words = [re.sub(rb"[^0-9a-z\x80-\xff]", b"", token.lower()) for token in tokens]
    words[tokenizer.eot_token] = b"<|endoftext|>"  # like no word: nothing is found across two documents
    _, kind = np.unique(words, return_inverse=True)
    codes = np.random.default_rng(0).integers(1, 2**64, kind.max() + 1, dtype=np.uint64)[kind]
    codes[[word == b"" for word in words]] = 0
    return codes


def ngram_hashes(x, n):
    """Polynomial hash, modulo 2**64, of every n numbers in a row. x: uint64 (m,); returns uint64 (max(m - n + 1, 0),)."""
    m = max(len(x) - n + 1, 0)
    h = x[:m].copy()
    for i in range(1, n):
        h *= np.uint64(0x9E3779B97F4A7C15)  # odd: no bit is lost
        h += x[i : i + m]
    return h


def contamination(items, paths, tokenizer):
    """
    Numbers of the items of whose text, the context and its right ending, 13 words in a row occur in shards; of shorter
    items the whole text. Threads share the shards, as numpy computes without the interpreter's lock.
    """
    codes, owners = word_codes(tokenizer), {}  # owners: {n: {hash: numbers of the items that have it}}
    for i, (context, endings, label) in enumerate(items):
        x = codes[context + endings[label]]
        x = x[x != 0]
        n = min(N, len(x))
        for h in ngram_hashes(x, n).tolist() if n else ():
            owners.setdefault(n, {}).setdefault(h, set()).add(i)
    wanted = {n: np.sort(np.array(list(hashes), dtype=np.uint64)) for n, hashes in owners.items()}
    likely = np.zeros(2**24, dtype=bool)  # by a hash's upper 24 bits: nearly all of a shard ends here
    for hashes in wanted.values():
        likely[hashes >> np.uint64(40)] = True

    def scan(k):
        shard, found, x = load_shard(paths[k], "r"), set(), codes[:0]
        chunks = [shard[i : i + CHUNK] for i in range(0, len(shard), CHUNK)]
        if k + 1 < len(paths):
            chunks.append(load_shard(paths[k + 1], "r")[:1000])  # a document may go on in the next shard
        for chunk in chunks:
            new = codes.take(chunk, mode="clip")
            x = np.concatenate((x[-(N - 1) :], new[new != 0]))
            for n, hashes in wanted.items():
                h = ngram_hashes(x, n)
                h = np.sort(h[likely[h >> np.uint64(40)]])
                nearest = hashes[np.searchsorted(hashes, h).clip(max=len(hashes) - 1)]
                found.update(i for hit in h[h == nearest].tolist() for i in owners[n][hit])
        return len(shard), found

    overlapping = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit=" tokens", unit_scale=True) as progress:
        for done, (tokens, found) in enumerate(pool.map(scan, range(len(paths))), 1):
            overlapping |= found
            progress.total = (progress.n + tokens) * len(paths) // done
            progress.update(tokens)
    return sorted(overlapping)


# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="released name, Hugging Face directory or .pt checkpoint")
    parser.add_argument("-d", "--device", choices=("cpu", "cuda", "mps"), help="(cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(bfloat16 on cuda, else float32)")
    parser.add_argument("--batch_size", type=int, help="items at a time; guesses do not depend on it (4 on cpu, else 32)")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of the published files (val)")
    parser.add_argument("--data", metavar="FILE", help="a .jsonl file in the published format instead")
    parser.add_argument("--limit", type=int, help="only the first items (all)")
    parser.add_argument("--tokenizer", metavar="NAME", help="gpt2, bytes, or a tokenizer.json (the model's)")
    parser.add_argument("--contamination", metavar="DIR", help="directory of shards in which to look for the items")
    parser.add_argument("--out", default="hellaswag/contamination.json", help="what --contamination writes (%(default)s)")
    parser.add_argument("--clean", metavar="FILE", help="what --contamination wrote: judge clean and other items apart")
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.contamination):
        raise UserError("give either a model with -m, or a directory of shards with --contamination")
    for name in "batch_size", "limit":
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is too small: at least 1")
    for name in "data", "clean":
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            raise UserError(f"there is no file --{name} {getattr(args, name)}: check its name")
    path = args.data or download(args.split)

    if args.contamination:
        splits, vocabulary, _ = find_shards(args.contamination, 1)
        tokenizer = get_tokenizer(vocabulary["tokenizer"])
        items = load_items(path, tokenizer, limit=args.limit)
        found = contamination(items, list(splits["train"].values()), tokenizer)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with complete_file(args.out) as f:
            record = {"data": Path(path).name, "items": len(items), "shards": args.contamination, "overlapping": found}
            f.write(json.dumps(record).encode())
        print(f"{len(found):,} of {len(items):,} items ({len(found) / len(items):.1%}) overlap: listed in {args.out}")
        return

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    model = load_model(args.model).to(device)
    items = load_items(path, get_tokenizer(args.tokenizer or model.config.tokenizer), model.config.block_size, args.limit)
    parts = {}
    if args.clean:
        record = json.loads(Path(args.clean).read_text())
        if (record["data"], record["items"]) != (Path(path).name, len(items)):
            raise UserError(f"--clean {args.clean} is about {record['items']} items of {record['data']}: give the same")
        overlapping = set(record["overlapping"])
        parts = {"clean": set(range(len(items))) - overlapping, "overlapping": overlapping}
    guesses = evaluate(model, items, device, autocast, args.batch_size, progress=True)
    for name, part in {args.model: guesses.keys(), **parts}.items():
        acc, acc_norm = accuracy({i: guesses[i] for i in part}, items) if part else (math.nan, math.nan)
        print(f"{name}: acc {acc:.4f} acc_norm {acc_norm:.4f} on {len(part):,} items")


if __name__ == "__main__":
    run(main)
