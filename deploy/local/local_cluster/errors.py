"""Every error that a user may see is of one type, so that the command line prints it without a traceback."""

from __future__ import annotations


class LocalClusterError(Exception):
    """Says what happened, with which value, and what to do about it."""


class AddressInUse(LocalClusterError):
    """A program found its port taken between the moment it was chosen and the moment it was bound."""


class NodeUnavailable(LocalClusterError):
    """This machine cannot run a node: no fault of ours, so tests that need one are skipped with this text."""
