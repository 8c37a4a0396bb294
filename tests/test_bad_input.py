"""Bad input of every kind ends in one line that names the thing, and leaves nothing half-written behind.

Every row works in a copy of one directory: see `material`. The paths in its flags are relative to that copy.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, load, main, make_shards, make_shards_of_bytes, needs_bpe

import fineweb
import hellaswag
import train_gpt2

# Flags with which the programs run without an error.
TRAIN = ["--data", "shards", *TINY, "--max_steps", "2", "--log_dir", "new"]
TRAIN_PLAIN = [*TRAIN, "--data", "plain"]
INIT = [*TRAIN, "--init_from", "log/latest.pt"]
RESUME = "--resume --log_dir log --max_steps 3".split()
TOKENIZE = "--input text.txt --tokenizer bytes --shard_size 60 --out new".split()
GO_ON = "--input text.txt --tokenizer bytes --shard_size 60 --out made".split()
JUDGE = "-m log/latest.pt --data items.jsonl -d cpu".split()

NAN = math.nan
VAL_SHARD, SHARD = "edufineweb_val_000000.npy", "edufineweb_train_000002.npy"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Shards with and without a meta.json, a run of two steps and its export, an item of HellaSwag, and a
    text and its shards."""
    directory = tmp_path_factory.mktemp("material")
    with contextlib.chdir(directory):
        make_shards_of_bytes(Path("shards"))
        make_shards(Path("plain"), 256)
        main("--data", "shards", *TINY, "--max_steps", 2, "--log_dir", "log")
        train_gpt2.GPT.from_checkpoint("log/latest.pt").save_pretrained("hf")
        item = {"ctx": "The tide", "endings": ["goes out.", "sings.", "is.", "no"], "label": 1}
        Path("items.jsonl").write_text(json.dumps(item))
        Path("text.txt").write_text("x" * 100)
        fineweb.main(GO_ON)
    return directory


@pytest.fixture
def refused(material, tmp_path, monkeypatch, capsys):
    """refused(program, flags, word) checks that the program ends in one line with the word, and leaves no
    files that are half-written or have a final name."""
    shutil.copytree(material, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def check(program, flags, word):
        with pytest.raises(SystemExit) as e:
            fineweb.run(lambda: program.main(flags))
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert e.value.code == 2 and len(lines) == 1 and word in lines[0], lines
        assert not list(Path(".").rglob("*.part"))
        assert {path.name for path in Path("new").glob("*")} <= {".lock", "config.json", "meta.json"}

    return check


# --------------------------------------------------------------------------------------------------
# Flags

NUMERIC = [a.option_strings[0] for a in train_gpt2.build_parser()._actions if a.type in (int, float)]


@pytest.mark.parametrize("value", ["-1", "nan", "two", "1" + "0" * 30])
@pytest.mark.parametrize("flag", NUMERIC)
def test_a_number_that_is_none_or_out_of_range_is_named(refused, flag, value):
    refused(train_gpt2, [*TRAIN, f"{flag}={value}"], flag)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--max_stps 3", "--max_stps"),
        ("--max_step 3", "--max_step"),  # no abbreviations: they would change meaning with a new flag
        ("--val_every", "--val_every: expected one argument"),
        ("--B -1", "--B -1 is out of range: it must be at least 0"),
        ("--n_head 0", "--n_head 0 is out of range: it must be at least 1"),
        ("--max_lr inf", "--max_lr inf is out of range"),
        ("--dropout 1.5", "--dropout 1.5 is out of range: it must be at least 0, and below 1"),
        ("--temperature 0", "--temperature 0.0 is out of range"),
        ("--val_tokens 15", "--val_tokens 15 is out of range: it must be at least 16"),
        ("--device tpu", "tpu"),
        ("--model gpt5", "gpt2-medium"),
        ("--data=", "--data: it is empty"),
        ("--init_from=", "--init_from: it is empty"),
        ("--n_embd 15", "n_embd 15 is not divisible by n_head 2: change one"),
        ("--T 17", "--total_batch_size 128 is no multiple of T * ranks, 17"),
        ("--T 32 --init_from log/latest.pt", "--T 32 is longer than the model's context: at most 16"),
        ("--max_lr 1e-5 --min_lr 1e-4", "--min_lr 0.0001 is above --max_lr 1e-05: give both"),
        ("--resume --init_from x", "--init_from: not allowed with argument --resume"),
        ("--data nowhere", "nowhere can't be read (No such file or directory)"),
        ("--data hf", "hf needs shards"),
        ("--data text.txt", "text.txt (val split): no row of 17 tokens: lower --T or give more data"),
        ("--data a\nb", "a b can't be read"),
        ("--init_from nowhere", "nowhere can't be read"),
        ("--init_from log", "log can't be read"),
        ("--init_from no.pt", "no.pt can't be read (No such file or directory)"),
        ("--log_dir text.txt/log", "text.txt"),
        ("--log_dir /proc/new", "/proc/new"),
    ],
)
def test_wrong_flags_of_train_gpt2_are_named(refused, flags, word):
    refused(train_gpt2, [*TRAIN, *flags.split(" ")], word)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--shard_size 0", "--shard_size and --workers must be at least 1"),
        ("--workers 0", "--shard_size and --workers must be at least 1"),
        ("--workers two", "--workers"),
        ("--mix text.txt:1", "--mix: not allowed with argument --input"),
        ("--input=", "--input: it is empty"),
        ("--out=", "--out: it is empty"),
    ],
)
def test_wrong_flags_of_fineweb_are_named(refused, flags, word):
    refused(fineweb, [*TOKENIZE, *flags.split()], word)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("-m=", "-m/--model: it is empty"),
        ("-m gpt5", "gpt5 can't be read"),
        ("-m shards", "shards can't be read"),
        ("-m no.pt", "no.pt can't be read"),
        ("-d mps", "latest.pt on mps"),
        ("--data=", "--data: it is empty"),
        ("--data nowhere.jsonl", "nowhere.jsonl can't be read"),
        ("--tokenizer klingon", "klingon can't be read"),
        pytest.param("--tokenizer gpt2", "has more tokens than log/latest.pt: leave it out", marks=needs_bpe),
        ("--limit 0", "--limit 0: it must be at least 1"),
        ("--batch_size -1", "--batch_size -1: it must be at least 1"),
        ("--contamination shards", "--contamination: not allowed with argument -m"),
    ],
)
def test_wrong_flags_of_hellaswag_are_named(refused, flags, word):
    refused(hellaswag, [*JUDGE, *flags.split()], word)


