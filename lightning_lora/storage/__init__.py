"""Read and write files and folders: durable writes, folders replaced as a whole, locks, and checkpoints that may be anyone's.

A write leaves the old content or the new one, whatever ends the process. A read runs no code, and takes no more memory than the file has.

May import: torch. Nothing of this package outside this folder.
"""
