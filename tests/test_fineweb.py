"""fineweb.py: every document once and exactly, the same bytes however it was run, and what goes wrong."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, environment, make_tokens, needs_bpe, write_bin
from tiktoken.load import read_file_cached
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import fineweb
from fineweb import UserError, find_shards, get_tokenizer, load_text, open_shard

SIZE = 120_000  # tokens of a shard
EOT = 256  # end of text of the tokenizer "bytes", whose other ids are the values of the bytes


def make_texts(n, seed=0):
    """n documents of up to 4,000 characters, with line ends of all kinds and the end-of-text string. Each
    ends in its number, so no two are alike."""
    rng = random.Random(seed)
    words = ["tide", "rope", "I'll", "naïve", "潮", "🦀", "<|endoftext|>", "\r\n", "\n\n", "\t", "\0", " "]
    pool = " ".join(rng.choices(words, k=20_000))
    starts = [rng.randrange(len(pool) - 4000) for _ in range(n)]
    return [f"{pool[start : start + rng.randint(0, 4000)]}#{i}" for i, start in enumerate(starts)]


def write_parquet(path, texts, row_group_size):
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=row_group_size)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """3,000 documents in three formats, many batches of them; and their texts in order."""
    directory, texts = tmp_path_factory.mktemp("corpus"), make_texts(3000)
    write_parquet(directory / "a.parquet", texts[:1000], 1000)
    write_parquet(directory / "b.parquet", texts[1000:1600], 97)
    write_jsonl(directory / "c.jsonl", texts[1600:2900])
    for i, text in enumerate(texts[2900:]):
        (directory / f"d{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return directory, texts


def tokenize(*flags):
    fineweb.main(["--tokenizer", "bytes", *map(str, flags)])


def refused(*flags):
    """The message of the UserError with which the call ends."""
    with pytest.raises(UserError) as e:
        tokenize(*flags)
    assert "\n" not in str(e.value)
    return str(e.value)


def command(*flags):
    """The command as a person would type it."""
    return [sys.executable, str(ROOT / "fineweb.py"), "--tokenizer", "bytes", *map(str, flags)]


def run(*flags, env={}, prefix=(), **options):
    """Run the script to its end."""
    options |= {"env": environment(**env), "capture_output": True, "text": True, "timeout": 100}
    return subprocess.run([*prefix, *command(*flags)], **options)


def error_line(done):
    """The one line with which a run ended that made an error known."""
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def times(out):
    """When each shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}


def read_meta(out):
    return json.loads((out / "meta.json").read_text())


def read_documents(out):
    """The texts in the shards of a directory, made with the tokenizer "bytes"."""
    tokens = np.concatenate([np.load(out / name) for name in read_meta(out)["shards"]])
    assert tokens[0] == EOT
    documents = np.split(tokens, np.flatnonzero(tokens == EOT))[1:]
    return [bytes(document[1:].tolist()).decode() for document in documents]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The corpus as one thread tokenizes it without a stop."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    tokenize("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE, "--workers", 1)
    return out


# --------------------------------------------------------------------------------------------------
# Every document once, and the same shards however they were made


def test_every_document_comes_back_exactly(corpus, whole):
    assert read_documents(whole) == corpus[1]


def test_shards_are_uint16_of_exactly_shard_size_tokens_and_the_first_is_for_validation(whole):
    names = sorted(path.name for path in whole.glob("*.npy"))
    expected = [f"edufineweb_train_{i:06d}.npy" for i in range(1, len(names))]
    assert names == [*expected, "edufineweb_val_000000.npy"]
    shards = [np.load(whole / name) for name in read_meta(whole)["shards"]]
    assert len(shards) == len(names) > 30
    assert all(shard.dtype == np.uint16 and shard.ndim == 1 for shard in shards)
    assert {len(shard) for shard in shards[:-1]} == {SIZE} and 0 < len(shards[-1]) <= SIZE


def test_meta_json_describes_the_shards(corpus, whole):
    meta = read_meta(whole)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["complete"]) == ("bytes", 257, 256, True)
    assert meta["shares"] == {f"{corpus[0]}/*": 1.0}
    for name, entry in meta["shards"].items():
        shard = np.load(whole / name)
        assert entry["tokens"] == len(shard)


def test_a_complete_run_says_what_there_is_also_the_second_time(corpus, whole, capsys):
    before = contents(whole)
    tokenize("--input", corpus[0] / "*", "--out", whole, "--shard_size", SIZE)
    size = sum(len(text.encode()) + 1 for text in corpus[1])
    assert f"complete: {len(before) - 1} shards, {size:,} tokens in {whole}" in capsys.readouterr().out
    assert contents(whole) == before


