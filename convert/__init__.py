"""Weights in and out, byte for byte; the only place that imports torch.

from_meta.py, from_hf.py  another format's files -> a model folder (commands)
to_meta.py, to_hf.py      a model folder, with an adapter if asked -> another format (commands)
verify.py                 a model folder against its certificate and its source (command)
speed.py                  how fast, beside cp (command)
blocks.py, export.py      what all commands in, and all commands out, share
merge.py                  an adapter folded into the blocks that pass, and what rounding took
shards.py, meta_weights.py  consolidated.NN.pth: checked; joined block by block
archive.py                consolidated.NN.pth: laid out and filled in
params.py                 params.json: read and written
hf_files.py               safetensors and their index: checked and read
hf_config.py              config.json: read and written
hf_tokenizer.py           tokenizer files: read and written
rules.py                  what a field of a foreign JSON file must be
names.py, dtypes.py       tables: cuts, Hugging Face's names, dtypes
"""
