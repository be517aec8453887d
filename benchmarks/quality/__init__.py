"""The benchmark that decides: what test accuracy each way to prune leaves, at equal multiply-accumulates.

``python -m benchmarks.quality``: ``fetch`` gets the data, ``run`` does the runs that are missing, ``list`` says which
those are, ``table`` writes docs/quality.md and its chart. A run is one line of benchmarks/results/quality/TASK.jsonl.
"""
