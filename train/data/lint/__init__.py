"""`jllama lint`: what data files hold, as training will see it.

command.py   settings, and the command            cost.py      steps, and time on a card
findings.py  what is counted of rows and tokens   picture.py   their lengths
show.py      all of it on the terminal
"""
