"""The version, here alone: setup.py reads it, ``peftk.__version__`` and ``peftk.info()`` show it."""

VERSION = "0.1.0"
