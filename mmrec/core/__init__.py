"""Parts of a block: decays, planning error, state, loss."""
