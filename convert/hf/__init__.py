"""Hugging Face's files: files.py (safetensors), config.py, tokenizer.py and its bpe.py."""
