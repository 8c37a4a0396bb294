"""The training script: ranks, resume, kill, signals, compile, logs and checkpoints."""

import importlib
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, RUN, TINY, command, environment, free_port, interrupt, load, main
from conftest import read_log, start, train, write_bin
from torch._dynamo.utils import counters

import train_gpt2
from train_gpt2 import GPT, GPTConfig, UserError


def same_weights(a, b):
    a, b = load(a)["model"], load(b)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def reference(shards, tmp_path):
    """A run of 20 steps without a stop, saved every 4 steps, with dropout."""
    flags = ["--data", shards, *RUN, "--dropout", "0.1", "--checkpoint_every", "4"]
    main(*flags, "--log_dir", tmp_path / "whole")
    return flags, tmp_path / "whole"


# --------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.slow
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_losses_do_not_depend_on_ranks_or_micro_batch(shards, tmp_path, two_ranks, dtype, atol):
    flags = ("--data", shards, *RUN, "--dtype", dtype, "--checkpoint_every", 0)
    for B in 2, 8:
        main(*flags, "--B", B, "--log_dir", tmp_path / f"1-{B}")
    two_ranks.main(*flags, "--B", 2, "--log_dir", tmp_path / "2-2")
    expected = {stream: read_log(tmp_path / "1-2", stream) for stream in ("train", "val", "norm")}
    assert len(expected["train"]) == 20 and list(expected["val"]) == [0, 5, 10, 15, 20]
    for other in "1-8", "2-2":
        for stream, values in expected.items():
            tolerance = atol * (10 if stream == "norm" else 1)
            assert read_log(tmp_path / other, stream) == pytest.approx(values, abs=tolerance)


