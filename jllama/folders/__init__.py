"""What lies on disk: every file name and field on which the packages meet is written here, once.

model.py     the model folder; load.py makes a `Llama` of it; codes.py has weights in 8 and 4 bits
adapter.py   the adapter folder: PEFT's files and a passport; peft_config.py reads its settings
run.py       the run folder
manifest.py  hashes of tensors and files            tensors.py     safetensors
files.py     folders whole or not at all, locks     pickled.py     what torch.save wrote of adapters
inputs.py    what cannot be read ends in a message  json_files.py  JSON and JSON lines
"""
