"""What `benchmarks/serve.py` is made of: the traffic, the clients, the same work offline, the report."""
