"""`python -m train.recipes`."""

from train.recipes.command import main

if __name__ == "__main__":
    main()
