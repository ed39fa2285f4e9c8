"""Logits of tiny models as Transformers computes them; `models` says which models, `__main__` computes them anew."""
