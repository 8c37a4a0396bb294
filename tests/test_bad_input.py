"""A table of bad input: each row ends in one line that names the thing, and leaves nothing half-written behind.

A row is (name, program, make, word): make(directory) prepares the files, and returns the flags; the line has the word.
"""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, load, make_shards


import fineweb
import hellaswag
import train_gpt2
from fineweb import UserError

ITEM = {"ctx": "The tide", "endings": ["goes out.", "sings.", "is.", "no"], "label": 1}
PROGRAMS = {"train_gpt2": train_gpt2, "fineweb": fineweb, "hellaswag": hellaswag}
JUNK = {
    "empty": b"", "a word": b"hello", "a list": b"[]", "null": b"null", "a string": b'"x"', "half of a dict": b'{"a": ',
    "bytes": bytes(range(256)), "nested": b"[" * 100_000, "utf-16": '{"a": 1}'.encode("utf-16"),
}  # fmt: skip
VALUES = [None, -1, 10**30, float("nan"), "x", [], {}, 1.5]  # none of them is right where a count is wanted


def special(path, kind):
    """Make a path that is no file."""
    path.unlink(missing_ok=True)
    if kind == "a directory":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a loop":
        path.symlink_to(path.name)


SPECIAL = ["a directory", "a device", "a loop"]


def shards(directory):
    """Shards of bytes with a meta.json, which is returned."""
    sizes = make_shards(directory, 256)
    entries = {name: {"tokens": n, "documents": 9, "bytes": n, "end": [0, n]} for name, n in sizes.items()}
    return {"tokenizer": "bytes", "vocab_size": 257, "eot": 256, "complete": True, "shards": entries}


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """What the rows begin with: shards, a run of two steps, its export, items of HellaSwag, tokenizer.json."""
    directory = tmp_path_factory.mktemp("material")
    (directory / "shards").mkdir()
    meta = shards(directory / "shards" / "s")
    (directory / "shards" / "s" / "meta.json").write_text(json.dumps(meta))
    flags = ["--data", directory / "shards" / "s", *TINY, "--max_steps", 2, "--log_dir", directory / "log"]
    train_gpt2.main([str(flag) for flag in flags])
    train_gpt2.GPT.from_checkpoint(directory / "log" / "latest.pt").save_pretrained(directory / "hf")
    (directory / "items.jsonl").write_text(json.dumps(ITEM))
    (directory / "text.txt").write_text("x" * 100)
    with contextlib.chdir(directory):  # as the rows will be, in a copy of it
        fineweb.main("--input text.txt --tokenizer bytes --shard_size 60 --out made".split())
    return directory


