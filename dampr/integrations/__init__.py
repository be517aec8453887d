"""Other libraries. ``import dampr`` reads this much, and imports none of them.

:mod:`dampr.integrations.huggingface` needs transformers, :mod:`dampr.integrations.onnx` needs onnx, onnxscript and
onnxruntime, :mod:`dampr.integrations.lightning` needs Lightning; :mod:`dampr.integrations.tensorboard` needs no more
than what it is given.
"""

from . import attentions as attentions
