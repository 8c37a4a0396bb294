"""HellaSwag: guesses as an independent computation makes them, items found in shards, the harness's opinion."""

import http.server
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, environment, free_port, needs_bpe, read_log, succeed
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from train_gpt2 import EOT, GPT, GPTConfig, UserError, get_tokenizer

CPU = torch.device("cpu"), torch.autocast("cpu", enabled=False)


@pytest.fixture
def items_file(tmp_path):
    """31 items from the play, in the published format."""
    text, rng = (ROOT / "input.txt").read_text().replace("\n", " "), np.random.default_rng(0)

    def piece(low, high):
        start, n = rng.integers(len(text) - high), rng.integers(low, high)
        return text[start : start + n].strip()

    path = tmp_path / "items.jsonl"
    items = [{"ctx": piece(10, 60), "endings": [piece(5, 30) for _ in range(4)], "label": i % 4} for i in range(31)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def hf(tmp_path):
    """A random Hugging Face GPT-2 for 128 tokens, and its directory."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=EOT, eos_token_id=EOT)
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path / "hf"


def independent_guesses(model, path, tokenizer):
    """An ending at a time through transformers, no padding, from the texts: {index: (by sum, by mean)}."""
    guesses = {}
    for i, line in enumerate(path.read_text().splitlines()):
        item, losses = json.loads(line), []
        for ending in item["endings"]:
            context, ending = tokenizer.encode_ordinary(item["ctx"]), tokenizer.encode_ordinary(" " + ending)
            with torch.no_grad():
                log_p = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)
            losses.append([-log_p[len(context) - 1 + j, token].item() for j, token in enumerate(ending)])
        sums, means = [sum(x) for x in losses], [sum(x) / len(x) for x in losses]
        guesses[i] = sums.index(min(sums)), means.index(min(means))
    return guesses


def test_guesses_are_those_of_transformers_for_any_batch_size(hf, items_file):
    tokenizer = get_tokenizer("bytes")
    expected = independent_guesses(hf[0], items_file, tokenizer)
    assert len({by_sum for by_sum, _ in expected.values()}) > 1 and any(a != b for a, b in expected.values())
    model, items = GPT.from_pretrained(hf[1]).train(), hellaswag.load_items(items_file, tokenizer, 128)
    for batch_size in 1, 7, 31:
        assert hellaswag.evaluate(model, items, *CPU, batch_size) == expected
    assert model.training
    labels = [item[2] for item in items]
    acc, acc_norm = (sum(g[k] == y for g, y in zip(map(expected.get, range(31)), labels)) / 31 for k in (0, 1))
    assert hellaswag.accuracy(expected, items) == (acc, acc_norm)


def test_ranks_share_the_items_evenly(hf, items_file, monkeypatch):
    model, items = GPT.from_pretrained(hf[1]), hellaswag.load_items(items_file, get_tokenizer("bytes"), 128)
    whole, parts = hellaswag.evaluate(model, items, *CPU), []
    monkeypatch.setattr(hellaswag, "WORLD_SIZE", 4)
    for rank in range(4):
        monkeypatch.setattr(hellaswag, "RANK", rank)
        parts.append(hellaswag.evaluate(model, items, *CPU))
    assert sorted(map(len, parts)) == [7, 8, 8, 8]
    assert {i: guess for part in parts for i, guess in part.items()} == whole


def byte_shards(directory):
    """The directory's shards as fineweb.py --tokenizer bytes would have written them, so that no test needs the BPE."""
    shards = {p.name: {"tokens": len(np.load(p)), "documents": 1, "bytes": 100} for p in directory.glob("*.npy")}
    (directory / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "complete": True, "shards": shards}))


def published(tmp_path, items_file):
    """items_file where the download would put it."""
    (tmp_path / "hellaswag").mkdir()
    items_file.rename(tmp_path / "hellaswag" / "hellaswag_val.jsonl")


def test_one_rank_and_two_count_the_same(hf, items_file, shards, tmp_path):
    byte_shards(shards)
    items = hellaswag.load_items(items_file, get_tokenizer("bytes"), 128)
    guesses = hellaswag.evaluate(GPT.from_pretrained(hf[1]), items, *CPU)
    published(tmp_path, items_file)
    flags = ["--data", shards, "--init_from", hf[1], "--device", "cpu", "--T", 16, "--B", 2, "--total_batch_size", 64]
    flags += ["--max_steps", 1, "--checkpoint_every", 0, "--hellaswag_every", 1]
    for ranks in 1, 2:
        succeed(*flags, "--log_dir", tmp_path / f"log{ranks}", ranks=ranks, cwd=tmp_path)
    first, second = (read_log(tmp_path / f"log{ranks}", "hella") for ranks in (1, 2))
    assert first == second and list(first) == [0, 1]
    assert first[0] == pytest.approx(hellaswag.accuracy(guesses, items)[1], abs=1e-8)


