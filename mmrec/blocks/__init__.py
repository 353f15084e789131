"""Blocks of the network: the six projections and the block itself."""
