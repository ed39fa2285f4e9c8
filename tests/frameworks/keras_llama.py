"""A Llama in Keras, as its users write one: subclassed layers, Keras' own Dense, a cache of keys and values."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from fourfold.checkpoint.source import Source
from fourfold.config import ModelConfig
from fourfold.rotary import rotary_tables

Cache = list[tuple[Any, Any]]  # of each layer, keys and values: (batch, positions, heads, head dim)


def dense(units: int, **how: Any) -> layers.Dense:
    return layers.Dense(units, use_bias=False, kernel_initializer="zeros", **how)  # weights come from a checkpoint


class Norm(layers.Layer):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * ops.rsqrt(ops.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale


class Block(layers.Layer):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.attention_norm, self.mlp_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.q = dense(c.n_heads * c.head_dim)
        self.k = dense(c.n_kv_heads * c.head_dim)
        self.v = dense(c.n_kv_heads * c.head_dim)
        self.o = dense(c.dim)
        self.gate = dense(c.hidden_dim, activation="silu")
        self.up = dense(c.hidden_dim)
        self.down = dense(c.dim)

    def call(self, x: Any, cos: Any, sin: Any, past: tuple[Any, Any] | None) -> tuple[Any, tuple[Any, Any]]:
        h = self.attention_norm(x)
        q, k, v = (
            turned(self.heads(self.q(h)), cos, sin),
            turned(self.heads(self.k(h)), cos, sin),
            self.heads(self.v(h)),
        )
        if past is not None:
            k, v = ops.concatenate([past[0], k], 1), ops.concatenate([past[1], v], 1)
        x = x + self.o(self.attend(q, k, v))
        h = self.mlp_norm(x)
        return x + self.down(self.gate(h) * self.up(h)), (k, v)

    def heads(self, x: Any) -> Any:
        return ops.reshape(x, (*ops.shape(x)[:2], -1, self.c.head_dim))

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        together = self.c.n_heads // self.c.n_kv_heads
        k, v = ops.repeat(k, together, axis=2), ops.repeat(v, together, axis=2)
        scores = ops.einsum("bqhd,bkhd->bhqk", q, k) * self.c.head_dim**-0.5
        n_new, n_all = ops.shape(scores)[2:]
        future = ops.arange(n_all)[None] > ops.arange(n_all - n_new, n_all)[:, None]
        mixed = ops.einsum("bhqk,bkhd->bqhd", ops.softmax(ops.where(future, -np.inf, scores)), v)
        return ops.reshape(mixed, (*ops.shape(mixed)[:2], -1))


class Llama(keras.Model):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embedding = layers.Embedding(c.vocab_size, c.dim, embeddings_initializer="zeros")
        self.blocks = [Block(c) for _ in range(c.n_layers)]
        self.norm = Norm(c.norm_eps)
        self.head = dense(c.vocab_size)
        self.angles = rotary_tables(c, c.max_context, "f32")

    def call(self, ids: Any, cache: Cache | None = None) -> tuple[Any, Cache]:
        """ids (batch, positions), behind those of the cache, to logits (batch, positions, vocabulary)."""
        begin = 0 if cache is None else int(cache[0][0].shape[1])
        cos, sin = (table[begin : begin + ids.shape[1], None] for table in self.angles)
        x, grown = self.embedding(ids), []
        for i, block in enumerate(self.blocks):
            x, keys_and_values = block(x, cos, sin, None if cache is None else cache[i])
            grown.append(keys_and_values)
        return self.head(self.norm(x)), grown

    def continue_greedily(self, ids: list[int], n: int) -> list[int]:
        logits, cache = self(tf.constant([ids]))
        answer = [int(np.argmax(logits[0, -1]))]
        while len(answer) < n:
            logits, cache = self(tf.constant([answer[-1:]]), cache=cache)
            answer.append(int(np.argmax(logits[0, -1])))
        return answer


def turned(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary embedding: x (batch, positions, heads, head dim)."""
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def llama_of(source: Source) -> Llama:
    """A model with a checkpoint's weights, in float32; the head is a Dense of its own, also where it is tied."""
    model = Llama(source.config)
    model(tf.constant([[0, 0]]))

    def rows(name: str) -> Any:
        tensor = source.tensors[f"model.{name}.weight"]
        return np.asarray(tensor.rows(0, tensor.shape[0]), np.float32)

    model.embedding.set_weights([rows("embed_tokens")])
    model.head.set_weights([rows("embed_tokens").T])
    model.norm.set_weights([rows("norm")])
    for i, block in enumerate(model.blocks):
        theirs = f"layers.{i}"
        block.attention_norm.set_weights([rows(f"{theirs}.input_layernorm")])
        block.mlp_norm.set_weights([rows(f"{theirs}.post_attention_layernorm")])
        for part in "qkvo":
            getattr(block, part).set_weights([rows(f"{theirs}.self_attn.{part}_proj").T])
        for part in ("gate", "up", "down"):
            getattr(block, part).set_weights([rows(f"{theirs}.mlp.{part}_proj").T])
    return model
