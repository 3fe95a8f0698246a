"""The making of the bundled sample (`python -m train.sample`): make.py; world.py and facts.py."""
