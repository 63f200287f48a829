"""Checkpoints in and out: herd's own, Hugging Face's, Meta's and GGUF. `names.py` is the table that all of them follow."""
