"""`python -m eval.report`."""

from eval.report.command import main

if __name__ == "__main__":
    main()
