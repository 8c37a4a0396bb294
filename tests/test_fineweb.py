"""fineweb.py: every document once and exactly, the same bytes however it was run, and what goes wrong."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TINY, environment, needs_bpe, read_log, succeed, train

import fineweb
from train_gpt2 import EOT, UserError, find_shards, get_tokenizer

SIZE = 1_000_000


def make_texts(n, seed=0):
    """n documents of 1 to 4,000 characters, most of ASCII, with line ends of all kinds and the end-of-text string."""
    rng = random.Random(seed)
    words = ["tide", "harbour", "rope", "naïve", "潮", "🦀", "<|endoftext|>", "\r\n", "\n\n", "\t", "\0", " ", "I'll", "1905"]
    pool = " ".join(rng.choices(words, k=100_000))
    starts = [rng.randrange(len(pool) - 4000) for _ in range(n)]
    return [pool[start : start + rng.randint(1, 4000)] for start in starts]


def write_parquet(path, texts, row_group_size):
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=row_group_size)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """20,400 documents in four formats (some 40 MB), and their texts in order."""
    directory = tmp_path_factory.mktemp("corpus")
    texts = make_texts(20_400)
    write_parquet(directory / "a.parquet", texts[:8000], 8000)
    write_parquet(directory / "b.parquet", texts[8000:12000], 97)
    write_jsonl(directory / "c.jsonl", texts[12000:20000])
    for i, text in enumerate(texts[20000:]):
        (directory / f"d{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return directory, texts


def command(*flags):
    return [sys.executable, str(ROOT / "fineweb.py"), "--tokenizer", "bytes", *map(str, flags)]


def tokenize(*flags, env={}, **options):
    return subprocess.run(command(*flags), env=environment(**env), capture_output=True, text=True, timeout=300, **options)


def refused(*flags, **options):
    done = tokenize(*flags, **options)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The corpus as one worker tokenises it without a stop."""
    directory, texts = corpus
    out = tmp_path_factory.mktemp("whole") / "shards"
    done = tokenize("--input", directory / "*", "--out", out, "--shard_size", SIZE, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_document_comes_back_exactly(corpus, whole):
    (_, texts), (out, said) = corpus, whole
    names = sorted(path.name for path in out.glob("*.npy"))
    n = len(names)
    assert names == [*(f"edufineweb_train_{i:06d}.npy" for i in range(1, n)), "edufineweb_val_000000.npy"]
    shards = [np.load(out / name) for name in [names[-1], *names[:-1]]]
    assert all(shard.dtype == np.uint16 and shard.ndim == 1 for shard in shards)
    assert [len(shard) for shard in shards[:-1]] == [SIZE] * (n - 1) and 0 < len(shards[-1]) <= SIZE
    tokens, decode = np.concatenate(shards), get_tokenizer("bytes").decode_bytes
    assert tokens[0] == EOT
    documents = np.split(tokens, np.flatnonzero(tokens == EOT))[1:]
    assert [decode(document[1:]).decode() for document in documents] == texts
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["complete"]) == ("bytes", 50257, True)
    for name, shard in zip(meta["shards"], shards):
        entry = meta["shards"][name]
        assert entry["tokens"] == len(shard) and entry["documents"] == (shard == EOT).sum()
        assert entry["bytes"] == len(decode(shard[shard != EOT]))
    assert f"{len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes" in said


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(corpus, whole, tmp_path, workers):
    done = tokenize("--input", corpus[0] / "*", "--out", tmp_path / "out", "--shard_size", SIZE, "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(whole[0])


def alive(group):
    """Are there processes of this process group?"""
    try:
        return os.killpg(group, 0) is None
    except ProcessLookupError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_at_random_moments_it_goes_on_to_the_same_bytes(corpus, whole, tmp_path, how):
    """What is complete is never touched again, nothing else has a final name, and no worker is left behind."""
    out, rng, written = tmp_path / "out", random.Random(how), {}
    flags = command("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE, "--workers", 2)
    for _ in range(2):  # each time a pair of units is done, some ten of 45 shards
        with subprocess.Popen(flags, env=environment(), stderr=subprocess.PIPE, start_new_session=True) as process:
            count = len(written) + rng.randint(1, 4)
            while process.poll() is None and (not out.exists() or len(list(out.glob("*.npy"))) < count):
                time.sleep(0.01)
            time.sleep(rng.random() / 10)
            process.send_signal(how) if how == signal.SIGKILL else os.killpg(process.pid, how)  # a terminal tells all
            assert b"Traceback" not in process.stderr.read()
        assert process.returncode == (-9 if how == signal.SIGKILL else 130)
        until = time.time() + 20
        while alive(process.pid) and time.time() < until:
            time.sleep(0.05)
        assert not alive(process.pid)
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
        assert written.items() <= now.items() and len(now) > len(written)
        assert all((out / name).read_bytes() == (whole[0] / name).read_bytes() for name in now)
        written = now
    assert subprocess.run(flags, env=environment(), capture_output=True).returncode == 0
    assert contents(out) == contents(whole[0])
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}.items()
    assert subprocess.run(flags, env=environment(), capture_output=True).returncode == 0  # nothing left to do
    assert contents(out) == contents(whole[0])


def test_a_kill_between_an_entry_and_its_shard(corpus, whole, tmp_path):
    """The entry is written first; without the file it does not count."""
    out = tmp_path / "out"
    out.mkdir()
    meta = json.loads((whole[0] / "meta.json").read_text())
    for name in list(meta["shards"])[:3]:
        (out / name).write_bytes((whole[0] / name).read_bytes())
    meta["shards"] = dict(list(meta["shards"].items())[:4])
    (out / "meta.json").write_text(json.dumps(meta | {"complete": False}))
    assert tokenize("--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE).returncode == 0
    assert contents(out) == contents(whole[0])


@pytest.mark.parametrize("piece", [1, 50, 1000, 10**6])
def test_pieces_of_any_size_give_each_document_once(tmp_path, piece):
    texts = [text[:90] for text in make_texts(120, seed=1)]
    write_parquet(tmp_path / "a.parquet", texts[:40], 7)
    write_jsonl(tmp_path / "b.jsonl", texts[40:80])
    for i, text in enumerate(texts[80:]):
        (tmp_path / f"c{i:02d}.txt").write_text(text, encoding="utf-8", newline="")
    pieces = fineweb.make_pieces(fineweb.local_files([str(tmp_path / "*"), str(tmp_path / "*.jsonl")]), piece)
    found = {}
    for worker in range(3):  # each reads every third piece, in this process
        for i in range(worker, len(pieces), 3):
            paths, start, stop = pieces[i]
            found[i] = [t for path in paths for t in fineweb.READERS[path[path.rindex(".") :]](path, start, stop, "text")]
    assert [text for i in range(len(pieces)) for text in found[i]] == texts
    assert len(pieces) > 100 if piece == 1 else True
    assert len(pieces) == 3 if piece == 10**6 else True


def test_a_mixture_takes_its_shares_and_is_the_same_all_along(corpus, tmp_path):
    """All documents of one source, a quarter of another's, each whole; in every shard the same proportions; any workers."""
    directory, texts = corpus
    whole, part = set(texts[:8000]), set(texts[12000:20000])
    mix = ["--mix", f"{directory}/a.parquet:1.0", f"{directory}/c.*:0.25", "--shard_size", 700_000]
    for workers in (1, 2):
        done = tokenize(*mix, "--out", tmp_path / f"{workers}", "--workers", workers)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    meta = json.loads((tmp_path / "1" / "meta.json").read_text())
    shards = [np.load(tmp_path / "1" / name) for name in meta["shards"]]
    decode, share = get_tokenizer("bytes").decode_bytes, []
    for shard in shards:
        documents = [decode(tokens[1:]).decode(errors="replace") for tokens in np.split(shard, np.flatnonzero(shard == EOT))[1:-1]]
        assert all(text in whole or text in part for text in documents)
        share.append(sum(len(text) for text in documents if text in part) / len(shard))
    assert len(shards) > 10 and max(share[:-1]) - min(share[:-1]) < 0.1
    tokens = np.concatenate(shards)
    stream = [decode(document[1:]).decode() for document in np.split(tokens, np.flatnonzero(tokens == EOT))[1:]]
    assert sorted(text for text in stream if text in whole) == sorted(texts[:8000])
    assert [source["share"] for source in meta["sources"].values()] == [1, 0.25]
    (n, of_n), (m, of_m) = (np.sum([shard["sources"][name] for shard in meta["shards"].values()], axis=0) for name in meta["sources"])
    assert n == 8000 and abs(m - 2000) < 10 and len(stream) == n + m and of_n + of_m == len(tokens)
    assert f"{of_m / len(tokens):.1%} are the {m:,} documents of {directory}/c.*" in done.stdout
    again = mix[:2] + [f"{directory}/c.*:0.5"] + mix[3:]
    assert "sources" in refused(*again, "--out", tmp_path / "1")


@pytest.mark.parametrize("mix", ["docs/*.txt", "docs/*.txt:much", "docs/*.txt:0", "docs/*.txt:1.5", "nowhere/*.txt:1"])
def test_a_mixture_that_makes_no_sense(tmp_path, mix):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a" * 100)
    assert mix.split(":")[0] in refused("--mix", mix, "--out", tmp_path / "out", cwd=tmp_path)


def test_a_tokenizer_of_hugging_face(tmp_path):
    """Its own ids, end of text and bytes; a copy of it goes with the shards. What is no byte-level BPE is refused."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = make_texts(300)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", texts)
    flags = ["--input", tmp_path / "a.jsonl", "--shard_size", 20_000, "--workers", 2]
    done = tokenize(*flags, "--out", tmp_path / "out", "--tokenizer", tmp_path)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("tokenizer.json", 600, 1)
    tokens = np.concatenate([np.load(tmp_path / "out" / name) for name in meta["shards"]])
    bpe.encode_special_tokens = True
    assert tokens.tolist() == [i for text in texts for i in (1, *bpe.encode(text).ids)]
    assert sum(shard["bytes"] for shard in meta["shards"].values()) == sum(len(text.encode()) for text in texts)
    splits, vocabulary, _ = find_shards(tmp_path / "out", 1)
    assert vocabulary == {"tokenizer": str(tmp_path / "out" / "tokenizer.json"), "n_tokens": 600, "eot": 1}
    ours = get_tokenizer(vocabulary["tokenizer"])
    assert ours.decode(ours.encode_ordinary(texts[0])) == texts[0]
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "word": 1}, unk_token="word")).save(str(tmp_path / "words.json"))
    assert "words.json is no byte-level BPE" in refused(*flags, "--out", tmp_path / "other", "--tokenizer", tmp_path / "words.json")
    assert "a.jsonl is no tokenizer" in refused(*flags, "--out", tmp_path / "other", "--tokenizer", tmp_path / "a.jsonl")


@needs_bpe
def test_text_that_spells_the_special_token_stays_text(tmp_path):
    texts = [*make_texts(300, seed=2), "<|endoftext|>", "a" * 100_000, " " * 5000]
    write_parquet(tmp_path / "a.parquet", texts, 50)
    assert tokenize("--input", tmp_path / "a.parquet", "--out", tmp_path / "out", "--shard_size", 50_000, "--tokenizer", "gpt2").returncode == 0
    tokens = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"), key=lambda p: p.name[-10:])])
    encode = get_tokenizer().encode_ordinary
    assert tokens.tolist() == [t for text in texts for t in (EOT, *encode(text))]


def test_records_without_text_are_counted_and_half_surrogates_survive(tmp_path):
    texts = ["one", None, "", "two", "\ud83d broken"] * 20_000
    write_jsonl(tmp_path / "a.jsonl", texts)
    pq.write_table(pa.table({"text": pa.array(["three", None, ""] * 1000)}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("")
    done = tokenize("--input", tmp_path / "*", "--out", tmp_path / "out", "--shard_size", 50_000)
    assert done.returncode == 0 and "42,001 records were left out" in done.stdout
    assert "61,000 documents" in done.stdout
    tokens = np.load(tmp_path / "out" / "edufineweb_val_000000.npy")
    assert get_tokenizer("bytes").decode(tokens[:50]).startswith("<|endoftext|>one<|endoftext|>two<|endoftext|>\ufffd broken")


def test_a_data_set_through_datasets(tmp_path):
    """A folder that `datasets` opens as it opens a data set of the hub."""
    texts = make_texts(200, seed=3)
    (tmp_path / "set" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "set" / "data" / "train-00000.parquet", texts[:100], 10)
    write_parquet(tmp_path / "set" / "data" / "train-00001.parquet", texts[100:], 10)
    write_parquet(tmp_path / "set" / "data" / "test-00000.parquet", texts, 10)
    env = {"HF_HOME": str(tmp_path / "hf")}
    for flags in ("--dataset", tmp_path / "set"), ("--input", tmp_path / "set" / "data" / "train*.parquet"):
        done = tokenize(*flags, "--out", tmp_path / flags[0], "--shard_size", 100_000, env=env)
        assert done.returncode == 0, done.stderr
    a, b = (contents(tmp_path / name) for name in ("--dataset", "--input"))
    a.pop("meta.json"), b.pop("meta.json")
    assert a == b and len(a) > 2
    assert "BuilderConfig" in refused("--dataset", tmp_path / "set", "--config", "nope", "--out", tmp_path / "x", env=env)


def test_the_hub_out_of_reach(tmp_path):
    line = refused("--dataset", "someone/something", "--out", tmp_path / "out", env={"HF_HOME": str(tmp_path / "hf")})
    assert "someone/something" in line and "--input" in line and not (tmp_path / "out").exists()


def test_no_tokenizer_is_an_error_not_a_fallback(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    line = refused("--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "gpt2", env=env)
    assert "TIKTOKEN_CACHE_DIR" in line and not (tmp_path / "out").exists()


def test_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.md").write_text("text")
    for flags, says in (
        ("--input nothing*.parquet --out out", "nothing*.parquet"),
        ("--input a.txt --out out --shard_size 0", "--shard_size 0"),
        ("--input a.txt --out out --workers 0", "--workers 0"),
        ("--input a.txt", "--out"),
        ("--input a.md --out out", "a.md: its name must end in .parquet"),
        ("--input a.txt --out out --shardsize 5", "did you mean --shard_size"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            fineweb.main([*flags.split(), "--tokenizer", "bytes"])
    assert not (tmp_path / "out").exists()
    line = refused("--input", "a.txt", "--out", "out", cwd=tmp_path)  # all of it would be validation
    assert "--shard_size 1" in line and not list(tmp_path.glob("out/*.npy"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.parquet", b"not parquet at all", "parquet"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "byte 17"),
        ("a.jsonl", b"[1, 2]\n", "byte 0"),
        ("a.jsonl", b'{"body": "x"}\n', "'text'"),
        ("a.jsonl", b'{"text": 5}\n', "int"),
        ("a.txt", b"\xff\xfe\x00binary", "utf-8"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    line = refused("--input", tmp_path / name, "--out", tmp_path / "out", "--workers", 1)
    assert name in line and says in line
    assert not list(tmp_path.glob("out/*.npy"))


def test_no_such_column(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    flags = ["--input", tmp_path / "a.parquet", "--out", tmp_path / "out", "--workers", 1]
    line = refused(*flags)
    assert "'text'" in line and "body, id" in line and "--column" in line
    assert "validation" in refused(*flags, "--column", "body")  # found now; too little, but no mixture
    assert "int" in refused(*flags, "--column", "id")


def test_other_input_or_settings_over_shards(whole, corpus, tmp_path):
    out, (directory, _) = whole[0], corpus
    before = contents(out)
    for flags, says in (
        (["--input", f"{directory}/*", "--shard_size", "5"], "shard_size 1000000, not 5"),
        (["--input", f"{directory}/*.parquet", "--shard_size", str(SIZE)], "files"),
        (["--input", f"{directory}/*", "--shard_size", str(SIZE), "--column", "id"], "column text, not id"),
    ):
        with pytest.raises(UserError, match=says):
            fineweb.main([*flags, "--out", str(out), "--tokenizer", "bytes"])
    (tmp_path / "a.txt").write_text("x" * 100)
    flags = ["--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--shard_size", 10]
    assert tokenize(*flags).returncode == 0
    time.sleep(0.01)
    (tmp_path / "a.txt").write_text("y" * 100)
    assert "files_sha256" in refused(*flags)
    (tmp_path / "out" / "meta.json").unlink()
    assert "no meta.json" in refused(*flags)
    assert contents(out) == before


def test_disk_full_keeps_what_is_complete(corpus, whole, tmp_path):
    """A limit on the size of a file stands for the full disk: the write fails in the middle of a shard."""
    out = tmp_path / "out"
    flags = ["--input", corpus[0] / "*", "--out", out, "--shard_size", SIZE]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, SIZE))  # noqa: E731
    line = refused(*flags, preexec_fn=limit)
    assert "edufineweb_val_000000.npy" in line and "make room" in line
    assert set(contents(out)) == {"meta.json"}
    assert tokenize(*flags).returncode == 0
    assert contents(out) == contents(whole[0])


def test_no_write_permission(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir(mode=0o555)
    line = None
    if os.geteuid():
        line = refused("--input", tmp_path / "a.txt", "--out", tmp_path / "out")
    else:  # root may write anywhere, but not in a process that gives that power up
        prefix = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
        done = subprocess.run([*prefix, *command("--input", tmp_path / "a.txt", "--out", tmp_path / "out")], capture_output=True, text=True)
        assert done.returncode == 2
        line = done.stderr
    assert str(tmp_path / "out") in line and "Permission denied" in line
    (tmp_path / "file").write_text("")
    assert "file" in refused("--input", tmp_path / "a.txt", "--out", tmp_path / "file" / "out")


def test_training_picks_up_tokenizer_and_bits_per_byte(whole, tmp_path):
    flags = ["--data", whole[0], *TINY, "--max_steps", 2, "--val_every", 1, "--val_tokens", 5000, "--log_dir", tmp_path / "log"]
    flags += ["--vocab_size", 50257]
    said = succeed(*flags, "--sample_every", 2).stdout
    assert "sample 4" in said  # the byte tokenizer of meta.json decodes, whether or not BPE is at hand
    entry = json.loads((whole[0] / "meta.json").read_text())["shards"]["edufineweb_val_000000.npy"]
    val, bpb = read_log(tmp_path / "log", "val"), read_log(tmp_path / "log", "val_bpb")
    assert set(bpb) == {0, 1, 2}
    for step in bpb:
        assert bpb[step] == pytest.approx(val[step] / np.log(2) * entry["tokens"] / entry["bytes"], rel=1e-6)


def test_shards_of_unknown_tokenizer_are_refused(whole, shards, tmp_path):
    out = tmp_path / "mixed"
    out.mkdir()
    for name, data in contents(whole[0]).items():
        (out / name).write_bytes(data)
    stranger = out / "edufineweb_train_000099.npy"
    stranger.write_bytes((shards / "edufineweb_train_000001.npy").read_bytes())
    done = train("--data", out, *TINY)
    assert done.returncode == 2 and "error: " in done.stderr and str(stranger) in done.stderr
    stranger.replace(out / "edufineweb_train_000001.npy")  # another script's shard under a known name
    with pytest.raises(UserError, match="edufineweb_train_000001.npy is not the shard"):
        find_shards(out, 100)
