"""The detector: data path, networks, training loop, export, evaluation. Imported by the child process only."""
