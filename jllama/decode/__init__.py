"""From ids to ids: generate.py (with a cache), sampling.py (the next token), stream.py (text)."""
