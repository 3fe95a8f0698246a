"""Several processes that train one run, each with devices of its own.

join.py     who they are, and what they tell each other      launch.py   `jllama launch` starts them
watch.py    one that fails, dies or hangs ends all of them
"""
