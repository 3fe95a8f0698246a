"""Frozen weights in 8 and 4 bits.

formats.py  what a matrix becomes in each format
weights.py  the weights that hold it, and their products

`jllama.folders.codes` has them on disk.
"""
