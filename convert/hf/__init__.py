"""Hugging Face's files: files.py (safetensors), config.py, tokenizer.py."""
