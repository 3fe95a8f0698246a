"""A run's whole report, from files alone (`python -m eval.report`).

command.py   the command                         sections.py    the sections of a run
techniques.py  the section of an ablation        pictures.py    SVGs
evidence.py  numbers that know where they stand  document.py    HTML and Markdown of it all
"""
