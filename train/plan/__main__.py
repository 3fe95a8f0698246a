"""`python -m train.plan`."""

from train.plan.command import main

if __name__ == "__main__":
    main()
