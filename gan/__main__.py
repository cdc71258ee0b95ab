"""`python -m gan <command>`."""

from gan.cli import main

if __name__ == "__main__":
    main(prog_name="python -m gan")
