"""One module for each kind of file that holds networks: `read` describes what is in it, `write` writes one."""
