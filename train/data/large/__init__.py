"""Rows of large files: tokenised by several processes (pool.py), kept on disk (cache.py)."""
