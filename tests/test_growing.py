"""Growing models: more layers, sharded optimizer state, own tokenizers, and the whole recipe at toy scale."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, RUN, TINY, environment, load, main, read_log, start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import fineweb
import train_gpt2
from fineweb import Data, UserError, get_tokenizer
from train_gpt2 import GPT, GPTConfig, create_model


def test_layers_of_a_grown_model_are_those_of_the_recipe(capsys):
    """18 layers, as in gpt-580m, become 24, as in gpt-760m."""
    small = GPT(GPTConfig(8, 16, 18, 2, 4))
    state = {name: w.clone() for name, w in small.state_dict().items()}
    args = SimpleNamespace(T=8, n_layer=24, n_head=None, n_embd=4, dropout=0.1, init_from="small")
    grown = create_model(args, small, Data({}, {}))
    layers = "0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12, 13, 14, 15, 15, 16, 17"
    assert layers in capsys.readouterr().out
    assert (grown.config.n_layer, grown.config.dropout) == (24, 0.1)
    assert torch.equal(grown.transformer.wpe.weight, state["transformer.wpe.weight"])
    for new, old in (1, 0), (2, 1), (8, 6), (23, 17):
        for name, p in grown.transformer.h[new].named_parameters():
            assert torch.equal(p, state[f"transformer.h.{old}.{name}"])
    assert len({p.data_ptr() for p in grown.parameters()}) == len(list(grown.parameters())) == 4 + 24 * 12


@pytest.mark.slow
def test_growing_a_trained_model_keeps_what_it_learned(tmp_path, capsys):
    """Some seconds of training, then a loss well below chance, and not far above the small model's."""
    flags = ["--data", ROOT / "input.txt", "--device", "cpu", "--sample_every", 0, "--val_tokens", 2048]
    flags += ["--B", 8, "--total_batch_size", 1024, "--n_embd", 64]
    steps = ["--max_steps", 60, "--max_lr", 3e-3, "--val_every", 60]
    main(*flags, "--n_layer", 3, *steps, "--log_dir", tmp_path / "small")
    more = ["--init_from", tmp_path / "small" / "latest.pt", "--log_dir", tmp_path / "grown"]
    main(*flags, *more, "--n_layer", 4, "--max_steps", 1)
    assert "grown from 3 to 4 layers, which begin as 0, 0, 1, 2" in capsys.readouterr().out
    small, after = read_log(tmp_path / "small", "val"), read_log(tmp_path / "grown", "val")[0]
    assert small[60] < small[0] - 2.5 and small[60] < after < small[60] + 0.3 * (small[0] - small[60])
    refused = {"--n_embd 32": "n_embd 64", "--n_layer 2": "n_layer 3", "--model gpt2": "n_head 4"}
    for wrong, says in refused.items():
        with pytest.raises(UserError, match=says):
            main(*flags, *more, *wrong.split(), "--max_steps", 0)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, atol", [("adamw", 1e-5), ("muon", 1e-3)])
def test_sharded_optimizer_is_the_same_optimizer(shards, tmp_path, two_ranks, optimizer, atol):
    """Losses as without; its checkpoint serves any number of ranks, with the flag or without."""
    flags = ["--data", shards, *RUN, "--optimizer", optimizer, "--checkpoint_every", 10, "--log_dir"]
    main(*flags, tmp_path / "plain")
    two_ranks.main(*flags, tmp_path / "zero", "--zero")
    plain = read_log(tmp_path / "plain")
    assert read_log(tmp_path / "zero") == pytest.approx(plain, abs=atol)
    ours, theirs = (load(tmp_path / name / "latest.pt")["optimizers"] for name in ("plain", "zero"))
    assert {name: s.keys() for name, s in ours.items()} == {name: s.keys() for name, s in theirs.items()}
    assert len(theirs) == 28 and all(theirs.values())
    two_ranks.main(*flags, tmp_path / "1", "--zero", stop=13)
    two_ranks.main(*flags, tmp_path / "2", "--no-zero", stop=15)
    assert [load(tmp_path / name / "latest.pt")["step"] for name in ("1", "2")] == [13, 15]
    main("--resume", "--log_dir", tmp_path / "1", "--no-zero")
    two_ranks.main("--resume", "--log_dir", tmp_path / "2", "--zero")
    for name in "1", "2":
        assert read_log(tmp_path / name) == pytest.approx(plain, abs=atol)


