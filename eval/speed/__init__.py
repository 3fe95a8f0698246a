"""How fast, as ratios from one call (`python -m eval.speed`).

command.py   the command      train.py  training, variant by variant
generate.py  generation, with a process of side.py for each side
"""
