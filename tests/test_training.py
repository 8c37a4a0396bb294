"""The script as a person runs it: any number of ranks, resume, kill, signals, compile, logs and checkpoints."""

import json
import math
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, environment, free_port, load, read_log, start, succeed, train

from train_gpt2 import GPT

RUN = [*TINY, "--max_steps", "20", "--val_every", "5", "--val_tokens", "150"]  # 20 steps of 8 rows: four epochs of 41


def close(a, b, atol):
    assert a.keys() == b.keys()
    return all(abs(a[step] - b[step]) <= atol for step in a)


def same_weights(a, b):
    a, b = load(a)["model"], load(b)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def reference(shards, tmp_path):
    """A run of 20 steps without a break, saved every 4 steps, with dropout."""
    flags = ["--data", shards, *RUN, "--dropout", "0.1", "--checkpoint_every", "4"]
    succeed(*flags, "--log_dir", tmp_path / "whole")
    return flags, tmp_path / "whole"


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_losses_do_not_depend_on_ranks_or_micro_batch(shards, tmp_path, dtype, atol):
    for ranks, B in (1, 2), (2, 2), (2, 4), (1, 8):
        flags = ("--data", shards, *RUN, "--dtype", dtype, "--B", B, "--checkpoint_every", 0)
        succeed(*flags, "--log_dir", tmp_path / f"{ranks}-{B}", ranks=ranks)
    one = tmp_path / "1-2"
    assert len(read_log(one)) == 20 and list(read_log(one, "val")) == [0, 5, 10, 15, 20]
    for other in "2-2", "2-4", "1-8":
        for stream in "train", "val":
            assert close(read_log(one, stream), read_log(tmp_path / other, stream), atol), (other, stream)


