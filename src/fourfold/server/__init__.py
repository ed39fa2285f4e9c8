"""One loaded model behind OpenAI's HTTP interface: FastAPI in front, the step loop in a thread of its own."""
