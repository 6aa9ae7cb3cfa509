"""`python -m discl.cli` is `discl`, for `torchrun -m` and for machines without the script."""

from . import main

if __name__ == "__main__":
    main()
