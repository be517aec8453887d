"""Random and hostile calls of everything that is public; ``python -m tests.fuzz --help``."""
