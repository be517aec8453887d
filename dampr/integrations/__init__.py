"""Other libraries. ``import dampr`` reads this much, and imports none of them.

:mod:`dampr.integrations.huggingface` needs transformers, :mod:`dampr.integrations.onnx` needs onnx, onnxscript and onnxruntime.
"""

from . import attentions as attentions
