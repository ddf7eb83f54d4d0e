"""Movers as Jobs: what is refused, where and as whom a mover runs, and the Job that is made of it."""
