"""Many architectures, each once through all-linear adapters."""
