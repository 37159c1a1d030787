"""How a budget is shared among sites: one file per allocator, over one table of levels (`table`)."""