def test_hellaswag_needs_a_model_or_shards(refused):
    data = ["--data", "items.jsonl"]
    refused(hellaswag, data, "one of the arguments -m/--model --contamination is required")
    refused(hellaswag, [*data, "--contamination", "hf"], "hf needs shards")


# --------------------------------------------------------------------------------------------------
# Files with something else in them

NOT_BINARY = {"empty": b"", "a word": b"hello", "bytes": bytes(range(256))}
NOT_JSON = NOT_BINARY | {
    "a list": b"[]",
    "null": b"null",
    "a string": b'"x"',
    "half of a dict": b'{"a": ',
    "nested": b"[" * 100_000,
    "utf-16": '{"a": 1}'.encode("utf-16"),
}
NO_FILE = ["a directory", "a device", "a loop"]

FILES = {
    "shards/meta.json": (train_gpt2, TRAIN),
    f"shards/{SHARD}": (train_gpt2, TRAIN),
    f"shards/{VAL_SHARD}": (train_gpt2, TRAIN),
    "plain/more_train_1.bin": (train_gpt2, TRAIN_PLAIN),
    "model.pt": (train_gpt2, [*TRAIN, "--init_from", "model.pt"]),
    "log/latest.pt": (train_gpt2, RESUME),
    "hf/config.json": (train_gpt2, [*TRAIN, "--init_from", "hf"]),
    "hf/model.safetensors": (train_gpt2, [*TRAIN, "--init_from", "hf"]),
    "t.txt": (train_gpt2, [*TRAIN, "--data", "t.txt", "--tokenizer", "bytes"]),
    "t.json": (train_gpt2, [*TRAIN, "--data", "text.txt", "--tokenizer", "t.json"]),
    "a.jsonl": (fineweb, [*TOKENIZE, "--input", "a.jsonl"]),
    "made/meta.json": (fineweb, GO_ON),
    "items.jsonl": (hellaswag, JUDGE),
    "clean.json": (hellaswag, [*JUDGE, "--clean", "clean.json"]),
}
# A loop of links is taken for a file that is not there, which meta.json need not be.
RIGHT = [("shards/meta.json", "a loop"), ("made/meta.json", "a loop"), ("a.jsonl", "empty")]


def wrong_files():
    """(path, kind of junk) for each of FILES."""
    found = []
    for path in FILES:
        kinds = NOT_JSON if ".json" in path else NOT_BINARY
        found += [(path, kind) for kind in (*kinds, *NO_FILE) if (path, kind) not in RIGHT]
    return found


@pytest.mark.parametrize("path, kind", wrong_files())
def test_a_file_with_something_else_in_it_is_named(refused, path, kind):
    file = Path(path)
    file.unlink(missing_ok=True)
    if kind == "a directory":
        file.mkdir()
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    elif kind == "a loop":
        file.symlink_to(file.name)
    else:
        file.write_bytes(NOT_JSON[kind])
    program, flags = FILES[path]
    refused(program, flags, "hf" if path.startswith("hf/") else file.name)


