"""A training step, against the same step written out: loss, gradient, clipping, AdamW, Muon, on one rank and two."""

import math
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, interrupt, load, main, read_log

from train_gpt2 import GPT, GPTConfig

T, ROWS, STEPS = 16, 8, 5  # tokens in a row, rows in a step
# Two steps of warmup to 1e-2, then half a cosine down to 1e-3 at step 5: 1e-3 + 9e-3 * (1 + cos(pi * i / 3)) / 2.
RATES = [5e-3, 1e-2, 1e-2, 7.75e-3, 3.25e-3]
DECAY, CLIP = 0.3, 0.5


@pytest.fixture
def text():
    return (ROOT / "input.txt").read_text()[:2000]


@pytest.fixture
def flags(text, tmp_path):
    """Five steps of 8 rows, from weights so large that the gradient is clipped."""
    (tmp_path / "text.txt").write_text(text)
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 384, 2, 2, 16, tokenizer="bytes"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, tmp_path / "begin.pt")
    flags = f"--T {T} --B 2 --total_batch_size {ROWS * T} --max_steps {STEPS} --warmup_steps 2 --max_lr 1e-2 --min_lr 1e-3"
    flags += f" --weight_decay {DECAY} --grad_clip {CLIP} --no-shuffle --device cpu --dtype float32 --val_every 0"
    return ["--data", tmp_path / "text.txt", "--init_from", tmp_path / "begin.pt", *flags.split(), "--sample_every", 0, "--log_dir"]


def batches(text):
    """The inputs and targets of each step: of the first nine tenths of the text, led by the end of text."""
    tokens = torch.tensor([256, *text[: len(text) * 9 // 10].encode()])
    x, y = tokens[: STEPS * ROWS * T].view(STEPS, ROWS, T), tokens[1 : STEPS * ROWS * T + 1].view(STEPS, ROWS, T)
    return zip(x, y)


def adamw(p, state, grad, rate, t):
    """Loshchilov and Hutter (2019), algorithm 2, with betas 0.9 and 0.95; decay of matrices only."""
    m, v = state.get("m", 0.0), state.get("v", 0.0)
    state["m"], state["v"] = m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
    if p.dim() >= 2:
        p -= rate * DECAY * p
    p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)


def written_out(model, text, muon=False):
    """Trains the model; returns the loss and the norm of each step."""
    parameters, losses, norms = dict(model.named_parameters()), [], []
    states = {name: {} for name in parameters}
    matrices = {name for name, p in parameters.items() if muon and name.startswith("transformer.h.") and p.dim() == 2}
    theirs = torch.optim.Muon([parameters[name] for name in sorted(matrices)], 1.0, DECAY, adjust_lr_fn="match_rms_adamw") if muon else None
    for t, ((x, y), rate) in enumerate(zip(batches(text), RATES), 1):
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        grads = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
        norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))
        losses, norms = [*losses, loss.item()], [*norms, norm]
        with torch.no_grad():
            for name, p in parameters.items():
                p.grad = grads[name] * min(1, CLIP / norm)
                if name not in matrices:
                    adamw(p, states[name], p.grad, rate, t)
        if muon:
            theirs.param_groups[0]["lr"] = rate
            theirs.step()
    return losses, norms


def check(log_dir, text, begin, muon=False):
    """What training logged and saved is what the steps written out give."""
    model = GPT.from_checkpoint(begin)
    losses, norms = written_out(model, text, muon)
    assert min(norms) > CLIP and losses[-1] < losses[0]
    atol = 2e-3 if muon else 1e-5  # Muon computes in bfloat16
    assert list(read_log(log_dir).values()) == pytest.approx(losses, abs=atol)
    assert list(read_log(log_dir, "norm").values()) == pytest.approx(norms, abs=10 * atol)
    assert list(read_log(log_dir, "lr").values()) == pytest.approx(RATES, rel=1e-6)
    saved = load(log_dir / "model_00005.pt")["model"]
    for name, p in model.state_dict().items():
        parts = [saved[name], p]
        if name.endswith("c_attn.bias"):  # that of the keys moves all scores alike: its gradient is rounding
            parts = [part.view(3, -1)[[0, 2]] for part in parts]
        torch.testing.assert_close(*parts, atol=atol, rtol=0, msg=name)


def test_five_steps_of_adamw(flags, text, tmp_path):
    main(*flags, tmp_path / "log")
    check(tmp_path / "log", text, tmp_path / "begin.pt")


def test_five_steps_of_muon(flags, text, tmp_path):
    main(*flags, tmp_path / "log", "--optimizer", "muon")
    check(tmp_path / "log", text, tmp_path / "begin.pt", muon=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_five_steps_with_a_stop_after_the_third(flags, text, tmp_path, optimizer):
    with interrupt("training_step", 2, signal.SIGTERM):
        main(*flags, tmp_path / "log", "--optimizer", optimizer)
    assert load(tmp_path / "log" / "latest.pt")["step"] == 3
    main("--resume", "--log_dir", tmp_path / "log")
    check(tmp_path / "log", text, tmp_path / "begin.pt", muon=optimizer == "muon")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["--no-zero", "--zero"])
def test_five_steps_of_four_micro_steps_on_two_ranks(flags, text, tmp_path, two_ranks, sharded):
    """The loss is the mean over all of them, and the norm is that of the mean gradient, which a mean of norms is not."""
    two_ranks.main(*flags, tmp_path / "log", "--B", 1, sharded)
    check(tmp_path / "log", text, tmp_path / "begin.pt")


def test_the_optimizers_have_the_settings_of_the_paper():
    """Of the GPT-3 paper, appendix B; Muon's defaults are those of torch."""
    adamw, muon = GPT(GPTConfig(8, 16, 1, 2, 16)).configure_optimizers(1e-3, 0.1, muon=True)
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in adamw.param_groups] == [
        ((0.9, 0.95), 1e-8, 0.1), ((0.9, 0.95), 1e-8, 0.0)]  # fmt: skip
    assert [(g["lr"], g["weight_decay"], g["momentum"], g["nesterov"]) for g in muon.param_groups] == [(1e-3, 0.1, 0.95, True)]


def test_without_grad_clip_nothing_is_clipped(flags, text, tmp_path, monkeypatch):
    monkeypatch.setattr("test_step.CLIP", math.inf)
    main(*flags, tmp_path / "log", "--grad_clip", 0)
    model = GPT.from_checkpoint(tmp_path / "begin.pt")
    losses, norms = written_out(model, text)
    assert list(read_log(tmp_path / "log").values()) == pytest.approx(losses, abs=1e-5)


def test_each_micro_batch_and_each_step_has_dropout_of_its_own(flags, tmp_path, monkeypatch):
    """One row again and again, with a rate of 0: whatever the loss differs by is dropout."""
    (tmp_path / "text.txt").write_text(("a" * T) * 500)
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    main(*flags, tmp_path / "log", "--dropout", 0.5, "--max_lr", 0, "--min_lr", 0)
    losses = list(read_log(tmp_path / "log").values())[1:]  # all rows of the first step but one are alike
    assert len({round(loss, 4) for loss in losses}) == STEPS - 1
    assert len(seeds[1:]) == len(set(seeds[1:])) == STEPS * ROWS // 2  # after the run's own seed
