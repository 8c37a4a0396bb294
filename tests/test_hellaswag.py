"""HellaSwag: losses and guesses as transformers makes them, items found in shards, the harness's opinion."""

import http.server
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, free_port, main, needs_bpe, read_log
from transformers import GPT2Config, GPT2LMHeadModel

import fineweb
import hellaswag
from fineweb import UserError, get_tokenizer
from train_gpt2 import GPT, GPTConfig

N = 31  # items
TOKENIZERS = ["bytes", pytest.param("gpt2", marks=[needs_bpe, pytest.mark.slow])]


@pytest.fixture
def items_file(tmp_path):
    """Items from the play, in the published format."""
    text, rng = (ROOT / "input.txt").read_text().replace("\n", " "), np.random.default_rng(0)

    def piece(low, high):
        start, n = rng.integers(len(text) - high), rng.integers(low, high)
        return text[start : start + n].strip()

    path, items = tmp_path / "items.jsonl", []
    for i in range(N):
        items.append({"ctx": piece(10, 60), "endings": [piece(5, 30) for _ in range(4)], "label": i % 4})
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def save_hugging_face(directory, tokenizer):
    """
    A random Hugging Face GPT-2 for 128 tokens, saved into the directory. Its weights are large, so that what
    it expects differs much from place to place.
    """
    torch.manual_seed(0)
    n_vocab, eot = {"bytes": (257, 256), "gpt2": (50257, 50256)}[tokenizer]
    shape = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    tokens = {"vocab_size": n_vocab, "bos_token_id": eot, "eos_token_id": eot, "tokenizer": tokenizer}
    model = GPT2LMHeadModel(GPT2Config(**shape, **tokens)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(directory)
    return model


@pytest.fixture
def hf(tmp_path):
    """A random Hugging Face GPT-2 whose tokens are bytes, and its directory."""
    return save_hugging_face(tmp_path / "hf", "bytes"), tmp_path / "hf"


@pytest.fixture
def play(tmp_path):
    """The first pages of the play in a file, and the flags with which a tiny model trains on their bytes."""
    (tmp_path / "play.txt").write_text((ROOT / "input.txt").read_text()[:5000])
    return ["--data", tmp_path / "play.txt", *TINY, "--val_every", 0, "--checkpoint_every", 0]


def publish(path, directory):
    """Put a file of items where the download would put it."""
    (directory / "hellaswag").mkdir()
    path.rename(directory / "hellaswag" / "hellaswag_val.jsonl")


def load(path, block_size=128, tokenizer="bytes"):
    return hellaswag.load_items(path, get_tokenizer(tokenizer), block_size)


def independent_losses(model, path, tokenizer="bytes"):
    """
    For each item, for each of its four endings, the loss of each token: an ending at a time through
    transformers, without padding, from the texts.
    """
    encode, losses = get_tokenizer(tokenizer).encode_ordinary, []
    for item in map(json.loads, path.read_text().splitlines()):
        losses.append([])
        for ending in item["endings"]:
            context, ending = encode(item["ctx"]), encode(" " + ending)
            with torch.no_grad():
                log_p = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)
            losses[-1].append([-log_p[len(context) - 1 + j, token].item() for j, token in enumerate(ending)])
    return losses


def lowest(losses):
    """{index of an item: (guess by sum, guess by mean)}."""
    sums = [[sum(ending) for ending in item] for item in losses]
    means = [[sum(ending) / len(ending) for ending in item] for item in losses]
    return {i: (s.index(min(s)), m.index(min(m))) for i, (s, m) in enumerate(zip(sums, means))}


# --------------------------------------------------------------------------------------------------
# Losses and guesses


@pytest.mark.parametrize("batch_size", [1, 7, N, None])
def test_guesses_are_those_of_transformers_for_any_batch_size(hf, items_file, batch_size):
    expected = lowest(independent_losses(hf[0], items_file))
    assert {by_sum for by_sum, _ in expected.values()} == {0, 1, 2, 3}
    assert any(by_sum != by_mean for by_sum, by_mean in expected.values())
    assert hellaswag.evaluate(GPT.from_pretrained(hf[1]), load(items_file), batch_size) == expected


