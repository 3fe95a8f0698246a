"""A GGUF file, as llama.cpp and Ollama read it.

vocabulary.py       the tokenizer of a model folder in llama.cpp's terms (terms.py)
json_vocabulary.py  that of a tokenizer.json
metadata.py         the header: sizes, rotary embedding, vocabulary
tensors.py          names, types and bytes of the tensors
"""
