"""Finds out which published networks dampr can prune. Each is converted, half of every width is closed, and the network
is compacted and compared with the masked one; Torch-Pruning's result stands beside it.

``python -m benchmarks.coverage fetch`` downloads timm, torchvision and segmentation_models_pytorch without their
dependencies; ``run`` measures the networks without a result, each in a process of its own, and writes a line of JSON
for each; ``table`` writes docs/coverage.md.
"""
