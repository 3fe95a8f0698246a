"""From text to ids: tokenizer.py, prompt.py (styles: messages to text), rows.py (data files).

tokenizer_file.py checks Meta's tokenizer.model.
"""
