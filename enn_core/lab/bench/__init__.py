"""The bench of learning rules: same data, budget and initial weights, each rule at its best rate.

Needs the packages of `enn_core.classify`; `enn_core` itself does not import it.
"""
