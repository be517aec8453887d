"""The one limit of time in the tests: it stops a process that hangs,
and no machine is so slow or so busy that another reaches it.
"""

HANG = 900  # seconds
