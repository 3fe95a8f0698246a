"""Hugging Face's files: files.py, config.py, tokenizer.py with bpe.py and llama3.py."""
