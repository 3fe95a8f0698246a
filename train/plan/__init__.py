"""What a step will need, before it runs (`python -m train.plan`).

command.py     the command; its --fit is ladder.py      auto.py      choices for `train.lora`
exchange.py    what several cards send each other
planner.py     plans: asked for, remembered             compiled.py  the child that compiles a step
arithmetic.py  closed formulas                          cards.py     the GPUs
roofline.py    the time of a compiled program           hlo.py       its text, read
"""
