"""Text generation with a key-value cache: requests, greedy decoding, sampling and beam search.

Start reading in `generate.py`. Callers import `Request`, `Completion`, `generate` and `stream` from `generate.py`.
"""
