"""Builds the optional cuSOLVER extension once csrc/ holds one; the base wheel is pure Python."""

from setuptools import setup

setup()
