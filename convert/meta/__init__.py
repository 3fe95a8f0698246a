"""Meta's files.

shards.py, weights.py  consolidated.NN.pth: checked; joined block by block
archive.py             consolidated.NN.pth: laid out and filled in
pickled.py             what torch.save has written: opened, and only ever weights
params.py              params.json: read and written
cuts.py                how tensors are cut over shards
"""
