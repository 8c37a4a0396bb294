"""What goes wrong ends in one line that names the thing and the mend, and in status 2."""

import shutil
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, load, main, make_tokens, read_log, train

import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, GPTConfig


def wrong_flags(capsys, *flags):
    """The line in which argparse says what is wrong with the flags."""
    with pytest.raises(SystemExit) as e:
        main(*flags)
    usage, line = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and usage.startswith("usage: ") and ": error: " in line
    return line


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--max_stps 3", ["--max_stps"]),
        ("--max_step 3", ["--max_step"]),  # no abbreviations: they would change meaning with a new flag
        ("--B two", ["--B", "two"]),
        ("--B -1", ["--B -1", "at least 0"]),
        ("--max_lr nan", ["--max_lr nan"]),
        ("--max_lr inf", ["--max_lr inf"]),
        ("--warmup_steps -1", ["--warmup_steps -1", "at least 0"]),
        ("--dropout 1.5", ["--dropout 1.5"]),
        ("--temperature 0", ["--temperature 0"]),
        ("--val_tokens 100", ["--val_tokens 100", "at least 128"]),
        ("--device tpu", ["--device", "tpu", "cuda"]),
        ("--model gpt5", ["gpt5", "gpt2-medium"]),
        ("--data=", ["--data", "is empty"]),
        ("--prompt=", ["--prompt", "is empty"]),
        ("--T 100 --total_batch_size 1050", ["--total_batch_size 1050", "T * ranks, 100"]),
        ("--T 128 --total_batch_size 64", ["--total_batch_size 64", "T * ranks, 128"]),
        ("--max_lr 1e-5 --min_lr 1e-4", ["--min_lr 0.0001", "--max_lr 1e-05"]),
        ("--resume --init_from gpt2", ["--init_from", "not allowed with argument --resume"]),
    ],
)
def test_flags(flags, names, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    line = wrong_flags(capsys, *flags.split())
    assert all(name in line for name in names), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none(shards, capsys):
    assert "--device cuda" in wrong_flags(capsys, "--data", shards, *TINY, "--device", "cuda")


@pytest.mark.parametrize("has_units, dtype", [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_is_the_default_only_on_a_gpu_that_computes_with_it(shards, monkeypatch, has_units, dtype):
    def supported(including_emulation=True):
        return has_units or including_emulation

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    args, _ = train_gpt2.parse_args(["--data", str(shards)])
    assert (args.device, args.dtype, args.compile) == ("cuda", dtype, True)
    args, _ = train_gpt2.parse_args(["--data", str(shards), "--device", "cpu"])
    assert (args.device, args.dtype, args.compile) == ("cpu", "float32", False)


def test_each_rank_of_a_node_needs_a_gpu_of_its_own(shards, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for ranks, device in ("3", "cuda"), ("4", "cpu"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert train_gpt2.parse_args(["--data", str(shards)])[0].device == device


def refused(*flags):
    with pytest.raises(UserError) as e:
        main(*flags)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_model_that_cannot_be(shards, tmp_path):
    flags = ["--data", shards, *TINY, "--log_dir", tmp_path / "log"]
    short = GPT(GPTConfig(8, 384, 2, 2, 16, tokenizer="bytes"))
    torch.save({"model": short.state_dict(), "config": vars(short.config)}, tmp_path / "short.pt")
    assert "n_head 3" in refused(*flags, "--n_head", 3)
    assert not (tmp_path / "log").exists()
    assert "--T 16 is longer than the model's context: at most 8" in refused(*flags, "--init_from", tmp_path / "short.pt")
    assert not list((tmp_path / "log").glob("*.pt"))


def test_data_that_cannot_be(lecture_shards, tmp_path):
    flags = [*TINY, "--max_steps", 30, "--log_dir", tmp_path / "log", "--data"]
    assert "nowhere can't be read (No such file or directory)" in refused(*flags, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty needs shards" in refused(*flags, tmp_path / "empty")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") * 1000)
    assert "latin.txt can't be read" in refused(*flags, tmp_path / "latin.txt", "--model", "tiny")
    (tmp_path / "short.txt").write_text("too short")
    assert "short.txt" in refused(*flags, tmp_path / "short.txt")
    np.save(lecture_shards / "edufineweb_train_000004.npy", make_tokens(200, 1).astype(np.int64))
    line = refused(*flags, lecture_shards)
    assert "000004.npy" in line and "1-D int64" in line


def test_a_bad_shard_met_in_mid_run_is_named(shards, tmp_path):
    """Ids are checked when a row is read. The last checkpoint goes on with a good shard."""
    bad = shards / "edufineweb_train_000003.npy"
    good = bad.read_bytes()
    np.save(bad, np.full(150, 60000, dtype=np.uint16))
    flags = ["--data", shards, *TINY, "--no-shuffle", "--max_steps", 10, "--checkpoint_every", 3, "--log_dir", tmp_path / "log"]
    line = refused(*flags)
    assert str(bad) in line and "60000" in line
    assert list(read_log(tmp_path / "log")) == [0, 1, 2, 3] and load(tmp_path / "log" / "latest.pt")["step"] == 3
    bad.write_bytes(good)
    main("--resume", "--log_dir", tmp_path / "log")
    assert list(read_log(tmp_path / "log")) == list(range(10))


@pytest.fixture
def run(shards, tmp_path):
    """A run of 2 steps, and the flags that resume it."""
    flags = ["--data", shards, *TINY, "--max_steps", 2, "--log_dir", tmp_path / "log"]
    main(*flags)
    return tmp_path / "log", ["--resume", "--max_steps", 4, "--log_dir", tmp_path / "log"]


@pytest.mark.parametrize(
    "flag, value",
    [("T", 32), ("total_batch_size", 256), ("n_embd", 32), ("n_layer", 3), ("optimizer", "muon"), ("seed", 1)],
)
def test_what_a_resumed_run_cannot_change(run, flag, value):
    log_dir, resume = run
    before = (log_dir / "log.txt").read_text()
    line = refused(*resume, f"--{flag}", value)
    assert f"{flag} was" in line or f"has {flag}" in line
    with pytest.raises(UserError, match="shuffle was True"):
        main(*resume, "--no-shuffle")
    with pytest.raises(UserError, match="model was gpt2"):
        main(*resume, "--model", "gpt2-xl")
    assert (log_dir / "log.txt").read_text() == before


def test_a_resumed_run_needs_the_shards_that_it_had(lecture_shards, tmp_path):
    main("--data", lecture_shards, *TINY, "--max_steps", 2, "--log_dir", tmp_path / "log")
    np.save(lecture_shards / "edufineweb_train_000002.npy", make_tokens(216, 2))  # 16 tokens more: other rows
    assert "shards was" in refused("--resume", "--max_steps", 4, "--log_dir", tmp_path / "log")


def test_a_resumed_run_keeps_its_rate_below_the_maximum(shards, tmp_path, capsys):
    flags = ["--data", shards, *TINY, "--max_steps", 2, "--min_lr", 1e-3, "--log_dir", tmp_path / "log"]
    main(*flags)
    assert "--min_lr 0.001" in wrong_flags(capsys, "--resume", "--max_lr", 1e-4, "--log_dir", tmp_path / "log")


def test_latest_pt_that_cannot_be_resumed(run):
    log_dir, resume = run
    good = (log_dir / "latest.pt").read_bytes()
    (log_dir / "latest.pt").unlink()
    assert "latest.pt can't be read (No such file or directory): without it a run can't go on" in refused(*resume)
    shutil.copy(log_dir / "model_00002.pt", log_dir / "latest.pt")
    assert "latest.pt can't be read (KeyError: 'args'): a new run can begin with its weights" in refused(*resume)
    (log_dir / "latest.pt").write_bytes(good[: len(good) // 2])
    assert "latest.pt can't be read" in refused(*resume)


def test_moments_of_a_wrong_shape_are_refused(run):
    """They crashed the process in the fused AdamW."""
    log_dir, resume = run
    latest = load(log_dir / "latest.pt")
    latest["optimizers"]["transformer.wte.weight"]["exp_avg"] = torch.zeros(3)
    torch.save(latest, log_dir / "latest.pt")
    line = refused(*resume)
    assert "latest.pt" in line and "(384, 16)" in line


def test_a_run_that_is_further_than_max_steps(run, capsys):
    log_dir, _ = run
    assert "--max_steps 1 is out of range: it must be at least 2" in wrong_flags(capsys, "--resume", "--log_dir", log_dir, "--max_steps", 1)


def test_init_from(shards, tmp_path):
    flags = ["--data", shards, *TINY, "--init_from"]
    assert "nowhere.pt can't be read" in refused(*flags, "nowhere.pt")
    (tmp_path / "x.pt").write_text("not a checkpoint")
    assert "x.pt can't be read" in refused(*flags, tmp_path / "x.pt")


@pytest.mark.slow
def test_log_dir_that_cannot_be_made(shards, tmp_path):
    (tmp_path / "file").write_text("")
    done = train("--data", shards, *TINY, "--log_dir", tmp_path / "file" / "log")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and "file" in line]


def test_out_of_memory_names_half_of_the_micro_batch(shards, tmp_path, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_gpt2, "training_step", fail)
    line = refused("--data", shards, *TINY, "--B", 8, "--max_steps", 1, "--log_dir", tmp_path / "log")
    assert line == "out of memory with --B 8: --B 4 gives the same curve"


@pytest.mark.slow
def test_under_torchrun_one_rank_speaks(shards):
    for flags, line in (
        (["--T", "24"], "train_gpt2.py: error: --total_batch_size 128 is no multiple of T * ranks, 48"),
        (["--n_head", "3"], "error: n_embd 16 is not divisible by n_head 3: change one"),
    ):
        done = train("--data", shards, *TINY, *flags, ranks=2)
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "train_gpt2.py: error: "))]
        assert lines == [line], done.stderr


@pytest.mark.slow
def test_a_fault_that_one_rank_meets_ends_both(shards, tmp_path):
    """The third row of the first step is rank 1's. Its line is printed, and no rank waits for the other."""
    tokens = np.load(shards / "edufineweb_train_000001.npy")
    tokens[2 * 16 + 5] = 60000
    np.save(shards / "edufineweb_train_000001.npy", tokens)
    began = time.monotonic()
    done = train("--data", shards, *TINY, "--no-shuffle", "--max_steps", 3, "--log_dir", tmp_path / "log", ranks=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "has token 60000" in lines[0]
    assert time.monotonic() - began < 60  # it would wait for minutes