def test_any_number_of_workers_gives_the_same_bytes(corpus, whole, tmp_path):
    tokenize("--input", corpus[0] / "*", "--out", tmp_path, "--shard_size", SIZE, "--workers", 3)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("batch", [1, 7, 10**9])
def test_batches_of_any_size_give_each_document_once(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(fineweb, "tokenize", functools.partial(fineweb.tokenize, batch_size=batch))
    texts = [text[-90:] for text in make_texts(120, seed=1)]
    write_parquet(tmp_path / "a.parquet", texts[:40], 7)
    write_jsonl(tmp_path / "b.jsonl", texts[40:80])
    for i, text in enumerate(texts[80:]):
        (tmp_path / f"c{i:02d}.txt").write_text(text, encoding="utf-8", newline="")
    # A file that two patterns match counts once.
    tokenize("--input", tmp_path / "*", tmp_path / "*.jsonl", "--out", tmp_path / "out", "--shard_size", 997)
    assert read_documents(tmp_path / "out") == texts
    first, used = list(read_meta(tmp_path / "out")["shards"].values())[-1]["end"]
    assert (first, used) == (120, 0)


@pytest.mark.parametrize("name", ["a.parquet", "b.parquet", "c.jsonl", "d000.txt"])
def test_readers_tell_how_much_of_the_file_has_been_read(corpus, name):
    path = corpus[0] / name
    shares = [far for far, _ in fineweb.read_file(str(path), "text")]
    assert 0 < shares[0] and shares == sorted(shares) and shares[-1] == 1
    middle = shares[len(shares) // 2]
    assert len(shares) == 1 or middle == pytest.approx(0.5, abs=0.05)  # all documents are of like size


def test_progress_goes_on_from_file_to_file(tmp_path):
    """In bytes: one file of 100, one of 300, one of 600."""
    paths = [tmp_path / f"{n}.txt" for n in (100, 300, 600)]
    for path in paths:
        path.write_text("x" * int(path.stem))
    files = {str(path): path.stat().st_size for path in paths}
    assert [fraction for fraction, _ in fineweb.read_source(1.0, files, "text")] == [0.1, 0.4, 1.0]


# --------------------------------------------------------------------------------------------------
# Stops


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_at_random_moments_it_goes_on_to_the_same_bytes(corpus, whole, tmp_path, how):
    """What meta.json lists is never touched again, and no part of a shard has the name of a shard."""
    out, rng, listed = tmp_path / "out", random.Random(how), {}
    flags = "--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE, "--workers", 2
    for _ in range(2):
        with subprocess.Popen(command(*flags), env=environment(), stderr=subprocess.PIPE) as process:
            count = len(listed) + rng.randint(1, 5)  # of 56 shards, about one in a batch
            while process.poll() is None and len(list(out.glob("*.npy"))) < count:
                time.sleep(0.001)
            time.sleep(rng.random() / 50)
            process.send_signal(how)
            assert b"Traceback" not in process.stderr.read()
        assert process.returncode == (-9 if how == signal.SIGKILL else 130)
        files, names = times(out), read_meta(out)["shards"]
        assert listed.items() <= files.items() and len(names) >= count - 1
        assert len(files.keys() - names) <= 1 and files.keys() >= set(names)  # a stop between shard and entry
        assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in files)
        listed = {name: files[name] for name in names}
    tokenize(*flags)
    assert listed.items() <= times(out).items()
    assert contents(out) == contents(whole)  # and so nothing else is left


def stop_after(whole, out, n):
    """Make `out` what a stop would have left of `whole` after n shards; returns the n + 1st entry."""
    shutil.copytree(whole, out)
    meta = read_meta(out) | {"complete": False}
    entries = list(meta["shards"].items())
    for name, _ in entries[n:]:
        (out / name).unlink()
    (out / "meta.json").write_text(json.dumps(meta | {"shards": dict(entries[:n])}))
    return entries[n]


@pytest.mark.parametrize("n", [0, 1, 20])
def test_a_kill_between_a_shard_and_its_entry_loses_nothing(corpus, whole, tmp_path, n):
    """The shard is written before its entry; without an entry it is written again."""
    name, _ = stop_after(whole, out := tmp_path / "out", n)
    (out / name).write_bytes(b"as if another run had put it there")
    tokenize("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE)
    assert contents(out) == contents(whole)


def test_an_entry_without_its_shard_does_not_count(corpus, whole, tmp_path):
    shutil.copytree(whole, out := tmp_path / "out")
    (out / "edufineweb_train_000007.npy").unlink()
    tokenize("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE)
    assert contents(out) == contents(whole)


def test_a_kill_before_the_first_shard_is_recorded_loses_nothing(corpus, whole, tmp_path, monkeypatch):
    flags = "--input", corpus[0] / "*", "--out", tmp_path / "out", "--shard_size", SIZE
    write_json, calls = fineweb.write_json, []

    def killed(path, value):
        calls.append(path)
        if len(calls) == 2:  # the first shard has its name already
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb, "write_json", killed)
        tokenize(*flags)
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["edufineweb_val_000000.npy"]
    tokenize(*flags)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_kill_after_the_last_shard_loses_nothing(corpus, whole, tmp_path):
    shutil.copytree(whole, out := tmp_path / "out")
    meta = read_meta(out) | {"complete": False}
    (out / "meta.json").write_text(json.dumps(meta))
    tokenize("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE)
    assert contents(out) == contents(whole)


def test_after_a_stop_the_documents_before_the_last_shard_are_left_out(corpus, whole, tmp_path, monkeypatch):
    stop_after(whole, out := tmp_path / "out", 20)
    last = list(read_meta(out)["shards"].values())[-1]
    first = last["end"][0]  # the first document of the batch in which the last shard ends
    encode_documents, tokenized = fineweb.encode_documents, []

    def counted(tokenizer, texts):
        tokenized.extend(texts)
        return encode_documents(tokenizer, texts)

    monkeypatch.setattr(fineweb, "encode_documents", counted)
    tokenize("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE)
    assert contents(out) == contents(whole)
    assert first > 500 and sorted(tokenized) == sorted(corpus[1][first:])


@pytest.mark.parametrize("batch_size", [1, 63, 1000])
def test_a_run_may_go_on_with_batches_of_another_size(corpus, whole, tmp_path, monkeypatch, batch_size):
    stop_after(whole, out := tmp_path / "out", 20)
    monkeypatch.setattr(fineweb, "tokenize", functools.partial(fineweb.tokenize, batch_size=batch_size))
    tokenize("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE)
    assert contents(out).keys() == contents(whole).keys()
    for path in out.glob("*.npy"):
        assert path.read_bytes() == (whole / path.name).read_bytes()


def test_two_runs_never_write_to_one_directory(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    (out := tmp_path / "out").mkdir()
    flags = "--input", tmp_path / "a.jsonl", "--out", out, "--shard_size", 1000
    with fineweb.locked(out):
        assert f"{out} is in use" in refused(*flags)
        assert not contents(out)
    tokenize(*flags)  # now it can
    assert "shard_size" in refused(*flags[:-1], 5)
    with fineweb.locked(out):  # neither a run that ended nor one that failed keeps the lock
        pass


def test_a_full_disk_keeps_what_is_complete(corpus, whole, tmp_path):
    """A limit on the size of a file stands for the full disk: the write fails in the middle of a shard."""
    flags = "--input", corpus[0] / "*", "--out", tmp_path / "out", "--shard_size", SIZE
    done = run(*flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, SIZE)))
    line = error_line(done)
    assert "edufineweb_val_000000.npy" in line and "make room" in line
    assert set(contents(tmp_path / "out")) == {"meta.json"}
    tokenize(*flags)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("previous")
    for error, becomes in (
        (KeyboardInterrupt, KeyboardInterrupt),
        (ValueError, ValueError),
        (OSError, UserError),
        (RuntimeError, UserError),  # torch.save's of a full disk
    ):
        with pytest.raises(becomes), fineweb.complete_file(path) as f:
            f.write(b"a part")
            f.flush()
            assert path.read_text() == "previous"
            raise error
        assert contents(tmp_path) == {"file": b"previous"}
    with fineweb.complete_file(path) as f:
        f.write(b"all of it")
    assert contents(tmp_path) == {"file": b"all of it"}


# --------------------------------------------------------------------------------------------------
# Mixtures


@pytest.fixture(scope="module")
def mixture(corpus, tmp_path_factory):
    """All documents of a.parquet (numbers 0 to 999) and a quarter of those of c.jsonl (1600 to 2899)."""
    out = tmp_path_factory.mktemp("mixture") / "shards"
    mix = ["--mix", f"{corpus[0]}/a.parquet:1.0", f"{corpus[0]}/c.*:0.25", "--shard_size", 100_000]
    tokenize(*mix, "--out", out, "--workers", 1)
    return mix, out


def test_a_mixture_takes_its_shares_evenly_and_in_order(corpus, mixture):
    found = read_documents(mixture[1])
    numbers = [int(text.rsplit("#", 1)[1]) for text in found]
    assert found == [corpus[1][i] for i in numbers]
    assert [i for i in numbers if i < 1600] == list(range(1000))
    taken = [i for i in numbers if i >= 1600]
    assert len(taken) == 1300 // 4 and set(np.diff(taken)) == {4} and taken[0] < 1604


def test_a_mixture_is_the_same_all_along(mixture):
    """Wherever one stops, as large a part of one source has been read as of the other."""
    numbers = np.array([int(text.rsplit("#", 1)[1]) for text in read_documents(mixture[1])])
    read = np.cumsum(numbers < 1000) / 1000 - np.cumsum(numbers >= 1600) / 325
    assert abs(read).max() < 0.04


def test_meta_json_has_the_shares_of_the_sources(mixture):
    mix, out = mixture
    a, c = (word.rpartition(":")[0] for word in mix[1:3])
    assert read_meta(out)["shares"] == {a: 1.0, c: 0.25}


def test_a_mixture_is_the_same_with_any_number_of_workers_and_after_a_stop(mixture, tmp_path):
    mix, out = mixture
    stop_after(out, tmp_path / "out", 9)
    tokenize(*mix, "--out", tmp_path / "out", "--workers", 3)
    assert contents(tmp_path / "out") == contents(out)


def test_other_shares_over_shards_are_refused(mixture):
    mix, out = mixture
    assert "shares" in refused(*mix[:2], mix[2].replace("0.25", "0.5"), *mix[3:], "--out", out)


def test_any_share_takes_that_part_of_the_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"{i:03d}" for i in range(1000)])
    for share in 0.001, 0.1, 1 / 3, 0.7, 1:
        files = fineweb.find_files(str(tmp_path / "a.jsonl"))
        taken = [int(text) for _, text in fineweb.read_source(share, files, "text")]
        assert abs(len(taken) - 1000 * share) <= 1
        expected = (np.arange(len(taken)) + 1) / share  # evenly
        assert np.abs(taken - expected).max() <= 1 / share + 1


def test_an_empty_record_does_not_count_in_a_share(tmp_path):
    """Half of four documents, the second and the fourth, with empty ones between them."""
    texts = ["a" * 50, "", "b" * 50, "", "", "c" * 50, "d" * 50]
    write_jsonl(tmp_path / "a.jsonl", texts)
    tokenize("--mix", f"{tmp_path}/a.jsonl:0.5", "--out", tmp_path / "out", "--shard_size", 60)
    assert read_documents(tmp_path / "out") == ["b" * 50, "d" * 50]


@pytest.mark.parametrize("mix", ["docs/*", "docs/*:much", "docs/*:0", "docs/*:1.5", "docs/*:nan", "nix/*:1"])
def test_a_wrong_pattern_or_share_in_a_mixture_is_named(tmp_path, monkeypatch, mix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a" * 100)
    assert mix.split(":")[0] in refused("--mix", mix, "--out", "out")
    assert not (tmp_path / "out").exists()


def test_a_pattern_twice_in_a_mixture_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    assert "twice" in refused("--mix", *[f"{tmp_path}/a.txt:0.5"] * 2, "--out", tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The path of a byte-level BPE of 400 tokens in Hugging Face's format; its end of text is 1."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(make_texts(30), trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    path = tmp_path_factory.mktemp("own") / "tokenizer.json"
    bpe.save(str(path))
    return path


KINDS = [pytest.param("gpt2", marks=[needs_bpe, pytest.mark.slow]), "bytes", "own"]


@pytest.fixture
def tokenizer(request, own):
    return get_tokenizer(str(own) if request.param == "own" else request.param)


def text_of(tokenizer, tokens):
    return b"".join(map(tokenizer.decode_single_token_bytes, tokens.tolist())).decode()


def test_the_tokenizer_bytes_has_the_values_of_the_bytes():
    tokenizer, text = get_tokenizer("bytes"), "naïve 🦀\r\n<|endoftext|>  \0"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode([*text.encode(), 256]) == f"{text}<|endoftext|>"
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
def test_the_string_of_the_special_token_is_plain_text(tokenizer):
    tokens = fineweb.encode_documents(tokenizer, ["a<|endoftext|>b", "<|endoftext|>"])
    assert tokens.dtype == np.uint16
    assert (tokens == tokenizer.eot_token).sum() == 2 and tokens[0] == tokenizer.eot_token
    assert text_of(tokenizer, tokens[tokens != tokenizer.eot_token]) == "a<|endoftext|>b<|endoftext|>"


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    texts = [json.loads(r'"a \ud83d b"'), json.loads(r'"\udc00"'), json.loads(r'"\ud83e\udd80"')]
    tokens = fineweb.encode_documents(tokenizer, texts)
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token))[1:]
    assert [text_of(tokenizer, document[1:]) for document in documents] == ["a \ufffd b", "\ufffd", "🦀"]


@needs_bpe
def test_the_shards_of_gpt2_have_the_tokens_of_tiktoken(tmp_path):
    texts = [*make_texts(60, seed=2), "<|endoftext|>", "a" * 20_000, " " * 5000]
    write_parquet(tmp_path / "a.parquet", texts, 50)
    out, encode = tmp_path / "out", get_tokenizer().encode_ordinary
    assert encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    tokenize("--input", tmp_path / "a.parquet", "--out", out, "--shard_size", 10_000, "--tokenizer", "gpt2")
    tokens = np.concatenate([np.load(out / name) for name in read_meta(out)["shards"]])
    assert tokens.tolist() == [token for text in texts for token in (50256, *encode(text))]
    data = find_shards(out)
    assert data[2:5] == ("gpt2", 50257, 50256)


def test_a_tokenizer_of_hugging_face_has_its_own_ids_and_goes_with_the_shards(own, tmp_path):
    texts, out = make_texts(60, seed=3), tmp_path / "out"
    write_jsonl(tmp_path / "a.jsonl", texts)
    tokenize("--input", tmp_path / "a.jsonl", "--shard_size", 5000, "--out", out, "--tokenizer", own.parent)
    meta = read_meta(out)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("tokenizer.json", 400, 1)
    tokens = np.concatenate([np.load(out / name) for name in meta["shards"]])
    bpe = Tokenizer.from_file(str(own))
    bpe.encode_special_tokens = True
    assert tokens.tolist() == [token for text in texts for token in (1, *bpe.encode(text).ids)]
    data = find_shards(out)
    assert data[2:5] == (str(out / "tokenizer.json"), 400, 1)
    tokenizer = get_tokenizer(data.tokenizer)
    assert tokenizer.decode(tokenizer.encode_ordinary(texts[0])) == texts[0]
    assert tokenizer.decode([1]) == "<|endoftext|>"


def test_what_is_no_byte_level_bpe_is_refused(own, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["text"] * 9)
    words, nameless = tmp_path / "words.json", tmp_path / "nameless.json"
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "word": 1}, unk_token="word")).save(str(words))
    nameless.write_text(own.read_text().replace("<|endoftext|>", "<|end|>"))
    files = (words, "byte-level"), (nameless, "endoftext"), (tmp_path / "a.jsonl", ""), (tmp_path / "no", "")
    for path, says in files:
        message = refused("--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", path)
        assert str(path) in message and says in message and "give gpt2, bytes" in message
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_lose_text_are_refused(own, tmp_path):
    """A BPE whose words are cut at white space, which it drops."""
    bpe = Tokenizer.from_file(str(own))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.save(str(tmp_path / "lossy.json"))
    with pytest.raises(UserError, match="lossy.json can't be read .*no byte-level BPE"):
        get_tokenizer(str(tmp_path / "lossy.json"))