def test_items_longer_than_the_context_of_the_model_that_trains(items_file, shards, tmp_path):
    byte_shards(shards)
    published(tmp_path, items_file)
    model = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16))
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, tmp_path / "small.pt")
    flags = ["--data", shards, "--init_from", tmp_path / "small.pt", "--device", "cpu", "--T", 16, "--B", 2, "--total_batch_size", 64]
    flags += ["--max_steps", 1, "--checkpoint_every", 0, "--hellaswag_every", 1, "--log_dir", tmp_path / "log"]
    assert "their context is cut" in succeed(*flags, cwd=tmp_path).stdout
    assert list(read_log(tmp_path / "log", "hella")) == [0, 1]


def test_evaluations_do_not_touch_training_with_compile_and_two_ranks(items_file, shards, tmp_path):
    byte_shards(shards)
    published(tmp_path, items_file)
    flags = ["--data", shards, *TINY, "--T", 128, "--B", 1, "--total_batch_size", 256, "--compile", "--dropout", 0.1]
    flags += ["--max_steps", 5, "--checkpoint_every", 0]
    for every in 0, 2:
        often = [word for name in ("val", "hellaswag", "sample") for word in (f"--{name}_every", every)]
        done = succeed(*flags, *often, "--log_dir", tmp_path / f"log{every}", ranks=2, cwd=tmp_path)
    assert {f"rank {rank} sample" in done.stdout for rank in (0, 1)} == {True}
    assert list(read_log(tmp_path / "log2", "hella")) == [0, 2, 4, 5]
    assert read_log(tmp_path / "log2") == read_log(tmp_path / "log0")


def test_training_goes_on_without_the_file(shards, tmp_path):
    """A warning, once. (The file that is there is broken: what a missing one does depends on the network.)"""
    byte_shards(shards)
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "hellaswag_val.jsonl").write_text('{"ctx": "cut o')
    flags = ["--data", shards, *TINY, "--max_steps", 2, "--hellaswag_every", 1, "--log_dir", tmp_path / "log"]
    done = succeed(*flags, ranks=2, cwd=tmp_path)
    assert done.stdout.count("warning:") == 1 and "line 1" in done.stdout
    assert read_log(tmp_path / "log", "hella") == {} and len(read_log(tmp_path / "log")) == 2


def test_sampling_from_a_checkpoint(shards, tmp_path):
    byte_shards(shards)
    flags = ["--data", shards, "--device", "cpu", "--log_dir", tmp_path / "log"]
    succeed(*flags, *TINY, "--max_steps", 1)
    look = ["--init_from", tmp_path / "log" / "model_00001.pt", *TINY, "--sample_every", 1, "--max_steps", 0]
    look += ["--prompt", "O tide", "--num_samples", 3, "--max_new_tokens", 4, "--top_k", 1, "--temperature", 0.5]
    done = succeed(*flags, *look)
    samples = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("rank 0 sample")]
    assert len(samples) == 3 and len(set(samples)) == 1 and samples[0].startswith("O tide")  # top_k 1: no choice
    assert "step     0 | val" in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not as they should be.


@pytest.mark.parametrize(
    "line, word",
    [
        ('{"ctx": "a", "endi', "line 2 is not an item"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"]}', "line 2 has no 'label'"),
        ('{"endings": ["a", "b", "c", "d"], "label": 1}', "line 2 has no 'ctx'"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', "line 2 is not an item (label 4"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": ""}', "line 2 is not an item"),
        ('{"ctx": "a", "endings": ["a", "b", "c"], "label": 1}', "line 2 is not an item (label 1 of 3"),
        ('["a"]', "line 2 is not an item"),
    ],
)
def test_bad_lines_are_named(items_file, line, word):
    lines = items_file.read_text().splitlines()
    items_file.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(UserError) as e:
        hellaswag.load_items(items_file, get_tokenizer("bytes"))
    assert word in str(e.value) and str(items_file) in str(e.value)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="empty.jsonl is empty"):
        hellaswag.load_items(tmp_path / "empty.jsonl", get_tokenizer("bytes"))


