"""Turns documents into shards of tokens, and reads shards. Also here, for all
scripts: the tokenizers, and safe reading and writing of files.

    python fineweb.py      # FineWeb-Edu sample-10BT into edu_fineweb10B/
    python fineweb.py --input 'docs/**/*.txt' --out DIR --shard_size 1000000
    # a mixture: a quarter of the books, and all of the web pages
    python fineweb.py --mix 'books/*.jsonl:0.25' 'web/*.parquet:1' --out DIR

A document is the end-of-text token and the tokens of its text. All documents,
in the order of their files, are cut into shards of exactly --shard_size
tokens; the last is shorter. Shard 0 is for validation. After a stop, the same
command skips the documents that are in the shards, and goes on from there.
"""

import argparse
import contextlib
import functools
import hashlib
import heapq
import json
import os
import re
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from glob import escape, glob
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import tiktoken
from filelock import FileLock, Timeout
from tiktoken.load import read_file_cached
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process; number 0 prints for all

# --------------------------------------------------------------------------------------------------
# Errors and files


class UserError(Exception):
    """A mistake in a flag or a file. The message is one line that names the thing and says how to mend it."""


def print0(*args, rank=0):
    """Print on one rank only, and at once. A closed pipe or a full disk behind it does not end the run."""
    if RANK == rank:
        with contextlib.suppress(OSError):
            print(*args, flush=True)


def run(main):
    """Call `main()`. A UserError or an OSError is printed as one `error:` line, with exit status 2."""
    if sys.stdout:  # none is there if the shell closed it. Windows' cp1252 has few of a sample's characters
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError:  # under torchrun, it may be the connection to a rank that has failed
        time.sleep((4 + RANK) if "RANK" in os.environ else 0)  # torchrun ends this one, too
        raise
    except (UserError, OSError) as e:
        # Most errors occur on all ranks. Rank 0 prints its own, and then torchrun ends those that wait here.
        time.sleep((4 + RANK) if RANK else 0)
        print("error:", " ".join(str(e).split()), file=sys.stderr, flush=True)
        sys.exit(2)


@contextlib.contextmanager
def complete_file(path):
    """Open a binary file. It is named `path` only when it is complete, so a crash leaves the old file as it
    was. UserError if it can't be written."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save reports some errors of the disk as RuntimeError
        raise UserError(f"{path} can't be written ({e}): make room, or choose another place") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    with complete_file(path) as f:
        f.write(json.dumps(value, indent=1).encode())


@contextlib.contextmanager
def readable(what, mend):
    """Every file from outside is read in this context. Whatever goes wrong within, with a file, a flag or a
    download, becomes a UserError that begins with `what` and ends with `mend`, what the person can do."""
    try:
        if Path(what).is_char_device():  # such as /dev/zero
            raise ValueError("a device has no end")
        yield
    except UserError:
        raise
    except Exception as e:
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]
        raise UserError(f"{what} can't be read ({reason}): {mend}") from None


def make_parser(description):
    """An ArgumentParser that shows the description as it is."""

    def nonempty(text):  # an empty text is most often a shell variable that is not set
        if not text:
            raise argparse.ArgumentTypeError("it is empty: give it a value, or leave it out")
        return text

    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.register("type", None, nonempty)  # the type of every flag that names none
    if RANK > 0:  # the usage is what argparse prints before an error
        parser.print_usage = lambda file: time.sleep(4 + RANK)  # rank 0 prints its error first, as in `run`
    return parser


@contextlib.contextmanager
def warn_only(consequence):
    """Print a UserError or an OSError as a warning, which ends with `consequence`, and go on."""
    try:
        yield
    except (UserError, OSError) as e:
        print0(f"warning: {e}; {consequence}")


@contextlib.contextmanager
def locked(directory):
    """Make and lock a directory, so that two runs never write to one. The lock ends with the process."""
    try:
        with FileLock(Path(directory, ".lock"), blocking=False):
            yield
    except Timeout:
        raise UserError(f"{directory} is in use by another run: wait for it, or choose another") from None


# --------------------------------------------------------------------------------------------------
# Tokenizers: a tiktoken.Encoding, or an object with the same methods

# Byte-level BPE writes a byte as one character: itself if it is visible in Latin-1, else one from 256 on.
BYTE_OF = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(BYTE_OF.values())))}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


class HuggingFaceTokenizer:
    """A byte-level BPE in Hugging Face's format. path: a tokenizer.json, or a directory that holds one."""

    def __init__(self, path):
        self.name = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else str(path)
        with readable(path, "give gpt2, bytes, or a byte-level tokenizer.json or its directory"):
            self.json = Path(self.name).read_bytes()  # the file, which fineweb.py copies beside the shards
            self.bpe = Tokenizer.from_buffer(self.json)
            self.bpe.encode_special_tokens = True  # what looks like a special token in a text is text
            self.bpe.no_truncation()  # a file may ask for rows of one length, but here a document stays whole
            self.bpe.no_padding()
            self.bpe.decoder = decoders.ByteLevel()  # some files have none
            ids = self.bpe.get_vocab()
            self.eot_token, self.n_vocab = ids["<|endoftext|>"], max(ids.values()) + 1
            self.bpe.add_special_tokens(["<|endoftext|>"])  # also where the file does not call it special
            lossy = self.decode(self.encode_ordinary("a B\n\xe9")).strip() != "a B\n\xe9"
            if lossy or not BYTE_OF.keys() <= ids.keys() or self.n_vocab > 2**16:
                raise ValueError("it is no byte-level BPE of up to 65,536 tokens")

    def encode_ordinary(self, text):
        # A batch of one: encode_batch_fast releases the interpreter lock, and encode does not.
        return self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def decode(self, tokens):
        return self.bpe.decode(tokens, skip_special_tokens=False)

    def decode_single_token_bytes(self, token):
        name = self.bpe.id_to_token(token) or ""  # an added token is written as its text
        return bytes(map(BYTE_OF.get, name)) if BYTE_OF.keys() >= set(name) else name.encode()


