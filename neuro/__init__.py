"""Brain age from MRI: a 3D network trained block by block.

Not built yet: this release carries the layers (`enn_core`) and image-text search (`retrieval`).
"""
