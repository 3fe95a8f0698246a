"""`python -m train.sample`."""

from train.sample.make import main

if __name__ == "__main__":
    main()
