"""The command line: ``main`` dispatches, ``lightning_cli`` trains, ``commands`` has the plain functions on files.

May import: everything.
"""
