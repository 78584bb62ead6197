"""Adapters, and merged models, on disk: PEFT's folder format, the base's fingerprint, saving, loading, exporting.

May import: everything up to ``model``.
"""
