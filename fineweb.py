"""
FineWeb-Edu, or any documents, into shards of tokens for train_gpt2.py.

    python fineweb.py                                           # 10 billion tokens from the hub, into edu_fineweb10B/
    python fineweb.py --input 'docs/**/*.txt' --out docs_tokens --shard_size 1000000
    python fineweb.py --dataset NAME --config NAME --out DIR    # another data set of the hub, or a local folder of one

A document is the end-of-text token, then the tokens of its text. All documents in a row, in the order of their files,
are cut into shards of exactly --shard_size tokens, the last one shorter; shard 0 is for validation.

Notable choices:
- The unit of work is a piece of a file, about 8 MB. Workers get its place, read it themselves and give back one array:
  no text passes through the main process. Pieces depend on the files alone, so shards do not depend on the workers.
- meta.json says for each shard where in the pieces it ends. To go on after a stop is to begin there.
- Files of the hub are downloaded by `datasets`, into its cache; from there on they are local files.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
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
    from train_gpt2 import Parser, UserError, complete_file, get_tokenizer, run

PIECE = 2**23  # bytes of input: a second or two of work
reading = []  # in a worker: what read_parquet left off


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
    where, row, last, batches = reading.pop() if reading else (None, 0, [], None)
    if where != path or not ends[group] - rows[group] <= row <= start:
        row, last, batches = ends[group] - rows[group], [], file.iter_batches(128, range(group, len(rows)), [column])
    for batch in chain(last, batches):
        yield from batch.column(0)[max(start - row, 0) : max(stop - row, 0)].to_pylist()
        if row + len(batch) >= stop:
            reading.append((path, row, [batch], batches))
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


def tokenize(paths, start, stop, column):
    """
    Tokens of one piece, uint16 (n,), and how many of its records have a text that is null or empty: they are left out.
    A file that can't be read as what its name says ends in an OSError of one line that names it.
    """
    eot = np.array([tokenizer.eot_token], dtype=np.uint32)
    arrays, empty = [eot[:0]], 0
    for path in paths:
        try:
            for text in READERS[Path(path).suffix](path, start, stop, column):
                if not text:
                    empty += 1
                    continue
                if not isinstance(text, str):
                    raise TypeError(f"{column!r} holds {type(text).__name__}, not text: see --column")
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may hold half a pair
                arrays += eot, tokenizer.encode_to_numpy(text, disallowed_special=())  # <|endoftext|> too is just text
        except (ValueError, KeyError, TypeError, pyarrow.ArrowException) as e:
            raise OSError(f"{path} can't be read as {Path(path).suffix}: {e.args[0]}") from None
    return np.concatenate(arrays).astype(np.uint16), empty


# ----------------------------------------------------------------------------------------------------------------------
# In the main process: files, their pieces, and what the workers make of them.


def local_files(patterns):
    """Paths that the patterns match, sorted within each pattern; one that two patterns match counts once."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob(pattern, recursive=True)))
        if not found:
            raise UserError(f"--input {pattern} matches no file: give files, or a pattern such as 'docs/**/*.txt'")
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


def make_pieces(paths):
    """
    [(paths, start, stop)], all the work in order. start, stop: rows of a .parquet file, bytes of a .jsonl file. .txt
    files are read whole, and short ones share a piece.
    """
    pieces, sizes = [], [os.path.getsize(path) for path in paths]
    ends = list(accumulate(sizes))
    for _, group in groupby(range(len(paths)), lambda i: ends[i] // PIECE if paths[i].endswith(".txt") else -1 - i):
        group = [paths[i] for i in group]
        length = step = 1
        if group[0].endswith(".jsonl"):
            length, step = os.path.getsize(group[0]), PIECE
        if group[0].endswith(".parquet"):
            try:
                metadata = pq.read_metadata(group[0])
            except pyarrow.ArrowException as e:
                raise UserError(f"{group[0]} can't be read as .parquet: {e}") from None
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            length, step = metadata.num_rows, max(1, metadata.num_rows * PIECE // max(1, size))
        pieces += [(group, start, min(start + step, length)) for start in range(0, length, step)]
    return pieces


def tokenize_all(pieces, column, tokenizer, workers):
    """What `tokenize` returns for each piece, in order. At most three a worker are under way: memory stays bounded."""
    spawn = multiprocessing.get_context("spawn")  # the way that every system has
    executor = ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer,))
    waiting = deque()
    try:
        for piece in pieces:
            waiting.append(executor.submit(tokenize, *piece, column))
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
        return settings | {"complete": False, "empty": 0, "shards": {}}
    for name in settings:
        if name != "source" and meta[name] != settings[name]:
            raise UserError(f"{out} has shards with {name} {meta[name]}, not {settings[name]}: give another --out")
    return meta | {"complete": meta["complete"] and len(shards) == len(meta["shards"]), "shards": shards}


