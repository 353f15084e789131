"""The command line's parts, one purpose a file; `mmrec.cli` only wires them together."""
