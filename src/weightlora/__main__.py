"""`python -m weightlora`, the command where its script is not on the path."""

from weightlora.cli import main

if __name__ == "__main__":
    main()
