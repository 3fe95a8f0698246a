"""`python -m jllama` is the `jllama` script."""

from jllama.cli.script import main

if __name__ == "__main__":
    main()
