"""What leans on private insides of other libraries. It is imported only where a user asks for it by name.

May import: everything up to ``optim``. Only ``strategies`` imports it.
"""
