"""Moves training checkpoints from volumes to object stores, and never calls a half-written folder a checkpoint."""

__version__ = "0.1.0"