COUNT = """
import sys, train_gpt2
collect_state = train_gpt2.collect_state
def counted(model, optimizers, owners):
    moments = [t for o in optimizers for state in o.state.values() for t in state.values() if t.dim() > 0]
    with open(f"count_{train_gpt2.RANK}", "a") as f:
        print(sum(t.numel() for t in moments), file=f)
    return collect_state(model, optimizers, owners)
train_gpt2.collect_state = counted
train_gpt2.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_each_rank_keeps_its_share_of_the_state(shards, tmp_path):
    """Half of AdamW's two moments on each of two ranks, to within the largest tensor; after loading too."""
    (tmp_path / "count.py").write_text(COUNT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    new = [*TINY, "--data", str(shards), "--zero", "--max_steps", "1", "--n_layer", "6", "--n_embd", "32"]
    env = environment(PYTHONPATH=str(ROOT))
    for flags in new, ["--resume", "--max_steps", "2"]:
        command = [*launcher, "count.py", "--log_dir", "log", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    model = GPT.from_checkpoint(tmp_path / "log" / "latest.pt")
    total = 2 * sum(p.numel() for p in model.parameters())
    counts = [[int(n) for n in (tmp_path / f"count_{rank}").read_text().split()] for rank in (0, 1)]
    (one, one_resumed), (two, two_resumed) = counts
    assert one + two == total and abs(one - two) < 0.2 * total
    assert (one_resumed, two_resumed) == (one, two)


def test_a_sharded_run_that_was_stopped_before_its_first_step_can_be_resumed(monkeypatch):
    """There is no state yet: each parameter has an empty one in the checkpoint."""
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda entry, owner: None)
    model = GPT(GPTConfig(8, 16, 1, 1, 8))
    optimizers = model.configure_optimizers(1e-3, 0.1)
    states = train_gpt2.collect_state(model, optimizers, dict.fromkeys(model.parameters(), 0))
    assert list(states.values()) == [{}] * 16
    train_gpt2.restore_state(model, optimizers, {"optimizers": states}, "latest.pt")
    assert not optimizers[0].state


# --------------------------------------------------------------------------------------------------
# Own tokenizers, and the whole recipe at toy scale


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The play's speeches, and a second corpus of Python; and a tokenizer of Hugging Face trained on both."""
    directory = tmp_path_factory.mktemp("corpora")
    speeches = (ROOT / "input.txt").read_text().split("\n\n")
    code = [path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))]
    pieces = [text[i : i + 500] for text in code for i in range(0, len(text), 500)]
    for name, texts in ("play", speeches), ("code", pieces):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(speeches + pieces, trainer)
    bpe.add_tokens(["    ", "        "])
    (directory / "bpe").mkdir()
    bpe.save(str(directory / "bpe" / "tokenizer.json"))
    return directory


def tokenize(corpora, tokenizer, out, shard_size):
    """Make shards of the play."""
    flags = ["--tokenizer", tokenizer, "--out", out, "--shard_size", shard_size]
    fineweb.main(["--input", f"{corpora}/play.jsonl", *map(str, flags)])


