"""GPT-2, built and trained in one file that is read from top to bottom: the
model, weights from elsewhere, settings, the data loader, one training step,
checkpoints, evaluation, and the training loop.

    python train_gpt2.py                        # a small GPT on input.txt
    torchrun --nproc_per_node=8 train_gpt2.py   # GPT-2 124M on edu_fineweb10B/
    torchrun --nproc_per_node=8 train_gpt2.py --resume   # go on after a stop
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29500 train_gpt2.py         # on each of two nodes

Notable choices:
- Parameters have the names of Hugging Face's GPT-2, so weights move over by
  name, in both directions.
- The learning rate, the position in the data and the random seeds are
  functions of the step. To resume is to load a checkpoint and begin at its
  step, and any number of processes trains on the same batches.
- `train_model` is compiled and wrapped in DistributedDataParallel, and does
  nothing but train. Validation, samples and checkpoints use `model`, the bare
  module, which shares its weights.
- Weights and optimizer state are float32. With bfloat16, the forward pass runs
  under autocast.
"""

import argparse
import contextlib
import ctypes
import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

# Errors of the user and of files: `readable` turns any error of a file into a UserError, one line that says
# what to do, `warn_only` into a warning, and `complete_file` gives a file its name when all of it is written.
import hellaswag
from fineweb import UserError, complete_file, find_shards, get_tokenizer, load_text, locked, make_parser
from fineweb import nonempty, open_shard, print0, readable, run, save_tokenizer, warn_only, write_json

# torchrun sets these for each process; without it there is one process.
RANK = int(os.environ.get("RANK", 0))  # number of this process among those of all nodes
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its number on this node; it uses the GPU of that number
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The sum (or another function) of a tensor of all ranks, in place. All ranks must call it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, op)
    return tensor


# --------------------------------------------------------------------------------------------------
# The model: a residual stream, to which every block adds the output of its attention and of its MLP


@dataclass
class GPTConfig:
    """The shape of a model, and what its tokens mean. The defaults are GPT-2 124M as released."""

    block_size: int = 1024  # the longest sequence: rows of the position embedding
    vocab_size: int = 50257  # rows of the token embedding, which may be more than there are tokens (padding)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # probability, on attention weights and on the output of each attention and MLP
    tokenizer: str = "gpt2"  # "gpt2", "bytes", or the path of a Hugging Face tokenizer.json


