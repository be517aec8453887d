"""Other libraries. ``import dampr`` reads this much, and imports none of them; :mod:`dampr.integrations.huggingface` needs transformers."""

from . import attentions as attentions
