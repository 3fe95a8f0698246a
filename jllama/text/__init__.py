"""From text to ids.

row_file.py   the rows of a file        messages.py   a row, of whichever kind, as messages
prompt.py     styles: messages as text  tokenizer.py  text as ids
rows.py       rows as ids, and what of them is learned
tokenizer_file.py checks Meta's tokenizer.model
"""