class CausalSelfAttention(nn.Module):
    """Tokens communicate: each gathers information from itself and the tokens before it."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}: change one")
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # never stores (T, T)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Each token is processed by itself."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # the approximation with which GPT-2 was trained
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        # The norms are on the branches (pre-norm), so that gradients pass through the sums unchanged.
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). Parameters are named as in Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix embeds and predicts tokens

        self.init_weights()

    def init_weights(self):
        """Normal with standard deviation 0.02 (GPT-2's released code), biases 0; norms stay at 1 and 0."""
        # Each block adds to the residual stream twice. This scale keeps the variance of the sum from growing
        # with the number of layers (GPT-2 paper, section 2.3).
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():  # the tied tensor has one name here, so it is drawn once
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=residual_std if name.endswith("c_proj.weight") else 0.02)

    def hidden(self, idx):
        """idx: int64 (B, T), T <= block_size. Returns the final hidden states, float (B, T, n_embd)."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets: int64 (B, T). Returns logits (B, T, vocab_size), and the mean cross entropy in nats,
        a float32 scalar, or None if there are no targets."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        # The softmax is computed in float32: bfloat16 has three digits, too few for a loss. Backward goes
        # through the loss only: without detach, a compiled model also makes zeros as gradients of the logits.
        return logits.detach(), F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, top_k=50, generator=None, temperature=1.0, n_vocab=None):
        """Continue idx, int64 (B, T): returns int64 (B, T + max_new_tokens). Each token is drawn from the
        top_k most likely ones of the ids below n_vocab (by default all rows of the embedding, padding too).
        The model sees the last block_size tokens."""
        training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.config.block_size :])[:, -1]  # only the last position needs logits
            logits = self.lm_head(x)[:, :n_vocab].float() / temperature
            logits, candidates = logits.topk(min(top_k, logits.size(-1)))
            choice = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, candidates.gather(1, choice)), dim=1)
        self.train(training)
        return idx

    def configure_optimizers(self, lr, weight_decay, muon=False):
        """A list of optimizers: AdamW as in GPT-3 (paper, appendix B), with weight decay on matrices and
        embeddings only, not on biases and norms. With muon, Muon (Jordan et al. 2024) for the matrices of the
        blocks, scaled as in Liu et al. (2025), so that it can share AdamW's learning rate."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        for params, what in ((decay, "decayed"), (rest, "not decayed")):
            print0(f"{what}: {len(params)} tensors, {sum(p.numel() for p in params):,} parameters")
        optimizers = []
        if muon:
            matrices = [p for p in self.transformer.h.parameters() if p.dim() >= 2]
            decay = [self.transformer.wte.weight, self.transformer.wpe.weight]
            optimizers = [torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), eps=1e-8, fused=True), *optimizers]

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """The model of a name on the Hugging Face hub ("gpt2", ... "gpt2-xl"), or of a directory that
        save_pretrained wrote. UserError for anything but GPT-2, and for variants of it."""
        from transformers import AutoConfig, GPT2LMHeadModel

        with readable(name_or_dir, "give a released name, or a directory that save_pretrained wrote"):
            c = AutoConfig.from_pretrained(name_or_dir)
            supported = {
                "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                "layer_norm_epsilon": [1e-5], "n_inner": [None, 4 * getattr(c, "n_embd", 0)],
                "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
                "tie_word_embeddings": [True],
            }  # fmt: skip
            for field, values in supported.items():
                if (value := getattr(c, field, None)) not in values:
                    raise ValueError(f"{field} is {value}, but in this model {values[0]}")
            hf, info = GPT2LMHeadModel.from_pretrained(name_or_dir, output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError(f"{sorted(info['missing_keys'])[0]} is missing")
            guess = "gpt2" if c.vocab_size in (50257, 50304) else "tokenizer.json"  # with or without padding
            tokenizer = getattr(c, "tokenizer", guess)  # a field that save_pretrained adds
            if tokenizer not in ("gpt2", "bytes"):
                tokenizer = str(Path(name_or_dir, tokenizer))
            model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, 0.0, tokenizer))
            model.load_state_dict(transpose_conv1d(hf.state_dict()))
        return model.eval()

    def save_pretrained(self, directory):
        """Write model and tokenizer in Hugging Face's format, without the padding rows of the vocabulary."""
        from transformers import GPT2Config, GPT2LMHeadModel

        c, tokenizer = self.config, get_tokenizer(self.config.tokenizer)
        hf = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd,
            n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=c.dropout, attn_pdrop=c.dropout, embd_pdrop=0.0,
            bos_token_id=tokenizer.eot_token, eos_token_id=tokenizer.eot_token,
            tokenizer=c.tokenizer if c.tokenizer in ("gpt2", "bytes") else "tokenizer.json",
        ))  # fmt: skip
        hf.load_state_dict(transpose_conv1d(self.state_dict()))
        hf.resize_token_embeddings(min(c.vocab_size, tokenizer.n_vocab))  # cuts off the padding rows
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as tmp:  # all files appear when all are complete
            hf.save_pretrained(tmp)
            save_tokenizer(tokenizer, tmp, c.block_size)
            for path in Path(tmp).iterdir():
                os.replace(path, Path(directory, path.name))

    @classmethod
    def from_checkpoint(cls, path, checkpoint=None):
        """The model in a .pt file that training wrote, this script's or the lecture's. checkpoint: the
        contents of the file, where they have been read already."""
        checkpoint = checkpoint or load_checkpoint(path)
        with readable(path, "give a checkpoint that training wrote"):
            for name, value in checkpoint["config"].items():
                default = getattr(GPTConfig, name)
                if type(value) is not type(default) or (type(value) is int and not 0 < value < 2**20):
                    raise ValueError(f"its {name} is {value!r:.80}")
            model = cls(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
        return model.eval()


# --------------------------------------------------------------------------------------------------
# Weights from elsewhere


def transpose_conv1d(state):
    """Hugging Face has four weights of a block as (in, out), nn.Linear has (out, in). Either direction."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {name: w.t() if name.endswith(conv1d) else w for name, w in state.items()}


def load_checkpoint(path):
    """The dict in a .pt file, with at least "model", a state dict, and "config", the fields of GPTConfig. It
    is read as plain data: no code in the file is run. UserError if it is damaged or something else."""
    with readable(path, "give a checkpoint that training wrote"), zipfile.ZipFile(path) as file:
        if damaged := file.testzip():  # torch.load does not verify the checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
        # The lecture's script pickled an instance of its class __main__.GPTConfig: read it as one of ours.
        with torch.serialization.safe_globals([(GPTConfig, "__main__.GPTConfig")]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        config = asdict(config) if isinstance(config, GPTConfig) else dict(config)
        # torch.compile put this prefix before the names of the lecture's checkpoints.
        weights = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
        return checkpoint | {"config": config, "model": weights}


def load_model(source, checkpoint=None):
    """The GPT of a .pt file, of a directory in Hugging Face's format, or of a released name."""
    return GPT.from_checkpoint(source, checkpoint) if source.endswith(".pt") else GPT.from_pretrained(source)


def grow(model, n_layer, dropout):
    """A GPT with this dropout and n_layer layers, at least as many as the L layers of `model`, whose list of
    layers is overwritten. Layer j begins as layer floor(j * L / n_layer), the best way in the Gopher paper
    (section G.3.3)."""
    layers = [j * model.config.n_layer // n_layer for j in range(n_layer)]
    if n_layer > model.config.n_layer:
        print0(f"grown from {model.config.n_layer} to {n_layer} layers, which begin as {str(layers)[1:-1]}")
    model.transformer.h = nn.ModuleList(model.transformer.h[i] for i in layers)
    grown = GPT(replace(model.config, n_layer=n_layer, dropout=dropout))
    grown.load_state_dict(model.state_dict())
    return grown


# --------------------------------------------------------------------------------------------------
# Settings: the flags, and presets of their values

# What differs from GPT-2 124M, whose values are the defaults of the flags. Learning rates and warmup are from
# the GPT-3 paper (table 2.1 and appendix B).
XL = {"total_batch_size": 2**20, "max_steps": 9536, "warmup_steps": 357, "max_lr": 2e-4}
GROWN = {"n_embd": 1536, "warmup_steps": 2000}
PRESETS = {
    "gpt2": {},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "max_lr": 3e-4},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "max_lr": 2.5e-4},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600} | XL,  # 1558M
    "gpt3-small": {"T": 2048},
    "gpt3-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "T": 2048, "max_lr": 3e-4},
    "gpt3-large": {"n_layer": 24, "n_head": 16, "n_embd": 1536, "T": 2048, "max_lr": 2.5e-4},
    "gpt3-xl": {"n_layer": 24, "n_head": 16, "n_embd": 2048, "T": 2048} | XL,  # 24 heads in the paper
    # A 760M model that was grown from a 580M one (the original has ALiBi in place of learned positions).
    "gpt-580m": {"n_layer": 18, "max_lr": 2.5e-4, "max_steps": 97000} | GROWN,
    "gpt-760m": {"n_layer": 24, "max_lr": 2e-4, "max_steps": 82000, "dropout": 0.1} | GROWN,
    # For a laptop. Such small matrices don't gain from bfloat16.
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "T": 128, "total_batch_size": 2**11,
             "max_lr": 2e-3, "max_steps": 1000, "warmup_steps": 50, "val_every": 100, "hellaswag_every": 0,
             "sample_every": 500, "prompt": "Tamsin Vane:", "num_samples": 2, "max_new_tokens": 200,
             "print_every": 20, "tokenizer": "bytes", "dtype": "float32"},
}  # fmt: skip
SHAPE = ("n_layer", "n_head", "n_embd")
# What must not change when a run is resumed, so that it goes on with the same model on the same batches.
# "shards" is no flag: main() adds the sizes of the training shards.
FIXED = (*SHAPE, "T", "total_batch_size", "seed", "shuffle", "optimizer", "shards")


