"""A GGUF file, as llama.cpp and Ollama read it.

vocabulary.py  the tokenizer in llama.cpp's terms
metadata.py    the header: sizes, rotary embedding, vocabulary
tensors.py     names, types and bytes of the tensors
"""