def get_tokenizer(name="gpt2"):
    """name: "gpt2", GPT-2's BPE; "bytes", the 256 byte values, and 256 for end of text; else the path of a
    Hugging Face tokenizer. UserError if it can't be had."""
    if name == "gpt2":
        with readable("GPT-2's tokenizer", "go online once, or set TIKTOKEN_CACHE_DIR to a folder with it"):
            return tiktoken.Encoding(**openai_public.gpt2())  # get_encoding returns one for all threads
    if name == "bytes":
        ranks, special = {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"\s?\S+|\s", mergeable_ranks=ranks, special_tokens=special)
    return HuggingFaceTokenizer(name)


def save_tokenizer(tokenizer, directory, model_max_length):
    """Write a tokenizer as the files that the hub has for GPT-2: tokenizer.json for most tools, vocab.json
    and merges.txt for others. model_max_length: the context of the model, in tokens."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        bpe, kind = tokenizer.bpe, "PreTrainedTokenizerFast"  # this class does what tokenizer.json says
    else:
        vocabulary, merges = BYTE_OF | {"<|endoftext|>": 256}, []
        if tokenizer.name == "gpt2":  # the released files, which tiktoken has in its cache
            vocabulary = json.loads(read_file_cached(GPT2_URL + "encoder.json"))
            _version, *lines = read_file_cached(GPT2_URL + "vocab.bpe").decode().splitlines()
            merges = [tuple(line.split(" ")) for line in lines]
        bpe, kind = Tokenizer(models.BPE(vocabulary, merges)), "GPT2Tokenizer"
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(f"{directory}/tokenizer.json")
    bpe.model.save(str(directory))  # vocab.json and merges.txt
    write_json(f"{directory}/tokenizer_config.json", {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "tokenizer_class": kind, "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
    })  # fmt: skip


def encode_documents(tokenizer, texts):
    """The tokens of all documents in a row, uint16 (n,). <|endoftext|> in a text is text like any other."""
    pieces = []
    for text in texts:
        # JSON may hold half of a surrogate pair, for which UTF-8 has no bytes: it becomes U+FFFD.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # tiktoken makes no list of Python numbers here, for which threads would wait for each other.
        pieces += [tokenizer.eot_token], tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.concatenate(pieces, dtype=np.uint16, casting="unsafe")  # from uint32; no id is above 65,535


# --------------------------------------------------------------------------------------------------
# Reading tokens: a text file, or a directory of shards


class Data(NamedTuple):
    """What there is to train on. A split is {name: path of a shard, or its tokens as a uint16 array (n,)}."""

    train: dict
    val: dict
    tokenizer: str = "gpt2"
    n_vocab: int = 50257
    eot: int = 50256  # the token that begins every document


def load_text(path, tokenizer):
    """A UTF-8 text file, its last tenth to validate. Documents in it have <|endoftext|> between them."""
    with readable(path, "give a text file in UTF-8, or a directory of shards"):
        documents = Path(path).read_text(encoding="utf-8").split("<|endoftext|>")
    tokens = encode_documents(tokenizer, documents)
    cut = len(tokens) * 9 // 10
    splits = {f"{path} (train split)": tokens[:cut]}, {f"{path} (val split)": tokens[cut:]}
    return Data(*splits, tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token)


def open_shard(shard):
    """The tokens of a shard, uint16 (n,), memory-mapped. shard: a .npy file; a .bin file of llm.c, 256 int32
    of header (20240520, 1, n), then n uint16; or an array, which is returned as it is."""
    if isinstance(shard, np.ndarray):
        return shard
    with readable(shard, "delete it, and make or fetch it again"):
        if str(shard).endswith(".bin"):
            tokens = np.memmap(shard, np.uint16, "r", offset=1024)
            if np.fromfile(shard, np.int32, 3).tolist() != [20240520, 1, len(tokens)]:
                raise ValueError("its header is not that of a shard of llm.c with as many tokens")
        else:
            tokens = np.load(shard, mmap_mode="r")
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or tokens.size == 0:
            raise ValueError(f"it is {tokens.ndim}-D {tokens.dtype} of {tokens.size}; a shard is 1-D uint16")
    return np.asarray(tokens)


def find_shards(directory):
    """The .npy and .bin files of a directory with the word "train" or "val" in their names. meta.json, which
    this script writes beside them, says what their tokens are; without it they are GPT-2's."""
    splits, file = {"train": {}, "val": {}}, Path(directory, "meta.json")
    for path in sorted(Path(directory).glob("[!.]*")):  # none where there is no directory
        word = re.search(r"(?<![a-z])(train|val)(?![a-z])", path.name)
        if word and path.suffix in (".npy", ".bin"):
            splits[word[1]][str(path)] = path
    if not splits["train"] or not splits["val"]:
        raise UserError(f"{directory} needs shards, *_train_* and *_val_*, .npy or .bin: see fineweb.py")
    if not file.exists():
        return Data(**splits)
    with readable(file, "make the shards again with fineweb.py"):
        meta = json.loads(file.read_text())
        if meta["vocab_size"] not in range(2**16 + 1) or meta["eot"] not in range(meta["vocab_size"]):
            raise ValueError("it describes no tokenizer of up to 65,536 tokens")
        for path in (splits["train"] | splits["val"]).values():
            entry = meta["shards"].get(path.name)
            if entry is None or entry["tokens"] != len(open_shard(path)):
                raise UserError(f"{path} is not as in {file}: delete it, and call fineweb.py as before")
        if not meta["complete"] or not all(Path(directory, name).exists() for name in meta["shards"]):
            print0(f"warning: {directory} is not complete: the same call of fineweb.py goes on with it")
        if meta["tokenizer"].endswith("tokenizer.json"):  # the copy of a Hugging Face tokenizer
            meta["tokenizer"] = str(Path(directory, "tokenizer.json"))
        return Data(*splits.values(), meta["tokenizer"], meta["vocab_size"], meta["eot"])


