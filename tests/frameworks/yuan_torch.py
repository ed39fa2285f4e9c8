"""Yuan 2.0 in plain PyTorch, by the facts in docs/checkpoints.md and models/yuan.py, for one pass over a whole prompt.

Classes and attributes have the names that DeepSpeed's rules for Yuan look for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class YuanRMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class LocalizedFiltering(nn.Module):
    """x (B, T, H) plus two convolutions of each position and the one before it, normed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.conv1 = nn.Conv2d(dim, dim // 2, (2, 1), padding=(1, 0))
        self.conv2 = nn.Conv2d(dim // 2, dim, (2, 1), padding=(1, 0))
        self.output_layernorm = YuanRMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        y = self.conv1(x.transpose(1, 2).unsqueeze(3))[:, :, :n]
        y = self.conv2(y)[:, :, :n].squeeze(3).transpose(1, 2)
        return self.output_layernorm(x + y)


class YuanAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim = dim, heads, dim // heads
        self.v_proj, self.q_proj, self.k_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.lf_gate = LocalizedFiltering(dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        values = self.v_proj(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        filtered = self.lf_gate(x)
        both = torch.cat([self.q_proj(filtered), self.k_proj(filtered)], -1)  # query and key of each head in turn
        query, key = both.view(b, t, self.num_heads, 2 * self.head_dim).transpose(1, 2).chunk(2, -1)
        query, key = rotated(query), rotated(key)
        mixed = functional.scaled_dot_product_attention(query, key, values, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, self.hidden_size))


class YuanMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj, self.gate_proj = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * functional.silu(self.up_proj(x)))


class YuanDecoderLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = YuanAttention(config.hidden_size, config.num_attention_heads)
        self.mlp = YuanMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = YuanRMSNorm(config.hidden_size)
        self.post_attention_layernorm = YuanRMSNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class YuanModel(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([YuanDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = YuanRMSNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class YuanForCausalLM(nn.Module):
    """ids (B, T) to logits (B, T, V); the head is the embedding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.model = YuanModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding, halves, base 10,000, of x (B, heads, T, head_dim)."""
    t, dim = x.shape[2:]
    angles = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = (f(torch.cat([angles, angles], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin
