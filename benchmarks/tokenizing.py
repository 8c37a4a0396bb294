"""
fineweb.py against the plain way: one worker process, to which `pool.imap` sends documents, 16 at a time.

    python benchmarks/tokenizing.py              # 200 MB of the Python sources on this machine, three rounds
    python benchmarks/tokenizing.py --input 'a/*.parquet' --rounds 5

Prints the tokens a second of both, medians of alternating runs from start to finish (imports apart), and
their ratio. Shards that differ are an error.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import time
from glob import glob

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

import fineweb

SHARD_SIZE = 10_000_000


def python_sources(path, megabytes):
    """A .parquet file of Python files found on this machine, repeated up to so many MB."""
    files = sorted(glob(sysconfig.get_paths()["stdlib"] + "/**/*.py", recursive=True))
    files += sorted(glob(sysconfig.get_paths()["purelib"] + "/**/*.py", recursive=True))
    texts, size = [], 0
    while size < megabytes * 1e6:
        for file in files:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
            if text and size < megabytes * 1e6:
                texts.append(text)
                size += len(text)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)  # as FineWeb-Edu's files have it


def start_plain():
    global encoding
    encoding = tiktoken.get_encoding("gpt2")


def plain_document(text):
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype=np.uint16)


def plain(paths, out):
    """Shards the plain way, in files 0.npy, 1.npy, …"""
    shard, filled, count = np.empty(SHARD_SIZE, dtype=np.uint16), 0, 0
    documents = (text for path in paths for batch in pq.ParquetFile(path).iter_batches(columns=["text"])
                 for text in batch.column(0).to_pylist())  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(1, start_plain) as pool:
        for tokens in pool.imap(plain_document, documents, chunksize=16):
            while len(tokens):
                part = tokens[: SHARD_SIZE - filled]
                shard[filled : filled + len(part)] = part
                filled, tokens = filled + len(part), tokens[len(part) :]
                if filled == SHARD_SIZE:
                    np.save(out / f"{count}.npy", shard)
                    filled, count = 0, count + 1
    np.save(out / f"{count}.npy", shard[:filled])


def ours(paths, out):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        fineweb.main(["--input", *paths, "--out", str(out), "--shard_size", str(SHARD_SIZE)])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", help="pattern of .parquet files with a column `text`")
    parser.add_argument("--megabytes", type=int, default=200, help="of text, without --input (200)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    args = parser.parse_args()
    seconds = {plain: [], ours: []}
    with tempfile.TemporaryDirectory() as tmp:
        paths = sorted(glob(args.input)) if args.input else [f"{tmp}/python.parquet"]
        if not args.input:
            python_sources(paths[0], args.megabytes)
        for i in range(args.rounds):
            shards = {}
            for way in seconds:
                out = Path(tmp, f"{way.__name__}{i}")
                out.mkdir()
                start = time.perf_counter()
                way(paths, out)
                seconds[way].append(time.perf_counter() - start)
                files = sorted(out.glob("*.npy"), key=lambda p: int("".join(filter(str.isdigit, p.name))))
                shards[way] = [np.load(file) for file in files]
            assert len(shards[plain]) == len(shards[ours])
            assert all(map(np.array_equal, shards[plain], shards[ours]))
            tokens = sum(map(len, shards[ours]))
            rates = ", ".join(f"{way.__name__} {tokens / seconds[way][-1] / 1e6:.2f}" for way in seconds)
            print(f"round {i}: {tokens:,} tokens, the same from both; million a second: {rates}", flush=True)
    a, b = (statistics.median(seconds[way]) for way in seconds)
    plain_rate, our_rate = tokens / a / 1e6, tokens / b / 1e6
    print(f"medians, million tokens a second: plain {plain_rate:.2f}, fineweb.py {our_rate:.2f}; "
          f"{a / b:.2f} times, on {os.cpu_count()} cores")  # fmt: skip


if __name__ == "__main__":
    main()