def test_end_of_text_in_a_text_is_text_also_if_the_file_does_not_call_it_special(own, tmp_path):
    data = json.loads(own.read_text())
    for token in data["added_tokens"]:
        token["special"] = False
    (tmp_path / "plain.json").write_text(json.dumps(data))
    tokenizer = get_tokenizer(str(tmp_path / "plain.json"))
    assert tokenizer.eot_token not in tokenizer.encode_ordinary("a<|endoftext|>b")


def test_truncation_and_padding_in_a_tokenizer_json_do_not_change_documents(own, tmp_path):
    bpe = Tokenizer.from_file(str(own))
    bpe.enable_truncation(5)
    bpe.enable_padding(length=100_000)
    bpe.save(str(tmp_path / "tokenizer.json"))
    text = make_texts(2)[1]
    tokens = get_tokenizer(str(tmp_path)).encode_ordinary(text)
    assert tokens == get_tokenizer(str(own)).encode_ordinary(text) and len(tokens) > 8


def test_what_a_tokenizer_json_adds_to_a_text_is_left_out(own, tmp_path):
    """A post-processor that would put a token before and after each text."""
    bpe, text = Tokenizer.from_file(str(own)), "rope tide"
    ends = [("<|endoftext|>", bpe.token_to_id("<|endoftext|>"))]
    template = "<|endoftext|> $A <|endoftext|>"
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert get_tokenizer(str(tmp_path)).encode_ordinary(text) == get_tokenizer(str(own)).encode_ordinary(text)


