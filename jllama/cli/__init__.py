"""The shell that every command shares.

script.py    the `jllama` script: the commands by name
command.py   one command: flags into settings, errors into messages and exit codes
settings.py  settings from a YAML file
terminal.py  what people read: console, progress, hints that can be pasted
card.py      the GPU before JAX starts; compiler.py: what compiled functions ask of XLA
children.py  processes that run this project's own modules, by way of child.py
"""
