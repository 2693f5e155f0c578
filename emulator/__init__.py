"""Runs the PTX of compiled kernels without a GPU.

``emulator.ptx`` is the front end: it reads PTX text into typed records. Imports nothing of ours and
no package but numpy.
"""