# --------------------------------------------------------------------------------------------------
# Reading documents


def read_file(path, column):
    """Yields (the fraction of the file read so far, its text or None) for each record."""
    if path.endswith(".parquet"):
        file = pq.ParquetFile(path, memory_map=True)
        columns = (batch[column].to_pylist() for batch in file.iter_batches(128, columns=[column]))
        for number, text in enumerate(chain.from_iterable(columns), 1):
            yield number / file.metadata.num_rows, text
    elif path.endswith(".jsonl"):
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    yield f.tell() / os.path.getsize(path), json.loads(line)[column] if line.strip() else None
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"line {number} is no JSON with {column!r}") from None
    else:
        with open(path, encoding="utf-8", newline="") as f:  # newline="" leaves the line ends as they are
            yield 1.0, f.read()


def read_source(share, files, column):
    """Yields (the fraction of all bytes read so far, text) for each document that is taken. An empty text is
    no document. share: what part of the documents is taken, evenly over the files. files: {path: bytes}."""
    total, before, number = sum(files.values()), 0, 0  # bytes of all, of the files before; documents so far
    for path, size in files.items():
        with readable(path, "mend it, with a new --out; --column says where .jsonl and .parquet have text"):
            for fraction, text in read_file(path, column):
                if not isinstance(text, str | None):
                    raise TypeError(f"{column!r} holds {type(text).__name__}, not text")
                number += bool(text)
                # int(n * share) of the first n documents are taken: this one, if it makes the number grow.
                if text and int(number * share) > int((number - 1) * share):
                    yield (before + fraction * size) / total, text
        before += size


