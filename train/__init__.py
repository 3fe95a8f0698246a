"""One training run, and the making of the bundled sample.

lora.py       `python -m train.lora`: the command
config.py     every setting
data.py       rows -> examples -> windows        lint.py  `python -m train.data`: the view of them
step.py       one optimizer step, compiled       optimizer.py  who learns, and by which rule
loop.py       feeds the step                     state.py      what it saves (Orbax)
run.py        the run folder: lock, resume, signals
metrics.py    metrics.jsonl, TensorBoard         show.py       the terminal
sample.py     `python -m train.sample`           world.py, facts.py  what the sample is about
recipes/      settings for --config
"""
