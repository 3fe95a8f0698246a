"""How fast, as ratios from one call (`python -m eval.speed`).

command.py   the command
train.py     training, variant by variant, or beside a process of peft_training.py
generate.py  generation, with a process of side.py for each side
llama_cpp.py llama.cpp, as one of those sides
ceilings.py  what the machine can do at most    torch_models.py  what the peer's sides share
suite/       all of it on a GPU, unattended
"""
