"""What several processes do: each ``checks_*.py`` runs on the ranks of a process group over gloo, once,
and its checks are tests.
"""
