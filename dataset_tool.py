"""Pack your images into a dataset to train on. `python dataset_tool.py --help` says how."""

from gan.cli import door

if __name__ == "__main__":
    door("dataset-tool")
