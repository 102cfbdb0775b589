"""Tests lie in folders named as what they test; what several of them share lies in `cases`.

A package, so that processes which tests start find `tests.…` here whatever else is installed.
"""
