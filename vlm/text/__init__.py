"""Text in and out of the model: character and byte-level BPE tokenizers, and the prompt form. No torch."""
