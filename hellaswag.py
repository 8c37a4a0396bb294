"""
HellaSwag (Zellers et al. 2019): which of four endings continues a text? A
model's answer is the ending on which its loss is lowest.

    python hellaswag.py -m gpt2 -d cuda              # released weights
    python hellaswag.py -m log/model_19073.pt        # your own checkpoint
    # which items occur in the shards? And the accuracy without those items
    python hellaswag.py --contamination edu_fineweb10B
    python hellaswag.py -m gpt2 --clean hellaswag/contamination.json

`acc` takes the ending with the lowest loss summed over its tokens, `acc_norm`
the one with the lowest mean.

Notable choices:
- An item is four rows, context + ending, padded on the right, where causal
  attention never looks. Rows of similar length go together, and logits are
  computed only where a token of an ending is predicted.
- Contamination is the test of the GPT-3 paper (appendix C): an item is
  contaminated if 13 of its words in a row occur in the shards. The shards are
  tokens, so a word is a token with a letter or digit. Case and punctuation of
  ASCII, and white space, are ignored; other characters count as letters. A
  word that is split into other tokens, as one in capitals may be, is not found.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from fineweb import RANK, UserError, complete_file, find_shards, get_tokenizer, make_parser
from fineweb import open_shard, print0, readable, run, warn_only, write_json

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"


# --------------------------------------------------------------------------------------------------
# The items


def download(split):
    """Path of the published file, hellaswag/hellaswag_{split}.jsonl, which is fetched if it is not there."""
    path, url = Path("hellaswag", f"hellaswag_{split}.jsonl"), URL.format(split)
    if not path.exists():
        with readable(url, f"try again, or put the file at {path}"), urlopen(url, timeout=10) as response:
            content = response.read()  # raises an error if the connection ends early
        path.parent.mkdir(exist_ok=True)
        with complete_file(path) as f:
            f.write(content)
    return path


def load_items(path, tokenizer, block_size=2**20, limit=None):
    """[(context, endings, label)] from a file in the published format, one JSON object a line. context: list
    of tokens; endings: four of them, each with the space before it; label: index of the right one. The
    beginning of a context is dropped where a row would be longer than block_size."""
    items, cut, mend = [], 0, "give a file in HellaSwag's format, or delete a fetched one"
    with readable(path, mend):
        lines = Path(path).read_bytes().splitlines()[:limit]
    for number, line in enumerate(lines, 1):
        with readable(f"{path} line {number}", mend):
            item = json.loads(line)
            label, endings = int(item["label"]), item["endings"]
            if len(endings) != 4 or not 0 <= label < 4:
                raise ValueError(f"it has {len(endings)} endings and label {label}, not 4 and 0 to 3")
            context = tokenizer.encode_ordinary(item["ctx"]) or [tokenizer.eot_token]
            endings = [tokenizer.encode_ordinary(" " + ending)[: block_size - 1] for ending in endings]
            room = block_size - max(map(len, endings))
            cut += len(context) > room
            items.append((context[-room:], endings, label))
    if not items:
        raise UserError(f"{path} is empty: delete it to fetch it again")
    if cut:
        print0(f"{cut} items of {path} are longer than {block_size} tokens: their contexts are cut")
    return items


def load_items_on_all_ranks(tokenizer, block_size):
    """The validation items, which rank 0 loads for all ranks; None, with a warning, if they can't be had."""
    items = [None]
    if RANK == 0 and tokenizer:
        with warn_only("training goes on without HellaSwag"):
            items = [load_items(download("val"), tokenizer, block_size)]
    if dist.is_initialized():
        dist.broadcast_object_list(items)
    return items[0]


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, items, batch_size=None, rank=0, world_size=1, stop=(), progress=False):
    """{index of item: (guess by sum, guess by mean)} for this rank's share, every world_size-th item. A guess
    is 0 to 3. model: a bare GPT, which is left in the mode in which it came. batch_size: rows at a time; by
    default 16 on a CPU, else 128. When `stop` is not empty, the evaluation ends early, with {}."""
    device, training = next(model.parameters()).device, model.training
    batch_size = batch_size or (16 if device.type == "cpu" else 128)
    model.eval()
    mine = range(rank, len(items), world_size)
    rows = [(i, k, items[i][0] + items[i][1][k], len(items[i][1][k])) for i in mine for k in range(4)]
    rows.sort(key=lambda row: len(row[2]))  # so that little of a batch is padding
    sums, means = torch.zeros(2, len(items), 4)
    for first in tqdm(range(0, len(rows), batch_size), disable=not progress):
        if stop:
            break
        batch = rows[first : first + batch_size]
        idx = torch.zeros(len(batch), len(batch[-1][2]), dtype=torch.int64)
        predicts = torch.zeros_like(idx, dtype=torch.bool)  # where the next token is one of the ending
        for r, (_, _, row, n) in enumerate(batch):
            idx[r, : len(row)] = torch.tensor(row)
            predicts[r, len(row) - n - 1 : len(row) - 1] = True
        hidden = model.hidden(idx.to(device))[predicts.to(device)]  # (tokens of all endings, n_embd)
        targets = torch.tensor([token for _, _, row, n in batch for token in row[-n:]], device=device)
        losses = F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none").cpu()
        for (i, k, _, _), loss in zip(batch, losses.split([n for *_, n in batch])):
            sums[i, k], means[i, k] = loss.sum(), loss.mean()
    model.train(training)
    return {} if stop else {i: (int(sums[i].argmin()), int(means[i].argmin())) for i in mine}


