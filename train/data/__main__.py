"""`python -m train.data`."""

from train.data.lint.command import main

if __name__ == "__main__":
    main()
