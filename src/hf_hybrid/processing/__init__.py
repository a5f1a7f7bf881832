"""Processors that turn images and recordings into the sequences of real numbers that models read."""
