"""GPT-2, built and trained in one file that is read from top to bottom.

    python train_gpt2.py   # 124M on edu_fineweb10B/, or a tiny GPT on input.txt
    torchrun --nproc_per_node=8 train_gpt2.py   # the same, on eight GPUs
    torchrun --nproc_per_node=8 train_gpt2.py --resume   # go on after a stop

Notable choices:
- Parameters have the names of Hugging Face's GPT-2, so weights move over by
  name, in both directions.
- The learning rate, the position in the data and the random seeds are
  functions of the step. To resume is to load a checkpoint and begin at its
  step, and any number of processes trains on the same batches.
- `train_model` is compiled and wrapped in DistributedDataParallel, and only
  trains. Everything else uses `model`, the bare module with the same weights.
"""

import argparse
import contextlib
import ctypes
import functools
import math
import os
import signal
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

# readable makes any error with a file a UserError, one line that says what to do. complete_file replaces a
# file when all of it is written. find_shards and load_text return Data; its train and val are {name: shard}.
import hellaswag
from fineweb import RANK, UserError, complete_file, find_shards, get_tokenizer, load_text, locked, make_parser
from fineweb import open_shard, print0, readable, run, save_tokenizer, warn_only, write_json

# torchrun starts several processes and sets these in each, and RANK. Without it there is one, with rank 0.
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # number of this process on its node, and of its GPU
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # number of processes on all nodes; RANK counts them

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
        self.n_head, self.dropout = config.n_head, nn.Dropout(config.dropout)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        # Heads become a batch dimension: q, k and v are (B, n_head, T, head_size).
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)  # fused: no (T, T) in memory
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token is processed by itself."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # the approximation with which GPT-2 was trained
        return self.dropout(self.c_proj(x))


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
        # Normal with standard deviation 0.02 (GPT-2's code, whose wpe has 0.01), biases 0. It is smaller for
        # the two layers by which a block adds to the stream, which else would grow with depth (paper, 2.3).
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        for name, p in self.named_parameters():  # the tied tensor has one name here, so it is drawn once
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # the weights of norms are vectors, and stay 1
                nn.init.normal_(p, std=residual_std if name.endswith("c_proj.weight") else 0.02)

    def hidden(self, idx):
        """idx: int64 (B, T), T <= block_size. Returns the final hidden states, float (B, T, n_embd)."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens are more than block_size, {self.config.block_size}"
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets: int64 (B, T). Returns logits (B, T, vocab_size), and the mean cross entropy in nats,
        a float32 scalar; without targets the loss is None."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        # The softmax is in float32, because bfloat16 has three digits. The returned logits have no gradient:
        # without detach, a compiled model would compute one for them, too, which is all zeros.
        return logits.detach(), F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, top_k=50, generator=None, temperature=1.0, n_vocab=None):
        """Continue idx, int64 (B, T): returns int64 (B, T + max_new_tokens). Each token is drawn from the
        top_k most likely ids below n_vocab (default: all, padding too), given the last block_size tokens."""
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
        matrices = [p for p in self.transformer.h.parameters() if p.dim() >= 2]
        embeddings = [self.transformer.wte.weight, self.transformer.wpe.weight]
        decay = embeddings if muon else embeddings + matrices
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        optimizers = [torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
        if muon:
            optimizers.append(torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """The model of a name on the Hugging Face hub ("gpt2", ... "gpt2-xl"), of a directory that
        save_pretrained wrote, or of a .pt file. UserError for anything but GPT-2, and for variants of it."""
        if str(name_or_dir).endswith(".pt"):
            return cls.from_checkpoint(name_or_dir)
        from transformers import GPT2Config, GPT2LMHeadModel

        with readable(name_or_dir, "give a released name, or a directory that save_pretrained wrote"):
            hf, info = GPT2LMHeadModel.from_pretrained(name_or_dir, output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError(f"{sorted(info['missing_keys'])[0]} is missing")
            c, released = hf.config, GPT2Config()
            for field in ("activation_function", "layer_norm_epsilon", "n_inner", "scale_attn_weights",
                          "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):  # fmt: skip
                if (value := getattr(c, field)) != getattr(released, field):
                    raise ValueError(f"{field} is {value}, but in this model {getattr(released, field)}")
            # save_pretrained adds the field "tokenizer". Others have GPT-2's if they have as many tokens.
            guess = "gpt2" if c.vocab_size in (50257, 50304) else "tokenizer.json"
            tokenizer = getattr(c, "tokenizer", guess)
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
        hf.save_pretrained(directory)
        save_tokenizer(tokenizer, directory, c.block_size)

    @classmethod
    def from_checkpoint(cls, path):
        """The model in a .pt file that training wrote, this script's or the lecture's."""
        return load_checkpoint(path)["model"]


def transpose_conv1d(state):
    """Hugging Face has four weights of a block as (in, out), nn.Linear has (out, in): transpose them."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {name: w.t() if name.endswith(conv1d) else w for name, w in state.items()}


