"""Text generation: requests, greedy decoding, sampling and beam search with a key-value cache.

Start reading in `generate.py`; callers import `Request`, `Completion`, `generate` and `stream` from there.
"""
