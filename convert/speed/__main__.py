"""`python -m convert.speed`."""

from convert.speed.command import main

if __name__ == "__main__":
    main()
