"""Which networks of others can be pruned: each is converted, half closed, compacted and compared, with Torch-Pruning
beside it.

``python -m benchmarks.coverage fetch`` downloads timm, torchvision and segmentation_models_pytorch without what they
depend on; ``run`` measures the networks that are missing, one process each, a line of JSON a network; ``table`` writes
docs/coverage.md.
"""
