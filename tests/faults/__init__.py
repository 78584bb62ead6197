"""Bad input and faults, one row of ``table.py`` after another: ``make faults`` runs them and prints the state of each row.

A test belongs to a row by its mark: ``@row(17)``, or ``case(17, ...)`` in a parametrized test. It may stand in any folder of the tests.
Every refusal is held to the same three things: the exception's type, and a message that has the field, the value and the fix; a model
with every bit, flag and class that it had before the call; and a disk with every byte that it had.
"""
