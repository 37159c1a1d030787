"""Passes that cut channels: hidden widths, heads, streams."""