def accuracy(guesses, items):
    """(acc, acc_norm) of the guesses of all ranks; NaN without any."""
    hits = [(by_sum == items[i][2], by_mean == items[i][2], True) for i, (by_sum, by_mean) in guesses.items()]
    counts = torch.tensor(hits, dtype=torch.float64).view(-1, 3).sum(dim=0)
    if dist.is_initialized():
        dist.all_reduce(counts)
    return (counts[:2] / counts[2]).tolist()


# --------------------------------------------------------------------------------------------------
# Contamination

N = 13  # words in a row
CHUNK = 2**16  # tokens that are searched at a time: they and their hashes fit into a processor's cache


def word_codes(tokenizer):
    """uint64 (n_vocab,): a random number for each word, a token's letters and digits in lower case, and 0 for
    a token without any. End of text is the word endoftext, so that nothing is found across two documents."""
    tokens = map(tokenizer.decode_single_token_bytes, range(tokenizer.n_vocab))
    words = [re.sub(rb"[^0-9a-z\x80-\xff]", b"", token.lower()) for token in tokens]
    _, kind = np.unique(words, return_inverse=True)
    codes = np.random.default_rng(0).integers(1, 2**64, kind.max() + 1, dtype=np.uint64)[kind]
    codes[[word == b"" for word in words]] = 0
    return codes


def ngram_hashes(x, n):
    """Polynomial hash, modulo 2**64, of every n numbers in a row of x: uint64 (m,) -> (m - n + 1,)."""
    m = max(len(x) - n + 1, 0)
    h = x[:m].copy()
    for i in range(1, n):
        h *= np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit is lost
        h += x[i : i + m]
    return h


def contamination(items, paths, tokenizer):
    """Sorted indices of the items of which 13 words in a row, in the context followed by the right ending,
    occur in the shards. An item with fewer words must occur as a whole. Each thread scans a shard."""
    codes, items_with = word_codes(tokenizer), {}  # items_with: {n: {hash of n words: indices of items}}
    for i, (context, endings, label) in enumerate(items):
        x = codes[context + endings[label]]
        x = x[x != 0]
        n = min(N, len(x))
        for h in ngram_hashes(x, n).tolist() if n else ():
            items_with.setdefault(n, {}).setdefault(h, set()).add(i)
    likely = np.zeros(2**24, dtype=bool)  # by a hash's upper 24 bits: excludes nearly all n-grams of a shard
    for wanted in items_with.values():
        likely[np.array(list(wanted), dtype=np.uint64) >> np.uint64(40)] = True

    def scan(k):
        shard, found, x = open_shard(paths[k]), set(), codes[:0]
        chunks = [shard[i : i + CHUNK] for i in range(0, len(shard), CHUNK)]
        if k + 1 < len(paths):
            chunks.append(open_shard(paths[k + 1])[:1000])  # a document may go on in the next shard
        for chunk in chunks:
            new = codes.take(chunk, mode="clip")  # faster than to check that each token is in range
            x = np.concatenate((x[-(N - 1) :], new[new != 0]))
            for n, wanted in items_with.items():
                h = ngram_hashes(x, n)
                for hit in wanted.keys() & h[likely[h >> np.uint64(40)]].tolist():
                    found |= wanted[hit]
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sorted(set().union(*tqdm(pool.map(scan, range(len(paths))), total=len(paths), unit=" shards")))


