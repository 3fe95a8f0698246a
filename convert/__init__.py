"""Weights in and out, byte for byte; the only place that imports torch.

from_meta.py, from_hf.py  another format's files -> a model folder (commands)
to_meta.py, to_hf.py,     a model folder, with an adapter if asked -> another format (commands)
to_gguf.py
quantize.py               a model folder with its linears in 8 or 4 bits (command)
verify.py                 a model folder against its certificate and its source (command)
speed/                    how fast, beside cp (command)
meta/, hf/, gguf/         the files of each format
blocks.py, export.py      what all commands in, and all commands out, share
rules.py                  what a field of a foreign JSON file must be
change/                   weights that change on their way, and what that does to the model
dtypes.py                 dtypes and casts; memory of mapped tensors
"""
