"""`python -m trtkit`, the same as the `trtkit` command."""

from trtkit.cli import main

if __name__ == "__main__":
    main()
