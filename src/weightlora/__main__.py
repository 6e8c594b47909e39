"""`python -m weightlora`: where the script is not on the path, and for `accelerate launch -m` and `torchrun -m`."""

from weightlora.cli import main

if __name__ == "__main__":
    main()