def tokenize(documents, name, workers, batch_size=64):
    """Yields (the fraction that has been read, number of documents, their tokens) for each batch_size
    documents, in order. Threads work on the next 4 * workers batches meanwhile."""
    tokenizer_of = functools.cache(lambda thread: get_tokenizer(name))  # a shared one makes them wait

    def work(batch):
        texts = [text for _, text in batch]
        return batch[-1][0], len(batch), encode_documents(tokenizer_of(threading.get_ident()), texts)

    batches = iter(lambda: list(islice(documents, batch_size)), [])  # until one is empty
    with ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(work, batch) for batch in batches)
        waiting = deque(islice(futures, 4 * workers))
        while waiting:
            future = waiting.popleft()
            waiting.extend(islice(futures, 1))
            yield future.result()


# --------------------------------------------------------------------------------------------------
# The command: which files to read, shards, and meta.json beside them

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"  # the name on the hub
SAMPLE = "sample/10BT/*.parquet"  # its files with 10 billion tokens


def find_files(pattern):
    """{path: bytes} of the files that a pattern matches, in the order of their names."""
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob(pattern, recursive=True))
    paths = [path for path in paths if os.path.isfile(path) and path.endswith((".parquet", ".jsonl", ".txt"))]
    if not paths:
        raise UserError(f"{pattern} matches no .parquet, .jsonl or .txt file: give one like 'docs/**/*.txt'")
    return {path: os.path.getsize(path) for path in paths}


def choose_sources(args):
    """{name: (share, files)}: one source for each pattern of --mix, or a single one of all files."""
    if args.mix:
        sources = {}
        for source in args.mix:
            pattern, _, share = source.rpartition(":")
            with readable(f"--mix {source}", "write PATTERN:SHARE, each once, a share above 0 and at most 1"):
                if pattern in sources or not 0 < float(share) <= 1:
                    raise ValueError(source)
            sources[pattern] = float(share), find_files(pattern)
        return sources
    if args.input:
        files = {path: size for pattern in args.input for path, size in find_files(pattern).items()}
        return {" ".join(args.input): (1.0, files)}
    with readable(FINEWEB_EDU, "go online, or give local files with --input"):
        huggingface_hub.dataset_info(FINEWEB_EDU)  # fails offline, where the next line may find only some
        folder = huggingface_hub.snapshot_download(FINEWEB_EDU, repo_type="dataset", allow_patterns=SAMPLE)
        return {FINEWEB_EDU: (1.0, find_files(f"{escape(folder)}/{SAMPLE}"))}


def open_meta(out, settings):
    """The description of the shards in `out`, up to the first whose file is gone, or else a new one."""
    file = out / "meta.json"
    if not file.exists():
        if any(out.glob("*.npy")):
            raise UserError(f"{out} has shards, but no meta.json that describes them: give another --out")
        return settings | {"complete": False, "shards": {}}
    with readable(file, "give another --out"):
        meta = json.loads(file.read_text())
        for name, entry in meta["shards"].items():
            first, used = entry["end"]
            if not all(type(n) is int and n >= 0 for n in (entry["tokens"], first, used)):
                raise ValueError(f"the entry of {name} is damaged")
        for name, value in settings.items():
            if meta["shards"] and meta[name] != value:
                raise UserError(f"{out} has {name} {meta[name]!s:.70}, not {value!s:.70}: give another --out")
        shards = dict(takewhile(lambda entry: (out / entry[0]).exists(), meta["shards"].items()))
        return settings | {"complete": meta["complete"] and shards == meta["shards"], "shards": shards}


