"""What is done to a whole model: find targets, apply, merge, quantize, share inputs, compile, fit into parallel wrappers.

May import: everything up to ``variants``.
"""
