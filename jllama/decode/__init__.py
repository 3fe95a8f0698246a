"""From ids to ids: generate.py (with a cache), sampling.py (the next token), weights.py (what the
compiled functions read), stream.py (text)."""
