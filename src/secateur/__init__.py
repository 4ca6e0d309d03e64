"""secateur: prune an LLM, pack what is left, serve it, and measure whether it was worth it.

Importing this package is cheap (no torch, no transformers) and registers one thing: as soon as
transformers is imported, before or after, it can open packed models with ``from_pretrained``.
"""

from secateur._transformers_hook import install as _install

__version__ = "0.1.0"

_install()
