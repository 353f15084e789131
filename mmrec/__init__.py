"""MM-Rec: a recurrent language model, its operators and its command line."""

__version__ = "0.1.0"
