"""A*PO (policy optimisation by optimal-advantage regression) on Megatron-Core. Importing this needs no torch."""

__version__ = "0.1.0"
