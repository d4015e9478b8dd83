"""The nouns: what is trained, how it is split, on what, how much of it, and the ledger both authors write.

Imports nothing outside the standard library, so that `jaxllm --help` starts at once.
"""
