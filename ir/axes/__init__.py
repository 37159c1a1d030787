"""Coupled-channel groups: what can be cut together, and cutting it.

`find_groups` says which slices of which weights form one removable unit (a channel, a head, a key and value head with
its query heads); `cut` removes units from a program.
"""

from __future__ import annotations

from .contractions import KERNEL
from .cut import cut, cut_all
from .groups import ChannelGroup, Member, find_groups

__all__ = ["KERNEL", "ChannelGroup", "Member", "cut", "cut_all", "find_groups"]
