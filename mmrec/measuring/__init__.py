"""Instruments for measurements: clocks, memory meters, the machine, and where results are written. They know torch, not the network."""