@pytest.mark.slow
def test_two_nodes_equal_one_process(shards, tmp_path):
    """Two torchrun agents on this machine: each has a local rank 0, and together they are ranks 0 and 1."""
    flags = ["--data", shards, *RUN, "--checkpoint_every", 0]
    main(*flags, "--log_dir", tmp_path / "one")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    agent += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
    agent += [str(ROOT / "train_gpt2.py"), *map(str, flags), "--log_dir", str(tmp_path / "two")]
    options = {"env": environment(), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    nodes = [subprocess.Popen(agent, **options) for _ in range(2)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted(output.count("step    19 | loss") for output in outputs) == [0, 1]  # one rank prints
    assert read_log(tmp_path / "two") == pytest.approx(read_log(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_muon_learns_on_any_number_of_ranks_compiled_and_resumed(shards, tmp_path, two_ranks):
    flags = ["--data", shards, *RUN, "--optimizer", "muon", "--checkpoint_every", 10, "--log_dir"]
    main(*flags, tmp_path / "one")
    two_ranks.main(*flags, tmp_path / "two", "--compile")
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert two == pytest.approx(one, abs=1e-3)  # Newton-Schulz is computed in bfloat16
    assert one[19] < one[0] - 1
    kinds = [tuple(state) for state in load(tmp_path / "one" / "latest.pt")["optimizers"].values()]
    assert kinds.count(("step", "exp_avg", "exp_avg_sq")) == 20  # 2 embeddings and 18 vectors
    assert kinds.count(("momentum_buffer",)) == 8  # 4 matrices in each of 2 layers
    with interrupt("training_step", 12, signal.SIGTERM):
        main(*flags, tmp_path / "stopped")
    main("--resume", "--log_dir", tmp_path / "stopped")
    assert read_log(tmp_path / "stopped") == one


@pytest.mark.slow
def test_dropout_is_the_same_on_any_number_of_ranks(reference, tmp_path, two_ranks):
    flags, whole = reference
    two_ranks.main(*flags, "--log_dir", tmp_path / "two")
    assert read_log(tmp_path / "two") == pytest.approx(read_log(whole), abs=1e-5)


def test_the_micro_batch_is_the_largest_divisor_of_a_steps_rows(shards, tmp_path, capsys):
    main("--data", shards, *TINY, "--B", 3, "--max_steps", 1, "--log_dir", tmp_path / "log")  # 8 rows a step
    assert "2 x 16 tokens at a time" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.slow
def test_kill_and_resume_is_bit_for_bit_the_whole_run(reference, tmp_path):
    flags, whole = reference
    process = start(*flags, "--log_dir", tmp_path / "killed", until="step    14 | loss")
    process.kill()
    process.wait()
    assert load(tmp_path / "killed" / "latest.pt")["step"] in (12, 16)
    main("--log_dir", tmp_path / "killed", "--resume")
    assert (tmp_path / "killed" / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert same_weights(whole / "model_00020.pt", tmp_path / "killed" / "model_00020.pt")
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_resumes_exactly(reference, tmp_path, number, capsys):
    flags, whole = reference
    with interrupt("training_step", 6, number):
        main(*flags, "--log_dir", tmp_path / "stopped")
    assert "stopped after 7 steps; --resume goes on" in capsys.readouterr().out
    assert load(tmp_path / "stopped" / "latest.pt")["step"] == 7
    assert list(read_log(tmp_path / "stopped")) == list(range(7))
    main("--log_dir", tmp_path / "stopped", "--resume")
    assert (tmp_path / "stopped" / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert same_weights(whole / "latest.pt", tmp_path / "stopped" / "latest.pt")


@pytest.mark.parametrize("name, call", [("print_samples", 0), ("collect_state", 1), ("log", 12)])
def test_a_signal_at_any_moment_loses_nothing(reference, tmp_path, name, call):
    """While it samples, saves or writes the log, the run resumes to the same end. Validation: see below."""
    flags, whole = reference
    with interrupt(name, call, signal.SIGINT):
        main(*flags, "--sample_every", 5, "--log_dir", tmp_path / "stopped")
    assert 0 < load(tmp_path / "stopped" / "latest.pt")["step"] < 20
    main("--log_dir", tmp_path / "stopped", "--resume")
    assert (tmp_path / "stopped" / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert same_weights(whole / "latest.pt", tmp_path / "stopped" / "latest.pt")


def test_a_signal_ends_validation_early_and_resumes_exactly(reference, tmp_path, monkeypatch):
    flags, whole = reference
    batches, next_batch = [], train_gpt2.DataLoaderLite.next_batch

    def counted(self):
        batches.append(next_batch(self))
        return batches[-1]

    monkeypatch.setattr(train_gpt2.DataLoaderLite, "next_batch", counted)
    with interrupt("validate", 2, signal.SIGINT):  # the third one: after those of steps 0 and 5
        main(*flags, "--log_dir", tmp_path / "stopped")
    # Two validations of 9 rows in 5 batches, 10 steps of 4 batches, and none of the third validation.
    assert len(batches) == 2 * 5 + 10 * 4
    saved = load(tmp_path / "stopped" / "latest.pt")
    assert (saved["step"], saved["val_loss"]) == (10, None)
    main("--log_dir", tmp_path / "stopped", "--resume")
    assert (tmp_path / "stopped" / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert same_weights(whole / "latest.pt", tmp_path / "stopped" / "latest.pt")


@pytest.mark.slow
def test_the_second_signal_ends_the_process_at_once(shards, tmp_path):
    """The first one is noticed within the step that a later one ends. One within a second may be the same."""
    code = """
import os, signal, sys, time
import train_gpt2
def endless(*args):
    for seconds in 0, 0.5, 0.7:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)
        print("still here", flush=True)
    time.sleep(60)
train_gpt2.training_step = endless
train_gpt2.main(sys.argv[1:])
"""
    flags = ["--data", shards, *RUN, "--log_dir", tmp_path / "log"]
    command = [sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT and done.stdout.count("still here") == 2
    assert "Traceback" not in done.stderr


def test_a_signal_that_comes_twice_within_a_second_saves_the_run(shards, tmp_path, monkeypatch):
    """Slurm signals all processes, and torchrun then sends its ranks what it got."""
    step = train_gpt2.training_step

    def signalled(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train_gpt2, "training_step", signalled)
    main("--data", shards, *RUN, "--log_dir", tmp_path / "log")
    assert load(tmp_path / "log" / "latest.pt")["step"] == 1


@pytest.mark.slow
def test_signal_under_torchrun_and_resume_on_another_number_of_ranks(reference, tmp_path):
    flags, whole = reference
    process = start(*flags, "--log_dir", tmp_path / "stopped", until="step     6 | loss", ranks=2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "--resume goes on" in output
    saved = load(tmp_path / "stopped" / "latest.pt")["step"]
    assert list(read_log(tmp_path / "stopped")) == list(range(saved))
    main("--log_dir", tmp_path / "stopped", "--resume")  # on one rank
    for stream in "train", "val", "norm":
        assert read_log(tmp_path / "stopped", stream) == pytest.approx(read_log(whole, stream), abs=1e-4)


def test_the_last_model_is_written_after_a_stop_in_the_last_evaluation(shards, tmp_path):
    log_dir = tmp_path / "log"
    with interrupt("validate", 4, signal.SIGINT):  # after those of steps 0, 5, 10, 15
        main("--data", shards, *RUN, "--log_dir", log_dir)
    assert load(log_dir / "latest.pt")["step"] == 20 and not (log_dir / "model_00020.pt").exists()
    main("--resume", "--log_dir", log_dir)
    assert load(log_dir / "model_00020.pt")["val_loss"] == pytest.approx(read_log(log_dir, "val")[20])


def test_resume_remembers_the_flags_and_the_data(shards, tmp_path, monkeypatch, capsys):
    """Also where a directory of shards has appeared since, which a new run would take."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("The tide is what it is. " * 2000)
    main(*TINY, "--max_steps", 8, "--checkpoint_every", 4, "--val_every", 0)
    Path("edu_fineweb10B").symlink_to(shards)
    Path("log", "model_00008.pt").unlink()
    main("--resume", "--max_steps", 10)
    assert "data: input.txt" in capsys.readouterr().out
    record = json.loads(Path("log", "config.json").read_text())["args"]
    assert (record["n_embd"], record["data"], record["max_steps"]) == (16, "input.txt", 10)
    assert load("log/model_00010.pt")["step"] == 10


def test_flags_count_over_what_a_checkpoint_remembers(reference, monkeypatch):
    """A constant lower rate from here on, and another weight decay. What was trained stays as it is."""
    flags, whole = reference
    before, made, configure = read_log(whole, "lr"), [], GPT.configure_optimizers

    def configure_optimizers(*args):
        made.extend(configure(*args))
        return made

    monkeypatch.setattr(GPT, "configure_optimizers", configure_optimizers)
    changes = ["--max_lr", 1e-4, "--min_lr", 1e-4, "--max_steps", 23, "--weight_decay", 0.3]
    main("--resume", "--log_dir", whole, *changes)
    assert read_log(whole, "lr") == before | {20: 1e-4, 21: 1e-4, 22: 1e-4}
    [optimizer] = made
    settings = [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
    assert settings == [(1e-4, 0.3, (0.9, 0.95)), (1e-4, 0.0, (0.9, 0.95))]


def test_a_line_of_the_log_that_a_crash_cut_off_is_dropped(reference):
    """What is left of it may look like the line of an early step."""
    flags, whole = reference
    before = (whole / "log.txt").read_text()
    with open(whole / "log.txt", "a") as f:
        f.write("1")  # of 19 train ...
    main("--resume", "--log_dir", whole)
    assert (whole / "log.txt").read_text() == before


def test_resume_without_a_flag_takes_the_directory_log(reference, tmp_path, monkeypatch):
    """Also if the run had another name when it was saved."""
    monkeypatch.chdir(tmp_path)
    flags, whole = reference
    whole.rename("log")
    main("--resume", "--max_steps", 21)
    assert list(read_log("log")) == list(range(21)) and not whole.exists()


def test_weights_and_optimizer_are_of_one_step(reference, monkeypatch):
    """latest.pt is opened once, so that it can't be replaced between two readings."""
    flags, whole = reference
    opened, torch_load = [], torch.load

    def counted(path, **options):
        opened.append(path)
        return torch_load(path, **options)

    monkeypatch.setattr(torch, "load", counted)
    main("--resume", "--log_dir", whole, "--max_steps", 21)
    assert opened == [whole / "latest.pt"]


# --------------------------------------------------------------------------------------------------
# Settings


def test_the_defaults_are_those_of_the_reproduction():
    """10 billion tokens in steps of 2**19, 375 million of them warmup, and GPT-3's rate and decay."""
    args = train_gpt2.build_parser().parse_args([])
    assert (args.n_layer, args.n_head, args.n_embd, args.dropout) == (12, 12, 768, 0.0)
    assert (args.B, args.T, args.total_batch_size) == (0, 1024, 524288)
    assert (args.max_steps, args.warmup_steps) == (19073, 715)
    assert (args.max_lr, args.min_lr, args.weight_decay, args.grad_clip) == (6e-4, None, 0.1, 1.0)
    assert (args.val_every, args.hellaswag_every, args.sample_every) == (250, 250, 250)
    assert args.checkpoint_every == 5000
    assert (args.val_tokens, args.num_samples, args.max_new_tokens, args.top_k) == (20 * 524288, 5, 22, 50)
    assert (args.temperature, args.prompt) == (1.0, "Hello, I'm a language model,")
    assert (args.optimizer, args.shuffle) == ("adamw", True)


@pytest.mark.parametrize(
    "name, shape, max_lr, parameters",
    [("gpt2", (12, 12, 768), 6e-4, 124_439_808), ("gpt2-medium", (24, 16, 1024), 3e-4, 354_823_168),
     ("gpt2-large", (36, 20, 1280), 2.5e-4, 774_030_080), ("gpt2-xl", (48, 25, 1600), 2e-4, 1_557_611_200),
     ("gpt-580m", (18, 12, 1536), 2.5e-4, 588_738_048), ("gpt-760m", (24, 12, 1536), 2e-4, 758_727_168),
     ("tiny", (4, 4, 128), 2e-3, 7_242_624)],
)  # fmt: skip
def test_presets_have_the_sizes_of_the_releases_and_rates_of_gpt3(shards, name, shape, max_lr, parameters):
    """The parameters of ours are by hand: a layer has 12 * n_embd**2 + 13 * n_embd."""
    args, _ = train_gpt2.parse_args(["--data", str(shards), "--model", name])
    assert (args.n_layer, args.n_head, args.n_embd) == shape
    assert (args.max_lr, args.min_lr) == (max_lr, max_lr / 10)
    with torch.device("meta"):
        model = GPT(GPTConfig(args.T, 50257, *shape))
    assert sum(p.numel() for p in model.parameters()) == parameters


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


def default_micro_batch(monkeypatch, memory, n_params=124e6, T=1024):
    """--B of a model on a GPU with so many bytes free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(memory), 2**50))
    args = SimpleNamespace(B=0, T=T, total_batch_size=2**19, device="cuda")
    return train_gpt2.micro_batch_size(args, n_params, 50304)


def test_the_default_micro_batch_is_what_fits_into_the_gpu(monkeypatch):
    """A row of 1,024 tokens needs 10 bytes for each parameter. The table is that of benchmarks/README.md."""
    gigabytes = 8, 12, 16, 24, 40, 80, 141
    table = {
        124e6: [4, 8, 8, 16, 32, 64, 64],
        355e6: [2, 2, 4, 4, 8, 16, 32],
        774e6: [1, 1, 2, 2, 4, 8, 16],
        1558e6: [1, 1, 1, 1, 2, 4, 8],
    }
    for n_params, rows in table.items():
        assert [default_micro_batch(monkeypatch, gb * 1e9, n_params) for gb in gigabytes] == rows
    assert default_micro_batch(monkeypatch, 80e9, T=2048) == 32
    # In a small model it is the logits that fill the memory: 16 bytes for each of 1,024 x 50,304.
    assert default_micro_batch(monkeypatch, 8e9, n_params=1e6) == 8


def test_the_ranks_agree_on_the_smallest_micro_batch(monkeypatch):
    def all_reduce(rows, op):
        assert op == torch.distributed.ReduceOp.MIN
        rows.clamp_(max=9.5)  # what fits on the other rank

    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert default_micro_batch(monkeypatch, 80e9) == 8


# --------------------------------------------------------------------------------------------------
# In one process, any number of times


def test_main_leaves_nothing_behind_in_the_process(shards, tmp_path, monkeypatch):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers], torch.get_float32_matmul_precision()
    flags = ["--data", shards, *TINY, "--max_steps", 2, "--dropout", 0.1, "--log_dir", tmp_path / "log"]
    main(*flags)
    main("--resume", "--max_steps", 3, "--log_dir", tmp_path / "log")
    with pytest.raises(UserError):
        main(*flags, "--T", 1000, "--total_batch_size", 2000, "--val_tokens", 2000)
    assert ([signal.getsignal(number) for number in numbers], torch.get_float32_matmul_precision()) == before
    assert torch.get_default_device() == torch.device("cpu") and not torch.distributed.is_initialized()


def test_evaluation_does_not_touch_training(shards, tmp_path):
    """With and without validation, samples and checkpoints: the same weights, bit for bit."""
    common = ["--data", shards, *RUN, "--dropout", "0.1"]
    main(*common, "--log_dir", tmp_path / "busy", "--sample_every", 3, "--checkpoint_every", 7)
    main(*common, "--log_dir", tmp_path / "quiet", "--val_every", 0)
    assert same_weights(tmp_path / "busy" / "latest.pt", tmp_path / "quiet" / "latest.pt")
    assert load(tmp_path / "quiet" / "model_00020.pt")["val_loss"] is None


# --------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.slow
def test_compiled_run_with_every_evaluation(shards, tmp_path):
    """Validation, samples and checkpoints while compiled: one graph, compiled once, and the losses of a run
    that is not compiled."""
    flags = ["--data", shards, *RUN, "--sample_every", "5", "--checkpoint_every", "4", "--log_dir"]
    main(*flags, tmp_path / "eager")
    torch._dynamo.reset()
    counters.clear()
    main(*flags, tmp_path / "compiled", "--compile")
    assert not counters["graph_break"] and not counters["recompiles"]
    assert counters["stats"]["unique_graphs"] == 1
    names = [set(load(tmp_path / name / "model_00020.pt")["model"]) for name in ("eager", "compiled")]
    assert names[0] == names[1]
    for stream in "train", "val":
        eager, compiled = (read_log(tmp_path / name, stream) for name in ("eager", "compiled"))
        assert compiled == pytest.approx(eager, abs=1e-4)


@pytest.mark.slow
def test_compiled_on_two_ranks(shards, tmp_path, two_ranks):
    flags = ["--data", shards, *RUN, "--max_steps", "6"]
    main(*flags, "--log_dir", tmp_path / "eager")
    two_ranks.main(*flags, "--log_dir", tmp_path / "compiled", "--compile")
    assert read_log(tmp_path / "compiled") == pytest.approx(read_log(tmp_path / "eager"), abs=1e-4)
    transformer = GPT.from_checkpoint(tmp_path / "eager" / "latest.pt").transformer
    names = [f"transformer.{name}" for name, _ in transformer.named_parameters()]
    assert set(load(tmp_path / "compiled" / "model_00006.pt")["model"]) == {*names, "lm_head.weight"}


# --------------------------------------------------------------------------------------------------
# What is printed and written


def test_shards_of_the_lectures_script_train_as_they_are(lecture_shards, tmp_path):
    """Just the arrays: their tokens are GPT-2's, and the model gets 50,304 of them."""
    main("--data", lecture_shards, *TINY, "--max_steps", 1, "--log_dir", tmp_path / "log")
    assert read_log(tmp_path / "log")[0] == pytest.approx(math.log(50304), abs=0.1)
    config = load(tmp_path / "log" / "latest.pt")["config"]
    assert (config["vocab_size"], config["tokenizer"]) == (50304, "gpt2")


def test_shards_of_llm_c_train_to_the_same_losses(lecture_shards, tmp_path):
    (tmp_path / "llm_c").mkdir()
    for path in lecture_shards.iterdir():
        write_bin(tmp_path / "llm_c" / f"{path.stem}.bin", np.load(path))
    for data in lecture_shards, tmp_path / "llm_c":
        log_dir = tmp_path / f"log_{data.name}"
        main("--data", data, *TINY, "--max_steps", 2, "--val_tokens", 150, "--log_dir", log_dir)
    for stream in "train", "val":
        assert read_log(tmp_path / "log_llm_c", stream) == read_log(tmp_path / "log_lecture_shards", stream)


def test_the_loader_knows_the_end_of_text_and_the_ids_of_the_shards(shards, tmp_path, monkeypatch):
    """Those of meta.json: 257 ids, though the embedding has 384 rows, and 256 between documents."""
    flags = ["--data", shards, *TINY, "--max_steps", 3, "--no-shuffle", "--log_dir", tmp_path / "log"]
    loaders = []
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "train", lambda args, model, loader, *others: loaders.append(loader))
        main(*flags)
    assert loaders[0].eot == 256
    tokens = np.load(shards / "edufineweb_train_000001.npy")
    tokens[5] = 257
    np.save(shards / "edufineweb_train_000001.npy", tokens)
    with pytest.raises(UserError, match="has token 257 >= 257"):
        main(*flags)


def test_what_a_checkpoint_holds(reference):
    flags, whole = reference
    model, latest = load(whole / "model_00020.pt"), load(whole / "latest.pt")
    assert set(model) == {"model", "config", "step", "val_loss"}
    assert set(latest) == {*model, "optimizers", "args"} and model["step"] == latest["step"] == 20
    assert model["config"] == {
        "block_size": 16, "vocab_size": 384, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1,
        "tokenizer": "bytes"}  # fmt: skip
    assert model["val_loss"] == pytest.approx(read_log(whole, "val")[20])


def test_config_json_records_the_run(reference):
    record = json.loads((reference[1] / "config.json").read_text())
    assert record["args"]["max_lr"] == 1e-2 and record["args"]["B"] == 2 and record["world_size"] == 1
    assert record["torch"] == torch.__version__ and record["tokens_per_epoch"] == 41 * 16


def test_one_line_a_step_and_samples(shards, tmp_path, capsys):
    main("--data", shards, *RUN, "--max_steps", 3, "--sample_every", 2, "--log_dir", tmp_path / "log")
    out = capsys.readouterr().out
    line = r"step +\d+ \| loss \d+\.\d+ \| lr \S+ \| norm \S+ \| [\d,]+ tok/s \| eta \d:\d\d:\d\d"
    assert len(re.findall(line, out)) == 3
    assert out.count("sample 4: Hello, I'm a language model,") == 2  # steps 2 and 3, the last


def test_print_every_leaves_out_printed_lines_only(shards, tmp_path, capsys):
    """log.txt has all steps."""
    for every, steps in (3, [0, 3, 6]), (0, []):
        log_dir = tmp_path / f"log{every}"
        main("--data", shards, *TINY, "--max_steps", 8, "--print_every", every, "--log_dir", log_dir)
        printed = re.findall(r"step +(\d+) \| loss", capsys.readouterr().out)
        assert [int(step) for step in printed] == steps and list(read_log(log_dir)) == list(range(8))


def test_no_line_of_a_run_is_wider_than_a_terminal(tmp_path, monkeypatch, capsys):
    """The README's first command, shortened and without samples."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text((ROOT / "input.txt").read_text()[:20_000])
    flags = ["--n_layer", 1, "--n_embd", 16, "--sample_every", 0, "--max_steps", 12, "--val_tokens", 128]
    main(*flags, "--print_every", 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["train_gpt2", "fineweb", "hellaswag"])
def test_help_fits_into_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 20 and max(map(len, lines)) <= 80


def test_tokens_a_second_and_time_left(shards, tmp_path, monkeypatch, capsys):
    """128 tokens in a step of 2 seconds."""
    now, step = [0.0], train_gpt2.training_step

    def timed(*args):
        now[0] += 2
        return step(*args)

    monkeypatch.setattr(train_gpt2, "training_step", timed)
    monkeypatch.setattr(train_gpt2.time, "perf_counter", lambda: now[0])
    main("--data", shards, *TINY, "--max_steps", 3, "--log_dir", tmp_path / "log")
    lines = [line.split(" | ")[-2:] for line in capsys.readouterr().out.splitlines() if "| loss" in line]
    assert lines == [["64 tok/s", "eta 0:00:04"], ["64 tok/s", "eta 0:00:02"], ["64 tok/s", "eta 0:00:00"]]


# With a temperature t, the share of `a` is e**(2/t) / (1 + e**(2/t)).
@pytest.mark.parametrize("temperature, share", [(1.0, 0.881), (0.5, 0.982), (4.0, 0.622)])
def test_what_the_flags_of_samples_do(tmp_path, capsys, temperature, share):
    """The model writes an `a` with odds of e**2 to 1 against a `b`, and nothing else."""
    model = GPT(GPTConfig(64, 257, 1, 1, 16, tokenizer="bytes"))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():  # the final hidden state is all ones, whatever the text
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[97], model.transformer.wte.weight[98] = 32 / 16, 30 / 16
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, tmp_path / "letters.pt")
    flags = ["--data", ROOT / "input.txt", "--init_from", tmp_path / "letters.pt", "--T", 64]
    flags += ["--device", "cpu", "--max_steps", 0, "--val_every", 0, "--sample_every", 1]
    flags += ["--prompt", "AB", "--num_samples", 40, "--max_new_tokens", 50, "--top_k", 2]
    main(*flags, "--temperature", temperature)
    lines = re.findall(r"rank 0 sample (\d+): (.*)", capsys.readouterr().out)
    assert [int(number) for number, _ in lines] == list(range(40))
    texts = [text.removeprefix("AB") for _, text in lines]
    assert {len(text) for text in texts} == {50} and {*"".join(texts)} <= {"a", "b"}
    assert "".join(texts).count("a") / 2000 == pytest.approx(share, abs=0.025)
    main(*flags, "--top_k", 1)
    assert capsys.readouterr().out.count("AB" + "a" * 50) == 40


def test_validation_is_the_mean_over_the_promised_tokens_without_dropout(shards, tmp_path):
    main("--data", shards, *RUN, "--max_steps", 2, "--dropout", 0.3, "--log_dir", tmp_path / "log")
    model = GPT.from_checkpoint(tmp_path / "log" / "model_00002.pt")
    tokens = torch.from_numpy(np.load(shards / "edufineweb_val_000000.npy").astype(np.int64))
    rows = 150 // 16
    x, y = tokens[: rows * 16].view(rows, 16), tokens[1 : rows * 16 + 1].view(rows, 16)
    with torch.no_grad():
        expected = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
    assert read_log(tmp_path / "log", "val")[2] == pytest.approx(expected, abs=1e-5)


def test_a_new_run_needs_a_directory_of_its_own(shards, tmp_path, monkeypatch):
    """Nothing of the run before is lost. The current directory is as good as any."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data", shards, *RUN, "--max_steps", 1, "--log_dir", "."]
    main(*flags)
    before = {path.name: path.read_bytes() for path in Path(".").iterdir() if path.is_file()}
    assert {"log.txt", "config.json", "latest.pt", "model_00001.pt"} <= before.keys()
    says = r"\. has a run: --resume goes on with it, another --log_dir begins anew"
    with pytest.raises(UserError, match=says):
        main(*flags, "--seed", 1)
    assert {path.name: path.read_bytes() for path in Path(".").iterdir() if path.is_file()} == before


def test_two_runs_never_share_a_directory(shards, tmp_path):
    flags = ["--data", shards, *TINY, "--max_steps", 1, "--log_dir", tmp_path / "log"]
    main(*flags)
    before = (tmp_path / "log" / "log.txt").read_text()
    resume = ["--resume", "--max_steps", 2, "--log_dir", tmp_path / "log"]
    with train_gpt2.locked(tmp_path / "log"), pytest.raises(UserError, match=f"{tmp_path}/log is in use"):
        main(*resume)
    assert (tmp_path / "log" / "log.txt").read_text() == before
    main(*resume)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["| head -n 1", "| cat > /dev/full", ">&-"])
def test_output_that_nobody_takes_does_not_end_a_run(shards, tmp_path, output):
    flags = ["--data", shards, *RUN, "--sample_every", 5, "--log_dir", tmp_path / "log"]
    line = f"{shlex.join(command(*flags))} {output}"
    subprocess.run(line, shell=True, env=environment(), capture_output=True, timeout=100)
    assert load(tmp_path / "log" / "latest.pt")["step"] == 20


@pytest.mark.slow
def test_a_full_disk_in_mid_run_is_a_warning_and_at_the_end_an_error(shards, tmp_path):
    """A limit on the size of files stands for the full disk."""
    flags = ["--data", shards, *RUN, "--log_dir", tmp_path / "log", "--checkpoint_every", 10]
    done = train(*flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stdout.count("model_00010.pt can't be written") == 1 and "training goes on" in done.stdout
    assert "error: " in done.stderr and "model_00020.pt can't be written" in done.stderr
    assert len(read_log(tmp_path / "log")) == 20
    left = {path.name for path in (tmp_path / "log").iterdir()}
    assert left == {".lock", "config.json", "log.txt"}


def test_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(shards, tmp_path):
    flags = ["--data", shards, *RUN, "--checkpoint_every", 1, "--warmup_steps", 0, "--max_lr", 1e9]
    with pytest.raises(UserError, match=r"step \d+: loss .*--max_lr") as e:
        main(*flags, "--weight_decay", 0, "--log_dir", tmp_path / "log")
    saved = load(tmp_path / "log" / "latest.pt")
    assert saved["step"] <= int(re.search(r"step (\d+)", str(e.value))[1])
    assert all(t.isfinite().all() for t in saved["model"].values())


@pytest.mark.slow
def test_training_on_text_learns(tmp_path, capsys):
    """The README's first command, shortened. The loss falls from that of equal probabilities to less than 2.8
    nats a byte."""
    main("--data", ROOT / "input.txt", "--max_steps", 60, "--val_tokens", 2048, "--log_dir", tmp_path / "log")
    losses = read_log(tmp_path / "log")
    assert abs(losses[0] - math.log(384)) < 0.2 and losses[59] < 2.8
    assert "sample 1: Tamsin Vane:" in capsys.readouterr().out  # a name from the play, which is continued


# --------------------------------------------------------------------------------------------------
# Weights to begin with


def test_init_from_takes_a_checkpoint_and_a_hugging_face_directory(tmp_path, capsys):
    """--max_steps 0 looks at a model, and writes nothing."""
    flags = ["--data", ROOT / "input.txt", *TINY, "--val_tokens", 500, "--log_dir"]
    main(*flags, tmp_path / "first", "--max_steps", 20)
    GPT.from_checkpoint(tmp_path / "first" / "model_00020.pt").save_pretrained(tmp_path / "hf")
    last = read_log(tmp_path / "first", "val")[20]
    capsys.readouterr()
    losses = []
    for path in (tmp_path / "first" / "model_00020.pt", tmp_path / "hf"):
        main(*flags, tmp_path / "none", "--max_steps", 0, "--init_from", path)
        losses.append(float(re.search(r"val (\S+)", capsys.readouterr().out)[1]))
    assert losses[0] == pytest.approx(last, abs=1e-4)
    assert last - 0.2 < losses[1] < last  # without the padding rows the softmax has fewer wrong tokens
    assert not (tmp_path / "none").exists()