def test_two_nodes_equal_one_process(shards, tmp_path):
    """Two torchrun agents on this machine: each has a local rank 0, and together they are ranks 0 and 1."""
    flags = ["--data", shards, *RUN, "--checkpoint_every", 0]
    succeed(*flags, "--log_dir", tmp_path / "one")
    endpoint = f"127.0.0.1:{free_port()}"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    agent += [f"--rdzv_endpoint={endpoint}", "--rdzv_id=test", str(ROOT / "train_gpt2.py"), *map(str, flags)]
    nodes = [
        subprocess.Popen([*agent, "--log_dir", str(tmp_path / "two")], env=environment(), text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for _ in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted(output.count("step    19 | loss") for output in outputs) == [0, 1]  # one rank prints
    assert close(read_log(tmp_path / "one"), read_log(tmp_path / "two"), 1e-5)


def test_dropout_is_the_same_on_any_number_of_ranks(reference, tmp_path):
    flags, whole = reference
    succeed(*flags, "--log_dir", tmp_path / "two", ranks=2)
    assert close(read_log(whole), read_log(tmp_path / "two"), 1e-5)


def test_kill_and_resume_is_bit_for_bit_the_whole_run(reference, tmp_path):
    flags, whole = reference
    process = start(*flags, "--log_dir", tmp_path / "killed", until="step    14 | loss")
    process.kill()
    process.wait()
    assert load(tmp_path / "killed" / "latest.pt")["step"] in (12, 16)
    succeed(*flags, "--log_dir", tmp_path / "killed", "--resume")
    assert (tmp_path / "killed" / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert same_weights(whole / "model_00020.pt", tmp_path / "killed" / "model_00020.pt")
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_resumes_exactly(reference, tmp_path, number):
    flags, whole = reference
    process = start(*flags, "--log_dir", tmp_path / "stopped", until="step     6 | loss")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output and "--resume goes on" in output
    saved = load(tmp_path / "stopped" / "latest.pt")["step"]
    assert list(read_log(tmp_path / "stopped")) == list(range(saved))
    succeed(*flags, "--log_dir", tmp_path / "stopped", "--resume")
    assert (tmp_path / "stopped" / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert same_weights(whole / "latest.pt", tmp_path / "stopped" / "latest.pt")


def test_signal_under_torchrun_and_resume_on_another_number_of_ranks(reference, tmp_path):
    flags, whole = reference
    process = start(*flags, "--log_dir", tmp_path / "stopped", until="step     6 | loss", ranks=2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "--resume goes on" in output
    saved = load(tmp_path / "stopped" / "latest.pt")["step"]
    assert list(read_log(tmp_path / "stopped")) == list(range(saved))
    succeed(*flags, "--log_dir", tmp_path / "stopped", "--resume")  # on one rank
    for stream in "train", "val", "norm":
        assert close(read_log(whole, stream), read_log(tmp_path / "stopped", stream), 1e-4)


def test_evaluation_does_not_touch_training(shards, tmp_path):
    """With and without validation, samples and checkpoints: the same weights, bit for bit."""
    common = ["--data", shards, *RUN, "--dropout", "0.1"]
    succeed(*common, "--log_dir", tmp_path / "busy", "--sample_every", 3, "--checkpoint_every", 7)
    succeed(*common, "--log_dir", tmp_path / "quiet", "--val_every", 0)
    assert same_weights(tmp_path / "busy" / "latest.pt", tmp_path / "quiet" / "latest.pt")
    assert load(tmp_path / "quiet" / "model_00020.pt")["val_loss"] is None


def test_compiled_run_with_every_evaluation(reference, tmp_path):
    """Validation, samples and checkpoints while compiled: no recompilation, no prefixes, the eager run's losses."""
    flags, whole = reference
    flags = [*flags, "--dropout", "0", "--sample_every", "5", "--log_dir"]
    succeed(*flags, tmp_path / "eager")
    done = succeed(*flags, tmp_path / "compiled", "--compile", env={"TORCH_LOGS": "recompiles"})
    assert "ecompiling" not in done.stdout + done.stderr
    assert load(whole / "model_00020.pt")["model"].keys() == load(tmp_path / "compiled" / "model_00020.pt")["model"].keys()
    for stream in "train", "val":
        assert close(read_log(tmp_path / "eager", stream), read_log(tmp_path / "compiled", stream), 1e-4)


def test_compiled_on_two_ranks(shards, tmp_path):
    flags = ["--data", shards, *RUN, "--max_steps", "6"]
    succeed(*flags, "--log_dir", tmp_path / "eager")
    succeed(*flags, "--log_dir", tmp_path / "compiled", "--compile", ranks=2)
    assert close(read_log(tmp_path / "eager"), read_log(tmp_path / "compiled"), 1e-4)
    names = [f"transformer.{name}" for name, _ in GPT.from_checkpoint(tmp_path / "eager" / "latest.pt").transformer.named_parameters()]
    assert set(load(tmp_path / "compiled" / "model_00006.pt")["model"]) == {*names, "lm_head.weight"}


def test_checkpoint_record_and_printed_lines(reference):
    flags, whole = reference
    checkpoint = load(whole / "model_00020.pt")
    assert {"model", "config", "step", "val_loss"} <= checkpoint.keys() and checkpoint["step"] == 20
    assert checkpoint["val_loss"] == pytest.approx(read_log(whole, "val")[20])
    assert GPT.from_checkpoint(whole / "model_00020.pt").config.n_embd == 16
    record = json.loads((whole / "config.json").read_text())
    assert record["args"]["max_lr"] == 1e-2 and record["args"]["B"] == 2 and record["command"][1] == "--data"
    assert record["versions"]["torch"] == torch.__version__ and record["world_size"] == 1 and "commit" in record


def test_one_line_a_step_and_samples(shards, tmp_path):
    done = succeed("--data", shards, *RUN, "--max_steps", 3, "--sample_every", 2, "--log_dir", tmp_path / "log")
    line = r"step +\d+ \| loss \d+\.\d+ \| lr \S+ \| norm \S+ \| \d+ ms \| [\d,]+ tok/s \| eta \d:\d\d:\d\d"
    assert len(re.findall(line, done.stdout)) == 3
    if "no samples" not in done.stdout:  # where GPT-2's merges can be had
        assert done.stdout.count("sample 4: Hello, I'm a language model,") == 2  # steps 2 and 3, the last


def test_validation_is_the_mean_over_the_promised_tokens(shards, tmp_path):
    succeed("--data", shards, *RUN, "--max_steps", 2, "--log_dir", tmp_path / "log")
    model = GPT.from_checkpoint(tmp_path / "log" / "model_00002.pt").eval()
    tokens = torch.from_numpy(np.load(shards / "edufineweb_val_000000.npy").astype(np.int64))
    rows = 150 // 16
    x, y = tokens[: rows * 16].view(rows, 16), tokens[1 : rows * 16 + 1].view(rows, 16)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
    assert read_log(tmp_path / "log", "val")[2] == pytest.approx(expected, abs=1e-5)


def test_init_from_checkpoint_and_hugging_face_directory(shards, tmp_path):
    succeed("--data", shards, *RUN, "--log_dir", tmp_path / "first")
    GPT.from_checkpoint(tmp_path / "first" / "model_00020.pt").save_pretrained(tmp_path / "hf")
    last = read_log(tmp_path / "first", "val")[20]
    shape = ["--T", "16", "--B", "2", "--total_batch_size", "128", "--val_tokens", "150", "--max_steps", "0", "--data", shards]
    same, cut = (
        float(re.search(r"val (\S+)", succeed(*shape, "--init_from", path, "--log_dir", tmp_path / "a").stdout)[1])
        for path in (tmp_path / "first" / "model_00020.pt", tmp_path / "hf")
    )
    assert same == pytest.approx(last, abs=1e-4)
    assert cut == pytest.approx(last, abs=0.02)  # 47 padding rows fewer in the softmax
    assert not (tmp_path / "a").exists()  # only looked at, no run


def test_resume_remembers_the_flags_and_the_data(shards, tmp_path):
    """Also where a directory of shards has appeared since, which a new run would take; and a stop at the last step saves all."""
    (tmp_path / "input.txt").write_text("The tide is what it is. " * 2000)
    small = [word for word in map(str, TINY) if word != "--data"]
    flags = [*small, "--max_steps", 8, "--checkpoint_every", 4, "--val_every", 0]
    succeed(*flags, cwd=tmp_path)
    (tmp_path / "edu_fineweb10B").symlink_to(shards)
    (tmp_path / "log" / "model_00008.pt").unlink()
    done = succeed("--resume", "--max_steps", 10, cwd=tmp_path)
    assert "input.txt: " in done.stdout and "max_steps was 8, is 10" in done.stdout and "data was" not in done.stdout
    record = json.loads((tmp_path / "log" / "config.json").read_text())
    assert record["args"]["n_embd"] == 16 and record["command"].count("--data") == 1
    assert load(tmp_path / "log" / "model_00010.pt")["step"] == 10


def test_a_new_run_keeps_the_files_of_the_one_before(shards, tmp_path):
    flags = ["--data", shards, *RUN, "--max_steps", 1, "--log_dir", tmp_path / "log"]
    succeed(*flags)
    first = (tmp_path / "log" / "log.txt").read_text()
    done = succeed(*flags)
    (aside,) = tmp_path.glob("log.2*")
    assert (aside / "log.txt").read_text() == first and (aside / "latest.pt").exists() and str(aside) in done.stdout


def test_checkpoint_that_cannot_be_written_does_not_stop_the_run(shards, tmp_path):
    """A limit on the size of files stands for the full disk."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = succeed("--data", shards, *RUN, "--log_dir", tmp_path / "log", "--checkpoint_every", 10, preexec_fn=limit)
    assert done.stdout.count("can't be written") == 4  # model_ and latest, twice
    assert len(read_log(tmp_path / "log")) == 20
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["config.json", "log.txt"]


def test_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(shards, tmp_path):
    flags = ["--data", shards, *RUN, "--checkpoint_every", 1, "--warmup_steps", 0, "--max_lr", 1e18, "--weight_decay", 0]
    done = train(*flags, "--log_dir", tmp_path / "log")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    step = int(re.match(r"error: step (\d+): loss", done.stderr.splitlines()[-1]).group(1))
    saved = load(tmp_path / "log" / "latest.pt")
    assert saved["step"] <= step and all(t.isfinite().all() for t in saved["model"].values())


def test_training_on_text_learns(tmp_path):
    """The README's first command, shortened: GPT-2's own tokens or its bytes, whichever this machine can have."""
    done = succeed("--data", ROOT / "input.txt", "--max_steps", 25, "--warmup_steps", 5, "--val_tokens", 2048, "--log_dir", tmp_path / "log")
    losses = read_log(tmp_path / "log")
    assert abs(losses[0] - math.log(50304)) < 0.2 and losses[24] < losses[0] - 2
    assert "sample 4:" in done.stdout


def test_muon_learns_on_any_number_of_ranks_compiled_and_resumed(shards, tmp_path):
    flags = ["--data", shards, *RUN, "--optimizer", "muon", "--checkpoint_every", 10, "--log_dir"]
    succeed(*flags, tmp_path / "one")
    succeed(*flags, tmp_path / "two", "--compile", ranks=2)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert close(one, two, 1e-3) and one[19] < one[0] - 1  # Newton-Schulz is computed in bfloat16
    adamw, muon = load(tmp_path / "one" / "latest.pt")["optimizers"]
    assert (len(adamw["state"]), len(muon["state"])) == (20, 8)  # 2 embeddings and 18 vectors; 2 blocks of 4 matrices
    process = start(*flags, tmp_path / "killed", until="step    12 | loss")
    process.kill()
    process.wait()
    succeed(*flags, tmp_path / "killed", "--resume")
    assert read_log(tmp_path / "killed") == one
    done = train("--optimizer", "adamw", "--log_dir", tmp_path / "one", "--resume")
    assert done.returncode == 2 and "--optimizer muon" in done.stderr
