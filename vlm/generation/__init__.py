"""From pictures and prompts to text: requests, greedy decoding, sampling and beam search.

Start reading in `generate.py`. Plain torch.
"""
