"""Pack your images into a dataset to train on. `python dataset_tool.py --help` says how."""

from gan.cli.dataset_tool import dataset_tool

if __name__ == "__main__":
    dataset_tool()