def load_checkpoint(path, mend="give a checkpoint that training wrote"):
    """The dict that a .pt file holds, but its "model" is a GPT in eval mode, made from the weights and from
    "config". The file is read as plain data: no code in it is run. UserError if it is damaged or foreign."""
    with readable(path, mend), zipfile.ZipFile(path) as file:
        if damaged := file.testzip():  # torch.load does not verify the checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
        # The lecture's script pickled an instance of its class __main__.GPTConfig: read it as one of ours.
        with torch.serialization.safe_globals([(GPTConfig, "__main__.GPTConfig")]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = checkpoint.pop("config"), checkpoint["model"]
        config = config if isinstance(config, GPTConfig) else GPTConfig(**config)
        model = GPT(config)
        # torch.compile put this prefix before the names of the lecture's checkpoints.
        model.load_state_dict({name.removeprefix("_orig_mod."): w for name, w in weights.items()})
        return checkpoint | {"model": model.eval()}


# --------------------------------------------------------------------------------------------------
# Settings: the flags, and presets of their values

# What differs from GPT-2 124M, whose values are the defaults of the flags. GPT-2's sizes have the rates and
# warmup of the GPT-3 paper (table 2.1, appendix B; --T 2048 there). gpt-580m and gpt-760m: see the README.
PRESETS = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "max_lr": 3e-4},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "max_lr": 2.5e-4},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "max_lr": 2e-4, "total_batch_size": 2**20,
                "max_steps": 9536, "warmup_steps": 357},  # 1558M
    "gpt-580m": {"n_layer": 18, "n_embd": 1536, "max_lr": 2.5e-4, "warmup_steps": 2000, "max_steps": 97000},
    "gpt-760m": {"n_layer": 24, "n_embd": 1536, "max_lr": 2e-4, "warmup_steps": 2000, "max_steps": 82000,
                 "dropout": 0.1},
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "T": 128, "total_batch_size": 2**11, "max_lr": 2e-3,
             "max_steps": 1000, "warmup_steps": 50, "val_every": 100, "hellaswag_every": 0,
             "sample_every": 500, "prompt": "Tamsin Vane:", "num_samples": 2, "max_new_tokens": 200,
             "print_every": 20, "tokenizer": "bytes"},
}  # fmt: skip
SHAPE = ("n_layer", "n_head", "n_embd")
# What --resume can't change. "shards" is no flag: main() records there the names and sizes of the shards.
FIXED = ("model", *SHAPE, "T", "total_batch_size", "seed", "shuffle", "optimizer", "shards")


