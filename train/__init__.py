"""One training run, the planning of it, and the making of the bundled sample.

lora.py       `python -m train.lora`: the command     config.py     every setting
fine_tune.py  from the model folder to the adapter    loop.py       feeds the step
step.py       one optimizer step, compiled            optimizer.py  who learns, by which rule
data/         examples -> windows                     run/          the run folder while it lives
plan/         memory and speed in advance             sample/       the bundled sample, made
recipes/      settings for --config, by name
speed.py      `python -m train.speed`: the step timed   profile.py   by class of kernel
"""
