"""Ctrl-C, with more to say than that it was pressed."""

from __future__ import annotations


class Interrupted(Exception):
    """The user ended a command; the text says in one line what is kept and how to go on."""