def table():
    """All rows."""
    rows, marks = [], []

    def row(name, program, make, word):
        rows.append(pytest.param(program, make, word, id=f"{program}: {name}", marks=list(marks)))

    def again(d):
        return [*tokenize(d)[:-1], d / "made"]

    def train(d):
        return ["--data", d / "shards" / "s", *TINY, "--max_steps", 2, "--log_dir", d / "new"]

    def tokenize(d):
        return ["--input", "text.txt", "--tokenizer", "bytes", "--shard_size", 60, "--out", d / "new"]

    def judge(d):
        return ["-m", d / "log" / "latest.pt", "--data", d / "items.jsonl", "-d", "cpu"]

    def resume(d):
        return ["--resume", "--log_dir", d / "log", "--max_steps", 3]

    # Flags with a number.
    numeric = [a.option_strings[0] for a in train_gpt2.build_parser()._actions if a.type in (int, float)]
    for flag in numeric:
        for value in "-1", "nan", "inf", "two", "", "1" + "0" * 30:
            if (flag, value) not in [("--B", "1" + "0" * 30)]:
                row(f"{flag}={value}", "train_gpt2", lambda d, f=flag, v=value: [*train(d), f"{f}={v}"], flag)
    for program, base, flags in ("fineweb", tokenize, ("--shard_size", "--workers")), ("hellaswag", judge, ("--limit", "--batch_size")):
        for flag in flags:
            for value in "0", "-1", "nan", "two", "":
                row(f"{flag}={value}", program, lambda d, b=base, f=flag, v=value: [*b(d), f"{f}={v}"], flag)

    # Flags with a word.
    for flags, word in (
        ("--data=", "--data"), ("--log_dir=", "--log_dir"), ("--prompt=", "--prompt"), ("--init_from=", "--init_from"),
        ("--tokenizer=", "--tokenizer"), ("--model=", "--model"), ("--dtype=", "--dtype"), ("--n_embd 15", "n_head 2"),
        ("--T 17", "--total_batch_size"), ("--T 32 --init_from log/latest.pt", "--T 32"), ("--data nowhere", "nowhere"),
        ("--data /dev/zero", "/dev/zero"), ("--data /dev/null", "/dev/null"), ("--init_from /dev/null", "/dev/null"),
        ("--init_from nowhere", "nowhere"), ("--init_from no.pt", "no.pt"), ("--resume --init_from x", "--init_from"),
        ("--resume", "latest.pt"), ("--log_dir /dev/full", "/dev/full"), ("--log_dir /proc/new", "/proc/new"),
        ("--log_dir " + "x" * 300, "xxx"), ("--log_dir -x", "--log_dir"), ("stray", "stray"),
        ("--max_lr 1e-5 --min_lr 1e-4", "--min_lr"), ("--n_head 0", "--n_head"), ("--data shards", "needs shards"),
        ("--data a\nb", "a b can't be read"), ("--init_from log", "log"), ("--device tpu", "tpu"), ("--val_every", "--val_every"),
    ):  # fmt: skip
        row(flags[:40], "train_gpt2", lambda d, flags=flags: [*train(d), *flags.split(" ")], word)
    for flags, word in (
        ("--input=", "--input"), ("--out=", "--out"), ("--tokenizer=", "tokenizer"), ("--input [", "["), ("--input **", "text"),
        ("--input " + "x" * 300, "xxx"), ("--out " + "x" * 300, "xxx"), ("--out /dev/null", "/dev/null"), ("--config x", "--config"),
        ("--mix x:1", "--input"), ("--shards 5", "--shards"), ("--column=", "column"),
    ):  # fmt: skip
        row(flags[:40], "fineweb", lambda d, flags=flags: [*tokenize(d), *flags.split(" ")], word)
    for mix in "x", "x:", "x:0", "x:-1", "x:nan", "x:2", "x:y", ":1", ":":
        row(f"--mix {mix}", "fineweb", lambda d, mix=mix: ["--mix", mix, "--out", d / "new", "--tokenizer", "bytes"], mix.rpartition(":")[0])
    for flags, word in (
        ("-m=", "-m"), ("--data=", "--data"), ("--tokenizer=", "--tokenizer"), ("-d tpu", "tpu"), ("-d mps", "latest.pt on mps"), ("--clean=", "--clean"),
        ("--contamination shards/s", "--contamination"), ("--data nowhere", "nowhere"), ("-m no.pt", "no.pt"), ("--dtype x", "--dtype"),
    ):  # fmt: skip
        row(flags, "hellaswag", lambda d, flags=flags: [*judge(d), *flags.split(" ")], word)

    # Files with something else in them. All but the named contents are wrong.
    def put(path, content, flags):
        def make(d):
            if isinstance(content, bytes):
                (d / path).write_bytes(content)
            else:
                special(d / path, content)
            return flags(d)

        return make

    for program, path, flags, fine in (
        ("train_gpt2", "shards/s/meta.json", train, {"a loop"}),
        ("train_gpt2", "shards/s/edufineweb_train_000002.npy", train, ()),
        ("train_gpt2", "shards/s/edufineweb_val_000000.npy", train, ()),
        ("train_gpt2", "shards/s/more_train_1.bin", lambda d: (d / "shards/s/meta.json").unlink() or train(d), ()),
        ("train_gpt2", "model.pt", lambda d: [*train(d), "--init_from", d / "model.pt"], ()),
        ("train_gpt2", "log/latest.pt", resume, ()),
        ("train_gpt2", "hf/config.json", lambda d: [*train(d), "--init_from", d / "hf"], ()),
        ("train_gpt2", "hf/model.safetensors", lambda d: [*train(d), "--init_from", d / "hf"], ()),
        ("train_gpt2", "t.json", lambda d: [*train(d), "--data", d / "text.txt", "--tokenizer", d / "t.json"], ()),
        ("train_gpt2", "t.txt", lambda d: [*train(d), "--data", d / "t.txt", "--tokenizer", "bytes"], {"nested"}),
        ("fineweb", "a.parquet", lambda d: [*tokenize(d), "--input", d / "a.parquet"], ()),
        ("fineweb", "a.jsonl", lambda d: [*tokenize(d), "--input", d / "a.jsonl"], {"empty"}),
        ("fineweb", "a.txt", lambda d: [*tokenize(d), "--input", d / "a.txt"], {"empty", "a word", "a list", "null", "a string", "half of a dict", "nested"}),
        ("fineweb", "t.json", lambda d: [*tokenize(d), "--tokenizer", d / "t.json"], ()),
        ("fineweb", "made/meta.json", again, {"a loop"}),
        ("hellaswag", "items.jsonl", judge, ()),
        ("hellaswag", "clean.json", lambda d: [*judge(d), "--clean", d / "clean.json"], ()),
        ("hellaswag", "model.pt", lambda d: ["-m", d / "model.pt", *judge(d)[2:]], ()),
    ):
        for name, content in [*JUNK.items(), *zip(SPECIAL, SPECIAL)]:
            if name not in fine:
                row(f"{path} is {name}", program, put(path, content, flags), Path(path).name if "hf" not in path else "hf")

    # Values that cannot be. These rows and those below them are slow together.
    marks.append(pytest.mark.slow)
    def change(path, flags, read, write, *keys, value):
        def make(d):
            whole = part = read(d / path)
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = value
            write(d / path, whole)
            return flags(d)

        return make

    def in_json(path, flags, *keys, value):
        return change(path, flags, lambda p: json.loads(p.read_text()), lambda p, x: p.write_text(json.dumps(x)), *keys, value=value)

    def in_checkpoint(flags, *keys, value):
        return change("log/latest.pt", flags, load, lambda p, x: torch.save(x, p), *keys, value=value)

    def begin(d):
        return [*train(d), "--init_from", d / "log" / "latest.pt"]

    for value in VALUES:
        for key in "vocab_size", "eot", "shards":
            row(f"{key} {value!r}", "train_gpt2", in_json("shards/s/meta.json", train, key, value=value), "meta.json")
        if value != "x":
            row(f"tokenizer {value!r}", "train_gpt2", in_json("shards/s/meta.json", train, "tokenizer", value=value), "meta.json")
        for key in ("tokens", "end") if value != 10**30 else ():
            keys = "shards", "edufineweb_val_000000.npy", key
            row(f"{key} {value!r}", "fineweb", in_json("made/meta.json", again, *keys, value=value), "meta.json")
            if key == "tokens":
                row(f"{key} {value!r}", "train_gpt2", in_json("shards/s/meta.json", train, *keys, value=value), "meta.json")
        for key in ("model", "config") if value not in ({}, []) else ("model",):
            row(f"{key} {value!r}", "train_gpt2", in_checkpoint(begin, key, value=value), "latest.pt")
        for key in "step", "optimizers", "args":
            if (key, value) not in [("args", {}), ("optimizers", [])]:
                row(f"{key} {value!r}", "train_gpt2", in_checkpoint(resume, key, value=value), "step" if (key, value) == ("step", 10**30) else "latest.pt")
        for key in "n_layer", "n_embd", "vocab_size", "tokenizer":
            if (key, value) not in [("tokenizer", "x"), ("tokenizer", []), ("tokenizer", {})]:
                row(f"config {key} {value!r}", "train_gpt2", in_checkpoint(begin, "config", key, value=value), "latest.pt")
        if value in (-1, 10**30) or value != value:
            for key in "B", "max_lr", "min_lr", "weight_decay", "T", "seed":
                row(f"args {key} {value!r}", "train_gpt2", in_checkpoint(resume, "args", key, value=value), key)
        for key in "exp_avg", "step":
            row(f"{key} {value!r}", "train_gpt2", in_checkpoint(resume, "optimizers", "transformer.wte.weight", key, value=value), "latest.pt")
        row(f"label {value!r}", "hellaswag", in_json("items.jsonl", judge, "label", value=value), "line 1") if value != 1.5 else None
    wpe = "model", "transformer.wpe.weight"
    for name, value in {"a vector": torch.zeros(3), "a number": 5, "sparse": torch.zeros(1024, 16).to_sparse()}.items():
        row(f"a weight is {name}", "train_gpt2", in_checkpoint(begin, *wpe, value=value), "latest.pt")
        row(f"a moment is {name}", "train_gpt2", in_checkpoint(resume, "optimizers", "transformer.wte.weight", "exp_avg", value=value), "latest.pt") if name != "sparse" else None
    for key, value in ("endings", ["a"] * 3), ("endings", [1, 2, 3, 4]), ("ctx", None), ("ctx", 5), ("label", 4), ("label", "two"):
        row(f"{key} {value!r}", "hellaswag", in_json("items.jsonl", judge, key, value=value), "line 1")

    # Arrays that are no shards.
    def save(array=None, edit=None):
        def make(d):
            path = d / "shards" / "s" / "edufineweb_train_000002.npy"
            (d / "shards" / "s" / "meta.json").unlink()
            np.save(path, np.zeros(200, np.uint16) if array is None else array, allow_pickle=True)
            if edit:
                path.write_bytes(edit(path.read_bytes()))
            return train(d)

        return make

    u2 = np.uint16
    for name, array in {
        "int64": np.zeros(200, np.int64), "2-D": np.zeros((20, 20), u2), "0-D": u2(3), "no token": np.zeros(0, u2), "strings": np.array(["a"] * 200),
        "big-endian": np.zeros(200, ">u2"), "objects": np.array([{}]), "Fortran": np.asfortranarray(np.zeros((20, 20), u2)),
        "int16": np.zeros(200, np.int16), "a record": np.zeros(200, [("a", "u2")]), "bool": np.zeros(200, bool),
    }.items():  # fmt: skip
        row(f"a shard of {name}", "train_gpt2", save(array), "000002.npy")
    for name, edit in {
        "cut": lambda b: b[:-10], "half a token": lambda b: b[:-1], "version 9": lambda b: b[:6] + b"\x09" + b[7:], "magic": lambda b: b"X" + b[1:],
        "negative": lambda b: b.replace(b"(200,)", b"(-20,)"), "code": lambda b: b.replace(b"(200,)", b"exit()"),
    }.items():  # fmt: skip
        row(f"a shard with a header of another kind: {name}", "train_gpt2", save(edit=edit), "000002.npy")
    return rows


@pytest.mark.parametrize("program, make, word", table())
def test_bad_input_ends_in_one_line_that_names_it(material, tmp_path, monkeypatch, capsys, program, make, word):
    directory = tmp_path / "here"
    shutil.copytree(material, directory)
    monkeypatch.chdir(directory)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = [str(flag) for flag in make(directory)]
    with pytest.raises(SystemExit) as e:
        fineweb.run(lambda: PROGRAMS[program].main(flags))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert e.value.code == 2 and len(lines) == 1 and word in lines[0], lines
    assert not list(directory.rglob("*.part")) and not list(directory.glob("new/*.pt")) and not list(directory.glob("new/*.npy"))