def build_parser():
    parser = make_parser(__doc__)

    def flag(name, kind, default, help, group=parser, **options):
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction  # --name and --no-name
        elif kind is not str:
            options |= {"type": kind, "metavar": "N" if kind is int else "X"}
        help += "" if default is None else f" ({default})"
        group.add_argument(f"--{name}", default=default, help=help, **options)

    data = "edu_fineweb10B" if any(Path("edu_fineweb10B").glob("*train*")) else "input.txt"
    flag("data", str, data, "directory of shards (edu_fineweb10B if it exists) or text file")
    flag("tokenizer", str, None, "for text (shards bring theirs): gpt2, bytes or a tokenizer.json")
    flag("shuffle", bool, True, "a new order of shards and documents in every epoch")
    flag("model", str, None, "preset (gpt2 for shards, else tiny)", choices=PRESETS)
    flag("n_layer", int, 12, "layers; with --init_from, the model grows if the weights have fewer")
    flag("n_head", int, 12, "attention heads")
    flag("n_embd", int, 768, "width of the residual stream")
    flag("dropout", float, 0.0, "probability, on attention weights and the output of each attention and MLP")
    flag("B", int, 0, "micro batch: rows in a forward pass, at most; does not change a step; 0: what fits")
    flag("T", int, 1024, "tokens in a row")
    flag("total_batch_size", int, 2**19, "tokens in a step, over all micro steps and ranks")
    flag("max_steps", int, 10**10 // 2**19, "steps of the whole run")
    flag("warmup_steps", int, 375 * 10**6 // 2**19, "steps of rising learning rate")
    flag("max_lr", float, 6e-4, "learning rate after warmup")
    flag("min_lr", float, None, "learning rate at the end (max_lr / 10)")
    flag("optimizer", str, "adamw", "muon: for the matrices of the blocks", choices=("adamw", "muon"))
    flag("zero", bool, False, "shard the optimizer's state over the ranks")
    flag("weight_decay", float, 0.1, "on matrices and embeddings")
    flag("grad_clip", float, 1.0, "the gradient is scaled down to this global norm, 0: never")
    flag("val_every", int, 250, "steps between validations, 0: never")
    flag("val_tokens", int, 20 * 2**19, "tokens in one validation, at most the whole split")
    flag("hellaswag_every", int, 250, "steps between HellaSwag evaluations, 0: never")
    flag("sample_every", int, 250, "steps between samples, 0: never")
    flag("prompt", str, "Hello, I'm a language model,", "text that samples continue")
    flag("num_samples", int, 5, "samples on each rank")
    flag("max_new_tokens", int, 22, "tokens of a sample")
    flag("top_k", int, 50, "sample from the k most likely tokens")
    flag("temperature", float, 1.0, "sampling temperature: below 1 is more predictable, above 1 more random")
    flag("seed", int, 42, "random seed of initial weights, data order and dropout")
    flag("device", str, None, "(the fastest there is for every process)", choices=("cpu", "cuda", "mps"))
    flag("dtype", str, None, "(bfloat16 on a GPU that computes with it)", choices=("float32", "bfloat16"))
    flag("compile", bool, None, "torch.compile: a minute's wait, then faster steps (on cuda)")
    flag("print_every", int, 1, "steps between printed lines, 0: none; log.txt has all steps")
    flag("checkpoint_every", int, 5000, "steps between checkpoints, 0: only when a signal stops the run")
    flag("log_dir", str, "log", "directory for log.txt and checkpoints")
    start = parser.add_mutually_exclusive_group()
    flag("resume", bool, False, "go on from log_dir/latest.pt; flags left out are as they were", start)
    flag("init_from", str, None, "begin with weights: a released name, Hugging Face directory or .pt", start)
    return parser


def parse_args(argv=None):
    """The settings, and with --resume the contents of latest.pt, else None. The flags are parsed twice: first
    to find the preset or latest.pt, whose values are then the defaults of the flags that are not typed."""
    parser, latest = build_parser(), None
    args = parser.parse_args(argv)
    if args.resume:
        path = Path(args.log_dir, "latest.pt")
        latest = load_checkpoint(path, "without it a run can't go on: begin one in another --log_dir")
        with readable(path, "a new run can begin with its weights, by --init_from"):
            parser.set_defaults(**latest["args"] | {"log_dir": args.log_dir})
    else:
        model = args.model or ("gpt2" if Path(args.data).is_dir() else "tiny")
        parser.set_defaults(model=model, **PRESETS[model])
        if args.init_from:  # the weights bring their tokenizer and, if no --model is typed, their shape
            shape = {} if args.model else dict.fromkeys(SHAPE)
            parser.set_defaults(tokenizer=None, **shape)
    args = parser.parse_args(argv)

    args.min_lr = args.max_lr / 10 if args.min_lr is None else args.min_lr
    lowest = dict.fromkeys((*SHAPE, "T", "total_batch_size", "num_samples", "top_k"), 1)
    lowest |= {"val_tokens": args.T, "temperature": 1e-3, "max_steps": latest["step"] if latest else 0}
    for name, value in vars(args).items():
        low, high = lowest.get(name, 0), (1 if name == "dropout" else 2**31)
        if type(value) in (int, float) and not low <= value < high:
            parser.error(f"--{name} {value} is out of range: it must be at least {low}, and below {high}")
    if args.min_lr > args.max_lr:
        parser.error(f"--min_lr {args.min_lr} is above --max_lr {args.max_lr}: give both")
    if args.total_batch_size % (unit := args.T * WORLD_SIZE):
        parser.error(f"--total_batch_size {args.total_batch_size} is no multiple of T * ranks, {unit}")
    has_gpus = torch.accelerator.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # one each
    fastest = torch.accelerator.current_accelerator().type if has_gpus else "cpu"
    args.device = args.device or fastest
    if args.device not in (fastest, "cpu"):
        parser.error(f"--device {args.device} is not there for every process: use --device {fastest}")
    has_bfloat16 = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype or ("bfloat16" if has_bfloat16 else "float32")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    return args, latest


# --------------------------------------------------------------------------------------------------
# The data loader: the seed and the number of a row decide which tokens it has


class DataLoaderLite:
    """Batches of rows of T tokens from the shards of a split, {name: path, or the tokens themselves}. Rows
    of a run are numbered through all epochs, and dealt out B at a time: with B = 2 and two ranks, rank 0 has
    rows 0, 1, 4, 5, ... and rank 1 has 2, 3, 6, 7, .... So a step has the same rows for any B and number of
    ranks. With shuffle, shards and the documents in them, which begin with eot, have another order in each
    epoch. A shard's last tokens are left out if they fill no row. UserError for a token >= n_vocab."""

    def __init__(self, shards, B, T, rank=0, world_size=1, n_vocab=50257, seed=0, shuffle=False, eot=50256,
                 device="cpu"):  # fmt: skip
        self.shards, self.B, self.T, self.rank, self.world_size = list(shards.items()), B, T, rank, world_size
        self.n_vocab, self.seed, self.shuffle, self.eot, self.device = n_vocab, seed, shuffle, eot, device
        self.sizes = {name: len(open_shard(shard)) for name, shard in self.shards}  # in tokens
        self.shard_rows = [max(n - 1, 0) // T for n in self.sizes.values()]  # the last token is only a target
        self.rows_per_epoch = sum(self.shard_rows)
        if not self.rows_per_epoch:
            raise UserError(f"{self.shards[0][0]}: no row of {T + 1} tokens: lower --T or give more data")
        self.read_shard = functools.lru_cache(1)(self.read_shard)  # the next row is mostly in the same shard
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
            if row < self.shard_rows[i]:
                break
            row -= self.shard_rows[i]
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
# One training step, and the state of the optimizers. With --zero it is sharded over the ranks: `owners` says
# which rank has the state of a parameter, {parameter: rank}. Without --zero, `owners` is {}.


def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """Learning rate of a step, counted from 0: linear warmup, then half a cosine down to min_lr at max_steps
    (GPT-3 paper, appendix B). Step 0 has max_lr / warmup_steps, because a rate of 0 would waste it."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Replace a tensor by its sum over all ranks (or by op, such as the minimum). All ranks must call it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, op)
    return tensor


def autocast(args):
    """For forward passes: their matrix products may be bfloat16. Weights and optimizer state are float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def training_step(step, args, train_model, optimizers, owners, loader):
    """Forward and backward over the micro batches of a step, clipping, update. Returns the learning rate, the
    mean cross entropy over all micro steps and ranks, and the norm of the gradient before clipping."""
    lr = get_lr(step, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps)
    grad_accum_steps = args.total_batch_size // (loader.B * args.T * WORLD_SIZE)
    loss_accum = torch.zeros((), device=args.device)
    for micro_step in range(grad_accum_steps):
        torch.manual_seed(args.seed + loader.row)  # so that a resumed run draws the same dropout masks
        x, y = loader.next_batch()
        if WORLD_SIZE > 1:  # only the last backward averages gradients over ranks; forward prepares for it
            train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with autocast(args):
            loss = train_model(x, y)[1]  # no name for the logits, which would keep them in memory
        loss = loss / grad_accum_steps  # gradients add up over micro steps, but the objective is a mean
        loss.backward()
        loss_accum += loss.detach()
    norm = nn.utils.clip_grad_norm_(train_model.parameters(), args.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for p, owner in owners.items():
        dist.broadcast(p.detach(), owner)  # every rank gets the parameter that its owner has updated
    train_model.zero_grad(set_to_none=WORLD_SIZE == 1)  # with None, .grad would no longer be DDP's buffer
    return lr, *torch.stack((all_reduce(loss_accum) / WORLD_SIZE, norm)).tolist()  # the CPU waits only here


def shard_optimizers(model, optimizers):
    """ZeRO stage 1 (Rajbhandari et al. 2020): a parameter stays in the optimizers of one rank, its owner."""
    owners = {p: i % WORLD_SIZE for i, p in enumerate(sorted(model.parameters(), key=torch.numel))}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["params"] = [p for p in group["params"] if owners[p] == RANK]
    return owners


def collect_state(model, optimizers, owners):
    """{parameter's name: its state, {"exp_avg": tensor, ...}} on rank 0, else {}. All ranks must call it."""
    states = {}
    for name, p in model.named_parameters() if owners or RANK == 0 else ():
        state = [{key: t.cpu() for optimizer in optimizers for key, t in optimizer.state.get(p, {}).items()}]
        if owners:
            dist.broadcast_object_list(state, owners[p])  # in place: now all ranks have the owner's
        if RANK == 0:  # the others hold only one tensor's state at a time beside their own
            states[name] = state[0]
    return states


def restore_state(model, optimizers, latest, path):
    """Give the optimizers the state of a checkpoint, of the parameters that they have on this rank."""
    with readable(path, "a new run can begin with its weights, by --init_from"):
        optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            state = latest["optimizers"].pop(name)  # empty if the run was stopped before its first step
            if any(t.dim() and t.shape != p.shape for t in state.values()):  # it would crash the process
                raise ValueError(f"the optimizer state of {name} does not fit its shape {tuple(p.shape)}")
            if state and p in optimizer_of:
                optimizer_of[p].state[p] = {key: t.to(p) for key, t in state.items()}


# --------------------------------------------------------------------------------------------------
# What a run writes and prints. Evaluation takes the bare model, and leaves the randomness of training alone.


def log(args, step, **figures):
    """Append lines `{step} {stream} {value}`; 9 digits hold a float32. With --max_steps 0 there are none."""
    if RANK == 0 and args.max_steps > 0:
        with warn_only("training goes on without it"), open(Path(args.log_dir, "log.txt"), "a") as f:
            f.writelines(f"{step} {stream} {value:.9g}\n" for stream, value in figures.items())


def prepare_log_dir(args, latest, tokens_per_epoch):
    """A resumed run drops the lines of the log for the steps that it runs again, and a new run needs a
    directory without a run. config.json records the settings."""
    log_file = Path(args.log_dir, "log.txt")
    if log_file.exists() and not latest:
        raise UserError(f"{args.log_dir} has a run: --resume goes on with it, another --log_dir begins anew")
    if log_file.exists():
        with readable(log_file, "move it away"), open(log_file) as f:  # a crash may cut off the last line
            lines = [line for line in f if line.endswith("\n") and int(line.split()[0]) < latest["step"]]
        with complete_file(log_file) as f:
            f.write("".join(lines).encode())
    settings = {"args": vars(args), "tokens_per_epoch": tokens_per_epoch, "world_size": WORLD_SIZE}
    write_json(log_file.with_name("config.json"), settings | {"torch": torch.__version__})


def catch_signals(stack):
    """A list that gets the time of each signal that asks this process to end. A second one ends it at once,
    unless it comes within a second: it may be the same one, sent by both Slurm and torchrun."""
    received = []

    def receive(number, frame):
        received.append(time.monotonic())
        if received[-1] - received[0] > 1:
            os._exit(128 + number)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:  # not on Windows
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, for one, ignores SIGHUP
            stack.callback(signal.signal, number, signal.signal(number, receive))  # restored by the stack
    return received


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
            total += model(x, y)[1] * len(x)
    model.train()
    return all_reduce(total).item() / rows


def print_samples(model, tokenizer, args):
    """Each rank continues the prompt num_samples times."""
    generator = torch.Generator(args.device).manual_seed(42 + RANK)
    prompt = torch.tensor(tokenizer.encode_ordinary(args.prompt), device=args.device)
    sampling = args.max_new_tokens, args.top_k, generator, args.temperature, tokenizer.n_vocab
    with autocast(args):
        rows = model.generate(prompt.expand(args.num_samples, -1), *sampling).tolist()
    for i, row in enumerate(rows):
        print0(f"rank {RANK} sample {i}: {tokenizer.decode(row)}", rank=RANK)


# --------------------------------------------------------------------------------------------------
# The training loop


def train(args, model, loader, val_loader, tokenizer, items, latest, stop):
    """Train from the step of `latest`, what latest.pt holds, else from step 0. A signal in `stop` ends it."""
    start = latest["step"] if latest else 0
    optimizers = model.configure_optimizers(args.max_lr, args.weight_decay, args.optimizer == "muon")
    owners = shard_optimizers(model, optimizers) if args.zero and WORLD_SIZE > 1 else {}
    if latest:
        restore_state(model, optimizers, latest, Path(args.log_dir, "latest.pt"))
        loader.seek(start * args.total_batch_size // args.T)
    train_model = torch.compile(model) if args.compile else model  # the same weights
    if WORLD_SIZE > 1:
        train_model = DDP(train_model, gradient_as_bucket_view=True)  # .grad is the buffer that is sent

    def due(step, every):  # every so many steps, and after the last one; 0 means never
        return every and (step % every == 0 or step == args.max_steps)

    def save(step, val, *names):  # all ranks must call it
        plain = {"model": model.state_dict(), "config": asdict(model.config), "step": step, "val_loss": val}
        everything = plain | {"optimizers": collect_state(model, optimizers, owners), "args": vars(args)}
        for name in names if RANK == 0 else ():
            with complete_file(Path(args.log_dir, name)) as f:
                torch.save(everything if name == "latest.pt" else plain, f)

    for step in range(start, args.max_steps + 1):
        # Evaluate, sample and save the model after `step` steps.
        figures, last = {}, step == args.max_steps
        if due(step, args.val_every):
            figures["val"] = validate(model, val_loader, args, stop)
        if items and due(step, args.hellaswag_every):
            with autocast(args):
                guesses = hellaswag.evaluate(model, items, rank=RANK, world_size=WORLD_SIZE, stop=stop)
            _acc, figures["hella"] = hellaswag.accuracy(guesses, items)  # the second is acc_norm
        if all_reduce(torch.tensor(len(stop))):  # on the CPU, so that no GPU is waited for
            save(step, None, "latest.pt")  # without figures, because an evaluation may have ended early
            return print0(f"stopped after {step} steps; --resume goes on")
        if figures:
            print0(f"step {step:5d}", *(f"| {name} {value:.4f}" for name, value in figures.items()))
            log(args, step, **figures)
        if tokenizer and due(step, args.sample_every) and (step > 0 or last):
            print_samples(model, tokenizer, args)
        if due(step, args.checkpoint_every) and step > 0:
            # A full disk must not end training, but a last checkpoint that can't be written is an error.
            with contextlib.nullcontext() if last else warn_only("training goes on without it"):
                save(step, figures.get("val"), f"model_{step:05d}.pt", "latest.pt")
        if last:
            return

        # One step.
        t0 = time.perf_counter()
        lr, loss, norm = training_step(step, args, train_model, optimizers, owners, loader)
        if not math.isfinite(loss + norm):
            raise UserError(f"step {step}: loss {loss}, norm {norm}: lower --max_lr (new run or --resume)")
        log(args, step, train=loss, lr=lr, norm=norm)
        if due(step, args.print_every):
            speed = args.total_batch_size / (time.perf_counter() - t0)  # tokens a second
            eta = timedelta(seconds=(args.max_steps - step - 1) * args.total_batch_size // speed)
            line = f"step {step:5d} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f}"
            print0(f"{line} | {speed:,.0f} tok/s | eta {eta}")


# --------------------------------------------------------------------------------------------------
# Set-up


def micro_batch_size(args, n_params, vocab_size):
    """Rows of a micro batch, the same on all ranks: the largest divisor of a rank's rows of a step up to --B
    or, if that is 0, up to an estimate of what fits into each GPU's free memory (8 GB without a GPU)."""
    memory = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 8e9  # bytes that are free
    bytes_per_row = args.T * max(10 * n_params / 1024, 16 * vocab_size)  # in a small model most are logits
    fits = all_reduce(torch.tensor(args.B or max(1.0, memory / bytes_per_row)), dist.ReduceOp.MIN)
    rows = args.total_batch_size // (args.T * WORLD_SIZE)
    return max(b for b in range(1, rows + 1) if b <= fits and rows % b == 0)


def create_model(args, source, data):
    """A new model, or a copy of `source` that may have more layers: with L before, layer j begins as layer
    floor(j * L / n_layer), the best way in the Gopher paper (section G.3.3). Sets the shape in args."""
    if not source:  # vocab_size is rounded up to a multiple of 128, for fast kernels: 50,257 becomes 50,304
        shape = args.T, -(-data.n_vocab // 128) * 128, args.n_layer, args.n_head, args.n_embd
        return GPT(GPTConfig(*shape, args.dropout, data.tokenizer))
    config, origin = source.config, args.init_from or args.log_dir
    for name in SHAPE:
        old, new = getattr(config, name), getattr(args, name) or getattr(config, name)
        if new < old or (new > old and name != "n_layer"):  # a model grows in layers only
            raise UserError(f"{origin} has {name} {old}, not {new}: leave out --{name} or --model")
        setattr(args, name, new)
    if args.T > config.block_size:
        raise UserError(f"--T {args.T} is longer than the model's context: at most {config.block_size}")
    old, new = config.tokenizer, data.tokenizer
    if old != new and {old, new} & {"gpt2", "bytes"}:  # the same tokenizer.json may be at two paths
        raise UserError(f"{origin} has the tokenizer {old}, {args.data} has {new}: use data of {old}")
    layers = [j * config.n_layer // args.n_layer for j in range(args.n_layer)]
    if args.n_layer > config.n_layer:
        print0(f"grown from {config.n_layer} to {args.n_layer} layers, which begin as {str(layers)[1:-1]}")
    source.transformer.h = nn.ModuleList(source.transformer.h[i] for i in layers)
    model = GPT(replace(config, n_layer=args.n_layer, dropout=args.dropout, tokenizer=data.tokenizer))
    model.load_state_dict(source.state_dict())
    return model


def main(argv=None):
    args, latest = parse_args(argv)
    cuda, tokenizer, items, stop = args.device == "cuda", None, None, []
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)  # from here on, "cuda" means this GPU
    if WORLD_SIZE > 1:  # gloo for tensors on CPUs, NCCL for those on GPUs, which connect to each other here
        device = torch.device("cuda", LOCAL_RANK) if cuda else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device)
    with contextlib.ExitStack() as stack:  # it unlocks log_dir and restores the signals' handlers
        torch.manual_seed(args.seed)
        source = latest.pop("model") if latest else None  # the model to begin with
        if args.init_from and not latest:
            source = GPT.from_pretrained(args.init_from)
        is_dir = Path(args.data).is_dir()
        name = args.tokenizer or (source.config.tokenizer if source else "gpt2")
        data = find_shards(args.data) if is_dir else load_text(args.data, get_tokenizer(name))
        model = create_model(args, source, data)
        del source
        n_params = sum(p.numel() for p in model.parameters())
        B = micro_batch_size(args, n_params, model.config.vocab_size)
        with warn_only("there will be no samples and no HellaSwag"):
            tokenizer = get_tokenizer(data.tokenizer)
        if args.hellaswag_every:
            items = hellaswag.load_items_on_all_ranks(tokenizer, model.config.block_size)
        common = B, args.T, RANK, WORLD_SIZE, min(data.n_vocab, model.config.vocab_size)
        loader = DataLoaderLite(data.train, *common, args.seed, args.shuffle, data.eot, args.device)
        val_loader = DataLoaderLite(data.val, *common, device=args.device)
        args.tokenizer, args.shards = data.tokenizer, {Path(k).name: n for k, n in loader.sizes.items()}
        for name in FIXED:
            if latest and getattr(args, name) != (before := latest["args"].get(name)):
                raise UserError(f"--resume: {name} was {before!s:.80}, and can't change within a run")
        n_tokens = loader.rows_per_epoch * args.T
        if args.max_steps > 0:  # --max_steps 0 looks at a model, and writes nothing
            if RANK == 0:
                stack.enter_context(locked(args.log_dir))
                prepare_log_dir(args, latest, n_tokens)
            all_reduce(torch.zeros(1))  # the others wait here for rank 0, and end if it had an error
            stop = catch_signals(stack)
        print0(f"model: {args.init_from or args.model}, {n_params:,} parameters; log in {args.log_dir}")
        print0(f"data: {args.data}, {n_tokens:,} tokens in an epoch, {args.total_batch_size:,} in a step")
        print0(f"device: {WORLD_SIZE} x {args.device}, {args.dtype}, {B} x {args.T} tokens at a time")
        try:
            train(args, model.to(args.device), loader, val_loader, tokenizer, items, latest, stop)
        except torch.OutOfMemoryError:
            raise UserError(f"out of memory with --B {B}: lower --B, for the same curve, or --T") from None
        except torch._dynamo.exc.TorchDynamoException as e:  # there may be no C compiler, or no Triton
            raise UserError(f"torch.compile failed ({e!s:.150}): use --no-compile") from None
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = True  # matrix products that stay float32 use TF32 units
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory: faster steps on a CPU
        ctypes.CDLL("libc.so.6").mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        ctypes.CDLL("libc.so.6").mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie free
    run(main)