# --------------------------------------------------------------------------------------------------
# The command


def parse_args(argv):
    parser = make_parser(__doc__)
    flag, task = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    task("-m", "--model", help="released name, Hugging Face directory or .pt")
    task("--contamination", metavar="DIR", help="shards to search for items")
    flag("-d", "--device", choices=("cpu", "cuda", "mps"), help="(cuda where there is one, else cpu)")
    flag("--dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    flag("--batch_size", type=int, help="rows at a time (16 on cpu, else 128)")
    flag("--split", choices=("train", "val"), default="val", help="of the published files (%(default)s)")
    flag("--data", metavar="FILE", help="a .jsonl file in the published format instead")
    flag("--limit", type=int, help="only the first items (all)")
    flag("--tokenizer", metavar="NAME", help="gpt2, bytes, or a tokenizer.json (the model's)")
    flag("--out", default="hellaswag/contamination.json", help="result of --contamination (%(default)s)")
    flag("--clean", metavar="FILE", help="such a result: also evaluate clean and overlapping items apart")
    args = parser.parse_args(argv)
    for name, value in ("batch_size", args.batch_size), ("limit", args.limit):
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: it must be at least 1")
    return args


def write_contamination(args):
    shards = find_shards(args.contamination)
    path = args.data or download(args.split)
    tokenizer = get_tokenizer(shards.tokenizer)
    items = load_items(path, tokenizer, limit=args.limit)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # if that fails, now and not after the scan
    found = contamination(items, list(shards.train.values()), tokenizer)
    about = {"data": Path(path).name, "items": len(items), "shards": args.contamination}
    write_json(args.out, about | {"overlapping": found})
    print0(f"{len(found):,} of {len(items):,} items ({len(found) / len(items):.1%}) overlap: see {args.out}")


def main(argv=None):
    args = parse_args(argv)
    if args.contamination:
        return write_contamination(args)

    from train_gpt2 import GPT  # here, because train_gpt2.py imports this file

    path = args.data or download(args.split)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with readable(f"{args.model} on {device}", "choose another --model or --device"):
        model = GPT.from_pretrained(args.model).to(device)
    tokenizer = get_tokenizer(args.tokenizer or model.config.tokenizer)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"--tokenizer {tokenizer.name} has more tokens than {args.model}: leave it out")
    items = load_items(path, tokenizer, model.config.block_size, args.limit)
    parts, everything = {}, set(range(len(items)))
    if args.clean:
        with readable(args.clean, "make it again with --contamination"):
            record = json.loads(Path(args.clean).read_text())
            overlapping, data, n = set(record["overlapping"]), record["data"], record["items"]
        if (data, n) != (Path(path).name, len(items)) or not overlapping <= everything:
            raise UserError(f"--clean {args.clean} is about {n} items of {data}: give the same items")
        parts = {"clean": everything - overlapping, "overlapping": overlapping}
    try:
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            guesses = evaluate(model, items, args.batch_size, progress=True)
    except torch.OutOfMemoryError:
        raise UserError(f"{device} is out of memory: give a smaller --batch_size") from None
    for name, part in {args.model: guesses.keys(), **parts}.items():
        acc, acc_norm = accuracy({i: guesses[i] for i in part}, items)
        print0(f"{name}: acc {acc:.4f} acc_norm {acc_norm:.4f} on {len(part):,} items")


if __name__ == "__main__":
    run(main)
