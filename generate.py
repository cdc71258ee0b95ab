"""Sample pictures from a trained network. `python generate.py --help` says how."""

from gan.cli import door

if __name__ == "__main__":
    door("generate")
