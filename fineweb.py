"""
FineWeb-Edu, or any documents, into shards of tokens for train_gpt2.py.

    python fineweb.py                                           # 10 billion tokens from the hub, into edu_fineweb10B/
    python fineweb.py --input 'docs/**/*.txt' --out docs_tokens --shard_size 1000000
    python fineweb.py --dataset NAME --config NAME --out DIR    # another data set of the hub, or a local folder of one
    python fineweb.py --mix 'books/*.jsonl:0.25' 'web/*.parquet:1.0' --out DIR    # a quarter of the books, all of the web

A document is the end-of-text token, then the tokens of its text. All documents in a row, in the order of their files,
are cut into shards of exactly --shard_size tokens, the last one shorter; shard 0 is for validation.

Notable choices:
- The unit of work is a piece of a file, about 8 MB. Workers get its place, read it themselves and give back one array:
  no text passes through the main process. Pieces depend on the files alone, so shards do not depend on the workers.
- A unit of a mixture is a piece of each source, the n-th part of it, in one order drawn from the unit's number: all
  along the shards the mixture is the same.
- meta.json says for each shard where in the units it ends. To go on after a stop is to begin there.
- Files of the hub are downloaded by `datasets`, into its cache; from there on they are local files.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from bisect import bisect
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from itertools import accumulate, chain, groupby, takewhile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
from tqdm import tqdm

if __name__ != "__mp_main__":  # a worker imports this file again, but needs none of this: torch is 2 s and 150 MB
    from train_gpt2 import BYTES, Parser, UserError, complete_file, get_tokenizer, run

PIECE = 2**23  # bytes of input: a second or two of work
reading = {}  # in a worker: what read_parquet left off, by file


# ----------------------------------------------------------------------------------------------------------------------
# In a worker: from a piece of a file to an array of tokens.


def start_worker(encoding):
    """Runs once in each worker process. encoding: the tiktoken.Encoding."""
    global tokenizer
    tokenizer = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    parent = multiprocessing.parent_process()  # when that is killed, nobody else will tell this one to end
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def read_parquet(path, start, stop, column):
    """Values of rows start to stop."""
    file = pq.ParquetFile(path, memory_map=True)
    if column not in file.schema_arrow.names:
        raise KeyError(f"no column {column!r} among {', '.join(file.schema_arrow.names)}: see --column")
    rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    group = bisect(ends := list(accumulate(rows)), start)
    # A row group can only be decoded from its beginning, and some hold a whole file: go on where the last piece ended.
    row, last, batches = reading.pop(path, (-1, [], None))
    if not ends[group] - rows[group] <= row <= start:
        row, last, batches = ends[group] - rows[group], [], file.iter_batches(128, range(group, len(rows)), [column])
    for batch in chain(last, batches):
        yield from batch.column(0)[max(start - row, 0) : max(stop - row, 0)].to_pylist()
        if row + len(batch) >= stop:
            if stop < file.metadata.num_rows:
                reading[path] = row, [batch], batches
            return
        row += len(batch)


def read_jsonl(path, start, stop, column):
    """Values of the lines that begin in bytes start to stop."""
    with open(path, "rb") as f:
        if start > 0:
            f.seek(start - 1)
            f.readline()  # the rest of a line that began earlier
        while (at := f.tell()) < stop:
            line = f.readline()
            try:
                if line.strip():
                    yield json.loads(line)[column]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"byte {at} begins no line of JSON with a {column!r}: see --column") from None


def read_txt(path, start, stop, column):
    """The whole file."""
    with open(path, encoding="utf-8", newline="") as f:  # newline="": line ends stay as they are
        yield f.read()


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


def tokenize(number, unit, column):
    """
    Tokens of a unit of work, uint16 (n,); how many records were left out, as their text is null or empty; {source:
    [documents, tokens] taken from it}. A file that can't be read as what its name says ends in an OSError of one line
    that names it. unit: [(source, share of its documents, paths, start, stop)].
    """
    rng, documents, empty, counts, credits = np.random.default_rng(number), [], 0, {}, {}
    eot = np.array([tokenizer.eot_token], dtype=np.uint32)
    for source, share, paths, start, stop in unit:
        count, credit = counts.setdefault(source, [0, 0]), credits.get(source, rng.random())
        for path in paths:
            try:
                for text in READERS[Path(path).suffix](path, start, stop, column):
                    if not text:
                        empty += 1
                        continue
                    credit += share  # every fourth document, say, makes it 1
                    if credit < 1:
                        continue
                    credit -= 1
                    if not isinstance(text, str):
                        raise TypeError(f"{column!r} holds {type(text).__name__}, not text: see --column")
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may hold half a pair
                    tokens = tokenizer.encode_to_numpy(text, disallowed_special=())  # <|endoftext|> too is just text
                    documents.append((eot, tokens))
                    count[0] += 1
                    count[1] += 1 + len(tokens)
            except (ValueError, KeyError, TypeError, pyarrow.ArrowException) as e:
                raise OSError(f"{path} can't be read as {Path(path).suffix}: {e.args[0]}") from None
        credits[source] = credit
    if len(counts) > 1:
        rng.shuffle(documents)
    return np.concatenate((eot[:0], *chain(*documents))).astype(np.uint16), empty, counts


class HuggingFaceTokenizer:
    """A byte-level BPE of Hugging Face, tokenizer.json or its directory, with the methods of a tiktoken.Encoding."""

    def __init__(self, path):
        from tokenizers import Tokenizer  # comes with transformers

        self.path = Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)
        self.name = str(self.path)
        try:
            self.bpe = Tokenizer.from_file(self.name)
        except Exception as e:  # the library's errors have no type of their own
            raise UserError(f"{path} is no tokenizer ({e}): give gpt2, bytes, a tokenizer.json or its directory") from None
        ids = self.bpe.get_vocab()
        self.eot_token, self.n_vocab = ids.get("<|endoftext|>"), max(ids.values()) + 1
        if self.eot_token is None or not BYTES.keys() <= ids.keys() or self.n_vocab > 2**16:
            raise UserError(f"{path} is no byte-level BPE of up to 65,536 tokens with <|endoftext|>: give another tokenizer")

    def encode_ordinary(self, text):
        self.bpe.encode_special_tokens = True  # what looks like one is text; set here, as it does not travel to a worker
        return self.bpe.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def decode(self, tokens):
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode(errors="replace")

    def decode_single_token_bytes(self, token):
        token = self.bpe.id_to_token(token) or ""
        return bytes(map(BYTES.get, token)) if BYTES.keys() >= set(token) else token.encode()


# ----------------------------------------------------------------------------------------------------------------------
# In the main process: files, their pieces, and what the workers make of them.


def local_files(patterns):
    """Paths that the patterns match, sorted within each pattern; one that two patterns match counts once."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob(pattern, recursive=True)))
        if not found:
            raise UserError(f"{pattern} matches no file: give files, or a pattern such as 'docs/**/*.txt'")
        paths += found
    return list(dict.fromkeys(paths))