def test_what_is_no_file_or_model(items_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bad.pt").write_text("x")
    for flags, word in [
        (["--data", "nowhere.jsonl", "-m", "gpt2"], "nowhere.jsonl"),
        (["-m", str(tmp_path / "bad.pt")], "bad.pt is damaged"),
        (["-m", "gpt5"], "gpt5 is no .pt file, Hugging Face directory or released name"),
        (["-m", str(tmp_path)], f"{tmp_path} is no .pt file"),
        (["-m", "gpt2", "--limit", "0"], "--limit 0"),
        (["--contamination", str(tmp_path)], "needs shards"),
        ([], "-m"),
    ]:
        done = subprocess.run(
            [sys.executable, ROOT / "hellaswag.py", "--data", items_file, *flags],
            env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if "rror" in line]
        assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: "), done.stderr
        assert word in errors[0]


def test_long_items_lose_the_beginning_of_their_context(hf, items_file, capsys):
    tokenizer = get_tokenizer("bytes")
    item = json.loads(items_file.read_text().splitlines()[0])
    cut = item | {"ctx": item["ctx"][-(40 - 1 - max(map(len, item["endings"]))) :]}
    assert len(cut["ctx"]) < len(item["ctx"])
    items_file.write_text(json.dumps(item) + "\n" + json.dumps(cut))
    long, short = hellaswag.load_items(items_file, tokenizer, 40)
    assert long == short
    assert "1 items" in capsys.readouterr().out
    whole, _ = hellaswag.load_items(items_file, tokenizer, 128)
    assert tokenizer.decode(whole[0]) == item["ctx"]
    model = GPT.from_pretrained(hf[1])
    hellaswag.evaluate(model, hellaswag.load_items(items_file, tokenizer, 8), *CPU)  # endings are longer still


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Stands for GitHub: what it answers next is server.answers, (status, promised bytes, body) each."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/hellaswag_val.jsonl"
            status, size, body = self.server.answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/hellaswag_{{}}.jsonl")
        monkeypatch.setattr(hellaswag.time, "sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        yield server
        server.shutdown()


def test_download_is_whole_or_not_there(server, tmp_path):
    path, body = tmp_path / "hellaswag" / "hellaswag_val.jsonl", b'{"ctx": "..."}\n' * 20_000
    server.answers = [(200, len(body), body[:100_000]), (500, 3, b"sad"), (404, 3, b"sad")]
    with pytest.raises(UserError, match="can't be fetched .*404.*put the file at hellaswag/hellaswag_val.jsonl"):
        hellaswag.download("val")
    assert server.answers == [] and not path.exists()
    server.answers = [(200, len(body), body[:100_000]), (200, len(body), body)]  # breaks off, is tried again
    path.parent.mkdir(exist_ok=True)
    path.with_name(path.name + ".part").write_bytes(body[:1000])  # of an earlier run that was killed
    assert hellaswag.download("val").read_bytes() == body
    assert hellaswag.download("val").read_bytes() == body and server.answers == []  # not fetched again
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{free_port()}/{{}}")
    monkeypatch.setattr(hellaswag.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="can't be fetched .*refused"):
        hellaswag.main(["-m", "gpt2"])
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Contamination.


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_bpe)])
def test_contamination_finds_what_is_there_and_nothing_else(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "CHUNK", 50)  # many borders between chunks
    rng, tokenizer = np.random.default_rng(0), get_tokenizer(name)
    codes = hellaswag.word_codes(tokenizer)
    words = np.setdiff1d(np.flatnonzero(codes), EOT)
    comma = tokenizer.encode_ordinary(",")
    upper, lower = (tokenizer.encode_ordinary(text) for text in ("A", "a"))

    def draw(n):
        return rng.choice(words, n).tolist()

    items, shard, expected = [], [], []

    def plant(found, item, tokens):
        """An item (its context and right ending), and tokens that stand in a shard amid others."""
        nonlocal shard
        cut = len(item) // 2
        items.append((item[:cut], [draw(9), item[cut:], draw(9), draw(9)], 1))
        expected.extend([len(items) - 1] * found)
        shard += draw(rng.integers(30, 90)) + tokens + draw(20)

    for _ in range(20):
        x = draw(30)
        plant(True, x, x[8:21])
        plant(False, x := draw(30), x[8:20])
        plant(False, x := draw(30), x[8:14] + draw(1) + x[15:22])
        plant(False, x := draw(30), x[8:15] + [EOT] + x[15:22])  # in two documents
        plant(True, x := draw(30), [t for word in x[:13] for t in (word, *comma)])
        plant(True, x := draw(5) + comma + draw(5) + upper + draw(8), [t for t in x if t not in comma][:10] + lower + x[12:])
        plant(True, x := draw(8), x)
        plant(False, x := draw(8), x[1:])
        plant(True, x := draw(1) + x[:1], x)
    plant(False, comma * 20, comma * 20)  # no word, so nothing to be found
    np.save(tmp_path / "train_0.npy", np.array([EOT] + shard, dtype=np.uint16))
    straddling, ours_only = draw(30), draw(30)
    plant(True, straddling, [])
    shard += straddling[2:9]
    np.save(tmp_path / "train_1.npy", np.array(shard[-200:], dtype=np.uint16))
    np.save(tmp_path / "train_2.npy", np.array(straddling[9:15] + draw(300), dtype=np.uint16))
    plant(False, ours_only, [])
    np.save(tmp_path / "val.npy", np.array([EOT] + ours_only, dtype=np.uint16))
    items.append((draw(20), [x := draw(20), draw(20), draw(20), draw(20)], 3))  # only a wrong ending is there
    np.save(tmp_path / "train_3.npy", np.array(draw(100) + x, dtype=np.uint16))
    assert hellaswag.contamination(items, sorted(tmp_path.glob("train*")), tokenizer) == expected


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_bpe)])
def test_contamination_of_texts_and_the_clean_rest(name, hf, items_file, tmp_path, capsys):
    tokenizer = get_tokenizer(name)
    items = [json.loads(line) for line in items_file.read_text().splitlines()]
    items[3] |= {"ctx": "Every morning the old clerk walks down to the harbour and counts the boats.", "label": 2}
    items[3]["endings"][2] = "Then he writes the number into a book."
    items[8] |= {"ctx": items[3]["ctx"].replace("clerk", "sailor").replace("counts", "greets")}  # too few are the same
    items_file.write_text("".join(json.dumps(item) + "\n" for item in items))
    text = "He said: every morning - the old clerk walks down to the harbour, and counts the boats! And so on."
    (tmp_path / "shards").mkdir()
    tokens = [EOT, *tokenizer.encode_ordinary(text), EOT, *tokenizer.encode_ordinary("Nothing else of it is here. " * 9)]
    np.save(tmp_path / "shards" / "train.npy", np.array(tokens, dtype=np.uint16))
    np.save(tmp_path / "shards" / "val.npy", np.array(tokens[:9], dtype=np.uint16))
    if name == "bytes":
        byte_shards(tmp_path / "shards")
    out = str(tmp_path / "found" / "items.json")
    hellaswag.main(["--contamination", str(tmp_path / "shards"), "--data", str(items_file), "--out", out])
    found = json.loads(open(out).read())["overlapping"]
    assert 3 in found and (name == "bytes" or found == [3])  # 13 letters are less than 13 words
    assert f"{len(found)} of 31 items" in capsys.readouterr().out

    model = ["-m", str(hf[1]), "--data", str(items_file), "--tokenizer", name, "-d", "cpu"]
    hellaswag.main([*model, "--clean", out])
    lines = capsys.readouterr().out.splitlines()[-3:]
    rated = GPT.from_pretrained(hf[1])
    loaded = hellaswag.load_items(items_file, tokenizer, 128)
    guesses = hellaswag.evaluate(rated, loaded, *CPU)
    right = [guesses[i][1] == loaded[i][2] for i in range(31)]
    for line, part in zip(lines, (range(31), set(range(31)) - set(found), found)):
        assert f"acc_norm {sum(right[i] for i in part) / len(part):.4f} on {len(part)} items" in line
    with pytest.raises(UserError, match="about 31 items of items.jsonl"):
        hellaswag.main([*model, "--clean", out, "--limit", "5"])


