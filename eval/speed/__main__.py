"""`python -m eval.speed`."""

from eval.speed.command import main

if __name__ == "__main__":
    main()
