"""Sample pictures from a trained network. `python generate.py --help` says how."""

from gan.cli.generate import generate

if __name__ == "__main__":
    generate()
