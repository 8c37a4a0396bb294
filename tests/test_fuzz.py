"""Random damage to every kind of file: an error of one line or a result, and never anything else.

    FUZZ=10000 python -m pytest -q tests/test_fuzz.py     # as many damaged files instead of 300
"""

import contextlib
import io
import json
import os
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TINY, main, make_shards, make_shards_of_bytes, make_tokens, write_bin

import fineweb
import hellaswag
from fineweb import UserError, find_shards, get_tokenizer
from train_gpt2 import GPT, DataLoaderLite, GPTConfig, load_checkpoint

COUNT = int(os.environ.get("FUZZ", 300))


def read_checkpoint(path):
    checkpoint = load_checkpoint(path)
    model = checkpoint.pop("model")
    return str((model.config, model.state_dict(), checkpoint))


def read_shards(path):
    data = find_shards(path.parent)
    DataLoaderLite(data.train, 41, 16, 0, 1, data.n_vocab, 0, True, data.eot).next_batch()


def tokenize(*flags):
    with contextlib.redirect_stdout(io.StringIO()):
        fineweb.main([str(flag) for flag in flags])


def read_documents(path):
    shutil.rmtree(path.with_suffix(".out"), ignore_errors=True)
    tokenize("--input", path, "--tokenizer", "bytes", "--shard_size", 100, "--out", path.with_suffix(".out"))


def read_tokenizer(path):
    tokenizer = get_tokenizer(str(path))
    tokenizer.decode(tokenizer.encode_ordinary("The tide goes out.\n"))


def read_items(path):
    hellaswag.load_items(path, get_tokenizer("bytes"), 64)


def read_export(path):
    GPT.from_pretrained(path.parent)


def go_on(path):
    source = path.parent.parent / "a.txt"
    tokenize("--input", source, "--tokenizer", "bytes", "--shard_size", 10, "--out", path.parent)


def resume(path):
    with contextlib.redirect_stdout(io.StringIO()):
        main("--resume", "--log_dir", path.parent, "--max_steps", 2)


READ = {
    "log/model_00002.pt": read_checkpoint,
    "log/latest.pt": resume,
    "log/log.txt": resume,
    "lecture/edufineweb_train_000001.npy": read_shards,
    "bin/x_train_1.bin": read_shards,
    "shards/meta.json": read_shards,
    "out/meta.json": go_on,
    "a.jsonl": read_documents,
    "a.parquet": read_documents,
    "a.txt": read_documents,
    "hf/tokenizer.json": read_tokenizer,
    "items.jsonl": read_items,
    "hf/config.json": read_export,
    "hf/model.safetensors": read_export,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with one file of each kind."""
    directory = tmp_path_factory.mktemp("files")
    make_shards_of_bytes(directory / "shards")
    make_shards(directory / "lecture", 256)
    (directory / "bin").mkdir()
    for name in "train", "val":
        write_bin(directory / "bin" / f"x_{name}_1.bin", make_tokens(325, 1))
    flags = ["--data", directory / "shards", *TINY, "--max_steps", 2, "--val_every", 0]
    main(*flags, "--log_dir", directory / "log")
    GPT(GPTConfig(16, 257, 1, 2, 8, tokenizer="bytes")).save_pretrained(directory / "hf")
    lines = (ROOT / "input.txt").read_text()[:3000].splitlines()
    (directory / "a.txt").write_text("\n".join(lines))
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    pq.write_table(pa.table({"text": lines}), directory / "a.parquet")
    item = {"ctx": "The tide", "endings": ["goes out.", "sings.", "is.", "no"], "label": 1}
    (directory / "items.jsonl").write_text((json.dumps(item) + "\n") * 5)
    flags = ["--input", directory / "a.txt", "--tokenizer", "bytes", "--shard_size", 10]
    tokenize(*flags, "--out", directory / "out")
    return directory


def damage(data, rng):
    """Some bytes flipped, cut off, left out or written twice."""
    data, place = bytearray(data), rng.randrange(len(data))
    kind = rng.choice(["bit", "byte", "bytes", "cut", "gap", "twice"])
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif kind in ("byte", "bytes"):
        for place in range(place, min(place + (1 if kind == "byte" else 16), len(data))):
            data[place] = rng.randrange(256)
    elif kind == "cut":
        del data[place:]
    elif kind == "gap":
        del data[place : place + rng.randint(1, 9)]
    else:
        data[place:place] = data[place : place + rng.randint(1, 9)]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_damaged_files_end_in_one_line_or_in_a_result(files, name):
    path, read, rng = files / name, READ[name], random.Random(name)
    good, expected = path.read_bytes(), read(path)
    outcomes = {"refused": 0, "read": 0}  # printed for benchmarks/README.md: pytest -s shows it
    for _ in range(COUNT // len(READ) + 1):
        path.write_bytes(damaged := damage(good, rng))
        try:
            result = read(path)
            outcomes["read"] += 1
            if name == "log/model_00002.pt":  # it has a checksum of every byte
                assert result == expected
        except UserError as e:
            outcomes["refused"] += 1
            assert "\n" not in str(e)
        except SystemExit as e:
            assert e.code == 2
        except BaseException:
            path.with_name("damaged").write_bytes(damaged)
            raise
        finally:
            path.write_bytes(good)
    print(name, outcomes)
