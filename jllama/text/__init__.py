"""From text to ids: tokenizer.py, prompt.py (styles: messages to text), rows.py (data files)."""