def test_the_loss_of_every_token_of_an_ending_is_that_of_transformers(hf, items_file, monkeypatch):
    expected = [loss for item in independent_losses(hf[0], items_file) for ending in item for loss in ending]
    seen, cross_entropy = [], F.cross_entropy

    def spy(*args, **options):
        seen.append(cross_entropy(*args, **options))
        return seen[-1]

    monkeypatch.setattr(F, "cross_entropy", spy)
    hellaswag.evaluate(GPT.from_pretrained(hf[1]), load(items_file), 7)
    assert sorted(torch.cat(seen).tolist()) == pytest.approx(sorted(expected), abs=1e-3)


def test_accuracy_is_the_share_of_right_guesses(items_file):
    items = load(items_file)
    guesses = {i: (i % 4, (i + i // 20) % 4) for i in range(N)}  # by sum all right, by mean the first 20
    assert hellaswag.accuracy(guesses, items) == pytest.approx([1.0, 20 / N])
    assert hellaswag.accuracy({3: (3, 0), 4: (1, 0)}, items) == [0.5, 0.5]


def test_accuracy_of_no_guesses_is_nan(items_file):
    assert np.isnan(hellaswag.accuracy({}, load(items_file))).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(items_file, training):
    """With dropout, so that a model in training mode would guess at random."""
    torch.manual_seed(0)
    model, items = GPT(GPTConfig(128, 257, 1, 2, 16, 0.9, "bytes")).train(training), load(items_file)
    assert hellaswag.evaluate(model, items) == hellaswag.evaluate(model, items)
    assert {module.training for module in model.modules()} == {training}


def test_an_evaluation_ends_early_when_a_stop_is_asked_for(hf, items_file):
    model, items, stop = GPT.from_pretrained(hf[1]).train(), load(items_file), []
    assert hellaswag.evaluate(model, items, stop=["a signal"]) == {}
    model.lm_head.register_forward_hook(lambda *_: stop.append("a signal"))
    assert hellaswag.evaluate(model, items, 4, stop=stop) == {}
    assert len(stop) == 1  # no second batch
    assert model.training


def test_ranks_share_the_items_evenly(hf, items_file):
    model, items = GPT.from_pretrained(hf[1]), load(items_file)
    parts = [hellaswag.evaluate(model, items, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(map(len, parts)) == [7, 8, 8, 8]
    assert {i: guess for part in parts for i, guess in part.items()} == hellaswag.evaluate(model, items)


# --------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_the_accuracy(hf, items_file, capsys):
    guesses, labels = lowest(independent_losses(hf[0], items_file)), [item[2] for item in load(items_file)]
    hellaswag.main(["-m", str(hf[1]), "--data", str(items_file), "-d", "cpu"])
    acc, acc_norm = (sum(guesses[i][k] == labels[i] for i in range(N)) / N for k in (0, 1))
    assert f"{hf[1]}: acc {acc:.4f} acc_norm {acc_norm:.4f} on {N} items" in capsys.readouterr().out
    hellaswag.main(["-m", str(hf[1]), "--data", str(items_file), "-d", "cpu", "--limit", "7"])
    acc, acc_norm = (sum(guesses[i][k] == labels[i] for i in range(7)) / 7 for k in (0, 1))
    assert f"acc {acc:.4f} acc_norm {acc_norm:.4f} on 7 items" in capsys.readouterr().out


def test_the_command_takes_a_checkpoint_and_another_tokenizer(items_file, tmp_path, capsys):
    """The model's own tokenizer is GPT-2's, which the command then does not need."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(128, 50304, 1, 2, 16))
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, tmp_path / "small.pt")
    items = load(items_file)
    flags = ["-m", str(tmp_path / "small.pt"), "--data", str(items_file), "-d", "cpu", "--tokenizer", "bytes"]
    hellaswag.main(flags)
    acc, acc_norm = hellaswag.accuracy(hellaswag.evaluate(model, items), items)
    assert f"acc {acc:.4f} acc_norm {acc_norm:.4f} on {N} items" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# In the training loop


@pytest.mark.slow
def test_one_rank_and_two_count_the_same(hf, items_file, play, tmp_path, two_ranks, monkeypatch):
    items = load(items_file)
    guesses = lowest(independent_losses(hf[0], items_file))
    publish(items_file, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = [*play, "--n_embd", 32, "--init_from", hf[1], "--hellaswag_every", 1, "--max_steps", 1]
    main(*flags, "--log_dir", "log1")
    two_ranks.main(*flags, "--log_dir", "log2", cwd=tmp_path)
    first, second = read_log("log1", "hella"), read_log("log2", "hella")
    assert first == second and list(first) == [0, 1]
    assert first[0] == pytest.approx(sum(guesses[i][1] == items[i][2] for i in range(N)) / N, abs=1e-8)


def test_a_model_with_a_short_context_judges_cut_items(items_file, play, tmp_path, monkeypatch, capsys):
    publish(items_file, tmp_path)
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(32, 384, 2, 2, 16, tokenizer="bytes"))
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, "small.pt")
    main(*play, "--init_from", "small.pt", "--max_steps", 1, "--hellaswag_every", 1)
    assert "are longer than 32 tokens" in capsys.readouterr().out
    assert list(read_log("log", "hella")) == [0, 1]


@pytest.mark.slow
def test_evaluations_do_not_touch_training_with_compile_and_two_ranks(items_file, play, tmp_path, two_ranks):
    publish(items_file, tmp_path)
    flags = [*play, "--n_layer", 1, "--compile", "--dropout", 0.1, "--max_steps", 5]
    for every in 0, 2:
        often = [word for name in ("val", "hellaswag", "sample") for word in (f"--{name}_every", every)]
        said = two_ranks.main(*flags, *often, "--log_dir", tmp_path / f"log{every}", cwd=tmp_path)
    texts = [re.findall(rf"rank {rank} sample \d: (.*)", said) for rank in (0, 1)]
    assert len(texts[0]) == len(texts[1]) > 0 and texts[0] != texts[1]
    for stream in "val", "hella":
        assert list(read_log(tmp_path / "log2", stream)) == [0, 2, 4, 5]
        assert read_log(tmp_path / "log0", stream) == {}
    assert read_log(tmp_path / "log2") == read_log(tmp_path / "log0")


@pytest.mark.slow
def test_training_goes_on_without_the_file(play, tmp_path, two_ranks):
    """A warning, once. (The file that is there is broken: what a missing one does depends on the network.)"""
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "hellaswag_val.jsonl").write_text('{"ctx": "cut o')
    said = two_ranks.main(*play, "--max_steps", 2, "--hellaswag_every", 1, cwd=tmp_path)
    assert said.count("warning:") == 1 and "line 1" in said
    assert read_log(tmp_path / "log", "hella") == {} and len(read_log(tmp_path / "log")) == 2


# --------------------------------------------------------------------------------------------------
# Files that are not as they should be


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"ctx": "a", "endi', "JSONDecodeError"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"]}', "KeyError: 'label'"),
        ('{"endings": ["a", "b", "c", "d"], "label": 1}', "KeyError: 'ctx'"),
        ('{"ctx": "", "endings": ["", "", "", ""], "label": 4}', "ValueError: it has 4 endings and label 4"),
        ('{"ctx": "", "endings": ["","","",""], "label": -1}', "ValueError: it has 4 endings and label -1"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": ""}', "ValueError"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": null}', "TypeError"),
        ('{"ctx": 5, "endings": ["a", "b", "c", "d"], "label": 1}', "TypeError"),
        ('{"ctx": "a", "endings": [1, 2, 3, 4], "label": 1}', "TypeError"),
        ('{"ctx": "a", "endings": ["a", "b", "c"], "label": 1}', "ValueError: it has 3 endings and label 1"),
        ('["a"]', "TypeError"),
    ],
)
def test_bad_lines_are_named(items_file, line, reason):
    lines = items_file.read_text().splitlines()
    items_file.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(UserError) as e:
        load(items_file)
    assert str(e.value).startswith(f"{items_file} line 2 can't be read ({reason}")


def test_an_empty_file_of_items_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="empty.jsonl is empty"):
        load(tmp_path / "empty.jsonl")


def test_long_items_lose_the_beginning_of_their_context(hf, items_file, capsys):
    item = json.loads(items_file.read_text().splitlines()[0])
    cut = item | {"ctx": item["ctx"][-(40 - 1 - max(map(len, item["endings"]))) :]}
    assert len(cut["ctx"]) < len(item["ctx"])
    items_file.write_text(json.dumps(item) + "\n" + json.dumps(cut))
    long, short = load(items_file, 40)
    assert long == short
    assert "1 items" in capsys.readouterr().out
    assert get_tokenizer("bytes").decode(load(items_file)[0][0]) == item["ctx"]


def test_items_whose_endings_alone_are_too_long_are_judged_by_their_beginning(hf, items_file):
    items = load(items_file, 8)
    assert max(len(context) + len(ending) for context, endings, _ in items for ending in endings) == 8
    assert len(hellaswag.evaluate(GPT.from_pretrained(hf[1]), items)) == N


def test_a_context_without_a_word_begins_with_the_end_of_text(items_file):
    items_file.write_text(json.dumps({"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}))
    assert load(items_file) == [([256], [[32, 97], [32, 98], [32, 99], [32, 100]], 0)]


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
        monkeypatch.chdir(tmp_path)
        yield server
        server.shutdown()


def test_download_is_whole_or_not_there(server, tmp_path):
    path, body = tmp_path / "hellaswag" / "hellaswag_val.jsonl", b'{"ctx": "..."}\n' * 20_000
    for answer in (200, len(body), body[:100_000]), (404, 3, b"sad"):  # one breaks off
        server.answers = [answer]
        says = "can't be read .*(IncompleteRead|404).* at hellaswag/hellaswag_val.jsonl"
        with pytest.raises(UserError, match=says):
            hellaswag.download("val")
        assert server.answers == [] and not path.exists()
    server.answers = [(200, len(body), body)]
    path.parent.mkdir(exist_ok=True)
    path.with_name(path.name + ".part").write_bytes(body[:1000])  # of an earlier run that was killed
    assert hellaswag.download("val").read_bytes() == body
    assert hellaswag.download("val").read_bytes() == body and server.answers == []  # not fetched again
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_a_network_the_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{free_port()}/{{}}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="val can't be read .*refused"):
        hellaswag.main(["-m", "gpt2"])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# Contamination


class Words:
    """Random texts of a tokenizer, as tokens each of which is a word, and what is found of them in shards."""

    def __init__(self, name):
        self.tokenizer, self.rng = get_tokenizer(name), np.random.default_rng(0)
        self.eot, self.comma = self.tokenizer.eot_token, self.tokenizer.encode_ordinary(",")
        tokens = ((i, self.tokenizer.decode_single_token_bytes(i)) for i in range(self.eot))
        self.words = [i for i, token in tokens if re.search(rb"[0-9A-Za-z\x80-\xff]", token)]

    def draw(self, n):
        return self.rng.choice(self.words, n).tolist()

    def item(self, tokens):
        """An item with these tokens: half of them are the context, the others the right ending."""
        cut = len(tokens) // 2
        return tokens[:cut], [self.draw(9), tokens[cut:], self.draw(9), self.draw(9)], 1

    def find(self, items, *shards):
        """What is found of the items, lists of tokens, in shards."""
        arrays = [np.array(tokens, dtype=np.uint16) for tokens in shards]
        return hellaswag.contamination([self.item(tokens) for tokens in items], arrays, self.tokenizer)

    def find_amid_others(self, pairs):
        """pairs: (tokens of an item, tokens that stand in a shard between random others)."""
        shard = [self.eot]
        for _, tokens in pairs:
            shard += self.draw(self.rng.integers(30, 90)) + tokens + self.draw(20)
        return self.find([item for item, _ in pairs], shard)


@pytest.fixture(params=TOKENIZERS)
def words(request, monkeypatch):
    monkeypatch.setattr(hellaswag, "CHUNK", 50)  # many borders between chunks
    return Words(request.param)


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(words):
    pairs = []
    for _ in range(20):
        pairs.append((x := words.draw(30), x[8:21]))
        pairs.append((x := words.draw(30), x[8:20]))
        pairs.append((x := words.draw(30), x[8:14] + words.draw(1) + x[15:22]))
    assert words.find_amid_others(pairs) == list(range(0, 60, 3))


def test_punctuation_and_case_do_not_count(words):
    upper, lower = (words.tokenizer.encode_ordinary(text) for text in ("A", "a"))
    pairs = []
    for _ in range(20):
        pairs.append((x := words.draw(30), [token for word in x[:13] for token in (word, *words.comma)]))
        x, y = words.draw(10), words.draw(8)
        pairs.append((x[:5] + words.comma + x[5:] + upper + y, x + lower + y))
    pairs.append((words.comma * 20, words.comma * 20))  # no word, so there is nothing to be found
    assert words.find_amid_others(pairs) == list(range(40))


def test_words_are_found_wherever_a_chunk_ends_among_them(words):
    """Thirteen words at every place of the chunks of 50 tokens; what is found is sorted."""
    items = [words.draw(13) for _ in range(50)]
    shard = [words.eot]
    for place, item in enumerate(items):
        shard += words.draw((place - len(shard)) % 50) + item
    assert words.find(items, shard) == list(range(50))
    assert words.find(items[:9], words.draw(5) + items[8] + words.draw(5) + items[1]) == [1, 8]


def test_words_in_two_documents_are_not_in_a_row(words):
    pairs = [(x := words.draw(30), x[8:15] + [words.eot] + x[15:22]) for _ in range(20)]
    assert words.find_amid_others(pairs) == []


def test_an_item_of_fewer_words_is_found_as_a_whole(words):
    pairs = []
    for _ in range(20):
        pairs.append((x := words.draw(8), x))
        pairs.append((x := words.draw(8), x[1:]))
        pairs.append((x := words.draw(3), x + words.comma))
    found = words.find_amid_others(pairs)
    assert found == [i for i in range(60) if i % 3 != 1]


def test_a_text_that_goes_on_in_the_next_shard_is_found(words):
    whole, broken = words.draw(30), words.draw(30)
    first, third = words.draw(200) + whole[2:9], words.draw(90) + broken[6:13]
    assert words.find([whole, broken], first, whole[9:15] + words.draw(300) + broken[:6], third) == [0]


def test_only_the_right_ending_counts(words):
    context, endings = words.draw(20), [words.draw(20) for _ in range(4)]
    shard = np.array(words.draw(100) + endings[3] + words.draw(9), dtype=np.uint16)
    items = [(context, endings, 3), (context, endings, 2)]
    assert hellaswag.contamination(items, [shard], words.tokenizer) == [0]


@pytest.fixture(params=TOKENIZERS)
def overlapping(request, hf, items_file, tmp_path, monkeypatch, capsys):
    """
    Items, of which number 3 is in training shards, 8 is only nearly there and 9 is in the validation shard.
    Gives the name of the tokenizer, the flags that judge a model, and what --contamination printed.
    """
    items = [json.loads(line) for line in items_file.read_text().splitlines()]
    clerk = "Every morning the old clerk walks down to the harbour and counts the boats."
    items[3] |= {"ctx": clerk, "label": 2}
    items[3]["endings"][2] = "Then he writes the number into a book."
    items[8] |= {"ctx": clerk.replace("clerk", "sailor").replace("counts", "greets")}  # too few are the same
    items[9]["ctx"] = held_out = "A heron stood in the shallow water and looked at none of all the people."
    items_file.write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(held_out)
    text = "He said: every morning - the old clerk walks down to the harbour, and counts the boats! "
    (tmp_path / "b.txt").write_text(text + "And so on. Of the other items nothing is here.")
    n = 1 + len(get_tokenizer(request.param).encode_ordinary(held_out))  # the validation shard
    fineweb.main(["--input", "*.txt", "--out", "made", "--shard_size", str(n), "--tokenizer", request.param])
    if request.param == "gpt2":
        save_hugging_face(tmp_path / "hf", "gpt2")
    hellaswag.main(["--contamination", "made", "--data", str(items_file), "--out", "found/items.json"])
    return request.param, ["-m", str(hf[1]), "--data", str(items_file), "-d", "cpu"], capsys.readouterr().out


def test_contamination_of_texts_in_shards_of_fineweb(overlapping):
    """13 letters are less than 13 words: among bytes more than the clerk's item is found."""
    name, _, out = overlapping
    found = json.loads(Path("found/items.json").read_text())["overlapping"]
    assert 3 in found and 9 not in found and (name == "bytes" or found == [3])
    assert f"{len(found)} of {N} items" in out


def test_clean_and_overlapping_items_are_judged_apart(overlapping, hf, items_file, capsys):
    name, model, _ = overlapping
    found = json.loads(Path("found/items.json").read_text())["overlapping"]
    hellaswag.main([*model, "--clean", "found/items.json"])
    lines, items = capsys.readouterr().out.splitlines()[-3:], load(items_file, tokenizer=name)
    guesses = hellaswag.evaluate(GPT.from_pretrained(hf[1]), items)
    right = [guesses[i][1] == items[i][2] for i in range(N)]
    for line, part in zip(lines, (range(N), set(range(N)) - set(found), found)):
        assert f"acc_norm {sum(right[i] for i in part) / len(part):.4f} on {len(part)} items" in line
    with pytest.raises(UserError, match=f"about {N} items of items.jsonl"):
        hellaswag.main([*model, "--clean", "found/items.json", "--limit", "5"])
    record = json.loads(Path("found/items.json").read_text())
    record["overlapping"] = [record["items"]]  # there is no such item
    Path("found/items.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="--clean found/items.json is about"):
        hellaswag.main([*model, "--clean", "found/items.json"])


# --------------------------------------------------------------------------------------------------
# What others say of the same model


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_harness_agrees_item_by_item(name, items_file, tmp_path, monkeypatch):
    """lm-evaluation-harness on the exported model. Its acc is the lowest sum too."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    save_hugging_face(tmp_path / "hf", name)
    model, items = GPT.from_pretrained(tmp_path / "hf"), load(items_file, tokenizer=name)
    model.save_pretrained(tmp_path / "export")
    (tmp_path / "ours.yaml").write_text(f"""
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
        model="hf", model_args=f"pretrained={tmp_path / 'export'},dtype=float32", device="cpu", batch_size=4,
        tasks=["ours"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    ours = hellaswag.evaluate(model, items)
    for sample in results["samples"]["ours"]:
        scores = [response[0] for response in sample["filtered_resps"]]
        assert scores.index(max(scores)) == ours[sample["doc_id"]][0]
    assert len(results["samples"]["ours"]) == N
    assert results["results"]["ours"]["acc,none"] == hellaswag.accuracy(ours, items)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_exported_model_runs_in_a_pipeline(name, tmp_path):
    from transformers import AutoModelForCausalLM, pipeline

    save_hugging_face(tmp_path / "hf", name)
    model, tokenizer = GPT.from_pretrained(tmp_path / "hf"), get_tokenizer(name)
    model.save_pretrained(tmp_path / "export")
    write = pipeline("text-generation", model=str(tmp_path / "export"), device="cpu")
    [theirs] = write("The tide", max_new_tokens=10, do_sample=False)
    idx = torch.tensor([tokenizer.encode_ordinary("The tide")])
    assert theirs["generated_text"] == tokenizer.decode(model.generate(idx, 10, top_k=1)[0].tolist())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    torch.testing.assert_close(again(idx).logits, model(idx)[0], atol=1e-4, rtol=0)
