"""GPT-2, built, trained and judged in one file, to be read from the first line to the last."""

from dataclasses import dataclass

import torch.nn as nn

# ----------------------------------------------------------------------------------------------------------------------
# The model. A clean residual stream that attention and MLP read from and add to, once each in every block.


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M as released."""

    block_size: int = 1024  # longest sequence: rows of the position embedding
    vocab_size: int = 50257  # 50,000 merges + 256 bytes + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    """Tokens communicate: each gathers from itself and the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)


class MLP(nn.Module):
    """Each token thinks by itself about what it gathered."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)


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


# ----------------------------------------------------------------------------------------------------------------------
# The run.

def main():
    model = GPT(GPTConfig())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