def harness(model, directory, monkeypatch):
    """What lm-evaluation-harness says of local files of a few items in the formats of four tasks:
    {task: {metric: value}}."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(directory / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lines = [line for line in (ROOT / "input.txt").read_text().splitlines() if len(line.split()) > 6][:24]
    endings = ["went home.", "sang, for the tide.", "is the harbour of Merrow.", "fell"]
    question = {"activity_label": "Tide", "ctx_b": "the clerk", "endings": endings}
    items = {
        "lambada/lambada_openai.yaml": [{"text": line} for line in lines],
        "piqa/piqa.yaml": [
            {"goal": lines[i], "sol1": lines[i + 1], "sol2": lines[i + 2], "label": i % 2} for i in range(22)
        ],
        "hellaswag/hellaswag.yaml": [
            question | {"ctx_a": line, "label": str(i % 4)} for i, line in enumerate(lines)
        ],
        "pile_10k/pile_10k.yaml": [{"text": "\n".join(lines[i : i + 6])} for i in range(4)],
    }  # fmt: skip
    tasks = directory / "tasks"
    tasks.mkdir()
    for path, rows in items.items():
        name = Path(path).stem
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {split: str(tasks / f"{name}.jsonl") for split in ("train", "validation", "test")}
        original = Path(lm_eval.__file__).parent / "tasks" / path
        (tasks / f"{name}.yaml").write_text(
            f"include: {original}\ntask: toy_{name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
        )
    results = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model},dtype=float32", device="cpu", batch_size=4,
        tasks=[f"toy_{Path(path).stem}" for path in items], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    return results["results"]


@pytest.mark.slow
def test_the_recipe_from_documents_to_the_harness(corpora, tmp_path, monkeypatch, capsys):
    """A mixture, 3 layers, 4 layers with dropout and --zero, kill, resume at a lower rate, export."""
    tokens, log_dir, grown = tmp_path / "tokens", tmp_path / "small", tmp_path / "grown"
    mix = ["--mix", f"{corpora}/play.jsonl:1.0", f"{corpora}/code.jsonl:0.25"]
    fineweb.main([*mix, "--tokenizer", f"{corpora}/bpe", "--out", str(tokens), "--shard_size", "8000"])
    meta = json.loads((tokens / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("tokenizer.json", 1002, 0)

    flags = ["--data", tokens, "--device", "cpu", "--n_embd", 64, "--n_head", 2, "--warmup_steps", 5]
    flags += ["--T", 128, "--B", 4, "--total_batch_size", 512]
    flags += ["--val_every", 20, "--val_tokens", 4096, "--hellaswag_every", 0, "--sample_every", 0]
    more = ["--model", "tiny", "--n_layer", 3, "--max_lr", 1e-2, "--max_steps", 160, "--checkpoint_every", 40]
    main(*flags, *more, "--log_dir", log_dir)
    small = read_log(log_dir, "val")
    assert small[0] == pytest.approx(math.log(1024), abs=0.2) and small[160] < small[0] - 1.2

    more = ["--init_from", log_dir / "model_00160.pt", "--n_layer", 4, "--dropout", 0.1, "--zero"]
    more += ["--max_lr", 2e-3, "--max_steps", 40, "--checkpoint_every", 10, "--log_dir", grown]
    process = start(*flags, *more, until="step    23 | loss", ranks=2)
    subprocess.run(["pkill", "-KILL", "-f", str(grown)])  # torchrun and both ranks
    process.communicate()
    assert load(grown / "latest.pt")["step"] >= 20 and load(grown / "latest.pt")["config"]["n_layer"] == 4
    main("--resume", "--max_lr", 5e-4, "--max_steps", 60, "--sample_every", 60, "--log_dir", grown)
    assert "sample 4: Hello, I'm a language model," in capsys.readouterr().out
    val = read_log(grown, "val")
    assert small[0] - 1 > val[0] > val[60] and list(read_log(grown, "lr")) == list(range(60))

    model = GPT.from_checkpoint(grown / "model_00060.pt")
    model.save_pretrained(tmp_path / "hf")
    theirs, text = AutoTokenizer.from_pretrained(tmp_path / "hf"), "The clerk    went\n\tdown to the tide."
    assert theirs(text)["input_ids"] == get_tokenizer(str(tokens / "tokenizer.json")).encode_ordinary(text)
    assert GPT.from_pretrained(tmp_path / "hf").config.vocab_size == 1002 and theirs.eos_token_id == 0
    results = harness(tmp_path / "hf", tmp_path, monkeypatch)
    assert 0 <= results["toy_piqa"]["acc,none"] <= 1 and 0 <= results["toy_hellaswag"]["acc_norm,none"] <= 1

    def nats(ids, first):  # loss of all tokens from the `first` on, added up
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0][0, first - 1 :, :1002]
        return F.cross_entropy(logits, torch.tensor(ids[first:]), reduction="sum").item()

    def encode(text):
        return theirs(text)["input_ids"]

    files = (tmp_path / "tasks" / f"{name}.jsonl" for name in ("lambada_openai", "pile_10k"))
    lambada, pile = ([json.loads(line)["text"] for line in open(file)] for file in files)
    words = [nats(encode(text), len(encode(text.rsplit(" ", 1)[0]))) for text in lambada]
    perplexity = math.exp(sum(words) / len(words))
    assert results["toy_lambada_openai"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-3)
    bits = sum(nats([0, *encode(text)], 1) for text in pile) / math.log(2)
    n_bytes = sum(len(text.encode()) for text in pile)
    assert results["toy_pile_10k"]["bits_per_byte,none"] == pytest.approx(bits / n_bytes, rel=1e-3)


def test_weights_and_data_of_different_tokenizers_are_refused(corpora, tmp_path):
    """A tokenizer.json at another place may be the same one."""
    bpe = corpora / "bpe" / "tokenizer.json"
    config = GPTConfig(64, 1024, 1, 2, 16, tokenizer=str(bpe))
    torch.save({"model": GPT(config).state_dict(), "config": vars(config)}, tmp_path / "model.pt")
    tokenize(corpora, bpe, tmp_path / "same", 40_000)
    flags = ["--init_from", tmp_path / "model.pt", *TINY, "--n_layer", 1, "--max_steps", 0]
    main("--data", tmp_path / "same", *flags)
    with pytest.raises(UserError, match=f"tokenizer {bpe}, .*input.txt has bytes"):
        main("--data", ROOT / "input.txt", *flags, "--tokenizer", "bytes")


def test_a_tokenizer_that_was_moved_is_given_by_the_flag_or_by_the_shards(corpora, tmp_path, capsys):
    """A checkpoint remembers where its tokenizer.json was."""
    file = tmp_path / "own.json"
    file.write_text((corpora / "bpe" / "tokenizer.json").read_text())
    text = ["--data", ROOT / "input.txt"]
    flags = [*TINY, "--val_tokens", 640, "--checkpoint_every", 1, "--log_dir", tmp_path / "log"]
    main(*text, *flags, "--tokenizer", file, "--max_steps", 1)
    file.rename(tmp_path / "moved.json")
    begin = ["--init_from", tmp_path / "log" / "latest.pt", *TINY, "--val_tokens", 640, "--max_steps", 0]
    with pytest.raises(UserError, match="own.json can't be read"):
        main(*text, *begin)
    main(*text, *begin, "--tokenizer", tmp_path / "moved.json")
    tokenize(corpora, tmp_path / "moved.json", tmp_path / "shards", 40_000)
    main("--data", tmp_path / "shards", *begin)
    main("--resume", "--log_dir", tmp_path / "log", "--tokenizer", tmp_path / "moved.json", "--max_steps", 2)
    assert load(tmp_path / "log" / "latest.pt")["config"]["tokenizer"] == str(tmp_path / "moved.json")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_export_trains_on_with_its_tokenizer(corpora, tmp_path, kind):
    """On shards and on text. The tokenizer.json has the layout of older files, each merge a string."""
    name = kind
    if kind == "bpe":
        file = json.loads((corpora / "bpe" / "tokenizer.json").read_text())
        file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
        name = str(tmp_path / "tokenizer.json")
        Path(name).write_text(json.dumps(file))
    shards = tmp_path / "shards"
    tokenize(corpora, name, shards, 20_000)
    flags = [*TINY, "--T", 32, "--val_tokens", 4096, "--log_dir"]
    main("--data", shards, *flags, tmp_path / "first", "--max_steps", 40)
    model = GPT.from_checkpoint(tmp_path / "first" / "model_00040.pt")
    model.save_pretrained(tmp_path / "hf")
    text, ours = (ROOT / "fineweb.py").read_text(), get_tokenizer(name)
    for data in shards, ROOT / "input.txt":
        log_dir = tmp_path / f"second_{data.name}"
        more = ["--init_from", tmp_path / "hf", "--max_steps", 2, "--max_lr", 1e-3]
        main("--data", data, *more, *flags, log_dir)
        config = GPT.from_checkpoint(log_dir / "model_00002.pt").config
        tokenizer = get_tokenizer(config.tokenizer)
        assert config.vocab_size == tokenizer.n_vocab == ours.n_vocab
        assert tokenizer.encode_ordinary(text) == ours.encode_ordinary(text)
        before, after = read_log(tmp_path / "first", "val"), read_log(log_dir, "val")
        assert before[40] < before[0] - 1
        assert after[0] == pytest.approx(before[40], abs=0.3)  # so the ids mean the same
