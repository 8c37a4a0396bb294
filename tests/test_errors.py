"""What goes wrong ends in one line that begins with "error:", and status 2."""

import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, make_tokens, succeed, train

from train_gpt2 import UserError, parse_args


def refused(*flags, **options):
    """The one line of error that the flags end in."""
    done = train(*flags, **options)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--max_stps", "3"], ["--max_stps", "did you mean --max_steps"]),
        (["--B", "two"], ["--B", "two"]),
        (["--B", "0"], ["--B 0", "at least 1"]),
        (["--max_lr", "nan"], ["--max_lr nan"]),
        (["--dropout", "1.5"], ["--dropout 1.5"]),
        (["--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["--model", "gpt5"], ["gpt5", "gpt2-medium"]),
        (["--data", "nowhere"], ["nowhere", "does not exist"]),
        (["--B", "3", "--T", "100", "--total_batch_size", "1000"], ["1000", "900 or 1200"]),
        (["--B", "8", "--T", "128", "--total_batch_size", "128"], ["1024"]),
    ],
)
def test_flags(flags, names, monkeypatch):
    monkeypatch.chdir(__import__("conftest").ROOT)
    with pytest.raises(UserError) as e:
        parse_args(flags)
    assert all(name in str(e.value) for name in names), str(e.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none(shards):
    assert "--device cuda" in refused("--data", shards, *TINY, "--device", "cuda")


@pytest.mark.parametrize(
    "flags, names", [(["--T", "2048", "--B", "1", "--total_batch_size", "2048"], ["2048", "1024"]), (["--n_head", "3"], ["n_head 3"])]
)
def test_model_that_cannot_be(shards, tmp_path, flags, names):
    line = refused("--data", shards, *TINY, *flags, "--log_dir", tmp_path / "log")
    assert all(name in line for name in names)
    assert not (tmp_path / "log").exists()


def test_data_that_cannot_be(shards, tmp_path):
    flags = [*TINY, "--max_steps", 30, "--log_dir", tmp_path / "log", "--data"]
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(*flags, tmp_path / "empty")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") * 1000)
    assert "latin.txt is not UTF-8" in refused(*flags, tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("too short")
    assert "short.txt" in refused(*flags, tmp_path / "short.txt")
    np.save(shards / "edufineweb_train_000004.npy", make_tokens(200, 1).astype(np.int64))
    assert "000004.npy is 1-D int64" in refused(*flags, shards)


def test_a_bad_shard_met_in_mid_run_loses_nothing(shards, tmp_path):
    """Ids are checked when a shard is read: what was trained until then is saved, and goes on with a good shard."""
    bad = shards / "edufineweb_train_000003.npy"
    good = bad.read_bytes()
    np.save(bad, np.full(150, 60000, dtype=np.uint16))
    flags = ["--data", shards, *TINY, "--no-shuffle", "--max_steps", 10, "--log_dir", tmp_path / "log"]
    line = refused(*flags)
    assert str(bad) in line and "60000" in line
    assert torch.load(tmp_path / "log" / "latest.pt", weights_only=True)["step"] == 4  # 32 good rows, 8 a step
    bad.write_bytes(good)
    succeed(*flags, "--resume")


def test_resume(shards, tmp_path):
    log_dir = tmp_path / "log"
    flags = ["--data", shards, *TINY, "--max_steps", 2, "--log_dir", log_dir]
    assert "latest.pt" in refused(*flags, "--resume")
    succeed(*flags)
    before = (log_dir / "log.txt").read_text()
    assert "n_embd 16" in refused(*flags, "--resume", "--n_embd", 32)
    assert "step 2" in refused(*flags, "--resume", "--max_steps", 1)
    shutil.copy(log_dir / "model_00002.pt", log_dir / "latest.pt")
    assert "weights only" in refused(*flags, "--resume")
    (log_dir / "latest.pt").write_bytes((log_dir / "model_00002.pt").read_bytes()[:5000])
    assert "latest.pt is damaged" in refused(*flags, "--resume")
    assert (log_dir / "log.txt").read_text() == before


def test_init_from(shards, tmp_path):
    assert "nowhere.pt" in refused("--data", shards, "--init_from", "nowhere.pt", "--T", 16)
    (tmp_path / "x.pt").write_text("not a checkpoint")
    assert "x.pt" in refused("--data", shards, "--init_from", tmp_path / "x.pt", "--T", 16)


def test_log_dir_that_cannot_be_made(shards, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("--data", shards, *TINY, "--log_dir", tmp_path / "file" / "log")


def test_under_torchrun_one_rank_speaks(shards):
    done = train("--data", shards, *TINY, "--B", "3", ranks=2)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: --total_batch_size 128 is not a multiple of B * T * ranks = 3 * 16 * 2 = 96: 96 or 192 would be"
    ]
