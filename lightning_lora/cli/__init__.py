"""The command line: ``main`` dispatches, ``lightning_cli`` trains, ``commands`` are the plain functions on files.

May import: everything.
"""
