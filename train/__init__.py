"""One training run, and the making of the bundled sample.

lora.py       `python -m train.lora`: the command
config.py     every setting
data.py       examples -> windows                lint.py  `python -m train.data`: the view of them
step.py       one optimizer step, compiled       optimizer.py  who learns, and by which rule
loop.py       feeds the step                     state.py      what it saves (Orbax)
run.py        the run folder: lock, resume, signals
plan.py       `python -m train.plan`: what a step will need      ladder.py  its --fit
planner.py    plans: asked for, remembered, chosen from          auto.py    the same for train.lora
compiled.py   the child process that compiles a step             arithmetic.py  closed formulas
gpus.py       the cards
metrics.py    metrics.jsonl, TensorBoard         show.py       the terminal
sample.py     `python -m train.sample`           world.py, facts.py  what the sample is about
recipes/      settings for --config
"""
