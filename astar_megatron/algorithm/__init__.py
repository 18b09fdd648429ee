"""The mathematics of A*PO and its siblings: tensors in, tensors out.

No files, no processes, no Megatron; imports with torch alone.
"""
