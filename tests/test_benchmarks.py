"""The benchmarks compute what they say; how fast is for them to tell."""

import importlib
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch.nn.functional as F
from conftest import ROOT, needs_bpe


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *flags) calls main() of a benchmark in this process, and returns what it prints."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)  # put back later
    monkeypatch.setattr("os.sched_setaffinity", lambda *args: None)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        importlib.import_module(f"benchmarks.{name}").main()
        return capsys.readouterr().out

    return call


def test_every_rung_of_the_ladder_has_the_same_loss(run):
    """One of each kind but compiled ones, which take long. The 47 padding columns add a thousandth."""
    small = "--device cpu --n_layer 1 --n_head 2 --n_embd 32 --T 64 --B 2 --steps 1".split()
    rungs = "float32", "bfloat16 autocast", "not compiled"
    results = [json.loads(run("speed_ladder", *small, "--rung", rung)) for rung in rungs]
    assert all(len(result["ms"]) == 1 and result["MB"] > 0 for result in results)
    losses = [result["loss"] for result in results]
    assert losses == pytest.approx([losses[0]] * len(rungs), abs=2e-3)


def test_the_ladder_goes_on_without_a_rung_that_fails(run, monkeypatch):
    """Compiled rungs stand for those that do not fit."""
    ladder = importlib.import_module("benchmarks.speed_ladder")
    sizes = SimpleNamespace(device="cpu", n_layer=1, n_head=2, n_embd=32, T=64, B=2, steps=2)

    def start_process(args, rung, B=2):
        if rung in ("torch.compile", "flash attention", "vocabulary 50,304"):
            return None
        if rung == "matmul":
            return ladder.measure_matmul(sizes)
        options = ladder.rungs("cpu")["not compiled"]
        return ladder.profile(sizes, options) if rung == "profile" else ladder.measure(sizes, options)

    monkeypatch.setattr(ladder, "start_process", start_process)
    flags = "--device cpu --n_layer 1 --n_head 2 --n_embd 32 --T 64 --B 2 --rounds 1 --sweep 1".split()
    said = run("speed_ladder", *flags)
    assert "float32" in said and "torch.compile" not in said and "compiled, B=1" in said
    shares = re.findall(r"(\w+) (-?\d+\.\d)%", said.splitlines()[-1])
    assert {"products", "AdamW"} <= {word for word, _ in shares}
    assert sum(float(share) for _, share in shares) == pytest.approx(100, abs=1)


def test_the_ladder_knows_the_flops_of_a_token_and_of_a_gpu():
    """GPT-2 124M by hand: 6 for each of 123,689,472 weights (50,304 tokens), and for attention
    12 * 12 layers * 768 * 1024."""
    ladder = importlib.import_module("benchmarks.speed_ladder")
    assert ladder.flops_per_token(124_475_904, 12, 768, 1024) == 6 * 123_689_472 + 113_246_208
    peaks = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A10G": 70e12, "L4": 121e12}
    for name, peak in peaks.items():
        assert next(flops for word, flops in ladder.PEAK_FLOPS.items() if word in f"NVIDIA {name}") == peak


def test_a_process_that_fails_measures_nothing(monkeypatch, capsys):
    ladder = importlib.import_module("benchmarks.speed_ladder")
    monkeypatch.setattr(sys, "argv", ["-c", "raise SystemExit('out of memory')"])
    assert ladder.start_process(SimpleNamespace(), rung="float32") is None
    assert "out of memory" in capsys.readouterr().err


def test_a_loss_that_is_only_touched_is_not_reached():
    reached = importlib.import_module("benchmarks.learning_rate").reached
    steps, losses = np.array([0, 10, 20, 30]), np.array([5.0, 3.9, 4.2, 3.8])
    assert reached(steps, losses, 4.0) == 30  # 3.9 at step 10 did not last
    assert reached(steps, losses, 4.2) == 10
    assert reached(steps, losses, 3.7) is None and reached(steps, losses, 5.0) == 0


@pytest.mark.slow
def test_learning_rates_are_compared(run, tmp_path):
    flags = ["--data", ROOT / "input.txt", "--tokenizer", "bytes", "--lrs", 2e-3, "--seeds", 1, "--steps", 10]
    said = run("learning_rate", *flags, "--out", tmp_path / "chart.png").splitlines()
    finals = {tuple(line.split()[:2]): float(line.split()[2]) for line in said[2:4]}
    assert finals.keys() == {("adamw", "2.0e-03"), ("muon", "2.0e-03")}
    assert all(loss < 4.5 for loss in finals.values())  # 5.5 at random
    assert said[2].split()[-1] == "100%"  # of its own steps
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_grown_model_is_compared_with_one_from_scratch(run, tmp_path):
    flags = ["--data", ROOT / "input.txt", "--tokenizer", "bytes", "--layers", 1, 2, "--seeds", 1]
    said = run("warm_start", *flags, "--steps", 10, "--out", tmp_path / "chart.png").splitlines()
    losses = {line[:24].strip(): [float(word) for word in line[24:].split()] for line in said[2:6]}
    before, (start, *_) = losses["1 layers"][1], losses["2 layers, grown"]
    assert abs(start - before) < 0.2 < losses["2 layers, from scratch"][0] - start
    # The control begins where the small model ended.
    assert abs(losses["1 layers, trained on"][0] - before) < 0.05
    assert "final loss of the one from scratch, for good: after" in said[6]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_hellaswag_guesses_as_the_plain_way_does(run):
    """The benchmark itself compares all guesses."""
    small = "--n_layer 1 --items 2 --rounds 1 --scan 100000 --tokenizer bytes".split()
    said = run("hellaswag", "--device", "cpu", *small)
    assert "float32" in said and "--contamination" in said


@pytest.mark.slow
@needs_bpe
def test_fineweb_makes_the_shards_of_the_plain_way(run, monkeypatch):
    """The benchmark itself compares all shards."""
    monkeypatch.setattr("benchmarks.tokenizing.SHARD_SIZE", 100_000)
    said = run("tokenizing", "--megabytes", 1, "--rounds", 1)
    assert "the same from both" in said and "medians" in said


def test_the_loader_is_measured_over_an_epoch(run):
    said = run("loader", "--shards", 2, "--shard_size", 300_000)
    assert "million tokens a second" in said and "MB added" in said