def test_the_number_of_tokens_is_one_above_the_largest_id_and_at_most_65536(own, tmp_path):
    data, path = json.loads(own.read_text()), tmp_path / "tokenizer.json"
    for largest in 65_535, 65_536:
        data["model"]["vocab"]["~"] = largest  # leaves a hole where it was
        path.write_text(json.dumps(data))
        if largest < 2**16:
            assert get_tokenizer(str(path)).n_vocab == 65_536
        else:
            with pytest.raises(UserError, match="no byte-level BPE of up to 65,536 tokens"):
                get_tokenizer(str(path))


def test_a_tokenizer_json_without_a_decoder_decodes(own, tmp_path):
    data = json.loads(own.read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"decoder": None}))
    tokenizer, text = get_tokenizer(str(tmp_path)), "rope tide, naïve 🦀"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_the_tokenizer_may_lie_in_the_directory_of_the_shards(own, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    shutil.copytree(own.parent, out := tmp_path / "out")
    os.utime(out / "tokenizer.json", (1, 1))
    flags = "--input", tmp_path / "a.jsonl", "--out", out, "--shard_size", 500, "--tokenizer", out
    tokenize(*flags)
    before = contents(out)
    tokenize(*flags)  # not refused as a changed file
    assert contents(out) == before


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
def test_transformers_gives_the_same_ids(tokenizer, tmp_path):
    """Of these tokenizers only `own` composes characters first (NFC)."""
    fineweb.save_tokenizer(tokenizer, tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    code = (ROOT / "fineweb.py").read_text()
    text = "".join(make_texts(20, seed=4)) + code
    text += " nai\u0308ve 1234567 x'll  \u3000\r\n\n\t 東京🙂<|endoftext|> "
    ids = theirs(text)["input_ids"]
    parts = [tokenizer.encode_ordinary(part) for part in text.split("<|endoftext|>")]
    assert ids == [token for part in parts for token in (tokenizer.eot_token, *part)][1:]
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode_ordinary(text)
    assert theirs.decode(ids) == (unicodedata.normalize("NFC", text) if tokenizer.n_vocab == 400 else text)
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eot_token and theirs.model_max_length == 64


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
def test_what_other_versions_of_transformers_read_of_a_tokenizer(tokenizer, tmp_path):
    """Version 4.57 knows no class TokenizersBackend, and without model_input_names it would give the model
    token_type_ids, whose embeddings GPT-2 adds to those of the text."""
    fineweb.save_tokenizer(tokenizer, tmp_path, 64)
    kind = "PreTrainedTokenizerFast" if tokenizer.n_vocab == 400 else "GPT2Tokenizer"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "tokenizer_class": kind,
        "model_max_length": 64,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(tokenizer.n_vocab))
    assert vocabulary["<|endoftext|>"] == tokenizer.eot_token


@needs_bpe
def test_vocabulary_and_merges_of_gpt2_are_the_released_files(tmp_path):
    fineweb.save_tokenizer(get_tokenizer(), tmp_path, 1024)
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # in tiktoken's cache
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert vocabulary == json.loads(read_file_cached(url + "encoder.json")) and len(vocabulary) == 50257
    known = {"!": 0, "Ġthe": 262, "Hello": 15496, "Ġgazed": 50255, "<|endoftext|>": 50256}
    assert {word: vocabulary[word] for word in known} == known
    merges = (tmp_path / "merges.txt").read_text()
    assert merges == read_file_cached(url + "vocab.bpe").decode()
    version, *merges = merges.splitlines()
    assert version == "#version: 0.2" and len(merges) == 50_000
    assert merges[:4] == ["Ġ t", "Ġ a", "h e", "i n"]


def test_no_tokenizer_is_an_error_not_a_fallback(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "https_proxy": "http://127.0.0.1:9"}
    done = run("--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "gpt2", env=env)
    assert "TIKTOKEN_CACHE_DIR" in error_line(done) and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# What is read, and what is refused


def test_records_without_text_are_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", None, "", "two", "\ud83d broken"] * 200)
    pq.write_table(pa.table({"text": pa.array(["three", None, ""] * 10)}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("")
    tokenize("--input", tmp_path / "*", "--out", tmp_path / "out", "--shard_size", 1000)
    assert read_documents(tmp_path / "out") == ["one", "two", "\ufffd broken"] * 200 + ["three"] * 10


def test_fineweb_edu_comes_from_the_hub(tmp_path, monkeypatch):
    """From the hub's cache, in which it lies as a download would have left it."""
    texts, cache = make_texts(60, seed=3), tmp_path / "datasets--HuggingFaceFW--fineweb-edu"
    folder = cache / "snapshots" / ("0" * 40) / "sample" / "10BT"
    folder.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    write_parquet(folder / "000_00000.parquet", texts[:30], 10)
    write_parquet(folder / "001_00000.parquet", texts[30:], 10)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    message = refused("--shard_size", 20_000)  # the cache may have only some of the files
    assert "HuggingFaceFW/fineweb-edu can't be read" in message
    assert "go online, or give local files with --input" in message
    assert not (tmp_path / "edu_fineweb10B").exists()
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda name: None)
    tokenize("--shard_size", 20_000)
    assert read_documents(tmp_path / "edu_fineweb10B") == texts
    assert read_meta(tmp_path / "edu_fineweb10B")["shares"] == {"HuggingFaceFW/fineweb-edu": 1.0}


def test_files_that_do_not_exist_or_have_another_suffix_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("text")
    assert "nothing*.parquet" in refused("--input", "nothing*.parquet", "--out", "out")
    assert "a.md matches no .parquet, .jsonl or .txt file" in refused("--input", "a.md", "--out", "out")
    assert not (tmp_path / "out").exists()


def test_a_single_shard_which_would_all_be_validation_is_refused(tmp_path):
    """The line and the exit status of the command, too."""
    (tmp_path / "a.txt").write_text("x" * 99)
    line = error_line(run("--input", tmp_path / "a.txt", "--out", tmp_path / "out"))
    assert "no tokens to train on" in line and "--shard_size" in line
    assert not list(tmp_path.glob("out/*.npy"))
    flags = "--input", tmp_path / "a.txt", "--out", tmp_path / "exact", "--shard_size", 100
    assert "no tokens to train on" in refused(*flags)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.parquet", b"not parquet at all", "arquet"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1"),
        ("a.jsonl", b"[1, 2]\n", "line 1"),
        ("a.jsonl", b'{"body": "x"}\n', "'text'"),
        ("a.jsonl", b'{"text": 5}\n', "int"),
        ("a.txt", b"\xff\xfe\x00binary", "utf-8"),
    ],
)
def test_files_that_are_not_what_their_suffix_says_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    message = refused("--input", tmp_path / name, "--out", tmp_path / "out")
    assert str(tmp_path / name) in message and says in message and "--column" in message
    assert not list(tmp_path.glob("out/*.npy"))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_page_of_a_parquet_file_is_an_error_that_names_it(tmp_path, compression):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": make_texts(300)}), path, compression=compression, use_dictionary=False)
    page, data = pq.read_metadata(path).row_group(0).column(0), bytearray(path.read_bytes())
    middle = page.data_page_offset + page.total_compressed_size // 2
    data[middle : middle + 200] = bytes(255 - byte for byte in data[middle : middle + 200])
    path.write_bytes(data)
    assert f"{path} can't be read" in refused("--input", path, "--out", tmp_path / "out", "--shard_size", 99)


