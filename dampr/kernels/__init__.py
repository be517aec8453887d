"""Device code: ``@triton.jit`` functions and the tiles they are launched with.

Imports no torch: it compiles ahead of time anywhere.
"""
