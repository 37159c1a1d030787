"""Passes that change how the weights of linear layers are stored."""
