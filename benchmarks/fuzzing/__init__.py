"""Random requests, rude clients, and what a server must still be afterwards."""