def write_shards(out, meta, sources, tokenizer, workers):
    """Tokenize the sources from where the last shard in `meta` ends, and write shards until their end."""
    shards, shard_size = meta["shards"], meta["shard_size"]
    # The last shard ends `used` tokens after the beginning of document number `first`.
    first, used = list(shards.values())[-1]["end"] if shards else (0, 0)
    pieces, size = [], 0  # tokens that are in no shard yet

    def finish(tokens, end):
        name = f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy"
        with complete_file(out / name) as f:
            np.save(f, tokens)
        shards[name] = {"tokens": len(tokens), "end": end}
        write_json(out / "meta.json", meta)

    # Merged by the fraction of each source that has been read, the mixture is the same all along.
    streams = [read_source(share, files, meta["column"]) for share, files in sources.values()]
    documents = islice(heapq.merge(*streams, key=lambda item: item[0]), first, None)
    with tqdm(initial=len(shards) * shard_size, unit=" tokens", unit_scale=True) as bar:
        for fraction, n_documents, tokens in tokenize(documents, tokenizer.name, workers):
            pieces.append(tokens[used:])
            used = max(used - len(tokens), 0)
            size += len(pieces[-1])
            bar.update(len(pieces[-1]))
            bar.total = int(bar.n / fraction)  # an estimate
            while size >= shard_size:
                joined = np.concatenate(pieces)
                pieces, size = [joined[shard_size:]], size - shard_size
                finish(joined[:shard_size], (first, len(tokens) - size))  # the last `size` of them are left
            first += n_documents
    if not shards or (size == 0 and len(shards) == 1):
        raise UserError(f"{out} has no tokens to train on: delete it, and give a smaller --shard_size")
    if size:
        finish(np.concatenate(pieces), (first, 0))  # nothing is left to read
    meta["complete"] = True
    write_json(out / "meta.json", meta)


def parse_args(argv):
    parser = make_parser(__doc__)
    flag, source = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    source("--input", nargs="+", metavar="FILE", help=".parquet, .jsonl or .txt (a document); patterns too")
    source("--mix", nargs="+", metavar="PATTERN:SHARE", help="a share of the documents of each pattern")
    flag("--column", default="text", help="where .parquet and .jsonl have the text (%(default)s)")
    flag("--out", default="edu_fineweb10B", help="directory for the shards (%(default)s)")
    flag("--shard_size", type=int, default=10**8, help="tokens of a shard (%(default)s)")
    flag("--workers", type=int, default=os.cpu_count(), help="threads (one for each core)")
    flag("--tokenizer", default="gpt2", help="gpt2, bytes, or a tokenizer.json of Hugging Face (%(default)s)")
    args = parser.parse_args(argv)
    if args.shard_size < 1 or args.workers < 1:
        parser.error("--shard_size and --workers must be at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    tokenizer, sources, out = get_tokenizer(args.tokenizer), choose_sources(args), Path(args.out)
    tokenizer_json = getattr(tokenizer, "json", b"")  # of a tokenizer of Hugging Face
    names = [(Path(path).name, size) for _, files in sources.values() for path, size in files.items()]
    settings = {  # a run goes on only with the same ones
        "tokenizer": "tokenizer.json" if tokenizer_json else tokenizer.name, "vocab_size": tokenizer.n_vocab,
        "eot": tokenizer.eot_token, "shard_size": args.shard_size, "column": args.column,
        "shares": {name: share for name, (share, _) in sources.items()},
        "files_sha256": hashlib.sha256(json.dumps(names).encode() + tokenizer_json).hexdigest(),
    }  # fmt: skip
    with locked(out):
        meta = open_meta(out, settings)
        if not meta["complete"]:
            print0(f"{len(names)} files into {out}; after a stop the same command goes on from there")
            write_json(out / "meta.json", meta)  # so that no shard is ever without a description
            if tokenizer_json:  # the shards bring their tokenizer with them
                with complete_file(out / "tokenizer.json") as f:
                    f.write(tokenizer_json)
            write_shards(out, meta, sources, tokenizer, args.workers)
    tokens = sum(shard["tokens"] for shard in meta["shards"].values())
    print0(f"complete: {len(meta['shards'])} shards, {tokens:,} tokens in {out}")


if __name__ == "__main__":
    run(main)
