"""The main benchmark: the test accuracy that each way to prune leaves, at equal multiply-accumulates.

``python -m benchmarks.quality`` has these commands: ``fetch`` gets the data, ``run`` does the missing runs, ``list``
prints which those are, ``table`` writes docs/quality.md and its chart. A run is one line of
benchmarks/results/quality/TASK.jsonl.
"""