def hub_files(name, config):
    """Paths of the training files of a data set on the hub, downloaded by now. name may be a local folder, too."""
    import datasets  # half a second, and --input does without

    try:
        addresses = datasets.load_dataset_builder(name, config).config.data_files["train"]
        print(f"{name}: {len(addresses)} files; those not yet in {datasets.config.HF_CACHE_HOME} are downloaded")
        settings = datasets.DownloadConfig(num_proc=min(8, len(addresses)))
        return datasets.DownloadManager(name, download_config=settings).download(addresses)
    except Exception as e:  # whatever the network, and the libraries on the way to it, throw
        mend = "try again (what is downloaded stays), or give local files with --input"
        raise UserError(f"--dataset {name} --config {config} can't be had from the hub ({e}): {mend}") from None


def make_pieces(paths, size):
    """
    [(paths, start, stop)], pieces of about `size` bytes, in order. start, stop: rows of a .parquet file, bytes of a .jsonl
    file. .txt files are read whole, and short ones share a piece.
    """
    pieces, ends = [], list(accumulate(map(os.path.getsize, paths)))
    for _, group in groupby(range(len(paths)), lambda i: ends[i] // size if paths[i].endswith(".txt") else -1 - i):
        group = [paths[i] for i in group]
        length = step = 1
        if group[0].endswith(".jsonl"):
            length, step = os.path.getsize(group[0]), size
        if group[0].endswith(".parquet"):
            try:
                metadata = pq.read_metadata(group[0])
            except pyarrow.ArrowException as e:
                raise UserError(f"{group[0]} can't be read as .parquet: {e}") from None
            total = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            length, step = metadata.num_rows, max(1, metadata.num_rows * size // max(1, total))
        pieces += [(group, start, min(start + step, length)) for start in range(0, length, step)]
    return pieces


def make_units(sources):
    """
    All the work in order: [[(source, share, paths, start, stop)]], from each unit about PIECE bytes are taken. sources:
    [(name, share of its documents, paths)].
    """
    if len(sources) == 1:
        [(name, share, paths)] = sources
        return [[(name, share, *piece)] for piece in make_pieces(paths, PIECE)]
    sizes = [sum(map(os.path.getsize, paths)) for _, _, paths in sources]
    n = max(1, round(sum(size * share for size, (_, share, _) in zip(sizes, sources)) / PIECE))
    units = [[] for _ in range(n)]
    for size, (name, share, paths) in zip(sizes, sources):
        pieces = make_pieces(paths, max(1, size // n // 16))  # small enough that each unit gets the same
        for k, piece in enumerate(pieces):
            units[k * n // len(pieces)].append((name, share, *piece))
    return units


def read_mix(words):
    """[(name, share, paths)] of what stands behind --mix, PATTERN:SHARE."""
    sources = []
    for word in words:
        pattern, _, share = word.rpartition(":")
        try:
            sources.append((pattern, float(share), local_files([pattern])))
        except ValueError:
            raise UserError(f"--mix {word}: write it as PATTERN:SHARE, such as 'docs/*.jsonl:0.25'") from None
        if not 0 < sources[-1][1] <= 1 or [s[0] for s in sources].count(pattern) > 1:
            raise UserError(f"--mix {word}: a share is above 0 and at most 1, and every pattern stands once: change it")
    return sources


def tokenize_all(units, first, column, tokenizer, workers):
    """What `tokenize` returns for each unit from `first` on, in order. At most three a worker are under way."""
    spawn = multiprocessing.get_context("spawn")  # the way that every system has
    executor = ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer,))
    waiting = deque()
    try:
        for number in range(first, len(units)):
            waiting.append(executor.submit(tokenize, number, units[number], column))
            if len(waiting) == 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker was killed, for want of memory? Go on with a lower --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Shards, and meta.json beside them.


def open_meta(out, settings):
    """The contents of out/meta.json where it describes shards of the same settings, else new ones."""
    meta = {"shards": {}}
    if (out / "meta.json").exists():
        meta = json.loads((out / "meta.json").read_text())
    elif any(out.glob("*.npy")):
        raise UserError(f"{out} holds shards, but no meta.json that tells of what: give another --out")
    # A shard gets its name after its entry is written; a kill may have come between.
    shards = dict(takewhile(lambda shard: (out / shard[0]).exists(), meta["shards"].items()))
    if not shards:
        return settings | {"complete": False, "shards": {}}
    for name in settings:
        if name != "source" and meta.get(name) != settings[name]:
            raise UserError(f"{out} has shards with {name} {meta.get(name)}, not {settings[name]}: give another --out")
    return meta | {"complete": meta["complete"] and len(shards) == len(meta["shards"]), "shards": shards}


def write_meta(out, meta):
    with complete_file(out / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())


def write_shards(out, meta, units, tokenizer, workers):
    """Tokenise the units from where the last shard in `meta` ends, into shards."""
    shards, shard_size = meta["shards"], meta["shard_size"]
    number, skip = list(shards.values())[-1]["end"] if shards else (0, 0)  # a unit, and tokens of it that are done
    text_bytes = np.array([len(tokenizer.decode_single_token_bytes(t)) for t in range(tokenizer.n_vocab)])
    text_bytes[tokenizer.eot_token] = 0
    shard = np.empty(shard_size, dtype=np.uint16)

    def new_entry():  # documents: that begin here; bytes: of the tokens' text; the others: of the units that begin here
        return {"tokens": 0, "documents": 0, "bytes": 0, "empty": 0, "sources": {name: [0, 0] for name in meta["sources"]}}

    entry = new_entry()

    def finish(end):
        nonlocal entry
        name = f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy"
        shards[name] = entry | {"end": end}
        with complete_file(out / name) as f:
            np.save(f, shard[: entry["tokens"]])
            write_meta(out, meta)  # first, so that no shard is ever without its entry
        entry = new_entry()

    tokenized = tokenize_all(units, number, meta["column"], tokenizer, workers)
    total = sum(done["tokens"] for done in shards.values())
    with contextlib.closing(tokenized), tqdm(initial=total, unit=" tokens", unit_scale=True) as progress:
        for number, (tokens, empty, counts) in enumerate(tokenized, number):
            if skip == 0:  # else they were counted before the stop
                entry["empty"] += empty
                for source, more in counts.items():
                    entry["sources"][source] = [a + b for a, b in zip(entry["sources"][source], more)]
            total += len(tokens) - skip
            progress.total = total * len(units) // (number + 1)
            progress.set_postfix(shard=len(shards), refresh=False)
            progress.update(len(tokens) - skip)
            while skip < len(tokens):
                filled = entry["tokens"]
                part = tokens[skip : skip + shard_size - filled]
                shard[filled : filled + len(part)] = part
                entry["tokens"] += len(part)
                entry["documents"] += int((part == tokenizer.eot_token).sum())
                entry["bytes"] += int(text_bytes[part].sum())
                skip += len(part)
                if entry["tokens"] == shard_size:
                    finish([number, skip])
            skip = 0
    if total <= shard_size:
        mend = f"give more, or --shard_size {max(1, total // 10)} and another --out"
        raise UserError(f"{total:,} tokens are no more than the validation shard, and none are left to train: {mend}")
    if entry["tokens"]:
        finish([len(units), 0])
    meta["complete"] = True
    write_meta(out, meta)


def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="FILE", help=".parquet, .jsonl, .txt (one document); patterns too")
    parser.add_argument("--mix", nargs="+", metavar="PATTERN:SHARE", help="a share of each pattern's documents, mixed")
    parser.add_argument("--dataset", default="HuggingFaceFW/fineweb-edu", help="of the hub (HuggingFaceFW/fineweb-edu)")
    parser.add_argument("--config", help="which of the data set's configurations (of fineweb-edu: sample-10BT)")
    parser.add_argument("--column", default="text", help="where .parquet and .jsonl have the text (text)")
    parser.add_argument("--out", help="directory for the shards (of fineweb-edu sample-10BT: edu_fineweb10B)")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens (100000000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    help = "gpt2; bytes, which needs no merges; or a byte-level tokenizer.json of Hugging Face, or its directory (gpt2)"
    parser.add_argument("--tokenizer", default="gpt2", help=help)
    args = parser.parse_args(argv)
    if args.input and args.mix:
        raise UserError("--input and --mix both say what to read: give one of them")
    default = not (args.input or args.mix) and args.dataset == parser.get_default("dataset")
    if default and args.config in (None, "sample-10BT"):
        args.config, args.out = "sample-10BT", args.out or "edu_fineweb10B"
    if args.out is None:
        raise UserError("--out DIR is missing: where shall the shards go?")
    for name in "shard_size", "workers":
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is too small: at least 1")
    tokenizer = get_tokenizer(args.tokenizer)
    if tokenizer is None:
        mend = "set TIKTOKEN_CACHE_DIR to a folder that has them, or let this machine reach the network once"
        raise UserError(f"GPT-2's merges can't be downloaded: {mend}")

    if args.mix:
        sources = read_mix(args.mix)
    elif args.input:
        sources = [("input", 1.0, local_files(args.input))]
    else:
        sources = [("dataset", 1.0, hub_files(args.dataset, args.config))]
    paths = [path for _, _, paths in sources for path in paths]
    for path in paths:
        if Path(path).suffix not in READERS:
            raise UserError(f"{path}: its name must end in {', '.join(READERS)}")
    hub = ["dataset", "config"]
    own = [tokenizer.path] if isinstance(tokenizer, HuggingFaceTokenizer) else []  # a tokenizer that goes with the shards
    stats = "\n".join(f"{Path(p).name} {os.stat(p).st_size} {os.stat(p).st_mtime_ns}" for p in [*paths, *own])
    out = Path(args.out)
    meta = open_meta(out, {
        "tokenizer": "tokenizer.json" if own else tokenizer.name, "vocab_size": tokenizer.n_vocab,
        "eot": tokenizer.eot_token, "shard_size": args.shard_size, "column": args.column,
        "source": {name: getattr(args, name) for name in (["mix"] if args.mix else ["input"] if args.input else hub)},
        "sources": {name: {"share": share, "files": len(paths)} for name, share, paths in sources},
        "files_sha256": hashlib.sha256(stats.encode()).hexdigest(),
    })  # fmt: skip
    if not meta["complete"]:
        out.mkdir(parents=True, exist_ok=True)
        write_meta(out, meta)  # a directory that can't be written shows itself before the work
        print(f"{len(paths):,} files into {out}; after a stop the same command goes on from the last complete shard")
        for path in own:
            with complete_file(out / "tokenizer.json") as f:
                f.write(path.read_bytes())
        write_shards(out, meta, make_units(sources), tokenizer, args.workers)
    shards = meta["shards"].values()
    tokens, documents, text, empty = (sum(shard[k] for shard in shards) for k in ("tokens", "documents", "bytes", "empty"))
    print(f"complete: {len(shards)} shards, {tokens:,} tokens, {documents:,} documents, {text:,} bytes of text")
    for name in meta["sources"] if args.mix else ():
        taken, of_them = (sum(shard["sources"][name][i] for shard in shards) for i in (0, 1))
        print(f"{of_them / tokens:6.1%} are the {taken:,} documents of {name}")
    if empty:
        print(f"{empty:,} records were left out: their text is null or empty")


if __name__ == "__main__":
    sys.modules["fineweb"] = sys.modules["__main__"]  # so that get_tokenizer finds this, not a copy
    run(main)
