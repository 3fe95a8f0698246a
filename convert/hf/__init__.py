"""Hugging Face's files.

files.py      the weights: checked, read block by block; bitsandbytes.py, those in nf4
stored.py     which tensors a folder has, and in which files
config.py     config.json: read and written; foreign.py, of what is no LLaMA
tokenizer.py  a tokenizer's files: read and written; bpe.py and llama3.py, of single kinds
"""
