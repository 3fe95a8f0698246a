"""`python -m eval.harness`."""

from eval.harness.command import main

if __name__ == "__main__":
    main()
