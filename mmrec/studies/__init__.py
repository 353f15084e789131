"""Convergence studies: many short trainings that differ in one thing, and what is made of their curves."""
