"""lm-evaluation-harness asks the base and the tuned model (`python -m eval.harness`).

command.py        the command                     results.py  its table and harness.json
backend.py        the model `jllama` of lm_eval   cli.py      lm_eval's own command line, with it
continuations.py  how likely continuations are  answers.py  answers until a stop string
"""
