"""`python -m fastar`: the command where nothing is installed, as in a checkout that is only on PYTHONPATH."""

from fastar.cli.main import main

if __name__ == "__main__":
    main()
