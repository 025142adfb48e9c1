"""`python -m simclr <command>`."""

from simclr.cli import main

if __name__ == "__main__":
    main()