def write_meta(out, meta):
    with complete_file(out / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())


def write_shards(out, meta, pieces, tokenizer, workers):
    """Tokenise the pieces from where the last shard in `meta` ends, into shards."""
    shards, shard_size = meta["shards"], meta["shard_size"]
    number, skip = list(shards.values())[-1]["end"] if shards else (0, 0)  # a piece, and tokens of it that are done
    text_bytes = np.array([len(tokenizer.decode_single_token_bytes(t)) for t in range(tokenizer.n_vocab)])
    text_bytes[tokenizer.eot_token] = 0
    shard = np.empty(shard_size, dtype=np.uint16)
    entry = {"tokens": 0, "documents": 0, "bytes": 0}  # documents: that begin here; bytes: of the tokens' text

    def finish(end):
        nonlocal entry
        name = f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy"
        shards[name] = entry | {"end": end}
        with complete_file(out / name) as f:
            np.save(f, shard[: entry["tokens"]])
            write_meta(out, meta)  # first, so that no shard is ever without its entry
        entry = dict.fromkeys(entry, 0)

    tokenized = tokenize_all(pieces[number:], meta["column"], tokenizer, workers)
    total = sum(done["tokens"] for done in shards.values())
    with contextlib.closing(tokenized), tqdm(initial=total, unit=" tokens", unit_scale=True) as progress:
        for number, (tokens, empty) in enumerate(tokenized, number):
            meta["empty"] += empty if skip == 0 else 0  # else they were counted before the stop
            total += len(tokens) - skip
            progress.total = total * len(pieces) // (number + 1)
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
        finish([len(pieces), 0])
    meta["complete"] = True
    write_meta(out, meta)


def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="FILE", help=".parquet, .jsonl, .txt (one document); patterns too")
    parser.add_argument("--dataset", default="HuggingFaceFW/fineweb-edu", help="of the hub (HuggingFaceFW/fineweb-edu)")
    parser.add_argument("--config", help="which of the data set's configurations (of fineweb-edu: sample-10BT)")
    parser.add_argument("--column", default="text", help="where .parquet and .jsonl have the text (text)")
    parser.add_argument("--out", help="directory for the shards (of fineweb-edu sample-10BT: edu_fineweb10B)")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens (100000000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2", help="bytes needs no merges (gpt2)")
    args = parser.parse_args(argv)
    if not args.input and args.dataset == parser.get_default("dataset") and args.config in (None, "sample-10BT"):
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

    paths = local_files(args.input) if args.input else hub_files(args.dataset, args.config)
    for path in paths:
        if Path(path).suffix not in READERS:
            raise UserError(f"{path}: its name must end in {', '.join(READERS)}")
    stats = "\n".join(f"{Path(p).name} {os.stat(p).st_size} {os.stat(p).st_mtime_ns}" for p in paths)
    out = Path(args.out)
    meta = open_meta(out, {
        "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, "shard_size": args.shard_size,
        "source": {"input": args.input} if args.input else {"dataset": args.dataset, "config": args.config},
        "column": args.column, "files": len(paths), "files_sha256": hashlib.sha256(stats.encode()).hexdigest(),
    })  # fmt: skip
    if not meta["complete"]:
        out.mkdir(parents=True, exist_ok=True)
        write_meta(out, meta)  # a directory that can't be written shows itself before the work
        print(f"{len(paths):,} files into {out}; after a stop the same command goes on from the last complete shard")
        write_shards(out, meta, make_pieces(paths), tokenizer, args.workers)
    shards = meta["shards"].values()
    tokens, documents, text = (sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes"))
    print(f"complete: {len(shards)} shards, {tokens:,} tokens, {documents:,} documents, {text:,} bytes of text")
    if meta["empty"]:
        print(f"{meta['empty']:,} records were left out: their text is null or empty")


if __name__ == "__main__":
    run(main)
