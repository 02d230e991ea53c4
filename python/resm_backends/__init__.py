"""Doors from other tools into resm-kernels, a module for each."""
