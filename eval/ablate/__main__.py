"""`python -m eval.ablate`."""

from eval.ablate.command import main

if __name__ == "__main__":
    main()
