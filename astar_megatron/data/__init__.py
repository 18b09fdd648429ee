"""Prompts, the contract under which rewards are comparable, and the V* table on disk."""