# ----------------------------------------------------------------------------------------------------------------------
# What others say of the same model.


@needs_bpe
def test_the_harness_agrees_item_by_item(hf, items_file, tmp_path, monkeypatch):
    """lm-evaluation-harness on the exported model: its acc is the lowest summed loss too (pip install lm_eval)."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    GPT.from_pretrained(hf[1]).save_pretrained(tmp_path / "export")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(f"""
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {items_file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
""")
    results = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path / 'export'},dtype=float32", device="cpu", batch_size=4, tasks=["ours"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    items = hellaswag.load_items(items_file, get_tokenizer(), 128)
    ours = hellaswag.evaluate(GPT.from_pretrained(hf[1]), items, *CPU)
    theirs = {s["doc_id"]: [response[0] for response in s["filtered_resps"]] for s in results["samples"]["ours"]}
    assert {i: scores.index(max(scores)) for i, scores in theirs.items()} == {i: by_sum for i, (by_sum, _) in ours.items()}
    assert results["results"]["ours"]["acc,none"] == hellaswag.accuracy(ours, items)[0]


@needs_bpe
def test_exported_model_runs_in_a_pipeline(hf, tmp_path):
    from transformers import AutoModelForCausalLM, pipeline

    model = GPT.from_pretrained(hf[1])
    model.save_pretrained(tmp_path / "export")
    write = pipeline("text-generation", model=str(tmp_path / "export"), device="cpu")
    [theirs] = write("The tide", max_new_tokens=10, do_sample=False)
    idx = torch.tensor([get_tokenizer().encode_ordinary("The tide")])
    assert theirs["generated_text"] == get_tokenizer().decode(model.generate(idx, 10, top_k=1)[0].tolist())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    torch.testing.assert_close(again(idx).logits, model.eval()(idx)[0][..., :50257], atol=1e-5, rtol=0)