def test_a_column_that_is_not_there_is_named(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    flags = "--input", tmp_path / "a.parquet", "--out", tmp_path / "out"
    message = refused(*flags)
    assert "a.parquet" in message and "text" in message and "--column" in message
    assert "no tokens to train on" in refused(*flags, "--column", "body")  # found now, but too little
    assert "int" in refused(*flags, "--column", "id")


def test_other_settings_over_shards_are_refused(whole, corpus):
    before, directory = contents(whole), corpus[0]
    for flags, says in (
        (["--input", f"{directory}/*", "--shard_size", 5], f"shard_size {SIZE}, not 5"),
        (["--input", f"{directory}/*.parquet", "--shard_size", SIZE], "shares"),
        (["--input", f"{directory}/*", "--shard_size", SIZE, "--column", "id"], "column text, not id"),
    ):
        message = refused(*flags, "--out", whole)
        assert says in message and str(whole) in message
    assert contents(whole) == before


def test_files_that_changed_since_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    flags = "--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--shard_size", 10
    tokenize(*flags)
    (tmp_path / "a.txt").write_text("x" * 101)
    assert "files_sha256" in refused(*flags)


def test_shards_without_a_meta_json_are_never_gone_on_with(lecture_shards):
    before = contents(lecture_shards)
    assert "no meta.json" in refused("--input", ROOT / "input.txt", "--out", lecture_shards)
    assert contents(lecture_shards) == before


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir(mode=0o555)
    # Root may write anywhere, but not in a process that gives that power up.
    prefix = () if os.geteuid() else ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
    line = error_line(run("--input", tmp_path / "a.txt", "--out", tmp_path / "out", prefix=prefix))
    assert str(tmp_path / "out") in line and "Permission denied" in line
    (tmp_path / "file").write_text("")
    line = error_line(run("--input", tmp_path / "a.txt", "--out", tmp_path / "file" / "out"))
    assert str(tmp_path / "file") in line


def test_fineweb_does_not_import_torch():
    code = "import sys, fineweb; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


# --------------------------------------------------------------------------------------------------
# Reading shards


def test_text_file_splits_and_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh<|endoftext|>ijklmnXYé")  # 20 tokens, since each document begins with one
    data = load_text(path, get_tokenizer("bytes"))
    (train,), (val,) = data.train.values(), data.val.values()
    assert train.dtype == np.uint16
    assert train.tolist() == [256, *b"abcdefgh", 256, *b"ijklmnXY"]
    assert val.tolist() == [*"é".encode()]
    assert (data.tokenizer, data.n_vocab, data.eot) == ("bytes", 257, 256)


def test_shards_of_gpt2_need_no_meta_json(lecture_shards):
    data = find_shards(lecture_shards)
    assert [path.name for path in data.train.values()] == [f"edufineweb_train_{i:06d}.npy" for i in (1, 2, 3)]
    for i, (path, n) in enumerate(zip([*data.val.values(), *data.train.values()], (170, 325, 200, 150))):
        assert np.array_equal(open_shard(path), make_tokens(n, i, 50256))
    assert data[2:] == ("gpt2", 50257, 50256)


def test_hidden_files_are_no_shards(lecture_shards):
    """macOS writes ._NAME beside a file on disks of other systems."""
    (lecture_shards / "._edufineweb_train_000001.npy").write_bytes(b"\0\5\26\7")
    assert len(find_shards(lecture_shards).train) == 3


def test_the_word_in_the_name_says_the_split(tmp_path):
    """It is a word by itself: `val` is also a part of `retrieval`."""
    names = "retrieval_train_000001", "retrieval_val_000000", "trainer", "interval", "train", "my-val-2"
    for name in names:
        np.save(tmp_path / f"{name}.npy", make_tokens(100, 1))
    (tmp_path / "retrieval_train_000002.npy.part").write_bytes(b"not complete")
    data = find_shards(tmp_path)
    assert {path.name for path in data.train.values()} == {"retrieval_train_000001.npy", "train.npy"}
    assert {path.name for path in data.val.values()} == {"retrieval_val_000000.npy", "my-val-2.npy"}


def test_shards_of_llm_c_are_read(tmp_path):
    for i, name in enumerate(("val_000000", "train_000001", "train_000002")):
        write_bin(tmp_path / f"edu_fineweb_{name}.bin", make_tokens(100 + i, i))
    data = find_shards(tmp_path)
    train, (val,) = [open_shard(path) for path in data.train.values()], map(open_shard, data.val.values())
    for i, tokens in enumerate((val, *train)):
        assert tokens.dtype == np.uint16 and np.array_equal(tokens, make_tokens(100 + i, i))


@pytest.mark.parametrize("header", [{"magic": 20240801}, {"version": 7}, {"n": 99}, {"n": 101}])
def test_a_bin_file_without_the_header_of_llm_c_is_named(tmp_path, header):
    path = tmp_path / "a_train_000001.bin"
    write_bin(path, make_tokens(100, 1), **header)
    with pytest.raises(UserError, match=f"{path} can't be read .*header is not that of a shard of llm.c"):
        open_shard(path)


@pytest.mark.parametrize("cut", [0, 1000, -1])
def test_a_bin_file_that_was_cut_off_is_named(tmp_path, cut):
    """Nothing is left, or not all of the header, or half a token at the end."""
    path = tmp_path / "a_train_000001.bin"
    write_bin(path, make_tokens(100, 1))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=f"{path} can't be read"):
        open_shard(path)


