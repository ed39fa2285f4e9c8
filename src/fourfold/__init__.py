"""fourfold: 100-billion-parameter language models on an ordinary multi-socket CPU server."""
