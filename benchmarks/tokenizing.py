"""
fineweb.py against the lecture's way: `pool.imap` sends documents, 16 at a time, to half as many processes as
there are cores. One more process, this one, collects the tokens.

    python benchmarks/tokenizing.py              # 200 MB of the Python sources on this machine, three rounds

Prints the tokens a second of both, medians of alternating runs, and their ratio. Shards that differ are an
error. The processes are started before the clock is. Takes two minutes on two cores, and needs GPT-2's
tokenizer, a download.
"""

import sys
from pathlib import Path

# Import from the project's folder, not from benchmarks/, which has a hellaswag.py of its own.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

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
from benchmarks.machine import machine

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


def plain(path, out, pool):
    """Shards the lecture's way."""
    shard, filled, count = np.empty(SHARD_SIZE, dtype=np.uint16), 0, 0
    batches = pq.ParquetFile(path).iter_batches(columns=["text"])
    documents = (text for batch in batches for text in batch.column(0).to_pylist())
    for tokens in pool.imap(plain_document, documents, chunksize=16):
        while len(tokens):
            part = tokens[: SHARD_SIZE - filled]
            shard[filled : filled + len(part)] = part
            filled, tokens = filled + len(part), tokens[len(part) :]
            if filled == SHARD_SIZE:
                np.save(out / f"{count:06d}.npy", shard)
                filled, count = 0, count + 1
    np.save(out / f"{count:06d}.npy", shard[:filled])


def ours(path, out, pool):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        fineweb.main(["--input", path, "--out", str(out), "--shard_size", str(SHARD_SIZE)])


def main():
    parser = fineweb.make_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="of text, at least 100 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both; the median counts (%(default)s)")
    args = parser.parse_args()
    print(machine())
    seconds = {plain: [], ours: []}
    processes = max(1, os.cpu_count() // 2)
    with (
        tempfile.TemporaryDirectory() as tmp,
        multiprocessing.get_context("spawn").Pool(processes, start_plain) as pool,
    ):
        pool.map(len, ["x"] * 100)  # until they have started
        path = f"{tmp}/python.parquet"
        python_sources(path, args.megabytes)
        for i in range(args.rounds):
            shards = {}
            for way in seconds:
                out = Path(tmp, f"{way.__name__}{i}")
                out.mkdir()
                start = time.perf_counter()
                way(path, out, pool)
                seconds[way].append(time.perf_counter() - start)
                files = sorted(out.glob("*.npy"), key=lambda file: file.stem[-6:])  # their numbers
                shards[way] = [np.load(file) for file in files]
            assert len(shards[plain]) == len(shards[ours])
            assert all(map(np.array_equal, shards[plain], shards[ours]))
            tokens = sum(map(len, shards[ours]))
            rates = ", ".join(f"{way.__name__} {tokens / seconds[way][-1] / 1e6:.2f}" for way in seconds)
            print(f"round {i}: {tokens:,} tokens, the same from both; million a second: {rates}", flush=True)
    a, b = (statistics.median(seconds[way]) for way in seconds)
    plain_rate, our_rate = tokens / a / 1e6, tokens / b / 1e6
    print(f"medians, million tokens a second: plain {plain_rate:.2f}, fineweb.py {our_rate:.2f}; "
          f"{a / b:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