@pytest.mark.parametrize(
    "array",
    [np.zeros(200, np.int64), np.zeros(200, np.int16), np.zeros(200, ">u2"), np.zeros((20, 20), np.uint16),
     np.uint16(3), np.zeros(0, np.uint16), np.array([{}])],
    ids=["int64", "int16", "big-endian", "2-D", "0-D", "no token", "objects"],
)  # fmt: skip
def test_an_array_that_is_no_shard_is_named(refused, array):
    np.save(f"plain/{SHARD}", array)
    refused(train_gpt2, TRAIN_PLAIN, f"{SHARD} can't be read")


@pytest.mark.parametrize("old, new", [(b"(200,)", b"(300,)"), (b"(200,)", b"(-20,)"), (b"(200,)", b"exit()")])
def test_a_shard_with_another_header_is_named(refused, old, new):
    """It has more tokens than the file, or a number below zero, or code."""
    file = Path("plain", SHARD)
    file.write_bytes(file.read_bytes().replace(old, new))
    refused(train_gpt2, TRAIN_PLAIN, f"{SHARD} can't be read")


# --------------------------------------------------------------------------------------------------
# Files in which one value is wrong

VALUES = [None, -1, 10**30, NAN, "x", {}]
NOT_REFUSED = [
    ("config", {}),  # stands for the defaults, as the next one does
    ("args", {}),
    ("tokenizer", "x"),  # may be the name of a tokenizer
    ("config/tokenizer", "x"),
    # No program writes these, and checksums guard a checkpoint from damage. They end in a traceback.
    ("config/tokenizer", {}),
    ("config/n_layer", 10**30),
]


def pairs(*keys):
    """(keys, value) for all of VALUES, but for those of NOT_REFUSED."""
    return [(key, value) for key in keys for value in VALUES if (key, value) not in NOT_REFUSED]


def assign(tree, keys, value):
    """tree["a"]["b"]["c"] = value, for the keys "a/b/c"."""
    *path, last = keys.split("/")
    for key in path:
        tree = tree[key]
    tree[last] = value


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys, value", pairs("vocab_size", "eot", "tokenizer", "shards", f"shards/{VAL_SHARD}/tokens")
)
def test_a_wrong_value_in_meta_json_is_named(refused, keys, value):
    file = Path("shards/meta.json")
    meta = json.loads(file.read_text())
    assign(meta, keys, value)
    file.write_text(json.dumps(meta))
    refused(train_gpt2, TRAIN, "meta.json")


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, -1, NAN, "x", {}])
@pytest.mark.parametrize("name", ["tokens", "end"])
def test_a_wrong_value_in_the_meta_json_of_shards_that_are_gone_on_with_is_named(refused, name, value):
    file = Path("made/meta.json")
    meta = json.loads(file.read_text())
    meta["shards"][VAL_SHARD][name] = value
    file.write_text(json.dumps(meta))
    refused(fineweb, GO_ON, "meta.json")


MODEL = pairs("model", "config", "config/n_layer", "config/n_embd", "config/vocab_size", "config/tokenizer")
MOMENT = "optimizers/transformer.wte.weight"
STATE = pairs("optimizers", "args", f"{MOMENT}/exp_avg", f"{MOMENT}/step")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, keys, value", [(INIT, *pair) for pair in MODEL] + [(RESUME, *pair) for pair in STATE]
)
def test_a_wrong_value_in_a_checkpoint_is_named(refused, flags, keys, value):
    """The state of the optimizers and the settings are read only where a run is resumed."""
    checkpoint = load("log/latest.pt")
    assign(checkpoint, keys, value)
    torch.save(checkpoint, "log/latest.pt")
    refused(train_gpt2, flags, "latest.pt")


@pytest.mark.slow
@pytest.mark.parametrize("value", [-1, 10**30, NAN])
@pytest.mark.parametrize("name", ["B", "max_lr", "T"])
def test_a_wrong_setting_in_a_checkpoint_is_named_as_its_flag(refused, name, value):
    checkpoint = load("log/latest.pt")
    checkpoint["args"][name] = value
    torch.save(checkpoint, "log/latest.pt")
    refused(train_gpt2, RESUME, f"--{name} {value} is out of range")


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight", [torch.zeros(3), 5, torch.zeros(16, 16).to_sparse()], ids=["vector", "int", "sparse"]
)
def test_a_weight_of_another_kind_is_named(refused, weight):
    checkpoint = load("log/latest.pt")
    checkpoint["model"]["transformer.wpe.weight"] = weight
    torch.save(checkpoint, "log/latest.pt")
    refused(train_gpt2, INIT, "latest.pt can't be read")
