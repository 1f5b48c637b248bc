"""The hot operations: one file each, with the argument checks, the PyTorch reference and the choice of backend."""