def test_a_directory_without_both_splits_is_refused(tmp_path):
    np.save(tmp_path / "a_train_000001.npy", make_tokens(100, 1))
    with pytest.raises(UserError, match=f"{tmp_path} needs shards"):
        find_shards(tmp_path)


def test_shards_that_are_not_complete_can_be_read_with_a_warning(whole, tmp_path, capsys):
    stop_after(whole, tmp_path / "out", 5)
    data = find_shards(tmp_path / "out")
    assert len(data.train) == 4 and "not complete" in capsys.readouterr().out


def test_a_shard_that_was_deleted_is_a_warning(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    find_shards(tmp_path / "out")
    assert "warning" not in capsys.readouterr().out
    (tmp_path / "out" / "edufineweb_train_000003.npy").unlink()
    find_shards(tmp_path / "out")
    assert "is not complete: the same call of fineweb.py goes on with it" in capsys.readouterr().out


def test_shards_of_an_unknown_tokenizer_are_refused(whole, shards, tmp_path):
    """A file that meta.json does not list, and another script's shard under a name that it does."""
    shutil.copytree(whole, out := tmp_path / "mixed")
    stranger = shutil.copy(shards / "edufineweb_train_000001.npy", out / "edufineweb_train_000099.npy")
    with pytest.raises(UserError, match=f"{stranger} is not as in"):
        find_shards(out)
    stranger.replace(out / "edufineweb_train_000001.npy")
    with pytest.raises(UserError, match="edufineweb_train_000001.npy is not as in"):
        find_shards(out)
