"""Processors that turn images and waveforms into the sequences of real numbers that models read."""
