"""From an untrusted checkpoint to a model: formats, the safe unpickler, state dicts, architectures.

Nothing is imported here: what a file is (`file_kinds`) is found before PyTorch is imported.
"""
