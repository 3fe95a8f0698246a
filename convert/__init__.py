"""Weights in and out, byte for byte; the only place that imports torch.

from_meta.py  Meta's files -> a model folder (a command)
to_meta.py    a model folder -> Meta's files (a command)
shards.py     consolidated.NN.pth: opened, checked, joined block by block
params.py     params.json: read and written
names.py      how each tensor is cut over the shards
"""