def preset_table(parser):
    """The presets as text: a column for each of the main flags, and below it what else differs from gpt2."""
    columns = "n_layer", "n_head", "n_embd", "T", "total_batch_size", "max_steps", "max_lr"
    lines, widths = [], (7, 6, 6, 4, 16, 9, 7)
    for preset, values in {"presets:": dict(zip(columns, columns)), **PRESETS}.items():
        cells = [values.get(name, parser.get_default(name)) for name in columns]
        lines.append(" ".join((f"{preset:12}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths)))))
    for preset, values in PRESETS.items():
        others = ", ".join(f"{name} {value}" for name, value in values.items() if name not in columns)
        lines += textwrap.wrap(f"{preset} also: {others}", 79, subsequent_indent="  ") * bool(others)
    return "\n".join(lines)


def build_parser():
    parser = make_parser(__doc__)

    def flag(name, kind, default, help, **options):  # goes into the group that was assigned last
        kinds = {bool: {"action": argparse.BooleanOptionalAction}, str: {"type": nonempty}}
        options |= kinds.get(kind, {"type": kind})
        if kind in (int, float):
            options["metavar"] = "N" if kind is int else "X"
        help += "" if default is None else f" ({default})"
        group.add_argument(f"--{name}", default=default, help=help, **options)

    group = parser.add_argument_group("data")
    data = "edu_fineweb10B" if any(Path("edu_fineweb10B").glob("*train*")) else "input.txt"
    flag("data", str, data, "directory of shards (edu_fineweb10B if it exists) or text file")
    flag("tokenizer", str, None, "of a text file: gpt2, bytes, or a tokenizer.json (the model's, else gpt2)")
    flag("shuffle", bool, True, "a new order of shards and documents in every epoch")
    group = parser.add_argument_group("model")
    flag("model", str, None, "preset (gpt2 for shards, else tiny)", choices=PRESETS, metavar="PRESET")
    flag("init_from", str, None, "begin with weights: a released name, Hugging Face directory or .pt file")
    flag("n_layer", int, 12, "layers; with --init_from, more than the weights have make the model grow")
    flag("n_head", int, 12, "attention heads")
    flag("n_embd", int, 768, "width of the residual stream")
    flag("dropout", float, 0.0, "probability, on attention weights and the output of each attention and MLP")
    group = parser.add_argument_group("batch")
    flag("B", int, None, "micro batch: most rows in a forward pass, which changes no step (what fits)")
    flag("T", int, 1024, "tokens in a row")
    flag("total_batch_size", int, 2**19, "tokens in a step, over all micro steps and ranks")
    group = parser.add_argument_group("optimization")
    flag("max_steps", int, 10**10 // 2**19, "steps of the whole run")
    flag("warmup_steps", int, 375 * 10**6 // 2**19, "steps of rising learning rate")
    flag("max_lr", float, 6e-4, "learning rate after warmup")
    flag("min_lr", float, None, "learning rate at the end (max_lr / 10)")
    flag("optimizer", str, "adamw", "muon: for the matrices of the blocks", choices=("adamw", "muon"))
    flag("zero", bool, False, "shard the optimizer's state over the ranks")
    flag("weight_decay", float, 0.1, "on matrices and embeddings")
    flag("grad_clip", float, 1.0, "the gradient is scaled down to this global norm, 0: never")
    group = parser.add_argument_group("evaluation")
    flag("val_every", int, 250, "steps between validations, 0: never")
    flag("val_tokens", int, 20 * 2**19, "tokens in one validation, at most the whole split")
    flag("hellaswag_every", int, 250, "steps between HellaSwag evaluations, 0: never")
    group = parser.add_argument_group("sampling")
    flag("sample_every", int, 250, "steps between samples, 0: never")
    flag("prompt", str, "Hello, I'm a language model,", "text that samples continue")
    flag("num_samples", int, 5, "samples on each rank")
    flag("max_new_tokens", int, 22, "tokens of a sample")
    flag("top_k", int, 50, "sample from the k most likely tokens")
    flag("temperature", float, 1.0, "sampling temperature: below 1 is more predictable, above 1 more random")
    group = parser.add_argument_group("run")
    flag("seed", int, 42, "random seed of initial weights, data order and dropout")
    flag("device", str, None, "(the fastest there is)", choices=("cpu", "cuda", "mps"))
    flag("dtype", str, None, "(bfloat16 on hardware with it, else float32)", choices=("float32", "bfloat16"))
    flag("compile", bool, None, "torch.compile: a minute's wait, then faster steps (on cuda)")
    flag("print_every", int, 1, "steps between printed lines, 0: none; log.txt has all steps")
    flag("checkpoint_every", int, 5000, "steps between checkpoints, 0: never, not even at the end")
    flag("log_dir", str, "log", "directory for log.txt and checkpoints")
    flag("resume", bool, False, "go on from log_dir/latest.pt; flags that are left out are as they were")
    parser.epilog = preset_table(parser)
    return parser


def parse_args(argv=None):
    """The settings, and with --resume the contents of latest.pt, else None. A flag that is typed overrides
    what latest.pt remembers or the preset says, and that overrides the flag's default. The flags are parsed
    twice: first to find the preset or latest.pt, and then with the defaults that these give."""
    parser, latest = build_parser(), None
    args = parser.parse_args(argv)
    if args.resume and args.init_from:
        parser.error("--resume and --init_from both say what to begin with: give one of them")
    if args.resume:
        path = Path(args.log_dir, "latest.pt")
        latest = load_checkpoint(path)
        needed = {"optimizers": dict, "args": dict, "step": int}
        if not all(isinstance(latest.get(name), kind) for name, kind in needed.items()) or latest["step"] < 0:
            raise UserError(f"{path} has weights only: begin a new run with them, with --init_from")
        for name, value in latest["args"].items():
            # In a damaged file, a number may be anything. A default that is a string is verified by argparse.
            known = name == "shards" or isinstance(value, (bool, type(parser.get_default(name))))
            parser.set_defaults(**{name: value if known else str(value)})
        parser.set_defaults(log_dir=args.log_dir, init_from=str(path))  # it begins with its own weights
    else:
        model = args.model or ("gpt2" if Path(args.data).is_dir() else "tiny")
        parser.set_defaults(model=model, **PRESETS[model])
        if args.init_from:  # None: what the weights have
            parser.set_defaults(tokenizer=None)
            if not args.model:
                parser.set_defaults(**dict.fromkeys(SHAPE))
    args = parser.parse_args(argv)
    args.remembered = vars(args).copy()  # before the defaults that depend on this machine are filled in

    if not Path(args.data).exists():
        parser.error(f"--data {args.data!r} does not exist: give a directory of shards or a text file")
    if latest and latest["step"] > args.max_steps:
        parser.error(f"--max_steps {args.max_steps}: {path} is at step {latest['step']} already")
    positive = (*SHAPE, "B", "T", "total_batch_size", "num_samples", "max_new_tokens", "top_k")
    lowest = dict.fromkeys(positive, 1) | {"val_tokens": args.T, "temperature": 1e-3}
    highest = dict.fromkeys(SHAPE, 10**5) | {"dropout": 1}
    for name, value in vars(args).items():
        low, high = lowest.get(name, 0), highest.get(name, 2**31)
        if type(value) in (int, float) and not low <= value < high:
            parser.error(f"--{name} {value} is out of range: it must be at least {low}, and below {high}")
    args.min_lr = args.max_lr / 10 if args.min_lr is None else args.min_lr
    if args.min_lr > args.max_lr:
        parser.error(f"--min_lr {args.min_lr} is above --max_lr {args.max_lr}: give both")
    if args.warmup_steps > args.max_steps > 0:
        print0(f"warning: --warmup_steps {args.warmup_steps}: in {args.max_steps} steps the rate only rises")
    if args.total_batch_size % (args.T * WORLD_SIZE):
        unit = f"T * ranks = {args.T * WORLD_SIZE}"
        parser.error(f"--total_batch_size {args.total_batch_size} is no multiple of {unit}")
    enough = {  # the fastest first; each process needs a GPU of its own
        "cuda": torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "mps": torch.backends.mps.is_available() and WORLD_SIZE == 1,
        "cpu": True,
    }
    args.device = args.device or next(device for device in enough if enough[device])
    if not enough[args.device]:
        parser.error(f"--device {args.device} is not there for every process: use --device cpu")
    args.dtype = args.dtype or pick_dtype(args.device)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    return args, latest


def pick_dtype(device):
    """bfloat16 where the hardware computes with it: NVIDIA's GPUs since Ampere, CPUs with AVX512-BF16 or AMX.
    Elsewhere PyTorch emulates it, slower than float32."""
    if device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        has_bfloat16 = device == "cpu" and (processor.get("avx512_bf16") or processor.get("amx_bf16"))
    return "bfloat16" if has_bfloat16 else "float32"


# --------------------------------------------------------------------------------------------------
# The data loader: the tokens of a row of the run are a function of the seed and the number of the row


class DataLoaderLite:
    """Batches of rows of T tokens from the shards of a split, {name: path, or the tokens themselves}. The
    rows of the whole run are numbered, over all epochs. Of every world_size * B rows, rank r takes those from
    r * B to (r + 1) * B, so a step has the same rows for any B and number of ranks. With shuffle, each epoch
    has an order of shards, and each shard of documents, drawn from (seed, epoch, shard). A document begins
    with eot. The tail of a shard that is shorter than a row is left out. UserError for a shard without a row,
    or with a token that is not below n_vocab."""

    def __init__(self, shards, B, T, rank=0, world_size=1, n_vocab=50257, seed=0, shuffle=False, eot=50256,
                 device="cpu"):  # fmt: skip
        self.shards, self.B, self.T, self.rank, self.world_size = list(shards.items()), B, T, rank, world_size
        self.n_vocab, self.seed, self.shuffle, self.eot, self.device = n_vocab, seed, shuffle, eot, device
        self.sizes = {name: len(open_shard(shard)) for name, shard in self.shards}  # in tokens
        for name, n in self.sizes.items():
            if n <= T:
                raise UserError(f"{name} has {n} tokens, a row needs {T + 1}: lower --T or give more data")
        self.rows = [(n - 1) // T for n in self.sizes.values()]  # the last token of a shard is only a target
        self.rows_per_epoch = sum(self.rows)
        keep_one = functools.lru_cache(1)  # the next row most often needs the same order and the same shard
        self.order, self.read_shard = keep_one(self.order), keep_one(self.read_shard)
        self.seek(0)

    def seek(self, row):
        """Let the next batches, over all ranks, begin at this row of the run."""
        self.row = row + self.rank * self.B

    def order(self, n, *key):
        """The order in which n things are visited, as indices."""
        return np.random.default_rng((self.seed, *key)).permutation(n) if self.shuffle else range(n)

    def read_shard(self, epoch, i):
        """The tokens of shard number i, its documents in the order of an epoch: uint16 (n,)."""
        tokens = open_shard(self.shards[i][1])
        if not self.shuffle:
            return tokens
        # The first piece may be the end of a document that began in another shard.
        documents = np.split(tokens, np.flatnonzero(tokens[1:] == self.eot) + 1)
        return np.concatenate([documents[j] for j in self.order(len(documents), epoch, i)])

    def read_row(self, row):
        """The T tokens of a row of the run, and the token after them: uint16 (T + 1,)."""
        epoch, row = divmod(row, self.rows_per_epoch)
        for i in self.order(len(self.shards), epoch):
            if row < self.rows[i]:
                break
            row -= self.rows[i]
        tokens = self.read_shard(epoch, i)[row * self.T : (row + 1) * self.T + 1]
        if tokens.max() >= self.n_vocab:
            raise UserError(f"{self.shards[i][0]} has token {tokens.max()} >= {self.n_vocab}: make it again")
        return tokens

    def next_batch(self):
        """The next B rows of this rank: inputs and targets, int64 (B, T) each, targets one token ahead."""
        rows = np.stack([self.read_row(row) for row in range(self.row, self.row + self.B)])
        self.row += self.world_size * self.B
        rows = torch.from_numpy(rows.astype(np.int64))
        if self.device == "cuda":  # the CPU does not wait for a copy from pinned memory
            rows = rows.pin_memory().to("cuda", non_blocking=True)
        rows = rows.to(self.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# --------------------------------------------------------------------------------------------------
# The learning rate, and one training step


def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """Learning rate of a step, counted from 0: linear warmup, then half a cosine down to min_lr at max_steps
    (GPT-3 paper, appendix B). Step 0 has max_lr / warmup_steps, because a rate of 0 would waste it."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def training_step(lr, args, train_model, optimizers, owners, loader):
    """Forward and backward over the micro batches of a step, clipping, update. Returns (loss, norm): the mean
    cross entropy over all micro steps and ranks, and the norm of the gradient before clipping."""
    grad_accum_steps = args.total_batch_size // (args.B * args.T * WORLD_SIZE)
    total = torch.zeros((), device=args.device)
    for micro_step in range(grad_accum_steps):
        if args.dropout:  # each micro batch has a seed of its own, so a resumed run has the same masks
            torch.manual_seed(args.seed + loader.row)
        x, y = loader.next_batch()
        if WORLD_SIZE > 1:  # only the last backward averages gradients over ranks; forward prepares for it
            train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with autocast(args):
            loss = train_model(x, y)[1]  # no name for the logits, which would keep them in memory
        loss = loss / grad_accum_steps  # gradients add up over micro steps, but the objective is a mean
        loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(train_model.parameters(), args.grad_clip or math.inf)
    for p, owner in owners.items():
        if owner != RANK:
            p.grad = None  # all ranks have the same; an optimizer skips a tensor without, and keeps no state
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    for p, owner in owners.items():
        dist.broadcast(p.detach(), owner)
    total = all_reduce(total) / WORLD_SIZE
    return torch.stack((total, norm)).tolist()  # the only place where the GPU is waited for


# --------------------------------------------------------------------------------------------------
# Optimizer state. With --zero it is sharded over the ranks (ZeRO stage 1, Rajbhandari et al. 2020): each
# tensor has an owner, the rank that updates it and keeps its moments. Without --zero there are no owners.


def collect_state(model, optimizers, owners):
    """{parameter's name: {"exp_avg": tensor, ...}}, of all parameters on rank 0. All ranks must call it."""
    states = {}
    for name, p in model.named_parameters():
        state = [{key: t.cpu() for optimizer in optimizers for key, t in optimizer.state.get(p, {}).items()}]
        if owners:
            dist.broadcast_object_list(state, owners[p])  # in place: now all ranks have the owner's
        if RANK == 0:  # so no other rank holds more than one tensor's beside its own
            states[name] = state[0]
    return states


def restore_state(model, optimizers, owners, states, path):
    """Give the optimizers the state of a checkpoint, each rank that of its own parameters."""
    with readable(path, "a new run can begin with its weights, by --init_from"):
        optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            state = states[name]  # empty, where the run was stopped before its first step
            if any(t.dim() and t.shape != p.shape for t in state.values()):
                raise ValueError(f"the optimizer state of {name} does not fit its shape {tuple(p.shape)}")
            if state and owners.get(p, RANK) == RANK:
                optimizer_of[p].state[p] = {key: t.to(p) for key, t in state.items()}


# --------------------------------------------------------------------------------------------------
# The files of a run


def log(args, step, **figures):
    """Append a line `{step} {stream} {value}` for each figure; 9 digits hold a float32 exactly."""
    if RANK == 0 and args.max_steps > 0:
        with warn_only("training goes on without it"), open(Path(args.log_dir, "log.txt"), "a") as f:
            f.writelines(f"{step} {stream} {value:.9g}\n" for stream, value in figures.items())


def open_log(args, latest, config, loader):
    """Prepare log_dir. A new run moves the files of an earlier one into a new directory within it. A resumed
    run drops the lines of the log for the steps that it runs again. config.json records how to repeat it."""
    log_dir, log_file, now = Path(args.log_dir), Path(args.log_dir, "log.txt"), datetime.now()
    names = "latest.pt", "model_*.pt", "log.txt", "config.json"
    earlier = [path for name in names for path in log_dir.glob(name)]
    if earlier and not latest:
        backup = log_dir / f"earlier-{now:%Y%m%d-%H%M%S-%f}"
        backup.mkdir()
        for path in earlier:
            path.rename(backup / path.name)
        print0(f"files of an earlier run are now in {backup}; --resume goes on with a run")
    elif log_file.exists():
        with readable(log_file, "move it away"), open(log_file) as f:  # a crash may cut off the last line
            lines = [line for line in f if line.endswith("\n") and int(line.split()[0]) < latest["step"]]
        with complete_file(log_file) as f:
            f.write("".join(lines).encode())
    git, commit = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"], None
    with contextlib.suppress(OSError):  # git may be missing
        commit = subprocess.run([*git, "--exclude", "*"], capture_output=True, text=True).stdout.strip()
    settings = {name: value for name, value in vars(args).items() if name != "remembered"}
    write_json(log_dir / "config.json", {
        "command": sys.argv, "args": settings, "config": asdict(config), "world_size": WORLD_SIZE,
        "tokens_per_epoch": loader.rows_per_epoch * args.T, "shards": len(loader.shards), "commit": commit,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "versions": {"python": sys.version, "torch": torch.__version__},
        "started": f"{now:%Y-%m-%d %H:%M:%S}",
    })  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Evaluation. It takes the bare model, and leaves the randomness of training alone.


@torch.no_grad()
def validate(model, loader, args, stop):
    """Mean loss in nats a token over the first val_tokens tokens of the split. It ends early when `stop`, a
    list of signals, is not empty; the result is of no use then."""
    model.eval()
    loader.seek(0)
    rows = min(args.val_tokens // args.T, loader.rows_per_epoch)
    total = torch.zeros((), device=args.device)
    for first in range(RANK * loader.B, rows, WORLD_SIZE * loader.B):
        if stop:
            break
        x, y = (t[: rows - first] for t in loader.next_batch())
        with autocast(args):
            loss = model(x, y)[1]
        total += loss * len(x)
    model.train()
    return all_reduce(total).item() / rows


def print_samples(model, tokenizer, args):
    """Each rank continues the prompt num_samples times."""
    generator = torch.Generator(args.device).manual_seed(42 + RANK)
    prompt = torch.tensor(tokenizer.encode_ordinary(args.prompt), device=args.device)
    prompts = prompt.expand(args.num_samples, -1)
    with autocast(args):
        rows = model.generate(
            prompts, args.max_new_tokens, args.top_k, generator, args.temperature, n_vocab=tokenizer.n_vocab
        )
    with contextlib.suppress(OSError):  # as in print0, but on all ranks
        for i, row in enumerate(rows.tolist()):
            print(f"rank {RANK} sample {i}: {tokenizer.decode(row)}", flush=True)


def get_items(tokenizer, block_size):
    """HellaSwag's items, which rank 0 loads for all ranks; None where they can't be had."""
    items = [None]
    if RANK == 0 and tokenizer:
        with warn_only("training goes on without HellaSwag"):
            items = [hellaswag.load_items(hellaswag.download("val"), tokenizer, block_size)]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(items)
    return items[0]


# --------------------------------------------------------------------------------------------------
# The training loop

# FLOP/s of dense matrix products, from NVIDIA's data sheets and white papers: in bfloat16, added up in
# float32; in float32 for T4 and V100, which have no bfloat16. The first name found in the GPU's name counts.
PEAK_FLOPS = {
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "T4": 8.1e12, "V100": 15.7e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12,
}  # fmt: skip


def describe_speed(args, model, seconds):
    """The speed of a step: ms, tokens a second, and the share of the GPUs' peak (MFU) where that is known."""
    tokens_per_second = args.total_batch_size / seconds
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    # FLOPs of a token, forward and backward (PaLM paper, appendix B): 6 for each weight in a matrix product
    # (the position embedding is in none), and 12 * T * n_embd in each layer for attention.
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    flops = 6 * weights + 12 * model.config.n_layer * model.config.n_embd * args.T
    mfu = f", mfu {flops * tokens_per_second / (peak * WORLD_SIZE):.1%}" if peak else ""
    return f"{seconds * 1000:.0f} ms a step, {tokens_per_second:,.0f} tok/s{mfu}"


def print_next(args):
    """Print what a finished run has written, and commands that can come next, as they can be pasted."""
    paths = [Path(args.log_dir, name) for name in ("log.txt", f"model_{args.max_steps:05d}.pt", "latest.pt")]
    print0("files:", *(path for path in paths if path.exists()))
    if args.checkpoint_every:
        python = os.path.relpath(sys.executable)
        ranks = os.environ.get("LOCAL_WORLD_SIZE", 1)  # of this node: a run may go on with fewer
        launcher = python if WORLD_SIZE == 1 else f"torchrun --nproc_per_node={ranks}"
        resume = shlex.join([os.path.relpath(__file__), "--resume", "--log_dir", args.log_dir])
        print0(f"\nIts loss and samples:\n{python} {resume} --prompt 'The tide'")
        print0("\nTwice as many steps (the learning rate rises again):")
        print0(f"{launcher} {resume} --max_steps {2 * args.max_steps}")
    print0("\nIts curves: play.ipynb, with Jupyter")


def print_step(args, model, step, start, loss, lr, norm, seconds, elapsed):
    """Print a step's line if it is due. seconds: of this step; elapsed: since the first step of this process
    was done, which takes longer than the others."""
    seconds_left = elapsed / max(1, step - start) * (args.max_steps - step - 1)
    eta = timedelta(seconds=round(seconds_left)) if step > start else "unknown"
    if step == start + 10:  # by now the model is compiled
        print0(f"{describe_speed(args, model, seconds)}; eta {eta}")
    if args.print_every and (step % args.print_every == 0 or step + 1 == args.max_steps):
        figures = f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f}"
        print0(f"step {step:5d} | {figures} | {seconds * 1000:.0f} ms | eta {eta}")


def catch_signals(stack):
    """A list to which the time of each signal is added that asks this process to end (Windows has no SIGHUP).
    Another signal more than a second later ends it at once; a sooner one may be the same, which a terminal or
    Slurm has sent, and torchrun again. When the ExitStack closes, the earlier handlers are back."""
    received = []

    def receive(number, frame):
        received.append(time.monotonic())
        if received[-1] - received[0] > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, for one, ignores SIGHUP
            stack.callback(signal.signal, number, signal.signal(number, receive))
    return received


def any_rank(value):
    """Is `value` true on any rank? All ranks must call it, and none goes on before all have."""
    flag = torch.tensor(int(bool(value)))  # on the CPU, so no GPU is waited for
    return bool(all_reduce(flag, dist.ReduceOp.MAX))


def is_due(every, step, args):
    """Whether something that happens every so many steps (0: never) happens after `step` steps. The last step
    is always due."""
    return every and (step % every == 0 or step == args.max_steps)


def evaluate(step, args, model, val_loader, items, stop):
    """{stream: figure} of the evaluations that are due after `step` steps."""
    figures, saves = {}, is_due(args.checkpoint_every, step, args)  # checkpoints record val_loss
    if is_due(args.val_every, step, args) or (args.val_every and saves):
        figures["val"] = validate(model, val_loader, args, stop)
    if items and is_due(args.hellaswag_every, step, args):
        with autocast(args):
            guesses = hellaswag.evaluate(model, items, rank=RANK, world_size=WORLD_SIZE, stop=stop)
        figures["hella"] = hellaswag.accuracy(guesses, items)[1]
    return figures


def train(args, model, loader, val_loader, tokenizer, items, latest, stop):
    """Train from the step of `latest`, what latest.pt holds, else from step 0. A signal in `stop` ends it."""
    log_dir, start = Path(args.log_dir), latest["step"] if latest else 0
    optimizers = model.configure_optimizers(args.max_lr, args.weight_decay, args.optimizer == "muon")
    owners = {}
    if args.zero and WORLD_SIZE > 1:  # sorted by size, they go to the ranks in turn, for shares of like size
        owners = {p: i % WORLD_SIZE for i, p in enumerate(sorted(model.parameters(), key=torch.numel))}
    if latest:
        restore_state(model, optimizers, owners, latest.pop("optimizers"), log_dir / "latest.pt")
        loader.seek(start * args.total_batch_size // args.T)
    train_model = torch.compile(model) if args.compile else model  # the same weights
    if WORLD_SIZE > 1:
        train_model = DDP(train_model, gradient_as_bucket_view=True)  # the view saves a copy of the gradients

    def save(*names):  # the model after `step` steps of the loop below; all ranks must call it
        weights = {"model": model.state_dict(), "config": asdict(model.config), "step": step}
        weights["val_loss"] = figures.get("val")
        state = weights | {"optimizers": collect_state(model, optimizers, owners), "args": args.remembered}
        if RANK == 0 and args.checkpoint_every:
            for name in names:
                with complete_file(log_dir / name) as f:
                    torch.save(state if name == "latest.pt" else weights, f)

    for step in range(start, args.max_steps + 1):
        # Evaluate, sample and save the model after `step` steps.
        last = step == args.max_steps
        figures = evaluate(step, args, model, val_loader, items, stop)
        if any_rank(stop):
            figures = {}  # the evaluation may have ended early
            save("latest.pt")
            print0(f"stopped after {step} steps" + "; --resume goes on" * bool(args.checkpoint_every))
            return
        if figures:
            print0(f"step {step:5d}", *(f"| {name} {value:.4f}" for name, value in figures.items()))
            log(args, step, **figures)
        if tokenizer and is_due(args.sample_every, step, args) and (step > 0 or last):
            print_samples(model, tokenizer, args)
        if is_due(args.checkpoint_every, step, args) and step > start:
            # A full disk is a warning in mid-run, and an error at the end of the run.
            with contextlib.nullcontext() if last else warn_only("training goes on without it"):
                save(f"model_{step:05d}.pt", "latest.pt")
        if last:
            return

        # One step.
        t0 = time.perf_counter()
        lr = get_lr(step, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps)
        try:
            loss, norm = training_step(lr, args, train_model, optimizers, owners, loader)
        except UserError:  # a damaged shard. Several ranks can't save: the others may not have met it
            if WORLD_SIZE == 1:
                save("latest.pt")
            raise
        if not math.isfinite(loss + norm):
            raise UserError(f"step {step}: loss {loss}, norm {norm}: lower --max_lr, and begin again")
        now = time.perf_counter()
        begin = now if step == start else begin
        print_step(args, model, step, start, loss, lr, norm, now - t0, now - begin)
        log(args, step, train=loss, lr=lr, norm=norm)


# --------------------------------------------------------------------------------------------------
# Set-up


@contextlib.contextmanager
def enough_memory(args):
    """Memory that can't be had, on a GPU or for a tensor on the CPU, is an error that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # PyTorch's error of a CPU has no type of its own
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            raise
        mend = f"--B {args.B // 2}, which gives the same curve" if (args.B or 1) > 1 else "a smaller model"
        raise UserError(f"out of memory{f' with --B {args.B}' if args.B else ''}: try {mend}") from None


def micro_batch_size(args, model):
    """The rows of a micro batch: the largest divisor of a rank's rows of a step that is not above --B or,
    without the flag, not above what is likely to fit into the memory of the GPU (8 GB, without one)."""
    B = args.B
    if not B:
        config, n_params = model.config, sum(p.numel() for p in model.parameters())
        memory = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 8e9  # bytes that are free
        # Bytes: gradients, AdamW's two moments and a copy in bfloat16 of each parameter; what autograd saves
        # for each layer and channel of a token, as a test counts it; three copies of the logits in float32.
        state, saved = (4 + 8 + 2) * n_params, 36 if args.dtype == "bfloat16" else 64
        row = args.T * (saved * config.n_layer * config.n_embd + 12 * config.vocab_size)
        fits = torch.tensor(max(1.0, (0.9 * memory - state) / row))
        B = 2 ** int(math.log2(all_reduce(fits, dist.ReduceOp.MIN)))  # the ranks agree: their GPUs may differ
    rows = args.total_batch_size // (args.T * WORLD_SIZE)
    return next(b for b in range(min(B, rows), 0, -1) if rows % b == 0)


def create_model(args, source, data):
    """A new model, or `source`, the model to begin with, with more layers if the flags say so."""
    if not source:  # vocab_size is rounded up to a multiple of 128, for fast kernels: 50,257 becomes 50,304
        vocab_size = -(-data.n_vocab // 128) * 128
        shape = args.T, vocab_size, args.n_layer, args.n_head, args.n_embd
        return GPT(GPTConfig(*shape, args.dropout, data.tokenizer))
    config, origin = source.config, args.init_from
    for name in SHAPE:
        has, wanted = getattr(config, name), getattr(args, name) or getattr(config, name)
        if wanted < has or (wanted > has and name != "n_layer"):  # a model grows in layers only
            raise UserError(f"{origin} has {name} {has}, not {wanted}: leave --{name} out")
    has, wanted = config.tokenizer, data.tokenizer
    same = has == wanted
    if {has, wanted}.isdisjoint({"gpt2", "bytes"}):  # two files; the model's may have been moved away
        same = not Path(has).exists() or get_tokenizer(has).bpe.to_str() == get_tokenizer(wanted).bpe.to_str()
    if not same:
        raise UserError(f"{origin} has the tokenizer {has}, and {args.data} has {wanted}: use data of that")
    source.config = replace(config, tokenizer=data.tokenizer)
    return grow(source, args.n_layer or config.n_layer, args.dropout)


def main(argv=None):
    args, latest = parse_args(argv)
    cuda, tokenizer, items = args.device == "cuda", None, None
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)  # from here on, "cuda" means this GPU
    if WORLD_SIZE > 1:  # gloo for tensors on CPUs, NCCL for those on GPUs, which connect to each other here
        device = torch.device("cuda", LOCAL_RANK) if cuda else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device)
    # fork_rng gives a caller of main() the state of the random numbers back as it was.
    with torch.random.fork_rng([LOCAL_RANK] if cuda else []), contextlib.ExitStack() as stack:
        stack.enter_context(enough_memory(args))
        torch.manual_seed(args.seed)
        source = load_model(args.init_from, latest) if args.init_from else None
        if Path(args.data).is_dir():
            data = find_shards(args.data)
        else:
            own = source.config.tokenizer if source else "gpt2"
            data = load_text(args.data, get_tokenizer(args.tokenizer or own))
        model = create_model(args, source, data).to(args.device).train()
        del source
        if latest:
            del latest["model"]  # the weights are in the model now; on 8 ranks, copies take much memory
        config = model.config
        args.remembered |= {name: getattr(config, name) for name in SHAPE}
        args.B = micro_batch_size(args, model)
        with warn_only("there will be no samples and no HellaSwag"):
            tokenizer = get_tokenizer(data.tokenizer)
        if args.hellaswag_every:
            items = get_items(tokenizer, config.block_size)
        layout = args.B, args.T, RANK, WORLD_SIZE, min(data.n_vocab, config.vocab_size)
        loader = DataLoaderLite(data.train, *layout, args.seed, args.shuffle, data.eot, args.device)
        val_loader = DataLoaderLite(data.val, *layout, device=args.device)
        args.shards = args.remembered["shards"] = {Path(name).name: n for name, n in loader.sizes.items()}
        for name in FIXED:
            if latest and getattr(args, name) != (before := latest["args"].get(name)):
                raise UserError(f"--resume: {name} was {before!s:.80}, and can't change within a run")
        if args.T > config.block_size:
            raise UserError(f"--T {args.T} is longer than the model's context: at most {config.block_size}")
        if args.max_steps > 0:  # --max_steps 0 looks at a model, and writes nothing
            if RANK == 0:
                stack.enter_context(locked(args.log_dir))
            any_rank(False)  # all ranks wait here until each has read what it needs from log_dir
            if RANK == 0:
                open_log(args, latest, config, loader)
        n_params, n_tokens = sum(p.numel() for p in model.parameters()), loader.rows_per_epoch * args.T
        print0(f"model: {args.init_from or args.model}, {n_params:,} parameters; log in {args.log_dir}")
        print0(f"data: {args.data}, {n_tokens:,} tokens in an epoch")
        print0(f"batch: {args.total_batch_size:,} tokens a step, {args.B} x {args.T} at a time")
        print0(f"device: {WORLD_SIZE} x {args.device}, {args.dtype}{', compiled' if args.compile else ''}")
        stop = catch_signals(stack) if args.max_steps > 0 else []
        train(args, model, loader, val_loader, tokenizer, items, latest, stop)
        if args.max_steps > 0 and not stop:
            print_next(args)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def set_up_process():
    """Settings for speed. They are not in `main`, because they change the process for good."""
    torch.backends.cuda.matmul.allow_tf32 = True  # matrix products that stay float32 use TF32 units
    # Let glibc keep what is freed. It would give each large tensor back to the system, and the next one would
    # be mapped and cleared page by page: a third of a step's time on a CPU. Other systems do not need it.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie free


if __name__ == "__main__":
    set_up_process()
    run(main)
